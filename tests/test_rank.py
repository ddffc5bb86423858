"""rank.py against matrices whose answer is known by hand, and an SVD."""
import math

import pytest
import torch

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
    assert rank.effective_rank(M) == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))), rel=1e-5)
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
