"""The images: what a data set is, gratings that need no download, and the batches that a network sees.

    dataset = data.load("gratings")                 # or "cifar10", "cifar100", or a folder of images
    normalise = data.Normalise(dataset.train_images)
    generator = torch.Generator().manual_seed(0)
    for images, labels in data.batches(dataset.train_images, dataset.train_labels, 128, generator):
        logits = model(normalise(images))

CIFAR is 184 MB as uint8, so it stays on the device, where `batches` crops and flips and `Normalise`
normalises, all images of a batch at once: no worker processes, no image ever decoded twice.

`gratings` are made: coloured stripes under noise, to be told apart by orientation, 18 degrees from class to
class. They take a second and are hard enough to separate the learning rules (see the README). Where the other
images come from, and how they are checked, is the business of harness/cache.py and harness/folder.py.
"""
from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

NAMES = ("gratings", "cifar10", "cifar100")


class Dataset(NamedTuple):
    train_images: Tensor    # uint8 (N, 3, H, W)
    train_labels: Tensor    # int64 (N,), from 0 to len(classes) - 1
    test_images: Tensor     # uint8 (M, 3, H, W)
    test_labels: Tensor     # int64 (M,)
    classes: list[str]      # name of each label


def load(name: str, root: str | os.PathLike = "data", size: int = 32) -> Dataset:
    """The data set `name`: one of NAMES, or a folder of images, which are then resized to `size`.

    CIFAR is kept as root/<name>.pt, which the first use downloads. Raises harness.files.Problem, saying in
    one line what is wrong and what to do about it.
    """
    if name == "gratings":
        return gratings()
    from harness import cache, folder       # this file alone is enough for gratings and batches
    content = cache.cifar(name, root) if name in NAMES else folder.images(name, size)
    return Dataset(**content)


def hold_out(dataset: Dataset, count: int) -> Dataset:
    """Choose hyperparameters without peeking: the last `count` training images become the test set.

    Raises ValueError if none is held out, or no training image is left.
    """
    images, labels = dataset.train_images, dataset.train_labels
    if not 0 < count < len(images):
        raise ValueError(f"cannot hold out {count} of {len(images)} training images: expected at least 1, "
                         "and at least 1 that is left")
    return Dataset(images[:-count], labels[:-count], images[-count:], labels[-count:], dataset.classes)


# ---- gratings ----------------------------------------------------------------------------------------------

def gratings(train: int = 5000, test: int = 1000, seed: int = 0, noise: float = 60.0) -> Dataset:
    """Coloured gratings, 32×32, 10 classes: class k's stripes are normal to the direction 18k ± 6 degrees.

    Frequency (3 to 7 periods per image), phase, both colours and the noise are drawn anew for each image, so
    no pixel or colour reveals the class. `noise` is the standard deviation of white noise, in grey levels.
    """
    generator = torch.Generator().manual_seed(seed)
    n = train + test

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    labels = torch.randint(10, (n,), generator=generator)
    angle = torch.deg2rad(18.0 * labels + uniform(-6, 6))
    along = torch.stack([angle.cos(), angle.sin()], 1)                          # (n, 2), across the stripes
    side = torch.arange(32) / 32                                                # in images
    place = torch.stack(torch.meshgrid(side, side, indexing="xy"))              # (2, 32, 32)
    periods = torch.einsum("nd,dhw->nhw", along, place) * uniform(3, 7, 1, 1)
    wave = torch.sin(2 * torch.pi * (periods + uniform(0, 1, 1, 1)))[:, None]   # (n, 1, 32, 32) in [-1, 1]
    mean, amplitude = uniform(90, 165, 3, 1, 1), uniform(-60, 60, 3, 1, 1)      # colours: mean ± amplitude
    images = mean + amplitude * wave + noise * torch.randn(n, 3, 32, 32, generator=generator)
    images = images.round().clamp(0, 255).to(torch.uint8)
    return Dataset(images[:train], labels[:train], images[train:], labels[train:],
                   [f"{18 * k} degrees" for k in range(10)])


# ---- batches -----------------------------------------------------------------------------------------------

class Normalise:
    """uint8 (N, 3, H, W) -> float32 with mean 0 and variance 1 per channel over the images it was given."""

    def __init__(self, images: Tensor):
        values = torch.arange(256, dtype=torch.float64)
        counts = [torch.bincount(images[:, c].flatten(), minlength=256) for c in range(3)]
        share = torch.stack(counts).cpu().double()
        share = share / share.sum(1, keepdim=True)          # (3, 256): exact, and the images are never float
        mean = share @ values
        std = ((values - mean[:, None]).square() * share).sum(1).sqrt().clamp(min=1)
        self.mean, self.std = (v.float().view(1, 3, 1, 1).to(images.device) for v in (mean, std))

    def __call__(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


def augment(images: Tensor, generator: torch.Generator, flip: bool = True, pad: int = 4) -> Tensor:
    """Move each image by up to `pad` pixels each way (black comes in) and mirror half of them, left to right.

    (N, C, H, W) in, the same shape and dtype out, in channels_last memory. `generator` is on their device.
    """
    n, _, height, width = images.shape
    device = images.device
    padded = F.pad(images, (pad,) * 4)
    top, left = torch.randint(2 * pad + 1, (2, n, 1), generator=generator, device=device)
    rows = top + torch.arange(height, device=device)                                # (n, H)
    columns = left + torch.arange(width, device=device)                             # (n, W)
    if flip:
        mirror = torch.rand(n, 1, generator=generator, device=device) < 0.5
        columns = torch.where(mirror, columns.flip(1), columns)
    each = torch.arange(n, device=device)[:, None, None]
    crops = padded.permute(0, 2, 3, 1)[each, rows[:, :, None], columns[:, None, :]]     # (n, H, W, C)
    return crops.permute(0, 3, 1, 2)


def indices(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """One epoch in random order: which of `count` images are in each batch of `size`.

    A last, smaller batch is left out, as its gradient would be noisier; with fewer images than `size`, they
    are one batch.
    """
    order = torch.randperm(count, generator=generator, device=generator.device)
    for step in range(steps(count, size)):
        yield order[step * size:(step + 1) * size]


def batch(images: Tensor, labels: Tensor, chosen: Tensor, generator: torch.Generator,
          flip: bool = True) -> tuple[Tensor, Tensor]:
    """The chosen images, augmented, and their labels."""
    return augment(images[chosen], generator, flip), labels[chosen]


def batches(images: Tensor, labels: Tensor, size: int, generator: torch.Generator,
            flip: bool = True) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch: (uint8 images, labels) of `size` each, in random order, augmented."""
    for chosen in indices(len(images), size, generator):
        yield batch(images, labels, chosen, generator, flip)


def steps(images: int, size: int) -> int:
    """Batches in an epoch."""
    return max(1, images // size)


if __name__ == "__main__":
    from harness import lessons
    lessons.main("data")
