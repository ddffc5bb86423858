"""What every learning rule owes. Checks the rules of fa.py, or yours:

    python -m pytest tests/test_rule_contract.py --rule my_rule.py:MyRule
    python -m pytest tests/test_rule_contract.py --rule "submissions/*.py:MyRule" --like kp --csv grades.csv

Each property is one test, and its first line is what the report says. Each rule is checked in a process of
its own, which may take --seconds; a property that does not apply counts as kept: all scores count the same.

What a class must declare:
    uses_weight = True  one of its methods reads the values of layer.weight, all or some, be it through a
                        forward pass, as a weight mirror does. The report says which method it is.
                        Feedback that learns may not simply be a copy of W.
    learns = True       its feedback changes in training
A rule such as Kolen-Pollack's, which reads the gradient of W but never W, does not use W.
"""
import copy
import functools
import io
import pickle
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import data
import fa
import grader
import models
import muon
import rank
from harness import rulefile


def expect(condition, message):
    if not condition:
        pytest.fail(message, pytrace=False)


def network(dtype=torch.float64):
    """Strided, grouped and dilated convolutions and linear layers; images and labels for it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2, padding=1),
                          nn.ReLU(), nn.Conv2d(12, 8, 3, padding=2, dilation=2, groups=2), nn.ReLU(),
                          nn.Conv2d(8, 6, 1), nn.Flatten(), nn.Linear(150, 40), nn.ReLU(),
                          nn.Linear(40, 5)).to(dtype)
    return model, torch.randn(6, 3, 10, 10, dtype=dtype), torch.tensor([0, 1, 2, 3, 4, 0])


def attached(rule, seed=0, dtype=torch.float64, draws=0):
    model, x, labels = network(dtype)
    torch.manual_seed(draws)                            # for a rule that draws from the global generator
    return model, x, labels, fa.attach(model, rulefile.make(rule, seed))


def gradients(model, x, labels):
    """By name, of the parameters that the model had before the rule came; None where no error arrives."""
    model.zero_grad()
    for module in model.modules():
        if hasattr(module, "rule") and module.rule.needs_targets:
            module.rule.targets = labels
    F.cross_entropy(model(x).float(), labels).backward()
    return {name: p.grad for name, p in model.named_parameters() if name.endswith((".weight", ".bias"))}


def equal(a, b):
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def same(a, b):
    return a.keys() == b.keys() and all(
        b[k] is None if a[k] is None else b[k] is not None and equal(a[k], b[k]) for k in a)


def train(model, x, labels, handle, steps=5, decay=0.1):
    optimiser = torch.optim.SGD(model.parameters(), 0.1, weight_decay=decay)
    torch.manual_seed(1)                                        # a rule may be random
    for _ in range(steps):
        optimiser.zero_grad()
        handle.rule.targets = labels if handle.rule.needs_targets else None
        F.cross_entropy(model(x).float(), labels).backward()
        handle.before_step()
        optimiser.step()
    return model


METHODS = "prepare", "backward", "before_step"


def watched(rule, notes, under=None):
    """A subclass of `rule` whose methods leave W and the error as they were, whatever those of `rule` do.

    notes  gets what they did: `changed`, and the angle between the error sent and backprop's: `angles`
    under  while this method runs, every W is another one: if that makes any difference, the method reads W
    """
    layers = []
    notes.changed, notes.angles = [], {}

    def watching(name):
        def method(self, layer, *given):                # given: nothing, or the error and the input's shape
            if layer not in layers:
                layers.append(layer)
            weights = [each.weight for each in layers]
            true = [weight.detach().clone() for weight in weights]
            meant = [-2 * weight.roll(1) if name == under else weight for weight in true]
            error = given[0].clone() if given and given[0] is not None else None
            for weight, value in zip(weights, meant):
                weight.data.copy_(value)                # .data: so that autograd does not mind
            sent = getattr(rule, name)(self, layer, *given)
            for each, weight, value, before in zip(layers, weights, meant, true):
                if each.weight is not weight or not equal(weight.detach(), value):
                    notes.changed.append(f"{name} changes layer.weight; only the optimiser should do that")
                each.weight = weight
                weight.data.copy_(before)
            if error is not None and not equal(given[0], error):
                notes.changed.append(f"{name} changes the error that it is given; expected a new tensor")
                given[0].copy_(error)
            if isinstance(sent, torch.Tensor) and sent.shape == given[1]:
                W = layer.weight.detach()
                notes.angles[layer] = rank.angle(sent, fa.project(layer, W, error, given[1]))
            return sent
        return method

    return type(rule.__name__, (rule,), {name: watching(name) for name in METHODS})


@functools.cache
def changes(rule):
    """What the methods of this class do to W and to the error that they are given."""
    notes = types.SimpleNamespace()
    train(*attached(watched(rule, notes), dtype=torch.float32))
    return list(dict.fromkeys(notes.changed))


@pytest.fixture
def rule(submitted):
    """The class to check. If it changes W or the error, one property says so; the others do not see it."""
    return watched(submitted, types.SimpleNamespace()) if changes(submitted) else submitted


# ---- the properties ----------------------------------------------------------------------------------------

def test_shapes_and_dtypes(rule):
    """sends an error of the right shape and dtype through linear, strided and grouped convolutions"""
    for dtype in (torch.float64, torch.float32):
        model, x, labels, handle = attached(rule, dtype=dtype)
        got = gradients(model, x, labels)               # fa.py itself refuses a wrong shape, dtype or device
        for name, g in got.items():
            expect(g is None or g.dtype == dtype,
                   f"the gradient of {name} has {g is not None and g.dtype}, expected {dtype}")


def test_finite(rule):
    """gives finite gradients, also under bf16 autocast"""
    for autocast in (False, True):
        model, x, labels, handle = attached(rule, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for name, g in gradients(model, x, labels).items():
                expect(g is None or g.isfinite().all(),
                       f"the gradient of {name} is NaN or infinite{' in bf16' * autocast}")


def test_forward_is_unchanged(rule):
    """leaves the forward pass as it was"""
    plain, x, _ = network()
    model, *_ = attached(rule)
    expect(torch.equal(model(x), plain(x)), "the outputs with the rule differ from those without it")


def test_classifier_is_exact(rule):
    """leaves the classifier's own gradient exact"""
    plain, x, labels = network()
    model, *_ = attached(rule)
    expected, got = gradients(plain, x, labels), gradients(model, x, labels)
    for name in ("10.weight", "10.bias"):
        expect(got[name] is not None and torch.equal(got[name], expected[name]),
               f"the gradient of the last layer's {name[3:]} differs from backprop's")


def test_changes_nothing_else(submitted):
    """leaves W and the error that it is given as they are"""
    expect(not changes(submitted), ". And ".join(changes(submitted)))


def copied(rule):
    """The first layer whose feedback is W after one before_step, if there is one."""
    model, x, labels, handle = attached(rule)
    gradients(model, x, labels)
    handle.before_step()
    for name, layer in handle.layers.items():
        made = [getattr(layer, each) for each in handle.made[name]]
        if any(B.shape == layer.weight.shape and rank.angle(B, layer.weight) < 0.1 for B in made):
            return layer
    return None


def test_true_path_is_cut(rule):
    """does not read W, unless the class declares uses_weight = True; keeps no copy of W as feedback"""
    notes = types.SimpleNamespace()

    def trained(under=None):
        return train(*attached(watched(rule, notes, under))).state_dict()

    plain = trained()
    angles = notes.angles
    readers = []
    if same(trained(), plain):                      # else it is not deterministic, and nothing can be said
        readers = [name for name in METHODS if not same(trained(under=name), plain)]
    text = " and ".join(readers)
    if rule.uses_weight:
        which = rule.learns and copied(rule)
        expect(not which, f"after before_step the feedback of {which} is W itself: that is backprop, one "
               "step late; expected feedback that learns what W is")
        pytest.skip("the class declares uses_weight = True" + f"; W is read in {text}" * bool(readers))
    expect(not readers, f"{text} read{'s' * (len(readers) == 1)} W: with another W in its place the rule "
           "does something else; expected feedback weights of its own, or uses_weight = True in the class")
    for layer, degrees in angles.items():
        expect(not degrees <= 10, f"the error below {layer} is backprop's own: the feedback is a copy of W; "
               "expected feedback weights of its own, or uses_weight = True in the class")


def test_state_is_saved(rule):
    """goes on from what it saved: its feedback in the model's state_dict, what else it keeps in its own"""
    model, x, labels, handle = attached(rule)
    train(model, x, labels, handle)
    file = io.BytesIO()
    torch.save([model.state_dict(), handle.rule.state_dict()], file)
    file.seek(0)
    try:
        state, kept = torch.load(file, weights_only=True)
    except pickle.UnpicklingError:
        pytest.fail("what the rule keeps in self cannot be saved: expected tensors, numbers, texts, and "
                    "lists or dictionaries of them; a layer's own go into layer.register_buffer, in prepare",
                    pytrace=False)
    fresh, *_, its = attached(rule, seed=1, draws=1)
    fresh.load_state_dict(state)
    its.rule.load_state_dict(kept)
    train(model, x, labels, handle)
    train(fresh, x, labels, its)
    expect(same(fresh.state_dict(), model.state_dict()), "a fresh rule that took all of it goes another way "
           "than the rule that was saved: something that it uses is neither in self nor a buffer or "
           "parameter of its layer, made in prepare")


def test_feedback_is_fixed(rule):
    """leaves its feedback as it was drawn, unless the class declares learns = True"""
    if rule.learns:
        pytest.skip("the class declares learns = True")
    model, x, labels, handle = attached(rule)
    optimiser, digests = torch.optim.SGD(model.parameters(), 0.1), []
    for _ in range(3):
        gradients(model, x, labels)
        digests.append(rulefile.feedback_digest(handle))
        handle.before_step()
        optimiser.step()
    expect(rulefile.feedback_digest(handle) == digests[0] == digests[1],
           "the feedback weights changed in training; expected fixed ones, or learns = True in the class")


def test_deterministic(rule):
    """is deterministic: the same seed gives the same gradients"""
    results = []
    for draws in (0, 1):
        model, x, labels, handle = attached(rule, draws=draws)
        torch.manual_seed(1)
        results.append(gradients(model, x, labels))
    expect(same(*results), "two models with the same seed have different gradients; draw with "
           "self.draw(layer) or self.generator")


def test_copies(rule):
    """works after copy.deepcopy, and the copy goes its own way"""
    model, x, labels, handle = attached(rule)
    clone, other = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        for tensor in [*other.parameters(), *other.buffers()]:
            tensor.zero_()
    twin, *_ = attached(rule)
    torch.manual_seed(1)
    expected = gradients(twin, x, labels)
    torch.manual_seed(1)
    expect(same(gradients(model, x, labels), expected),
           "a change of the copy changed the model: they share tensors")
    torch.manual_seed(1)
    expect(same(gradients(clone, x, labels), expected), "a copy of the model has other gradients than it")


def test_removed(rule):
    """leaves plain backprop behind when it is removed"""
    plain, x, labels = network()
    model, _, _, handle = attached(rule)
    gradients(model, x, labels)
    handle.before_step()
    handle.remove()
    expect(model.state_dict().keys() == plain.state_dict().keys(),
           "names are left in the state_dict: "
           + ", ".join(sorted(model.state_dict().keys() - plain.state_dict().keys())))
    expect(same(gradients(model, x, labels), gradients(plain, x, labels)),
           "the gradients differ from backprop's")


def test_like(rule, request):
    """does what the rule named by --like does: the same weights after 5 steps"""
    like = request.config.getoption("--like")
    wanted, got = (dict(train(*attached(each)).named_parameters()) for each in (rulefile.load(like), rule))
    missing = sorted(wanted.keys() - got.keys())
    expect(not missing, f"{', '.join(missing)}: no parameters of the model, so no optimiser updates them")
    off = {name: ((got[name] - p).norm() / p.norm()).item() for name, p in wanted.items()
           if not torch.allclose(got[name], p, rtol=1e-6, atol=1e-9)}
    worst = max(off, key=off.get, default="")
    expect(not off, f"after 5 steps {len(off)} of {len(wanted)} parameters differ from what they are under "
           f"{like}, most of all {worst}, by {off.get(worst, 0):.2g} of its norm")


@functools.cache
def progress(rule):
    """Of a small CNN on gratings with Muon and batch normalisation, after each of 6 epochs: the test accuracy
    in %, and the mean angle in degrees between the W and the B of each layer, where B has W's shape."""
    torch.manual_seed(0)
    dataset = data.gratings(1000, 500, noise=20.0)
    normalise = data.Normalise(dataset.train_images)
    model = models.cnn(10, "batch", 8).to(memory_format=torch.channels_last)
    handle = fa.attach(model, rulefile.make(rule, 0))
    matrices, others = muon.split(model)
    optimisers = [muon.Muon(matrices, 0.05, weight_decay=5e-4),
                  torch.optim.SGD(others, 0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)]
    generator, history = torch.Generator().manual_seed(0), []
    for epoch in range(6):
        model.train()
        for images, labels in data.batches(dataset.train_images, dataset.train_labels, 25, generator,
                                           flip=False):
            handle.rule.targets = labels if handle.rule.needs_targets else None
            F.cross_entropy(model(normalise(images)), labels).backward()
            handle.before_step()
            for optimiser in optimisers:
                optimiser.param_groups[0]["lr"] = 0.05 * (1 - epoch / 6)
                optimiser.step()
            model.zero_grad()
        model.eval()
        with torch.no_grad():
            correct = model(normalise(dataset.test_images)).argmax(1) == dataset.test_labels
        history.append((100 * correct.float().mean().item(), angles(handle)))
    return history


def angles(handle):
    pairs = [(layer.weight, getattr(layer, "feedback", layer.weight[:0])) for layer in handle.layers.values()]
    found = [rank.angle(W, B) for W, B in pairs if W.shape == B.shape]
    return sum(found) / len(found) if found else None


def accuracy(name):
    """What a rule of fa.py reaches; the grader has trained it once for all."""
    return (grader.Child.known.get(name) or progress(rulefile.load(name)))[-1][0]


def test_learns(rule, request, record_property):
    """learns the gratings, at least 10 points better than a network whose hidden layers are frozen"""
    if rule is fa.Frozen:
        pytest.skip("it is the floor")
    if not request.config.getoption("--rule") and rule is not fa.FA:
        pytest.skip("fa stands for the rules of fa.py, each compared with its equation in test_rules.py")
    record_property("progress", progress(rule))
    reached, floor = progress(rule)[-1][0], accuracy("frozen")
    expect(reached >= floor + 10, f"it reached {reached:.1f} % where frozen hidden layers reach "
           f"{floor:.1f} %; expected at least {floor + 10:.1f} %")


def test_beats(rule, request):
    """learns the gratings at least 5 points better than the rule named by --beats"""
    other = request.config.getoption("--beats")
    reached, bar = progress(rule)[-1][0], accuracy(other)
    expect(reached >= bar + 5, f"it reached {reached:.1f} % where {other} reaches {bar:.1f} %; expected at "
           f"least {bar + 5:.1f} %")


def test_aligns(rule, request):
    """turns its feedback towards W, as near as --aligns says"""
    model, x, labels, handle = attached(rule, dtype=torch.float32)
    before, wanted = angles(handle), request.config.getoption("--aligns")
    expect(before is not None, "there is no layer.feedback of W's shape")
    train(model, x, labels, handle, steps=100, decay=0)
    now = angles(handle)
    expect(now <= wanted, f"after 100 steps the angle between W and B is {now:.0f}°, and was {before:.0f}°; "
           f"expected at most {wanted:g}°")
