"""rank.py against matrices whose answer is known by hand, and an SVD."""
import math

import pytest
import torch

import fa
import models
import muon
import rank

MEASURES = [rank.effective_rank, rank.participation_ratio, rank.stable_rank]


def with_spectrum(sigma, m=40, n=60):
    generator = torch.Generator().manual_seed(0)
    k = len(sigma)
    P = torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=torch.float64))[0]
    Q = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64))[0]
    return P @ torch.tensor(sigma, dtype=torch.float64).diag() @ Q.mT


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_n_equal_singular_values_have_rank_n(measure, n):
    M = with_spectrum([3.0] * n)
    for matrix in (M, M.mT, 1e-30 * M, 1e200 * M, M.float()):
        assert measure(matrix) == pytest.approx(n, rel=1e-3 if n > 1 else 1e-2)
    assert measure(torch.eye(n)) == pytest.approx(n)


def test_two_unequal_singular_values_by_hand():
    M = with_spectrum([3.0, 1.0])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert rank.effective_rank(M) == pytest.approx(math.exp(entropy), rel=1e-5)
    assert rank.participation_ratio(M) == pytest.approx((9 + 1) ** 2 / (81 + 1))
    assert rank.stable_rank(M) == pytest.approx((9 + 1) / 9)


def test_the_docstrings_example():
    M = with_spectrum([1 / i for i in range(1, 101)], 100, 100)
    assert [round(measure(M), 1) for measure in MEASURES] == [39.7, 2.5, 1.6]


@pytest.mark.parametrize("shape", [(30, 200), (200, 30), (50, 50)], ids=str)
def test_singular_values_are_an_svds(shape):
    torch.manual_seed(0)
    M = torch.randn(shape)
    expected = torch.linalg.svdvals(M.double())
    assert torch.allclose(rank.singular_values(M), expected, rtol=1e-9)
    p = expected / expected.sum()
    assert rank.effective_rank(M) == pytest.approx(torch.exp(-(p * p.log()).sum()).item(), rel=1e-9)


@pytest.mark.parametrize("measure", MEASURES)
def test_rotation_and_scale_change_nothing(measure):
    torch.manual_seed(0)
    M = torch.randn(20, 30, dtype=torch.float64)
    P, Q = (torch.linalg.qr(torch.randn(k, k, dtype=torch.float64))[0] for k in (20, 30))
    assert measure(7 * P @ M @ Q) == pytest.approx(measure(M))


@pytest.mark.parametrize("measure", MEASURES)
def test_edges(measure):
    assert measure(torch.zeros(3, 4)) == 0
    assert measure(torch.ones(3, 4)) == pytest.approx(1, abs=1e-6)
    for bad in (torch.zeros(0, 4), torch.zeros(4), torch.zeros(2, 3, 4), torch.tensor([[1, math.nan]]),
                torch.tensor([[1, math.inf]])):
        with pytest.raises(ValueError):
            measure(bad)


def test_angle():
    a = torch.tensor([[1.0, 0.0]])
    assert rank.angle(a, torch.tensor([[0.0, 2.0]])) == pytest.approx(90)
    assert rank.angle(a, torch.tensor([[3.0, 3.0]])) == pytest.approx(45)
    assert rank.angle(a, 5 * a) == 0 and rank.angle(a, -a) == pytest.approx(180)
    assert math.isnan(rank.angle(a, 0 * a))
    with pytest.raises(ValueError):
        rank.angle(a, torch.ones(2))


def test_mean_cosine():
    rows = torch.tensor([[1.0, 0.0], [-2.0, 0.0], [0.0, 3.0]])
    assert rank.mean_cosine(rows) == pytest.approx((1 + 0 + 0) / 3)


# ---- cut and flatten ---------------------------------------------------------------------------------------

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
    result = rank.cut(M, r)
    assert torch.linalg.matrix_rank(result, rtol=1e-5) == min(r, *shape)
    assert torch.allclose(result.double(), nearest * (M.norm() / nearest.norm()), atol=1e-5)
    assert result.norm() == pytest.approx(M.norm().item(), rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_flatten_keeps_singular_vectors_and_norm_and_nothing_else(shape):
    M = made(*shape)
    P, _, Qt = torch.linalg.svd(M.double(), full_matrices=False)
    k = min(shape)
    assert torch.allclose(rank.flatten(M).double(), P @ Qt * (M.double().norm() / k ** 0.5), atol=1e-4)
    assert rank.effective_rank(rank.flatten(M)) == pytest.approx(k, rel=1e-4)


def test_flatten_is_muon_but_for_the_length():
    M = made(40, 90)
    orthogonal = muon.newton_schulz(M, steps=12, dtype=torch.float64)   # singular values within [0.68, 1.13]
    assert rank.angle(rank.flatten(M), orthogonal) < 12


@pytest.mark.parametrize("change", [rank.flatten, lambda u: rank.cut(u, 2)])
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
        kernels = torch.randn(6, 4, 3, 3).to(memory_format=layout)
        return torch.nn.Parameter(kernels), torch.nn.Parameter(torch.randn(5, 6))

    plain, changed = weights(), weights()
    for params in (plain, changed):
        for p in params:
            p.grad = torch.ones_like(p) + p.detach() ** 2
    was = [p.detach().clone() for p in plain]
    make(plain).step()
    with rank.updates(changed[:1], lambda u: rank.cut(u, 2)):
        make(changed).step()
    wanted = rank.cut((plain[0].detach() - was[0]).flatten(1), 2).view_as(was[0])
    assert torch.allclose(changed[0], was[0] + wanted, atol=1e-6)
    assert not torch.allclose(changed[0], plain[0], atol=1e-3)
    assert torch.equal(changed[1], plain[1])                    # only what was named
    assert changed[0].stride() == plain[0].stride()


# ---- alignment ---------------------------------------------------------------------------------------------

def test_alignment_is_the_angle_between_both_gradients_in_one_call():
    torch.manual_seed(0)
    model, x, labels = models.cnn(5, "batch", 4, size=8), torch.randn(6, 3, 8, 8), torch.arange(6) % 5
    model.insert = torch.nn.Dropout(0.5)
    handle = fa.attach(model, fa.FA())

    def loss():
        return torch.nn.functional.cross_entropy(model(model.insert(x)), labels)

    def gradients():
        torch.manual_seed(1)
        return dict(zip(handle.layers, torch.autograd.grad(
            loss(), [layer.weight for layer in handle.layers.values()])))

    ours = gradients()
    with handle.exact():
        exact = gradients()
    torch.manual_seed(1)
    angles = rank.alignment(handle, loss)
    assert angles == {name: rank.angle(ours[name], exact[name]) for name in handle.layers}
    assert angles["classifier"] == 0 and 45 < angles["layers.1"] < 135
    assert all(p.grad is None for p in model.parameters())
