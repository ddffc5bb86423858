"""What an orthogonalisation by matrix products owes. Checks the course's solution, or yours:

    python -m pytest tests/test_orthogonal_contract.py --rule my_file.py:orthogonalise
"""
import pytest
import torch

from harness import rulefile

DEFAULT = ["tests/solutions/newton_schulz.py:orthogonalise"]
load = rulefile.find                                            # what --rule names here is a function


def expect(condition, message):
    if not condition:
        pytest.fail(message, pytrace=False)


def matrix(m, n, sigma, dtype=torch.float64):
    """P Σ Qᵀ with these singular values, and P Qᵀ."""
    generator = torch.Generator().manual_seed(m + n)
    P, Q = (torch.linalg.qr(torch.randn(size, len(sigma), generator=generator, dtype=torch.float64))[0]
            for size in (m, n))
    return (P * torch.tensor(sigma, dtype=torch.float64) @ Q.mT).to(dtype), (P @ Q.mT).to(dtype)


SHAPES = {"square": (8, 8), "tall": (20, 6), "wide": (6, 20)}
SIGMA = [1.0, 0.8, 0.5, 0.3, 0.1, 0.05]


def test_shape(submitted):
    """returns a new matrix of the same shape and dtype, and leaves the one that it was given as it was"""
    for dtype in (torch.float32, torch.float64):
        M, _ = matrix(20, 6, SIGMA, dtype)
        before = M.clone()
        got = submitted(M)
        expect(isinstance(got, torch.Tensor) and got.shape == M.shape and got.dtype == dtype,
               f"given {tuple(M.shape)} and {dtype}, it returned "
               f"{(tuple(got.shape), got.dtype) if isinstance(got, torch.Tensor) else got!r:.80}")
        expect(torch.equal(M, before) and got is not M, "it changed the matrix that it was given")


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values(submitted, shape):
    """makes every singular value one"""
    M, _ = matrix(*SHAPES[shape], SIGMA)
    got = submitted(M)
    expect(got.isfinite().all(), f"of a {shape} matrix, it returned NaN or infinity: did the iteration begin "
           "with singular values below √3?")
    sigma = torch.linalg.svdvals(got)[:len(SIGMA)]
    expect((sigma - 1).abs().max() < 0.01, f"of a {shape} matrix, the singular values are between "
           f"{sigma.min():.2g} and {sigma.max():.2g}, where all should be 1 to 0.01")


def test_singular_vectors(submitted):
    """keeps the singular vectors: P Σ Qᵀ becomes P Qᵀ"""
    M, PQ = matrix(20, 6, SIGMA)
    got = submitted(M)
    distance = ((got - PQ).norm() / PQ.norm()).item()
    expect(distance < 0.01, f"it is {distance:.2g} away from P Qᵀ, relative to its norm; expected below 0.01")


def test_scale(submitted):
    """gives the same whatever the matrix's size, from 1e-6 to 1e6 times as large"""
    M, _ = matrix(6, 20, SIGMA)
    plain = submitted(M)
    for scale in (1e-6, 1e6):
        got = submitted(scale * M)
        expect(torch.allclose(got, plain, atol=1e-6),
               f"of a matrix {scale:g} times as large it makes another one: divide by the norm first")


def test_rank(submitted):
    """leaves a singular value of zero at zero"""
    M, PQ = matrix(8, 8, [1.0, 0.4])
    sigma = torch.linalg.svdvals(submitted(M))
    expect((sigma[:2] - 1).abs().max() < 0.01 and sigma[2] < 0.01,
           f"of a matrix of rank 2 it makes singular values {[round(s, 3) for s in sigma.tolist()[:4]]}, ...")


def test_zero(submitted):
    """leaves a zero matrix zero"""
    got = submitted(torch.zeros(4, 3))
    expect(got.isfinite().all() and not got.any(), "a matrix of zeros became something else: is there a "
           "division by its norm, which is zero?")
