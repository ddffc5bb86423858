"""Spares the reader the download, the checks and the storage of CIFAR-10 and CIFAR-100.

torchvision, which knows the checksums, downloads CIFAR once into `root`; processes started together wait for
the first. An official archive that is there already is used. The images are then kept as `root/<name>.pt`:

    torch.save({"train_images": uint8 (N, 3, 32, 32), "train_labels": int64 (N,),
                "test_images":  uint8 (M, 3, 32, 32), "test_labels":  int64 (M,), "classes": [str, ...]})

Later runs read that file, check it, and need no network. It may also hold only some of the images.

A result is worth no more than its data, so what is read is checked: every label is a class, no class has more
images than the official set, and next to no test image is among the training images.
"""
from __future__ import annotations

import hashlib
import http.client
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from harness import files

FIELDS = ("train_images", "train_labels", "test_images", "test_labels", "classes")


class Known(NamedTuple):
    classes: int            # how many
    train: int              # official training images of each class
    test: int


CIFAR = {"cifar10": Known(10, 5000, 1000), "cifar100": Known(100, 500, 100)}

# The share of test images that may also be training images, bit for bit. CIFAR-100 itself has 10 in 10,000.
# Up to a hundredth, they move a test accuracy by at most one point.
SHARED = 0.01


def cifar(name: str, root: str | os.PathLike = "data") -> dict:
    """The five fields of "cifar10" or "cifar100", in an order that depends on nothing but the images
    themselves.

    So the first N training images are the same N everywhere, whatever copy they came from. Raises
    files.Problem for a download that fails, a file that cannot be written, is damaged, or holds something
    else.
    """
    path = Path(root) / f"{name}.pt"
    if not path.exists():                                   # once it is there it is whole, and needs no lock
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with files.lock(path):
                if not path.exists():                           # another process may have made it meanwhile
                    files.write_tensors(path, _official(name, path.parent))
        except OSError as e:
            reason = e.strerror or e
            raise files.Problem(f"cannot use {path}: {reason}; choose another folder for the data") from e
    remedy = "delete it, and the next run makes it again"
    content = files.read(path, remedy)
    wrong = fault(content, 32, CIFAR[name])
    if wrong:
        raise files.Problem(f"{path} does not hold {name}: {wrong}; {remedy}")
    assert isinstance(content, dict)                            # or there would be a fault
    whole = CIFAR[name].train * CIFAR[name].classes
    if len(content["train_labels"]) < whole:
        print(f"{path} holds {len(content['train_labels']):,} of the {whole:,} training images of {name}",
              file=sys.stderr)
    return _sorted(content)


def _official(name: str, root: Path) -> dict:
    """torchvision compares MD5s: that of the archive, then that of each file in it before it is unpickled."""
    from torchvision import datasets                        # takes seconds to import and is needed only here
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(60)                                # a server that stalls must not hang the run
    try:
        train, test = kind(root, train=True, download=True), kind(root, train=False)
    except (OSError, http.client.HTTPException, RuntimeError) as e:
        reason = str(e) or type(e).__name__
        raise files.Problem(f"cannot download {name} from {kind.url}: {reason}; run the same command again "
                            f"later, or put {kind.filename} or {name}.pt into {root}") from e
    finally:
        socket.setdefaulttimeout(timeout)
    content = {"classes": list(train.classes)}
    for part, images in (("train", train), ("test", test)):
        content[f"{part}_images"] = torch.from_numpy(images.data).permute(0, 3, 1, 2).contiguous()
        content[f"{part}_labels"] = torch.tensor(images.targets)
    wrong = fault(content, 32, CIFAR[name])
    if wrong:
        raise files.Problem(f"what {kind.url} sends is not {name}: {wrong}; put {name}.pt into {root}")
    return content


def _sorted(content: dict) -> dict:
    """The same images by a digest of each one's bytes, ties by label."""
    content = dict(content)
    for part in ("train", "test"):
        images, labels = content[f"{part}_images"], content[f"{part}_labels"]
        keys = [(hashlib.sha256(image).digest(), label)
                for image, label in zip(images.contiguous().numpy(), labels.tolist())]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        content[f"{part}_images"], content[f"{part}_labels"] = images[order], labels[order]
    return content


# ---- what images must be -----------------------------------------------------------------------------------

def fault(content: object, size: int, known: Known | None = None,
          test_names: list[str] | None = None) -> str | None:
    """What disqualifies the content of a file, or None. `known` is what it claims to be."""
    if not isinstance(content, dict) or set(content) != set(FIELDS):
        return f"it must be a dict of {', '.join(FIELDS)}"
    classes = content["classes"]
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        return "classes must be a list of names"
    if known and len(classes) != known.classes:
        return f"it has {len(classes)} classes, {some(classes)}"
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
        if known and most > getattr(known, part):   # CIFAR-10 in CIFAR-100's place has ten times as many
            return f"it has {most} {part} images of one class, of {getattr(known, part)} that there are"
    return _leak(content["train_images"], content["test_images"], test_names)


def digest(dataset: Any) -> str:
    """16 hexadecimal digits for the images, labels and class names together, the same on every machine.

    Any changed byte changes them, and so does another order: a run that goes on can see that it has the data
    it began with.
    """
    shapes = [list(part.shape) for part in dataset[:4]]
    state = hashlib.blake2b(json.dumps([shapes, dataset.classes]).encode(), digest_size=8)
    for part in dataset[:4]:
        array = part.cpu().contiguous().numpy()
        state.update(array.astype(array.dtype.newbyteorder("<"), copy=False))
    return state.hexdigest()


def _plain(tensor: object, dtype: torch.dtype) -> bool:
    return (isinstance(tensor, Tensor) and tensor.dtype == dtype and tensor.layout == torch.strided
            and tensor.device.type == "cpu")


def _leak(train: Tensor, test: Tensor, names: list[str] | None) -> str | None:
    """Too many test images that are training images as well, compared byte by byte."""
    tested = list(map(bytes, test.numpy()))
    both = set(tested).intersection(map(bytes, train.numpy()))
    found = [i for i, image in enumerate(tested) if image in both]
    if len(found) <= SHARED * len(tested):
        return None
    return (f"{len(found)} of its {len(tested)} test images are training images too, bit for bit: "
            + some([names[i] if names else f"number {i}" for i in found]))


def some(names: list[str]) -> str:
    """The first of these names, on one line whatever is in them."""
    names = [name if name.isprintable() else ascii(name) for name in names]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
