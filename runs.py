"""A run's folder: what was asked, what came of it, and the weights.

    config.json     arguments, the command, versions, commit, device
    log.jsonl       one JSON object an epoch
    checkpoint.pt   the state after the last finished epoch, for torch.load(..., weights_only=True)
    curves.png      loss and accuracy by epoch

Every file is written under another name, flushed to the disk, and renamed: whoever reads the folder, or finds it after
a power cut, sees each file whole. Nothing here knows what a network is.
"""
from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch


class RunError(Exception):
    """Why there can be no run folder, and what to do about it, in one line."""


def create(folder: str | os.PathLike | None, name: str) -> Path:
    """Make an empty run folder: `folder`, or runs/<name>, or runs/<name>-2, ... where that is taken.

    Raises RunError if it cannot be made, or if `folder` already holds something: runs are evidence and are not written
    over.
    """
    def error(path: Path, e: OSError) -> RunError:
        return RunError(f"cannot make the run folder {path}: {e.strerror or e}; choose another --out")

    if folder is not None:
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not any(folder.iterdir()):
                return folder
        except OSError as e:
            raise error(folder, e) from e
        raise RunError(f"{folder} is not empty, and a run never writes over another; choose a new --out")
    number = 1
    while True:
        folder = Path("runs") / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)                          # of two runs started at once, one gets the name
            return folder
        except FileExistsError as e:
            if not folder.parent.is_dir():
                raise error(folder, e) from e
            number += 1
        except OSError as e:
            raise error(folder, e) from e


def write(path: Path, save: Callable[[Path], object]) -> None:
    """Call save(temporary path), then put the finished file at `path` in one step."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        save(partial)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: object) -> None:
    write(path, lambda partial: partial.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n"))


def write_log(path: Path, lines: list[dict]) -> None:
    """The whole log anew; it is small, and so it is never half a line."""
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    write(path, lambda partial: partial.write_text(text))


def provenance() -> dict:
    """What a number depends on beside the arguments: command, versions, commit (None outside a git checkout)."""
    return {"command": " ".join(sys.argv), "commit": _commit(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__}}


def _commit() -> str | None:
    here = Path(__file__).resolve().parent
    try:
        git = ["git", "-C", str(here)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py"]).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changed else "")


def draw(path: Path, log: list[dict], title: str) -> None:
    """curves.png: loss on the left, training and test accuracy on the right."""
    import matplotlib
    matplotlib.use("Agg")                                       # no display needed
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator
    finished = [line for line in log if line["test_accuracy"] is not None]
    epochs = [line["epoch"] for line in finished]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    left.plot(epochs, [line["train_loss"] for line in finished], "o-", color="#0072B2", markersize=3)
    left.set(xlabel="epoch", ylabel="training loss (nats)")
    for key, label, colour, style in [("train_accuracy", "training images, augmented", "#56B4E9", "o--"),
                                      ("test_accuracy", "test images", "#D55E00", "o-")]:
        right.plot(epochs, [100 * line[key] for line in finished], style, color=colour, label=label, markersize=3)
    right.set(xlabel="epoch", ylabel="accuracy (%)", ylim=(0, None))
    right.legend(frameon=False)
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        if not finished:
            axes.text(0.5, 0.5, "diverged in the first epoch", ha="center", transform=axes.transAxes)
    figure.suptitle(title, fontsize=10)
    write(path, lambda partial: figure.savefig(partial, dpi=130, format="png"))
    plt.close(figure)
