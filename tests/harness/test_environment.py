"""The commands where people run them: odd terminals, languages and homes, a reader who leaves, Ctrl-C, no
matplotlib, and what another launcher left behind."""
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from test_train import SMALL, small_gratings  # noqa: F401  (a fixture)

import reproduce
import train
from harness import lessons

QUICK = ["--subset", "64", "--width", "4", "--epochs", "1", "--batch-size", "32", "--device", "cpu"]
# An ASCII terminal, the C locale, no home, and the backend of a notebook.
ODD = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii",
       "HOME": "/dev/null", "MPLCONFIGDIR": "", "MPLBACKEND": "nonsense", "TERM": "dumb"}


def start(cwd, *args, script="train.py", **env):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **env}
    return subprocess.Popen([sys.executable, str(ROOT / script), *args], cwd=cwd,
                            env={key: value for key, value in environment.items()
                                 if value or key == "CUDA_VISIBLE_DEVICES"},
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_an_odd_environment(tmp_path):
    folder = tmp_path / "a folder with spaces, Ünïcödé and 数"
    folder.mkdir()
    (folder / "meine_regel.py").write_text("import fa\nclass Meine(fa.FA):\n    '''Rückwärts'''\n",
                                           encoding="utf-8")
    process = start(folder, *QUICK, "--rule", "meine_regel.py:Meine", "--out", "ein Lauf", **ODD)
    out, err = process.communicate()
    # at most two lines: matplotlib may warn
    assert b"final test accuracy" in out and b"Traceback" not in err and err.count(b"\n") <= 2, err
    assert {p.name for p in (folder / "ein Lauf").iterdir()} == {"config.json", "log.jsonl", "checkpoint.pt",
                                                                 "curves.png"}


def test_a_reader_who_leaves(tmp_path):
    process = start(tmp_path, *QUICK, "--epochs", "200")
    while not process.stdout.readline().startswith(b"epoch"):
        pass
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait() == 141 and err.count(b"\n") == 1
    assert b"nobody reads the output any more; finished epochs are in runs" in err


@pytest.mark.parametrize("script, args, unread", [("train.py", ["--help"], 0),         # argparse's own way
                                                  ("reproduce.py", ["--list"], 141), ("norm.py", [], 141)])
def test_an_odd_terminal_and_no_reader(tmp_path, script, args, unread):
    process = start(tmp_path, *args, script=script, **ODD)
    out, err = process.communicate()
    assert (process.returncode, err) == (0, b"") and out
    process = start(tmp_path, *args, script=script, **ODD)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == unread


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_signal_to_a_real_run(tmp_path):
    process = start(tmp_path, *QUICK, "--epochs", "2000", "--out", "run")
    while not (tmp_path / "run" / "log.jsonl").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    err = process.communicate()[1]
    assert (process.returncode == 130 and err.count(b"\n") == 1
            and b"go on with: python train.py --resume run" in err), err
    assert (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.fixture
def no_matplotlib(monkeypatch):
    """It is installed, and broken."""
    class Broken:
        def find_spec(self, name, *_):
            if name.partition(".")[0] == "matplotlib":
                raise ImportError("built for another\nmachine")

    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])


def test_a_picture_that_cannot_be_drawn_costs_no_result(no_matplotlib, tmp_path, capsys):
    for lr, status, last in (("0.02", 0, "final test accuracy"), ("1e30", 3, "diverged: at step")):
        assert train.main([*SMALL, "--device", "cpu", "--rank", "--lr", lr, "--out", lr]) == status
        out, err = capsys.readouterr()
        assert out.splitlines()[-1].startswith(last)
        assert err == f"cannot draw {lr}/curves.png: ImportError: built for another machine\n"
    with pytest.raises(SystemExit) as stopped:                  # here it is all that was asked for
        lessons.main("rank", ["0.02"])
    assert stopped.value.code == 2 and capsys.readouterr().err == "rank.py: built for another machine\n"


@pytest.mark.slow
def test_an_experiments_table_does_not_need_its_picture(no_matplotlib, tmp_path, capsys):
    assert reproduce.main(["quick", "--set", "epochs=1", "subset=64", "width=2", "--out", "mine",
                           "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert "| FA | " in out and err.startswith("cannot draw mine/quick") and err.count("\n") == 1, err


@pytest.mark.parametrize("main, args", [(train.main, QUICK), (reproduce.main, ["quick", "--out", "mine"])])
def test_what_another_launcher_left_behind(main, args, tmp_path, monkeypatch, capsys):
    for left, said in (({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
                       ({"WORLD_SIZE": "4", "RANK": "0"}, "LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not")):
        for name, value in left.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as stopped:
            main(args)
        err = capsys.readouterr().err
        assert stopped.value.code == 2 and err.count("\n") == 1 and said in err
        assert not list(tmp_path.iterdir())
