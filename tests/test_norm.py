"""norm.py against torch's layers, and each layer against its own equation."""
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import norm

SHAPES = [(6, 5, 4, 3), (6, 5)]


def images(shape):
    torch.manual_seed(0)
    return (3 + 2 * torch.randn(shape, dtype=torch.float64)).requires_grad_()


def fresh(kind):
    torch.manual_seed(1)
    layer = norm.make(kind, 5).double()
    for p in layer.parameters():
        nn.init.normal_(p)
    return layer


def run(layer, x, error):
    y = layer(x)
    return [y, *torch.autograd.grad(y, [x, *(layer.parameters() if isinstance(layer, nn.Module) else [])], error)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch_norm_is_torchs(shape):
    x, ours = images(shape), fresh("batch")
    reference = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(5).double()
    reference.load_state_dict(ours.state_dict())                # the names are the same
    error = torch.randn_like(x)
    for _ in range(3):                                          # running statistics accumulate
        for a, b in zip(run(ours, x, error), run(reference, x, error)):
            assert torch.equal(a, b)
    for name, value in reference.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    assert not torch.equal(ours.running_mean, torch.zeros(5))
    ours.eval(), reference.eval()
    before = ours.running_mean.clone()
    for a, b in zip(run(ours, x, error), run(reference, x, error)):
        assert torch.equal(a, b)
    assert torch.equal(ours.running_mean, before)


def test_batch_norm_of_one_value_is_refused():
    with pytest.raises(ValueError, match="more than 1 value"):
        norm.make("batch", 5)(torch.zeros(1, 5))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind, reference", [("layer", F.layer_norm), ("rms", F.rms_norm)])
def test_layer_and_rms_norm_are_torchs(shape, kind, reference):
    x, ours = images(shape), fresh(kind)
    spread = lambda v: v.view(-1, *[1] * (len(shape) - 2)).expand(shape[1:])        # a gain a channel, as torch wants it
    weights = {"weight": spread(ours.weight), **({"bias": spread(ours.bias)} if kind == "layer" else {})}
    y = reference(x, shape[1:], eps=1e-5, **weights)
    error = torch.randn_like(x)
    expected = [y, *torch.autograd.grad(y, [x, *ours.parameters()], error)]
    for a, b in zip(run(ours, x, error), expected):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", norm.KINDS)
def test_forward_is_the_equation(kind, shape):
    x, layer = images(shape), fresh(kind)
    assert torch.allclose(layer(x), layer.equation(x), rtol=1e-10)


@pytest.mark.parametrize("kind", norm.KINDS)
def test_channels_last_and_bf16(kind):
    x, layer = images(SHAPES[0]).float(), fresh(kind).float()
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.allclose(layer(x), layer(last), atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(layer(last.bfloat16()).float(), layer(x).float(), atol=0.1)


def test_make():
    x = torch.randn(2, 3)
    assert torch.equal(norm.make(None, 3)(x), x) and not list(norm.make(None, 3).parameters())
    with pytest.raises(ValueError, match="batch, layer, rms"):
        norm.make("instance", 3)


def test_only_batch_norm_keeps_inputs_apart():
    """The demonstration's claim."""
    torch.manual_seed(0)
    weights = [torch.randn(128, 128) * (2 / 128) ** 0.5 for _ in range(16)]
    cosine = {}
    for kind in (None, *norm.KINDS):
        x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
        for W in weights:
            x = norm.make(kind, 128)(x @ W.mT).relu().detach()
        cosine[kind] = norm._mean_cosine(x)
    assert cosine["batch"] < 0.4 and all(cosine[kind] > 0.8 for kind in (None, "layer", "rms"))
