"""The rules of fa.py, each against its equation, and on networks that nobody prepared for them."""
import copy
import math
import warnings

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import fa
import models
import muon
import rank
from harness import rulefile
from test_fa import gradients, hidden, relative, resnet

WITH_FEEDBACK = [name for name, rule in fa.RULES.items() if name not in ("bp", "frozen")]


class Transport(fa.Rule):
    """Backprop by our own projection, with no feedback weights to draw."""

    uses_weight = True

    def backward(self, layer, error, input_shape):
        return fa.project(layer, layer.weight, error, input_shape)


def watch(model):
    """Fills a dict with the error that comes in at each hidden layer's output
    and the one that it sends on."""
    seen = {}

    def entering(layer, args):
        own = args[0].view_as(args[0])                          # a shortcut may read the same tensor
        own.register_hook(lambda g: seen.__setitem__((layer, "in"), g))
        return own

    for layer in hidden(model):
        layer.register_forward_pre_hook(entering)
        layer.register_forward_hook(lambda layer, args, y: y.register_hook(
            lambda g: seen.__setitem__((layer, "out"), g)) and None)
    return seen


def train(model, handle, x, labels, steps, optimisers):
    for _ in range(steps):
        F.cross_entropy(model(x), labels).backward()
        handle.before_step()
        for optimiser in optimisers:
            optimiser.step()
        model.zero_grad()


# ---- rules that need more than the error: those of assignments/, and some made for the purpose -------------

def example(name):
    return rulefile.load(f"assignments/examples/{name}")


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3), nn.Conv2d(6, 4, 3, groups=2), nn.Linear(5, 7)])
def test_orthogonal_feedback_has_equal_singular_values_at_each_kernel_position_and_the_drawn_norm(layer):
    drawn, orthogonal = fa.FA(seed=0).draw(layer), example("orthogonal.py:Orthogonal")(seed=0).draw(layer)
    assert orthogonal.shape == drawn.shape and torch.allclose(orthogonal.norm(), drawn.norm())
    for position, was in zip(*(B.flatten(2).unbind(2) if B.dim() > 2 else [B] for B in (orthogonal, drawn))):
        P, _, Qt = torch.linalg.svd(was, full_matrices=False)
        sigma = torch.linalg.svdvals(position)
        assert torch.allclose(sigma, sigma[0].expand_as(sigma), rtol=1e-4)
        assert torch.allclose(position / sigma[0], P @ Qt, atol=1e-4)           # the nearest such matrix


def test_drtp_is_dfa_of_which_the_prediction_is_left_out():
    model, x, labels = resnet()
    dfa = copy.deepcopy(model)
    handle = fa.attach(model, example("drtp.py:DRTP")(seed=0))
    fa.attach(dfa, fa.DFA(seed=0))
    handle.rule.targets = labels
    got = gradients(model, x, labels)
    logits = dfa(x)                                         # DFA of the loss whose error e is -y / N
    dfa.zero_grad()
    (-(logits * F.one_hot(labels, 10)).sum() / len(x)).backward()
    for name, p in dfa.named_parameters():
        if name.startswith(("stem", "blocks", "norm")):
            assert relative(got[name], p.grad) < 1e-10, name
    with pytest.raises(fa.RuleError, match="DRTP needs each batch's targets: set handle.rule.targets"):
        handle.before_step()                                # which forgets them
        gradients(model, x, labels)


def test_weights_transported_once_are_backprop_until_the_weights_change():
    model, x, labels = resnet()
    plain = gradients(model, x, labels)
    fa.attach(model, example("transported_once.py:TransportedOnce")())
    got = gradients(model, x, labels)
    assert max(relative(got[name], plain[name]) for name in plain) < 1e-10
    with torch.no_grad():
        model.classifier.weight.add_(1)
    assert model.classifier.feedback.ne(model.classifier.weight).all()


def test_shortcuts_only_sends_no_error_through_a_branch():
    model, x, labels = resnet()
    seen = watch(model)
    fa.attach(model, example("shortcuts_only.py:ShortcutsOnly")())
    gradients(model, x, labels)
    for block in model.blocks:
        sent = seen.get((block.conv1, "in"))
        assert (sent is None or not sent.any()) and seen[block.conv2, "in"].any()
        assert block.conv1.weight.grad.any()


class Hebbian(fa.FA):
    """B takes the mean outer product of the layer's output and input."""

    learns = needs_input = True

    def before_step(self, layer):
        if isinstance(layer, nn.Linear):
            layer.feedback.add_(layer.output.mT @ layer.input, alpha=1 / len(layer.input))


def test_a_rule_that_asks_for_it_finds_the_layers_input_and_output_and_others_pay_nothing():
    torch.manual_seed(0)
    model, x = models.mlp(3, None, 6, size=2, depth=2), torch.randn(5, 3, 2, 2)
    inputs = {}
    for layer in hidden(model):
        layer.register_forward_hook(lambda layer, args, y: inputs.update({layer: (args[0], y)}) and None)
    handle = fa.attach(model, Hebbian())
    before = {layer: layer.feedback.clone() for layer in hidden(model)}
    gradients(model, x, torch.tensor([0, 1, 2, 0, 1]))
    assert all(torch.equal(layer.input, x) and torch.equal(layer.output, y)
               for layer, (x, y) in inputs.items())
    handle.before_step()
    for layer, (x, y) in inputs.items():
        assert torch.allclose(layer.feedback, before[layer] + y.mT @ x / 5, atol=1e-6)
        assert not hasattr(layer, "input") and not hasattr(layer, "output")
    handle.remove()
    fa.attach(model, fa.FA())
    gradients(model, x=torch.randn(5, 3, 2, 2), labels=torch.tensor([0, 1, 2, 0, 1]))
    assert not any(hasattr(layer, "input") for layer in hidden(model))


class Counting(fa.FA):
    """Makes a hook in prepare, and undoes it in release."""

    def prepare(self, layer):
        super().prepare(layer)
        layer.calls = 0
        layer.counter = layer.register_forward_hook(count)

    def release(self, layer):
        layer.counter.remove()
        del layer.counter, layer.calls


def count(layer, args, output):
    layer.calls += 1


def test_what_prepare_makes_is_undone_and_survives_deepcopy():
    model, x, labels = resnet()
    before = {name: dict(vars(m)) for name, m in model.named_modules()}
    handle = fa.attach(model, Counting())
    twin, its = copy.deepcopy((model, handle))
    gradients(twin, x, labels)
    gradients(twin, x, labels)
    assert {layer.calls for layer in its.layers.values()} == {2}
    assert {layer.calls for layer in handle.layers.values()} == {0}
    for each in (its, handle):
        each.remove()
    for network in (model, twin):
        assert {name: vars(m).keys() for name, m in network.named_modules()} == {
            name: attributes.keys() for name, attributes in before.items()}
        assert not any(m._forward_hooks for m in network.modules())


class Failing(Counting):
    def prepare(self, layer):
        if layer.crossing.name == "blocks.1.conv1":
            raise ValueError("not this one")
        super().prepare(layer)


def test_where_prepare_fails_what_it_had_made_is_undone():
    model, *_ = resnet()
    before = {name: vars(m).keys() for name, m in model.named_modules()}
    with pytest.raises(ValueError, match="not this one"):
        fa.attach(model, Failing())
    assert {name: vars(m).keys() for name, m in model.named_modules()} == before
    assert not any(m._forward_hooks for m in model.modules())


def test_layers_are_chosen_by_name_pattern_or_module():
    model, x, labels = resnet()
    every = fa.find(model)[0].keys() - {"stem"}
    for only, except_, expected in (
            (None, ["*.shortcut.0"], {name for name in every if "shortcut" not in name}),
            ("blocks.?.conv1", (), {f"blocks.{i}.conv1" for i in range(8)}),
            (["blocks.3.*", model.classifier], "blocks.3.conv2", {"blocks.3.conv1", "classifier"}),
            (["stem", "classifier"], (), {"classifier"})):
        handle = fa.attach(model, fa.FA(), only=only, except_=except_)
        assert handle.layers.keys() == expected
        assert {name for name, m in model.named_modules() if hasattr(m, "feedback")} == expected
        handle.remove()
    for wrong in (dict(only="blocks.9.*"), dict(except_=["head"]), dict(stem="head"), dict(only=[nn.ReLU()])):
        with pytest.raises(ValueError, match="is none of the model's layers, which are stem, blocks.0.conv1"):
            fa.attach(model, fa.FA(), **wrong)
    assert not any(hasattr(m, "rule") for m in model.modules())


def test_one_network_with_two_rules_and_exact_backprop_in_its_shortcuts():
    """B = W in the branches, sign-symmetry in the classifier, autograd in the shortcuts."""
    model, x, labels = resnet()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data.mul_(2)
    reference = copy.deepcopy(model)
    branches = fa.attach(model, Transport(), only="*.conv?")
    head = fa.attach(model, fa.SignSymmetry(seed=1), only=["classifier"])
    alone = fa.attach(reference, fa.SignSymmetry(seed=1), only=["classifier"])
    got, expected = gradients(model, x, labels), gradients(reference, x, labels)
    assert max(relative(got[name], expected[name]) for name in expected) < 1e-10
    assert repr(head) == "<SignSymmetry through classifier; the stem is stem>"
    assert repr(branches).startswith("<Transport through blocks.0.conv1, blocks.0.conv2, ")
    for each in (branches, head, alone):
        each.before_step()
        each.remove()
    plain = gradients(model, x, labels)
    assert max(relative(plain[name], gradients(reference, x, labels)[name]) for name in plain) < 1e-12


def test_in_place_activations_come_back_with_the_last_handle():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.ReLU(inplace=True),
                          nn.Linear(4, 2))
    first, second = fa.attach(model, fa.FA(), only=["2"]), fa.attach(model, fa.FA(), only=["4"])
    first.remove()
    assert not model[1].inplace
    model(torch.randn(5, 3)).sum().backward()
    second.remove()
    assert model[1].inplace and model[3].inplace and "was_inplace" not in vars(model[1])


# ---- what each rule is -------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet18"])
def test_dfa_sends_b_times_the_output_error_to_every_layer(name):
    torch.manual_seed(0)
    model = models.MODELS[name](10, "batch", 8).double()
    fa.attach(model, fa.DFA(seed=1))
    seen, (x, labels) = watch(model), (torch.randn(4, 3, 32, 32).double(), torch.randint(10, (4,)))
    F.cross_entropy(model(x.flip(0)), labels).backward()  # another batch before: its error must be forgotten
    logits = model(x)
    (e,) = torch.autograd.grad(F.cross_entropy(logits, labels), logits, retain_graph=True)
    F.cross_entropy(logits, labels).backward()
    assert torch.equal(seen[model.classifier, "out"], e)
    for layer in hidden(model):
        sent = seen[layer, "in"]
        assert layer.feedback.shape == (10, sent[0].numel())
        for image in range(4):
            assert relative(sent[image].flatten(), layer.feedback.T @ e[image]) < 1e-12
    first, second = (layer.feedback for layer in hidden(model)[:2])
    assert not torch.equal(first.flatten()[:80], second.flatten()[:80])         # each has its own


def test_with_one_hidden_layer_dfa_is_fa():
    models_ = [nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5)) for _ in range(2)]
    models_[1].load_state_dict(models_[0].state_dict())
    x, labels = torch.randn(6, 7), torch.randint(5, (6,))
    for model, rule in zip(models_, (fa.FA(seed=3), fa.DFA(seed=3))):
        fa.attach(model, rule)
        gradients(model, x, labels)
    for p, q in zip(*(m.parameters() for m in models_)):
        assert torch.allclose(p.grad, q.grad, rtol=1e-6, atol=1e-7)     # the drawing of B, and its use


def test_dfa_takes_gain():
    feedback = []
    for rule in (fa.DFA(seed=0), fa.DFA(seed=0, gain=3.0)):
        model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5))
        fa.attach(model, rule)
        gradients(model, torch.ones(2, 7), torch.tensor([0, 1]))
        feedback.append(model[2].feedback)
    assert torch.equal(3 * feedback[0], feedback[1])


def test_dfa_is_the_same_for_one_image_without_a_batch():
    model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    fa.attach(model, fa.DFA(seed=0))
    x = torch.randn(7).double()
    alone, batched = gradients(model, x), gradients(model, x[None])
    assert all(relative(alone[name], batched[name]) < 1e-12 for name in alone)


def test_a_rule_that_is_used_again_starts_anew():
    rule, x, labels = fa.DFA(seed=0), torch.randn(2, 7), torch.tensor([0, 1])
    for _ in range(2):
        model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 5))
        handle = fa.attach(model, rule)
        seen = watch(model)
        gradients(model, x, labels)
        assert torch.allclose(seen[model[2], "in"], seen[model[4], "out"] @ model[2].feedback)
        handle.remove()


def test_sign_symmetry_has_the_signs_of_w_and_the_magnitudes_of_b():
    model, x, labels = resnet()
    fa.attach(model, fa.SignSymmetry(seed=1))
    seen = watch(model)
    gradients(model, x, labels)
    for layer in hidden(model):
        weight = torch.where(layer.weight > 0, layer.feedback.abs(), -layer.feedback.abs()).detach()
        assert torch.equal(weight.sign(), layer.weight.sign())
        entry = torch.zeros_like(seen[layer, "in"], requires_grad=True)
        y = F.linear(entry, weight) if isinstance(layer, nn.Linear) else \
            F.conv2d(entry, weight, None, layer.stride, layer.padding)
        (expected,) = torch.autograd.grad(y, entry, seen[layer, "out"])
        assert relative(seen[layer, "in"], expected) < 1e-12


@pytest.mark.parametrize("kind", ["SGD", "Muon"])
def test_kolen_polacks_difference_decays_as_the_equation_says(kind):
    """W - B  ←  (1 - ηλ) (W - B), step by step, whatever the updates were."""
    model, x, labels = resnet(width=4)
    handle = fa.attach(model, fa.KolenPollack(seed=1))
    lr, decay, steps = 0.05, 2.0, 12
    convolutions, others = muon.split(model)
    optimisers = [torch.optim.SGD(model.parameters(), lr, weight_decay=decay)]
    if kind == "Muon":
        optimisers = [muon.Muon(convolutions, lr, weight_decay=decay, dtype=torch.float64),
                      torch.optim.SGD(others, lr, weight_decay=decay)]
    before = {layer: (layer.weight - layer.feedback).detach() for layer in hidden(model)}
    started = [layer.weight.detach().clone() for layer in hidden(model)]
    train(model, handle, x, labels, steps, optimisers)
    for layer, was in zip(hidden(model), started):
        assert relative((layer.weight - layer.feedback).detach(),
                        before[layer] * (1 - lr * decay) ** steps) < 1e-9
        assert relative(layer.weight.detach(), was * (1 - lr * decay) ** steps) > 0.01  # and it did learn


def test_kolen_polack_with_momentum_decays_so_much_faster():
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    handle = fa.attach(model, fa.KolenPollack(seed=0))
    lr, decay, momentum, steps = 0.01, 0.01, 0.9, 3000
    optimiser = torch.optim.SGD(model.parameters(), lr, momentum=momentum, nesterov=True, weight_decay=decay)
    before = (model[2].weight - model[2].feedback).detach()
    train(model, handle, torch.randn(8, 5).double(), torch.randint(3, (8,)), steps, [optimiser])
    shrunk = ((model[2].weight - model[2].feedback).norm() / before.norm()).item()
    assert shrunk == pytest.approx(math.exp(-lr * decay * steps / (1 - momentum)), rel=0.02)


@pytest.mark.parametrize("decay, angle", [(0.05, (0, 5)), (0.0, (20, 90))])
def test_kolen_polacks_angle_falls_to_zero_and_without_decay_it_does_not(decay, angle):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 5))
    handle = fa.attach(model, fa.KolenPollack(seed=0))
    optimiser = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=decay)
    x = torch.randn(200, 20)
    train(model, handle, x, x[:, :5].argmax(1), 300, [optimiser])
    low, high = angle
    assert low <= rank.angle(model[2].weight, model[2].feedback) <= high


def test_feedback_that_learns_is_a_parameter_beside_its_weight():
    model, x, labels = resnet(dtype=torch.float32)
    plain = {name for name, _ in model.named_parameters()}
    handle = fa.attach(model, fa.KolenPollack(seed=0))
    learned = {f"{name}.feedback" for name in handle.layers}
    assert {name for name, _ in model.named_parameters()} - plain == learned
    muons, others = muon.split(model)
    for name, layer in handle.layers.items():
        group = others if name == "classifier" else muons
        assert any(p is layer.weight for p in group) and any(p is layer.feedback for p in group), name
    assert len(muons) + len(others) == len(list(model.parameters()))
    F.cross_entropy(model(x), labels).backward()
    assert model.classifier.feedback.grad is None               # until before_step
    handle.before_step()
    for layer in handle.layers.values():
        assert (torch.equal(layer.feedback.grad, layer.weight.grad)
                and layer.feedback.grad is not layer.weight.grad)
    handle.remove()
    assert {name for name, _ in model.named_parameters()} == plain


def test_frozen_leaves_the_hidden_weights_as_they_were():
    model, x, labels = resnet(dtype=torch.float32)
    handle = fa.attach(model, fa.Frozen())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    matrices, others = muon.split(model)
    train(model, handle, x, labels, 3, [muon.Muon(matrices, 0.1, weight_decay=0.1),
                                        torch.optim.SGD(others, 0.1, momentum=0.9, weight_decay=0.1)])
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert changed == ["classifier.weight", "classifier.bias"]


# ---- every rule, everywhere --------------------------------------------------------------------------------

@pytest.mark.parametrize("with_muon", [False, True], ids=["sgd", "muon"])
@pytest.mark.parametrize("norm", [None, "batch", "layer", "rms"])
@pytest.mark.parametrize("name", fa.RULES)
def test_every_rule_trains_with_every_norm_under_autocast_and_not(name, norm, with_muon, device):
    for autocast in (False, True):
        torch.manual_seed(0)
        model = models.cnn(norm=norm, width=4).to(device, memory_format=torch.channels_last)
        handle = fa.attach(model, fa.RULES[name](seed=0))
        matrices, others = muon.split(model) if with_muon else ([], list(model.parameters()))
        optimisers = [torch.optim.SGD(others, 0.01)] + ([muon.Muon(matrices, 0.01)] if with_muon else [])
        start = {key: value.clone() for key, value in model.state_dict().items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            train(model, handle, torch.randn(8, 3, 32, 32, device=device), torch.arange(8, device=device), 2,
                  optimisers)
        assert all(p.isfinite().all() for p in model.parameters())
        moved = {key for key, value in model.state_dict().items()
                 if key.endswith("weight") and not torch.equal(value, start[key])}
        assert ("layers.0.weight" in moved) == (name != "frozen") and "classifier.weight" in moved


@pytest.mark.parametrize("name", WITH_FEEDBACK)
def test_feedback_is_saved_and_loaded(name):
    """Into a fresh model with another seed, also before its first backward pass,
    when dfa has not drawn yet."""
    model, x, labels = resnet(dtype=torch.float32)
    empty = copy.deepcopy(model)
    fa.attach(model, fa.RULES[name](seed=1))
    undrawn = copy.deepcopy(model.state_dict())
    expected = gradients(model, x, labels)
    assert all(f"{n}.feedback" in model.state_dict() for n in ("classifier", "blocks.0.conv1"))
    twin = copy.deepcopy(empty)
    fa.attach(twin, fa.RULES[name](seed=2))
    twin.load_state_dict(model.state_dict())
    assert all(torch.equal(g, expected[n]) for n, g in gradients(twin, x, labels).items())
    twin.load_state_dict(undrawn)
    assert all(g.isfinite().all() for g in gradients(twin, x, labels).values())


@pytest.mark.parametrize("name", WITH_FEEDBACK)
def test_the_seed_alone_decides_on_the_feedback(name):
    drawn = []
    for seed, other in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(0)
        model = models.cnn(width=4)
        torch.manual_seed(other)
        fa.attach(model, fa.RULES[name](seed=seed))
        gradients(model, torch.ones(2, 3, 32, 32), torch.tensor([0, 1]))
        drawn.append(torch.cat([layer.feedback.flatten() for layer in hidden(model)]))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("name", fa.RULES)
def test_copies_go_their_own_way(name):
    model, x, labels = resnet(dtype=torch.float32)
    fa.attach(model, fa.RULES[name](seed=1))
    early = copy.deepcopy(model)
    F.cross_entropy(model(x), labels).backward()
    late = copy.deepcopy(model)
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for clone in (early, late):
        clone.zero_grad()
        F.cross_entropy(clone(x), labels).backward()
        got = {n: p.grad for n, p in clone.named_parameters() if p.grad is not None}
        assert got.keys() == expected.keys() and all(torch.equal(got[n], expected[n]) for n in got)


# ---- networks that nobody prepared -------------------------------------------------------------------------

@pytest.mark.parametrize("name, size", [("alexnet", 64), ("vgg11", 32), ("vgg11_bn", 32), ("resnet18", 32),
                                        ("mobilenet_v3_small", 32), ("densenet121", 32),
                                        ("convnext_tiny", 32)])
def test_torchvisions_classifiers_with_b_equal_to_w_are_autograd(name, size):
    """In training, with dropout, stochastic depth and in-place activations, as they come."""
    torch.manual_seed(0)
    quick = {"init_weights": False} if name.startswith("vgg") else {}   # PyTorch's initialisation is faster
    model = getattr(torchvision.models, name)(num_classes=5, **quick)
    x, labels = torch.randn(2, 3, size, size), torch.tensor([1, 3])
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


class Odd(nn.Module):
    """Layers that the rules do not know: a transposed convolution, attention, an embedding,
    a matrix of its own."""

    def __init__(self):
        super().__init__()
        self.stem, self.up = nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.attention, self.place = nn.MultiheadAttention(8, 2, batch_first=True), nn.Embedding(64, 8)
        self.mix = nn.ParameterList([nn.Parameter(torch.randn(8, 8))])
        self.norm, self.body, self.head = nn.LayerNorm((64, 8)), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.up(self.stem(x)).flatten(2).mT + self.place(torch.arange(64, device=x.device))  # (N, 64, 8)
        x = self.attention(x, x, x, need_weights=False)[0] @ self.mix[0]
        return self.head(self.body(self.norm(x)).tanh().mean(1))


def test_unknown_layers_keep_exact_backprop_and_are_named_once():
    torch.manual_seed(0)
    plain = Odd().double()
    ours, x, labels = copy.deepcopy(plain), torch.randn(2, 3, 8, 8).double(), torch.tensor([1, 3])
    with pytest.warns(UserWarning) as caught:
        handle = fa.attach(ours, Transport())
    assert len(caught) == 1
    assert ("up (ConvTranspose2d), attention (MultiheadAttention), mix (ParameterList)"
            in str(caught[0].message))
    assert list(handle.layers) == ["body", "head"]
    expected = gradients(plain, x, labels)
    assert all(relative(g, expected[n]) < 1e-10 for n, g in gradients(ours, x, labels).items())
    handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fa.attach(ours, fa.BP())                                # goes through everything

    handle.remove()
    with pytest.warns(UserWarning, match="FA goes through Linear and Conv2d only"):
        fa.attach(ours, fa.FA())
    got = gradients(ours, x, labels)
    assert (torch.equal(got["head.weight"], expected["head.weight"])
            and got["attention.in_proj_weight"].isfinite().all())


def test_a_lazy_layer_is_refused_until_it_has_weights():
    model = nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(5))
    with pytest.raises(ValueError, match="run the model forward once"):
        fa.attach(model, fa.FA())
    assert not any(hasattr(m, "rule") for m in model.modules())
    model(torch.ones(1, 3))
    fa.attach(model, fa.FA())
    gradients(model, torch.ones(1, 3))
