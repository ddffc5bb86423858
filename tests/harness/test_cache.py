"""harness/cache.py: torchvision's real download against a server on this machine, and what a cache may
hold."""
import contextlib
import errno
import fcntl
import functools
import hashlib
import http.server
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT
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
        self.number = self.server.requests
        if self.server.failures:
            self.server.failures -= 1                           # hangs up without an answer
        else:
            super().do_GET()

    def copyfile(self, source, outputfile):
        raw = source.read()
        if self.number <= self.server.damaged:
            raw = raw[:-1] + b"?"
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
    """A CIFAR-100 archive of made images, served on 127.0.0.1, known to torchvision by its checksums."""

    def __init__(self, folder: Path):
        generator = np.random.default_rng(0)
        self.pixels, self.members = {}, {"meta": pickle.dumps({"fine_label_names": NAMES})}
        for part, n in COUNTS.items():
            self.pixels[part] = generator.integers(0, 256, (n, 3072), dtype=np.uint8)
            self.members[part] = pickle.dumps({"data": self.pixels[part], "fine_labels": list(range(n))})
        self.path = folder / "cifar-100-python.tar.gz"
        handler = functools.partial(Handler, directory=folder)
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.requests, self.server.failures, self.server.damaged, self.server.promised = 0, 0, 0, None
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

    def until_half_is_sent(self):
        for _ in range(2):                          # of the first answer, too, which torchvision throws away
            assert self.server.halfway.acquire(timeout=60)


@pytest.fixture
def archive(tmp_path, monkeypatch):
    (tmp_path / "server").mkdir()
    made = Archive(tmp_path / "server")
    made.known = made.pack(made.members)
    for key, value in made.known.items():
        monkeypatch.setattr(CIFAR100, key, value)
    yield made
    made.server.go_on.set()
    made.server.shutdown()
    made.server.server_close()


CHILD = """
import json, os, signal, sys
import torch, torchvision
from harness import cache
for key, value in json.loads(sys.argv[1]).items():
    setattr(torchvision.datasets.CIFAR100, key, value)
if "killed" in sys.argv:
    def save(content, file):
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    torch.save = save
cache.cifar("cifar100", sys.argv[2])
"""


def child(archive, root, *arguments):
    """Another process that loads CIFAR-100."""
    return subprocess.Popen([sys.executable, "-c", CHILD, json.dumps(archive.known), str(root), *arguments],
                            cwd=ROOT, stderr=subprocess.PIPE)


def load(root):
    return cache.cifar("cifar100", root)


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


def test_of_two_processes_one_downloads_and_the_other_waits(archive, tmp_path, monkeypatch):
    root, waits = tmp_path / "data", threading.Event()

    class Lock(files.FileLock):
        def __enter__(self):
            waits.set()
            return super().__enter__()

    archive.server.go_on.clear()
    process = child(archive, root)
    archive.until_half_is_sent()
    monkeypatch.setattr(files, "FileLock", Lock)
    with ThreadPoolExecutor(1) as pool:
        loaded = pool.submit(load, root)
        came = waits.wait(60)
        archive.server.go_on.set()
    assert came and not process.wait(60) and len(loaded.result()["train_images"]) == 20
    assert archive.server.requests == 2 and listing(root) == BESIDE


@pytest.mark.parametrize("moment", ["download", "write"])
def test_a_killed_process_blocks_nobody_and_leaves_nothing_half(archive, tmp_path, moment):
    root = tmp_path / "data"
    if moment == "download":
        archive.server.go_on.clear()
    process = child(archive, root, *["killed"] * (moment == "write"))
    if moment == "download":
        archive.until_half_is_sent()
        process.kill()
        archive.server.go_on.set()
    assert process.wait(60) == -signal.SIGKILL and not (root / "cifar100.pt").exists()
    assert len(load(root)["train_images"]) == 20 and listing(root) == BESIDE
    assert archive.server.requests == (4 if moment == "download" else 2)     # what is verified stays


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


# ---- downloads that go wrong -------------------------------------------------------------------------------

def failing(root, why):
    with pytest.raises(files.Problem, match=why) as caught:
        load(root)
    return str(caught.value)


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


# ---- what lies there already -------------------------------------------------------------------------------

def lay(archive, root, what):
    """The official archive, or the folder of batches that torchvision unpacks it to."""
    root.mkdir(exist_ok=True)
    if what == "archive":
        shutil.copy(archive.path, root)
    else:
        (root / "cifar-100-python").mkdir()
        for name, raw in archive.members.items():
            (root / "cifar-100-python" / name).write_bytes(raw)
    return listing(root)


@pytest.mark.parametrize("what", ["archive", "batches"])
def test_an_official_copy_that_lies_there_is_used(archive, tmp_path, what):
    expected = load(tmp_path / "downloaded")
    requests = archive.server.requests
    lay(archive, tmp_path / "data", what)
    assert same(load(tmp_path / "data"), expected) and archive.server.requests == requests


@pytest.mark.parametrize("what", ["archive", "batches"])
def test_a_damaged_copy_that_lies_there_is_not_opened(archive, tmp_path, what):
    expected = load(tmp_path / "downloaded")
    requests, marker = archive.server.requests, tmp_path / "marker"
    lay(archive, tmp_path / "data", what)
    damaged = tmp_path / "data" / (archive.path.name if what == "archive" else "cifar-100-python/train")
    damaged.write_bytes(pickle.dumps(RunsCode(marker)))
    assert same(load(tmp_path / "data"), expected) and not marker.exists()
    assert archive.server.requests == requests + 2


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
    assert sorted(digests(got["train_images"].numpy())) == digests(got["train_images"].numpy())


def test_a_part_of_the_set_is_taken_and_said(tmp_path, capsys):
    torch.save(good(), tmp_path / "cifar100.pt")
    load(tmp_path)
    assert capsys.readouterr().err == (
        f"{tmp_path / 'cifar100.pt'} holds 4 of the 50,000 training images of cifar100\n")
    labels = torch.arange(50_000) % 100
    images = torch.zeros(50_000, 3, 32, 32, dtype=torch.uint8)
    images[:, 0, 0, 0] = labels
    torch.save({**good(), "train_images": images, "train_labels": labels}, tmp_path / "cifar100.pt")
    load(tmp_path)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("member", ["train", "test", "meta"])
def test_a_pickle_is_not_opened_before_its_checksum_was_right(archive, tmp_path, monkeypatch, member):
    marker, root = tmp_path / "marker", tmp_path / "data"
    known = archive.pack({**archive.members, member: pickle.dumps(RunsCode(marker))})
    failing(root, "cannot download .*corrupt")                       # another archive
    monkeypatch.setattr(CIFAR100, "tgz_md5", known["tgz_md5"])
    failing(root, "cannot download .*corrupt")  # as if the archive's MD5 had been forged, too
    assert not marker.exists() and not (root / "cifar100.pt").exists()
    for key, value in known.items():
        monkeypatch.setattr(CIFAR100, key, value)
    with pytest.raises(TypeError):
        load(root)
    assert marker.exists()                                      # so the trap works


@pytest.mark.parametrize("size", [40, 260])                 # KiB: not enough for the archive; for the cache
def test_a_full_disk(archive, tmp_path, size):
    root = tmp_path / "full"
    root.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", root]
    mount = shutil.which("mount") and subprocess.run(command, capture_output=True)
    if not mount or mount.returncode:
        pytest.skip("only root may mount a small file system")
    try:
        (root / "mine").write_text("kept")
        failing(root, "No space left on device")
        assert not (root / "cifar100.pt").exists() and (root / "mine").read_text() == "kept"
    finally:
        subprocess.run(["umount", root], check=True)


# ---- what a cache may hold ---------------------------------------------------------------------------------

def twice(c, count):
    """`count` of 200 test images are training images."""
    test = pictures(200, 2)
    test[5:5 + count] = c["train_images"][:count]
    return {**c, "test_images": test, "test_labels": torch.arange(200) % 100}


def of_one_class(c, part, count):
    return {**c, f"{part}_images": pictures(count, 3), f"{part}_labels": torch.full((count,), 7)}


WRONG = {
    "no dict": (lambda c: [1, 2], "must be a dict"),
    "a key missing": (lambda c: c.pop("classes") and c, "must be a dict"),
    "a key too many": (lambda c: {**c, "extra": 1}, "must be a dict"),
    "float images": (lambda c: {**c, "train_images": c["train_images"].float()}, "must be uint8"),
    "other size": (lambda c: {**c, "test_images": c["test_images"][..., 4:, 4:]}, "must be uint8"),
    "no tensor": (lambda c: {**c, "test_images": None}, "must be uint8"),
    "sparse images": (lambda c: {**c, "test_images": c["test_images"].to_sparse()}, "must be uint8"),
    "images without memory": (lambda c: {**c, "test_images": c["test_images"].to("meta")}, "must be uint8"),
    "int32 labels": (lambda c: {**c, "train_labels": c["train_labels"].int()}, "must be int64"),
    "a label missing": (lambda c: {**c, "train_labels": c["train_labels"][1:]}, "one for each image"),
    "label too large": (lambda c: {**c, "test_labels": torch.tensor([0, 100])}, "from 0 to 99"),
    "negative label": (lambda c: {**c, "test_labels": torch.tensor([0, -1])}, "from 0 to 99"),
    "no images": (lambda c: {**c, "test_images": c["test_images"][:0], "test_labels": c["test_labels"][:0]},
                  "from 0 to 99"),
    "cifar10": (lambda c: {**c, "classes": ["cat\nfish", *"abcdefghi"]},
                r"has 10 classes, 'cat\nfish', a, b, c, d and 5 more"),
    "classes no list": (lambda c: {**c, "classes": "apple"}, "must be a list of names"),
    "all black": (lambda c: {**c, "train_images": c["train_images"] * 0},
                  "its 4 train images are all the same"),
    "one test image": (lambda c: {**c, "test_images": c["test_images"][[0, 0]]},
                       "its 2 test images are all the same"),
    "too many of a class": (lambda c: of_one_class(c, "train", 501),
                            "it has 501 train images of one class, of 500"),
    "too many to test": (lambda c: of_one_class(c, "test", 101),
                         "it has 101 test images of one class, of 100"),
    "test images trained on": (lambda c: twice(c, 3),
                               "3 of its 200 test images are training images too, bit for bit: number 5, "
                               "number 6, number 7;"),
    "few images, all trained on": (lambda c: {**c, "test_images": c["train_images"][2:]},
                                   "2 of its 2 test images"),
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


@pytest.mark.parametrize("correct", [lambda c: c, lambda c: twice(c, 2),
                                     lambda c: of_one_class(c, "train", 500),
                                   lambda c: of_one_class(c, "test", 100)])
def test_a_cache_that_may_be_a_part_of_the_real_set_is_read(tmp_path, correct):
    """CIFAR-100 itself has one test image in a thousand among its training images."""
    torch.save(correct(good()), tmp_path / "cifar100.pt")
    load(tmp_path)


def test_a_download_is_checked_like_a_cache(archive, tmp_path, monkeypatch):
    content = {"data": archive.pixels["train"][:10], "fine_labels": list(range(10))}
    for key, value in archive.pack({**archive.members, "test": pickle.dumps(content)}).items():
        monkeypatch.setattr(CIFAR100, key, value)
    failing(tmp_path / "data", "10 of its 10 test images are training images too")
    assert not (tmp_path / "data" / "cifar100.pt").exists()


def test_an_unusable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    failing(tmp_path / "file" / "data", "cannot use")
    failing("/proc/data", "cannot use /proc/data/cifar100.pt")
