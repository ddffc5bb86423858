"""Hidden activity normalisation: keep a layer's activations apart.

In a deep network without normalisation the activations of different images grow alike: every layer of random weights
and ReLUs adds a common direction, and after a dozen layers all inputs point the same way. The activations approach rank
one, and the gradients δ xᵀ with them. Subtracting what the images share is the cure that the paper uses ("hidden
activity normalisation" is batch normalisation; Boeshertz, Pascanu & Clopath 2026), placed between a layer and its
nonlinearity. All kinds here are the same formula

    y = gain · (x - mean) / √(variance + ε) + bias          gain and bias are learned, one of each a channel

and differ in what the mean and the variance are taken over, for x of shape (N, C, H, W) or (N, C):

    batch   over N, H, W: one mean a channel. Ioffe & Szegedy 2015, the paper's. In evaluation, the averages
            remembered from training
    layer   over C, H, W: one mean an image. Ba et al. 2016
    rms     over C, H, W, with mean = 0 and no bias. Zhang & Sennrich 2019

The surprising thing: only `batch` compares images with each other, and so only it can remove what they share. `layer`
and `rms` set the scale alone, though all three are called normalisation. `python norm.py` shows the difference.

torch's own kernels compute them (`forward`); `equation` is the formula above as code, and the tests hold them equal.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _per_channel(v: Tensor, x: Tensor) -> Tensor:
    return v.view(1, -1, *[1] * (x.dim() - 2))                          # (C,) -> (1, C, 1, 1) beside (N, C, H, W)


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
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training,
                            self.momentum, self.eps)

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


KINDS: dict[str, type[nn.Module]] = {"batch": BatchNorm, "layer": LayerNorm, "rms": RMSNorm}


def make(kind: str | None, channels: int) -> nn.Module:
    """A normalisation layer for `channels` channels; None makes an nn.Identity, a network that is truly norm-free.

    Raises ValueError for an unknown kind.
    """
    if kind is None:
        return nn.Identity()
    if kind not in KINDS:
        raise ValueError(f"unknown normalisation {kind!r}: choose from {', '.join(KINDS)}, or None")
    return KINDS[kind](channels)


def demonstrate(depth: int = 32, width: int = 256, images: int = 256) -> None:
    """Random inputs through a deep random ReLU network: do they stay apart?"""
    kinds = [None, *KINDS]
    print(f"{images} random inputs through {depth} random ReLU layers of width {width}")
    print("mean cosine between two inputs' activations | effective rank of the activations (at most 256)")
    print("layer " + "".join(f"{kind or 'none':>8}" for kind in kinds) + "   |" + "".join(f"{k or 'none':>8}" for k in kinds))
    x = {kind: torch.randn(images, width, generator=torch.Generator().manual_seed(0)) for kind in kinds}
    generator = torch.Generator().manual_seed(1)
    for layer in range(1, depth + 1):
        W = torch.randn(width, width, generator=generator) * (2 / width) ** 0.5         # He: keeps the scale
        for kind in kinds:
            x[kind] = make(kind, width)(x[kind] @ W.mT).relu().detach()
        if layer in (1, 2, 4, 8, 16, 32):
            cosines = "".join(f"{_mean_cosine(x[kind]):8.3f}" for kind in kinds)
            ranks = "".join(f"{_effective_rank(x[kind]):8.1f}" for kind in kinds)
            print(f"{layer:5} {cosines}   |{ranks}")
    print("Only batch normalisation compares the inputs with each other, and only it keeps them apart.")


def _mean_cosine(x: Tensor) -> float:
    unit = F.normalize(x, dim=1)
    n = len(x)
    return ((unit @ unit.mT).sum().item() - n) / (n * (n - 1))


def _effective_rank(x: Tensor) -> float:
    p = torch.linalg.svdvals(x.double())                                # as in rank.py: the exponential of the entropy
    p = p / p.sum()
    return torch.exp(-torch.special.xlogy(p, p).sum()).item()


if __name__ == "__main__":
    demonstrate()
