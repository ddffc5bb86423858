"""Hidden activity normalisation: keep the activations of different images apart.

In a deep network without normalisation the activations of different images grow alike: every layer of random
weights and ReLUs adds a common direction, and after a dozen layers all inputs point the same way. The
activations approach rank one, and the gradients δ xᵀ with them. Subtracting what the images share is the cure
that the paper uses ("hidden activity normalisation" is batch normalisation; Boeshertz, Pascanu & Clopath
2026), placed between a layer and its nonlinearity. The first three kinds here are the same formula

    y = gain · (x - mean) / √(variance + ε) + bias          gain and bias are learned, one of each per channel

and differ in what the mean and the variance are taken over, for x of shape (N, C, H, W) or (N, C):

    batch   over N, H, W: one mean per channel. Ioffe & Szegedy 2015, the paper's. In evaluation, the averages
            remembered from training
    layer   over C, H, W: one mean per image. Ba et al. 2016
    rms     over C, H, W, with mean = 0 and no bias. Zhang & Sennrich 2019

The fourth goes all the way. Batch normalisation gives each channel variance 1; whitening also decorrelates
the channels of a group, so that their covariance Σ over N, H, W becomes the identity. It is
a test of the paper's explanation that normalisation works because it makes activations orthogonal:

    whiten  y = gain · Σ^(-1/2) (x - mean) + bias,  for each group of up to 32 channels. ZCA, the whitening
            that moves x least, by Newton–Schulz (IterNorm: Huang et al. 2019)

The surprising thing: only `batch` and `whiten` compare images with each other, and so only they can remove
what images share. `layer` and `rms` treat each image by itself, though all are called normalisation. `python
norm.py` shows the difference.

torch's own kernels compute the first three (`forward`); `equation` is the formula above as code, and the
tests hold them equal.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _per_channel(v: Tensor, x: Tensor) -> Tensor:
    return v.view(1, -1, *[1] * (x.dim() - 2))                      # (C,) -> (1, C, 1, 1) beside (N, C, H, W)


def standardise(x: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    """(x - mean) / √(variance + ε), both taken over `axes`."""
    mean = x.mean(axes, keepdim=True)
    variance = (x - mean).square().mean(axes, keepdim=True)
    return (x - mean) / (variance + eps).sqrt()


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
        self.register_buffer("num_batches_tracked", torch.tensor(0))    # never changes: only torch's name

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training,
                            self.momentum, self.eps)

    def equation(self, x: Tensor) -> Tensor:
        """What forward returns in training."""
        y = standardise(x, (0, *range(2, x.dim())), self.eps)
        return _per_channel(self.weight, x) * y + _per_channel(self.bias, x)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}"


class LayerNorm(nn.Module):
    """Layer normalisation of each image by itself, (N, C) or (N, C, H, W); one gain and bias per channel.

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
    """Each image divided by its root mean square, (N, C) or (N, C, H, W); a gain per channel, no bias.

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
    """Σ^(-1/2) of symmetric positive definite (…, g, g), approximately, without a decomposition.

    Huang et al. 2019, Eq. 6:

        P₀ = I,   P ← (3 P - P³ Σ/tr Σ) / 2,   Σ^(-1/2) ≈ P / √tr Σ

    Where Σ/tr Σ has the eigenvalue λ, each step takes P's eigenvalue p closer to 1/√λ, by Newton's method on
    1/p² = λ. Small eigenvalues take longest: after 5 steps those below some hundredth of the trace are
    whitened in part only, which is wanted, as they are mostly noise. Many more steps are not better: once
    converged, this form of the iteration amplifies rounding errors where the condition number is large.
    """
    trace = S.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    S, P = S / trace, torch.eye(S.shape[-1], dtype=S.dtype, device=S.device).expand_as(S)
    for _ in range(steps):
        P = 1.5 * P - 0.5 * P @ P @ P @ S
    return P / trace.sqrt()


class Whitening(nn.Module):
    """ZCA whitening of groups of channels over the batch, (N, C) or (N, C, H, W); gain and bias per channel.

    channels  C, in groups of the largest power of two that divides it, at most 32
    momentum  share of the newest batch in the running mean and (unbiased) running covariance, for evaluation
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
        with torch.autocast(x.device.type, enabled=False):      # a covariance in bf16 is mostly rounding
            wide = x.to(torch.promote_types(torch.promote_types(x.dtype, self.weight.dtype), torch.float32))
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
        mean, covariance, count = self.of_batch(rows)
        with torch.no_grad():
            self.running_mean.lerp_(mean.flatten().to(self.running_mean), self.momentum)
            unbiased = (covariance * count / (count - 1)).to(self.running_covariance)
            self.running_covariance.lerp_(unbiased, self.momentum)
        return mean, covariance

    def of_batch(self, rows: Tensor) -> tuple[Tensor, Tensor, int]:
        """Mean, covariance and number of columns of (C/g, g, N·H·W). A subclass may see more."""
        count = rows.shape[-1]
        if count < 2:
            raise ValueError("Expected more than 1 value per channel when training")
        mean = rows.mean(-1, keepdim=True)
        centred = rows - mean
        return mean, centred @ centred.mT / count, count

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, groups of {self.group}"


KINDS: dict[str, type[nn.Module]] = {"batch": BatchNorm, "layer": LayerNorm, "rms": RMSNorm,
                                     "whiten": Whitening}


def make(kind: str | None, channels: int) -> nn.Module:
    """A normalisation layer for `channels` channels; None makes an nn.Identity, a network truly without norm.

    Raises ValueError for an unknown kind.
    """
    if kind is None:
        return nn.Identity()
    if kind not in KINDS:
        raise ValueError(f"unknown normalisation {kind!r}: choose from {', '.join(KINDS)}, or None")
    return KINDS[kind](channels)


if __name__ == "__main__":
    from harness import lessons
    lessons.main("norm")
