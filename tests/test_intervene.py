"""intervene.py: what it changes, an SVD says; what it must not change, too."""
import pytest
import torch

import intervene
import muon
import rank

SHAPES = [(12, 30), (30, 12), (16, 16)]


def made(m, n):
    torch.manual_seed(0)
    return torch.randn(m, n) @ torch.logspace(0, -2, n).diag()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("r", [1, 3, 12, 100])
def test_cut_is_the_nearest_matrix_of_that_rank_of_the_same_norm(shape, r):
    M = made(*shape)
    P, sigma, Qt = torch.linalg.svd(M.double(), full_matrices=False)
    nearest = P[:, :r] @ sigma[:r].diag() @ Qt[:r]                              # Eckart & Young 1936
    result = intervene.cut(M, r)
    assert torch.linalg.matrix_rank(result, rtol=1e-5) == min(r, *shape)
    assert torch.allclose(result.double(), nearest * (M.norm() / nearest.norm()), atol=1e-5)
    assert result.norm() == pytest.approx(M.norm().item(), rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_flatten_keeps_singular_vectors_and_norm_and_nothing_else(shape):
    M = made(*shape)
    P, _, Qt = torch.linalg.svd(M.double(), full_matrices=False)
    k = min(shape)
    assert torch.allclose(intervene.flatten(M).double(), P @ Qt * (M.double().norm() / k ** 0.5), atol=1e-4)
    assert rank.effective_rank(intervene.flatten(M)) == pytest.approx(k, rel=1e-4)


def test_flatten_is_muon_but_for_the_length():
    M = made(40, 90)
    orthogonal = muon.newton_schulz(M, steps=12, dtype=torch.float64)           # its singular values stay in [0.68, 1.13]
    assert rank.angle(intervene.flatten(M), orthogonal) < 12


@pytest.mark.parametrize("change", [intervene.flatten, lambda u: intervene.cut(u, 2)])
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_what_has_no_singular_values_passes(change, value):
    M = torch.full((4, 6), value)
    assert torch.equal(change(M).nan_to_num(), M.nan_to_num())


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
                                  lambda p: muon.Muon(p, 0.1)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_update_of_any_optimiser_is_replaced(make, layout):
    def weights():
        torch.manual_seed(0)
        return torch.nn.Parameter(torch.randn(6, 4, 3, 3).to(memory_format=layout)), torch.nn.Parameter(torch.randn(5, 6))

    plain, changed = weights(), weights()
    for params in (plain, changed):
        for p in params:
            p.grad = torch.ones_like(p) + p.detach() ** 2
    was = [p.detach().clone() for p in plain]
    make(plain).step()
    with intervene.updates(changed[:1], lambda u: intervene.cut(u, 2)):
        make(changed).step()
    wanted = intervene.cut((plain[0].detach() - was[0]).flatten(1), 2).view_as(was[0])
    assert torch.allclose(changed[0], was[0] + wanted, atol=1e-6)
    assert not torch.allclose(changed[0], plain[0], atol=1e-3) and torch.equal(changed[1], plain[1])    # only what was named
    assert changed[0].stride() == plain[0].stride()
