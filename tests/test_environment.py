"""train.py where people run it: odd terminals, languages, homes and folders; a reader who leaves; Ctrl-C at a bad moment."""
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

QUICK = ["--subset", "64", "--width", "4", "--epochs", "1", "--batch-size", "32", "--device", "cpu"]
ENVIRONMENTS = {
    "ascii terminal, C locale, no home": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "HOME": "/dev/null",
                                          "PYTHONIOENCODING": "ascii", "MPLCONFIGDIR": ""},
    "German, Latin-1, hash seed": {"LC_ALL": "de_DE.ISO-8859-1", "LANG": "de_DE", "PYTHONHASHSEED": "123", "TERM": "dumb"},
    "no display, window backend": {"DISPLAY": ":99", "MPLBACKEND": "TkAgg", "PYTHONWARNINGS": "ignore",
                                   "PYTHONHASHSEED": "random", "TMPDIR": "/nonexistent"},
}


def start(cwd, *args, **env):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **env}
    return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *args], cwd=cwd, stdin=subprocess.DEVNULL,
                            env={key: value for key, value in environment.items() if value or key == "CUDA_VISIBLE_DEVICES"},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_any_environment(name, tmp_path):
    folder = tmp_path / "a folder with spaces, Ünïcödé and 数"
    folder.mkdir()
    (folder / "meine_regel.py").write_text("import fa\nclass Meine(fa.FA):\n    '''Rückwärts'''\n", encoding="utf-8")
    process = start(folder, *QUICK, "--rule", "meine_regel.py:Meine", "--out", "ein Lauf", **ENVIRONMENTS[name])
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert b"final test accuracy" in out and b"Traceback" not in err and err.count(b"\n") <= 2, err     # matplotlib may warn
    assert {p.name for p in (folder / "ein Lauf").iterdir()} == {"config.json", "log.jsonl", "checkpoint.pt", "curves.png"}


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
    assert process.returncode == status and err.count(b"\n") == 1 and b"go on with: python train.py --resume run" in err, err
    assert (tmp_path / "run" / "checkpoint.pt").exists()
