"""harness/lessons.py: `python fa.py` and the other lessons print a table, and save a picture where one is
asked for; what cannot be saved or read is one line."""
import json
import re
import runpy
import sys

import pytest
import torch
from conftest import ROOT
from torch.nn import functional as F

import fa
import models
from harness import lessons, pictures, recorder

SAYS = {"fa": "are why FA works", "muon": "angle to the exact P Qᵀ", "norm": "only they keep them apart",
        "rank": "0.9^i, cut to 4", "data": "no pixel or colour reveals"}


def run(name, *args, monkeypatch):
    """As a command, but in this process: importing torch takes longer than the demonstration."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, args)])
    try:
        runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
        return 0
    except SystemExit as e:
        return e.code or 0


def is_picture(path):
    return path.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", SAYS)
def test_a_lesson_prints_a_table_and_saves_a_picture(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(name, "--out", "picture.png", monkeypatch=monkeypatch) == 0
    out, err = capsys.readouterr()
    assert err == "" and SAYS[name] in out and len(out.splitlines()) >= 5
    if name == "fa":                                            # it learns below the classifier too
        fa_, backprop, frozen = map(float, re.findall(r" (0\.\d+)", out.splitlines()[-2]))
        assert backprop < fa_ < (backprop + frozen) / 2
    assert out.endswith("picture.png\n") and is_picture(tmp_path / "picture.png")


@pytest.mark.parametrize("draw", [lessons.two_ways, lessons.gratings])
def test_the_readmes_pictures_are_drawn(draw, tmp_path):
    draw(tmp_path / "picture")                                  # no ending: a PNG of exactly that name
    assert is_picture(tmp_path / "picture")


def made(tmp_path, *names):
    """Folders of runs with ranks, of which the second has --muon."""
    torch.manual_seed(0)
    model = models.cnn(norm="batch", width=4, size=8)
    recording = recorder.Recording(model, fa.attach(model, fa.FA()), torch.randn(20, 3, 8, 8),
                                   torch.randint(10, (20,)), steps_per_epoch=1, epochs=2)
    lines = []
    for epoch in range(3):
        lines.append({"epoch": epoch, "step": epoch, **recording.measure()})
        F.cross_entropy(model(torch.randn(8, 3, 8, 8)), torch.randint(10, (8,))).backward()
        with recording.step():
            pass
    for line in lines[1:]:                                      # an overflow leaves a gap, not an error
        line["layers"]["layers.3"].update(gradient=None, error=None, spectrum=[], angle_gradient=None)
    for name in names:
        (tmp_path / name).mkdir()
        config = {"args": {"rule": "fa", "muon": name == names[1], "norm": None}}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        (tmp_path / name / "rank.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [tmp_path / name for name in names]


def test_recorded_runs_are_drawn_and_told_apart(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runs = made(tmp_path, "a", "b", "c")
    assert run("rank", *runs, monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out == "rank.png\n" and is_picture(tmp_path / "rank.png")
    drawn = []
    monkeypatch.setattr(pictures, "draw_ranks", lambda path, runs: drawn.extend(label for label, _ in runs))
    assert run("rank", *runs, monkeypatch=monkeypatch) == 0
    assert drawn[0].endswith(" (a)") and drawn[2].endswith(" (c)") and not drawn[1].endswith(")")


def test_what_cannot_be_saved_or_read_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    figure = pictures.figure_of(1, 1, size=(1, 1))[0]
    monkeypatch.setitem(lessons.DEMONSTRATIONS, "fa", lambda: lambda path: pictures.save(figure, path))
    for name, args, said in (("fa", ["--out", "nowhere/picture.png"], "No such file"),
                             ("fa", ["--out", "x.docx"], "Format 'docx' is not supported"),
                             ("fa", ["--out", "/"], "has an empty name"),
                             ("rank", [tmp_path], f"{tmp_path} has no record of ranks")):
        assert run(name, *args, monkeypatch=monkeypatch) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"{name}.py: ") and said in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
