"""harness/cache.py: CIFAR is downloaded once and verified, kept whole, and in one order; a cache that holds
anything else is refused. The downloads are torchvision's real ones, from a server on this machine."""
import contextlib
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

from harness import cache, files

COUNTS = {"train": 20, "test": 10}
CIFAR100 = torchvision.datasets.CIFAR100


class Handler(http.server.SimpleHTTPRequestHandler):
    """Sends a file in two halves, so that a test can stop in between. torchvision asks twice, first for
    redirections."""

    def do_GET(self):
        self.server.requests += 1
        super().do_GET()

    def copyfile(self, source, outputfile):
        raw = source.read()
        with contextlib.suppress(ConnectionError):              # who asked may be gone
            outputfile.write(raw[:len(raw) // 2])
            outputfile.flush()
            self.server.halfway.release()
            self.server.go_on.wait(60)
            outputfile.write(raw[len(raw) // 2:])

    def send_header(self, key, value):
        super().send_header(key, str(self.server.promised or value) if key == "Content-Length" else value)

    def log_message(self, *args):
        pass


class Archive:
    """A CIFAR-100 archive of made images, served on 127.0.0.1."""

    def __init__(self, folder: Path):
        generator = np.random.default_rng(0)
        self.pixels, self.members = {}, {"meta": pickle.dumps({"fine_label_names": NAMES})}
        for part, n in COUNTS.items():
            self.pixels[part] = generator.integers(0, 256, (n, 3072), dtype=np.uint8)
            self.members[part] = pickle.dumps({"data": self.pixels[part], "fine_labels": list(range(n))})
        self.path = folder / "cifar-100-python.tar.gz"
        handler = functools.partial(Handler, directory=folder)
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.requests, self.server.promised = 0, None
        self.server.halfway, self.server.go_on = threading.Semaphore(0), threading.Event()
        self.server.go_on.set()
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def pack(self, members: dict[str, bytes]) -> dict:
        """Write the archive; what torchvision has to know to find everything in order."""
        with tarfile.open(self.path, "w:gz") as tar:
            for name, raw in members.items():
                info = tarfile.TarInfo(f"cifar-100-python/{name}")
                info.size = len(raw)
                tar.addfile(info, io.BytesIO(raw))
        md5 = {name: hashlib.md5(raw).hexdigest() for name, raw in members.items()}
        return {"url": f"http://127.0.0.1:{self.server.server_port}/{self.path.name}",
                "tgz_md5": hashlib.md5(self.path.read_bytes()).hexdigest(),
                "train_list": [["train", md5["train"]]], "test_list": [["test", md5["test"]]],
                "meta": {"filename": "meta", "key": "fine_label_names", "md5": md5["meta"]}}


@pytest.fixture
def archive(tmp_path, monkeypatch):
    (tmp_path / "server").mkdir()
    made = Archive(tmp_path / "server")
    for key, value in made.pack(made.members).items():
        monkeypatch.setattr(CIFAR100, key, value)
    yield made
    made.server.go_on.set()
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
    requests = archive.server.requests
    shutil.rmtree(root / "cifar-100-python")
    (root / archive.path.name).unlink()
    assert same(first, load(root)) and archive.server.requests == requests


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


def test_one_downloads_and_the_other_waits(archive, tmp_path, monkeypatch):
    root, waits = tmp_path / "data", threading.Event()

    class Lock(files.FileLock):
        def __enter__(self):
            waits.set()
            return super().__enter__()

    archive.server.go_on.clear()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(load, root)
        for _ in range(2):                          # of the first answer, too, which torchvision throws away
            assert archive.server.halfway.acquire(timeout=60)
        monkeypatch.setattr(files, "FileLock", Lock)
        second = pool.submit(load, root)
        came = waits.wait(60)
        archive.server.go_on.set()
    assert came and same(first.result(), second.result())
    assert archive.server.requests == 2 and listing(root) == BESIDE


def test_what_is_stopped_while_it_writes_leaves_nothing_half(archive, tmp_path, monkeypatch):
    def save(content, file):
        file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", save)
        load(tmp_path / "data")
    assert listing(tmp_path / "data") == BESIDE[:-1]
    load(tmp_path / "data")
    assert archive.server.requests == 2                         # what is verified stays


@pytest.mark.parametrize("fault", ["corrupt", "interrupted"])
def test_a_bad_download_is_refused_and_the_next_run_tries_again(archive, tmp_path, fault):
    raw = archive.path.read_bytes()
    if fault == "interrupted":
        archive.server.promised = len(raw)
    archive.path.write_bytes(raw[:5000] if fault == "interrupted" else raw[:-1] + b"?")
    message = failing(tmp_path / "data", "cannot download cifar100 from http://127.0.0.1")
    assert "or put cifar-100-python.tar.gz or cifar100.pt into " in message
    assert not (tmp_path / "data" / "cifar100.pt").exists() and archive.server.requests == 2
    archive.server.promised = None
    archive.path.write_bytes(raw)
    assert len(load(tmp_path / "data")["train_images"]) == 20


def test_no_network_and_no_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(CIFAR100, "url", "http://127.0.0.1:9/cifar.tar.gz")
    failing(tmp_path, "cannot download cifar100 from http://127.0.0.1:9/.*Connection refused")
    assert not listing(tmp_path)


@pytest.mark.parametrize("what", ["archive", "batches"])
def test_an_official_copy_that_lies_there_is_used_and_a_damaged_one_is_not_opened(archive, tmp_path, what):
    root, marker = tmp_path / "data", tmp_path / "marker"
    expected = load(root)
    requests = archive.server.requests
    (root / "cifar100.pt").unlink()
    copy = root / (archive.path.name if what == "archive" else "cifar-100-python/train")
    if what == "archive":
        shutil.rmtree(root / "cifar-100-python")
    else:
        (root / archive.path.name).unlink()
    assert same(load(root), expected) and archive.server.requests == requests
    (root / "cifar100.pt").unlink()
    shutil.rmtree(root / "cifar-100-python")
    copy.parent.mkdir(exist_ok=True)
    copy.write_bytes(pickle.dumps(RunsCode(marker)))
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
    for key, value in archive.pack({**archive.members, "test": pickle.dumps(content)}).items():
        monkeypatch.setattr(CIFAR100, key, value)
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
