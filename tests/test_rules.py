"""The rules of fa.py, each against its equation; what a rule may keep, ask for and make, and in which layers;
and torchvision's networks."""
import copy
import io
import itertools
import math
import warnings

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import fa
import muon
import rank
from harness import rulefile
from test_fa import Transport, agree, contents, gradients, hidden, mlp, relative, resnet, through, watch


def train(model, handle, x, labels, steps, optimisers):
    for _ in range(steps):
        F.cross_entropy(model(x), labels).backward()
        handle.before_step()
        for optimiser in optimisers:
            optimiser.step()
        model.zero_grad()


# ---- what each rule is -------------------------------------------------------------------------------------

def test_dfa_sends_b_times_the_output_error_to_every_layer():
    model, x, labels = resnet()
    fa.attach(model, fa.DFA(seed=1))
    seen = watch(model)
    gradients(model, x.flip(0), labels)         # another batch before: its error must be forgotten
    logits = model(x)
    (e,) = torch.autograd.grad(F.cross_entropy(logits, labels), logits, retain_graph=True)
    F.cross_entropy(logits, labels).backward()
    for layer in hidden(model):
        sent = seen[layer, "in"]
        assert layer.feedback.shape == (10, sent[0].numel())
        assert relative(sent.flatten(1), e @ layer.feedback) < 1e-12
    first, second = (layer.feedback for layer in hidden(model)[:2])
    assert not torch.equal(first.flatten()[:80], second.flatten()[:80])         # each has its own


@pytest.mark.parametrize("kwargs", [dict(), dict(gain=3.0)], ids=str)
def test_with_one_hidden_layer_dfa_is_fa(kwargs):
    plain, x = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5)), torch.randn(6, 7)
    got = []
    for rule in fa.FA, fa.DFA:
        model = copy.deepcopy(plain)
        fa.attach(model, rule(seed=3, **kwargs))
        got.append(gradients(model, x))
    agree(*got, 1e-6)                                       # the drawing of B, and its use


@pytest.mark.parametrize("rule", [fa.FA, fa.DFA])
def test_a_layer_may_be_of_another_precision_than_the_others(rule):
    """As in a network under autocast that leaves its classifier, or another layer, in float32; in some
    programs loss.backward() is under autocast too."""
    class Mixed(nn.Sequential):
        def forward(self, x):
            for i, layer in enumerate(self):
                with torch.autocast("cpu", torch.bfloat16, enabled=i != self.island):
                    x = layer(x.float())
            return x

    model, x = Mixed(*[nn.Linear(6, 6) for _ in range(4)]), torch.randn(5, 6)
    fa.attach(model, rule(seed=0))
    got = []
    for model.island, backward_too in itertools.product((2, 3, None), (False, True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=backward_too):
            got.append(gradients(model, x))
    for other in got[1:]:
        agree(other, got[0], 0.05)


def test_dfa_takes_one_image_without_a_batch_and_begins_anew_in_another_model():
    rule, x = fa.DFA(seed=0), torch.randn(3)
    for _ in range(2):
        model = mlp()
        handle, seen = fa.attach(model, rule), watch(model)
        agree(gradients(model, x), gradients(model, x[None]), 1e-6)
        assert torch.allclose(seen[model[2], "in"], seen[model[4], "out"] @ model[2].feedback)
        handle.remove()


def test_dfas_feedback_is_loaded_before_and_after_it_was_drawn():
    model, twin, x = mlp(), mlp(), torch.randn(6, 3)
    fa.attach(model, fa.DFA(seed=1))
    fa.attach(twin, fa.DFA(seed=2))
    undrawn = copy.deepcopy(model.state_dict())
    expected = gradients(model, x)
    for _ in range(2):
        twin.load_state_dict(model.state_dict())
        agree(gradients(twin, x), expected, 0)
        twin.load_state_dict(undrawn)
        assert all(g.isfinite().all() for g in gradients(twin, x).values())


def test_sign_symmetry_has_the_signs_of_w_and_the_magnitudes_of_b():
    model, x, labels = resnet()
    fa.attach(model, fa.SignSymmetry(seed=1))
    seen = watch(model)
    gradients(model, x, labels)
    for layer in hidden(model):
        weight = torch.where(layer.weight > 0, layer.feedback.abs(), -layer.feedback.abs()).detach()
        sent, error = seen[layer, "in"], seen[layer, "out"]
        assert relative(sent, through(layer, weight, sent, error)) < 1e-12


def test_kolen_pollacks_difference_decays_as_the_equation_says():
    """W - B  ←  (1 - ηλ) (W - B), step by step, whatever the updates were: Muon's or SGD's."""
    model, x, labels = resnet(width=4)
    handle = fa.attach(model, fa.KolenPollack(seed=1))
    lr, decay, steps = 0.05, 2.0, 12
    matrices, others = muon.split(model)
    before = {layer: (layer.weight - layer.feedback).detach() for layer in hidden(model)}
    started = [layer.weight.detach().clone() for layer in hidden(model)]
    train(model, handle, x, labels, steps, [muon.Muon(matrices, lr, weight_decay=decay, dtype=torch.float64),
                                            torch.optim.SGD(others, lr, weight_decay=decay)])
    for layer, was in zip(hidden(model), started):
        assert relative((layer.weight - layer.feedback).detach(),
                        before[layer] * (1 - lr * decay) ** steps) < 1e-9
        assert relative(layer.weight.detach(), was * (1 - lr * decay) ** steps) > 0.01  # and it did learn


def test_with_momentum_kolen_pollacks_difference_decays_so_much_faster_and_w_aligns_with_b():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 5))
    handle = fa.attach(model, fa.KolenPollack(seed=0))
    lr, decay, momentum, steps, x = 0.1, 0.01, 0.9, 300, torch.randn(200, 20)
    W, B = model[2].weight, model[2].feedback
    before = (W - B).norm().item()
    optimiser = torch.optim.SGD(model.parameters(), lr, momentum=momentum, weight_decay=decay)
    train(model, handle, x, x[:, :5].argmax(1), steps, [optimiser])
    shrunk = math.log(before / (W - B).norm().item())
    assert shrunk == pytest.approx(lr * decay * steps / (1 - momentum), rel=0.1) and rank.angle(W, B) < 10


def test_feedback_that_learns_is_a_parameter_beside_its_weight():
    model, x, labels = resnet(dtype=torch.float32)
    before, plain = contents(model), {name for name, _ in model.named_parameters()}
    handle = fa.attach(model, fa.KolenPollack(seed=0))
    learned = {f"{name}.feedback" for name in handle.layers}
    assert {name for name, _ in model.named_parameters()} - plain == learned
    muons, others = (set(each) for each in muon.split(model))
    for name, layer in handle.layers.items():
        assert {layer.weight, layer.feedback} <= (others if name == "classifier" else muons), name
    F.cross_entropy(model(x), labels).backward()
    assert model.classifier.feedback.grad is None               # until before_step
    handle.before_step()
    for layer in handle.layers.values():
        assert (torch.equal(layer.feedback.grad, layer.weight.grad)
                and layer.feedback.grad is not layer.weight.grad)
    handle.remove()
    assert contents(model) == before


def test_the_seed_alone_decides_on_the_feedback_and_the_global_generator_is_left_alone():
    for rule in fa.FA, fa.DFA, fa.KolenPollack:
        drawn, model = [], mlp()
        for seed, other in ((0, 1), (0, 2), (1, 1)):
            torch.manual_seed(other)
            state = torch.get_rng_state()
            handle = fa.attach(model, rule(seed=seed))
            gradients(model, torch.ones(2, 3))
            assert torch.equal(state, torch.get_rng_state())
            drawn.append(model[2].feedback.detach().clone())
            handle.remove()
        assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
        for setting, value, usual in ((torch.set_default_dtype, torch.float64, torch.float32),
                                      (torch.set_default_device, "meta", None)):
            setting(value)
            try:
                drawn.append(rule(seed=0).draw(model[2]))
            finally:
                setting(usual)
        assert torch.equal(rule(seed=0).draw(model[2]), drawn[-1]) and torch.equal(drawn[-2], drawn[-1])


# ---- what a rule may keep, ask for and make, and where -----------------------------------------------------

class Averaging(fa.FA):
    """B takes the mean outer product of the layer's output and input."""

    learns = needs_input = True
    calls = 0

    def backward(self, layer, error, input_shape):
        self.calls += 1
        self._scratch = error
        self.drawn = torch.rand((), generator=self.generator)
        return super().backward(layer, error, input_shape)

    def before_step(self, layer):
        layer.feedback.add_(layer.output.mT @ layer.input, alpha=1 / len(layer.input))


def test_a_rule_that_asks_for_it_finds_the_layers_input_and_output_and_others_pay_nothing():
    model, x, inputs = mlp(), torch.randn(5, 3), {}
    for layer in hidden(model):
        layer.register_forward_hook(lambda layer, args, y: inputs.update({layer: (args[0], y)}) and None)
    before = contents(model)
    handle = fa.attach(model, Averaging())
    drawn = {layer: layer.feedback.clone() for layer in hidden(model)}
    gradients(model, x)
    assert all(layer.input is not its and torch.equal(layer.input, its) and not layer.input.requires_grad
               and torch.equal(layer.output, y) and not layer.output.requires_grad
               for layer, (its, y) in inputs.items())
    handle.before_step()
    for layer, (its, y) in inputs.items():
        assert torch.allclose(layer.feedback, drawn[layer] + y.mT @ its / 5, atol=1e-6)
        assert not hasattr(layer, "input") and not hasattr(layer, "output")
    gradients(model, x)
    handle.remove()
    assert contents(model) == before
    fa.attach(model, fa.FA())
    gradients(model, x)
    assert not any(hasattr(layer, "input") for layer in hidden(model))


def test_what_a_rule_keeps_is_saved_and_comes_back():
    rule, model = Averaging(seed=2), mlp()
    fa.attach(model, rule)
    gradients(model, torch.randn(5, 3))
    file = io.BytesIO()
    torch.save(rule.state_dict(), file)
    file.seek(0)
    other = Averaging(seed=5)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.calls == 2 and torch.equal(other.drawn, rule.drawn) and not hasattr(other, "_scratch")
    assert torch.equal(other.draw(model[2]), rule.draw(model[2]))


class Hooking(fa.FA):
    """Makes a hook in prepare, and undoes it in release; cannot prepare one layer."""

    def __init__(self, fails=""):
        super().__init__()
        self.fails = fails

    def prepare(self, layer):
        super().prepare(layer)
        if layer.crossing.name == self.fails:
            raise KeyError("not this one")
        layer.calls = 0
        layer.counter = layer.register_forward_hook(count)

    def release(self, layer):
        layer.counter.remove()
        del layer.counter, layer.calls


def count(layer, args, output):
    layer.calls += 1


def test_what_prepare_makes_is_undone_also_where_it_fails_and_is_copied():
    model, x = mlp(), torch.randn(5, 3)
    before = contents(model)
    with pytest.raises(KeyError, match="not this one"):
        fa.attach(model, Hooking(fails="4"))
    assert contents(model) == before
    handle = fa.attach(model, Hooking())
    twin, its = copy.deepcopy((model, handle))
    for _ in range(2):
        gradients(twin, x)
    assert {layer.calls for layer in its.layers.values()} == {2}
    assert {layer.calls for layer in handle.layers.values()} == {0}
    its.remove()
    handle.remove()
    assert contents(model) == contents(twin) == before


def test_layers_are_chosen_by_name_pattern_or_module():
    model, _, _ = resnet()
    every = fa.find(model)[0].keys() - {"stem"}
    for chosen, expected in (
            (dict(except_=["*.shortcut.0"]), {name for name in every if "shortcut" not in name}),
            (dict(only="blocks.?.conv1"), {f"blocks.{i}.conv1" for i in range(8)}),
            (dict(only=["blocks.3.*", model.classifier], except_="blocks.3.conv2"),
             {"blocks.3.conv1", "classifier"}),
            (dict(only=["stem", "classifier"]), {"classifier"}),
            (dict(stem=model.stem), every), (dict(stem="stem"), every), (dict(stem=()), every | {"stem"})):
        handle = fa.attach(model, fa.FA(), **chosen)
        assert handle.layers.keys() == expected
        assert {name for name, m in model.named_modules() if hasattr(m, "feedback")} == expected
        handle.remove()
    for wrong in (dict(only="blocks.9.*"), dict(except_=["head"]), dict(stem="head"), dict(only=[nn.ReLU()])):
        with pytest.raises(ValueError, match="is none of the model's layers, which are stem, blocks.0.conv1"):
            fa.attach(model, fa.FA(), **wrong)


# ---- the rules of assignments/examples ---------------------------------------------------------------------

def example(name):
    return rulefile.load(f"assignments/examples/{name}")


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3), nn.Conv2d(6, 4, 3, groups=2), nn.Linear(7, 5)])
def test_orthogonal_feedback_is_what_was_drawn_with_all_singular_values_alike_at_each_position(layer):
    drawn, orthogonal = fa.FA(seed=0).draw(layer), example("orthogonal.py:Orthogonal")(seed=0).draw(layer)
    assert orthogonal.shape == drawn.shape and relative(orthogonal.norm(), drawn.norm()) < 1e-5
    for position, was in zip(*(B[..., None].flatten(2).unbind(2) for B in (orthogonal, drawn))):
        sigma = torch.linalg.svdvals(position)
        P, _, Qt = torch.linalg.svd(was, full_matrices=False)
        assert torch.allclose(position, sigma[0] * P @ Qt, atol=1e-4 * sigma[0])    # the nearest such matrix


def test_drtp_is_dfa_of_which_the_prediction_is_left_out():
    model, x, labels = resnet()
    dfa = copy.deepcopy(model)
    handle = fa.attach(model, example("drtp.py:DRTP")(seed=0))
    fa.attach(dfa, fa.DFA(seed=0))
    handle.rule.targets = labels
    got = gradients(model, x, labels)
    (-(dfa(x) * F.one_hot(labels, 10)).sum() / len(x)).backward()   # DFA of the loss whose error is -y / N
    for name, p in dfa.named_parameters():
        assert name.startswith("classifier") or relative(got[name], p.grad) < 1e-10, name
    handle.before_step()                                            # forgets the targets
    with pytest.raises(fa.RuleError, match="DRTP needs each batch's targets: set handle.rule.targets"):
        gradients(model, x, labels)


def test_weights_transported_once_are_backprop_until_the_weights_change():
    model, x, labels = resnet()
    expected = gradients(model, x, labels)
    fa.attach(model, example("transported_once.py:TransportedOnce")())
    agree(gradients(model, x, labels), expected)
    with torch.no_grad():
        model.classifier.weight.add_(1)
    assert model.classifier.feedback.ne(model.classifier.weight).all()


def test_shortcuts_only_sends_no_error_through_a_branch():
    model, x, labels = resnet()
    seen = watch(model)
    fa.attach(model, example("shortcuts_only.py:ShortcutsOnly")())
    got = gradients(model, x, labels)
    for i, block in enumerate(model.blocks):
        sent = seen.get((block.conv1, "in"))
        assert (sent is None or not sent.any()) and seen[block.conv2, "in"].any()
        assert got[f"blocks.{i}.conv1.weight"].any()


def test_first_fixed_leaves_the_first_convolutions_alone():
    model, x, labels = resnet()
    fa.attach(model, example("first_fixed.py:FirstFixed")())
    got = gradients(model, x, labels)
    for i in range(len(model.blocks)):
        assert got[f"blocks.{i}.conv1.weight"] is None and got[f"blocks.{i}.conv2.weight"].any()


# ---- networks that nobody prepared -------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["mobilenet_v3_small", "densenet121"])
def test_torchvisions_classifiers_with_b_equal_to_w_are_autograd(name):
    """In training, with dropout and in-place activations, as they come."""
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(num_classes=5)
    x, labels = torch.randn(2, 3, 32, 32), torch.tensor([1, 3])
    torch.manual_seed(1)
    expected = gradients(model, x, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handle = fa.attach(model, Transport())
        torch.manual_seed(1)
        got = gradients(model, x, labels)
    assert len(handle.layers) == sum(isinstance(m, nn.Linear | nn.Conv2d) for m in model.modules()) - 1
    for n, g in got.items():
        assert relative(g, expected[n]) < 1e-5 or g.norm() < 1e-6, n
