"""data.py: gratings that only orientation tells apart, crops and mirrors that lose nothing, each image once
an epoch."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
from harness import files

NAMES = [f"class {i}" for i in range(100)]


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
    assert by_class.std(0).max() < 5                                # grey levels: no colour tells the class


def test_held_out_images_are_training_images_that_are_not_trained_on():
    whole = data.gratings(100, 20)
    held = data.hold_out(whole, 30)
    assert torch.equal(torch.cat([held.train_images, held.test_images]), whole.train_images)
    assert torch.equal(torch.cat([held.train_labels, held.test_labels]), whole.train_labels)
    assert len(held.test_labels) == 30
    rows = [set(map(bytes, part.numpy())) for part in (held.train_images, held.test_images)]
    assert len(rows[0]) == 70 and len(rows[1]) == 30 and not rows[0] & rows[1]
    for count in (100, 101, 0, -1):
        with pytest.raises(ValueError, match="none would be left"):
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
        assert torch.equal(x.amax((1, 2, 3)).long(), y)                 # the image still goes with its label
    (only,) = data.batches(images[:10], labels[:10], 32, generator)
    assert len(only[1]) == 10


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


def pictures(n, seed=0):
    return torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def good():
    """A part of CIFAR-100, as a file of the cache holds it."""
    return {"train_images": pictures(4), "train_labels": torch.tensor([0, 1, 2, 99]),
            "test_images": pictures(2, 1), "test_labels": torch.tensor([0, 1]), "classes": list(NAMES)}


def test_a_data_set_is_loaded_by_its_name(tmp_path):
    torch.save(good(), tmp_path / "cifar100.pt")
    dataset = data.load("cifar100", tmp_path)
    assert {tuple(map(int, (image.sum(), label))) for image, label in zip(*dataset[:2])} == {
        tuple(map(int, (image.sum(), label))) for image, label in zip(pictures(4), [0, 1, 2, 99])}
    assert dataset.test_images.shape == (2, 3, 32, 32) and dataset.classes == NAMES
    assert data.digest(data.load("gratings", tmp_path)) == data.digest(data.gratings())


def test_a_lesson_needs_nothing_but_torch_and_loads_what_is_asked_for(tmp_path):
    """Copied alone into another project, gratings still load; and elsewhere a name that means nothing is one
    line."""
    (tmp_path / "data.py").write_bytes(Path(data.__file__).read_bytes())
    alone = subprocess.run([sys.executable, "-c", "import data; print(data.digest(data.load('gratings')))"],
                           cwd=tmp_path, capture_output=True, text=True)
    assert alone.stdout == data.digest(data.gratings()) + "\n", alone.stderr
    with pytest.raises(files.Problem, match="mnist is no data set: .*; expected train/ and test/"):
        data.load("mnist", tmp_path)
