"""muon.py: step for step torch.optim.Muon, for convolutions too; Newton–Schulz levels the singular values and
leaves the singular vectors alone; `split` gives it the hidden weights and nothing else."""
import math

import pytest
import torch
from torch import nn

import models
import muon

SHAPES = [(64, 128), (64, 128), (128, 64), (100, 100), (300, 10), (1, 5), (64, 8, 3, 3), (64, 8, 3, 3),
          (96, 64, 1, 1), (48, 16, 5)]


def parameters(shapes, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator).to(device)) for s in shapes]


def give_gradients(*lists, step=0):
    generator = torch.Generator().manual_seed(step)
    for same in zip(*lists):
        g = torch.randn(same[0].numel(), generator=generator)
        for p in same:
            p.grad = g.view(p.shape).to(p)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize("kwargs", [dict(), dict(nesterov=False), dict(momentum=0.5, weight_decay=0.1)],
                         ids=str)
def test_a_step_is_that_of_torchs_muon_on_the_flattened_matrices(kwargs, device):
    kwargs = {"lr": 0.1, "weight_decay": 0, **kwargs}
    ours = parameters(SHAPES, device)
    reference = [nn.Parameter(p.detach().flatten(1).clone()) for p in ours]
    ours[7].data = ours[7].data.to(memory_format=torch.channels_last)
    a, b = muon.Muon(ours, **kwargs), torch.optim.Muon(reference, **kwargs)
    for step in range(5):
        give_gradients(ours, reference, step=step)
        a.step()
        b.step()
        for p, q in zip(ours, reference):
            assert torch.equal(p.grad.flatten(1), q.grad)                   # not written to
            if device.type == "cpu":
                assert torch.equal(p.flatten(1), q)
            else:                           # a GPU adds the bf16 products of a batch in another order
                scale = max(1, q.shape[0] / q.shape[1]) ** 0.5
                assert (p.flatten(1) - q).abs().max() < 0.02 * kwargs["lr"] * (step + 1) * scale
    assert ours[7].is_contiguous(memory_format=torch.channels_last)


def test_a_learning_rate_in_a_tensor_is_that_number(device):
    by_number, by_tensor = parameters(SHAPES, device), parameters(SHAPES, device)
    give_gradients(by_number, by_tensor)
    muon.Muon(by_number, 0.1).step()
    muon.Muon(by_tensor, torch.tensor(0.1, device=device)).step()
    for p, q in zip(by_number, by_tensor):
        assert (p - q).abs().max() < 1e-6


@pytest.mark.parametrize("shape", [(32, 128), (3, 20, 50), (2, 2, 50, 20)], ids=str)
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
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x ** 3 + 2.0315 * x ** 5
    assert torch.allclose(levelled, x, atol=1e-10)


def test_newton_schulz_in_bf16_is_close_to_float64_and_leaves_zero_alone():
    torch.manual_seed(0)
    X = torch.randn(64, 256)
    exact, bf16 = muon.newton_schulz(X, dtype=torch.float64), muon.newton_schulz(X)
    assert bf16.dtype == torch.bfloat16 and (bf16 - exact).norm() / exact.norm() < 0.02
    assert not muon.newton_schulz(torch.zeros(3, 4)).any()
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        muon.newton_schulz(torch.zeros(3))


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


def test_a_step_takes_a_closure_and_skips_parameters_without_a_gradient():
    p, idle = parameters([(4, 5), (4, 5)])
    optimiser, before = muon.Muon([p, idle], lr=0.1, weight_decay=0.1), idle.detach().clone()

    def closure():
        optimiser.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    losses = [optimiser.step(closure).item() for _ in range(5)]
    assert losses == sorted(losses, reverse=True) and losses[4] < losses[0]
    assert torch.equal(idle, before) and idle not in optimiser.state


@pytest.mark.parametrize("shape, kwargs, said", [
    ((2, 2), dict(lr=-1), "lr"), ((2, 2), dict(lr=math.nan), "lr"), ((2, 2), dict(lr=math.inf), "lr"),
    ((2, 2), dict(momentum=1), "momentum"), ((2, 2), dict(weight_decay=-1), "weight_decay"),
    ((3,), {}, r"shape \(3,\)"), ((0, 3), {}, r"shape \(0, 3\)")], ids=str)
def test_what_is_out_of_range_or_no_matrix_is_refused(shape, kwargs, said):
    weight = nn.Parameter(torch.zeros(shape))
    for group in ([weight], kwargs), ([{"params": [weight], **kwargs}], {}):        # of all, or of one group
        with pytest.raises(ValueError, match=said):
            muon.Muon(group[0], **group[1])
