"""train.py where people run it: odd terminals, languages, homes and folders; a reader who leaves;
Ctrl-C at a bad moment."""
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

QUICK = ["--subset", "64", "--width", "4", "--epochs", "1", "--batch-size", "32", "--device", "cpu"]
ENVIRONMENTS = {
    "ascii terminal, C locale, no home": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
                                          "HOME": "/dev/null", "PYTHONIOENCODING": "ascii",
                                          "MPLCONFIGDIR": ""},
    "German, Latin-1, hash seed": {"LC_ALL": "de_DE.ISO-8859-1", "LANG": "de_DE", "PYTHONHASHSEED": "123",
                                   "TERM": "dumb"},
    "started from a notebook": {"MPLBACKEND": "nonsense"},
    "no display, window backend": {"DISPLAY": ":99", "MPLBACKEND": "TkAgg", "PYTHONWARNINGS": "ignore",
                                   "PYTHONHASHSEED": "random", "TMPDIR": "/nonexistent"},
}


def start(cwd, *args, script="train.py", **env):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **env}
    return subprocess.Popen([sys.executable, str(ROOT / script), *args], cwd=cwd, stdin=subprocess.DEVNULL,
                            env={key: value for key, value in environment.items()
                                 if value or key == "CUDA_VISIBLE_DEVICES"},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_any_environment(name, tmp_path):
    folder = tmp_path / "a folder with spaces, Ünïcödé and 数"
    folder.mkdir()
    (folder / "meine_regel.py").write_text("import fa\nclass Meine(fa.FA):\n    '''Rückwärts'''\n",
                                           encoding="utf-8")
    process = start(folder, *QUICK, "--rule", "meine_regel.py:Meine", "--out", "ein Lauf",
                    **ENVIRONMENTS[name])
    out, err = process.communicate()
    assert process.returncode == 0, err
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


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_a_real_run(number, status, tmp_path):
    process = start(tmp_path, *QUICK, "--epochs", "200", "--out", "run")
    end = time.time() + 60
    while not (tmp_path / "run" / "log.jsonl").exists() and time.time() < end:
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate()
    assert (process.returncode == status and err.count(b"\n") == 1
            and b"go on with: python train.py --resume run" in err), err
    assert (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize("script", ["fa.py", "muon.py", "norm.py", "rank.py"])
def test_a_demonstrations_picture_from_a_notebook(script, tmp_path):
    process = start(tmp_path, "--out", "picture.png", script=script,
                    **ENVIRONMENTS["started from a notebook"])
    err = process.communicate()[1]
    assert (process.returncode == 0 and not err
            and (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"), err


@pytest.fixture
def no_matplotlib(tmp_path):
    """An environment in which it is installed, and broken."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "matplotlib.py").write_text("raise ImportError('built for another\\nmachine')\n")
    return {"PYTHONPATH": str(tmp_path / "broken")}


@pytest.mark.parametrize("lr, status, last", [("0.02", 0, b"final test accuracy"),
                                              ("1e30", 3, b"diverged: at step")])
def test_a_picture_that_cannot_be_drawn_costs_no_result(lr, status, last, tmp_path, no_matplotlib):
    process = start(tmp_path, *QUICK, "--lr", lr, "--out", "run", **no_matplotlib)
    out, err = process.communicate()
    assert process.returncode == status and out.splitlines()[-1].startswith(last)
    assert err == b"cannot draw run/curves.png: ImportError: built for another machine\n"


@pytest.mark.slow
def test_an_experiments_table_does_not_need_its_picture(tmp_path, no_matplotlib):
    process = start(tmp_path, "quick", "--set", "epochs=1", "subset=64", "width=2", "--out", "mine",
                    script="reproduce.py", **no_matplotlib)
    out, err = process.communicate()
    assert process.returncode == 0 and b"| FA | " in out, err
    assert err.startswith(b"cannot draw mine/quick") and err.count(b"\n") == 1


def test_where_the_picture_is_all_that_was_asked_for_it_fails(tmp_path, no_matplotlib):
    process = start(tmp_path, *QUICK, "--rank", "--out", "run", **no_matplotlib)
    assert process.communicate() and process.returncode == 0
    process = start(tmp_path, "run", script="rank.py", **no_matplotlib)
    assert process.communicate()[1] == b"rank.py: built for another machine\n"
    assert process.returncode == 2


@pytest.mark.parametrize("script", ["train.py", "reproduce.py"])
@pytest.mark.parametrize("left, said", [({"WORLD_SIZE": "two"}, b"WORLD_SIZE is 'two'"),
                                        ({"WORLD_SIZE": "4", "RANK": "0"},
                                         b"LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not")])
def test_what_another_launcher_left_behind(script, left, said, tmp_path):
    process = start(tmp_path, *(["quick", "--out", "mine"] if script == "reproduce.py" else QUICK),
                    script=script, **left)
    err = process.communicate()[1]
    assert (process.returncode == 2 and err.count(b"\n") == 1 and said in err
            and not list(tmp_path.iterdir())), err
