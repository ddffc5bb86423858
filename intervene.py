"""Is it the rank? Change the singular values of a training run's updates, and see what becomes of its accuracy.

That feedback alignment has updates of low rank and a low accuracy does not show that the one causes the other. An
intervention can: with the update of a weight matrix that an optimiser is about to apply

    ΔW = Σ_i σ_i p_i q_iᵀ        σ₁ ≥ σ₂ ≥ …, Frobenius norm √Σσ²

two changes are made to its singular values, and neither to its singular vectors nor to its norm:

    cut        σ_i ← c σ_i  for i ≤ r,  0 for i > r       low rank forced upon backprop: is it hurt?
    flatten    σ_i ← c      for all i                     full rank forced upon feedback alignment: is it helped?

with c such that the norm stays. Both work on the update really applied, momentum and weight decay included, of any
optimiser. The surprising thing: flattening is what Muon does, up to the step's length: Muon's is the same in every step,
here it is still the gradient that decides how far to go.

    python train.py --rule bp --cut 4                   # backprop with updates of rank 4
    python train.py --rule fa --flatten                 # feedback alignment with updates of full rank

`python intervene.py` shows one update's singular values before and after.
"""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor


def cut(update: Tensor, r: int) -> Tensor:
    """Keep the `r` largest singular values of an (m, n) matrix, scaled so that the Frobenius norm stays; r ≥ 1."""
    return reshape(update, lambda sigma: torch.where(torch.arange(len(sigma), device=sigma.device) < r, sigma, 0))


def flatten(update: Tensor) -> Tensor:
    """Make the singular values of an (m, n) matrix equal, with the Frobenius norm as it was.

    Also those that are zero but for rounding: their singular vectors are then arbitrary, and full rank is what is asked for.
    """
    return reshape(update, torch.ones_like)


def reshape(update: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """P Σ Qᵀ -> c P change(Σ) Qᵀ, where c keeps the Frobenius norm. A zero or non-finite update is returned as it is."""
    norm = update.norm()
    if norm == 0 or not norm.isfinite():
        return update
    P, sigma, Qt = torch.linalg.svd(update, full_matrices=False)
    sigma = change(sigma)
    return P * (sigma * (norm / sigma.norm())) @ Qt


@contextlib.contextmanager
def updates(weights: Iterable[Tensor], change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Put this around optimiser.step(): each weight's update, flattened to (out, in·kh·kw), is replaced by change(update)."""
    weights = [w.detach() for w in weights]             # shares memory with the parameter
    before = [w.clone() for w in weights]
    yield
    for w, was in zip(weights, before):
        w.copy_(was + change((w - was).flatten(1)).view(w.shape))


def demonstrate() -> None:
    torch.manual_seed(0)
    update = torch.randn(64, 256) @ torch.logspace(0, -3, 256).diag()
    update /= update.norm()
    print("singular values of a 64 x 256 update of norm 1, by rank")
    print("                 1st      4th      8th     32nd     64th     norm")
    for name, matrix in {"as it was": update, "cut to 4": cut(update, 4), "flattened": flatten(update)}.items():
        sigma = torch.linalg.svdvals(matrix)
        print(f"{name:10}" + "".join(f"{sigma[i - 1].item():9.5f}" for i in (1, 4, 8, 32, 64)) + f"{matrix.norm().item():9.5f}")


if __name__ == "__main__":
    demonstrate()
