"""norm.py: batch, layer and RMS normalisation are torch's and their own equations; whitening is ZCA; only
batch normalisation and whitening keep inputs apart."""
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import norm
import rank

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
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], error)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch_norm_is_torchs_and_its_equation(shape):
    x, ours = images(shape), fresh("batch")
    assert torch.allclose(fresh("batch")(x), ours.equation(x), rtol=1e-10)
    reference = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(5).double()
    reference.load_state_dict(ours.state_dict())                # the names are the same
    error = torch.randn_like(x)
    for _ in range(3):                                          # running statistics accumulate
        for a, b in zip(run(ours, x, error), run(reference, x, error)):
            assert torch.equal(a, b)
    for each in (ours, reference):
        each.eval()
    for a, b in zip(run(ours, x, error), run(reference, x, error)):
        assert torch.equal(a, b)
    for name, value in reference.state_dict().items():
        if name != "num_batches_tracked":                       # which nobody reads
            assert torch.equal(ours.state_dict()[name], value)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind, reference", [("layer", F.layer_norm), ("rms", F.rms_norm)])
def test_layer_and_rms_norm_are_torchs_and_their_equations(shape, kind, reference):
    x, ours = images(shape), fresh(kind)
    spread = lambda v: v.view(-1, *[1] * (len(shape) - 2)).expand(shape[1:])    # as torch wants it
    weights = {"weight": spread(ours.weight), **({"bias": spread(ours.bias)} if kind == "layer" else {})}
    y = reference(x, shape[1:], eps=1e-5, **weights)
    error = torch.randn_like(x)
    expected = [y, *torch.autograd.grad(y, [x, *ours.parameters()], error)]
    for a, b in zip(run(ours, x, error), expected):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
    assert torch.allclose(ours(x), ours.equation(x), rtol=1e-10)


def exact_zca(x, group):
    """By eigenvectors, in float64, for each group of channels."""
    rows = x.detach().double().movedim(1, 0).flatten(1).view(-1, group, x.numel() // x.shape[1])
    rows = rows - rows.mean(-1, keepdim=True)
    values, vectors = torch.linalg.eigh(rows @ rows.mT / rows.shape[-1])
    rows = vectors @ (values ** -0.5).diag_embed() @ vectors.mT @ rows
    return rows.reshape(x.shape[1], x.shape[0], *x.shape[2:]).movedim(0, 1)


def correlated(shape):
    """Channels that have something in common, but not so much that five steps are too few."""
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    return 2 + x + 0.3 * x.flip(1)


@pytest.mark.parametrize("shape, group", [((64, 8, 4, 3), 8), ((40, 96, 3, 3), 32), ((500, 5), 1)], ids=str)
def test_whitening_is_zca_of_groups_and_remembers_it_for_evaluation(shape, group):
    x, layer = correlated(shape), norm.Whitening(shape[1], momentum=1.0, steps=12, eps=0).double()
    y = layer(x)
    assert torch.allclose(y, exact_zca(x, group), atol=1e-6)
    five = norm.Whitening(shape[1]).double()(x)
    assert (five - y).norm() / y.norm() < 0.2                   # and five steps come near
    before = layer.eval().running_covariance.clone()
    count = x.numel() / shape[1]                                # the running covariance is unbiased
    assert torch.allclose(layer(x) * (count / (count - 1)) ** 0.5, y, atol=1e-6)
    assert torch.allclose(layer(x[:1]), layer(x)[:1]) and torch.equal(layer.running_covariance, before)


def test_whitenings_gradient_is_that_of_finite_differences():
    x, layer = correlated((9, 4)).requires_grad_(), norm.Whitening(4).double()
    torch.autograd.gradcheck(lambda x: layer(x), x)


@pytest.mark.parametrize("kind", norm.KINDS)
def test_channels_last_and_bf16_change_only_the_rounding(kind):
    x, layer = images(SHAPES[0]).float(), fresh(kind).float()
    last = x.contiguous(memory_format=torch.channels_last)
    y = layer(x)
    assert torch.allclose(y, layer(last), atol=1e-5)
    assert torch.allclose(y, fresh(kind)(x.double()).float(), atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(layer(x), y, atol=1e-5)           # statistics are taken in float32
        assert kind != "whiten" or layer(x.bfloat16()).dtype == torch.bfloat16
        assert torch.allclose(layer(last.bfloat16()).float(), layer(x).float(), atol=0.1)
    if kind == "whiten":                                        # in fp16 the squares would overflow
        assert torch.allclose(fresh(kind).half()((100 * x).half()).float(), y, atol=0.01)


def test_only_batch_norm_and_whitening_keep_inputs_apart():
    torch.manual_seed(0)
    weights = [torch.randn(128, 128) * (2 / 128) ** 0.5 for _ in range(16)]
    cosine = {}
    for kind in (None, *norm.KINDS):
        x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
        for W in weights:
            x = norm.make(kind, 128)(x @ W.mT).relu().detach()
        cosine[kind] = rank.mean_cosine(x)
    assert cosine["batch"] < 0.4 and cosine["whiten"] < 0.4
    assert all(cosine[kind] > 0.8 for kind in (None, "layer", "rms"))


def test_no_norm_an_unknown_norm_and_a_single_value():
    x = torch.randn(2, 3)
    assert torch.equal(norm.make(None, 3)(x), x) and not list(norm.make(None, 3).parameters())
    with pytest.raises(ValueError, match="batch, layer, rms, whiten"):
        norm.make("instance", 3)
    for kind in ("batch", "whiten"):
        with pytest.raises(ValueError, match="more than 1 value"):
            norm.make(kind, 5)(torch.zeros(1, 5))
