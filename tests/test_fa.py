"""fa.py against autograd: the error crosses each layer through B and never through W; where B is W, all is
backprop; nothing is computed in vain; and what would silently be backprop is refused."""
import copy
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


class Transport(fa.Rule):
    """Backprop by our own projection."""

    uses_weight = True
    backward = fa.BP.backward


def grads(model):
    """By name, of all parameters but feedback that learns; None where no error came."""
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()
            if not name.endswith("feedback")}


def gradients(model, x, labels=None):
    model.zero_grad()
    y = model(x)
    y = y.float() if y.dtype == torch.bfloat16 else y
    (y.square().sum() if labels is None else F.cross_entropy(y, labels)).backward()
    return grads(model)


def relative(a, b):
    return ((a - b).norm() / b.norm().clamp(min=1e-300)).item()


def agree(got, expected, tolerance=1e-10):
    """The same gradients; with a tolerance of 0 to the last bit."""
    assert got.keys() == expected.keys()
    for name, wanted in expected.items():
        assert (got[name] is None) == (wanted is None), name
        if wanted is not None and not torch.equal(got[name], wanted):
            assert relative(got[name], wanted) < tolerance, name


def hidden(model):
    return [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)][1:]


def resnet(width=8, norm="batch", dtype=torch.float64, device="cpu"):
    torch.manual_seed(0)
    model = models.resnet18(10, norm, width).to(device, dtype)
    x = torch.randn(4, 3, 32, 32, dtype=dtype, device=device)
    return model, x, torch.randint(10, (4,), device=device)


def mlp():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def watch(model):
    """Fills a dictionary with the error that comes in at each hidden layer's output and the one sent on."""
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


def through(layer, weight, x, error):
    """The error at the input x of a layer that has this weight, by autograd."""
    entry = torch.zeros_like(x, requires_grad=True)
    y = (F.linear(entry, weight) if isinstance(layer, nn.Linear) else
         F.conv2d(entry, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups))
    return torch.autograd.grad(y, entry, error)[0]


def contents(model):
    """All that a module has: to see that nothing is left behind."""
    return {name: (type(m), *map(sorted, (vars(m), m._parameters, m._buffers)), len(m._forward_hooks),
                   len(m._forward_pre_hooks), len(m._load_state_dict_pre_hooks))
            for name, m in model.named_modules()}


# ---- the error through B -----------------------------------------------------------------------------------

IMAGES = (2, 4, 11, 10)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("layer, shape", [
    (nn.Conv2d(4, 6, 3, padding=1), IMAGES), (nn.Conv2d(4, 6, 1, stride=2), IMAGES),
    (nn.Conv2d(4, 6, (3, 4), stride=(2, 1), padding=(2, 1), dilation=(1, 2), groups=2), IMAGES),
    (nn.Conv2d(4, 6, 3, stride=2, padding="valid", dilation=2), IMAGES),
    (nn.Conv2d(4, 6, 2, padding="same"), IMAGES),               # one zero more at the end
    (nn.Conv2d(4, 6, (3, 4), padding="same", dilation=(2, 1), groups=2), IMAGES),
    (nn.Conv2d(4, 6, 3, stride=2), IMAGES[1:]),                 # no batch
    (nn.Linear(7, 6), (5, 7)), (nn.Linear(7, 6, bias=False), (2, 5, 7)), (nn.Linear(7, 6), (7,))], ids=str)
def test_the_error_crosses_a_layer_as_if_b_were_its_weight_and_its_own_gradients_are_exact(layer, shape):
    plain = copy.deepcopy(layer).double()
    ours, x = copy.deepcopy(plain), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    fa.attach(nn.Sequential(ours), fa.FA(), stem=())
    y, y_plain = ours(x), plain(x)
    error = torch.randn_like(y)
    got = torch.autograd.grad(y, [x, *ours.parameters()], error)
    expected = torch.autograd.grad(y_plain, [*plain.parameters()], error)
    assert torch.equal(y, y_plain) and relative(got[0], through(layer, ours.feedback, x, error)) < 1e-12
    assert all(relative(g, e) < 1e-12 for g, e in zip(got[1:], expected))


def test_in_a_resnet_every_error_goes_through_b_and_only_the_classifiers_gradient_is_backprops():
    plain, x, labels = resnet()
    ours = copy.deepcopy(plain)
    fa.attach(ours, fa.FA(seed=1))
    seen = watch(ours)
    expected, got = gradients(plain, x, labels), gradients(ours, x, labels)
    for layer in hidden(ours):
        sent, error = seen[layer, "in"], seen[layer, "out"]
        assert relative(sent, through(layer, layer.feedback, sent, error)) < 1e-12
        assert relative(sent, through(layer, layer.weight.detach(), sent, error)) > 0.5
    for name in got:                    # the last normalisation lies behind the classifier's B already
        if name.startswith("classifier"):
            assert torch.equal(got[name], expected[name])
        else:
            assert relative(got[name], expected[name]) > 0.3, name


def test_a_resnet_whose_b_is_w_is_backprop_and_in_bf16_too_but_for_rounding(device):
    for dtype, tolerance in (torch.float64, 1e-10), (torch.float32, 0.03):      # bf16 has 8 bits: 0.4 %
        plain, x, labels = resnet(norm=None, dtype=dtype, device=device)
        ours = copy.deepcopy(plain)
        fa.attach(ours, Transport())
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.float32):
            got = gradients(ours, x, labels)
            agree(got, gradients(plain, x, labels), tolerance)
        assert all(g.dtype == dtype for g in got.values())


def test_in_float32_it_is_backprop_to_the_last_bit():
    plain, x, labels = resnet(dtype=torch.float32)
    plain.to(memory_format=torch.channels_last)
    ours = copy.deepcopy(plain)
    fa.attach(ours, Transport())
    agree(gradients(ours, x, labels), gradients(plain, x, labels), 0)


def test_a_layer_that_is_used_twice_between_in_place_activations_is_backprop():
    torch.manual_seed(0)
    shared = nn.Linear(6, 6)
    plain = nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace=True),
                          nn.Sequential(shared, nn.ReLU(inplace=True)), shared, nn.Linear(6, 3)).double()
    ours, x = copy.deepcopy(plain), torch.randn(4, 5, dtype=torch.float64)
    first, second = fa.attach(ours, Transport(), only=["4"]), fa.attach(ours, Transport(), only=["2.0"])
    agree(gradients(ours, x), gradients(plain, x))
    first.remove()
    assert not ours[1].inplace
    agree(gradients(ours, x), gradients(plain, x))
    second.remove()
    assert ours[1].inplace and ours[2][1].inplace and contents(ours) == contents(plain)


# ---- nothing in vain ---------------------------------------------------------------------------------------

class Count(TorchDispatchMode):
    """Of every convolution_backward its output mask (input, weight, bias) and where its weight is in memory,
    and where every factor of a matrix product is."""

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
    with Count() as counter:
        loss.backward()
    return counter, grads(model)


def test_the_error_through_w_is_never_computed():
    """A plain hook, without the cut, gets the same gradients; but there autograd computes Wᵀδ too, for
    nothing, and this count sees it."""
    model, x, labels = resnet(dtype=torch.float32)
    hooked, rule = copy.deepcopy(model), fa.FA()
    fa.attach(model, fa.FA())
    for layer in hidden(hooked):
        rule.prepare(layer)
        layer.rule = rule
        layer.register_full_backward_hook(fa._replace_error)
    (ours, got), (waste, expected) = count(model, x, labels), count(hooked, x, labels)
    agree(got, expected, 0)
    convolutions = hidden(model)[:-1]
    to_input = [weight for (wanted, *_), weight in ours.calls if wanted]
    assert sorted(to_input) == sorted(layer.feedback.data_ptr() for layer in convolutions)
    assert len(ours.calls) == 2 * len(convolutions) + 1         # and each weight's gradient, the stem's too
    assert sum(wanted for (wanted, *_), _ in waste.calls) == 2 * len(convolutions)
    assert model.classifier.feedback.data_ptr() in ours.matrices
    assert model.classifier.weight.data_ptr() not in ours.matrices
    assert hooked.classifier.weight.data_ptr() in waste.matrices


def test_the_backward_pass_copies_and_adds_no_more_than_backprop():
    """Neither an input written out only for its shape, nor a sum in new memory because somebody still holds
    an addend."""
    model, x, labels = resnet(dtype=torch.float32)
    model.to(memory_format=torch.channels_last)

    def large():
        loss = F.cross_entropy(model(x), labels)
        with torch.profiler.profile(record_shapes=True) as profile:
            loss.backward()
        return {name: sum(e.name == name and math.prod(e.input_shapes[0]) >= 1000 for e in profile.events())
                for name in ("aten::copy_", "aten::clone", "aten::add")}

    expected = large()
    fa.attach(model, fa.FA())
    got = large()
    assert all(got[name] <= expected[name] for name in got), (got, expected)


# ---- what would silently be backprop -----------------------------------------------------------------------

@pytest.mark.parametrize("spoil, said", [
    (lambda block: vars(block.conv2).update(forward=block.conv1.forward), "its forward was replaced"),
    (lambda block: setattr(block.conv2, "__class__", nn.Conv2d), "its forward was replaced"),
    (lambda block: setattr(block, "conv2", nn.Conv2d(64, 64, 3, padding=1)), "the model has another")])
def test_a_step_whose_error_the_rule_did_not_carry_is_refused(spoil, said):
    model, x, labels = resnet(dtype=torch.float32)
    handle = fa.attach(model, fa.FA())
    gradients(model, x, labels)
    handle.before_step()
    spoil(model.blocks[-1])
    gradients(model, x, labels)
    with pytest.raises(fa.HookError, match=f"carry the error through layer 'blocks.7.conv2': {said}"):
        handle.before_step()


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_a_compiled_or_traced_model_is_refused():
    """Compiled code may ignore hooks. `exact()` and a removed rule compile as ever; a trace for evaluation is
    right, one to train would not be."""
    torch._dynamo.reset()
    model, x = mlp(), torch.randn(6, 3)
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(ValueError, match="the model is compiled"):
        fa.attach(compiled, fa.FA())
    compiled(x).sum().backward()                                # once without a rule
    handle = fa.attach(model, fa.FA())
    def traced(x):
        return torch.jit.trace(model, x, check_trace=False)(x)

    with torch.no_grad():
        torch.testing.assert_close(traced(x), model(x))
    for call in compiled, torch.compile(lambda x: model(x).square(), backend="eager"), traced:
        with pytest.raises(RuntimeError, match="given to torch.compile or jit.trace"):
            call(x).sum().backward()
        with handle.exact():
            call(x).sum().backward()
    handle.remove()
    compiled(x).sum().backward()
    model.compile(backend="eager")
    with pytest.raises(ValueError, match="the model is compiled"):
        fa.attach(model, fa.FA())


def test_a_stem_that_is_not_the_first_layer_is_refused():
    class HeadFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.body = nn.Linear(4, 2), nn.Linear(3, 4)

        def forward(self, x):
            return self.head(input=self.body(input=x).relu())

    model, x = HeadFirst(), torch.randn(5, 3)
    handle = fa.attach(model, fa.FA())
    with pytest.raises(RuntimeError, match="taken for the stem"):
        model(x)
    with torch.no_grad():
        model(x)
    with handle.exact():
        model(x).sum().backward()                               # backprop does not care
    handle.remove()
    fa.attach(model, fa.FA(), stem=[model.body])
    model(x).sum().backward()


def test_wrong_use_is_one_error_that_changes_nothing():
    reflecting = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"))
    lazy = nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(5))
    for model, rule, error, said in ((mlp(), fa.FA, TypeError, "an instance of a rule"),
                                     (mlp(), "fa", TypeError, "not 'fa'"),
                                     (reflecting, fa.FA(), ValueError, "padding_mode='reflect'"),
                                     (lazy, fa.FA(), ValueError, "run the model forward once")):
        before = contents(model)
        with pytest.raises(error, match=said) as raised:
            fa.attach(model, rule)
        assert "\n" not in str(raised.value) and contents(model) == before
    with pytest.raises(ValueError, match="padding_mode"):
        fa.project(reflecting[1], reflecting[1].weight, torch.zeros(1, 4, 5, 5), (1, 4, 5, 5))
    with pytest.raises(ValueError, match="gain=0"):
        fa.FA(gain=0)
    lazy(torch.ones(1, 3))
    fa.attach(lazy, fa.FA())
    with pytest.raises(ValueError, match="layer '1' already has a rule"):
        fa.attach(lazy, fa.FA())


@pytest.mark.parametrize("wrong, said", [(lambda e: e[:, :1], r"a tensor of shape \(5, 1\)"),
                                         (lambda e: e.double(), ".*float64"), (lambda e: 3, "3 for Linear")])
def test_a_rule_that_returns_something_else_than_the_error_at_the_input_is_refused(wrong, said):
    class Wrong(fa.FA):
        def backward(self, layer, error, input_shape):
            return wrong(super().backward(layer, error, input_shape))

    model = mlp()
    fa.attach(model, Wrong())
    with pytest.raises(fa.RuleError, match=f"Wrong.backward returned {said}"):
        model(torch.randn(5, 3)).sum().backward()


# ---- feedback, and plain backprop again --------------------------------------------------------------------

@pytest.mark.parametrize("norm", ["batch", None])
def test_feedback_is_a_buffer_drawn_like_the_weight_but_independently(norm):
    torch.manual_seed(5)
    model = models.resnet18(10, norm, width=32).to(memory_format=torch.channels_last)
    parameters = {*model.parameters()}
    handle = fa.attach(model, fa.FA(seed=5))                    # the same seed: still another stream
    assert parameters == {*model.parameters()}
    for name, layer in handle.layers.items():
        assert f"{name}.feedback" in model.state_dict() and not layer.feedback.requires_grad
        W, B = layer.weight.detach().flatten(), layer.feedback.flatten()
        n = len(W)
        assert abs(W.std() / B.std() - 1) < 8 / math.sqrt(n)
        assert abs(torch.corrcoef(torch.stack([W, B]))[0, 1]) < 5 / math.sqrt(n)
        kurtosis = [((v - v.mean()) ** 4).mean() / v.var() ** 2 for v in (W, B)]    # 1.8 uniform, 3 Gaussian
        assert abs(kurtosis[0] - kurtosis[1]) < 0.5 + 20 / math.sqrt(n)
    assert model.blocks[0].conv1.feedback.is_contiguous(memory_format=torch.channels_last)
    torch.manual_seed(5)
    later, stem = nn.Linear(50, 50).double(), nn.Linear(3, 50)  # W is the first thing that seed 5 draws
    fa.attach(nn.Sequential(stem, later), fa.FA(seed=5))
    W, B = later.weight.detach().flatten(), later.feedback.flatten()
    assert B.dtype == torch.float64 and abs(torch.corrcoef(torch.stack([W, B]))[0, 1]) < 0.1


def test_a_gain_scales_the_feedback():
    for layer in nn.Conv2d(4, 6, 3), nn.Linear(5, 7):
        assert torch.equal(3 * fa.FA(seed=0).draw(layer), fa.FA(seed=0, gain=3.0).draw(layer))


def test_exact_and_remove_give_backprop_back():
    plain, x, labels = resnet(dtype=torch.float32)
    model = copy.deepcopy(plain)
    handle = fa.attach(model, fa.FA())
    expected, ours = gradients(plain, x, labels), gradients(model, x, labels)
    with pytest.raises(ZeroDivisionError), handle.exact():
        agree(gradients(model, x, labels), expected, 0)
        assert "classifier.feedback" in model.state_dict()
        _ = 1 / 0
    agree(gradients(model, x, labels), ours, 0)
    for _ in range(2):                                          # a second time does nothing
        handle.remove()
    agree(gradients(model, x, labels), expected, 0)
    assert contents(model) == contents(plain)
    handle = fa.attach(model, fa.BP())                          # changes no layer
    assert handle.layers == {} and [*contents(model).values()][1:] == [*contents(plain).values()][1:]
    fa.attach(model, fa.FA())
    agree(gradients(model, x, labels), ours, 0)


def test_exact_is_the_whole_models_and_lasts_until_the_outermost_ends():
    plain, x, labels = resnet(dtype=torch.float32)
    model = copy.deepcopy(plain)
    handles = [fa.attach(model, fa.FA(), only=only) for only in (["blocks.*"], ["classifier"])]
    expected, ours = gradients(plain, x, labels), gradients(model, x, labels)
    for handle in handles:
        with handle.exact():
            with handles[0].exact():
                agree(gradients(model, x, labels), expected, 0)
            agree(gradients(model, x, labels), expected, 0)
        agree(gradients(model, x, labels), ours, 0)


def test_the_digest_sees_every_bit_of_the_feedback_and_not_its_layout_in_memory():
    model = models.cnn(width=4)
    handle = fa.attach(model, fa.FA(seed=1))
    before = rulefile.feedback_digest(handle)
    model.to(memory_format=torch.channels_last)
    assert rulefile.feedback_digest(handle) == before
    model.classifier.feedback.view(-1).view(torch.int32)[-1] ^= 1
    assert rulefile.feedback_digest(handle) != before


# ---- the README -------------------------------------------------------------------------------------------

def readme_run(rule, monkeypatch, batches, state=None):
    """What the README's loop makes of a model with this rule; `state` is a checkpoint to go on from."""
    code, _ = re.findall("```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    before, loop, after = re.fullmatch(r"(.*)(for i, .*)torch.save.*?\n(.*)", code, re.DOTALL).groups()
    torch.manual_seed(0)
    names = {"model": models.cnn(5, "layer", 4, size=8).double(), "torch": torch, "F": F, "batches": batches}
    monkeypatch.setattr(fa, "FA", rule)
    exec(before, names)
    parts = [names["model"], names["handle"].rule, *names["optimisers"], *names["schedules"]]
    for part, its in zip(parts, state or ()):
        part.load_state_dict(its)
    exec(loop, names)
    return names, copy.deepcopy([part.state_dict() for part in parts]), after


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
