"""harness/files.py: a file is whole or not there, whatever happens; a damaged one is refused in one line;
nothing in it is run; and one process at a time writes to a folder."""
import contextlib
import errno
import os
import resource
import shutil
import struct
import zipfile

import pytest
import torch

from harness import files

STATE = {"weights": torch.arange(20_000.0), "epoch": 3, "names": ["a", "b"]}


def raising(error):
    """A function that fails."""
    def fails(*_):
        raise error
    return fails


def same(content):
    return (content.keys() == STATE.keys() and torch.equal(content["weights"], STATE["weights"])
            and content["names"] == STATE["names"] and content["epoch"] == 3)


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- writing -----------------------------------------------------------------------------------------------

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


def test_without_links_too_the_file_before_is_kept_under_a_second_name(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", raising(OSError(errno.EPERM, "no links")))
    for epoch in range(3):
        files.write_tensors(tmp_path / "new.pt", epoch, keep="old.pt")
    assert files.read(tmp_path / "new.pt") == 2 and files.read(tmp_path / "old.pt") == 1
    assert listing(tmp_path) == ["new.pt", "old.pt"]


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
    folder = tmp_path / "a run\nof two lines"
    folder.mkdir()
    files.write_tensors(folder / "state.pt", STATE)

    def failing(said):
        with pytest.raises(files.Problem) as caught:
            files.write_tensors(folder / "state.pt", [STATE, 1])
        path = f"{tmp_path}/a run of two lines/state.pt"
        assert str(caught.value) == f"cannot write {path}: {said}; all that was written before is still there"

    with files_of_at_most(50_000):
        failing("File too large")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", raising(PermissionError(errno.EACCES, "Permission denied")))
        failing("Permission denied")
    assert same(files.read(folder / "state.pt")) and listing(folder) == ["state.pt"]
    shutil.rmtree(folder)
    failing("No such file or directory")


def test_logs_are_json_on_one_line_each(tmp_path):
    files.write_json(tmp_path / "a.json", {"a": [1, None]})
    files.write_lines(tmp_path / "a.jsonl", [{"a": 1}, {"b": "é\n"}])
    assert (tmp_path / "a.json").read_text() == '{\n  "a": [\n    1,\n    null\n  ]\n}\n'
    assert (tmp_path / "a.jsonl").read_text() == '{"a": 1}\n{"b": "\\u00e9\\n"}\n'
    with pytest.raises(ValueError):                             # NaN is no JSON
        files.write_json(tmp_path / "a.json", float("nan"))


# ---- reading -----------------------------------------------------------------------------------------------

def refused(path, why):
    with pytest.raises(files.Problem, match=why) as caught:
        files.read(path, "delete it")
    text = str(caught.value)
    assert str(path) in text and text.endswith("; delete it") and len(text.splitlines()) == 1


class RunsCode:
    """Unpickled, it makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def test_nothing_in_a_file_is_executed(tmp_path):
    path, marker = tmp_path / "state.pt", tmp_path / "marker"
    torch.save({**STATE, "names": RunsCode(marker)}, path)
    refused(path, "is damaged")
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()                                      # so the trap works


def test_a_damaged_file_is_refused_and_one_that_is_not_there_is_not_called_damaged(tmp_path):
    path = tmp_path / "state.pt"
    refused(path, "cannot read .*: No such file or directory")
    files.write_tensors(path, STATE)
    raw = path.read_bytes()
    one_weight = raw.replace(struct.pack("<2f", 7, 8), bytes(8))
    assert one_weight != raw
    for damaged, why in ((raw[:9000], "is not a zip file"), (b"", "is not a zip file"),
                         (one_weight, "wrong checksum")):
        path.write_bytes(damaged)
        refused(path, f"is damaged .*{why}")


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

def test_only_one_has_a_folder_and_what_a_dead_one_had_begun_is_deleted(tmp_path):
    with files.claim(tmp_path):
        with pytest.raises(files.Problem, match="another process is writing to"), files.claim(tmp_path):
            pass
    (tmp_path / ".log.jsonl.partial").write_text("{")
    with files.claim(tmp_path) as handles:
        assert len(handles) == 1 and listing(tmp_path) == []
