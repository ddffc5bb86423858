"""`python fa.py`, `muon.py`, `norm.py`, `rank.py`, `intervene.py`: a table, and a picture where one is asked for."""
import os
import subprocess
import sys

import pytest
from conftest import ROOT

SAYS = {"fa": "are why FA works", "muon": "angle to the exact P Qᵀ", "norm": "only they keep them apart", "rank": "one row repeated",
        "intervene": ""}


@pytest.mark.parametrize("name", SAYS)
def test_it_prints_a_table_and_saves_a_picture(name, tmp_path):
    pictured = name != "intervene"
    done = subprocess.run([sys.executable, ROOT / f"{name}.py", *["--out", "picture.png"] * pictured], cwd=tmp_path,
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and done.stderr == "" and SAYS[name] in done.stdout and len(done.stdout.splitlines()) >= 5
    if pictured:
        assert done.stdout.endswith("picture.png\n") and (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", ["muon", "rank"])
def test_a_folder_that_is_not_there_is_one_line(name, tmp_path):
    done = subprocess.run([sys.executable, ROOT / f"{name}.py", "--out", "nowhere/picture.png"], cwd=tmp_path, text=True,
                          capture_output=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "nowhere/picture.png" in done.stderr
