"""harness/cache.py: CIFAR is downloaded once and verified, kept whole, and in one order; a cache that holds
anything else is refused. The digest of a data set sees every byte. torchvision really downloads, an archive
of made images from this machine."""
import errno
import fcntl
import functools
import hashlib
import http.server
import io
import os
import pickle
import shutil
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from test_data import NAMES, good, pictures
from test_files import RunsCode

import data
from harness import cache, files

CIFAR100 = torchvision.datasets.CIFAR100


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


class Archive:
    """A CIFAR-100 archive, served on 127.0.0.1 and known to torchvision by its checksums."""

    def __init__(self, folder: Path):
        handler = functools.partial(Handler, directory=folder)
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        generator = np.random.default_rng(0)
        self.pixels, self.members = {}, {"meta": pickle.dumps({"fine_label_names": NAMES})}
        for part, n in (("train", 20), ("test", 10)):
            self.pixels[part] = generator.integers(0, 256, (n, 3072), dtype=np.uint8)
            self.members[part] = pickle.dumps({"data": self.pixels[part], "fine_labels": list(range(n))})
        self.path = folder / "cifar-100-python.tar.gz"

    def pack(self, monkeypatch, **members: bytes) -> None:
        """Write the archive, with these members in place of the right ones."""
        members = {**self.members, **members}
        with tarfile.open(self.path, "w:gz") as tar:
            for name, raw in members.items():
                info = tarfile.TarInfo(f"cifar-100-python/{name}")
                info.size = len(raw)
                tar.addfile(info, io.BytesIO(raw))
        md5 = {name: hashlib.md5(raw).hexdigest() for name, raw in members.items()}
        known = {"url": f"http://127.0.0.1:{self.server.server_port}/{self.path.name}",
                 "tgz_md5": hashlib.md5(self.path.read_bytes()).hexdigest(),
                 "train_list": [["train", md5["train"]]], "test_list": [["test", md5["test"]]],
                 "meta": {"filename": "meta", "key": "fine_label_names", "md5": md5["meta"]}}
        for key, value in known.items():
            monkeypatch.setattr(CIFAR100, key, value)


@pytest.fixture
def archive(tmp_path, monkeypatch):
    (tmp_path / "server").mkdir()
    made = Archive(tmp_path / "server")
    made.pack(monkeypatch)
    yield made
    made.server.shutdown()
    made.server.server_close()


def load(root):
    return cache.cifar("cifar100", root)


def failing(root, why):
    with pytest.raises(files.Problem, match=why) as caught:
        load(root)
    return str(caught.value)


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
        for key, value in one.items())


def listing(folder):
    """Of all files but the locks, which are empty and may stay."""
    paths = [path for path in folder.rglob("*") if not path.name.endswith(".lock")]
    return sorted(str(path.relative_to(folder)) for path in paths)


# What a download leaves; torchvision's own files may serve other programs too.
BESIDE = ["cifar-100-python", "cifar-100-python.tar.gz",
          *(f"cifar-100-python/{name}" for name in ("meta", "test", "train")), "cifar100.pt"]


def digests(images):
    return [hashlib.sha256(image.tobytes()).digest() for image in images]


def test_download_then_cache_then_no_network(archive, tmp_path):
    root = tmp_path / "new" / "data"
    first = load(root)
    assert listing(root) == BESIDE
    for part in ("train", "test"):
        pixels, labels = archive.pixels[part], first[f"{part}_labels"]
        order = sorted(range(len(pixels)), key=digests(pixels).__getitem__)  # the i-th image has the label i
        assert labels.tolist() == order and labels.dtype == torch.int64
        assert torch.equal(first[f"{part}_images"], torch.from_numpy(pixels[order]).view(-1, 3, 32, 32))
    assert first["classes"] == NAMES and first["train_images"].dtype == torch.uint8
    shutil.rmtree(root / "cifar-100-python")
    (root / archive.path.name).unlink()
    archive.path.unlink()
    assert same(first, load(root))


def test_the_order_depends_on_the_images_alone(tmp_path):
    """Any shuffle of a set, ties among its images included, is one data set; and labels go with their
    images."""
    content = {**good(), "train_images": pictures(40), "train_labels": torch.arange(40)}
    content["train_images"][5] = content["train_images"][30]    # bit for bit the same, under two labels
    first = None
    for seed in range(4):
        order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
        test = [seed % 2, 1 - seed % 2]
        torch.save({**content, "train_images": content["train_images"][order],
                    "train_labels": content["train_labels"][order],
                    "test_images": content["test_images"][test], "test_labels": content["test_labels"][test]},
                   tmp_path / "cifar100.pt")
        got = load(tmp_path)
        first = first or got
        assert same(got, first)
        assert torch.equal(got["train_images"], content["train_images"][got["train_labels"]])


def at_once(work, module, name, monkeypatch):
    """What work() gives in two threads, and how often it calls module.name, where the first is held until
    the second waits for the lock."""
    began, waits, go_on = threading.Event(), threading.Event(), threading.Event()
    calls, real = [], getattr(module, name)

    def slow(*args):
        calls.append(args)
        began.set()
        go_on.wait(60)
        return real(*args)

    class Lock(files.FileLock):
        def __enter__(self):
            waits.set()
            return super().__enter__()

    monkeypatch.setattr(module, name, slow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(work)
        came = began.wait(60)
        monkeypatch.setattr(files, "FileLock", Lock)
        second = pool.submit(work)
        came = waits.wait(60) and came
        go_on.set()
    assert came
    return first.result(), second.result(), len(calls)


def test_one_downloads_and_the_other_waits(archive, tmp_path, monkeypatch):
    first, second, downloads = at_once(lambda: load(tmp_path / "data"), cache, "_official", monkeypatch)
    assert same(first, second) and downloads == 1 and listing(tmp_path / "data") == BESIDE


def test_what_is_stopped_while_it_writes_leaves_nothing_half(archive, tmp_path, monkeypatch):
    def save(content, file):
        file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", save)
        load(tmp_path / "data")
    assert listing(tmp_path / "data") == BESIDE[:-1]
    archive.path.unlink()                                       # what is verified stays
    load(tmp_path / "data")


def test_a_bad_download_is_refused_and_the_next_run_tries_again(archive, tmp_path):
    raw = archive.path.read_bytes()
    for bad in (raw[:-1] + b"?", raw[:5000], None):
        archive.path.unlink() if bad is None else archive.path.write_bytes(bad)
        message = failing(tmp_path / "data", "cannot download cifar100 from http://127.0.0.1")
        assert "or put cifar-100-python.tar.gz or cifar100.pt into " in message
        assert not (tmp_path / "data" / "cifar100.pt").exists()
    archive.path.write_bytes(raw)
    assert len(load(tmp_path / "data")["train_images"]) == 20


@pytest.mark.parametrize("what", ["cifar-100-python.tar.gz", "cifar-100-python/train"])
def test_an_official_copy_that_lies_there_is_used_and_a_damaged_one_is_not_opened(archive, tmp_path, what):
    root, marker = tmp_path / "data", tmp_path / "marker"
    expected = load(root)
    away = archive.path.rename(tmp_path / "away")
    (root / "cifar100.pt").unlink()
    if what == archive.path.name:
        shutil.rmtree(root / "cifar-100-python")
    else:
        (root / archive.path.name).unlink()
    assert same(load(root), expected)
    (root / "cifar100.pt").unlink()
    (root / what).write_bytes(pickle.dumps(RunsCode(marker)))
    if what == archive.path.name:
        shutil.rmtree(root / "cifar-100-python")
    away.rename(archive.path)
    assert same(load(root), expected) and not marker.exists()


def test_a_cache_is_read_where_nothing_can_be_written_or_locked(archive, tmp_path, monkeypatch):
    root = tmp_path / "data"
    expected = load(root)

    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with monkeypatch.context() as patch:
        patch.setattr(files, "FileLock", None)
        assert same(load(root), expected)
    failing(tmp_path / "new" / "data", "cannot use .*cifar100.pt: No locks available; choose another folder")


def test_a_download_is_checked_like_a_cache(archive, tmp_path, monkeypatch):
    content = {"data": archive.pixels["train"][:10], "fine_labels": list(range(10))}
    archive.pack(monkeypatch, test=pickle.dumps(content))
    failing(tmp_path / "data", "10 of its 10 test images are training images too")
    assert not (tmp_path / "data" / "cifar100.pt").exists()


# ---- what a cache may hold ---------------------------------------------------------------------------------

def twice(c, count):
    """`count` of 200 test images are training images."""
    test = pictures(200, 2)
    test[5:5 + count] = c["train_images"][:count]
    return {**c, "test_images": test, "test_labels": torch.arange(200) % 100}


def of_one_class(c, count):
    return {**c, "train_images": pictures(count, 3), "train_labels": torch.full((count,), 7)}


WRONG = {
    "no dict": (lambda c: [1, 2], "must be a dict"),
    "classes no list": (lambda c: {**c, "classes": "apple"}, "must be a list of names"),
    "a class no text": (lambda c: {**c, "classes": [*range(100)]}, "must be a list of names"),
    "no tensor": (lambda c: {**c, "test_images": None}, "must be uint8"),
    "no images": (lambda c: {**c, "test_images": c["test_images"][:0], "test_labels": c["test_labels"][:0]},
                  "from 0 to 99"),
    "a key too many": (lambda c: {**c, "extra": 1}, "must be a dict"),
    "float images": (lambda c: {**c, "train_images": c["train_images"].float()}, "must be uint8"),
    "other size": (lambda c: {**c, "test_images": c["test_images"][..., 4:, 4:]}, "must be uint8"),
    "sparse images": (lambda c: {**c, "test_images": c["test_images"].to_sparse()}, "must be uint8"),
    "images without memory": (lambda c: {**c, "test_images": c["test_images"].to("meta")}, "must be uint8"),
    "a label missing": (lambda c: {**c, "train_labels": c["train_labels"][1:]}, "one for each image"),
    "label too large": (lambda c: {**c, "test_labels": torch.tensor([0, 100])}, "from 0 to 99"),
    "negative label": (lambda c: {**c, "test_labels": torch.tensor([0, -1])}, "from 0 to 99"),
    "cifar10": (lambda c: {**c, "classes": ["cat\nfish", *"abcdefghi"]},
                r"has 10 classes, 'cat\nfish', a, b, c, d and 5 more"),
    "all black": (lambda c: {**c, "train_images": c["train_images"] * 0}, "images are all the same"),
    "too many of a class": (lambda c: of_one_class(c, 501),
                            "it has 501 train images of one class, of 500"),
    "test images trained on": (lambda c: twice(c, 3),
                               "3 of its 200 test images are training images too, bit for bit: number 5, "
                               "number 6, number 7;"),
}


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize("wrong", WRONG)
def test_a_cache_of_something_else_is_refused_and_kept(tmp_path, wrong):
    change, said = WRONG[wrong]
    torch.save(change(good()), tmp_path / "cifar100.pt")
    raw = (tmp_path / "cifar100.pt").read_bytes()
    message = failing(tmp_path, "does not hold cifar100")
    assert said in message and "delete it" in message
    assert (tmp_path / "cifar100.pt").read_bytes() == raw


def test_a_cache_of_a_part_of_the_set_is_read_and_said_to_be_one(tmp_path, monkeypatch, capsys):
    """CIFAR-100 itself has one test image in a thousand among its training images."""
    path = tmp_path / "cifar100.pt"
    for content in (twice(good(), 2), of_one_class(good(), 500)):
        torch.save(content, path)
        load(tmp_path)
        count = len(content["train_labels"])
        assert capsys.readouterr().err == f"{path} holds {count} of the 50,000 training images of cifar100\n"
    monkeypatch.setitem(cache.CIFAR, "cifar100", cache.Known(classes=100, train=1, test=100))
    torch.save({**good(), "train_images": pictures(100), "train_labels": torch.arange(100)}, path)
    load(tmp_path)
    assert capsys.readouterr().err == ""                        # all that there are


PINNED = "b621c4a1608ed547"


def test_the_digest_changes_with_anything_and_is_the_same_everywhere():
    def dataset():
        labels = torch.arange(4) % 2
        images = torch.arange(4 * 48).view(4, 3, 4, 4).to(torch.uint8)
        return data.Dataset(images, labels, images[:2] + 1, labels[:2].clone(), ["ant", "bee"])

    first = dataset()
    assert cache.digest(first) == PINNED
    reordered = first.train_images.contiguous(memory_format=torch.channels_last)
    assert cache.digest(first._replace(train_images=reordered)) == PINNED
    others = {PINNED}
    for part in data.Dataset._fields[:4]:
        for at in (0, -1):
            changed = dataset()
            getattr(changed, part).view(-1)[at] ^= 1
            others.add(cache.digest(changed))
    for classes in (["ant", "bea"], ["antb", "ee"], ["bee", "ant"]):
        others.add(cache.digest(first._replace(classes=classes)))
    others.add(cache.digest(first._replace(train_images=first.train_images.view(4, 3, 2, 8))))
    assert len(others) == 1 + 8 + 3 + 1
