"""--dataset FOLDER: the images and labels that were written, in a stable order, cached, and every fault named."""
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import image_tree
import numpy
import pytest
import torch
from PIL import Image

import data
import train


def made(classes=("ant", "bee", "cow"), count=12, size=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for part, n in (("train", count), ("test", count // 2)):
        parts[f"{part}_images"] = torch.randint(256, (n, 3, size, size), generator=generator, dtype=torch.uint8)
        parts[f"{part}_labels"] = torch.arange(n) % len(classes)
    return {**parts, "classes": list(classes)}


@pytest.fixture
def tree(tmp_path):
    image_tree.write(made(), tmp_path / "my images")
    return tmp_path / "my images"


def beside(tree):
    """Names of what there is, but for the locks, which are empty and may stay."""
    return {path.name for path in tree.parent.iterdir() if not path.name.endswith(".lock")}


def test_the_same_images_labels_and_order_as_were_written(tree):
    dataset = data.load(str(tree))
    for key, value in made().items():
        got = getattr(dataset, key)
        assert torch.equal(got, value) if isinstance(value, torch.Tensor) else got == value, key


def test_it_trains_like_the_data_set_that_it_was_written_from(tmp_path, monkeypatch):
    """100 classes in a cifar100.pt, and the same as a tree of PNGs: the same log to the last bit."""
    classes = data.CIFAR["cifar100"].classes
    content = made(classes, 200)
    content["test_labels"] = torch.arange(100)
    torch.save(content, tmp_path / "cifar100.pt")
    image_tree.write(data.load("cifar100", tmp_path)._asdict(), tmp_path / "tree")
    monkeypatch.chdir(tmp_path)
    small = ["--model", "cnn", "--width", "4", "--epochs", "2", "--batch-size", "32", "--device", "cpu", "--data", ".",
             "--norm"]
    logs = []
    for dataset in ("cifar100", "tree"):
        assert train.main(["--dataset", dataset, *small, "--out", f"run-{dataset}"]) == 0
        logs.append([{k: v for k, v in json.loads(line).items() if k != "seconds"}
                     for line in (tmp_path / f"run-{dataset}" / "log.jsonl").read_text().splitlines()])
    assert logs[0] == logs[1]
    assert train.main(["--dataset", "tree", *small, "--image-size", "16", "--subset", "50"]) == 0
    assert (tmp_path / "runs" / "fa-batch-tree-cnn-s0").is_dir() and (tmp_path / "tree.16.pt").exists()


def test_decoded_once_and_again_when_the_folder_has_changed(tree, monkeypatch):
    data.load(str(tree))
    cache = tree.with_name("my images.32.pt")
    assert cache.exists()
    decode = data._decode
    with monkeypatch.context() as patch:
        patch.setattr(data, "_decode", lambda *_: 1 / 0)
        data.load(str(tree))                                    # nothing is decoded
        data.load(f"{tree}/../my images")
        for change in (lambda: os.utime(tree / "train/ant/00000.png", (1, 1)), lambda: (tree / "train/ant/00003.png").unlink(),
                       lambda: (tree / "test/ant/00000.png").rename(tree / "test/bee/00000.png")):
            change()
            with pytest.raises(ZeroDivisionError):
                data.load(str(tree))
            with monkeypatch.context() as whole:
                whole.setattr(data, "_decode", decode)
                data.load(str(tree))
            data.load(str(tree))
    dataset = data.load(str(tree))
    assert len(dataset.train_images) == 11 and dataset.test_labels[0] == 1


def test_other_sizes_shapes_and_modes_become_square_rgb(tmp_path):
    for name, mode, size in (("a", "L", (64, 48)), ("b", "RGBA", (20, 90)), ("c", "P", (48, 48))):
        for part in ("train", "test"):
            (tmp_path / "t" / part / name).mkdir(parents=True)
        Image.new(mode, size, 200 if mode == "L" else 0).save(tmp_path / "t" / "train" / name / "x.png")
        Image.new("L", size, size[0]).save(tmp_path / "t" / "test" / name / "x.png")
    dataset = data.load(str(tmp_path / "t"), size=24)
    assert dataset.train_images.shape == (3, 3, 24, 24) and (dataset.train_images[0] == 200).all()
    # a wide image keeps its middle: the left and right quarters are cut off
    wide = torch.zeros(3, 24, 48, dtype=torch.uint8)
    wide[:, :, 12:36] = 255
    Image.fromarray(wide.permute(1, 2, 0).numpy()).save(tmp_path / "t/train/a/x.png")
    assert (data.load(str(tmp_path / "t"), size=24).train_images[0] == 255).all()


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_16_bits_of_grey_are_scaled_to_8(tree, order):
    """A ramp from 1000 to 60000 of 65535 has a mean of 30500, which is 119 of 255."""
    ramp = numpy.linspace(1000, 60000, 32).round().astype(order)
    pixels = numpy.tile(ramp, (32, 1))
    name = f"train/ant/00000.{'png' if order == '<u2' else 'tiff'}"
    (tree / "train/ant/00000.png").unlink()
    Image.fromarray(pixels).save(tree / name)
    assert Image.open(tree / name).mode.startswith("I;16")
    image = data.load(str(tree)).train_images[0].float()
    assert abs(image.mean() - 119) < 1
    assert torch.allclose(image, torch.from_numpy(pixels.astype("f4")).expand(3, 32, 32) * 255 / 65535, atol=1)


def test_what_is_hidden_is_no_class_and_no_image(tree, capsys):
    before = data.digest(data.load(str(tree)))
    for folder in ("train/.ipynb_checkpoints", "test/.ipynb_checkpoints", "train/ant/.ipynb_checkpoints"):
        shutil.copytree(tree / "train/bee", tree / folder)
    (tree / "train/ant/._00000.png").write_bytes(b"what a Mac leaves")
    assert data.digest(data.load(str(tree))) == before and capsys.readouterr().err == ""


def test_files_of_other_types_are_counted_in_one_line(tree, capsys):
    for name in ("train/ant/1.jfif", "train/ant/2.JFIF", "test/cow/deep/3.heic", "train/bee/4.jfif", "train/bee/README"):
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_bytes(b"")
    for _ in range(2):                                          # also when the images are there already
        assert len(data.load(str(tree)).train_images) == 12
        assert capsys.readouterr().err.startswith(
            f"{tree}: files that are left out: 3 .jfif, 1 .heic, 1 without extension; images are .jpg, ")


def test_tiny_imagenet_as_it_unpacks(tmp_path):
    folder = tmp_path / "tiny-imagenet-200"
    names = ["n01443537", "n01629819"]
    for name in names:
        (folder / "train" / name / "images").mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (64, 64), (10 * i, 0, 0)).save(folder / "train" / name / "images" / f"{name}_{i}.JPEG")
        (folder / "train" / name / f"{name}_boxes.txt").write_text("boxes\n")
    for part in ("val", "test"):
        (folder / part / "images").mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (64, 64), (0, 99 * i, 50)).save(folder / part / "images" / f"{part}_{i}.JPEG")
    (folder / "val" / "val_annotations.txt").write_text(f"val_0.JPEG\t{names[1]}\t0\t32\t44\t62\n"
                                                        f"val_1.JPEG\t{names[0]}\t1\t1\t2\t2\n")
    dataset = data.load(str(folder), size=64)
    assert dataset.classes == names and dataset.train_labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert dataset.test_labels.tolist() == [1, 0] and dataset.test_images[1, 1].float().mean() > 90
    annotations = folder / "val" / "val_annotations.txt"
    annotations.write_text(annotations.read_text().replace(names[1], names[0]))         # other labels, the same images
    assert data.load(str(folder), size=64).test_labels.tolist() == [0, 0]
    annotations.write_text("val_0.JPEG\tn00000000\t0\t32\t44\t62\n")
    with pytest.raises(data.DataError, match="has classes that .* lacks: n00000000"):
        data.load(str(folder), size=64)


def nothing(tree):
    for path in tree.rglob("*.png"):
        path.unlink()


FAULTS = {
    "no folder": (lambda tree: tree.rename(tree.with_name("gone")), "unknown data set"),
    "no test": (lambda tree: (tree / "test").rename(tree / "later"), "has no folder val/: a data set needs train/ and test/"),
    "no train": (lambda tree: (tree / "train").rename(tree / "later"), "has no folder train/"),
    "empty": (nothing, "is no training set: it holds no images (.jpg, "),
    "an empty class": (lambda tree: [p.unlink() for p in (tree / "train/bee").iterdir()],
                       ".webp) of bee"),
    "no class": (lambda tree: [(tree / "train" / name).rename(tree / name) for name in ("ant", "bee", "cow")],
                 "train has no folder of a class: there is nothing to tell apart"),
    "one class": (lambda tree: [(tree / part / name).rename(tree / f"{part}{name}") for part in ("train", "test")
                                for name in ("ant", "bee")], "has one class only, cow"),
    "a link to nowhere": (lambda tree: [(tree / "train/ant" / name).symlink_to("gone") for name in ("x.png", "y.PNG", "z")],
                          "holds links to files that are not there: train/ant/x.png, train/ant/y.PNG, train/ant/z; mend"),
    "a class that is a link to nowhere": (lambda tree: (tree / "test/dog").symlink_to("gone"),
                                          "holds links to files that are not there: test/dog; mend"),
    "integers of any range": (lambda tree: Image.new("I", (40, 30)).save(tree / "test/cow/00002.tiff"),
                              "cannot be read as images: test/cow/00002.tiff (its mode is I); mend"),
    "floats": (lambda tree: Image.new("F", (40, 30)).save(tree / "test/cow/00002.tiff"),
               "cannot be read as images: test/cow/00002.tiff (its mode is F); mend"),
    "a class more in test": (lambda tree: (tree / "test/bee").rename(tree / "test/dog"), "test has classes that"),
    "nothing to test": (lambda tree: [p.unlink() for p in (tree / "test").rglob("*.png")], "holds no images (.jpg"),
    "unreadable": (lambda tree: [(tree / f"train/ant/{i:05}.png").write_bytes(b"no image") for i in (0, 3, 6)],
                   "cannot be read as images: train/ant/00000.png, train/ant/00003.png, train/ant/00006.png; mend"),
    "test images trained on": (lambda tree: [(tree / "test/cow" / name).write_bytes((tree / "train/cow/00005.png").read_bytes())
                                             for name in ("00002.png", "00005.png")],
                               "2 of its 6 test images are training images too, bit for bit: test/cow/00002.png, "
                               "test/cow/00005.png"),
    "all images the same": (lambda tree: [Image.new("RGB", (40, 30)).save(path) for path in (tree / "train").rglob("*.png")],
                            "its 12 train images are all the same"),
    "a name of two lines": (lambda tree: (tree / "train/ant/00000.png").with_name("a\nb.png").write_bytes(b"no image"),
                            r"cannot be read as images: 'train/ant/a\nb.png'; mend"),
    "truncated": (lambda tree: (tree / "test/cow/00002.png").write_bytes((tree / "test/cow/00002.png").read_bytes()[:200]),
                  "cannot be read as images: test/cow/00002.png; mend"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_and_nothing_is_kept(fault, tree, capsys, monkeypatch):
    monkeypatch.chdir(tree.parent)
    break_it, said = FAULTS[fault]
    break_it(tree)
    with pytest.raises(data.DataError) as e:
        data.load(str(tree))
    assert said in str(e.value) and "\n" not in str(e.value), e.value
    try:
        status = train.main(["--dataset", "my images", "--device", "cpu"])
    except SystemExit as stopped:
        status = stopped.code
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1 and error.startswith("train.py: ")
    assert beside(tree) <= {"my images", "gone"}


def test_a_cache_that_is_damaged_or_cannot_be_right_is_refused(tree):
    cache = tree.with_name("my images.32.pt")
    cache.write_bytes(b"no cache")
    with pytest.raises(data.DataError, match="is damaged or no data set at all"):
        data.load(str(tree))
    cache.unlink()
    data.load(str(tree))
    content = torch.load(cache, weights_only=True)
    torch.save({**content, "test_images": content["train_images"][:6]}, cache)
    with pytest.raises(data.DataError, match="is not what it should be: 6 of its 6 test images .*; delete it, and it is made"):
        data.load(str(tree))


@pytest.mark.parametrize("what", ["lock", "write"])
def test_a_cache_that_cannot_be_made_is_done_without(tree, monkeypatch, what):
    """An older cache stays as it is, and nothing is decoded twice in a run."""
    data.load(str(tree))
    cache, decoded = tree.with_name("my images.32.pt"), []
    old, decode = cache.read_bytes(), data._decode
    os.utime(tree / "train/ant/00000.png", (1, 1))
    with monkeypatch.context() as patch:
        patch.setattr(data, "_decode", lambda *args: decoded.append(args) or decode(*args))
        if what == "lock":
            patch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "No locks available")))
        else:
            patch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(RuntimeError("unexpected pos\n64")))
        said = "No locks available" if what == "lock" else "unexpected pos 64"
        with pytest.warns(UserWarning, match=f"cannot keep the decoded images in .*32.pt: {said}; the next run") as warned:
            assert len(data.load(str(tree)).train_images) == 12
        assert "\n" not in str(warned[0].message)
    assert len(decoded) == 2 and cache.read_bytes() == old
    assert beside(tree) == {"my images", "my images.32.pt"}
    data.load(str(tree))
    with monkeypatch.context() as patch:
        patch.setattr(filelock, "FileLock", None)               # a cache that is right is read without a lock
        patch.setattr(data, "_decode", None)
        data.load(str(tree))


CHILD = """
import os, signal, sys
import torch
import data
decode = data._decode

def slow(*args):
    print("decoding", flush=True)
    sys.stdin.readline()
    return decode(*args)

def save(content, file):
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

data._decode = slow
if sys.argv[2] == "killed":
    torch.save = save
data.load(sys.argv[1])
"""


@pytest.mark.parametrize("end", ["done", "killed"])
def test_of_two_processes_one_decodes_and_the_other_waits_and_says_so(tree, monkeypatch, capsys, end):
    process = subprocess.Popen([sys.executable, "-c", CHILD, str(tree), end], text=True, cwd=Path(data.__file__).parent,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "decoding\n"
    decoded, decode, said = [], data._decode, ""
    monkeypatch.setattr(data, "_decode", lambda *args: decoded.append(args) or decode(*args))
    with ThreadPoolExecutor(1) as pool:
        loaded = pool.submit(data.load, str(tree))
        while not loaded.done() and "\n" not in said:
            said += capsys.readouterr().err
            time.sleep(0.01)
        process.communicate("\n\n", timeout=60)                 # training images, test images
    assert said == f"waiting for another process that is making {tree.with_name('my images.32.pt')}\n"
    assert process.returncode == (0 if end == "done" else -signal.SIGKILL)
    assert len(decoded) == (0 if end == "done" else 2)          # what the other has made is used; half of it is not
    assert torch.equal(loaded.result().train_images, made()["train_images"])
    assert beside(tree) == {"my images", "my images.32.pt"}


def test_the_stamp_reads_no_file(tree):
    """Size and time of change stand for the content: 100,000 files are not read again for every run."""
    dataset = data.load(str(tree))
    stamp = (tree / "train/ant/00000.png").stat()
    (tree / "train/ant/00000.png").write_bytes(bytes(stamp.st_size))            # same size, same time: not noticed
    os.utime(tree / "train/ant/00000.png", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert torch.equal(data.load(str(tree)).train_images, dataset.train_images)


@pytest.mark.parametrize("wrong, said", {"--dataset gratings --image-size 64": "--image-size has no effect on gratings",
                                         "--dataset nowhere": "choose from gratings, cifar10, cifar100, or a folder of images",
                                         "--image-size 7": "of at least 8"}.items())
def test_wrong_arguments(wrong, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(wrong.split())
    assert stopped.value.code == 2 and said in capsys.readouterr().err
