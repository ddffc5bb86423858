"""data.py: torchvision's real download against a server on this machine, the cache and its checks, and the augmentation."""
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
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch
import torchvision

import data

COUNTS = {"train": 20, "test": 10}
CIFAR100 = torchvision.datasets.CIFAR100
NAMES = data.CIFAR["cifar100"].classes


class Handler(http.server.SimpleHTTPRequestHandler):
    """Sends a file in two halves, so that a test can stop in between. torchvision asks twice, first for redirections."""

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
        self.pixels = {part: generator.integers(0, 256, (n, 3072), dtype=np.uint8) for part, n in COUNTS.items()}
        content = {part: {"data": self.pixels[part], "fine_labels": list(range(n))} for part, n in COUNTS.items()}
        self.members = {name: pickle.dumps(value) for name, value in {**content, "meta": {"fine_label_names": NAMES}}.items()}
        self.path = folder / "cifar-100-python.tar.gz"
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
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
        for _ in range(2):                                      # of the first answer, too, which torchvision throws away
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
import data
for key, value in json.loads(sys.argv[1]).items():
    setattr(torchvision.datasets.CIFAR100, key, value)
if "killed" in sys.argv:
    def save(content, file):
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    torch.save = save
print(data.digest(data.load("cifar100", sys.argv[2])))
"""


def child(archive, root, *arguments):
    """Another process that loads CIFAR-100."""
    return subprocess.Popen([sys.executable, "-c", CHILD, json.dumps(archive.known), str(root), *arguments], text=True,
                            cwd=Path(data.__file__).parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@contextlib.contextmanager
def loading(root, capsys):
    """This process loads CIFAR-100 as well, and has to wait for it; `.result()` then is the data set."""
    with ThreadPoolExecutor(1) as pool:
        loaded, said = pool.submit(data.load, "cifar100", root), ""
        while not loaded.done() and "\n" not in said:
            said += capsys.readouterr().err
            time.sleep(0.01)
        assert said == f"waiting for another process that is making {root / 'cifar100.pt'}\n"
        yield loaded


def listing(folder):
    """Of all files but the locks, which are empty and may stay."""
    paths = [path for path in folder.rglob("*") if not path.name.endswith(".lock")]
    return sorted(str(path.relative_to(folder)) for path in paths)


def digests(images):
    return [hashlib.sha256(image.tobytes()).digest() for image in images]


def test_download_then_cache_then_no_network(archive, tmp_path):
    root = tmp_path / "new" / "data"
    first = data.load("cifar100", root)
    assert listing(root) == ["cifar100.pt"]
    for part, images, labels in (("train", *first[:2]), ("test", *first[2:4])):
        pixels = archive.pixels[part]
        order = sorted(range(len(pixels)), key=digests(pixels).__getitem__)     # the i-th image has the label i
        assert labels.tolist() == order
        assert torch.equal(images, torch.from_numpy(pixels[order]).view(-1, 3, 32, 32))
    assert first.classes[-1] == "worm"
    assert first.train_images.dtype == torch.uint8 and first.train_labels.dtype == torch.int64
    requests = archive.server.requests
    for a, b in zip(first, data.load("cifar100", root)):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert archive.server.requests == requests


# ---- several processes ----------------------------------------------------------------------------------------------

def test_of_two_processes_one_downloads_and_the_other_waits_and_says_so(archive, tmp_path, capsys):
    root = tmp_path / "data"
    archive.server.go_on.clear()
    process = child(archive, root)
    archive.until_half_is_sent()
    with loading(root, capsys) as loaded:
        archive.server.go_on.set()
    assert process.communicate(timeout=60)[0] == data.digest(loaded.result()) + "\n"
    assert archive.server.requests == 2 and listing(root) == ["cifar100.pt"]


def test_who_waited_for_a_download_that_failed_tries_itself(archive, tmp_path, capsys):
    root = tmp_path / "new" / "data"
    archive.server.damaged = 2                                  # both answers to the other process
    archive.server.go_on.clear()
    process = child(archive, root)
    archive.until_half_is_sent()
    with loading(root, capsys) as loaded:
        archive.server.go_on.set()
    assert "DataError: cannot download" in process.communicate(timeout=60)[1]
    assert len(loaded.result().train_images) == 20 and archive.server.requests == 4 and listing(root) == ["cifar100.pt"]


def test_a_process_killed_in_a_download_blocks_nobody(archive, tmp_path, capsys):
    root = tmp_path / "data"
    archive.server.go_on.clear()
    process = child(archive, root)
    archive.until_half_is_sent()
    while not (root / ".cifar100.pt.making" / archive.path.name).exists():
        time.sleep(0.01)
    with loading(root, capsys) as loaded:
        process.kill()
        archive.server.go_on.set()
    process.communicate(timeout=60)
    assert len(loaded.result().train_images) == 20 and listing(root) == ["cifar100.pt"]


def test_what_a_killed_process_had_verified_is_not_downloaded_again(archive, tmp_path):
    root = tmp_path / "data"
    process = child(archive, root, "killed")
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not (root / "cifar100.pt").exists() and archive.path.name in os.listdir(root / ".cifar100.pt.making")
    assert archive.server.requests == 2
    assert len(data.load("cifar100", root).train_images) == 20
    assert archive.server.requests == 2 and listing(root) == ["cifar100.pt"]


def test_a_cache_is_read_where_nothing_can_be_written_or_locked(archive, tmp_path, monkeypatch):
    root = tmp_path / "data"
    expected = data.digest(data.load("cifar100", root))

    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    root.chmod(0o555)
    try:
        assert data.digest(data.load("cifar100", root)) == expected
    finally:
        root.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setattr(filelock, "FileLock", None)
        assert data.digest(data.load("cifar100", root)) == expected
    failing(tmp_path / "new" / "data", "cannot use .*cifar100.pt: No locks available")
    (root / "cifar100.pt").unlink()
    failing(root, "No locks available")
    assert not listing(root) and not listing(tmp_path / "new" / "data")


# ---- downloads that go wrong ----------------------------------------------------------------------------------------

def failing(root, why):
    with pytest.raises(data.DataError, match=why) as caught:
        data.load("cifar100", root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_corrupt_download_is_refused_and_leaves_nothing(archive, tmp_path):
    raw = bytearray(archive.path.read_bytes())
    raw[len(raw) // 2] ^= 1
    archive.path.write_bytes(raw)
    message = failing(tmp_path / "new" / "data", "cannot download cifar100 .*corrupt")
    assert "cifar100.pt" in message and not listing(tmp_path / "new" / "data") and archive.server.requests == 2


def test_an_interrupted_download_is_refused_and_leaves_nothing(archive, tmp_path):
    archive.server.promised = archive.path.stat().st_size
    archive.path.write_bytes(archive.path.read_bytes()[:5000])
    failing(tmp_path, "cannot download cifar100")
    assert listing(tmp_path) == ["server", f"server/{archive.path.name}"]


def test_no_network_and_no_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(CIFAR100, "url", "http://127.0.0.1:9/cifar.tar.gz")
    failing(tmp_path, "cannot download cifar100 from http://127.0.0.1:9/")
    assert not listing(tmp_path)


# ---- what lies there already ----------------------------------------------------------------------------------------

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
    expected = data.digest(data.load("cifar100", tmp_path / "downloaded"))
    requests = archive.server.requests
    there = lay(archive, tmp_path / "data", what)
    assert data.digest(data.load("cifar100", tmp_path / "data")) == expected
    assert archive.server.requests == requests and listing(tmp_path / "data") == sorted([*there, "cifar100.pt"])


@pytest.mark.parametrize("what", ["archive", "batches"])
def test_a_damaged_copy_that_lies_there_is_not_opened(archive, tmp_path, what):
    expected = data.digest(data.load("cifar100", tmp_path / "downloaded"))
    requests, marker = archive.server.requests, tmp_path / "marker"
    lay(archive, tmp_path / "data", what)
    damaged = tmp_path / "data" / (archive.path.name if what == "archive" else "cifar-100-python/train")
    damaged.write_bytes(pickle.dumps(RunsCode(marker)))
    assert data.digest(data.load("cifar100", tmp_path / "data")) == expected and not marker.exists()
    assert archive.server.requests == requests + 2 and damaged.read_bytes() == pickle.dumps(RunsCode(marker))


def test_the_order_depends_on_the_images_alone(tmp_path):
    """Any shuffle of a set, ties among its images included, is one data set; and labels go with their images."""
    content = {**good(), "train_images": pictures(40), "train_labels": torch.arange(40)}
    content["train_images"][5] = content["train_images"][30]    # bit for bit the same, under two labels
    seen = set()
    for seed in range(4):
        order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
        torch.save({**content, "train_images": content["train_images"][order], "train_labels": content["train_labels"][order],
                    "test_images": content["test_images"].flip(seed % 2 * [0]), "test_labels": torch.tensor([[0, 1], [1, 0]])[
                        seed % 2]}, tmp_path / "cifar100.pt")
        dataset = data.load("cifar100", tmp_path)
        seen.add(data.digest(dataset))
        assert torch.equal(dataset.train_images, content["train_images"][dataset.train_labels])
    assert len(seen) == 1
    assert sorted(digests(dataset.train_images.numpy())) == digests(dataset.train_images.numpy())


def test_a_part_of_the_set_is_taken_and_said(tmp_path, capsys):
    torch.save(good(), tmp_path / "cifar100.pt")
    data.load("cifar100", tmp_path)
    assert capsys.readouterr().err == f"{tmp_path / 'cifar100.pt'} holds 4 of the 50,000 training images of cifar100\n"
    labels = torch.arange(50_000) % 100
    images = torch.zeros(50_000, 3, 32, 32, dtype=torch.uint8)
    images[:, 0, 0, 0] = labels
    torch.save({**good(), "train_images": images, "train_labels": labels}, tmp_path / "cifar100.pt")
    data.load("cifar100", tmp_path)
    assert capsys.readouterr().err == ""


class RunsCode:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.mark.parametrize("member", ["train", "test", "meta"])
def test_a_pickle_is_not_opened_before_its_checksum_was_right(archive, tmp_path, monkeypatch, member):
    marker, root = tmp_path / "marker", tmp_path / "data"
    known = archive.pack({**archive.members, member: pickle.dumps(RunsCode(marker))})
    failing(root, "cannot download .*corrupt")                  # another archive
    monkeypatch.setattr(CIFAR100, "tgz_md5", known["tgz_md5"])
    failing(root, "cannot download .*corrupt")                  # as if the archive's MD5 had been forged, too
    assert not marker.exists() and not listing(root)
    for key, value in known.items():
        monkeypatch.setattr(CIFAR100, key, value)
    with pytest.raises(TypeError):
        data.load("cifar100", root)
    assert marker.exists()                                      # so the trap works


@pytest.mark.parametrize("trusted", [False, True])
def test_no_member_of_an_archive_leaves_its_folder(archive, tmp_path, monkeypatch, trusted):
    known = archive.pack({**archive.members, "../../outside": b"planted"})
    if trusted:
        monkeypatch.setattr(CIFAR100, "tgz_md5", known["tgz_md5"])
    failing(tmp_path, "cannot download .*outside the destination" if trusted else "cannot download .*corrupt")
    assert listing(tmp_path) == ["server", f"server/{archive.path.name}"]


# ---- writing the cache ----------------------------------------------------------------------------------------------

def test_a_killed_write_leaves_no_half_cache(archive, tmp_path, monkeypatch):
    def dies(content, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        data.load("cifar100", tmp_path)
    assert listing(tmp_path) == ["server", f"server/{archive.path.name}"]


@contextlib.contextmanager
def files_of_at_most(size):
    """A write beyond it fails, as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_cache_that_cannot_be_written_whole_is_one_line_and_leaves_the_rest_alone(archive, tmp_path, monkeypatch):
    save = torch.save
    root = tmp_path / "data"
    root.mkdir()
    (root / "cifar10.pt").write_text("kept")

    def too_large(content, file):
        with files_of_at_most(50_000):
            save(content, file)

    def folder_removed(content, file):
        shutil.rmtree(root)
        save(content, file)

    def no_rename(old, new):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(new))

    for target, name, broken, said in ((torch, "save", too_large, "File too large"),
                                       (os, "replace", no_rename, "Permission denied"),
                                       (torch, "save", folder_removed, "No such file or directory")):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, broken)
            message = failing(root, f"cannot use .*cifar100.pt: {said}; choose another folder")
        assert str(root / "cifar100.pt") in message
        assert not root.exists() or listing(root) == ["cifar10.pt"] and (root / "cifar10.pt").read_text() == "kept"
    assert listing(tmp_path) == ["server", f"server/{archive.path.name}"]


@pytest.mark.parametrize("size", [40, 260])                     # KiB: not enough for the archive; for the cache
def test_a_full_disk(archive, tmp_path, size):
    root = tmp_path / "full"
    root.mkdir()
    mount = shutil.which("mount") and subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", root],
                                                     capture_output=True)
    if not mount or mount.returncode:
        pytest.skip("only root may mount a small file system")
    try:
        (root / "mine").write_text("kept")
        failing(root, "cannot use .*cifar100.pt: No space left on device; choose another folder")
        assert listing(root) == ["mine"] and (root / "mine").read_text() == "kept"
        assert archive.server.requests == 2
    finally:
        subprocess.run(["umount", root], check=True)


def test_the_cache_is_on_the_disk_before_it_has_its_name(archive, tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def record(fd):
        assert not (tmp_path / "data" / "cifar100.pt").exists()
        synced.append(os.fstat(fd).st_size)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", record)
    data.load("cifar100", tmp_path / "data")
    assert (tmp_path / "data" / "cifar100.pt").stat().st_size in synced


# ---- what a cache may hold ------------------------------------------------------------------------------------------

def pictures(n, seed=0):
    return torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def good():
    return {"train_images": pictures(4), "train_labels": torch.tensor([0, 1, 2, 99]),
            "test_images": pictures(2, 1), "test_labels": torch.tensor([0, 1]), "classes": list(NAMES)}


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
    "other size": (lambda c: {**c, "test_images": torch.zeros(2, 3, 28, 28, dtype=torch.uint8)}, "must be uint8"),
    "no tensor": (lambda c: {**c, "test_images": None}, "must be uint8"),
    "sparse images": (lambda c: {**c, "test_images": c["test_images"].to_sparse()}, "must be uint8"),
    "images without memory": (lambda c: {**c, "test_images": c["test_images"].to("meta")}, "must be uint8"),
    "int32 labels": (lambda c: {**c, "train_labels": c["train_labels"].int()}, "must be int64"),
    "a label missing": (lambda c: {**c, "train_labels": c["train_labels"][1:]}, "one for each image"),
    "label too large": (lambda c: {**c, "test_labels": torch.tensor([0, 100])}, "from 0 to 99"),
    "negative label": (lambda c: {**c, "test_labels": torch.tensor([0, -1])}, "from 0 to 99"),
    "no images": (lambda c: {**c, "test_images": c["test_images"][:0], "test_labels": c["test_labels"][:0]}, "from 0 to 99"),
    "cifar10": (lambda c: {**c, "classes": data.CIFAR["cifar10"].classes}, "it has 10 classes, airplane, automobile"),
    "another class in between": (lambda c: {**c, "classes": [*NAMES[:41], "lawnmower", *NAMES[42:]]},
                                 "its class 41 is called lawnmower, not lawn_mower"),
    "classes in another order": (lambda c: {**c, "classes": NAMES[::-1]}, "its class 0 is called worm, not apple"),
    "a name of two lines": (lambda c: {**c, "classes": ["app\nle", *NAMES[1:]]}, r"its class 0 is called 'app\nle', not apple"),
    "classes no list": (lambda c: {**c, "classes": "apple"}, "must be a list of names"),
    "all black": (lambda c: {**c, "train_images": torch.zeros_like(c["train_images"])}, "its 4 train images are all the same"),
    "one test image": (lambda c: {**c, "test_images": c["test_images"][:1].repeat(2, 1, 1, 1)}, "its 2 test images are all"),
    "too many of a class": (lambda c: of_one_class(c, "train", 501), "it has 501 train images of one class, of 500"),
    "too many to test": (lambda c: of_one_class(c, "test", 101), "it has 101 test images of one class, of 100"),
    "test images trained on": (lambda c: twice(c, 3),
                               "3 of its 200 test images are training images too, bit for bit: number 5, number 6, number 7;"),
    "few images, all trained on": (lambda c: {**c, "test_images": c["train_images"][2:]}, "2 of its 2 test images"),
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


@pytest.mark.parametrize("right", [lambda c: c, lambda c: twice(c, 2), lambda c: of_one_class(c, "train", 500),
                                   lambda c: of_one_class(c, "test", 100)])
def test_a_cache_that_may_be_a_part_of_the_real_set_is_read(tmp_path, right):
    """CIFAR-100 itself has one test image in a thousand among its training images."""
    torch.save(right(good()), tmp_path / "cifar100.pt")
    data.load("cifar100", tmp_path)


def test_a_download_is_checked_like_a_cache(archive, tmp_path, monkeypatch):
    content = {"data": archive.pixels["train"][:10], "fine_labels": list(range(10))}
    for key, value in archive.pack({**archive.members, "test": pickle.dumps(content)}).items():
        monkeypatch.setattr(CIFAR100, key, value)
    failing(tmp_path / "data", "10 of its 10 test images are training images too")
    assert not listing(tmp_path / "data")


DAMAGE = {
    "truncated": lambda raw: raw[:9000],
    "empty": lambda raw: b"",
    "text": lambda raw: b"Not Found",
    "a pixel changed": lambda raw: raw.replace(bytes(pictures(4)[1, 0, 0]), bytes(32)),
    "an older format": lambda raw: pickle.dumps([1, 2]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_refused(tmp_path, damage):
    file = tmp_path / "cifar100.pt"
    torch.save(good(), file)
    raw = file.read_bytes()
    file.write_bytes(DAMAGE[damage](raw))
    assert file.read_bytes() != raw
    failing(tmp_path, "is damaged or no data set at all")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_cache_never_runs_code(tmp_path, zipped):
    trap = {**good(), "classes": RunsCode(tmp_path / "marker")}
    torch.save(trap, tmp_path / "cifar100.pt", _use_new_zipfile_serialization=zipped)
    failing(tmp_path, "is damaged or no data set at all")
    assert not (tmp_path / "marker").exists()
    torch.load(tmp_path / "cifar100.pt", weights_only=False)
    assert (tmp_path / "marker").exists()                       # so the trap works


def test_a_pickle_of_garbage_is_refused(tmp_path):
    """Inside an intact archive, where no checksum is wrong: pickle then fails in ways of its own."""
    file = tmp_path / "cifar100.pt"
    torch.save(good(), file)
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    (name,) = [name for name in members if name.endswith("data.pkl")]
    for garbage in (b"", b".", b"0.", b"\x80\x02J\x00.", b"\x80\x02K\x01Q.", b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
                    b"\x80\x02ctorch._utils\n_rebuild_parameter\n(K\x01K\x00NtR.", members[name][:100]):
        with zipfile.ZipFile(file, "w") as archive:
            for member, raw in {**members, name: garbage}.items():
                archive.writestr(member, raw)
        failing(tmp_path, "is damaged or no data set at all")


def test_the_digest_changes_with_anything_and_is_the_same_everywhere():
    def dataset():
        labels = torch.arange(4) % 2
        images = torch.arange(4 * 48).view(4, 3, 4, 4).to(torch.uint8)
        return data.Dataset(images, labels, images[:2] + 1, labels[:2].clone(), ["ant", "bee"])

    first = dataset()
    assert data.digest(first) == data.digest(dataset()) == PINNED
    assert data.digest(first._replace(train_images=first.train_images.contiguous(memory_format=torch.channels_last))) == PINNED
    others = {PINNED}
    for part in data.Dataset._fields[:4]:
        for at in (0, -1):
            changed = dataset()
            getattr(changed, part).view(-1)[at] ^= 1
            others.add(data.digest(changed))
    for classes in (["ant", "bea"], ["antb", "ee"], ["bee", "ant"], ["ant", "bee", "cow"]):
        others.add(data.digest(first._replace(classes=classes)))
    others.add(data.digest(first._replace(train_images=first.train_images.flip(0), train_labels=first.train_labels.flip(0))))
    others.add(data.digest(first._replace(train_images=first.train_images.view(4, 3, 2, 8))))
    others.add(data.digest(first._replace(train_images=first.train_images[:3], train_labels=first.train_labels[:3])))
    assert len(others) == 1 + 8 + 4 + 3
    assert all(len(each) == 16 and set(each) <= set("0123456789abcdef") for each in others)


PINNED = "b621c4a1608ed547"


def test_unknown_name_and_unusable_folder(tmp_path):
    with pytest.raises(data.DataError, match="choose from gratings"):
        data.load("mnist", tmp_path)
    (tmp_path / "file").write_text("")
    failing(tmp_path / "file" / "data", "cannot use")
    failing("/proc/data", "cannot use /proc/data/cifar100.pt")


def test_gratings_are_made_from_the_seed():
    a, b, c = data.gratings(200, 50), data.gratings(200, 50), data.gratings(200, 50, seed=1)
    assert all(torch.equal(x, y) for x, y in zip(a[:4], b[:4])) and not torch.equal(a.train_images, c.train_images)
    assert a.train_images.shape == (200, 3, 32, 32) and a.train_images.dtype == torch.uint8
    assert a.train_labels.dtype == torch.int64 and set(a.train_labels.tolist()) == set(range(10)) and len(a.classes) == 10


def test_gratings_are_told_apart_by_orientation_and_nothing_simpler():
    clean = data.gratings(1000, 10, noise=0)
    spectrum = torch.fft.fft2(clean.train_images.float().mean(1) - clean.train_images.float().mean((1, 2, 3))[:, None, None])
    energy = spectrum.abs().square()
    frequency = torch.fft.fftfreq(32)
    direction = torch.atan2(frequency[:, None], frequency[None]) * 2        # twice: stripes have no sign
    mean = torch.atan2((energy * direction.sin()).sum((1, 2)), (energy * direction.cos()).sum((1, 2))) / 2
    found = (torch.rad2deg(mean) / 18).round() % 10
    assert (found == clean.train_labels).float().mean() > 0.9
    colour = clean.train_images.float().mean((2, 3))
    by_class = torch.stack([colour[clean.train_labels == k].mean(0) for k in range(10)])
    assert by_class.std(0).max() < 5                                        # grey levels: no colour tells the class


def test_held_out_images_are_training_images_that_are_not_trained_on():
    whole = data.gratings(100, 20)
    held = data.hold_out(whole, 30)
    assert torch.equal(torch.cat([held.train_images, held.test_images]), whole.train_images)
    assert torch.equal(torch.cat([held.train_labels, held.test_labels]), whole.train_labels)
    assert len(held.test_labels) == 30
    rows = [set(map(bytes, part.numpy())) for part in (held.train_images, held.test_images)]
    assert len(rows[0]) == 70 and len(rows[1]) == 30 and not rows[0] & rows[1]
    for count in (100, 101, 0, -1):
        with pytest.raises(data.DataError, match="none would be left"):
            data.hold_out(whole, count)


def test_normalise():
    images = data.gratings(300, 10).train_images
    x = data.Normalise(images)(images)
    assert x.dtype == torch.float32
    assert torch.allclose(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-4)
    assert torch.allclose(x.std((0, 2, 3)), torch.ones(3), atol=1e-3)
    flat = torch.full((2, 3, 4, 4), 7, dtype=torch.uint8)
    assert not data.Normalise(flat)(flat).any()                             # one colour: no division by 0


def test_augment_is_a_crop_and_a_mirror(device):
    n = 300
    generator = torch.Generator(device).manual_seed(0)
    images = torch.randint(1, 256, (n, 3, 32, 32), dtype=torch.uint8).to(device)
    out = data.augment(images, generator)
    assert out.shape == images.shape and out.dtype == torch.uint8
    assert out.is_contiguous(memory_format=torch.channels_last)
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    kinds = set()
    for i in range(n):
        matches = [(dy, dx, flip) for dy in range(9) for dx in range(9) for flip in (False, True)
                   if (padded[i, 0, dy + 16, dx:dx + 32].flip(0) if flip else padded[i, 0, dy + 16, dx:dx + 32])
                   .equal(out[i, 0, 16])]
        assert len(matches) == 1
        dy, dx, flip = matches[0]
        crop = padded[i, :, dy:dy + 32, dx:dx + 32]
        assert torch.equal(out[i], crop.flip(2) if flip else crop)
        kinds.add(matches[0])
    assert {k[0] for k in kinds} == {k[1] for k in kinds} == set(range(9)) and {k[2] for k in kinds} == {False, True}
    assert not torch.equal(data.augment(images, generator), out)            # drawn anew
    again = torch.Generator(device).manual_seed(0)
    assert torch.equal(data.augment(images, again), out)
    rows = data.augment(images, again, flip=False)[:, 0, 16].cpu()
    originals = padded[:, 0, 16:25].cpu()                                   # (n, 9, 40)
    assert all((originals[i].unfold(1, 32, 1) == rows[i]).all(-1).any() for i in range(n))


def test_an_epoch_shows_each_image_once():
    labels = torch.arange(100)
    images = labels.view(-1, 1, 1, 1).expand(100, 3, 8, 8).to(torch.uint8)
    generator = torch.Generator().manual_seed(0)
    seen = [list(data.batches(images, labels, 32, generator, flip=False)) for _ in range(2)]
    assert [len(y) for _, y in seen[0]] == [32, 32, 32] == [32] * data.steps(100, 32)
    order = [torch.cat([y for _, y in epoch]) for epoch in seen]
    assert len(set(order[0].tolist())) == 96 and not torch.equal(*order)
    for x, y in seen[0]:
        assert torch.equal(x.amax((1, 2, 3)).long(), y)                         # the image still goes with its label
    (only,) = data.batches(images[:10], labels[:10], 32, generator)
    assert len(only[1]) == 10
