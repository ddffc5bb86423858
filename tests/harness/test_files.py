"""harness/files.py: a file is whole or not there; a damaged one is refused in one line; nothing in it is
run."""
import contextlib
import errno
import os
import pickle
import resource
import shutil
import struct
import subprocess
import sys
import zipfile

import pytest
import torch
from conftest import ROOT

from harness import files

STATE = {"weights": torch.arange(20_000.0), "epoch": 3, "names": ["a", "b"]}


def raising(error):
    """A function that fails."""
    def fails(*_):
        raise error
    return fails


def same(content):
    return content.keys() == STATE.keys() and torch.equal(content["weights"], STATE["weights"]) \
        and content["names"] == STATE["names"] and content["epoch"] == 3


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


class RunsCode:
    """Unpickled, it makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


# ---- writing -----------------------------------------------------------------------------------------------

def test_what_is_written_is_read_again(tmp_path):
    files.write_tensors(tmp_path / "state.pt", STATE)
    assert same(files.read(tmp_path / "state.pt"))
    files.write_json(tmp_path / "a.json", {"a": [1, None]})
    files.write_lines(tmp_path / "a.jsonl", [{"a": 1}, {"b": "é\n"}])
    assert (tmp_path / "a.json").read_text() == '{\n  "a": [\n    1,\n    null\n  ]\n}\n'
    assert (tmp_path / "a.jsonl").read_text() == '{"a": 1}\n{"b": "\\u00e9\\n"}\n'
    assert listing(tmp_path) == ["a.json", "a.jsonl", "state.pt"]
    with pytest.raises(ValueError):                             # NaN is no JSON
        files.write_json(tmp_path / "a.json", float("nan"))


@pytest.mark.parametrize("links", [True, False])
def test_what_was_there_before_is_kept_under_a_second_name(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", raising(OSError(errno.EPERM, "no links")))
    for epoch in range(3):
        files.write_tensors(tmp_path / "new.pt", epoch, keep="old.pt")
    assert files.read(tmp_path / "new.pt") == 2 and files.read(tmp_path / "old.pt") == 1
    assert listing(tmp_path) == ["new.pt", "old.pt"]


@pytest.mark.parametrize("moment", ["save", "fsync", "link", "replace"])
def test_whenever_the_power_goes_something_whole_is_there(tmp_path, monkeypatch, moment):
    """Killed at each call of each kind in turn, until one write comes through."""
    class PowerCut(BaseException):
        pass

    target = torch if moment == "save" else os
    real = getattr(target, moment)
    for number in range(10):
        files.write_tensors(tmp_path / "new.pt", 1)
        files.write_tensors(tmp_path / "new.pt", 2, keep="old.pt")
        calls = []

        def dies(*args, calls=calls, number=number):
            calls.append(args)
            if len(calls) == number + 1:
                if moment == "save":
                    args[1].write(b"half")
                raise PowerCut
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(target, moment, dies)
            with contextlib.suppress(PowerCut):
                files.write_tensors(tmp_path / "new.pt", 3, keep="old.pt")
        files.tidy(tmp_path)
        kept = files.read(tmp_path / "new.pt"), files.read(tmp_path / "old.pt")
        assert kept in [(2, 1), (2, 2), (3, 2)] and listing(tmp_path) == ["new.pt", "old.pt"]
        if len(calls) <= number:                                # nobody died
            assert kept == (3, 2) and number > 0
            return
    raise AssertionError("it never came through")


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def record(handle):
        synced.append((os.fstat(handle).st_ino, (tmp_path / "state.pt").exists()))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", record)
    files.write_tensors(tmp_path / "state.pt", STATE)
    assert synced == [((tmp_path / "state.pt").stat().st_ino, False), (tmp_path.stat().st_ino, True)]


@contextlib.contextmanager
def files_of_at_most(size):
    """A write beyond it fails, as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_write_that_fails_is_one_line_and_leaves_the_rest_alone(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()
    files.write_tensors(folder / "state.pt", STATE)

    def failing(said):
        with pytest.raises(files.Problem) as caught:
            files.write_tensors(folder / "state.pt", [STATE, 1])
        path = folder / "state.pt"
        assert str(caught.value) == f"cannot write {path}: {said}; all that was written before is still there"

    with files_of_at_most(50_000):
        failing("File too large")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", raising(PermissionError(errno.EACCES, "Permission denied")))
        failing("Permission denied")
    assert same(files.read(folder / "state.pt")) and listing(folder) == ["state.pt"]
    shutil.rmtree(folder)
    failing("No such file or directory")


def test_a_reader_never_sees_half_a_file(tmp_path):
    """One that looks all the time while a log is written over and over: it always sees a whole one."""
    path = tmp_path / "log.jsonl"
    files.write_lines(path, [{"epoch": i} for i in range(50)])
    reader = subprocess.Popen([sys.executable, "-c", f"""
import json
for _ in range(1000):
    lines = open({str(path)!r}).read().splitlines()
    assert len(lines) >= 50 and all(json.loads(line) for line in lines[1:])
"""])
    count = 0
    while reader.poll() is None:
        files.write_lines(path, [{"epoch": i} for i in range(50 + count % 50)])
        count += 1
    assert reader.wait() == 0 and count > 1


# ---- reading -----------------------------------------------------------------------------------------------

def refused(path, why):
    with pytest.raises(files.Problem, match=why) as caught:
        files.read(path, "delete it")
    text = str(caught.value)
    assert str(path) in text and text.endswith("; delete it") and len(text.splitlines()) == 1


DAMAGE = {
    "truncated": (lambda raw: raw[:9000], "is not a zip file"),
    "empty": (lambda raw: b"", "is not a zip file"),
    "text": (lambda raw: b"Not Found", "is not a zip file"),
    "a weight changed": (lambda raw: raw.replace(struct.pack("<2f", 7, 8), bytes(8)), "wrong checksum"),
    "an older format": (lambda raw: pickle.dumps([1, 2]), "is not a zip file"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused(tmp_path, damage):
    change, why = DAMAGE[damage]
    files.write_tensors(tmp_path / "state.pt", STATE)
    raw = (tmp_path / "state.pt").read_bytes()
    (tmp_path / "state.pt").write_bytes(change(raw))
    assert (tmp_path / "state.pt").read_bytes() != raw
    refused(tmp_path / "state.pt", f"is damaged .*{why}")


def test_a_file_that_is_not_there_is_not_called_damaged(tmp_path):
    refused(tmp_path / "state.pt", "cannot read .*: No such file or directory")


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_file_is_executed(tmp_path, zipped):
    path, marker = tmp_path / "state.pt", tmp_path / "marker"
    torch.save({**STATE, "names": RunsCode(marker)}, path, _use_new_zipfile_serialization=zipped)
    refused(path, "is damaged")
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()                                      # so the trap works


def test_a_pickle_of_garbage_is_refused(tmp_path):
    """Inside an intact archive, where no checksum is wrong: pickle then fails in ways of its own."""
    path = tmp_path / "state.pt"
    files.write_tensors(path, STATE)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    (name,) = [name for name in members if name.endswith("data.pkl")]
    for garbage in (b"", b".", b"0.", b"\x80\x02J\x00.", b"\x80\x02K\x01Q.",
                    b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
                    b"\x80\x02ctorch._utils\n_rebuild_parameter\n(K\x01K\x00NtR.", members[name][:100]):
        with zipfile.ZipFile(path, "w") as archive:
            for member, raw in {**members, name: garbage}.items():
                archive.writestr(member, raw)
        refused(path, "is damaged")


# ---- one process at a time ---------------------------------------------------------------------------------

def test_only_one_process_has_a_folder_and_a_dead_one_holds_nothing(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from harness import files
with files.claim(Path({str(tmp_path)!r})):
    print("has it", flush=True)
    sys.stdin.read()
"""], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "has it\n"
        with pytest.raises(files.Problem, match="another process is writing to"), files.claim(tmp_path):
            pass
    finally:
        holder.kill()
        holder.communicate()
    (tmp_path / ".log.jsonl.partial").write_text("what the dead one had begun")
    with files.claim(tmp_path) as handles:
        assert len(handles) == 1 and listing(tmp_path) == []


def test_a_problem_is_one_line():
    assert str(files.Problem("a name\nof two lines,  and a\ttab")) == "a name of two lines, and a tab"
