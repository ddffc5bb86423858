"""norm.py against torch's layers, and each layer against its own equation."""
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
def test_batch_norm_is_torchs(shape):
    x, ours = images(shape), fresh("batch")
    reference = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(5).double()
    reference.load_state_dict(ours.state_dict())                # the names are the same
    error = torch.randn_like(x)
    for _ in range(3):                                          # running statistics accumulate
        for a, b in zip(run(ours, x, error), run(reference, x, error)):
            assert torch.equal(a, b)
    for name, value in reference.state_dict().items():
        if name != "num_batches_tracked":                       # which nobody reads
            assert torch.equal(ours.state_dict()[name], value)
    assert not torch.equal(ours.running_mean, torch.zeros(5))
    ours.eval(), reference.eval()
    before = ours.running_mean.clone()
    for a, b in zip(run(ours, x, error), run(reference, x, error)):
        assert torch.equal(a, b)
    assert torch.equal(ours.running_mean, before)


@pytest.mark.parametrize("kind", ["batch", "whiten"])
def test_one_value_is_refused(kind):
    with pytest.raises(ValueError, match="more than 1 value"):
        norm.make(kind, 5)(torch.zeros(1, 5))
    assert torch.isfinite(norm.make(kind, 5).eval()(torch.zeros(1, 5))).all()


# ---- whitening ---------------------------------------------------------------------------------------------

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


def test_the_inverse_square_root_is_one():
    torch.manual_seed(0)
    Q = torch.linalg.qr(torch.randn(3, 8, 8, dtype=torch.float64))[0]
    for condition, steps, left in ((5, 8, 1e-8), (100, 10, 1e-2)):
        S = Q @ torch.linspace(1, condition, 8, dtype=torch.float64).diag_embed() @ Q.mT
        errors = []
        for k in range(1, steps + 1):
            root = norm.inverse_square_root(S, k)
            errors.append((root @ S @ root - torch.eye(8)).norm().item())
        assert errors == sorted(errors, reverse=True) and errors[-1] < left     # every step brings it closer


@pytest.mark.parametrize("shape", [(64, 8, 4, 3), (500, 8), (40, 96, 3, 3)], ids=str)
def test_whitening_is_zca(shape):
    x, layer = correlated(shape), norm.Whitening(shape[1], steps=12, eps=0).double()
    assert layer.group == {8: 8, 96: 32}[shape[1]]
    y = layer(x)
    assert torch.allclose(y, exact_zca(x, layer.group), atol=1e-6)
    five = norm.Whitening(shape[1]).double()(x)
    assert (five - y).norm() / y.norm() < 0.2                   # and five steps come near
    rows = y.movedim(1, 0).flatten(1).view(-1, layer.group, x.numel() // x.shape[1])
    assert torch.allclose(rows @ rows.mT / rows.shape[-1], torch.eye(layer.group).double(), atol=1e-6)
    assert torch.allclose(rows.mean(-1), torch.zeros(()).double(), atol=1e-9)


def test_whitening_without_neighbours_is_batch_norm():
    """Odd channel numbers have groups of one."""
    x = images((6, 5, 4, 3))
    ours, reference = norm.Whitening(5, steps=20).double(), norm.BatchNorm(5).double()
    assert ours.group == 1 and torch.allclose(ours(x), reference(x), atol=1e-6)
    assert torch.allclose(ours.running_mean, reference.running_mean)
    assert torch.allclose(ours.running_covariance.flatten(), reference.running_var)


def test_whitening_remembers_for_evaluation():
    x, layer = correlated((64, 8, 4, 3)), norm.Whitening(8, momentum=1.0).double()
    trained = layer(x)
    layer.eval()
    count = 64 * 4 * 3
    scale = (count / (count - 1)) ** 0.5                        # the running covariance is unbiased
    assert torch.allclose(layer(x) * scale, trained, rtol=1e-4, atol=1e-4)
    before = layer.running_covariance.clone()
    assert torch.allclose(layer(x[:1]), layer(x)[:1]) and torch.equal(layer.running_covariance, before)


def test_whitenings_gradient_is_autograds_own_and_right():
    x, layer = correlated((9, 4)).requires_grad_(), norm.Whitening(4).double()
    torch.autograd.gradcheck(lambda x: layer(x), x)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind, reference", [("layer", F.layer_norm), ("rms", F.rms_norm)])
def test_layer_and_rms_norm_are_torchs(shape, kind, reference):
    x, ours = images(shape), fresh(kind)
    spread = lambda v: v.view(-1, *[1] * (len(shape) - 2)).expand(shape[1:])    # as torch wants it
    weights = {"weight": spread(ours.weight), **({"bias": spread(ours.bias)} if kind == "layer" else {})}
    y = reference(x, shape[1:], eps=1e-5, **weights)
    error = torch.randn_like(x)
    expected = [y, *torch.autograd.grad(y, [x, *ours.parameters()], error)]
    for a, b in zip(run(ours, x, error), expected):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["batch", "layer", "rms"])
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
    with pytest.raises(ValueError, match="batch, layer, rms, whiten"):
        norm.make("instance", 3)


def test_only_batch_norm_and_whitening_keep_inputs_apart():
    """The demonstration's claim."""
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
