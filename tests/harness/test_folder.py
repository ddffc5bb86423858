"""harness/folder.py: the images and labels that were written, in a stable order, decoded once, and every
fault named."""
import errno
import fcntl
import os
import shutil

import numpy
import pytest
import torch
from PIL import Image
from test_cache import at_once, same
from torchvision.transforms.functional import to_pil_image

from harness import files, folder
from harness.folder import images


def made():
    generator = torch.Generator().manual_seed(0)
    parts = {}
    for part, n in (("train", 12), ("test", 6)):
        shape = (n, 3, 32, 32)
        parts[f"{part}_images"] = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        parts[f"{part}_labels"] = torch.arange(n) % 3
    return {**parts, "classes": ["ant", "bee", "cow"]}


@pytest.fixture
def tree(tmp_path):
    """made() as files train/ant/00000.png, train/bee/00001.png, ..."""
    dataset, top = made(), tmp_path / "my images"
    for part in ("train", "test"):
        for name in dataset["classes"]:
            (top / part / name).mkdir(parents=True)
        for i, (image, label) in enumerate(zip(dataset[f"{part}_images"], dataset[f"{part}_labels"])):
            to_pil_image(image).save(top / part / dataset["classes"][label] / f"{i:05}.png")
    return top


def beside(tree):
    """Names of what there is, but for the locks, which are empty and may stay."""
    return {path.name for path in tree.parent.iterdir() if not path.name.endswith(".lock")}


@pytest.fixture
def decoded(monkeypatch):
    """The calls that decode something: two for a folder, training images and test images."""
    calls, decode = [], folder._decode
    monkeypatch.setattr(folder, "_decode", lambda *args: calls.append(args) or decode(*args))
    return calls


def test_the_same_images_labels_and_order_as_were_written(tree):
    assert same(images(tree), made()) and same(images(str(tree)), made())


def test_decoded_once_and_again_when_the_folder_has_changed(tree, decoded):
    images(tree)
    assert beside(tree) == {"my images", "my images.32.pt"} and len(decoded) == 2
    images(tree)
    images(tree / ".." / "my images")
    assert len(decoded) == 2
    changes = (lambda: os.utime(tree / "train/ant/00000.png", (1, 1)),
               lambda: (tree / "train/ant/00003.png").unlink(),
               lambda: (tree / "test/ant/00000.png").rename(tree / "test/bee/00000.png"))
    for number, change in enumerate(changes):
        change()
        for _ in range(2):
            content = images(tree)
            assert len(decoded) == 4 + 2 * number
    assert len(content["train_images"]) == 11 and content["test_labels"][0] == 1
    assert images(tree, 16)["train_images"].shape[2:] == (16, 16)
    assert beside(tree) == {"my images", "my images.32.pt", "my images.16.pt"}


def test_other_sizes_shapes_and_modes_become_square_rgb(tmp_path):
    for name, mode, size in (("a", "L", (64, 48)), ("b", "RGBA", (20, 90)), ("c", "P", (48, 48))):
        for part in ("train", "test"):
            (tmp_path / part / name).mkdir(parents=True)
        Image.new(mode, size, 200 if mode == "L" else 0).save(tmp_path / "train" / name / "x.png")
        Image.new("L", size, size[0]).save(tmp_path / "test" / name / "x.png")
    dataset = images(tmp_path, size=24)
    assert dataset["train_images"].shape == (3, 3, 24, 24) and (dataset["train_images"][0] == 200).all()
    # a wide image keeps its middle: the left and right quarters are cut off
    wide = torch.zeros(3, 24, 48, dtype=torch.uint8)
    wide[:, :, 12:36] = 255
    to_pil_image(wide).save(tmp_path / "train/a/x.png")
    assert (images(tmp_path, size=24)["train_images"][0] == 255).all()


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_16_bits_of_grey_are_scaled_to_8(tree, order):
    ramp = numpy.linspace(1000, 60000, 32).round().astype(order)
    pixels = numpy.tile(ramp, (32, 1))
    name = f"train/ant/00000.{'png' if order == '<u2' else 'tiff'}"
    (tree / "train/ant/00000.png").unlink()
    Image.fromarray(pixels).save(tree / name)
    assert Image.open(tree / name).mode.startswith("I;16")
    expected = torch.from_numpy(pixels.astype("f4")) * 255 / 65535
    assert torch.allclose(images(tree)["train_images"][0].float(), expected.expand(3, 32, 32), atol=1)


def test_what_is_hidden_is_left_out_and_what_has_another_type_is_counted(tree, capsys):
    for place in ("train", "test", "train/ant"):
        shutil.copytree(tree / "train/bee", tree / place / ".ipynb_checkpoints")
    (tree / "train/ant/._00000.png").write_bytes(b"what a Mac leaves")
    assert same(images(tree), made()) and capsys.readouterr().err == ""
    (tree / "test/cow/deep").mkdir()
    for name in ("train/ant/1.jfif", "train/ant/2.JFIF", "test/cow/deep/3.heic", "train/bee/4.jfif",
                 "train/bee/README"):
        (tree / name).write_bytes(b"")
    assert same(images(tree), made())
    assert capsys.readouterr().err.startswith(
        f"{tree}: files that are left out: 3 .jfif, 1 without extension, 1 .heic; images are .jpg, ")


def test_tiny_imagenet_as_it_unpacks(tmp_path):
    tiny, names = tmp_path / "tiny-imagenet-200", ["n01443537", "n01629819"]
    for name in names:
        (tiny / "train" / name / "images").mkdir(parents=True)
        for i in (2, 9, 10):
            path = tiny / "train" / name / "images" / f"{name}_{i}.JPEG"
            Image.new("RGB", (64, 64), (10 * i, 0, 0)).save(path)
        (tiny / "train" / name / f"{name}_boxes.txt").write_text("boxes\n")
    for part in ("val", "test"):
        (tiny / part / "images").mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (64, 64), (0, 99 * i, 50)).save(tiny / part / "images" / f"{part}_{i}.JPEG")
    annotations = tiny / "val" / "val_annotations.txt"
    annotations.write_text(f"val_0.JPEG\t{names[1]}\t0\t32\t44\t62\nval_1.JPEG\t{names[0]}\t1\t1\t2\t2\n")
    dataset = images(tiny, size=64)
    assert dataset["classes"] == names and dataset["train_labels"].tolist() == [0, 1, 0, 1, 0, 1]
    assert dataset["train_images"][-1, 0].float().mean() > 90          # by number: 10 comes after 9
    assert dataset["test_labels"].tolist() == [1, 0] and dataset["test_images"][1, 1].float().mean() > 90
    annotations.write_text(annotations.read_text().replace(names[0], names[1]))
    assert images(tiny, size=64)["test_labels"].tolist() == [1, 1]      # the same images under other labels


FAULTS = {
    "no test": (lambda tree: (tree / "test").rename(tree / "later"),
                "my images/val'; expected train/ and test/ (or val/) in it"),
    "an empty class": (lambda tree: [p.unlink() for p in (tree / "train/bee").iterdir()],
                       "Found no valid file for the classes bee"),
    "one class": (lambda tree: [(tree / part / name).rename(tree / f"{part}{name}")
                                for part in ("train", "test") for name in ("ant", "bee")],
                  "has one class only, cow: there is nothing"),
    "a class more in test": (lambda tree: (tree / "test/bee").rename(tree / "test/dog"),
                             "are of classes that train/ lacks: dog"),
    "nothing to test": (lambda tree: [p.unlink() for p in (tree / "test").rglob("*.png")],
                        "has no images to test on"),
    "a link to nowhere": (lambda tree: (tree / "train/ant/x.png").symlink_to("gone"),
                          "train/ant/x.png: No such file or directory; mend or delete it"),
    "unreadable": (lambda tree: [(tree / name).write_bytes(b"no image")
                                 for name in ("train/bee/00004.png", "train/ant/a\nb.png")],
                   r"cannot be read as images: 'train/ant/a\nb.png', train/bee/00004.png; mend"),
    "of any range": (lambda tree: [Image.new(mode, (40, 30)).save(tree / f"test/cow/{mode}.tiff")
                                   for mode in "IF"],
                     "test/cow/F.tiff (its mode is F), test/cow/I.tiff (its mode is I); mend"),
    "test images trained on": (lambda tree: [shutil.copy(tree / "train/cow/00005.png", tree / name)
                                             for name in ("test/cow/00002.png", "test/cow/00005.png")],
                               "2 of its 6 test images are training images too, bit for bit: "
                               "test/cow/00002.png, test/cow/00005.png"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_and_nothing_is_kept(fault, tree):
    break_it, said = FAULTS[fault]
    break_it(tree)
    with pytest.raises(files.Problem) as caught:
        images(tree)
    text = str(caught.value)
    assert said in text and len(text.splitlines()) == 1 and str(tree) in text
    assert beside(tree) == {"my images"}


def test_a_cache_that_is_damaged_or_cannot_be_correct_is_refused(tree):
    path = tree.with_name("my images.32.pt")
    path.write_bytes(b"no cache")
    with pytest.raises(files.Problem, match="is damaged .*; delete it, and it is made again"):
        images(tree)
    path.unlink()
    images(tree)
    content = torch.load(path, weights_only=True)
    torch.save({**content, "test_images": content["train_images"][:6]}, path)
    with pytest.raises(files.Problem, match="is not what it should be: 6 of its 6 test images .*; delete it"):
        images(tree)


@pytest.mark.parametrize("what", ["lock", "write"])
def test_a_cache_that_cannot_be_kept_is_done_without(tree, monkeypatch, capsys, decoded, what):
    """An older cache stays as it is, and nothing is decoded twice in a run."""
    images(tree)
    path = tree.with_name("my images.32.pt")
    old = path.read_bytes()
    os.utime(tree / "train/ant/00000.png", (1, 1))

    def fails(*_):
        if what == "lock":
            raise OSError(errno.ENOLCK, "No locks available")
        raise RuntimeError("unexpected pos\n64")

    with monkeypatch.context() as patch:
        patch.setattr(*((fcntl, "flock") if what == "lock" else (torch, "save")), fails)
        assert same(images(tree), made())
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and ("No locks available" if what == "lock" else "unexpected pos 64") in err[0]
    assert str(path) in err[0] and err[0].endswith("; the next run decodes the images again")
    assert len(decoded) == 4 and path.read_bytes() == old and beside(tree) == {"my images", "my images.32.pt"}
    images(tree)
    monkeypatch.setattr(files, "FileLock", None)                # a cache that is good is read without a lock
    images(tree)


def test_one_decodes_and_the_other_waits(tree, monkeypatch):
    first, second, calls = at_once(lambda: images(tree), folder, "_decode", monkeypatch)
    assert same(first, made()) and same(second, made()) and calls == 2      # training images, test images
