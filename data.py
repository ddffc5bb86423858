"""The images: CIFAR-10 and CIFAR-100, or gratings that need no download; as tensors, kept on the device.

`load(name, root)` gives uint8 images and int64 labels. CIFAR is downloaded once through torchvision, which verifies the
archive, and kept as `root/<name>.pt`; later uses read that file, check it, and need no network. The file is

    torch.save({"train_images": uint8 (N, 3, 32, 32), "train_labels": int64 (N,),
                "test_images":  uint8 (M, 3, 32, 32), "test_labels":  int64 (M,), "classes": [str, ...]})

A whole data set is a few hundred megabytes as uint8, so it stays on the device, and `batches` crops, flips and
normalises there, all images of a batch at once: no worker processes, no image ever decoded twice.

`gratings` is a made data set: coloured stripes under noise, to be told apart by orientation, 18° from class to class. It is
generated in a second and is hard enough to separate the learning rules (see the README).
"""
from __future__ import annotations

import http.client
import os
import pickle
import socket
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class DataError(Exception):
    """What is wrong with the data, and what to do about it, in one line."""


class Dataset(NamedTuple):
    train_images: Tensor    # uint8 (N, 3, H, W)
    train_labels: Tensor    # int64 (N,), from 0 to len(classes) - 1
    test_images: Tensor     # uint8 (M, 3, H, W)
    test_labels: Tensor     # int64 (M,)
    classes: list[str]      # name of each label


NAMES = ("gratings", "cifar10", "cifar100")
CLASSES = {"cifar10": (10, "airplane", "truck"), "cifar100": (100, "apple", "worm")}    # count, first, last


def load(name: str, root: str | os.PathLike = "data") -> Dataset:
    """The data set `name`, one of NAMES; CIFAR is read from root/<name>.pt, which the first use downloads.

    Raises DataError for an unknown name, a download that fails, or a cache that is damaged or holds something else.
    """
    if name == "gratings":
        return gratings()
    if name not in NAMES:
        raise DataError(f"unknown data set {name!r}: choose from {', '.join(NAMES)}")
    cache = Path(root) / f"{name}.pt"
    try:
        if not cache.exists():
            _download(name, cache)
        return _read(name, cache)
    except OSError as e:
        raise DataError(f"cannot use {cache}: {e.strerror or e}; choose another folder for the data") from e


def hold_out(dataset: Dataset, count: int) -> Dataset:
    """The same data with the last `count` training images as the test set: for choosing hyperparameters without peeking.

    Raises DataError if no training image would be left.
    """
    images, labels = dataset.train_images, dataset.train_labels
    if count >= len(images):
        raise DataError(f"cannot hold out {count} of {len(images)} training images: none would be left")
    return Dataset(images[:-count], labels[:-count], images[-count:], labels[-count:], dataset.classes)


# ---- CIFAR -----------------------------------------------------------------------------------------------------

def _download(name: str, cache: Path) -> None:
    """Fetch CIFAR by torchvision, which checks the archive's MD5 before unpacking it, and write the cache."""
    import torchvision                                          # takes seconds to import and is needed only here
    kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    made = [folder for folder in (cache.parent, *cache.parent.parents) if not folder.exists()]
    cache.parent.mkdir(parents=True, exist_ok=True)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(60)                                # a server that stalls must not hang the run
    try:
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=cache.parent) as scratch:
            train = kind(scratch, train=True, download=True)
            test = kind(scratch, train=False)
    except (OSError, RuntimeError, EOFError, tarfile.TarError, zlib.error, http.client.HTTPException) as e:
        for folder in made:                                     # URLError is an OSError
            folder.rmdir()
        reason = " ".join(str(e).split()) or type(e).__name__
        raise DataError(f"cannot download {name} from {kind.url}: {reason}; run the same command again later, or put "
                        f"{cache.name} into {cache.parent}") from e
    finally:
        socket.setdefaulttimeout(timeout)
    _write(cache, Dataset(*_tensors(train), *_tensors(test), list(train.classes)))


def _tensors(part) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)


def _write(cache: Path, dataset: Dataset) -> None:
    partial = cache.with_name(f".{cache.name}.{os.getpid()}.partial")
    try:
        torch.save(dataset._asdict(), partial)
        os.replace(partial, cache)                              # a reader sees the whole file or none
    finally:
        partial.unlink(missing_ok=True)


def _read(name: str, cache: Path) -> Dataset:
    remedy = "delete it, and the next run downloads it again"
    with open(cache, "rb") as file:
        try:
            content = torch.load(file, weights_only=True, map_location="cpu")
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as e:
            raise DataError(f"{cache} is damaged or no data set at all ({type(e).__name__}); {remedy}") from e
    wrong = _fault(name, content)
    if wrong:
        raise DataError(f"{cache} does not hold {name}: {wrong}; {remedy}")
    return Dataset(**content)


def _fault(name: str, content: object) -> str | None:
    """What disqualifies the content of a cache, or None."""
    if not isinstance(content, dict) or set(content) != set(Dataset._fields):
        return f"it must be a dict of {', '.join(Dataset._fields)}"
    classes = content["classes"]
    if not isinstance(classes, list) or not all(isinstance(c, str) for c in classes):
        return "classes must be a list of names"
    if (len(classes), *classes[:1], *classes[-1:]) != CLASSES[name]:
        return f"it has {len(classes)} classes, {', '.join(classes[:1] + classes[-1:])}"
    for part in ("train", "test"):
        images, labels = content[f"{part}_images"], content[f"{part}_labels"]
        if not (isinstance(images, Tensor) and images.dtype == torch.uint8 and images.shape[1:] == (3, 32, 32)):
            return f"{part}_images must be uint8 of shape (N, 3, 32, 32)"
        if not (isinstance(labels, Tensor) and labels.dtype == torch.int64 and labels.shape == images.shape[:1]):
            return f"{part}_labels must be int64 of shape (N,), one for each image"
        if len(labels) == 0 or labels.min() < 0 or labels.max() >= len(classes):
            return f"{part}_labels must be from 0 to {len(classes) - 1}"
    return None


# ---- gratings --------------------------------------------------------------------------------------------------

def gratings(train: int = 5000, test: int = 1000, seed: int = 0, noise: float = 60.0) -> Dataset:
    """Oriented coloured gratings, 32×32, 10 classes: class k is stripes at 18k ± 6 degrees.

    Frequency (3 to 7 periods an image), phase, both colours and the noise are drawn anew for each image, so no pixel
    and no colour tells the class. noise is the standard deviation of white noise in grey levels out of 255.
    """
    generator = torch.Generator().manual_seed(seed)
    n = train + test

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    labels = torch.randint(10, (n,), generator=generator)
    angle = torch.deg2rad(18.0 * labels + uniform(-6, 6))
    along = torch.stack([angle.cos(), angle.sin()], 1)                              # (n, 2), across the stripes
    place = torch.stack(torch.meshgrid(*[torch.arange(32) / 32] * 2, indexing="xy"))   # (2, 32, 32), in images
    periods = torch.einsum("nd,dhw->nhw", along, place) * uniform(3, 7, 1, 1)
    wave = torch.sin(2 * torch.pi * (periods + uniform(0, 1, 1, 1)))[:, None]       # (n, 1, 32, 32) in [-1, 1]
    mean, amplitude = uniform(90, 165, 3, 1, 1), uniform(-60, 60, 3, 1, 1)          # colours: mean ± amplitude
    images = mean + amplitude * wave + noise * torch.randn(n, 3, 32, 32, generator=generator)
    images = images.round().clamp(0, 255).to(torch.uint8)
    return Dataset(images[:train], labels[:train], images[train:], labels[train:],
                   [f"{18 * k} degrees" for k in range(10)])


# ---- batches ---------------------------------------------------------------------------------------------------

class Normalise:
    """uint8 (N, 3, H, W) -> float32 with mean 0 and variance 1 a channel over the images it was made from."""

    def __init__(self, images: Tensor):
        values = torch.arange(256, dtype=torch.float64)
        share = torch.stack([torch.bincount(images[:, c].flatten(), minlength=256) for c in range(3)]).cpu().double()
        share = share / share.sum(1, keepdim=True)              # (3, 256): exact, and the images are never float
        mean = share @ values
        std = ((values - mean[:, None]).square() * share).sum(1).sqrt().clamp(min=1)
        self.mean, self.std = (v.float().view(1, 3, 1, 1).to(images.device) for v in (mean, std))

    def __call__(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


def augment(images: Tensor, generator: torch.Generator, flip: bool = True, pad: int = 4) -> Tensor:
    """Move each image by up to `pad` pixels each way (black comes in) and mirror half of them, left to right.

    (N, C, H, W) in, the same shape and dtype out, in channels_last memory. `generator` is on the images' device.
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
    crops = padded.permute(0, 2, 3, 1)[each, rows[:, :, None], columns[:, None, :]]      # (n, H, W, C)
    return crops.permute(0, 3, 1, 2)


def batches(images: Tensor, labels: Tensor, size: int, generator: torch.Generator,
            flip: bool = True) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in random order, augmented: (uint8 images, labels) of `size` each.

    A last, smaller batch is left out, as its gradient would be noisier; with fewer images than `size`, they are one batch.
    """
    order = torch.randperm(len(images), generator=generator, device=images.device)
    for step in range(steps(len(images), size)):
        chosen = order[step * size:(step + 1) * size]
        yield augment(images[chosen], generator, flip), labels[chosen]


def steps(images: int, size: int) -> int:
    """Batches in an epoch."""
    return max(1, images // size)
