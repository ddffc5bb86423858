"""harness/tables.py, pictures.py and report.py: tables whose numbers are right by hand, pictures that show
them whatever is missing, and `python -m harness.report`, which compares runs and says in one line what is
wrong with its input."""
import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from test_train import SMALL, small_gratings  # noqa: F401  (a fixture)

import reproduce
import train
from harness import files, pictures, report, tables
from harness.experiment import results


def line(label, accuracy, column="", error=(10.0, 20.0), gradient=(4.0, 8.0), trajectory=50.0, seed=0):
    """A result as reproduce.py has it, of a network of three layers whose classifier is not counted."""
    layers = {f"layer {i}": {"error": {"effective_rank": e, "ceiling": 512}, "spectrum": [1.0, 0.5],
                             "gradient": g and {"effective_rank": g}, "update": {"effective_rank": 3.0},
                             "cosine": i / 4, "angle_gradient": 30.0 * i if i else None}
              for i, (e, g) in enumerate(zip([*error, 1.0], [*gradient, 1.0]))}
    whole = {"all layers": {"effective_rank": trajectory, "rows": 9}}
    return {"label": label, "column": column, "seed": seed, "final_test_accuracy": accuracy,
            "diverged": accuracy is None, "args": {"dataset": "cifar10", "validate": None},
            "rank": [{"epoch": epoch, "layers": layers, "trajectory": whole} for epoch in (0, 1)],
            "epochs": [{"epoch": 1, "step": 7, "test_accuracy": accuracy}]}


def without_ranks(lines):
    return [{key: value for key, value in one.items() if key != "rank"} for one in lines]


def cells(text):
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in text.splitlines()]


@pytest.fixture
def drawn(monkeypatch):
    """What the pictures of this test are made of."""
    figures, save = [], pictures.save
    monkeypatch.setattr(pictures, "save", lambda figure, path: (figures.append(figure), save(figure, path)))
    return figures


# ---- experiments -------------------------------------------------------------------------------------------

SWEEP = reproduce.Experiment("", "", dict.fromkeys(["MLP: FA", "MLP: backprop", "CNN: FA"], ""),
                             {"2": "2", "12": "12"}, "hidden layers", "sweep")
SWEPT = [line("MLP: FA", 0.5, "2"), line("MLP: FA", 0.6, "2", seed=1, error=(30.0, 40.0)),
         line("MLP: FA", None, "12"), line("CNN: FA", 0.2, "2", error=(1.0, 1.0)),
         line("CNN: FA", 0.1, "12", error=(0.0, 0.0))]
MAP = reproduce.Experiment(
    "", "", dict.fromkeys(["He: backprop", "He: FA", "LeCun: backprop", "LeCun: FA"], ""),
    {"0.01": "0.01", "0.1": "0.1"}, "learning rate", "map")
MAPPED = [line("He: backprop", 0.6, "0.01"), line("He: FA", 0.3, "0.01", (5.0, 40.0), (1.0, None), 100.0),
          line("He: backprop", 0.6, "0.1"), line("He: FA", None, "0.1"), line("LeCun: backprop", 0.1, "0.1")]


def test_the_sweep_table_and_no_error_is_not_taken_for_a_collapse(tmp_path, drawn):
    head, _, mlp_fa, mlp_bp, cnn_fa = cells(tables.sweep_table(SWEEP, SWEPT))
    assert head == ["hidden layers", "2", "12"]
    assert mlp_fa == ["MLP: FA", "55.0 ± 7.1; 25", "– (1 of 1 diverged); –"]     # mean of 10, 20, 30, 40
    assert mlp_bp == ["MLP: backprop", "not measured", "not measured"]
    assert cnn_fa == ["CNN: FA", "20.0; 1", "10.0; no error"]
    pictures.draw_sweep(tmp_path / "picture.png", SWEEP, SWEPT)
    mlp, _, mlp_ranks, cnn_ranks = drawn[0].axes
    assert mlp.lines[0].get_ydata() == pytest.approx([55, math.nan], nan_ok=True)
    assert mlp_ranks.lines[0].get_ydata() == pytest.approx([25, math.nan], nan_ok=True)
    assert cnn_ranks.lines[0].get_ydata() == pytest.approx([1, math.nan], nan_ok=True)
    (note,) = cnn_ranks.texts
    assert "no error arrives" in note.get_text() and note.xy == (12.0, 0)
    (note,) = mlp.texts
    assert note.get_text() == "diverged" and note.xy == (12.0, 10.0)        # on the line of chance
    words = SWEEP._replace(columns={"2": "", "all": ""})                    # which no line joins to the 2
    pictures.draw_sweep(tmp_path / "picture.png", words, [{**some, "column": "all"} for some in SWEPT[:1]])
    assert [line.get_linestyle() for line in drawn[1].axes[0].lines[:2]] == ["-", "None"]


def test_the_map_table_divides_feedback_alignments_rank_by_backprops():
    head, _, *rows = cells(tables.map_table(MAP, MAPPED))
    assert head[2:] == ["backprop (%)", "FA (%)", "error δ", "gradient", "trajectory"]
    assert rows == [["He", "0.01", "60.0", "30.0", "0.50, 2.00", "0.25, –", "2.00"],
                    ["He", "0.1", "60.0", "– (1 of 1 diverged)", "–", "–", "–"],
                    ["LeCun", "0.01", "not measured", "not measured", "–", "–", "–"],
                    ["LeCun", "0.1", "10.0", "not measured", "–", "–", "–"]]


def test_the_rank_and_quick_tables_list_the_layers_below_the_classifier():
    experiment = reproduce.Experiment("", "", {"backprop": "", "FA": ""})
    lines = [line("FA", 0.5), line("FA", 0.7, error=(20.0, 30.0), seed=1)]
    assert cells(tables.rank_table(experiment, lines))[-1] == ["FA", "60.0 ± 14.1", "2", "15, 25", "4, 8",
                                                               "3, 3", "50", "0.25, 0.50", "–, 30"]
    assert cells(tables.quick_table(experiment, lines))[2:] == [["backprop", "not measured", "0", "–"],
                                                                ["FA", "60.0 ± 14.1", "2", "15, 25"]]


def test_the_blocks_table_has_the_error_at_the_ends_of_the_branches():
    def of(rank, angle):
        ends = {f"blocks.{i}.conv{j}": {
            "error": None if rank is None else {"effective_rank": rank and rank + i * j},
            "angle_error": angle} for i in (0, 1) for j in (1, 2)}
        return {"layers": {"stem": {}, **ends, "classifier": {}}}

    experiment = reproduce.Experiment("", "", {"FA": "", "frozen features": "", "silent": "", "backprop": ""})
    lines = [line("FA", 0.5) | {"rank": [of(1, 9), of(10, 80)]},
             line("FA", 0.7, seed=1) | {"rank": [of(1, 9), of(20, 90)]},
             line("FA", None, seed=2) | {"rank": [of(1, 9)]},
             line("frozen features", 0.1) | {"rank": [of(None, None)]},
             line("silent", 0.1) | {"rank": [of(0.0, None)]}, line("silent", 0.1) | {"rank": [of(10, 80)]}]
    assert [row[-2:] for row in cells(tables.blocks_table(experiment, lines))[2:]] == [
        ["15, 17", "85, 85"], ["no error", "–"], ["10, 12 (1 of 2: no error)", "80, 80"], ["–", "–"]]


def test_the_headline_has_the_papers_column_and_says_what_is_not_measured():
    full = reproduce.Experiment("", "", {}, paper={"FA": 1.4}, scale="All of it.")
    part, lines = full._replace(scale="A part.", paper={}), [line("FA", 0.03), line("backprop", 0.5)]
    text = tables.headline(part, lines, full, [])
    assert cells(text)[0][1:] == ["backprop", "FA", "FA at full scale, the paper"]
    assert cells(text)[2] == ["neither", "50.0", "3.0", "1.4"] and reproduce.PAD not in text
    assert "A part. One seed; frozen" in text and "All of it) has not been measured" in text
    text = tables.headline(full, [*lines, line("FA", 0.05, seed=1)], full, lines)
    assert cells(text)[2] == ["neither", "50.0", "4.0 ± 1.4", "1.4"]
    assert "All of it. 1 to 2 seeds a row; frozen" in text and "measured here yet" not in text
    text = tables.headline(full, [line("FA", 0.05), line("FA", 0.05, seed=1)], full, [])
    assert "All of it. 2 seeds; frozen" in text


def test_the_headline_has_what_was_measured_at_full_scale_beside_a_smaller_one():
    full = reproduce.Experiment("", "", {}, paper={"FA": 1.4}, scale="All of it.")
    lines = [line("FA", 0.03), line("backprop", 0.5), line(reproduce.BEST, 0.1), line("other", 0.1),
             line("other", 0.1, seed=1)]
    whole = [line(reproduce.BEST, 0.4) | {"device": "a card"}]
    text = tables.headline(full._replace(scale="A part."), lines, full, whole,
                           lambda text, shown: f"{text} {len(shown)} lines.")
    assert cells(text)[0][3:] == ["FA at full scale", "FA at full scale, the paper"]
    assert cells(text)[2] == ["neither", "50.0", "3.0", "not measured", "1.4"]
    assert cells(text)[6] == [f"Muon + norm{reproduce.PAD}", "not measured", "10.0", "40.0", "–"]
    assert "A part. One seed; frozen" in text
    assert " 3 lines. Full scale: All of it, on a card. One seed." in text      # of the part
    text = tables.headline(full._replace(scale="A part."), lines, full, [line("other", 0.1)])
    assert "has not been measured" in text                      # of other rows the table has none


SHORTCUT = reproduce.EXPERIMENTS["shortcut"]
OVERFLOWN = line("FA", None, error=(math.nan, 3.0))
OVERFLOWN["rank"][-1]["layers"]["layer 0"]["error"] = None


@pytest.mark.parametrize("experiment, lines", [
    (SWEEP, without_ranks(SWEPT[2:])),
    (reproduce.EXPERIMENTS["improve"], without_ranks([line("FA", 0.2)])),
    (MAP, MAPPED), (MAP, MAPPED[-1:]), (reproduce.EXPERIMENTS["quick"], [line("backprop", 0.9), OVERFLOWN]),
    (SHORTCUT, results(SHORTCUT, reproduce.RESULTS / "shortcut.jsonl")[3:]),
], ids=["no ranks", "bars alone", "a map", "most is missing", "an overflow", "a rule is missing"])
def test_every_picture_is_drawn_whatever_is_missing(experiment, lines, tmp_path):
    report.VIEWS[experiment.view].draw(tmp_path / "picture.png", experiment, lines)
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"


def test_no_two_things_share_a_colour():
    assert len({*pictures.COLOURS.values(), *pictures.OTHERS}) == len(pictures.COLOURS) + len(pictures.OTHERS)
    chosen = pictures.colours(["CNN: FA", "FA", "mine.MyRule", "mine.MyRule", "backprop"])
    assert len(set(chosen)) == 5 and chosen[::4] == [pictures.COLOURS["FA"], pictures.COLOURS["backprop"]]


def test_an_axis_is_logarithmic_from_a_factor_of_ten():
    assert [pictures.axis(columns)[1:] for columns in (["2", "12"], ["0.01", "0.1"], ["1", "all"])] == [
        ([2.0, 12.0], "linear"), ([0.01, 0.1], "log"), ([0.0, 1.0], "linear")]


# ---- runs --------------------------------------------------------------------------------------------------

ARGS = {"rule": "fa", "muon": False, "norm": None, "dataset": "gratings", "seed": 0, "exact": [],
        "epochs": 2, "lr": 0.02, "muon_lr": None, "weight_decay": 0.0005, "validate": None, "data": "data",
        "device": "cpu", "device_reason": "no GPU was found", "amp_reason": "as asked", "rule_digest": None}


def make_run(name, *accuracies, diverged=None, version=2, without=(), **args):
    """A run's folder as train.py leaves it; returns its name."""
    folder = Path(name)
    folder.mkdir(parents=True)
    lines = [{"epoch": i, "diverged": False, "step": 4 * i, "train_loss": 2 / i, "train_accuracy": 0.5,
              "test_accuracy": accuracy, "seconds": 31.5} for i, accuracy in enumerate(accuracies, 1)]
    if diverged:
        lines.append({"epoch": len(lines) + 1, "diverged": True, "step": diverged, "train_loss": None,
                      "train_accuracy": None, "test_accuracy": None, "seconds": 1.0})
    args = {key: value for key, value in {**ARGS, "out": name, **args}.items() if key not in without}
    (folder / "config.json").write_text(json.dumps({"version": version, "args": args}))
    if lines:
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return name


@pytest.fixture
def compare(capsys):
    """The report's command line, in this process: (exit status, stdout, stderr)."""
    def run(*argv):
        try:
            status = report.main(list(map(str, argv)))
        except SystemExit as e:
            status = e.code
        return status, *capsys.readouterr()
    return run


def test_runs_side_by_side_in_a_table_a_file_and_a_picture(compare, drawn):
    runs = [make_run("plain, ", 0.1, 0.25),
            make_run("muon", 0.5, 0.625, rule="mine.py:Rule", muon=True, muon_lr=0.01, seed=1,
                     exact=["layers.1", "layers.2"], amp_reason="else", rule_digest="f00", data="there"),
            make_run("long", 0.3, 0.4, epochs=3), make_run("wild", 0.2, diverged=7, lr=5.0),
            make_run("new", epochs=12)]
    status, out, err = compare(*runs, "--csv", "t.csv", "--out", "p.svg")
    assert status == 0 and err == "" and out.endswith("\n\np.svg\n")
    head, _, *rows = cells(out.partition("\n\n")[0])
    assert head == ["run", "rule", "test accuracy (%)", "epochs", "time", "what differs"]
    assert rows == [
        ["plain,", "fa", "25.0", "2", "1m 03s", "--seed 0, --lr 0.02"],
        ["muon", "mine.py:Rule", "62.5", "2", "1m 03s",
         "--muon, --seed 1, --exact layers.1 layers.2, --lr 0.02, --muon-lr 0.01"],
        ["long", "fa", "unfinished, epoch 2 of 3: 40.0", "3", "1m 03s", "--seed 0, --lr 0.02"],
        ["wild", "fa", "diverged at step 7", "2", "0m 32s", "--seed 0, --lr 5.0"],
        ["new", "fa", "no finished epoch", "12", "0m 00s", "--seed 0, --lr 0.02"]]
    with open("t.csv", newline="", encoding="utf-8") as file:
        head, first, *_, wild, _ = csv.reader(file)
    assert head == ["run", "rule", "test accuracy (%)", "state", "epochs", "seconds", "muon", "seed", "exact",
                    "lr", "muon_lr"]
    assert first == ["plain, ", "fa", "25.0", "finished", "2", "63.0", "False", "0", "[]", "0.02", ""]
    assert wild[:6] == ["wild", "fa", "", "diverged at step 7", "2", "32.5"]
    assert "<svg" in Path("p.svg").read_text() and not Path("compare.png").exists()
    accuracy, loss = drawn[0].axes
    assert "chance" in {line.get_label() for line in accuracy.lines}
    assert [list(one.get_ydata()) for one in accuracy.lines[:5]] == [[10, 25], [50, 62.5], [30, 40], [20], []]
    assert [list(one.get_ydata()) for one in loss.lines] == [[2, 1], [2, 1], [2, 1], [2], []]
    assert [a.get_color() for a in accuracy.lines[:5]] == [b.get_color() for b in loss.lines]
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == [
        "plain, ", "muon", "long (unfinished, epoch 2 of 3)", "wild (diverged at step 7)",
        "new (no finished epoch)"]


def test_a_run_has_the_shortest_name_that_no_other_has_whatever_matplotlib_takes_it_for(compare, drawn):
    runs = [make_run(name, 0.1, 0.2) for name in ("x/low/run", "x/high/run", "y/high/run", "_a$b$_c$")]
    out = compare(*runs, "x/../_a$b$_c$", Path("x/low/run").absolute())[1]
    shown = ["low/run", "x/high/run", "y/high/run", "_a$b$_c$", "_a$b$_c$", "low/run"]
    assert [row[0] for row in cells(out.partition("\n\n")[0])[2:]] == shown and cells(out)[2][5] == "–"
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == shown
    compare(make_run("begins" + "x" * 99 + "ends", 0.1, 0.2))
    name = drawn[1].legends[0].get_texts()[0].get_text()
    assert len(name) == 100 and name.startswith("beginsx") and name.endswith("xends")


def test_held_out_images_other_versions_and_flags_that_came_later(compare):
    older = make_run("a", 0.1, 0.2, without=("exact", "validate"))
    held_out = make_run("b", 0.1, 0.2, validate=60, version=1)
    out = compare(held_out, older)[1]
    assert cells(out)[0][2] == "test or held-out accuracy (%)"
    assert [row[5] for row in cells(out)[2:4]] == ["--validate 60, version 1", "version 2"]


GOOD = '{"epoch": 1, "diverged": false, "step": 4, "train_loss": 1, "test_accuracy": 0.5, "seconds": 1}\n'
WRONG = {       # arguments, or a file of the run and what it holds; and what is said
    "no such folder": (["nowhere"], "nowhere is no run: nowhere/config.json: No such file or directory"),
    "a broken name": (["two\nlines"], "two lines is no run"),
    "config no JSON": ("config.json", "{", "run/config.json is damaged"),
    "config nothing": ("config.json", '{"args": {}}', "run/config.json is damaged ('epochs')"),
    "half a line": ("log.jsonl", GOOD + GOOD[:30], "run/log.jsonl, line 2, is damaged"),
    "log of NaN": ("log.jsonl", GOOD.replace("0.5", "NaN"), "line 1, is damaged"),
    "log deep": ("log.jsonl", "[" * 100_000, "line 1, is damaged"),
    "log a folder": ("log.jsonl", None, "run/log.jsonl: Is a directory"),
    "picture of no kind": (["run", "--out", "x.docx"], "cannot write x.docx: Format 'docx' is not supported"),
    "table a folder": (["run", "--csv", "empty"], "cannot write empty: Is a directory"),
    "one file twice": (["run", "--csv", "x", "--out", "empty/../x"], "--csv and --out name the same file"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_input_is_one_line(wrong, compare):
    *what, said = WRONG[wrong]
    make_run("run", 0.1, 0.2)
    Path("empty").mkdir()
    if len(what) == 2:
        path, content = Path("run", what[0]), what[1]
        path.unlink()
        path.mkdir() if content is None else path.write_text(content)
    before = set(Path().rglob("*"))
    status, _, err = compare(*(what[0] if len(what) == 1 else ["run"]))
    assert status == 2 and err.count("\n") == 1 and err.startswith("report: ") and said in err
    assert set(Path().rglob("*")) == before


def test_without_matplotlib_there_is_a_table(compare, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, out, err = compare(make_run("run", 0.1, 0.2))
    assert status == 2 and "| 20.0 " in out
    assert err.startswith("report: cannot write compare.png: ") and err.count("\n") == 1


def test_a_real_run_on_a_terminal_that_knows_ascii_only(tmp_path, drawn):
    assert train.main([*SMALL, "--device", "cpu", "--rank", "--out", "real"]) == 0
    assert len(drawn[0].axes) == 3                              # with --rank, the rank of the error too
    command = [sys.executable, "-m", "harness.report", tmp_path / "real", "--out", tmp_path / "picture.png"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and done.stderr == "", done.stderr
    final = json.loads(Path("real/log.jsonl").read_text().splitlines()[-1])["test_accuracy"]
    assert cells(done.stdout)[2][:4] == ["real", "fa", f"{100 * final:.1f}", "2"]


def test_a_runs_curves_and_the_errors_rank_where_it_was_recorded(tmp_path, drawn):
    log = [{"epoch": i, "train_loss": 10.0 ** i, "train_accuracy": 0.5, "test_accuracy": 0.6} for i in (1, 2)]
    names = [*(f"layers.{i}" for i in range(20)), "classifier"]
    ranks = [{"epoch": epoch, "layers": {name: {"error": i != 2 and {"effective_rank": 10.0 * i + epoch}}
                                         for i, name in enumerate(names)}} for epoch in (0, 2)]
    pictures.curves(tmp_path / "plain.png", log, "a run", 10)
    pictures.curves(tmp_path / "ranks.png", log, "a run", 10, ranks)
    pictures.curves(tmp_path / "diverged.png", [dict.fromkeys(log[0])], "a run", None, ranks[:1])
    left, right = drawn[0].axes
    assert left.get_yscale() == "log" and list(left.lines[0].get_ydata()) == [10.0, 100.0]
    assert [set(one.get_ydata()) for one in right.lines] == [{50.0}, {60.0}, {10.0}]
    panel = drawn[1].axes[2]
    assert len(panel.lines) == 20 and panel.lines[1].get_xydata().tolist() == [[0, 10], [2, 12]]
    assert all(map(math.isnan, panel.lines[2].get_ydata()))
    shown = [text.get_text() for text in panel.get_legend().get_texts()]
    assert 4 <= len(shown) <= 8 and shown[-1] == "layers.19"
    assert drawn[2].axes[0].texts[0].get_text() == "diverged in the first epoch"


def test_a_runs_ranks_have_the_name_and_colour_of_the_tables(tmp_path, drawn):
    records, runs = line("FA", 0.5)["rank"], []
    for name, args in {"a": {}, "b": {"muon": True, "norm": "batch"},
                       "c": {"rule": "mine.py:Rule", "norm": "layer"}, "d": {}}.items():
        run = Path(make_run(name, **args))
        (run / "rank.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        runs.append(report.read_ranks(run))
    assert [name for name, _ in runs] == ["FA", "FA + Muon + norm", "mine.Rule + layer norm", "FA"]
    assert runs[0][1] == records
    pictures.draw_ranks(tmp_path / "ranks.png", runs)
    curves = drawn[0].axes[0].lines[:4]
    assert [one.get_color() for one in curves[:2]] == list(map(pictures.colour, ["FA", "FA + Muon + norm"]))
    widths = [one.get_linewidth() for one in curves]            # all four lie on each other, and leave a rim
    assert widths == sorted(widths, reverse=True) and len(set(widths)) == 4
    with pytest.raises(files.Problem, match="no record of ranks"):
        report.read_ranks(tmp_path)
