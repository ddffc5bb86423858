"""Muon: momentum, then an orthogonalised update.

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/

The gradient of a weight matrix is a sum over samples of δ xᵀ. Its singular values fall off steeply: a few
directions take nearly all of the step and the others hardly learn. Under feedback alignment it is worse, as δ
itself has a low rank. Muon replaces the momentum matrix by its nearest orthogonal one, where every direction
has the same weight:

    M ← μ M + (1 - μ) G                       momentum
    U = μ M + (1 - μ) G                       Nesterov: look one step ahead   (without it, U = M)
    O = orthogonalise(U)                      U = P Σ Qᵀ  ->  P Qᵀ, all singular values 1
    W ← (1 - η λ) W - η √max(1, out/in) O     η learning rate, λ weight decay

An SVD is slow on a GPU. Newton–Schulz needs matrix products only: with X₀ = U / ‖U‖_F, five times

    A = X Xᵀ,   X ← a X + (b A + c A²) X      (a, b, c) = (3.4445, -4.7750, 2.0315)

applies  p(σ) = aσ + bσ³ + cσ⁵  to every singular value and leaves the singular vectors alone. The surprising
thing: the iteration does not converge to 1. Its coefficients were chosen for the steepest slope at 0, so that
small singular values grow fast (3.4445 a step), and large ones then wander within about 0.7 to 1.2, which
serves training just as well.

A convolution's weight (out, in, kh, kw) is the matrix (out, in·kh·kw), and out/in above is out/(in·kh·kw).
Only hidden weights belong to Muon: `split(model)` says which. `python muon.py` shows singular values becoming
equal.

Left out: learning-rate schedules, and any norm other than the spectral one.
"""
from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Layers: TypeAlias = str | nn.Module | Iterable[str | nn.Module]
COEFFICIENTS = (3.4445, -4.7750, 2.0315)    # Jordan et al. 2024; torch.optim.Muon has the same


def newton_schulz(matrices: Tensor, steps: int = 5, dtype: torch.dtype = torch.bfloat16,
                  eps: float = 1e-7) -> Tensor:
    """Approximately orthogonalise each matrix:  P Σ Qᵀ  ->  P S Qᵀ,  S in about [0.7, 1.2] for σ not tiny.

    matrices  (..., m, n), one matrix or a batch of them
    steps     iterations; a singular value below about ‖M‖_F / 3.4445^steps does not reach 1 (the smallest one
              of a square random matrix does not)
    dtype     of the iteration. bf16 is enough (a Gaussian matrix's result moves by 1 to 1.5 %), and fast
              where the hardware has it
    eps       smallest Frobenius norm divided by, so that a zero matrix stays zero
    returns   (..., m, n) in `dtype`; NaN for a matrix that holds infinity or NaN, zero for one whose squared
              norm is beyond the range of float32 (of float64, if that is `dtype`)
    Raises ValueError for fewer than two dimensions.
    """
    if matrices.dim() < 2:
        raise ValueError("Newton–Schulz orthogonalises matrices; this tensor has shape "
                         f"{tuple(matrices.shape)}")
    a, b, c = COEFFICIENTS
    X, multiply_add = matrices.to(dtype), torch.addmm                   # (m, n)
    if X.dim() > 2:
        X, multiply_add = X.flatten(0, -3), torch.baddbmm               # (k, m, n), each by itself
    tall = X.shape[-2] > X.shape[-1]
    if tall:
        X = X.mT                                                        # A is then the smaller Gram matrix
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)           # σ₁ ≤ ‖X‖_F = 1: p's basin
    for _ in range(steps):
        A = X @ X.mT
        B = multiply_add(A, A, A, beta=b, alpha=c)                      # b A + c A²
        X = multiply_add(X, B, X, beta=a)                               # a X + (b A + c A²) X
    if tall:
        X = X.mT
    return X.reshape(matrices.shape)


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton–Schulz, for weights of two or more dimensions, the output first.

    params        hidden weights, such as the first of `split(model)`
    lr            η: the spectral norm of a step on a wide matrix, whatever the gradient's size, unless the
                  momentum's norm is below 1e-7, which makes the step shorter; a number, or a tensor on the
                  weights' device, as a CUDA graph needs it
    momentum      μ in [0, 1)
    nesterov      look ahead by one more momentum step
    weight_decay  λ, decoupled: the weights shrink by ηλ a step
    steps, dtype  of `newton_schulz`

    Step for step what torch.optim.Muon (2.9 and later, adjust_lr_fn="original") does to a matrix; that one
    refuses convolutions and, on a GPU too, takes one matrix at a time. `p.grad` is never written to. Raises
    ValueError for a hyperparameter out of range, and for a parameter that is complex, has fewer than two
    dimensions or no element, or is given twice.
    """

    def __init__(self, params: Iterable, lr: float = 0.02, momentum: float = 0.95, nesterov: bool = True,
                 weight_decay: float = 0.0, steps: int = 5, dtype: torch.dtype = torch.bfloat16):
        super().__init__(params, dict(lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay,
                                      steps=steps, dtype=dtype))

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        lr, momentum, weight_decay = group["lr"], group["momentum"], group["weight_decay"]
        if not isinstance(lr, Tensor) and not 0 <= lr < math.inf or not 0 <= weight_decay < math.inf:
            raise ValueError("lr and weight_decay must be finite and at least 0, "
                             f"not {lr} and {weight_decay}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), not {momentum}")
        added = group["params"]
        if len(set(added)) < len(added):
            raise ValueError("Muon was given a parameter more than once, and would step it as often")
        for p in added:
            if p.is_complex():
                raise ValueError("Muon orthogonalises real matrices, not complex ones such as that of shape "
                                 f"{tuple(p.shape)}")
            if p.dim() < 2 or p.numel() == 0:
                raise ValueError(f"Muon orthogonalises matrices; a parameter of shape {tuple(p.shape)} "
                                 "belongs to another optimiser (see muon.split)")

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Update every parameter that has a gradient. Returns the closure's loss, as torch's own do."""
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
            orthogonal = self.orthogonalise([U.to(group["dtype"]).flatten(1) for U in updates], group)
            for indices in _alike(orthogonal):
                out, fan_in = orthogonal[indices[0]].shape
                steps = [orthogonal[i].view(params[i].shape) for i in indices]
                alpha = -group["lr"] * math.sqrt(max(1, out / fan_in))
                if isinstance(alpha, Tensor):           # a bf16 step times it would be rounded to bf16
                    steps = [step.to(params[i].dtype) for step, i in zip(steps, indices)]
                    steps, alpha = torch._foreach_mul(steps, alpha), 1
                torch._foreach_add_([params[i] for i in indices], steps, alpha=alpha)
        return loss

    def orthogonalise(self, updates: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """U -> O for each matrix (out, in·kh·kw), in the iteration's dtype. A subclass may do otherwise."""
        orthogonal = list(updates)
        for indices in _alike(updates):
            stack = [updates[i] for i in indices]
            if stack[0].is_cpu:                                         # its cache holds one matrix at a time
                results = [newton_schulz(U, group["steps"], group["dtype"]) for U in stack]
            else:                                                       # one batched product for a shape
                results = list(newton_schulz(torch.stack(stack), group["steps"], group["dtype"]))
            for i, result in zip(indices, results):
                orthogonal[i] = result
        return orthogonal

    def _momentum(self, params: list[Tensor], group: dict) -> list[Tensor]:
        """Advance M and return U, shaped like the parameters."""
        grads = [p.grad for p in params]
        for p in params:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        momenta = [self.state[p]["momentum"] for p in params]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])         # M ← M + (1 - μ)(G - M)
        return list(torch._foreach_lerp(grads, momenta, group["momentum"])) if group["nesterov"] else momenta


def _alike(matrices: list[Tensor]) -> list[list[int]]:
    """The indices of the matrices, those of one shape and kind together."""
    indices = defaultdict(list)
    for i, M in enumerate(matrices):
        indices[M.shape, M.dtype, M.device].append(i)
    return list(indices.values())


def split(model: nn.Module, stem: Layers | None = None,
          classifier: Layers | None = None) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(hidden, others): the parameters for Muon, and those for another optimiser; each is in one.

    Hidden are the weights of every Linear and Conv2d but the stem, whose input is the data, and the
    classifier, whose output is the classes; for those two, as for gains and biases, "every direction counts
    the same" is not what is wanted (Jordan et al. 2024). They are taken to be the first and the last that the
    model registered: the order of the assignments in its __init__, which need not be that of its forward.
    Where it is not, name them, by layer or by name, one or several. A weight that two layers share is listed
    once, and not at all if one of them is the stem or the classifier. A second parameter of the weight's
    shape, such as feedback that learns (fa.py), goes where the weight goes; what a computed weight
    (torch.nn.utils.parametrizations) is computed from goes to the others.

    Raises ValueError for a stem or classifier that is no Linear or Conv2d of the model.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    every = list(layers.values())
    ends = [*(every[:1] if stem is None else _chosen(layers, stem)),
            *(every[-1:] if classifier is None else _chosen(layers, classifier))]
    apart = {id(p) for layer in ends for p in layer.parameters(recurse=False)}
    hidden = {id(p): p for layer in layers.values() for p in layer.parameters(recurse=False)
              if p.requires_grad and p.shape == layer.weight.shape and id(p) not in apart}
    return list(hidden.values()), [p for p in model.parameters() if p.requires_grad and id(p) not in hidden]


def _chosen(layers: dict[str, nn.Module], chosen: Layers) -> list[nn.Module]:
    several = isinstance(chosen, Iterable) and not isinstance(chosen, str | nn.Module)
    named = list(chosen) if several else [chosen]
    found = [layers.get(c) if isinstance(c, str) else c for c in named]
    if any(layer not in list(layers.values()) for layer in found):
        raise ValueError(f"{named} are not all layers of the model, which has {', '.join(layers)}")
    return found


if __name__ == "__main__":
    from harness import lessons
    lessons.main("muon")
