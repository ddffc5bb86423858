"""A run's folder: what was asked, what came of it, and the weights; written so that nothing is ever lost or half there.

    config.json             arguments, the command, versions, commit, device
    log.jsonl               one JSON object an epoch
    rank.jsonl              with --rank, one JSON object a recording
    checkpoint.pt           all that the rest of the run depends on, for torch.load(..., weights_only=True)
    checkpoint.previous.pt  the one before
    curves.png              loss and accuracy by epoch

Every file is written under another name, flushed to the disk, and renamed: whoever reads the folder, or finds it after
a power cut, sees each file whole. A run that was killed goes on from its last checkpoint; should that one be damaged all the
same, from the one before. Ctrl-C and a polite kill are asked for by `Interruption` and come between two steps.

Nothing here knows what a network is.
"""
from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import platform
import shutil
import signal
import subprocess
import sys
import threading
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

CONFIG, CHECKPOINT, PREVIOUS = "config.json", "checkpoint.pt", "checkpoint.previous.pt"


class RunError(Exception):
    """Why a run folder cannot be made, written, or gone on with, and what to do about it, in one line."""


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
            _tidy(folder)
            if not any(folder.iterdir()):
                return folder
        except OSError as e:
            raise error(folder, e) from e
        again = f", or go on with it by --resume {folder}" if (folder / CONFIG).exists() else ""
        raise RunError(f"{folder} is not empty, and a run never writes over another; choose a new --out{again}")
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


def _tidy(folder: Path) -> None:
    """Delete what a process that was killed had begun to write."""
    for left in folder.glob(".*.partial"):
        left.unlink()


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[list[int]]:
    """Be the only process that writes to this folder; one that dies holds nothing. Raises RunError if another does.

    Gives the handles that hold the claim: with them as its `pass_fds` a child shares it, and keeps it after our death.
    """
    try:
        import fcntl
    except ImportError:                                         # Windows has no such lock
        yield []
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise RunError(f"another process is writing to {folder}; wait for it, or stop it") from e
        except OSError:                                         # a file system without locks
            pass
        _tidy(folder)
        yield [handle]
    finally:
        os.close(handle)


# ---- writing ---------------------------------------------------------------------------------------------------

def write(path: Path, save: Callable[[Path], object]) -> None:
    """Call save(temporary path), then put the finished file at `path` in one step, on the disk.

    Raises RunError if that fails, such as on a full disk; what was at `path` before is still there.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        try:
            save(partial)
            _flush(partial)
            if path.name == CHECKPOINT and path.exists():
                _keep(path)
            os.replace(partial, path)
            if os.name != "nt":
                _flush(path.parent)                             # the new name too
        finally:
            partial.unlink(missing_ok=True)
    except (OSError, RuntimeError) as e:
        cause = e if isinstance(e, OSError) else e.__context__  # torch.save hides the reason behind a RuntimeError
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else " ".join(str(e).split())
        raise RunError(f"cannot write {path}: {reason}; all that was written before is still there") from e


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _keep(path: Path) -> None:
    """Give the last checkpoint a second name; at no moment is there none under the first."""
    partial = path.with_name(f".{PREVIOUS}.partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(path, partial)
    except OSError:                                             # a file system without links
        shutil.copyfile(path, partial)
        _flush(partial)
    os.replace(partial, path.with_name(PREVIOUS))


def write_json(path: Path, content: object) -> None:
    write(path, lambda partial: partial.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8"))


def write_log(path: Path, lines: list[dict]) -> None:
    """The whole log anew; it is small, and so it is never half a line."""
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    write(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_checkpoint(folder: Path, state: dict) -> None:
    """checkpoint.pt; the one that was there becomes checkpoint.previous.pt."""
    def save(partial: Path) -> None:
        with open(partial, "wb") as file:
            torch.save(state, file)

    write(folder / CHECKPOINT, save)


# ---- going on --------------------------------------------------------------------------------------------------

def read_config(folder: Path) -> dict:
    """What config.json says. Raises RunError if there is no run."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise RunError(f"{folder} is no run to go on with: {path}: {e.strerror or e}") from e
    except ValueError as e:
        raise RunError(f"{folder} is no run to go on with: {path} is no JSON ({e})") from e
    if not isinstance(config, dict) or not isinstance(config.get("args"), dict):
        raise RunError(f"{folder} is no run to go on with: {path} holds no arguments")
    return config


def read_checkpoint(folder: Path) -> tuple[dict | None, str]:
    """(the state, what went wrong): the last checkpoint, or if it is damaged the one before, or None if none was written yet.

    Raises RunError if none of those that are there can be read. Nothing in them is executed (weights_only).
    """
    said = []
    for name in (CHECKPOINT, PREVIOUS):
        path = folder / name
        if not path.exists():
            continue
        try:
            with zipfile.ZipFile(path) as archive:              # torch.load does not compare the checksums
                damaged = archive.testzip()
            if damaged:
                raise ValueError(f"{damaged} has a wrong checksum")
            state = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(state, dict):
                raise ValueError("it holds no state")
            return state, "; ".join(said)
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile, pickle.UnpicklingError) as e:
            reason = "not what a checkpoint holds" if isinstance(e, pickle.UnpicklingError) else " ".join(str(e).split())[:100]
            said.append(f"{path} is damaged ({reason})")
    if said:
        raise RunError(f"{'; '.join(said)}: there is nothing to go on from; start the run again with another --out")
    return None, ""


def drop_damaged(folder: Path) -> None:
    """Put the checkpoint before the damaged one in its place, so that two good ones are kept again after the next."""
    os.replace(folder / PREVIOUS, folder / CHECKPOINT)


def speak_anywhere() -> None:
    """Print on any terminal: a letter that its encoding lacks becomes a question mark."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


class Interruption:
    """Within this context Ctrl-C and SIGTERM are remembered, not obeyed: ask between two steps. A second Ctrl-C is obeyed.

    status      0, or 128 + the signal's number, which is what a shell expects a process to end with
    """

    def __init__(self, listen: bool = True) -> None:
        self.status, self.listen = 0, listen

    def __enter__(self) -> Interruption:
        # Python tells no other thread of signals.
        asked = (signal.SIGINT, signal.SIGTERM) if self.listen and threading.current_thread() is threading.main_thread() else ()
        self._before = {number: signal.signal(number, self._remember) for number in asked}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: types.FrameType | None) -> None:
        if self.status and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.status = 128 + number


# ---- what else belongs to a run --------------------------------------------------------------------------------

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


def picture(path: Path, draw: Callable[[], object]) -> bool:
    """Call draw(); where it fails, say so in one line and return False. A picture must never cost the numbers it shows."""
    try:
        draw()
    except Exception as e:  # noqa: BLE001  (a broken matplotlib, odd settings, a full disk: whatever it is, it is said)
        print(f"cannot draw {path}: {type(e).__name__}: {' '.join(str(e).split())}", file=sys.stderr)
        return False
    return True


def draw(path: Path, log: list[dict], title: str) -> None:
    """curves.png: loss on the left, training and test accuracy on the right."""
    os.environ["MPLBACKEND"] = "Agg"                            # a notebook's backend may stop the import
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
