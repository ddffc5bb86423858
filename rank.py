"""How many directions does a matrix really use? Three measures of rank that noise does not fool.

The rank of a matrix counts the singular values σ₁ ≥ σ₂ ≥ … that are not zero. In floating point none is, so a measure must
weigh them. With p_i = σ_i / Σσ, the share of direction i:

    effective rank         exp(-Σ p_i log p_i)      Roy & Vetterli 2007: the exponential of the entropy of the shares
    participation ratio    (Σ σ²)² / Σ σ⁴           counts energy, so it is ruled by the few largest directions
    stable rank            ‖M‖_F² / σ₁² = Σ σ² / σ₁²

All lie between 1 and min(m, n), are n for n equal singular values, do not change when M is scaled or rotated, and are
defined as 0 for a zero matrix. The literature mixes up their names: look at the formula. The surprising thing is how far they
differ: of 100 singular values falling as 1/i, the effective rank is 40, the participation ratio 2.5, the stable rank 1.6.

Boeshertz, Pascanu & Clopath (2026) find that feedback alignment's signal has a low effective rank. What is measured:

    error δ      (N, C·H·W), a row per image. At most N
    gradient     (out, in·kh·kw), a layer's weight gradient. At most min(out, in·kh·kw)
    trajectory   (steps, weights), a row per gradient of successive steps. At most the number of steps

The singular values come from a Gram matrix of the smaller side in float64 (σ² are its eigenvalues): for 512 × 4608 that is
four times faster than an SVD, and float64 keeps what squaring loses. `python rank.py` measures some known matrices.
"""
from __future__ import annotations

import torch
from torch import Tensor


def singular_values(matrix: Tensor) -> Tensor:
    """σ of an (m, n) matrix, float64 (min(m, n),), largest first. Below about 1e-8 σ₁ they are rounding.

    Raises ValueError unless the matrix has two dimensions, is not empty and is finite.
    """
    if matrix.dim() != 2 or matrix.numel() == 0:
        raise ValueError(f"rank is measured of a non-empty matrix, not of shape {tuple(matrix.shape)}")
    M = matrix.detach().double()
    largest = M.abs().max()
    if not largest.isfinite():
        raise ValueError("the matrix holds infinite or NaN values, so it has no rank")
    if largest > 0:
        M = M / largest                                         # σ² must neither overflow nor vanish
    if M.shape[0] > M.shape[1]:
        M = M.mT
    eigenvalues = torch.linalg.eigvalsh(M @ M.mT)               # ascending; rounding may make a zero negative
    return eigenvalues.clamp(min=0).sqrt().flip(0) * largest


def effective_rank(matrix: Tensor) -> float:
    """exp(-Σ p log p), p = σ/Σσ, of an (m, n) matrix: 1 to min(m, n); 0 for a zero matrix (Roy & Vetterli 2007)."""
    sigma = singular_values(matrix)
    if sigma[0] == 0:
        return 0.0
    p = sigma / sigma.sum()
    return torch.exp(-torch.special.xlogy(p, p).sum()).item()   # xlogy: 0 log 0 = 0


def participation_ratio(matrix: Tensor) -> float:
    """(Σσ²)² / Σσ⁴ of an (m, n) matrix: 1 to min(m, n); 0 for a zero matrix."""
    sigma = singular_values(matrix)
    if sigma[0] == 0:
        return 0.0
    energy = (sigma / sigma[0]).square()
    return (energy.sum().square() / energy.square().sum()).item()


def stable_rank(matrix: Tensor) -> float:
    """‖M‖_F² / σ₁² of an (m, n) matrix: 1 to min(m, n); 0 for a zero matrix."""
    sigma = singular_values(matrix)
    return (sigma / sigma[0]).square().sum().item() if sigma[0] > 0 else 0.0


def angle(a: Tensor, b: Tensor) -> float:
    """Angle between two tensors of one shape, taken as vectors, in degrees: 0 same direction, 90 unrelated, 180 opposite.

    NaN where one of them is zero. Raises ValueError if the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"no angle between shapes {tuple(a.shape)} and {tuple(b.shape)}")
    a, b = (v.detach().flatten().double() for v in (a, b))
    a, b = a / a.norm(), b / b.norm()
    return (2 * torch.atan2((a - b).norm(), (a + b).norm())).rad2deg().item()   # exact near 0 and 180, unlike arccos


def demonstrate() -> None:
    """Matrices whose rank is known, and what the measures say."""
    torch.manual_seed(0)
    P, Q = torch.linalg.qr(torch.randn(100, 100))[0], torch.linalg.qr(torch.randn(300, 100))[0]
    low = torch.randn(100, 5) @ torch.randn(5, 300)
    examples = {"100 equal singular values": P @ Q.mT,
                "σ_i = 1/i": P @ (1 / torch.arange(1, 101)).diag() @ Q.mT,
                "σ_i = 0.9^i": P @ (0.9 ** torch.arange(100)).diag() @ Q.mT,
                "Gaussian": torch.randn(100, 300),
                "product of 100×5 and 5×300": low,
                "the same plus 1 % noise": low + 0.01 * low.std() * torch.randn(100, 300),
                "one row repeated": torch.randn(1, 300).expand(100, 300)}
    print(f"{'matrix, 100 × 300':28}{'rank':>6}{'effective':>11}{'participation':>15}{'stable':>8}")
    for name, M in examples.items():
        exact = torch.linalg.matrix_rank(M.double()).item()
        print(f"{name:28}{exact:6}{effective_rank(M):11.1f}{participation_ratio(M):15.1f}{stable_rank(M):8.1f}")


if __name__ == "__main__":
    demonstrate()
