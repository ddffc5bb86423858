"""Hidden activity normalisation: keep a layer's activations apart.

In a deep network without normalisation the activations of different images grow alike: every layer of random weights
and ReLUs adds a common direction, and after a dozen layers all inputs point the same way. The activations approach rank
one, and the gradients δ xᵀ with them. Subtracting what the images share is the cure that the paper uses ("hidden
activity normalisation" is batch normalisation; Boeshertz, Pascanu & Clopath 2026), placed between a layer and its
nonlinearity. The first three kinds here are the same formula

    y = gain · (x - mean) / √(variance + ε) + bias          gain and bias are learned, one of each a channel

and differ in what the mean and the variance are taken over, for x of shape (N, C, H, W) or (N, C):

    batch   over N, H, W: one mean a channel. Ioffe & Szegedy 2015, the paper's. In evaluation, the averages
            remembered from training
    layer   over C, H, W: one mean an image. Ba et al. 2016
    rms     over C, H, W, with mean = 0 and no bias. Zhang & Sennrich 2019

The fourth goes all the way. Batch normalisation gives each channel variance 1; whitening also removes what the channels
of a group have in common, so that their covariance Σ over N, H, W becomes the identity. It is the direct test of the
paper's explanation that normalisation works because it makes activations orthogonal:

    whiten  y = gain · Σ^(-1/2) (x - mean) + bias,  for each group of up to 32 channels. ZCA, the whitening that moves x
            least, by Newton–Schulz (IterNorm: Huang et al. 2019)

The surprising thing: only `batch` and `whiten` compare images with each other, and so only they can remove what images
share. `layer` and `rms` set the scale alone, though all are called normalisation. `python norm.py` shows the difference.

torch's own kernels compute the first three (`forward`); `equation` is the formula above as code, and the tests hold them
equal.
"""
from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules._functions import SyncBatchNorm


def _per_channel(v: Tensor, x: Tensor) -> Tensor:
    return v.view(1, -1, *[1] * (x.dim() - 2))                          # (C,) -> (1, C, 1, 1) beside (N, C, H, W)


def standardise(x: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    """(x - mean) / √(variance + ε), both taken over `axes`."""
    mean = x.mean(axes, keepdim=True)
    variance = (x - mean).square().mean(axes, keepdim=True)
    return (x - mean) / (variance + eps).sqrt()


def processes() -> int:
    """How many train together (parallel.py)."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _MeanOverProcesses(torch.autograd.Function):
    """Each process's v counts 1/n in every process's mean, so the gradient of v is the mean of all their gradients."""

    @staticmethod
    def forward(ctx, v: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)                                # no error stays no error, instead of zeros
        v = v.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(v)
        return v / processes()

    @staticmethod
    def backward(ctx, gradient: Tensor | None) -> Tensor | None:
        return None if gradient is None else _MeanOverProcesses.forward(ctx, gradient)


def over_processes(v: Tensor) -> Tensor:
    """The mean of v over the processes; with one process, v."""
    return _MeanOverProcesses.apply(v) if processes() > 1 else v


class BatchNorm(nn.Module):
    """Batch normalisation, (N, C) or (N, C, H, W). Parameters and buffers are named as in nn.BatchNorm2d.

    channels  C
    momentum  share of the newest batch in the running mean and (unbiased) running variance
    eps       ε
    Raises ValueError in training when a channel has a single value, whose variance is not defined.
    """

    def __init__(self, channels: int, momentum: float = 0.1, eps: float = 1e-5):
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.ones(channels))                # the gain
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))    # read by nobody, not counted: only torch's name

    def forward(self, x: Tensor) -> Tensor:
        if self.training and processes() > 1:
            return self._together(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training,
                            self.momentum, self.eps)

    def _together(self, x: Tensor) -> Tensor:
        """The same over the images of all processes, on a GPU by torch's own kernels, which know no CPU."""
        if x.is_cuda:
            return SyncBatchNorm.apply(x, self.weight, self.bias, self.running_mean, self.running_var, self.eps,
                                       self.momentum, dist.group.WORLD, processes())
        axes, count = (0, *range(2, x.dim())), processes() * x.numel() // x.shape[1]
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(torch.promote_types(x.dtype, self.weight.dtype))
            mean = over_processes(wide.mean(axes))
            centred = wide - _per_channel(mean, x)
            variance = over_processes(centred.square().mean(axes))
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
                self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var), self.momentum)
            y = centred * _per_channel(self.weight / (variance + self.eps).sqrt(), x) + _per_channel(self.bias, x)
            return y.to(x.dtype)

    def equation(self, x: Tensor) -> Tensor:
        """What forward returns in training."""
        y = standardise(x, (0, *range(2, x.dim())), self.eps)
        return _per_channel(self.weight, x) * y + _per_channel(self.bias, x)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}"


class LayerNorm(nn.Module):
    """Layer normalisation of each image by itself, (N, C) or (N, C, H, W); gain and bias a channel.

    Over an image this is group normalisation with a single group. channels is C, eps is ε.
    """

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, 1, self.weight, self.bias, self.eps)

    def equation(self, x: Tensor) -> Tensor:
        y = standardise(x, tuple(range(1, x.dim())), self.eps)
        return _per_channel(self.weight, x) * y + _per_channel(self.bias, x)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}"


class RMSNorm(nn.Module):
    """Each image divided by its root mean square, (N, C) or (N, C, H, W); a gain a channel, no mean, no bias.

    channels is C, eps is ε.
    """

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[1:], eps=self.eps) * _per_channel(self.weight, x)

    def equation(self, x: Tensor) -> Tensor:
        mean_square = x.square().mean(tuple(range(1, x.dim())), keepdim=True)
        return _per_channel(self.weight, x) * x / (mean_square + self.eps).sqrt()

    def extra_repr(self) -> str:
        return f"{len(self.weight)}"


def inverse_square_root(S: Tensor, steps: int = 5) -> Tensor:
    """Σ^(-1/2) of symmetric positive definite (…, g, g), approximately, without a decomposition (Huang et al. 2019, Eq. 6).

        P₀ = I,   P ← (3 P - P³ Σ/tr Σ) / 2,   Σ^(-1/2) ≈ P / √tr Σ

    Each step takes an eigenvalue λ of Σ/tr Σ closer to p = 1/√λ, by Newton's method on 1/p² = λ. Small eigenvalues
    take longest: after 5 steps those below some hundredth of the trace are whitened in part only, which is wanted, as they
    are mostly noise. Many more steps are not better: once converged, this form of the iteration amplifies rounding errors
    where the condition number is large.
    """
    trace = S.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    S, P = S / trace, torch.eye(S.shape[-1], dtype=S.dtype, device=S.device).expand_as(S)
    for _ in range(steps):
        P = 1.5 * P - 0.5 * P @ P @ P @ S
    return P / trace.sqrt()


class Whitening(nn.Module):
    """ZCA whitening of groups of channels over the batch, (N, C) or (N, C, H, W); gain and bias a channel.

    channels  C, in groups of the largest power of two that divides it, at most 32
    momentum  share of the newest batch in the running mean and (unbiased) running covariance, used in evaluation
    eps       added to the diagonal of Σ
    steps     of Newton–Schulz
    Raises ValueError in training when a channel has a single value, whose variance is not defined.
    """

    def __init__(self, channels: int, momentum: float = 0.1, eps: float = 1e-5, steps: int = 5):
        super().__init__()
        self.momentum, self.eps, self.steps, self.group = momentum, eps, steps, math.gcd(channels, 32)
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_covariance", torch.eye(self.group).repeat(channels // self.group, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):              # a covariance in bf16 would be mostly rounding
            wide = x.to(torch.promote_types(x.dtype, self.weight.dtype))
            rows = wide.movedim(1, 0).reshape(-1, self.group, x.numel() // x.shape[1])      # (C/g, g, N·H·W)
            mean, covariance = self._statistics(rows)
            diagonal = self.eps * torch.eye(self.group, dtype=rows.dtype, device=rows.device)
            rows = inverse_square_root(covariance + diagonal, self.steps) @ (rows - mean)
            y = rows.reshape(x.shape[1], x.shape[0], *x.shape[2:]).movedim(0, 1)
            return (_per_channel(self.weight, x) * y + _per_channel(self.bias, x)).to(x.dtype)

    def _statistics(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (C/g, g, 1) and covariance Σ (C/g, g, g): the batch's in training, else those remembered."""
        if not self.training:
            return self.running_mean.view(-1, self.group, 1), self.running_covariance
        count = processes() * rows.shape[-1]
        if count < 2:
            raise ValueError("Expected more than 1 value per channel when training")
        mean = over_processes(rows.mean(-1, keepdim=True))
        centred = rows - mean
        covariance = over_processes(centred @ centred.mT / rows.shape[-1])
        with torch.no_grad():
            self.running_mean.lerp_(mean.flatten().to(self.running_mean), self.momentum)
            self.running_covariance.lerp_((covariance * count / (count - 1)).to(self.running_covariance), self.momentum)
        return mean, covariance

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, groups of {self.group}"


KINDS: dict[str, type[nn.Module]] = {"batch": BatchNorm, "layer": LayerNorm, "rms": RMSNorm, "whiten": Whitening}


def make(kind: str | None, channels: int) -> nn.Module:
    """A normalisation layer for `channels` channels; None makes an nn.Identity, a network that is truly norm-free.

    Raises ValueError for an unknown kind.
    """
    if kind is None:
        return nn.Identity()
    if kind not in KINDS:
        raise ValueError(f"unknown normalisation {kind!r}: choose from {', '.join(KINDS)}, or None")
    return KINDS[kind](channels)


# ---- a demonstration -------------------------------------------------------------------------------------------

def demonstrate(out: Path | None = None, depth: int = 32, width: int = 256, images: int = 256) -> None:
    """Random inputs through a deep random ReLU network: do they stay apart?"""
    kinds = [None, *KINDS]
    print(f"{images} random inputs through {depth} random ReLU layers of width {width}")
    print("mean cosine between two inputs' activations      | effective rank of the activations (at most 256)")
    print("layer " + "".join(f"{kind or 'none':>8}" for kind in kinds) + "   |" + "".join(f"{k or 'none':>8}" for k in kinds))
    x = {kind: torch.randn(images, width, generator=torch.Generator().manual_seed(0)) for kind in kinds}
    cosines, ranks = {kind: [] for kind in kinds}, {kind: [] for kind in kinds}
    generator = torch.Generator().manual_seed(1)
    for layer in range(1, depth + 1):
        W = torch.randn(width, width, generator=generator) * (2 / width) ** 0.5         # He: keeps the scale
        for kind in kinds:
            x[kind] = make(kind, width)(x[kind] @ W.mT).relu().detach()
            cosines[kind].append(_mean_cosine(x[kind]))
            ranks[kind].append(_effective_rank(x[kind]))
        if layer in (1, 2, 4, 8, 16, 32):
            print(f"{layer:5} " + "".join(f"{cosines[kind][-1]:8.3f}" for kind in kinds) + "   |"
                  + "".join(f"{ranks[kind][-1]:8.1f}" for kind in kinds))
    print("Only batch normalisation and whitening compare the inputs with each other, and only they keep them apart.")
    if out:
        _draw(out, cosines, ranks)
        print(out)


def _draw(out: Path, cosines: dict, ranks: dict) -> None:
    os.environ["MPLBACKEND"] = "Agg"                            # a notebook's backend may stop the import
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    colours = {None: "#999999", "batch": "#0072B2", "layer": "#E69F00", "rms": "#CC79A7", "whiten": "#009E73"}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for kind, style in zip(cosines, ("-", "-", "-", "--", "-")):
        depth = range(1, len(cosines[kind]) + 1)
        left.plot(depth, cosines[kind], style, color=colours[kind], linewidth=2, label=kind or "none")
        right.plot(depth, ranks[kind], style, color=colours[kind], linewidth=2)
    left.set(title="do all inputs look alike?", xlabel="layer", ylabel="mean cosine between two inputs' activations",
             ylim=(0, 1.02))
    right.set(title="and how many directions are left?", xlabel="layer", ylabel="effective rank of the activations",
              yscale="log", ylim=(1, 256))
    right.set_yticks([1, 4, 16, 64, 256], ["1", "4", "16", "64", "256"])
    right.minorticks_off()
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False, title="normalisation")
    figure.savefig(out, dpi=130)
    plt.close(figure)


def _mean_cosine(x: Tensor) -> float:
    unit = F.normalize(x, dim=1)
    n = len(x)
    return ((unit @ unit.mT).sum().item() - n) / (n * (n - 1))


def _effective_rank(x: Tensor) -> float:
    p = torch.linalg.svdvals(x.double())                                # as in rank.py: the exponential of the entropy
    p = p / p.sum()
    return torch.exp(-torch.special.xlogy(p, p).sum()).item()


def main() -> None:
    parser = argparse.ArgumentParser(prog="norm.py", description=demonstrate.__doc__)
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="save a picture too")
    out = parser.parse_args().out
    try:
        demonstrate(out)
    except (OSError, ValueError, ImportError) as e:             # a folder, a format, a matplotlib that is not there
        reason = str(getattr(e, "strerror", None) or e).split()
        parser.exit(2, f"{parser.prog}: --out {out}: {' '.join(reason)}\n")


if __name__ == "__main__":
    main()
