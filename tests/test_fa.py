"""fa.py against autograd: the same gradients when B = W, an independent projection when not,
and nothing computed twice."""
import copy
import itertools
import math
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fa
import models
from harness import rulefile
from conftest import ROOT


class Transport(fa.FA):
    """Feedback weights set equal to W: must reproduce backprop."""

    def backward(self, layer, error, input_shape):
        with torch.no_grad():
            layer.feedback.copy_(layer.weight)
        return super().backward(layer, error, input_shape)


def gradients(model, x, labels=None):
    model.zero_grad()
    y = model(x)
    loss = (F.cross_entropy(y.float() if y.dtype == torch.bfloat16 else y, labels) if labels is not None else
            y.square().sum())
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if not name.endswith("feedback")}


def relative(a, b):
    return ((a - b).norm() / b.norm().clamp(min=1e-300)).item()


def hidden(model):
    return [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)][1:]


def resnet(width=8, norm="batch", dtype=torch.float64, device="cpu"):
    torch.manual_seed(0)
    model = models.resnet18(10, norm, width).to(device, dtype)
    x = torch.randn(4, 3, 32, 32, dtype=dtype, device=device)
    return model, x, torch.randint(10, (4,), device=device)


CONVOLUTIONS = [dict(stride=s, padding=p, dilation=d, groups=g)
                for s, p, d, g in itertools.product((1, 2, (2, 1)), (0, 1, (2, 1), "valid", "same"),
                                                    (1, 2, (1, 2)), (1, 2))
                if not (p == "same" and s != 1)]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("kernel", [3, 2, (3, 4), 1])
@pytest.mark.parametrize("kwargs", CONVOLUTIONS, ids=str)
def test_a_convolution_with_b_equal_to_w_is_backprop(kwargs, kernel):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, kernel, **kwargs),
                          nn.ReLU(), nn.Conv2d(6, 2, 1)).double()
    x = torch.randn(2, 3, 11, 10, dtype=torch.float64)
    ours = copy.deepcopy(plain)
    fa.attach(ours, Transport())
    expected = gradients(plain, x)
    for name, g in gradients(ours, x).items():
        assert relative(g, expected[name]) < 1e-10, name


@pytest.mark.parametrize("shape", [(5, 7), (2, 5, 7), (7,)], ids=str)
def test_linear_on_any_number_of_dimensions(shape):
    plain = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 5, bias=False), nn.Tanh(),
                          nn.Linear(5, 3)).double()
    ours, x = copy.deepcopy(plain), torch.randn(shape, dtype=torch.float64)
    fa.attach(ours, Transport())
    expected = gradients(plain, x)
    for name, g in gradients(ours, x).items():
        assert relative(g, expected[name]) < 1e-10, name


def test_an_image_without_a_batch_dimension():
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3, stride=2)).double()
    ours, x = copy.deepcopy(plain), torch.randn(3, 10, 9, dtype=torch.float64)
    fa.attach(ours, Transport())
    expected = gradients(plain, x)
    assert all(relative(g, expected[name]) < 1e-10 for name, g in gradients(ours, x).items())


@pytest.mark.parametrize("norm", ["batch", "layer", "rms", None])
def test_resnet18_with_b_equal_to_w_is_backprop(norm, device):
    plain, x, labels = resnet(norm=norm, device=device)
    ours = copy.deepcopy(plain)
    fa.attach(ours, Transport())
    expected = gradients(plain, x, labels)
    got = gradients(ours, x, labels)
    assert got.keys() == expected.keys()
    for name in got:
        assert relative(got[name], expected[name]) < 1e-10, name


def test_float32_gradients_with_b_equal_to_w_are_autograds_to_the_last_bit():
    plain, x, labels = resnet(dtype=torch.float32)
    plain.to(memory_format=torch.channels_last)
    ours = copy.deepcopy(plain)
    fa.attach(ours, Transport())
    expected = gradients(plain, x, labels)
    for name, g in gradients(ours, x, labels).items():
        assert torch.equal(g, expected[name]), name


def test_bf16_autocast(device):
    plain, x, labels = resnet(dtype=torch.float32, device=device)
    ours = copy.deepcopy(plain)
    fa.attach(ours, Transport())
    with torch.autocast(device.type, torch.bfloat16):
        expected, got = gradients(plain, x, labels), gradients(ours, x, labels)
    for name, g in got.items():
        assert g.dtype == torch.float32
        assert relative(g, expected[name]) < 0.03, name             # bf16 has 8 bits: 0.4 % a rounding


def test_each_error_is_the_projection_through_b():
    """δ_in of every hidden layer, against autograd through a layer whose weight is B."""
    model, x, labels = resnet()
    fa.attach(model, fa.FA(seed=1))
    seen = {}

    def entering(layer, args):
        own = args[0].view_as(args[0])                          # a shortcut may read the same tensor
        own.register_hook(lambda g: seen.__setitem__((layer, "in"), g))
        seen[layer, "shape"] = own.shape
        return own

    for layer in hidden(model):
        layer.register_forward_pre_hook(entering)
        layer.register_forward_hook(lambda layer, args, y: y.register_hook(
            lambda g: seen.__setitem__((layer, "out"), g)) and None)
    gradients(model, x, labels)
    for layer in hidden(model):
        entry = torch.zeros(seen[layer, "shape"], dtype=x.dtype, requires_grad=True)
        if isinstance(layer, nn.Conv2d):
            through_b = F.conv2d(entry, layer.feedback, None, layer.stride, layer.padding)
            through_w = F.conv2d(entry, layer.weight.detach(), None, layer.stride, layer.padding)
        else:
            through_b, through_w = F.linear(entry, layer.feedback), F.linear(entry, layer.weight.detach())
        error = seen[layer, "out"]
        (expected,) = torch.autograd.grad(through_b, entry, error)
        (true,) = torch.autograd.grad(through_w, entry, error)
        assert relative(seen[layer, "in"], expected) < 1e-12
        assert relative(seen[layer, "in"], true) > 0.5


def test_the_classifiers_gradient_is_exact_and_hidden_ones_are_not():
    plain, x, labels = resnet()
    ours = copy.deepcopy(plain)
    fa.attach(ours, fa.FA())
    expected, got = gradients(plain, x, labels), gradients(ours, x, labels)
    assert torch.equal(got["classifier.weight"], expected["classifier.weight"])
    assert torch.equal(got["classifier.bias"], expected["classifier.bias"])
    # the last normalisation lies behind the classifier's B already
    for name in got:
        if "classifier" not in name:
            assert relative(got[name], expected[name]) > 0.3, name


class CountConvolutions(TorchDispatchMode):
    """Every convolution_backward: its output mask (input, weight, bias) and where its weight is in memory."""

    def __init__(self):
        super().__init__()
        self.calls, self.matrices = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution_backward.default:
            self.calls.append((tuple(args[10]), args[2].data_ptr()))
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.matrices += [t.data_ptr() for t in args]
        return function(*args, **(kwargs or {}))


def count(model, x, labels):
    loss = F.cross_entropy(model(x), labels)
    with CountConvolutions() as counter:
        loss.backward()
    return counter


def test_no_wasted_work():
    model, x, labels = resnet(dtype=torch.float32)
    fa.attach(model, fa.FA())
    counter = count(model, x, labels)
    convolutions = [layer for layer in hidden(model) if isinstance(layer, nn.Conv2d)]
    through_input = [weight for (to_input, *_), weight in counter.calls if to_input]
    assert sorted(through_input) == sorted(layer.feedback.data_ptr() for layer in convolutions)    # through B
    assert sum(to_weight for (_, to_weight, _), _ in counter.calls) == len(convolutions) + 1    # and the stem
    assert len(counter.calls) == 2 * len(convolutions) + 1
    assert model.classifier.weight.data_ptr() not in counter.matrices
    assert model.classifier.feedback.data_ptr() in counter.matrices


def test_the_count_sees_the_waste_of_a_plain_hook():
    """The same hook without the cut: autograd computes Wᵀδ and throws it away.
    The count above is able to fail."""
    model, x, labels = resnet(dtype=torch.float32)
    rule = fa.FA()
    for layer in hidden(model):
        rule.prepare(layer)
        layer.rule = rule
        layer.register_full_backward_hook(fa._replace_error)
    counter = count(model, x, labels)
    assert sum(to_input for (to_input, *_), _ in counter.calls) == 2 * (len(hidden(model)) - 1)
    assert model.classifier.weight.data_ptr() in counter.matrices


def test_the_backward_pass_copies_and_adds_no_more_than_backprop():
    """Neither an input written out only for its shape, nor a sum in new memory because somebody still holds
    an addend."""
    model, x, labels = resnet(dtype=torch.float32)
    model.to(memory_format=torch.channels_last)

    def large(loss):
        with torch.profiler.profile(record_shapes=True) as profile:
            loss.backward()
        return {name: sum(e.name == name and math.prod(e.input_shapes[0]) >= 1000 for e in profile.events())
                for name in ("aten::copy_", "aten::clone", "aten::add")}

    expected = large(F.cross_entropy(model(x), labels))
    fa.attach(model, fa.FA())
    got = large(F.cross_entropy(model(x), labels))
    assert all(got[name] <= expected[name] for name in got), (got, expected)


def test_the_cut_and_the_plain_hook_agree_to_the_last_bit():
    cut, x, labels = resnet(dtype=torch.float32)
    hooked = copy.deepcopy(cut)
    fa.attach(cut, fa.FA())
    rule = fa.FA()
    for layer in hidden(hooked):
        rule.prepare(layer)
        layer.rule = rule
        layer.register_full_backward_hook(fa._replace_error)
    expected = gradients(hooked, x, labels)
    for name, g in gradients(cut, x, labels).items():
        assert torch.equal(g, expected[name]), name


@pytest.mark.parametrize("when", ["after", "before", "inside", "in place before", "in place after",
                                  "wrapped"])
def test_a_compiled_model_is_refused(when):
    """Compiled code may ignore hooks, so nobody may take it for the rule's.
    `exact()` and a removed rule compile as ever."""
    torch._dynamo.reset()
    model, x = (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)),
                torch.randn(6, 3))
    if when == "wrapped":
        with pytest.raises(ValueError, match="the model is compiled"):
            fa.attach(torch.compile(model, backend="eager"), fa.FA())
    elif when == "in place before":
        model.compile(backend="eager")
        with pytest.raises(ValueError, match="the model is compiled"):
            fa.attach(model, fa.FA())
    else:
        call = torch.compile(model, backend="eager") if when == "before" else None
        if call:
            call(x).sum().backward()                            # compiled for once without a rule
        handle = fa.attach(model, fa.FA())
        if when == "after":
            call = torch.compile(model, backend="eager")
        elif when == "inside":
            call = torch.compile(lambda x: model(x).square(), backend="eager")
        elif when == "in place after":
            model.compile(backend="eager")
            call = model
        with pytest.raises(RuntimeError, match="given to torch.compile"):
            call(x).sum().backward()
        with handle.exact():
            call(x).sum().backward()
        handle.remove()
        call(x).sum().backward()


def spoil_forward(model):
    model.blocks[3].conv2.forward = lambda x, layer=model.blocks[3].conv2: nn.Conv2d.forward(layer, x)


def spoil_class(model):
    model.blocks[3].conv2.__class__ = nn.Conv2d


def spoil_layer(model):
    old = model.blocks[3].conv2
    model.blocks[3].conv2 = nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1, bias=False)


@pytest.mark.parametrize("spoil, said", [(None, None), (spoil_forward, "its forward was replaced"),
                                         (spoil_class, "its forward was replaced"),
                                         (spoil_layer, "the model has another layer in its place")])
def test_a_step_that_the_rule_did_not_carry_is_refused(spoil, said):
    model, x, labels = resnet(dtype=torch.float32)
    handle = fa.attach(model, fa.FA())
    gradients(model, x, labels)
    handle.before_step()
    if spoil is None:
        return
    spoil(model)
    gradients(model, x, labels)
    with pytest.raises(fa.HookError,
                       match=f"FA did not carry the error through layer 'blocks.3.conv2': {said}"):
        handle.before_step()


def test_the_digest_sees_every_bit_of_the_feedback():
    model, x, labels = resnet(dtype=torch.float32)
    handle = fa.attach(model, fa.FA(seed=1))
    one = rulefile.feedback_digest(handle)
    gradients(model, x, labels)
    assert rulefile.feedback_digest(handle) == one and len(one) == 32
    other = rulefile.feedback_digest(fa.attach(resnet(dtype=torch.float32)[0], fa.FA(seed=1)))
    assert other == one != rulefile.feedback_digest(fa.attach(resnet(dtype=torch.float32)[0], fa.FA(seed=2)))
    model.to(memory_format=torch.channels_last)
    assert rulefile.feedback_digest(handle) == one     # the layout in memory is nobody's business
    last = model.classifier.feedback.view(-1)
    last.view(torch.int32)[-1] ^= 1
    assert rulefile.feedback_digest(handle) != one


def test_feedback_is_a_buffer_that_is_saved_moved_and_not_trained():
    model, x, labels = resnet(dtype=torch.float32)
    handle = fa.attach(model, fa.FA(seed=3))
    parameters = {id(p) for p in model.parameters()}
    for name, layer in handle.layers.items():
        assert layer.feedback.shape == layer.weight.shape and layer.feedback.dtype == layer.weight.dtype
        assert f"{name}.feedback" in model.state_dict() and id(layer.feedback) not in parameters
        assert not layer.feedback.requires_grad
    before = {k: v.clone() for k, v in model.state_dict().items() if k.endswith("feedback")}
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        gradients(model, x, labels)
        handle.before_step()
        optimiser.step()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())

    other, _, _ = resnet(dtype=torch.float32)
    fa.attach(other, fa.FA(seed=4))
    assert not torch.equal(other.classifier.feedback, model.classifier.feedback)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.classifier.feedback, model.classifier.feedback)
    model.to(torch.float64, memory_format=torch.channels_last)
    assert model.classifier.feedback.dtype == torch.float64
    assert model.blocks[0].conv1.feedback.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("norm", ["batch", None])
def test_feedback_is_drawn_like_the_weight_but_independently(norm):
    torch.manual_seed(5)
    model = models.resnet18(10, norm, width=32)
    fa.attach(model, fa.FA(seed=5))                             # the same seed: still another stream
    for layer in hidden(model):
        W, B = layer.weight.detach().flatten(), layer.feedback.flatten()
        n = len(W)
        assert abs(W.std() / B.std() - 1) < 8 / math.sqrt(n)
        assert abs(torch.corrcoef(torch.stack([W, B]))[0, 1]) < 5 / math.sqrt(n)
        kurtosis = [((v - v.mean()) ** 4).mean() / v.var() ** 2 for v in (W, B)]    # 1.8 uniform, 3 Gaussian
        assert abs(kurtosis[0] - kurtosis[1]) < 0.5 + 20 / math.sqrt(n)


def test_the_seed_that_drew_the_weights_draws_other_feedback():
    torch.manual_seed(5)
    later, stem = nn.Linear(50, 50), nn.Linear(3, 50)           # W is the first thing that seed 5 draws
    fa.attach(nn.Sequential(stem, later), fa.FA(seed=5))
    assert abs(torch.corrcoef(torch.stack([later.weight.detach().flatten(),
                                           later.feedback.flatten()]))[0, 1]) < 0.1


def test_a_gain_scales_the_feedback_and_nothing_else():
    rules = fa.FA(seed=0), fa.FA(seed=0, gain=3.0)
    layers = nn.Conv2d(4, 6, 3), nn.Linear(5, 7)
    for layer in layers:
        one, three = (rule.draw(layer) for rule in rules)
        assert torch.equal(3 * one, three)


def test_the_seed_fixes_the_feedback():
    draws = []
    for seed, global_seed in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(global_seed)
        model = models.cnn(width=4)
        state = torch.get_rng_state()
        fa.attach(model, fa.FA(seed=seed))
        assert torch.equal(state, torch.get_rng_state())    # its own generator: the global one is not touched
        draws.append(model.layers[1].feedback)
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_the_stem_is_left_alone_and_a_wrong_stem_is_an_error():
    model, x, labels = resnet(dtype=torch.float32)
    fa.attach(model, fa.FA())
    assert (not model.stem._backward_hooks and not hasattr(model.stem, "feedback")
            and "forward" not in vars(model.stem))

    class HeadFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.body = nn.Linear(4, 2), nn.Linear(3, 4)

        def forward(self, x):
            return self.head(self.body(x).relu())

    model, x = HeadFirst(), torch.randn(5, 3)
    handle = fa.attach(model, fa.FA())
    with pytest.raises(RuntimeError, match="taken for the stem"):
        model(x)
    with handle.exact():
        model(x).sum().backward()                               # backprop does not care
    handle.remove()
    fa.attach(model, fa.FA(), stem=[model.body])
    gradients(model, x)
    assert hasattr(model.head, "feedback") and not hasattr(model.body, "feedback")


def test_no_stem_sends_the_error_down_to_the_data():
    model, x = (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
                torch.randn(5, 3, requires_grad=True))
    fa.attach(model, fa.FA(), stem=())
    entry = model[0](x)
    (error,) = torch.autograd.grad(entry.sum(), x)
    assert torch.allclose(error, torch.ones(5, 4) @ model[0].feedback)


def test_exact_and_remove_give_backprop_back():
    plain, x, labels = resnet(dtype=torch.float32)
    model = copy.deepcopy(plain)
    handle = fa.attach(model, fa.FA())
    expected, ours = gradients(plain, x, labels), gradients(model, x, labels)

    def same(got, wanted):
        return all(torch.equal(got[k], wanted[k]) for k in wanted)

    assert not same(ours, expected)
    with handle.exact():
        assert same(gradients(model, x, labels), expected)
        assert "classifier.feedback" in model.state_dict()
    assert same(gradients(model, x, labels), ours)
    with pytest.raises(ZeroDivisionError), handle.exact():
        _ = 1 / 0
    assert same(gradients(model, x, labels), ours)
    handle.remove()
    assert same(gradients(model, x, labels), expected)
    assert model.state_dict().keys() == plain.state_dict().keys() and not model._load_state_dict_pre_hooks
    handle.remove()                                             # a second time does nothing
    fa.attach(model, fa.FA())
    assert same(gradients(model, x, labels), ours)


def test_deep_copies_are_independent():
    model, x, labels = resnet(dtype=torch.float32)
    handle = fa.attach(model, fa.FA())
    ours = gradients(model, x, labels)
    twin, twin_handle = copy.deepcopy((model, handle))
    lone = copy.deepcopy(model)
    for clone in (twin, lone):
        assert all(torch.equal(g, ours[k]) for k, g in gradients(clone, x, labels).items())
        assert clone.classifier.feedback is not model.classifier.feedback
        assert clone.classifier.forward.__self__ is clone.classifier
    twin_handle.remove()
    assert not hasattr(twin.classifier, "feedback")
    assert all(torch.equal(g, ours[k]) for k, g in gradients(model, x, labels).items())


def test_bp_changes_nothing():
    model, x, labels = resnet(dtype=torch.float32)
    before = dict(vars(model.classifier))
    handle = fa.attach(model, fa.BP())
    assert (handle.layers == {} and dict(vars(model.classifier)) == before
            and not model.stem._forward_pre_hooks)
    with handle.exact():
        gradients(model, x, labels)
    handle.remove()


@pytest.mark.parametrize("norm", ["batch", None])
def test_frozen_trains_the_classifier_alone(norm):
    model, x, labels = resnet(norm=norm, dtype=torch.float32)
    plain = copy.deepcopy(model)
    fa.attach(model, fa.Frozen())
    F.cross_entropy(model(x), labels).backward()
    assert ([name for name, p in model.named_parameters() if p.grad is not None]
            == ["classifier.weight", "classifier.bias"])
    expected = gradients(plain, x, labels)
    assert torch.equal(model.classifier.weight.grad, expected["classifier.weight"])


def test_nested_shared_and_in_place():
    """A layer used twice sends two errors; an in-place activation after a hooked layer is set right,
    and back."""
    torch.manual_seed(0)
    shared = nn.Linear(6, 6)
    plain = nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace=True),
                          nn.Sequential(shared, nn.ReLU(inplace=True)), shared,
                          nn.ReLU(inplace=True), nn.Linear(6, 3)).double()
    ours, x = copy.deepcopy(plain), torch.randn(4, 5, dtype=torch.float64)
    handle = fa.attach(ours, Transport())
    assert len(handle.layers) == 2
    expected = gradients(plain, x)
    assert all(relative(g, expected[name]) < 1e-12 for name, g in gradients(ours, x).items())
    handle.remove()
    assert ours[1].inplace and ours[4].inplace


def test_a_users_own_backward_hook_sees_the_rules_error():
    model, seen = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), []
    model[1].register_full_backward_hook(lambda layer, grad_input, grad_output: seen.append(grad_input[0]))
    fa.attach(model, fa.FA())
    model(torch.randn(5, 3)).sum().backward()
    assert torch.allclose(seen[0], torch.ones(5, 2) @ model[1].feedback)


def test_training_and_evaluation_give_no_warning(recwarn):
    model, x, labels = resnet(dtype=torch.float32)
    fa.attach(model, fa.FA())
    with torch.no_grad():
        model(x)
    gradients(model, x, labels)
    assert not [str(w.message) for w in recwarn if "hook" in str(w.message).lower()]


def test_wrong_use_is_an_error_that_changes_nothing():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    fa.attach(model, fa.FA())
    with pytest.raises(ValueError, match="'0'|'1'"):
        fa.attach(model, fa.FA())
    reflecting = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"))
    with pytest.raises(ValueError, match="padding_mode='reflect'"):
        fa.attach(reflecting, fa.FA())
    assert not any(hasattr(m, "rule") or m._backward_hooks or m._forward_pre_hooks for m in reflecting)
    with pytest.raises(ValueError, match="padding_mode"):
        fa.project(reflecting[1], reflecting[1].weight, torch.zeros(1, 4, 5, 5), (1, 4, 5, 5))

    class Wrong(fa.FA):
        def backward(self, layer, error, input_shape):
            return error[:, :1]

    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    fa.attach(model, Wrong())
    with pytest.raises(RuntimeError, match=r"Wrong.backward returned a tensor of shape \(5, 1\)"):
        model(torch.randn(5, 3)).sum().backward()


def test_the_ten_line_rule_of_the_docstring():
    class Signs(fa.FA):
        def backward(self, layer, error, input_shape):
            return fa.project(layer, layer.weight.sign() * layer.feedback.abs(), error, input_shape)

    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False))
    fa.attach(model, Signs(seed=0))
    x = torch.randn(5, 3)
    y = model[0](x)
    (error,) = torch.autograd.grad(model[1](y).sum(), y)
    expected = torch.ones(5, 2) @ (model[1].weight.sign() * model[1].feedback.abs())
    assert torch.allclose(error, expected)


def readme_run(rule, monkeypatch, batches, state=None):
    """What the README's loop makes of a model with this rule; `state` is a checkpoint to go on from."""
    code, _ = re.findall("```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    before, loop = code.split("for i, ")
    loop, after = ("for i, " + loop).split("torch.save(")
    torch.manual_seed(0)
    names = {"model": models.cnn(5, "layer", 4, size=8).double(), "torch": torch, "F": F, "batches": batches}
    monkeypatch.setattr(fa, "FA", rule)
    exec(before, names)
    handle, optimisers = names["handle"], [*names["optimisers"], *names["schedules"]]
    if state:
        names["model"].load_state_dict(state[0])
        handle.rule.load_state_dict(state[1])
        for each, its in zip(optimisers, state[2]):
            each.load_state_dict(its)
    exec(loop, names)
    kept = [names["model"].state_dict(), handle.rule.state_dict(), [each.state_dict() for each in optimisers]]
    return names, copy.deepcopy(kept), after.partition("\n")[2]


def test_the_readmes_loop_accumulates_clips_schedules_and_goes_on_from_a_checkpoint(monkeypatch):
    """Muon, AdamW, a schedule, gradients of two batches, clipped: with B = W as backprop, and resumed as if
    it had never stopped."""
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.randn(6, 3, 8, 8, dtype=torch.float64, generator=generator), torch.arange(6) % 5)
               for _ in range(8)]
    plain = readme_run(fa.BP, monkeypatch, batches)[1][0]
    ours = readme_run(Transport, monkeypatch, batches)[1][0]
    names, whole, after = readme_run(fa.KolenPollack, monkeypatch, batches)
    for name, value in plain.items():
        assert relative(ours[name], value) < 1e-6, name
        assert name.startswith("classifier") or relative(whole[0][name], value) > 1e-3, name
    half = readme_run(fa.KolenPollack, monkeypatch, batches[:4])[1]
    resumed = readme_run(fa.KolenPollack, monkeypatch, batches[4:], half)[1][0]
    assert all(torch.equal(resumed[name], value) for name, value in whole[0].items())
    monkeypatch.setitem(names, "images", batches[0][0])
    exec(after, names)
    assert 0 < names["angles"]["layers.1"] < 180 and names["angles"]["classifier"] == 0
    assert names["ranks"]["layers.1"]["error"]["effective_rank"] > 1
    assert not hasattr(names["model"].classifier, "rule")
