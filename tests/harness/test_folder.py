"""harness/folder.py: the images and labels that were written, in a stable order, decoded once, and every
fault named."""
import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import image_tree
import numpy
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_cache import same

from harness import cache, files, folder
from harness.folder import images


def made(classes=("ant", "bee", "cow"), count=12, size=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for part, n in (("train", count), ("test", count // 2)):
        shape = (n, 3, size, size)
        parts[f"{part}_images"] = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        parts[f"{part}_labels"] = torch.arange(n) % len(classes)
    return {**parts, "classes": list(classes)}


@pytest.fixture
def tree(tmp_path):
    image_tree.write(made(), tmp_path / "my images")
    return tmp_path / "my images"


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


def test_a_cifar_written_as_a_folder_is_the_same_data_set(tmp_path):
    """And so it trains the same: nothing but the images, labels and class names reaches a run."""
    classes = [f"class {i:02}" for i in range(100)]
    content = {**made(classes, 200), "test_labels": torch.arange(100)}
    torch.save(content, tmp_path / "cifar100.pt")
    written = cache.cifar("cifar100", tmp_path)
    image_tree.write(written, tmp_path / "tree")
    assert same(images(tmp_path / "tree"), written)


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
            (tmp_path / "t" / part / name).mkdir(parents=True)
        Image.new(mode, size, 200 if mode == "L" else 0).save(tmp_path / "t" / "train" / name / "x.png")
        Image.new("L", size, size[0]).save(tmp_path / "t" / "test" / name / "x.png")
    dataset = images(tmp_path / "t", size=24)
    assert dataset["train_images"].shape == (3, 3, 24, 24) and (dataset["train_images"][0] == 200).all()
    # a wide image keeps its middle: the left and right quarters are cut off
    wide = torch.zeros(3, 24, 48, dtype=torch.uint8)
    wide[:, :, 12:36] = 255
    Image.fromarray(wide.permute(1, 2, 0).numpy()).save(tmp_path / "t/train/a/x.png")
    assert (images(tmp_path / "t", size=24)["train_images"][0] == 255).all()


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_16_bits_of_grey_are_scaled_to_8(tree, order):
    """A ramp from 1000 to 60000 of 65535 has a mean of 30500, which is 119 of 255."""
    ramp = numpy.linspace(1000, 60000, 32).round().astype(order)
    pixels = numpy.tile(ramp, (32, 1))
    name = f"train/ant/00000.{'png' if order == '<u2' else 'tiff'}"
    (tree / "train/ant/00000.png").unlink()
    Image.fromarray(pixels).save(tree / name)
    assert Image.open(tree / name).mode.startswith("I;16")
    image = images(tree)["train_images"][0].float()
    assert abs(image.mean() - 119) < 1
    expected = torch.from_numpy(pixels.astype("f4")) * 255 / 65535
    assert torch.allclose(image, expected.expand(3, 32, 32), atol=1)


def test_what_is_hidden_is_no_class_and_no_image(tree, capsys):
    before = images(tree)
    for place in ("train", "test", "train/ant"):
        shutil.copytree(tree / "train/bee", tree / place / ".ipynb_checkpoints")
    (tree / "train/ant/._00000.png").write_bytes(b"what a Mac leaves")
    assert same(images(tree), before) and capsys.readouterr().err == ""


def test_files_of_other_types_are_counted_in_one_line(tree, capsys):
    for name in ("train/ant/1.jfif", "train/ant/2.JFIF", "test/cow/deep/3.heic", "train/bee/4.jfif",
                 "train/bee/README"):
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_bytes(b"")
    for _ in range(2):                                          # also when the images are there already
        assert len(images(tree)["train_images"]) == 12
        assert capsys.readouterr().err.startswith(
            f"{tree}: files that are left out: 3 .jfif, 1 without extension, 1 .heic; images are .jpg, ")


def test_tiny_imagenet_as_it_unpacks(tmp_path):
    tiny = tmp_path / "tiny-imagenet-200"
    names = ["n01443537", "n01629819"]
    for name in names:
        (tiny / "train" / name / "images").mkdir(parents=True)
        for i in range(3):
            path = tiny / "train" / name / "images" / f"{name}_{i}.JPEG"
            Image.new("RGB", (64, 64), (10 * i, 0, 0)).save(path)
        (tiny / "train" / name / f"{name}_boxes.txt").write_text("boxes\n")
    for part in ("val", "test"):
        (tiny / part / "images").mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (64, 64), (0, 99 * i, 50)).save(tiny / part / "images" / f"{part}_{i}.JPEG")
    (tiny / "val" / "val_annotations.txt").write_text(f"val_0.JPEG\t{names[1]}\t0\t32\t44\t62\n"
                                                        f"val_1.JPEG\t{names[0]}\t1\t1\t2\t2\n")
    dataset = images(tiny, size=64)
    assert dataset["classes"] == names and dataset["train_labels"].tolist() == [0, 1, 0, 1, 0, 1]
    assert dataset["test_labels"].tolist() == [1, 0] and dataset["test_images"][1, 1].float().mean() > 90
    annotations = tiny / "val" / "val_annotations.txt"
    # the same images under other labels
    annotations.write_text(annotations.read_text().replace(names[1], names[0]))
    assert images(tiny, size=64)["test_labels"].tolist() == [0, 0]
    annotations.write_text("val_0.JPEG\tn00000000\t0\t32\t44\t62\n")
    with pytest.raises(files.Problem, match="are of classes that train/ lacks: n00000000"):
        images(tiny, size=64)


def nothing(tree):
    for path in tree.rglob("*.png"):
        path.unlink()


FAULTS = {
    "no folder": (lambda tree: tree.rename(tree.with_name("gone")), "is no data set: [Errno 2] No such file"),
    "no test": (lambda tree: (tree / "test").rename(tree / "later"),
                "my images/val'; expected train/ and test/ (or val/) in it"),
    "no train": (lambda tree: (tree / "train").rename(tree / "later"), "my images/train'; expected train/"),
    "empty": (nothing, "Found no valid file for the classes ant, bee, cow"),
    "an empty class": (lambda tree: [p.unlink() for p in (tree / "train/bee").iterdir()],
                       "Found no valid file for the classes bee"),
    "no class": (lambda tree: [(tree / "train" / name).rename(tree / name) for name in ("ant", "bee", "cow")],
                 "Couldn't find any class folder in"),
    "one class": (lambda tree: [(tree / part / name).rename(tree / f"{part}{name}")
                                for part in ("train", "test") for name in ("ant", "bee")],
                  "has one class only, cow: there is nothing"),
    "a link to nowhere": (lambda tree: (tree / "train/ant/x.png").symlink_to("gone"),
                          "train/ant/x.png: No such file or directory; mend or delete it"),
    "integers of any range": (lambda tree: Image.new("I", (40, 30)).save(tree / "test/cow/00002.tiff"),
                              "cannot be read as images: test/cow/00002.tiff (its mode is I); mend"),
    "floats": (lambda tree: Image.new("F", (40, 30)).save(tree / "test/cow/00002.tiff"),
               "cannot be read as images: test/cow/00002.tiff (its mode is F); mend"),
    "a class more in test": (lambda tree: (tree / "test/bee").rename(tree / "test/dog"),
                             "are of classes that train/ lacks: dog"),
    "nothing to test": (lambda tree: [p.unlink() for p in (tree / "test").rglob("*.png")],
                        "has no images to test on"),
    "unreadable": (lambda tree: [(tree / f"train/ant/0000{i}.png").write_bytes(b"no image") for i in (0, 3)],
                   "cannot be read as images: train/ant/00000.png, train/ant/00003.png; mend"),
    "test images trained on": (lambda tree: [shutil.copy(tree / "train/cow/00005.png", tree / name)
                                             for name in ("test/cow/00002.png", "test/cow/00005.png")],
                               "2 of its 6 test images are training images too, bit for bit: "
                               "test/cow/00002.png, test/cow/00005.png"),
    "all images the same": (lambda tree: [Image.new("RGB", (40, 30)).save(path)
                                          for path in (tree / "train").rglob("*.png")],
                            "its 12 train images are all the same"),
    "a name of two lines": (lambda tree: (tree / "train/ant/a\nb.png").write_bytes(b"no image"),
                            r"cannot be read as images: 'train/ant/a\nb.png'; mend"),
    "truncated": (lambda tree: os.truncate(tree / "test/cow/00002.png", 200),
                  "cannot be read as images: test/cow/00002.png; mend"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_and_nothing_is_kept(fault, tree):
    break_it, said = FAULTS[fault]
    break_it(tree)
    with pytest.raises(files.Problem) as caught:
        images(tree)
    text = str(caught.value)
    assert said in text and len(text.splitlines()) == 1 and str(tree) in text
    assert beside(tree) <= {"my images", "gone"}


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
        assert len(images(tree)["train_images"]) == 12
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and ("No locks available" if what == "lock" else "unexpected pos 64") in err[0]
    assert str(path) in err[0] and err[0].endswith("; the next run decodes the images again")
    assert len(decoded) == 4 and path.read_bytes() == old and beside(tree) == {"my images", "my images.32.pt"}
    images(tree)
    monkeypatch.setattr(files, "FileLock", None)               # a cache that is good is read without a lock
    images(tree)


CHILD = """
import os, signal, sys
import torch
from harness import folder
decode = folder._decode

def slow(*args):
    print("decoding", flush=True)
    sys.stdin.readline()
    return decode(*args)

def save(content, file):
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

folder._decode = slow
if sys.argv[2] == "killed":
    torch.save = save
folder.images(sys.argv[1])
"""


@pytest.mark.parametrize("end", ["done", "killed"])
def test_of_two_processes_one_decodes_and_the_other_waits(tree, monkeypatch, decoded, end):
    process = subprocess.Popen([sys.executable, "-c", CHILD, str(tree), end], text=True, cwd=ROOT,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "decoding\n"
    waits = threading.Event()

    class Lock(files.FileLock):
        def __enter__(self):
            waits.set()
            return super().__enter__()

    monkeypatch.setattr(files, "FileLock", Lock)
    with ThreadPoolExecutor(1) as pool:
        loaded = pool.submit(images, tree)
        came = waits.wait(60)
        process.communicate("\n\n", timeout=60)                # training images, test images
    assert came and process.returncode == (0 if end == "done" else -signal.SIGKILL)
    assert len(decoded) == (0 if end == "done" else 2)  # what the other has made is used; half of it is not
    assert same(loaded.result(), made())
    images(tree)
    assert beside(tree) <= {"my images", "my images.32.pt"} and len(decoded) == (0 if end == "done" else 2)


def test_the_stamp_reads_no_file(tree):
    before = images(tree)
    path = tree / "train/ant/00000.png"
    stamp = path.stat()
    path.write_bytes(bytes(stamp.st_size))                      # same size, same time: not noticed
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert same(images(tree), before)
