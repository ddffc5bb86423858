"""Lets files survive a power cut, a full disk, a damaged byte and a second process.

A file is written under another name, flushed to the disk and then renamed: whoever reads it, or finds it
after a power cut, sees it whole. What torch saved is loaded once its checksums are verified, and nothing in
it is executed.
"""
from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from filelock import FileLock


class Problem(Exception):
    """What is wrong and what to do about it, in one line."""

    def __init__(self, text: str):
        super().__init__(" ".join(text.split()))                # a file's name may hold a line break


# ---- writing -----------------------------------------------------------------------------------------------

def write(path: Path, save: Callable[[Path], object], keep: str | os.PathLike | None = None) -> None:
    """Call save(temporary path), then put the finished file at `path` in one step, on the disk.

    keep    a second name, in the same folder, for the file that was at `path` before
    Raises Problem if that fails, such as on a full disk; what was at `path` before is still there.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        try:
            save(partial)
            _flush(partial)
            if keep and path.exists():
                _keep(path, path.with_name(Path(keep).name))
            os.replace(partial, path)
            if os.name != "nt":
                _flush(path.parent)                             # the new name too
        finally:
            partial.unlink(missing_ok=True)
    except (OSError, RuntimeError) as e:
        cause = e if isinstance(e, OSError) else e.__context__      # torch.save hides its reason there
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else e
        raise Problem(f"cannot write {path}: {reason}; all that was written before is still there") from e


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _keep(path: Path, second: Path) -> None:
    """Give the file a second name; at no moment is there none under the first."""
    partial = second.with_name(f".{second.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(path, partial)
    except OSError:                                             # a file system without links
        shutil.copyfile(path, partial)
        _flush(partial)
    os.replace(partial, second)


def write_json(path: Path, content: object) -> None:
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_lines(path: Path, lines: list[dict]) -> None:
    """One JSON object a line. The whole file is small and written anew, so it never ends in half a line."""
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    write(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_tensors(path: Path, content: object, keep: str | os.PathLike | None = None) -> None:
    """What `read` reads: tensors, numbers, texts, and lists and dictionaries of them."""
    def save(partial: Path) -> None:
        with open(partial, "wb") as file:  # given a path, torch.save would hide why it failed
            torch.save(content, file)

    write(path, save, keep)


# ---- reading -----------------------------------------------------------------------------------------------

# What a file of garbage makes zipfile and torch.load stumble over.
GARBAGE = (zipfile.BadZipFile, zlib.error, pickle.UnpicklingError, struct.error, OSError, RuntimeError,
           EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError)


def read(path: str | os.PathLike, remedy: str = "") -> object:
    """What torch saved at `path`, on the CPU. Raises Problem, saying what is wrong and then `remedy`."""
    remedy = f"; {remedy}" if remedy else ""
    try:
        file = open(path, "rb")
    except OSError as e:
        raise Problem(f"cannot read {path}: {e.strerror or e}{remedy}") from e
    with file:
        try:
            with zipfile.ZipFile(file) as archive:          # torch writes checksums, but does not check them
                damaged = archive.testzip()
            if damaged:
                raise zipfile.BadZipFile(f"{damaged} has a wrong checksum")
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
        except GARBAGE as e:
            reason = str(e)[:100] or type(e).__name__
            if isinstance(e, pickle.UnpicklingError):           # torch's long text advises to trust the file
                reason = "it holds more than tensors, numbers and texts"
            raise Problem(f"{path} is damaged ({reason}){remedy}") from e


# ---- one process at a time ---------------------------------------------------------------------------------

@contextlib.contextmanager
def claim(folder: Path) -> Iterator[list[int]]:
    """Be the only process that writes to this folder. Raises Problem if another is; one that died holds
    nothing.

    Gives the handles that hold the claim. A child that gets them as `pass_fds` shares it, and keeps it if we
    die.
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
            raise Problem(f"another process is writing to {folder}; wait for it, or stop it") from e
        except OSError:                                         # a file system without locks
            pass
        tidy(folder)
        yield [handle]
    finally:
        os.close(handle)


def lock(path: Path) -> FileLock:
    """For `with`: one process at a time makes the file at `path`. Raises OSError if no lock can be."""
    beside = path.with_name(f".{path.name}.lock")
    beside.touch()                                              # or FileLock would wait there for ever
    return FileLock(beside)


def tidy(folder: Path) -> None:
    """Delete what a process that was killed had begun to write."""
    for left in folder.glob(".*.partial"):
        left.unlink()
