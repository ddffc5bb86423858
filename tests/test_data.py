"""data.py: crops and mirrors that lose nothing, each image once an epoch, gratings that only orientation
tells apart."""
import importlib.util
import sys

import pytest
import torch

import data
from harness import cache, files

NAMES = [f"class {i}" for i in range(100)]


def test_augment_is_a_crop_and_a_mirror_drawn_for_each_image(device):
    n = 300
    generator = torch.Generator(device).manual_seed(0)
    images = torch.randint(1, 256, (n, 3, 32, 32), dtype=torch.uint8).to(device)
    out = data.augment(images, generator)
    assert out.dtype == torch.uint8 and out.is_contiguous(memory_format=torch.channels_last)
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))

    def places(rows):
        """(image, dy, dx) wherever the middle row of a crop, of which there are 9 × 9, is this one."""
        return (padded[:, 0, 16:25].unfold(2, 32, 1) == rows[:, None, None]).all(3).nonzero().tolist()

    kinds = [(*place, False) for place in places(out[:, 0, 16])]
    kinds += [(*place, True) for place in places(out[:, 0, 16].flip(1))]        # mirrored back
    assert sorted(kind[0] for kind in kinds) == list(range(n))                  # one each
    for i, dy, dx, flip in kinds:
        crop = padded[i, :, dy:dy + 32, dx:dx + 32]
        assert torch.equal(out[i], crop.flip(2) if flip else crop)
    assert [len({kind[k] for kind in kinds}) for k in (1, 2, 3)] == [9, 9, 2]
    assert len({kind[1:] for kind in kinds}) > 80
    again = torch.Generator(device).manual_seed(0)
    assert torch.equal(data.augment(images, again), out)
    assert len(places(data.augment(images, again, flip=False)[:, 0, 16])) == n


def test_an_epoch_shows_each_image_once_with_its_label():
    labels = torch.arange(100)
    images = labels.view(-1, 1, 1, 1).expand(100, 3, 8, 8).to(torch.uint8)
    generator = torch.Generator().manual_seed(0)
    seen = [list(data.batches(images, labels, 32, generator, flip=False)) for _ in range(2)]
    assert [len(y) for _, y in seen[0]] == [32, 32, 32] == [32] * data.steps(100, 32)
    order = [torch.cat([y for _, y in epoch]) for epoch in seen]
    assert len(set(order[0].tolist())) == 96 and not torch.equal(*order)
    for x, y in seen[0]:
        assert torch.equal(x.amax((1, 2, 3)).long(), y)
    (only,) = data.batches(images[:10], labels[:10], 32, generator)
    assert len(only[1]) == 10


def test_images_are_normalised_to_mean_0_and_variance_1_a_channel():
    images = data.gratings(300, 10).train_images
    x = data.Normalise(images)(images)
    assert x.dtype == torch.float32
    assert torch.allclose(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-4)
    assert torch.allclose(x.std((0, 2, 3)), torch.ones(3), atol=1e-3)
    flat = torch.full((2, 3, 4, 4), 7, dtype=torch.uint8)
    assert not data.Normalise(flat)(flat).any()                             # one colour: no division by 0


def test_gratings_are_told_apart_by_orientation_and_nothing_simpler():
    clean = data.gratings(1000, 10, noise=0)
    grey = clean.train_images.float().mean(1)
    spectrum = torch.fft.fft2(grey - grey.mean((1, 2), keepdim=True))
    energy = spectrum.abs().square()
    frequency = torch.fft.fftfreq(32)
    direction = torch.atan2(frequency[:, None], frequency[None]) * 2        # twice: stripes have no sign
    mean = torch.atan2((energy * direction.sin()).sum((1, 2)), (energy * direction.cos()).sum((1, 2))) / 2
    found = (torch.rad2deg(mean) / 18).round() % 10
    assert (found == clean.train_labels).float().mean() > 0.9
    colour = clean.train_images.float().mean((2, 3))
    by_class = torch.stack([colour[clean.train_labels == k].mean(0) for k in range(10)])
    assert by_class.std(0).max() < 5                                # grey levels: no colour tells the class
    noisy, other = data.gratings(200, 50), data.gratings(200, 50, seed=1)
    assert not torch.equal(noisy.train_images, other.train_images)
    assert (noisy.train_images == 0).float().mean() > 0.02          # the noise is clamped, and does not wrap


def test_held_out_images_are_training_images_that_are_not_trained_on():
    whole = data.gratings(100, 20)
    held = data.hold_out(whole, 30)
    assert torch.equal(torch.cat([held.train_images, held.test_images]), whole.train_images)
    assert torch.equal(torch.cat([held.train_labels, held.test_labels]), whole.train_labels)
    assert len(held.test_labels) == 30 and held.classes == whole.classes
    for count in (100, 0):
        with pytest.raises(ValueError, match="at least 1 that is left"):
            data.hold_out(whole, count)


def pictures(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)


def good():
    """A part of CIFAR-100, as a file of the cache holds it."""
    return {"train_images": pictures(4), "train_labels": torch.tensor([0, 1, 2, 99]),
            "test_images": pictures(2, 1), "test_labels": torch.tensor([0, 1]), "classes": list(NAMES)}


def test_a_data_set_is_loaded_by_its_name(tmp_path):
    torch.save(good(), tmp_path / "cifar100.pt")
    dataset = data.load("cifar100", tmp_path)
    assert dataset.test_images.shape == (2, 3, 32, 32) and dataset.classes == NAMES
    with pytest.raises(files.Problem, match="mnist is no data set: .*; expected train/ and test/"):
        data.load("mnist", tmp_path)


def test_gratings_need_no_other_file_of_the_project(monkeypatch):
    for module in ("harness", "fa", "muon", "norm", "rank", "models"):
        monkeypatch.setitem(sys.modules, module, None)          # an import of it would fail
    spec = importlib.util.spec_from_file_location("alone", data.__file__)
    alone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alone)
    assert cache.digest(alone.load("gratings")) == cache.digest(data.gratings())
