"""The images: CIFAR-10 and CIFAR-100, a folder of yours, or gratings that need no download; as tensors, kept on the device.

`load(name, root)` gives uint8 images and int64 labels. torchvision, which knows the checksums, downloads CIFAR once; processes
started together wait for the first. It is kept as `root/<name>.pt`; later uses read that file, check it, and need no network.
An official archive that lies in `root`, or the folder that torchvision unpacks it to, is used before anything is downloaded.
The file is

    torch.save({"train_images": uint8 (N, 3, 32, 32), "train_labels": int64 (N,),
                "test_images":  uint8 (M, 3, 32, 32), "test_labels":  int64 (M,), "classes": [str, ...]})

A whole data set is a few hundred megabytes as uint8, so it stays on the device, and `batches` crops, flips and
normalises there, all images of a batch at once: no worker processes, no image ever decoded twice.

A folder of images is a data set too, in torchvision's ImageFolder layout, `train/CLASS/...` and `test/CLASS/...` (or
`val/`, also as Tiny ImageNet unpacks), decoded once into such a file beside it.

`gratings` is a made data set: coloured stripes under noise, to be told apart by orientation, 18° from class to class. It is
generated in a second and is hard enough to separate the learning rules (see the README).

A result is worth no more than its data, so what is read is checked: that it is what its name says, with every label a class
and next to no test image among the training images. `digest` gives a data set a name by which it is known again.
"""
from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import pickle
import re
import shutil
import socket
import ssl
import struct
import sys
import tarfile
import urllib.error
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import filelock
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm


class DataError(Exception):
    """What is wrong with the data, and what to do about it, in one line."""


class Dataset(NamedTuple):
    train_images: Tensor    # uint8 (N, 3, H, W)
    train_labels: Tensor    # int64 (N,), from 0 to len(classes) - 1
    test_images: Tensor     # uint8 (M, 3, H, W)
    test_labels: Tensor     # int64 (M,)
    classes: list[str]      # name of each label


class Known(NamedTuple):
    classes: list[str]      # in the order of their labels
    most: dict[str, int]    # images of a class, in the official training and test set


CIFAR = {
    "cifar10": Known("airplane automobile bird cat deer dog frog horse ship truck".split(),
                     {"train": 5000, "test": 1000}),
    "cifar100": Known("""
            apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
            castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
            elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
            man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
            pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
            skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
            tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
        """.split(), {"train": 500, "test": 100}),
}
NAMES = ("gratings", *CIFAR)

# Test images that may also be training images, bit for bit. CIFAR-100 itself has 10 in 10,000; the 25,000 training images of
# CIFAR-10 that were looked through share none. Up to a hundredth, they move a test accuracy by at most one point.
SHARED = 0.01


def load(name: str, root: str | os.PathLike = "data", size: int = 32) -> Dataset:
    """The data set `name`: one of NAMES, or a folder of images, which are then resized to `size`.

    CIFAR is read from root/<name>.pt, which the first use makes; a second process that needs it meanwhile waits, and says so
    on stderr. So it does of a file that holds only a part of the images. Whatever copy they came from, the images are in
    the order of `sort`: the first N of the whole set are the same N everywhere. Raises DataError for an unknown name, a
    download that fails, a cache that cannot be written, is damaged or holds something else, a folder that is no data set, or
    images or labels that cannot be right.
    """
    if name == "gratings":
        return gratings()
    if name not in NAMES:
        try:
            return image_folder(Path(name), size)
        except OSError as e:
            raise DataError(f"cannot use {name}: {e.strerror or e}") from e
    cache = Path(root) / f"{name}.pt"
    try:
        if not cache.exists():                                  # once there it is whole, and reading it needs no lock
            with _alone(cache) as scratch:
                if not cache.exists():                          # or the process that had the lock before has made it
                    _write(cache, scratch, _official(name, cache, scratch)._asdict())
        dataset = _read(name, cache)
    except OSError as e:
        raise DataError(f"cannot use {cache}: {e.strerror or e}; choose another folder for the data") from e
    whole = CIFAR[name].most["train"] * len(dataset.classes)
    if len(dataset.train_images) < whole:
        print(f"{cache} holds {len(dataset.train_images):,} of the {whole:,} training images of {name}", file=sys.stderr)
    return sort(dataset)


def sort(dataset: Dataset) -> Dataset:
    """The same images in an order that depends on nothing but themselves: by a digest of each one's bytes, ties by label."""
    parts: list[Tensor] = []
    for images, labels in (dataset[:2], dataset[2:4]):
        keys = [(hashlib.sha256(image).digest(), label) for image, label in zip(images.contiguous().numpy(), labels.tolist())]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        parts += [images[order], labels[order]]
    return Dataset(parts[0], parts[1], parts[2], parts[3], dataset.classes)


def hold_out(dataset: Dataset, count: int) -> Dataset:
    """The same data with the last `count` training images as the test set: for choosing hyperparameters without peeking.

    No image is in both, but for those that the training images themselves hold twice. Raises DataError if no training image
    would be left, or none is held out.
    """
    images, labels = dataset.train_images, dataset.train_labels
    if not 0 < count < len(images):
        raise DataError(f"cannot hold out {count} of {len(images)} training images: none would be left"
                        + (" to measure on" if count < 1 else ""))
    return Dataset(images[:-count], labels[:-count], images[-count:], labels[-count:], dataset.classes)


def digest(dataset: Dataset) -> str:
    """16 hexadecimal digits for the images, labels and class names together, the same on every machine.

    Any changed byte changes them, and so does another order: a run that goes on can see that it has the data it began with.
    """
    state = hashlib.blake2b(json.dumps([[list(part.shape) for part in dataset[:4]], dataset.classes]).encode(), digest_size=8)
    for part in dataset[:4]:
        array = part.cpu().contiguous().numpy()
        state.update(array.astype(array.dtype.newbyteorder("<"), copy=False))
    return state.hexdigest()


# ---- CIFAR -----------------------------------------------------------------------------------------------------

NETWORK = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)


def _official(name: str, cache: Path, scratch: Path) -> Dataset:
    """CIFAR from what lies beside the cache, or downloaded into `scratch`.

    torchvision compares MD5s: of an archive before it is opened, of each file in it before that is unpickled.
    """
    import torchvision                                          # takes seconds to import and is needed only here
    from torchvision.datasets.utils import check_integrity, download_url
    kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    root, timeout = cache.parent, socket.getdefaulttimeout()
    socket.setdefaulttimeout(60)                                # a server that stalls must not hang the run
    try:
        try:
            parts = kind(root, train=True), kind(root, train=False)
        except RuntimeError:                                    # torchvision's: it is not there, or not what it should be
            place = root if check_integrity(root / kind.filename, kind.tgz_md5) else scratch
            download_url(kind.url, place, kind.filename, kind.tgz_md5)          # nothing, if the right archive is there
            with tarfile.open(place / kind.filename) as archive:
                archive.extractall(scratch, filter="data")      # torchvision's own would let a member land elsewhere
            parts = kind(scratch, train=True), kind(scratch, train=False)
    except (*NETWORK, RuntimeError, tarfile.TarError) as e:
        reason = " ".join(str(e).split()) or type(e).__name__
        raise DataError(f"cannot download {name} from {kind.url}: {reason}; run the same command again later, or put "
                        f"{kind.filename} or {cache.name} into {root}") from e
    finally:
        socket.setdefaulttimeout(timeout)
    dataset = Dataset(*_tensors(parts[0]), *_tensors(parts[1]), list(parts[0].classes))
    wrong = _fault(dataset._asdict(), 32, CIFAR[name])
    if wrong:
        raise DataError(f"what {kind.url} sends is not {name}: {wrong}")
    return dataset


def _tensors(part) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)


@contextlib.contextmanager
def _alone(cache: Path) -> Iterator[Path]:
    """A scratch folder to make `cache` in, for one process at a time.

    The system takes the lock from a process that dies, and the next one gets the folder with what is left in it. Afterwards
    only the cache stays, and the lock's empty file. Raises OSError where nothing can be locked or written.
    """
    cache.parent.mkdir(parents=True, exist_ok=True)
    held, scratch = filelock.FileLock(cache.with_name(f".{cache.name}.lock")), cache.with_name(f".{cache.name}.making")
    try:
        held.acquire(timeout=0)
    except filelock.Timeout:
        print(f"waiting for another process that is making {cache}", file=sys.stderr, flush=True)
        held.acquire()
    try:
        scratch.mkdir(exist_ok=True)
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        held.release()


def _write(cache: Path, scratch: Path, content: dict) -> None:
    partial = scratch / f"{os.getpid()}.pt"
    try:
        with open(partial, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())                             # before it gets its name, or a power cut leaves an empty cache
    except RuntimeError as e:                                   # torch.save's own, for any error of the file
        cause = e.__context__
        raise OSError(*cause.args) if isinstance(cause, OSError) else OSError(" ".join(str(e).split())) from e
    os.replace(partial, cache)                                  # a reader sees the whole file or none


def _read(name: str, cache: Path) -> Dataset:
    remedy = "delete it, and the next run downloads it again"
    content = _content(cache, remedy)
    wrong = _fault(content, 32, CIFAR[name])
    if wrong:
        raise DataError(f"{cache} does not hold {name}: {wrong}; {remedy}")
    return Dataset(**content)


def _content(cache: Path, remedy: str):
    with open(cache, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:              # torch writes checksums, and reads without looking at them
                changed = archive.testzip()
            if changed:
                raise zipfile.BadZipFile(f"wrong checksum of {changed}")
            file.seek(0)
            return torch.load(file, weights_only=True, map_location="cpu")
        except (zipfile.BadZipFile, zlib.error, pickle.UnpicklingError, struct.error, OSError, RuntimeError, EOFError,
                ValueError, LookupError, TypeError, AttributeError, AssertionError) as e:      # as garbage makes them stumble
            raise DataError(f"{cache} is damaged or no data set at all ({type(e).__name__}); {remedy}") from e


def _fault(content: object, size: int, known: Known | None = None, files: list[str] | None = None) -> str | None:
    """What disqualifies the content of a cache, or None. `known`: what it claims to be. `files`: the test images' names."""
    if not isinstance(content, dict) or set(content) != set(Dataset._fields):
        return f"it must be a dict of {', '.join(Dataset._fields)}"
    classes = content["classes"]
    if not isinstance(classes, list) or not all(isinstance(c, str) for c in classes):
        return "classes must be a list of names"
    if known and len(classes) != len(known.classes):
        return f"it has {len(classes)} classes, {_some(classes)}"
    for i, right in enumerate(known.classes if known else ()):
        if classes[i] != right:
            return f"its class {i} is called {_some(classes[i:i + 1])}, not {right}"
    for part in ("train", "test"):
        images, labels = content[f"{part}_images"], content[f"{part}_labels"]
        if not (_plain(images, torch.uint8) and images.shape[1:] == (3, size, size)):
            return f"{part}_images must be uint8 of shape (N, 3, {size}, {size})"
        if not (_plain(labels, torch.int64) and labels.shape == images.shape[:1]):
            return f"{part}_labels must be int64 of shape (N,), one for each image"
        if len(labels) == 0 or labels.min() < 0 or labels.max() >= len(classes):
            return f"{part}_labels must be from 0 to {len(classes) - 1}"
        if len(images) > 1 and torch.equal(images.amin(0), images.amax(0)):
            return f"its {len(images)} {part} images are all the same"
        most = labels.bincount().max()
        if known and most > known.most[part]:                   # CIFAR-10's images in CIFAR-100's place are ten times as many
            return f"it has {most} {part} images of one class, of {known.most[part]} that there are"
    return _leak(content["train_images"], content["test_images"], files)


def _plain(tensor: object, dtype: torch.dtype) -> bool:
    return (isinstance(tensor, Tensor) and tensor.dtype == dtype and tensor.layout == torch.strided
            and tensor.device.type == "cpu")


def _leak(train: Tensor, test: Tensor, files: list[str] | None) -> str | None:
    """Too many test images that are training images as well, compared exactly: the loops are C's, and take 0.1 s for CIFAR."""
    tested = list(map(bytes, test.numpy()))
    both = set(tested).intersection(map(bytes, train.numpy()))
    found = [i for i, image in enumerate(tested) if image in both]
    if len(found) <= SHARED * len(tested):
        return None
    return (f"{len(found)} of its {len(tested)} test images are training images too, bit for bit: "
            + _some([files[i] if files else f"number {i}" for i in found]))


# ---- a folder of images ----------------------------------------------------------------------------------------

def image_folder(folder: Path, size: int = 32) -> Dataset:
    """The images of folder/train and folder/test (or val), their shorter side resized to `size`, the middle cut out.

    Classes are in alphabetical order; the images of each part in the order of the last number in their names, then of class,
    so that the first N are of all classes. What is hidden (.ipynb_checkpoints) is left out; files of other types are counted
    on stderr. The images are decoded once, while other processes wait, and kept beside the folder, in <folder>.<size>.pt,
    which is made anew when a file of the folder has changed. Raises DataError naming what is wrong with the folder.
    """
    classes, files = _listing(folder)
    stamp = hashlib.sha256(b"2")                                # raised when the same files are decoded otherwise
    for path, label in (file for part in files for file in part):
        stat = path.stat()
        stamp.update(f"{path.relative_to(folder)} {label} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    resolved = folder.resolve()
    cache = resolved.with_name(f"{resolved.name}.{size}.pt")

    def kept() -> Dataset | None:
        content = _content(cache, "delete it, and it is made again") if cache.exists() else None
        if not isinstance(content, dict) or content.pop("stamp", None) != stamp.hexdigest():
            return None
        wrong = _fault(content, size)
        if wrong:
            raise DataError(f"{cache} is not what it should be: {wrong}; delete it, and it is made again")
        return Dataset(**content)

    def made() -> Dataset:
        dataset = Dataset(*_decode(folder, files[0], size), *_decode(folder, files[1], size), classes)
        wrong = _fault(dataset._asdict(), size, files=[str(path.relative_to(folder)) for path, _ in files[1]])
        if wrong:
            raise DataError(f"{folder} is no data set to learn from: {wrong}")
        return dataset

    dataset = kept()
    if dataset:
        return dataset
    try:
        with _alone(cache) as scratch:
            dataset = kept()                                    # by a process that had the lock before, if it is there now
            if not dataset:
                dataset = made()
                _write(cache, scratch, {**dataset._asdict(), "stamp": stamp.hexdigest()})
    except OSError as e:
        warnings.warn(f"cannot keep the decoded images in {cache}: {e.strerror or e}; the next run decodes them again",
                      stacklevel=2)
    return dataset or made()


def _listing(folder: Path) -> tuple[list[str], list[list[tuple[Path, int]]]]:
    """(classes, [training files, test files]), each file with its label."""
    from torchvision.datasets import folder as layout           # takes seconds to import and is needed only here
    skipped, broken = Counter[str](), list[str]()

    def visible(path: str | os.PathLike) -> bool:
        relative = Path(path).relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        if not hidden and not os.path.exists(path):
            broken.append(str(relative))
        return not hidden

    def usable(path: str) -> bool:
        image = path.lower().endswith(layout.IMG_EXTENSIONS)
        if visible(path) and not image:
            skipped[Path(path).suffix.lower() or "without extension"] += 1
        return visible(path) and image

    def labelled(part: Path) -> list[str]:
        return sorted(entry.name for entry in os.scandir(part) if visible(entry) and entry.is_dir())

    if not folder.is_dir():
        raise DataError(f"unknown data set {str(folder)!r}: choose from {', '.join(NAMES)}, or a folder of images with train/ "
                        "and test/ (or val/) in it, and there a folder for each class")
    annotations = folder / "val" / "val_annotations.txt"        # Tiny ImageNet: its test/ has no labels
    train, test = folder / "train", folder / ("test" if (folder / "test").is_dir() and not annotations.exists() else "val")
    for part in (train, test):
        if not part.is_dir():
            raise DataError(f"{folder} has no folder {part.name}/: a data set needs train/ and test/ (or val/), and there a "
                            "folder for each class")
    classes = labelled(train)
    if len(classes) < 2:
        raise DataError(f"{train} has {f'one class only, {classes[0]}' if classes else 'no folder of a class'}: there is "
                        "nothing to tell apart")
    index = {name: label for label, name in enumerate(classes)}
    files = [layout.make_dataset(train, index, is_valid_file=usable, allow_empty=True)]
    if annotations.exists():
        rows = [line.split("\t")[:2] for line in annotations.read_text().splitlines()]
        named = sorted({name for _, name in rows})
        files += [[(path, index.get(name, -1)) for file, name in rows if usable(path := str(test / "images" / file))]]
    else:
        named = labelled(test)
        files += [layout.make_dataset(test, index, is_valid_file=usable, allow_empty=True)]
    types = ", ".join(layout.IMG_EXTENSIONS)
    if broken:
        raise DataError(f"{folder} holds links to files that are not there: {_some(sorted(set(broken)))}; mend or delete them")
    if skipped:
        counts = ", ".join(f"{skipped[end]} {end}" for end in sorted(skipped, key=lambda end: (-skipped[end], end)))
        print(f"{folder}: files that are left out: {counts}; images are {types}", file=sys.stderr)
    if unknown := [name for name in named if name not in index]:
        raise DataError(f"{test} has classes that {train} lacks: {_some(unknown)}")
    if empty := [name for name in classes if index[name] not in {label for _, label in files[0]}]:
        raise DataError(f"{train} is no training set: it holds no images ({types}) of {_some(empty)}")
    if not files[1]:
        raise DataError(f"{test} holds no images ({types}) in folders named like those of train/")

    def place(file: tuple[Path, int]) -> tuple:
        numbers = re.findall(r"\d+", file[0].stem)
        return int(numbers[-1]) if numbers else -1, file[1], str(file[0])

    return classes, [sorted(((Path(path), label) for path, label in part), key=place) for part in files]


def _decode(folder: Path, files: list[tuple[Path, int]], size: int) -> tuple[Tensor, Tensor]:
    import numpy
    from PIL import Image
    from torchvision.transforms import functional as vision
    images, unreadable = torch.empty(len(files), 3, size, size, dtype=torch.uint8), []

    def decode(i: int) -> None:
        try:
            with Image.open(files[i][0]) as image:
                if image.mode in ("I", "F"):                    # of any range, so that no scale is right
                    unreadable.append(f"{files[i][0].relative_to(folder)} (its mode is {image.mode})")
                    return
                if image.mode.startswith("I;16"):               # which convert() would cut off at 255
                    image = Image.fromarray((numpy.asarray(image) // 256).astype("uint8"))
                image = vision.center_crop(vision.resize(image.convert("RGB"), size), size)
            images[i] = vision.pil_to_tensor(image)
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError):
            unreadable.append(str(files[i][0].relative_to(folder)))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(tqdm(pool.map(decode, range(len(files))), "decoding", len(files), leave=False, disable=None, unit="image"))
    if unreadable:
        raise DataError(f"{folder} holds files that cannot be read as images: {_some(sorted(unreadable))}; mend or delete them")
    return images, torch.tensor([label for _, label in files])


def _some(names: list[str]) -> str:
    names = [name if name.isprintable() else ascii(name) for name in names]     # a line stays one line
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


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


def augment(images: Tensor, generator: torch.Generator, flip: bool = True, pad: int = 4,
            of: tuple[int, slice] | None = None) -> Tensor:
    """Move each image by up to `pad` pixels each way (black comes in) and mirror half of them, left to right.

    (N, C, H, W) in, the same shape and dtype out, in channels_last memory. `generator` is on the images' device.
    `of` = (count, part) says that these images are a part of so many, for which the random numbers are drawn.
    """
    n, _, height, width = images.shape
    count, part = of or (n, slice(None))
    device = images.device
    padded = F.pad(images, (pad,) * 4)
    top, left = torch.randint(2 * pad + 1, (2, count, 1), generator=generator, device=device)[:, part]
    rows = top + torch.arange(height, device=device)                                # (n, H)
    columns = left + torch.arange(width, device=device)                             # (n, W)
    if flip:
        mirror = torch.rand(count, 1, generator=generator, device=device)[part] < 0.5
        columns = torch.where(mirror, columns.flip(1), columns)
    each = torch.arange(n, device=device)[:, None, None]
    crops = padded.permute(0, 2, 3, 1)[each, rows[:, :, None], columns[:, None, :]]      # (n, H, W, C)
    return crops.permute(0, 3, 1, 2)


def indices(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """One epoch in random order: which of `count` images are in each batch of `size`, on the generator's device.

    A last, smaller batch is left out, as its gradient would be noisier; with fewer images than `size`, they are one batch.
    """
    order = torch.randperm(count, generator=generator, device=generator.device)
    for step in range(steps(count, size)):
        yield order[step * size:(step + 1) * size]


def batch(images: Tensor, labels: Tensor, chosen: Tensor, generator: torch.Generator, flip: bool = True,
          share: tuple[int, int] = (0, 1)) -> tuple[Tensor, Tensor]:
    """The chosen images, augmented, and their labels.

    share = (k, n) gives the k-th of n equal parts of the batch, as one of n processes needs it.
    """
    k, n = share
    part = slice(k * (len(chosen) // n), (k + 1) * (len(chosen) // n))
    mine = chosen[part]
    return augment(images[mine], generator, flip, of=(len(chosen), part)), labels[mine]


def batches(images: Tensor, labels: Tensor, size: int, generator: torch.Generator,
            flip: bool = True) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch: (uint8 images, labels) of `size` each, in random order, augmented."""
    for chosen in indices(len(images), size, generator):
        yield batch(images, labels, chosen, generator, flip)


def steps(images: int, size: int) -> int:
    """Batches in an epoch."""
    return max(1, images // size)
