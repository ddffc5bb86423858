"""The networks: an MLP, the 4-layer CNN, ResNets and VGG-11, with or without normalisation.

All are made of stock nn.Linear and nn.Conv2d, so that `fa.attach` finds their layers; a learning rule never
needs a model of its own. Every hidden layer is followed by a normalisation (norm.py) and a ReLU; in a
residual block the last ReLU comes after the addition:

    mlp       flatten, 4 × [linear, norm, relu], linear
    cnn       4 × [3×3 convolution, norm, relu] of w, 2w, 4w, 4w channels, strides 1, 2, 2, 2, flatten,
              linear; with another depth, the layers are spread evenly over those four stages
    resnet18  3×3 convolution, norm, relu; 8 residual blocks of w, w, 2w, 2w, 4w, 4w, 8w, 8w channels,
              average, linear (He et al. 2016, with the 3×3 stem and without the max-pool, as is usual for
              32×32 images)
    resnet34  the same with 3, 4, 6 and 3 blocks of those channels
    vgg11     8 × [3×3 convolution, norm, relu] of w, 2w, 4w, 4w, 8w, 8w, 8w, 8w channels, halved by
              max-pooling after the 1st, 2nd, 4th, 6th and 8th; average, linear (Simonyan & Zisserman 2015,
              configuration A, with one linear layer in place of three, as is usual for 32×32 images)

The first layer registered is the stem, the last the classifier; fa.py and muon.py rely on it. Nothing is done
in place: a backward hook needs the layer's output as it was.

Initialisation. With normalisation the scale of W does not matter in the forward pass, and the layers keep
torch's default (uniform in ±1/√fan_in). Without it, that default shrinks the signal to a sixth of its
variance in every ReLU layer; then hidden weights are drawn by He et al. 2015, N(0, 2/fan_in), which keeps it,
and the last convolution of each residual block is drawn √blocks times smaller, so that the sum over the
blocks does not explode (the idea of Zhang et al. 2019, Fixup). A layer drawn so remembers how in
`layer.initialise`, from which fa.py draws B. `init` overrides this, "he" with normalisation or "torch"
without, to see what depends on it.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import norm as normalisation


INITS = ("he", "torch")
SHORTCUTS = ("conv", "pad", "none")


def _he(weight: Tensor, scale: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """N(0, scale² · 2 / fan_in) (He et al. 2015)."""
    nn.init.kaiming_normal_(weight, nonlinearity="relu", generator=generator)
    with torch.no_grad():
        return weight.mul_(scale)


def _layer(layer: nn.Linear | nn.Conv2d, init: str, scale: float = 1.0) -> nn.Linear | nn.Conv2d:
    """The layer as torch drew it, or drawn anew by He's initialisation."""
    if init == "he":
        layer.initialise = partial(_he, scale=scale)
        layer.initialise(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return layer


def _conv(inputs: int, outputs: int, kernel: int, stride: int, norm: str | None, init: str,
          scale: float = 1.0) -> nn.Conv2d:
    """A convolution; where a normalisation follows, that one has the bias."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=norm is None)
    return _layer(conv, init, scale)


def _chosen(init: str | None, norm: str | None) -> str:
    if init not in (None, *INITS):
        raise ValueError(f"init must be one of {INITS}, or None for the one that suits the norm, "
                         f"not {init!r}")
    return init or ("he" if norm is None else "torch")


class MLP(nn.Module):
    def __init__(self, classes: int, norm: str | None, width: int, inputs: int, depth: int, init: str):
        super().__init__()
        self.layers, self.norms = nn.ModuleList(), nn.ModuleList()
        for _ in range(depth):
            self.layers.append(_layer(nn.Linear(inputs, width, bias=norm is None), init))
            self.norms.append(normalisation.make(norm, width))
            inputs = width
        self.classifier = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)                                                # (N, C·H·W)
        for layer, norm in zip(self.layers, self.norms):
            x = F.relu(norm(layer(x)))                                  # (N, width)
        return self.classifier(x)                                       # (N, classes)


class CNN(nn.Module):
    def __init__(self, classes: int, norm: str | None, width: int, channels: int, size: int, depth: int,
                 init: str):
        super().__init__()
        self.layers, self.norms = nn.ModuleList(), nn.ModuleList()
        stages = [4 * i // depth for i in range(depth)]             # 0, 1, 2, 3 for four layers; 0, 2 for two
        for stage, before in zip(stages, [0, *stages]):
            outputs, stride = width * (1, 2, 4, 4)[stage], 2 ** (stage - before)
            self.layers.append(_conv(channels, outputs, 3, stride, norm, init))
            self.norms.append(normalisation.make(norm, outputs))
            channels, size = outputs, (size - 1) // stride + 1
        self.classifier = nn.Linear(channels * size * size, classes)

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms):
            x = F.relu(norm(layer(x)))                                  # (N, 4w, H/8, W/8) in the end
        return self.classifier(x.flatten(1))                            # (N, classes)


class Pad(nn.Module):
    """A shortcut without weights: means of stride × stride pixels, and zeros for the new channels.

    Option A of He et al. 2016, who take every other pixel instead of means.
    """

    def __init__(self, stride: int, new: int):
        super().__init__()
        self.stride, self.new = stride, new

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(F.avg_pool2d(x, self.stride, ceil_mode=True), (0, 0, 0, 0, 0, self.new))


class Block(nn.Module):
    """relu(x + branch(x)), where the branch is two convolutions; a 1×1 one fits x to another shape."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: str | None, init: str, scale: float,
                 shortcut: str):
        super().__init__()
        self.conv1 = _conv(inputs, outputs, 3, stride, norm, init)
        self.norm1 = normalisation.make(norm, outputs)
        self.conv2 = _conv(outputs, outputs, 3, 1, norm, init, scale)
        self.norm2 = normalisation.make(norm, outputs)
        self.shortcut: nn.Module | None = nn.Sequential() if shortcut != "none" else None
        if shortcut == "conv" and (stride != 1 or inputs != outputs):
            # Nothing rectifies what the shortcut carries: 1/√2 makes He's initialisation keep its variance.
            self.shortcut = nn.Sequential(_conv(inputs, outputs, 1, stride, norm, init, 0.5 ** 0.5),
                                          normalisation.make(norm, outputs))
        elif shortcut == "pad":
            self.shortcut = Pad(stride, outputs - inputs)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return F.relu(y if self.shortcut is None else y + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self, blocks: tuple[int, ...], classes: int, norm: str | None, width: int, channels: int,
                 init: str, shortcut: str):
        super().__init__()
        if shortcut not in SHORTCUTS:
            raise ValueError(f"shortcut must be one of {SHORTCUTS}, not {shortcut!r}")
        self.stem, self.norm = _conv(channels, width, 3, 1, norm, init), normalisation.make(norm, width)
        stages, inputs = [], width
        for stage, count in enumerate(blocks):
            outputs = width * 2 ** stage
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                stages.append(Block(inputs, outputs, stride, norm, init, sum(blocks) ** -0.5, shortcut))
                inputs = outputs
        self.blocks = nn.Sequential(*stages)
        self.classifier = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))                             # (N, w, H, W)
        x = self.blocks(x)                                              # (N, 8w, H/8, W/8)
        return self.classifier(x.mean((2, 3)))                          # (N, classes)


class VGG(nn.Module):
    CHANNELS, POOLED = (1, 2, 4, 4, 8, 8, 8, 8), (0, 1, 3, 5, 7)    # in widths; pooled after these layers

    def __init__(self, classes: int, norm: str | None, width: int, channels: int, init: str):
        super().__init__()
        self.layers, self.norms = nn.ModuleList(), nn.ModuleList()
        for widths in self.CHANNELS:
            self.layers.append(_conv(channels, width * widths, 3, 1, norm, init))
            self.norms.append(normalisation.make(norm, width * widths))
            channels = width * widths
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        for i, (layer, norm) in enumerate(zip(self.layers, self.norms)):
            x = F.relu(norm(layer(x)))
            if i in self.POOLED:
                x = F.max_pool2d(x, 2, ceil_mode=True)                  # rounded up, so that any size will do
        return self.classifier(x.mean((2, 3)))                          # (N, 8w, H/32, W/32) -> (N, classes)


def mlp(classes: int = 10, norm: str | None = "batch", width: int = 512, channels: int = 3, size: int = 32,
        depth: int = 4, init: str | None = None) -> MLP:
    """`depth` hidden layers of `width`; images of (channels, size, size). norm: a kind of norm.KINDS, or
    None; init: one of INITS, or None for the one that suits the norm."""
    return MLP(classes, norm, width, channels * size * size, depth, _chosen(init, norm))


def cnn(classes: int = 10, norm: str | None = "batch", width: int = 32, channels: int = 3, size: int = 32,
        depth: int = 4, init: str | None = None) -> CNN:
    """The CNN of `depth` convolutions; `width` channels in the first. norm: a kind of norm.KINDS, or None;
    init: one of INITS, or None for the one that suits the norm."""
    return CNN(classes, norm, width, channels, size, depth, _chosen(init, norm))


def resnet18(classes: int = 100, norm: str | None = "batch", width: int = 64, channels: int = 3,
             size: int = 32, init: str | None = None, shortcut: str = "conv") -> ResNet:
    """ResNet-18 for small images; 11,220,132 parameters for 100 classes with batch norm at width 64.

    `width` channels in the first stage. Works on any `size` (it averages over space), so that is not
    used. norm and init as for `cnn`; shortcut: one of SHORTCUTS: "conv" and "pad" say how x is fitted
    where a block changes the shape; "none" leaves out all shortcuts.
    """
    return ResNet((2, 2, 2, 2), classes, norm, width, channels, _chosen(init, norm), shortcut)


def resnet34(classes: int = 100, norm: str | None = "batch", width: int = 64, channels: int = 3,
             size: int = 32, init: str | None = None, shortcut: str = "conv") -> ResNet:
    """As `resnet18`, deeper: 21,328,292 parameters for 100 classes with batch norm at width 64."""
    return ResNet((3, 4, 6, 3), classes, norm, width, channels, _chosen(init, norm), shortcut)


def vgg11(classes: int = 100, norm: str | None = "batch", width: int = 64, channels: int = 3,
          size: int = 32, init: str | None = None) -> VGG:
    """As `resnet18`, without shortcuts: 9,274,532 parameters for 100 classes with batch norm at width 64."""
    return VGG(classes, norm, width, channels, _chosen(init, norm))


MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp, "cnn": cnn, "resnet18": resnet18, "resnet34": resnet34, "vgg11": vgg11}
