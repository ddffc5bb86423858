"""Turns a folder of the user's images into tensors.

The layout is that of torchvision's ImageFolder: `train/CLASS/...` and `test/CLASS/...` (or `val/`, also as
Tiny ImageNet unpacks). The images are decoded once, while other processes wait, and kept beside the folder in
`<folder>.<size>.pt`, which is made anew when a file of the folder has changed.
"""
from __future__ import annotations

import hashlib
import os
import re
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from harness import files
from harness.cache import fault, some

Files = list[tuple[Path, int]]      # each with its label


def images(folder: str | os.PathLike, size: int = 32) -> dict:
    """The five fields (see harness/cache.py), each image resized by its shorter side and cut to a square.

    Classes are in alphabetical order. The images of each part are in the order of the last number in their
    names, then of class, so that the first N are of all classes. Raises files.Problem naming what is wrong.
    """
    folder = Path(folder)
    classes, train, test = _listing(folder)
    stamp = _stamp(folder, train + test)
    path = folder.resolve()
    path = path.with_name(f"{path.name}.{size}.pt")
    names = [str(file.relative_to(folder)) for file, _ in test]

    def kept() -> dict | None:
        remedy = "delete it, and it is made again"
        content = files.read(path, remedy) if path.exists() else None
        if not isinstance(content, dict) or content.pop("stamp", None) != stamp:
            return None
        wrong = fault(content, size, test_names=names)
        if wrong:
            raise files.Problem(f"{path} is not what it should be: {wrong}; {remedy}")
        return content

    def made() -> dict:
        content = {"classes": classes}
        content["train_images"], content["train_labels"] = _decode(folder, train, size)
        content["test_images"], content["test_labels"] = _decode(folder, test, size)
        wrong = fault(content, size, test_names=names)
        if wrong:
            raise files.Problem(f"{folder} is no data set to learn from: {wrong}")
        return content

    content = kept()
    if content:
        return content
    try:
        with files.lock(path):
            content = kept()                                    # another process may have made it meanwhile
            if not content:
                content = made()
                _keep(path, {**content, "stamp": stamp})
            return content
    except OSError as e:                                    # such as a folder that only others may write to
        reason = e.strerror or e
        print(f"cannot lock {path}: {reason}; the next run decodes the images again", file=sys.stderr)
    return made()


def _keep(path: Path, content: dict) -> None:
    try:
        files.write_tensors(path, content)
    except files.Problem as e:
        print(f"{e}; the next run decodes the images again", file=sys.stderr)


def _stamp(folder: Path, listed: Files) -> str:
    """Size and time of change stand for the content: 100,000 files are not read again for every run."""
    stamp = hashlib.sha256(b"2")                            # raised when the same files are decoded otherwise
    for path, label in listed:
        try:
            stat = path.stat()
        except OSError as e:
            raise files.Problem(f"cannot read {path}: {e.strerror or e}; mend or delete it") from e
        stamp.update(f"{path.relative_to(folder)} {label} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return stamp.hexdigest()


def _listing(folder: Path) -> tuple[list[str], Files, Files]:
    """(classes, training files, test files). What is hidden is left out; files of other types are counted."""
    from torchvision.datasets import ImageFolder            # takes seconds to import and is needed only here
    from torchvision.datasets.folder import IMG_EXTENSIONS
    skipped, types = Counter[str](), ", ".join(IMG_EXTENSIONS)

    def usable(path: str) -> bool:
        if any(part.startswith(".") for part in Path(path).relative_to(folder).parts):
            return False                                        # such as what a Mac leaves beside each image
        image = path.lower().endswith(IMG_EXTENSIONS)
        if not image:
            skipped[Path(path).suffix.lower() or "without extension"] += 1
        return image

    class Visible(ImageFolder):
        def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
            names = [name for name in super().find_classes(directory)[0] if not name.startswith(".")]
            return names, {name: label for label, name in enumerate(names)}

    annotations = folder / "val" / "val_annotations.txt"        # Tiny ImageNet, whose test/ has no labels
    named: list[tuple[str, str]] = []                           # (test image, name of its class)
    try:
        train = Visible(folder / "train", is_valid_file=usable)
        if annotations.exists():
            rows = [line.split("\t")[:2] for line in annotations.read_text().splitlines()]
            named = [(str(folder / "val" / "images" / file), name) for file, name in rows]
        else:
            part = folder / ("test" if (folder / "test").is_dir() else "val")
            test = Visible(part, is_valid_file=usable, allow_empty=True)
            named = [(path, test.classes[label]) for path, label in test.samples]
    except (OSError, ValueError) as e:
        raise files.Problem(f"{folder} is no data set: {e}; expected train/ and test/ (or val/) in it, and "
                            f"in each a folder of images ({types}) for each class") from e
    if skipped:
        counts = ", ".join(f"{count} {end}" for end, count in skipped.most_common())
        print(f"{folder}: files that are left out: {counts}; images are {types}", file=sys.stderr)
    if len(train.classes) < 2:
        only = some(train.classes)
        raise files.Problem(f"{folder}/train has one class only, {only}: there is nothing to tell apart")
    unknown = sorted({name for _, name in named} - set(train.classes))
    if unknown:
        raise files.Problem(f"the test images of {folder} are of classes that train/ lacks: {some(unknown)}")
    if not named:
        raise files.Problem(f"{folder} has no images to test on in folders named like those of train/")

    def place(file: tuple[Path, int]) -> tuple:
        numbers = re.findall(r"\d+", file[0].stem)
        return int(numbers[-1]) if numbers else -1, file[1], str(file[0])

    labelled = [(path, train.class_to_idx[name]) for path, name in named]
    first, second = (sorted(((Path(path), label) for path, label in part), key=place)
                     for part in (train.samples, labelled))
    return train.classes, first, second


def _decode(folder: Path, listed: Files, size: int) -> tuple[Tensor, Tensor]:
    import numpy
    from PIL import Image
    from torchvision.transforms import functional as vision
    decoded, unreadable = torch.empty(len(listed), 3, size, size, dtype=torch.uint8), []

    def decode(i: int) -> None:
        name = str(listed[i][0].relative_to(folder))
        try:
            with Image.open(listed[i][0]) as image:
                if image.mode in ("I", "F"):                    # of any range, so that no scale is right
                    unreadable.append(f"{name} (its mode is {image.mode})")
                    return
                if image.mode.startswith("I;16"):               # which convert() would cut off at 255
                    image = Image.fromarray((numpy.asarray(image) // 256).astype("uint8"))
                image = vision.center_crop(vision.resize(image.convert("RGB"), size), size)
            decoded[i] = vision.pil_to_tensor(image)
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError):
            unreadable.append(name)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = pool.map(decode, range(len(listed)))
        list(tqdm(done, "decoding", len(listed), leave=False, disable=None, unit="image"))
    if unreadable:
        names = some(sorted(unreadable))
        raise files.Problem(f"{folder} holds files that cannot be read as images: {names}; mend or "
                            "delete them")
    return decoded, torch.tensor([label for _, label in listed])
