"""How many directions does a matrix really use? Three measures of rank, and two ways to change it.

The rank of a matrix counts the singular values σ₁ ≥ σ₂ ≥ … that are not zero. In floating point none is, so a
measure must weigh them. With p_i = σ_i / Σσ, the share of direction i:

    effective rank        exp(-Σ p_i log p_i)    Roy & Vetterli 2007: the exponential of the shares' entropy
    participation ratio   (Σ σ²)² / Σ σ⁴         counts energy, so it is ruled by the few largest directions
    stable rank           ‖M‖_F² / σ₁² = Σ σ² / σ₁²

All lie between 1 and min(m, n), are n for n equal singular values, do not change when M is scaled or rotated,
and are defined as 0 for a zero matrix. The literature mixes up their names: look at the formula. The
surprising thing is how far they differ: of 100 singular values falling as 1/i, the effective rank is 40, the
participation ratio 2.5, the stable rank 1.6.

Boeshertz, Pascanu & Clopath (2026) find that feedback alignment's signal has a low effective rank. What is
measured:

    error δ      (N, C·H·W), a row per image. At most N
    gradient     (out, in·kh·kw), a layer's weight gradient. At most min(out, in·kh·kw)
    trajectory   (steps, weights), a row per step, its gradient. At most the number of steps

The singular values come from a Gram matrix of the smaller side in float64 (σ² are its eigenvalues): for 512 ×
4608 that is several times faster than an SVD, and float64 makes up for the squaring.

That feedback alignment has updates of low rank and a low accuracy does not show that the one causes the
other. An intervention can. Write the update that an optimiser is about to apply as  ΔW = Σ_i σ_i u_i v_iᵀ.
Each of two changes alters its singular values, but neither its singular vectors nor its norm √Σσ²:

    cut        σ_i ← c σ_i  for i ≤ r,  0 for i > r     low rank forced upon backprop: is it hurt?
    flatten    σ_i ← c      for all i                   full rank forced upon FA: is it helped?

with c such that the norm stays the same. Both work on the update really applied, momentum and weight decay
included, of any optimiser. Flattening is what Muon does, up to the step's length: Muon's is the same in every
step, here it is still the gradient that decides how far to go.

    python rank.py                                              # some known matrices, one cut and flattened
    python train.py --rule bp --cut 4                           # backprop with updates of rank 4
    python train.py --rule fa --flatten                         # feedback alignment with updates of full rank
    python train.py --muon --norm --rank                        # record the measures into the run's folder
    python rank.py RUN [RUN ...] --out rank.png                 # draw recorded runs side by side
"""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


# ---- measures ----------------------------------------------------------------------------------------------

def singular_values(matrix: Tensor) -> Tensor:
    """σ of an (m, n) matrix, float64 (min(m, n),), largest first. Below about 1e-8 σ₁ they are rounding.

    Raises ValueError unless the matrix has two dimensions, is not empty and is finite, as must be σ₁.
    """
    if matrix.dim() != 2 or matrix.numel() == 0:
        raise ValueError(f"rank needs a non-empty matrix, not one of shape {tuple(matrix.shape)}")
    M = matrix.detach().double()
    largest = M.abs().max()
    if not largest.isfinite():
        raise ValueError("the matrix holds infinite or NaN values, so it has no rank")
    if largest > 0:
        M = M / largest                                         # σ² must neither overflow nor vanish
    if M.shape[0] > M.shape[1]:
        M = M.mT
    eigenvalues = torch.linalg.eigvalsh(M @ M.mT)               # ascending; rounding may make a zero negative
    sigma = eigenvalues.clamp(min=0).sqrt().flip(0) * largest
    if sigma[0].isinf():
        raise ValueError("the matrix is too large: its singular values are beyond the range of float64")
    return sigma


def effective_rank(matrix: Tensor) -> float:
    """exp(-Σ p log p), p = σ/Σσ, of an (m, n) matrix: 1 to min(m, n); 0 for a zero matrix."""
    return measures(singular_values(matrix))["effective_rank"]


def participation_ratio(matrix: Tensor) -> float:
    """(Σσ²)² / Σσ⁴ of an (m, n) matrix: 1 to min(m, n); 0 for a zero matrix."""
    return measures(singular_values(matrix))["participation_ratio"]


def stable_rank(matrix: Tensor) -> float:
    """‖M‖_F² / σ₁² of an (m, n) matrix: 1 to min(m, n); 0 for a zero matrix."""
    return measures(singular_values(matrix))["stable_rank"]


def measures(sigma: Tensor) -> dict[str, float]:
    """All three, from singular values that are known already, largest first."""
    if sigma[0] == 0:
        return {"effective_rank": 0.0, "participation_ratio": 0.0, "stable_rank": 0.0}
    p, energy = sigma / sigma.sum(), (sigma / sigma[0]).square()
    return {"effective_rank": torch.exp(-torch.special.xlogy(p, p).sum()).item(),       # xlogy: 0 log 0 = 0
            "participation_ratio": (energy.sum().square() / energy.square().sum()).item(),
            "stable_rank": energy.sum().item()}


def angle(a: Tensor, b: Tensor) -> float:
    """Angle in degrees between two tensors of one shape, taken as vectors.

    0 means the same direction, 90 unrelated ones, 180 opposite ones.
    NaN where one of them is zero. Raises ValueError if the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"no angle between shapes {tuple(a.shape)} and {tuple(b.shape)}")
    a, b = (v.detach().flatten().double() for v in (a, b))
    a, b = a / a.norm(), b / b.norm()
    half = torch.atan2((a - b).norm(), (a + b).norm())          # exact near 0 and 180, unlike arccos
    return 2 * half.rad2deg().item()


def alignment(handle: Any, loss: Callable[[], Tensor]) -> dict[str, float]:
    """Angle in degrees between the rule's gradient of each weight and backprop's, by the layer's name.

    handle  what fa.attach returned
    loss    () -> scalar: the forward pass and the loss, run twice with the same random numbers. For a rule
            that needs targets, set handle.rule.targets in it: before_step has cleared them

    Call it after before_step, with the handle of the whole model, as exact() reaches no further. NaN where
    one of the gradients is zero; a weight that requires none is left out. No .grad changes, but batch norm's
    running averages see both passes; put the model into eval() where that matters.
    """
    found, gpus = [], {p.device for layer in handle.layers.values() for p in layer.parameters() if p.is_cuda}
    for way in contextlib.nullcontext, handle.exact:
        # Cached, as a computed weight (weight_norm) would be another tensor each time one looks at it.
        with torch.enable_grad(), torch.random.fork_rng([*gpus]), way(), nn.utils.parametrize.cached():
            value = loss()
            weights = {name: layer.weight for name, layer in handle.layers.items()
                       if layer.weight.requires_grad}
            found.append(weights and torch.autograd.grad(value, [*weights.values()], allow_unused=True,
                                                         materialize_grads=True))
    return {name: angle(a, b) for name, a, b in zip(weights, *found)}


def mean_cosine(rows: Tensor) -> float:
    """Mean |cos| between different rows of (N, n): 0 if all are orthogonal, 1 if all lie on one line.

    Zero rows count 0.
    """
    unit = F.normalize(rows.detach().double(), dim=1, eps=1e-300)
    n = len(rows)
    cosines = (unit @ unit.mT).abs()
    return ((cosines.sum() - cosines.diagonal().sum()) / (n * (n - 1))).item()


# ---- interventions -----------------------------------------------------------------------------------------

def cut(update: Tensor, r: int) -> Tensor:
    """Keep the `r` largest singular values of an (m, n) matrix, scaled so that its norm stays; r ≥ 1."""
    def change(sigma: Tensor) -> Tensor:
        return torch.where(torch.arange(len(sigma), device=sigma.device) < r, sigma, 0)

    return reshape(update, change)


def flatten(update: Tensor) -> Tensor:
    """Make the singular values of an (m, n) matrix equal, with the Frobenius norm as it was.

    Also those that are zero but for rounding: their singular vectors are then arbitrary, and full rank is
    what is asked for.
    """
    return reshape(update, torch.ones_like)


def reshape(update: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """U diag(σ) Vᵀ -> c U diag(change(σ)) Vᵀ; c keeps the norm. What is zero or not finite stays."""
    norm = update.norm()
    if norm == 0 or not norm.isfinite():
        return update
    U, sigma, Vt = torch.linalg.svd(update, full_matrices=False)
    sigma = change(sigma)
    return U * (sigma * (norm / sigma.norm())) @ Vt


@contextlib.contextmanager
def updates(weights: Iterable[Tensor], change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Put this around optimiser.step(): change(update) then replaces each update (out, in·kh·kw)."""
    weights = [w.detach() for w in weights]             # shares memory with the parameter
    before = [w.clone() for w in weights]
    yield
    for w, was in zip(weights, before):
        w.copy_(was + change((w - was).flatten(1)).view(w.shape))


if __name__ == "__main__":
    from harness import lessons
    lessons.main("rank")
