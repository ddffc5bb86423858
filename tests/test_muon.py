"""muon.py against torch.optim.Muon, an SVD, and itself."""
import copy
import io
import re

import pytest
import torch
from torch import nn

import models
import muon

needs_reference = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
SHAPES = [(64, 128), (64, 128), (128, 64), (100, 100), (48, 300), (10, 300), (300, 10), (1, 5), (16, 72),
          (16, 72)]


def parameters(shapes, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator).to(device)) for s in shapes]


def give_gradients(*lists, step=0):
    generator = torch.Generator().manual_seed(step)
    for same in zip(*lists):
        g = torch.randn(same[0].numel(), generator=generator)
        for p in same:
            p.grad = g.view(p.shape).to(p)


@needs_reference
@pytest.mark.parametrize("kwargs", [dict(), dict(nesterov=False), dict(momentum=0.5, weight_decay=0.1),
                                    dict(momentum=0, lr=1.0)], ids=str)
def test_equals_torchs_muon(kwargs, device):
    kwargs = {"lr": 0.1, "weight_decay": 0, **kwargs}
    ours, reference = parameters(SHAPES, device), parameters(SHAPES, device)
    a, b = muon.Muon(ours, **kwargs), torch.optim.Muon(reference, **kwargs)
    for step in range(5):
        give_gradients(ours, reference, step=step)
        a.step()
        b.step()
        for p, q in zip(ours, reference):
            if device.type == "cpu":
                assert torch.equal(p, q)
            else:                           # a GPU adds the bf16 products of a batch in another order
                scale = max(1, p.shape[0] / p.shape[1]) ** 0.5
                assert (p - q).abs().max() < 0.02 * kwargs["lr"] * (step + 1) * scale


@needs_reference
def test_a_convolution_is_its_flattened_matrix():
    shapes = [(64, 8, 3, 3), (64, 8, 3, 3), (256, 6, 3, 3), (96, 64, 1, 1), (48, 16, 5)]
    convolutions = parameters(shapes)
    matrices = [nn.Parameter(p.detach().flatten(1).clone()) for p in convolutions]
    convolutions[1].data = convolutions[1].data.to(memory_format=torch.channels_last)
    a, b = muon.Muon(convolutions, lr=0.1), torch.optim.Muon(matrices, lr=0.1, weight_decay=0)
    for step in range(4):
        give_gradients(convolutions, matrices, step=step)
        a.step()
        b.step()
    for p, q in zip(convolutions, matrices):
        assert torch.equal(p.flatten(1), q)
    assert convolutions[1].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(32, 128), (128, 32), (3, 20, 50), (2, 2, 50, 20)], ids=str)
def test_newton_schulz_keeps_singular_vectors_and_levels_singular_values(shape):
    torch.manual_seed(0)
    X = torch.randn(shape, dtype=torch.float64)
    Y = muon.newton_schulz(X, dtype=torch.float64)
    P, sigma, Qh = torch.linalg.svd(X, full_matrices=False)
    S = P.mT @ Y @ Qh.mT                                        # diagonal if the singular vectors are X's
    levelled = S.diagonal(dim1=-2, dim2=-1)
    assert (S - torch.diag_embed(levelled)).abs().max() < 1e-10
    assert levelled.min() > 0.6 and levelled.max() < 1.25
    x = sigma / X.flatten(-2).norm(dim=-1)[..., None]           # the same quintic on each singular value
    a, b, c = muon.COEFFICIENTS
    for _ in range(5):
        x = a * x + b * x ** 3 + c * x ** 5
    assert torch.allclose(levelled, x, atol=1e-10)


def test_a_batch_is_its_matrices_one_by_one():
    X = torch.randn(5, 24, 40)
    together = muon.newton_schulz(X)
    assert together.dtype == torch.bfloat16
    assert all(torch.equal(together[i], muon.newton_schulz(X[i])) for i in range(5))
    assert not muon.newton_schulz(torch.zeros(3, 4)).any()
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        muon.newton_schulz(torch.zeros(3))


def test_bf16_is_close_to_float64():
    torch.manual_seed(0)
    X = torch.randn(64, 256)
    exact = muon.newton_schulz(X.double(), dtype=torch.float64)
    assert ((muon.newton_schulz(X) - exact).norm() / exact.norm()) < 0.02
    assert ((muon.newton_schulz(X, dtype=torch.float32) - exact).norm() / exact.norm()) < 1e-4


def test_the_gradient_is_not_written_to():
    ps = parameters([(8, 3, 3, 3), (6, 6)])
    give_gradients(ps)
    before = [p.grad.clone() for p in ps]
    muon.Muon(ps, lr=0.1, weight_decay=0.1).step()
    assert all(torch.equal(p.grad, g) for p, g in zip(ps, before))


def test_the_state_survives_a_checkpoint():
    ours = parameters(SHAPES)
    optimiser = muon.Muon(ours, lr=0.1, weight_decay=0.01)
    give_gradients(ours)
    optimiser.step()
    file = io.BytesIO()
    torch.save(optimiser.state_dict(), file)
    file.seek(0)
    twins = copy.deepcopy(ours)
    twin = muon.Muon(twins, lr=0.3)
    twin.load_state_dict(torch.load(file, weights_only=True))
    for step in (1, 2):
        give_gradients(ours, twins, step=step)
        optimiser.step()
        twin.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, twins))


def test_optimiser_manners():
    p, idle = parameters([(4, 5), (4, 5)])
    optimiser = muon.Muon([{"params": [p], "lr": 0.5}, {"params": [idle]}], lr=0.1)
    assert [g["lr"] for g in optimiser.param_groups] == [0.5, 0.1]
    before = idle.detach().clone()

    def closure():
        optimiser.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    first = optimiser.step(closure)
    assert first > 0 and torch.equal(idle, before) and idle not in optimiser.state
    for _ in range(20):
        for group in optimiser.param_groups:
            group["lr"] *= 0.8
        last = optimiser.step(closure)
    assert last < 0.1 * first


def test_a_subclass_may_orthogonalise_otherwise():
    """harness/parallel.py rests upon it: matrices go in, and what comes out is applied."""
    class BySVD(muon.Muon):
        def orthogonalise(self, updates, group):
            assert [tuple(U.shape) for U in updates] == [(6, 18), (5, 4)]
            return [P @ Qh for P, _, Qh in (torch.linalg.svd(U, full_matrices=False) for U in updates)]

    ps = parameters([(6, 2, 3, 3), (5, 4)])
    before = [p.detach().clone() for p in ps]
    give_gradients(ps)
    BySVD(ps, lr=0.1).step()
    for p, was, scale in zip(ps, before, (1, (5 / 4) ** 0.5)):
        step = torch.linalg.svdvals((was - p.detach()).flatten(1))
        assert torch.allclose(step, torch.full_like(step, 0.1 * scale), atol=1e-5)


@pytest.mark.parametrize("kwargs", [dict(lr=-1), dict(lr=float("nan")), dict(lr=float("inf")),
                                    dict(momentum=1), dict(momentum=-0.1), dict(weight_decay=-1)], ids=str)
def test_hyperparameters_out_of_range(kwargs):
    with pytest.raises(ValueError):
        muon.Muon(parameters([(2, 2)]), **kwargs)


@pytest.mark.parametrize("shape", [(3,), (), (0, 3), (3, 0)], ids=str)
def test_what_is_no_matrix_is_refused(shape):
    with pytest.raises(ValueError, match=f"shape {re.escape(str(shape))}"):
        muon.Muon([nn.Parameter(torch.zeros(shape))])


@pytest.mark.parametrize("norm", ["batch", None])
def test_split_puts_every_parameter_in_one_place(norm):
    model = models.resnet18(norm=norm, width=4)
    hidden, others = muon.split(model)
    assert len(hidden) == 19 and all(p.dim() == 4 for p in hidden)          # 16 convolutions and 3 shortcuts
    ids = [id(p) for p in hidden + others]
    assert len(set(ids)) == len(ids) == len(list(model.parameters()))
    chosen = {id(p) for p in hidden}
    assert id(model.stem.weight) not in chosen and id(model.classifier.weight) not in chosen
    model.blocks[0].conv1.weight.requires_grad_(False)
    assert len(muon.split(model)[0]) == 18
