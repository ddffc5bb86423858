"""`python fa.py`, `muon.py`, `norm.py`, `rank.py`, `intervene.py`: a table, and a picture where one is asked for."""
import runpy
import sys

import pytest
from conftest import ROOT

SAYS = {"fa": "are why FA works", "muon": "angle to the exact P Qᵀ", "norm": "only they keep them apart",
        "rank": "one row repeated", "intervene": "cut to 4"}


def run(name, *args, monkeypatch):
    """As a command, but in this process: importing torch takes longer than the demonstration."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *args])
    try:
        runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
        return 0
    except SystemExit as e:
        return e.code or 0


@pytest.mark.parametrize("name", SAYS)
def test_it_prints_a_table_and_saves_a_picture(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pictured = ["--out", "picture.png"] if name != "intervene" else []
    assert run(name, *pictured, monkeypatch=monkeypatch) == 0
    out, err = capsys.readouterr()
    assert err == "" and SAYS[name] in out and len(out.splitlines()) >= 5
    if pictured:
        assert out.endswith("picture.png\n") and (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("out, said", [("nowhere/picture.png", "No such file"), ("x.docx", "Format 'docx' is not supported")])
@pytest.mark.parametrize("name", ["fa", "muon", "norm", "rank"])
def test_a_picture_that_cannot_be_saved_is_one_line(name, out, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(name, "--out", out, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"{name}.py: ") and said in error and not list(tmp_path.iterdir())
