"""Muon: momentum, then an orthogonalised update (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/).

The gradient of a weight matrix is a sum over samples of δ xᵀ. Its singular values fall off steeply: a few directions
take nearly all of the step and the others hardly learn. Under feedback alignment it is worse, as δ itself has a low
rank. Muon replaces the momentum matrix by its nearest orthogonal one, where every direction has the same weight:

    M ← μ M + (1 - μ) G                       momentum
    U = μ M + (1 - μ) G                       Nesterov: look one step ahead   (without it, U = M)
    O = orthogonalise(U)                      U = P Σ Qᵀ  ->  P Qᵀ, all singular values 1
    W ← (1 - η λ) W - η √max(1, out/in) O     η learning rate, λ weight decay

An SVD is slow on a GPU. Newton–Schulz needs matrix products only: with X₀ = U / ‖U‖_F, five times

    A = X Xᵀ,   X ← a X + (b A + c A²) X      (a, b, c) = (3.4445, -4.7750, 2.0315)

applies  p(σ) = aσ + bσ³ + cσ⁵  to every singular value and leaves the singular vectors alone. The surprising thing: these
coefficients do not converge to 1. They were chosen for the steepest slope at 0, so that small singular values grow fast
(3.4445 a step), and large ones then wander within about 0.7 to 1.2, which serves training just as well.

A convolution's weight (out, in, kh, kw) is the matrix (out, in·kh·kw), and out/in above is out/(in·kh·kw).
Only hidden weights belong to Muon: `split(model)` says which. `python muon.py` shows singular values becoming equal.

Left out: learning-rate schedules, distributed steps, and any norm other than the spectral one.
"""
from __future__ import annotations

import argparse
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

LARGE = 2 ** 20             # elements; of so large matrices a CPU's cache holds one at a time, so they are not stacked there
Layers: TypeAlias = str | nn.Module | Iterable[str | nn.Module]
COEFFICIENTS = (3.4445, -4.7750, 2.0315)    # Jordan et al. 2024; torch.optim.Muon has the same


def newton_schulz(matrices: Tensor, steps: int = 5, dtype: torch.dtype = torch.bfloat16, eps: float = 1e-7) -> Tensor:
    """Approximately orthogonalise each matrix:  P Σ Qᵀ  ->  P S Qᵀ,  S within about [0.7, 1.2] where σ was not tiny.

    matrices  (..., m, n), one matrix or a batch of them
    steps     iterations; a singular value below about ‖M‖_F / 3.4445^steps does not reach 1 (of a square random
              matrix the smallest one does not)
    dtype     of the iteration. bf16 is enough (a Gaussian matrix's result moves by 1 to 1.5 %), and fast where hardware has it
    eps       smallest Frobenius norm divided by, so that a zero matrix stays zero
    returns   (..., m, n) in `dtype`; NaN for a matrix that holds infinity or NaN, zero for one whose squared norm is beyond
              the range of float32 (of float64, if that is `dtype`)
    Raises ValueError for fewer than two dimensions.
    """
    if matrices.dim() < 2:
        raise ValueError(f"Newton–Schulz orthogonalises matrices; this tensor has shape {tuple(matrices.shape)}")
    a, b, c = COEFFICIENTS
    X = matrices.reshape(math.prod(matrices.shape[:-2]), *matrices.shape[-2:]).to(dtype)    # (k, m, n)
    tall = X.shape[1] > X.shape[2]
    if tall:
        X = X.mT                                                            # A is then the smaller Gram matrix
    multiply_add = torch.baddbmm
    if len(X) == 1 and _large(X[0]):
        X, multiply_add = X[0], torch.addmm                                 # (m, n)
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)               # σ₁ ≤ ‖X‖_F = 1: p's basin
    for _ in range(steps):
        A = _gram(X)                                                        # (k, m, m)
        P = multiply_add(A, A, A, beta=b, alpha=c)                          # b A + c A²
        X = multiply_add(X, P, X, beta=a)                                   # a X + (b A + c A²) X
    if tall:
        X = X.mT
    return X.reshape(matrices.shape)


def _large(matrix: Tensor) -> bool:
    return matrix.device.type == "cpu" and matrix.numel() > LARGE


def _gram(X: Tensor) -> Tensor:
    """X Xᵀ. It is symmetric, and of one large matrix a quarter is copied instead of computed; for small ones that is slower."""
    if X.dim() > 2:
        return X @ X.mT
    half, A = len(X) // 2, X.new_empty(len(X), len(X))
    upper, lower = X[:half], X[half:]
    A[:half, :half], A[half:, half:], A[half:, :half] = upper @ upper.mT, lower @ lower.mT, lower @ upper.mT
    A[:half, half:] = A[half:, :half].mT
    return A


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton–Schulz, for weights of two or more dimensions, the first being the output.

    params        hidden weights, such as the first of `split(model)`
    lr            η: the spectral norm of a step on a wide matrix, whatever the gradient's size, unless the momentum's norm is
                  below 1e-7, which makes the step shorter; a number, or a tensor on the weights' device, as a CUDA graph
                  needs it
    momentum      μ in [0, 1)
    nesterov      look ahead by one more momentum step
    weight_decay  λ, decoupled: the weights shrink by ηλ a step
    steps, dtype  of `newton_schulz`
    divide        in a data-parallel training, where all processes have the same gradients, each orthogonalises its share of
                  the matrices and gets the others' from the other processes

    Step for step what torch.optim.Muon (2.9 and later, adjust_lr_fn="original") does to a matrix; that one refuses
    convolutions and takes one matrix at a time, this one stacks equal shapes. `p.grad` is never written to.
    Raises ValueError for a hyperparameter out of range, and for a parameter that is complex, has fewer than two dimensions or
    no element, or is given twice.
    """

    def __init__(self, params: Iterable, lr: float = 0.02, momentum: float = 0.95, nesterov: bool = True,
                 weight_decay: float = 0.0, steps: int = 5, dtype: torch.dtype = torch.bfloat16, divide: bool = False):
        if not isinstance(lr, Tensor) and not 0 <= lr < math.inf or not 0 <= weight_decay < math.inf:
            raise ValueError(f"lr and weight_decay must be finite and at least 0, not {lr} and {weight_decay}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), not {momentum}")
        self.divide = divide
        super().__init__(params, dict(lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay,
                                      steps=steps, dtype=dtype))

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        added = self.param_groups[-1]["params"]
        if len(set(added)) < len(added):
            raise ValueError("Muon was given a parameter more than once, and would step it as often")
        for p in added:
            if p.is_complex():
                raise ValueError(f"Muon orthogonalises real matrices, not complex ones such as that of shape {tuple(p.shape)}")
            if p.dim() < 2 or p.numel() == 0:
                raise ValueError(f"Muon orthogonalises matrices; a parameter of shape {tuple(p.shape)} belongs to "
                                 "another optimiser (see muon.split)")

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update of every parameter that has a gradient. Returns the closure's loss, as torch's optimisers do."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            updates = self._momentum(params, group)
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            orthogonal: dict[int, Tensor] = {}                              # index of the parameter -> O
            for stack in _stacks(params, self._share(params)):              # one batched product for all of a shape
                rows = [updates[i].to(group["dtype"]).flatten(1) for i in stack]
                U = torch.stack(rows) if len(rows) > 1 else rows[0][None]   # (k, out, in·kh·kw)
                orthogonal.update(zip(stack, newton_schulz(U, group["steps"], group["dtype"]).to(params[stack[0]].dtype)))
            if self.divide:
                _exchange(params, orthogonal)
            for stack in _stacks(params, range(len(params))):
                out, fan_in = _flat(params[stack[0]])
                step = [orthogonal[i].view(params[i].shape) for i in stack]
                alpha = -group["lr"] * math.sqrt(max(1, out / fan_in))
                if isinstance(alpha, Tensor):
                    step, alpha = torch._foreach_mul(step, alpha), 1
                torch._foreach_add_([params[i] for i in stack], step, alpha=alpha)
        return loss

    def _share(self, params: list[Tensor]) -> list[int]:
        """Which parameters this process orthogonalises: all of them, or with `divide` about as much work as the others."""
        if not self.divide:
            return list(range(len(params)))
        work = [p.numel() * min(len(p), p.numel() // len(p)) for p in params]
        loads, mine = [0] * dist.get_world_size(), []
        for i in sorted(range(len(params)), key=lambda i: -work[i]):        # the largest first, to whom has the least
            k = loads.index(min(loads))
            loads[k] += work[i]
            if k == dist.get_rank():
                mine.append(i)
        return sorted(mine)

    def _momentum(self, params: list[Tensor], group: dict) -> list[Tensor]:
        """Advance M and return U, shaped like the parameters."""
        grads = [p.grad for p in params]
        for p in params:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        momenta = [self.state[p]["momentum"] for p in params]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])         # M ← M + (1 - μ)(G - M)
        return list(torch._foreach_lerp(grads, momenta, group["momentum"])) if group["nesterov"] else momenta


def _flat(weight: Tensor) -> tuple[int, int]:
    """Shape of the matrix: (out, in·kh·kw)."""
    return len(weight), weight.numel() // len(weight)


def _stacks(params: list[Tensor], indices: Iterable[int]) -> list[list[int]]:
    """The indices, those of parameters of the same flattened shape together, but for large ones on a CPU."""
    stacks = defaultdict(list)
    for i in indices:
        p = params[i]
        stacks[_flat(p) + (p.dtype, p.device, i if _large(p) else None)].append(i)
    return list(stacks.values())


def _exchange(params: list[Tensor], orthogonal: dict[int, Tensor]) -> None:
    """Every process has some of the orthogonal matrices; afterwards every process has all."""
    flat = torch.cat([orthogonal[i].flatten() if i in orthogonal else p.new_zeros(p.numel()) for i, p in enumerate(params)])
    dist.all_reduce(flat)
    orthogonal.update(enumerate(flat.split([p.numel() for p in params])))


def split(model: nn.Module, stem: Layers | None = None,
          classifier: Layers | None = None) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(hidden, others): the parameters for Muon, and those for another optimiser. Each trainable one is in exactly one.

    Hidden are the weights of every Linear and Conv2d but the stem, whose input is the data, and the classifier, whose output
    is the classes; for those two, as for gains and biases, "every direction counts the same" is not what is wanted (Jordan
    et al. 2024). They are taken to be the first and the last that the model registered: the order of the assignments in its
    __init__, which need not be that of its forward. Where it is not, name them, by layer or by name, one or several. A
    weight that two layers share is listed once, and not at all if one of them is the stem or the classifier. A second
    parameter of the weight's shape, such as feedback that learns (fa.py), goes where the weight goes.

    Raises ValueError for a stem or classifier that is no Linear or Conv2d of the model.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    ends = [*_chosen(layers, stem, first=0), *_chosen(layers, classifier, first=-1)]
    apart = {id(p) for layer in ends for p in layer.parameters(recurse=False)}
    hidden = {id(p): p for layer in layers.values() for p in layer.parameters(recurse=False)
              if p.requires_grad and p.shape == layer.weight.shape and id(p) not in apart}
    return list(hidden.values()), [p for p in model.parameters() if p.requires_grad and id(p) not in hidden]


def _chosen(layers: dict[str, nn.Module], chosen: Layers | None, first: int) -> list[nn.Module]:
    if chosen is None:
        return list(layers.values())[first:][:1]
    named = [chosen] if isinstance(chosen, str | nn.Module) or not isinstance(chosen, Iterable) else list(chosen)
    found = [layers.get(c) if isinstance(c, str) else c for c in named]
    if any(layer not in list(layers.values()) for layer in found):
        raise ValueError(f"{named} are not all layers of the model, which has {', '.join(layers)}")
    return found


# ---- a demonstration -------------------------------------------------------------------------------------------

def demonstrate(out: Path | None = None) -> None:
    """A matrix with the steep spectrum of a gradient, before and after Newton–Schulz."""
    torch.manual_seed(0)
    P, Q = torch.linalg.qr(torch.randn(64, 64))[0], torch.linalg.qr(torch.randn(256, 64))[0]
    sigma = torch.logspace(0, -3, 64)                                       # 1 down to 0.001
    X = P @ sigma.diag() @ Q.mT
    print("singular values of a 64 x 256 matrix, by rank")
    print("steps        1st     16th     32nd     48th     64th")
    for steps in range(8):
        sv = torch.linalg.svdvals(newton_schulz(X, steps, torch.float32))
        print(f"{steps:5}   " + "".join(f"{sv[i].item():9.4f}" for i in (0, 15, 31, 47, 63)))
    bf16, f32 = newton_schulz(X).float(), newton_schulz(X, dtype=torch.float32)
    print(f"bf16 and float32 differ by {((bf16 - f32).norm() / f32.norm()).item():.1%} after 5 steps")
    print(f"angle to the exact P Qᵀ: {_angle(X, P @ Q.mT):.0f}° before, {_angle(f32, P @ Q.mT):.0f}° after 5 steps")
    if out:
        _draw(out, X)
        print(out)


def _angle(a: Tensor, b: Tensor) -> float:
    return float(nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).arccos().rad2deg())


def _draw(out: Path, X: Tensor) -> None:
    os.environ["MPLBACKEND"] = "Agg"                            # a notebook's backend may stop the import
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    a, b, c = COEFFICIENTS
    start = sigma = torch.linspace(0, 1, 2001, dtype=torch.float64)
    for steps, colour in enumerate(("#999999", "#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#0072B2")):
        if steps:
            sigma = a * sigma + b * sigma ** 3 + c * sigma ** 5
        if steps in (0, 1, 2, 5):
            name = f"{steps} step{'s' * (steps != 1)}"
            left.plot(start, sigma, color=colour, linewidth=2, label=name)
            values = torch.linalg.svdvals(newton_schulz(X, steps, torch.float32))
            right.plot(range(1, len(values) + 1), values, color=colour, linewidth=2, label=name)
    left.axhline(1, color="#999999", linewidth=1, linestyle=":")
    left.set(title="p(σ) = 3.4445 σ - 4.7750 σ³ + 2.0315 σ⁵, repeated", xlabel="singular value before", ylabel="after",
             ylim=(0, 1.35))
    right.set(title="singular values of a 64 × 256 matrix, largest first", xlabel="i", ylabel="σ_i", ylim=(0, 1.35))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(out, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="muon.py", description=demonstrate.__doc__)
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="save a picture too")
    out = parser.parse_args().out
    try:
        demonstrate(out)
    except (OSError, ValueError, ImportError) as e:             # a folder, a format, a matplotlib that is not there
        reason = str(getattr(e, "strerror", None) or e).split()
        parser.exit(2, f"{parser.prog}: --out {out}: {' '.join(reason)}\n")


if __name__ == "__main__":
    main()
