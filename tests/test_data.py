"""data.py: torchvision's real download against a server on this machine, the cache and its checks, and the augmentation."""
import functools
import hashlib
import http.server
import io
import pickle
import tarfile
import threading

import numpy as np
import pytest
import torch
import torchvision

import data

COUNTS = {"train": 20, "test": 10}


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A CIFAR-100 archive of made images, served on 127.0.0.1, known to torchvision by its checksums."""
    folder = tmp_path / "server"
    folder.mkdir()
    generator = np.random.default_rng(0)
    pixels = {part: generator.integers(0, 256, (n, 3072), dtype=np.uint8) for part, n in COUNTS.items()}
    names = ["apple", *[f"thing {i}" for i in range(98)], "worm"]
    content = {part: {"data": pixels[part], "fine_labels": [i % 100 for i in range(n)]} for part, n in COUNTS.items()}
    content["meta"] = {"fine_label_names": names}
    md5 = {}
    with tarfile.open(folder / "cifar-100-python.tar.gz", "w:gz") as tar:
        for name, value in content.items():
            raw = pickle.dumps(value)
            info = tarfile.TarInfo(f"cifar-100-python/{name}")
            info.size, md5[name] = len(raw), hashlib.md5(raw).hexdigest()
            tar.addfile(info, io.BytesIO(raw))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    cifar = torchvision.datasets.CIFAR100
    monkeypatch.setattr(cifar, "url", f"http://127.0.0.1:{server.server_port}/cifar-100-python.tar.gz")
    monkeypatch.setattr(cifar, "tgz_md5", hashlib.md5((folder / "cifar-100-python.tar.gz").read_bytes()).hexdigest())
    monkeypatch.setattr(cifar, "train_list", [["train", md5["train"]]])
    monkeypatch.setattr(cifar, "test_list", [["test", md5["test"]]])
    monkeypatch.setattr(cifar, "meta", {"filename": "meta", "key": "fine_label_names", "md5": md5["meta"]})
    yield folder / "cifar-100-python.tar.gz", pixels, server
    server.shutdown()
    server.server_close()


class Quiet(http.server.SimpleHTTPRequestHandler):
    promised = None                                             # a length larger than what is sent: a broken connection

    def log_message(self, *args):
        pass

    def send_header(self, key, value):
        super().send_header(key, str(Quiet.promised) if key == "Content-Length" and Quiet.promised else value)


def test_download_then_cache_then_no_network(archive, tmp_path):
    _, pixels, server = archive
    root = tmp_path / "new" / "data"
    first = data.load("cifar100", root)
    assert [p.name for p in root.iterdir()] == ["cifar100.pt"]
    assert torch.equal(first.train_images, torch.from_numpy(pixels["train"]).view(-1, 3, 32, 32))
    assert first.test_labels.tolist() == list(range(10)) and first.classes[-1] == "worm"
    assert first.train_images.dtype == torch.uint8 and first.train_labels.dtype == torch.int64
    server.shutdown()
    server.server_close()
    for a, b in zip(first, data.load("cifar100", root)):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def failing(root, why):
    with pytest.raises(data.DataError, match=why) as caught:
        data.load("cifar100", root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_corrupt_download_is_refused_and_leaves_nothing(archive, tmp_path):
    path, *_ = archive
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    message = failing(tmp_path / "new" / "data", "cannot download cifar100 .*corrupt")
    assert "cifar100.pt" in message and not (tmp_path / "new").exists()


def test_an_interrupted_download_is_refused_and_leaves_nothing(archive, tmp_path, monkeypatch):
    path, *_ = archive
    monkeypatch.setattr(Quiet, "promised", path.stat().st_size)
    path.write_bytes(path.read_bytes()[:5000])
    failing(tmp_path, "cannot download cifar100")
    assert [p.name for p in tmp_path.iterdir()] == ["server"]


def test_a_killed_write_leaves_no_half_cache(archive, tmp_path, monkeypatch):
    def dies(content, file):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        data.load("cifar100", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["server"]


def test_no_network_and_no_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "url", "http://127.0.0.1:9/cifar.tar.gz")
    failing(tmp_path / "data", "cannot download cifar100 from http://127.0.0.1:9/")
    assert not list(tmp_path.iterdir())


def good():
    return {"train_images": torch.zeros(4, 3, 32, 32, dtype=torch.uint8), "train_labels": torch.tensor([0, 1, 2, 99]),
            "test_images": torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "test_labels": torch.tensor([0, 1]),
            "classes": ["apple", *[str(i) for i in range(98)], "worm"]}


WRONG = {
    "no dict": lambda c: [1, 2],
    "a key missing": lambda c: c.pop("classes") and c,
    "a key too many": lambda c: {**c, "extra": 1},
    "float images": lambda c: {**c, "train_images": c["train_images"].float()},
    "other size": lambda c: {**c, "test_images": torch.zeros(2, 3, 28, 28, dtype=torch.uint8)},
    "no tensor": lambda c: {**c, "test_images": None},
    "int32 labels": lambda c: {**c, "train_labels": c["train_labels"].int()},
    "a label missing": lambda c: {**c, "train_labels": c["train_labels"][1:]},
    "label too large": lambda c: {**c, "test_labels": torch.tensor([0, 100])},
    "negative label": lambda c: {**c, "test_labels": torch.tensor([0, -1])},
    "no images": lambda c: {**c, "test_images": c["test_images"][:0], "test_labels": c["test_labels"][:0]},
    "cifar10": lambda c: {**c, "classes": ["airplane", *[str(i) for i in range(8)], "truck"]},
    "classes no list": lambda c: {**c, "classes": "apple"},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_cache_of_something_else_is_refused_and_kept(tmp_path, wrong):
    torch.save(good(), tmp_path / "cifar100.pt")
    data.load("cifar100", tmp_path)
    torch.save(WRONG[wrong](good()), tmp_path / "cifar100.pt")
    raw = (tmp_path / "cifar100.pt").read_bytes()
    assert "delete it" in failing(tmp_path, "does not hold cifar100")
    assert (tmp_path / "cifar100.pt").read_bytes() == raw


class Malicious:
    def __reduce__(self):
        return print, ("a cache must never run code",)


@pytest.mark.parametrize("raw", ["truncated", "empty", "text", "pickle"])
def test_a_damaged_cache_is_refused(tmp_path, raw, capfd):
    file = tmp_path / "cifar100.pt"
    torch.save({**good(), "classes": Malicious()} if raw == "pickle" else good(), file)
    if raw != "pickle":
        file.write_bytes({"truncated": file.read_bytes()[:9000], "empty": b"", "text": b"Not Found"}[raw])
    failing(tmp_path, "is damaged or no data set at all")
    assert "never run code" not in capfd.readouterr().out


def test_unknown_name_and_unusable_folder(tmp_path):
    with pytest.raises(data.DataError, match="choose from gratings"):
        data.load("mnist", tmp_path)
    (tmp_path / "file").write_text("")
    failing(tmp_path / "file" / "data", "cannot use")


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
    with pytest.raises(data.DataError, match="none would be left"):
        data.hold_out(whole, 100)


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
