"""harness/report.py: the numbers of the tables by hand, and every picture drawn."""
import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from matplotlib.colors import to_rgb
from test_train import SMALL, small_gratings  # noqa: F401  (a fixture)

import reproduce
import train
from harness import files, report


def line(label, accuracy, column="", error=(10.0, 20.0), gradient=(4.0, 8.0), trajectory=50.0, seed=0):
    """A result as reproduce.py has it, of a network of three layers whose classifier is not counted."""
    def record(epoch):
        layers = {
            f"layer {i}": {"error": {"effective_rank": e, "ceiling": 512},
                           "gradient": g and {"effective_rank": g}, "cosine": i / 4,
                           "angle_gradient": 30.0 * i if i else None}
            for i, (e, g) in enumerate(zip([*error, 1.0], [*gradient, 1.0]))
        }
        return {"epoch": epoch, "layers": layers,
                "trajectory": {"all layers": {"effective_rank": trajectory, "rows": 9}}}

    return {"label": label, "column": column, "seed": seed, "final_test_accuracy": accuracy,
            "diverged": accuracy is None, "args": {"dataset": "cifar10", "validate": None},
            "rank": [record(0), record(1)], "epochs": [{"epoch": 1, "step": 7, "test_accuracy": accuracy}]}


def cells(text):
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in text.splitlines()]


SWEEP = reproduce.Experiment("a claim", "",
                             {"MLP: FA": "", "MLP: backprop": "", "CNN: FA": "", "CNN: backprop": ""},
                             {"2": "2", "12": "12"}, "hidden layers", "sweep")
SWEPT = [line("MLP: FA", 0.5, "2"), line("MLP: FA", 0.6, "2", seed=1, error=(30.0, 40.0)),
         line("MLP: FA", None, "12"), line("CNN: FA", 0.2, "2", error=(1.0, 2.0)),
         line("CNN: backprop", 0.3, "12")]


def test_sweep_table():
    head, _, mlp_fa, mlp_bp, cnn_fa, cnn_bp = cells(report.sweep_table(SWEEP, SWEPT))
    assert head == ["hidden layers", "2", "12"]
    assert mlp_fa == ["MLP: FA", "55.0 ± 7.1; 25", "– (1 of 1 diverged); –"]     # mean of 10, 20, 30, 40
    assert mlp_bp == ["MLP: backprop", "not measured", "not measured"]
    assert cnn_fa == ["CNN: FA", "20.0; 2", "not measured"]
    assert cnn_bp == ["CNN: backprop", "not measured", "30.0; 15"]


def test_the_ways_of_the_error_by_residual_block(tmp_path, monkeypatch):
    drawn = figures(monkeypatch)
    experiment = reproduce.Experiment(
        "", "", dict.fromkeys(["conv: FA", "conv: frozen", "pad: FA", "pad: bp"], ""))

    def blocks(label, accuracy, seed, *shares):
        result = line(label, accuracy, seed=seed)
        result["rank"][-1]["layers"] = {
            f"blocks.{i}.{part}": {"branch": share, "angle_error": 80 if share else None, "norm_ratio": 0.5}
            for i, share in enumerate(shares) for part in ("conv1", "conv2")}
        return result

    lines = [blocks("conv: FA", 0.25, 0, 0.5, 0.1), blocks("conv: FA", 0.35, 1, 0.7, 0.3),
             blocks("conv: frozen", 0.1, 0, None, None), blocks("pad: FA", 0.4, 0, 1.0, 0.0)]
    assert cells(report.ways_table(experiment, lines))[2:] == [
        ["conv: FA", "30.0 ± 7.1", "2", "60, 20", "80, 80", "0.50"],
        ["conv: frozen", "10.0", "1", "–, –", "–, –", "0.50"],
        ["pad: FA", "40.0", "1", "100, 0", "80, –", "0.50"],
        ["pad: bp", "not measured", "0", "–", "–", "–"]]
    report.draw_ways(tmp_path / "ways.png", experiment, lines)
    left, middle, right = drawn[0].axes
    assert [bar.get_width() for bar in left.patches] == pytest.approx([30, 10, 40])
    assert [list(one.get_ydata()) for one in middle.lines] == [[60, 20], [100, 0]]
    assert [one.get_linestyle() for one in middle.lines] == ["-", "--"]


MAP = reproduce.Experiment("a claim", "",
                           {"He: backprop": "", "He: FA": "", "torch's: backprop": "", "torch's: FA": ""},
                           {"0.01": "0.01", "0.1": "0.1"}, "learning rate", "map")
MAPPED = [line("He: backprop", 0.6, "0.01"), line("He: FA", 0.3, "0.01", (5.0, 40.0), (1.0, None), 100.0),
          line("He: backprop", 0.6, "0.1"), line("He: FA", None, "0.1"),
          line("torch's: backprop", 0.1, "0.1")]


def test_map_table_divides_feedback_alignments_rank_by_backprops():
    head, _, *rows = cells(report.map_table(MAP, MAPPED))
    assert head[2:] == ["backprop (%)", "FA (%)", "error δ", "gradient", "trajectory"]
    assert rows[0] == ["He", "0.01", "60.0", "30.0", "0.50, 2.00", "0.25, –", "2.00"]
    assert rows[1] == ["He", "0.1", "60.0", "– (1 of 1 diverged)", "–", "–", "–"]
    assert rows[2][2:] == ["not measured", "not measured", "–", "–", "–"]
    assert rows[3][2:] == ["10.0", "not measured", "–", "–", "–"]


def test_rank_table_lists_the_layers_below_the_classifier():
    experiment = reproduce.Experiment("a claim", "", {"FA": ""}, view="ranks")
    lines = [line("FA", 0.5), line("FA", 0.7, error=(20.0, 30.0), seed=1)]
    for result in lines:
        for layer in result["rank"][-1]["layers"].values():
            layer["update"] = {"effective_rank": 3.0}
    assert cells(report.rank_table(experiment, lines))[-1] == ["FA", "60.0 ± 14.1", "2", "15, 25", "4, 8",
                                                               "3, 3", "50", "0.25, 0.50", "–, 30"]


@pytest.mark.parametrize("columns, expected", [(["2", "4", "12"], ([2.0, 4.0, 12.0], "linear")),
                                               (["0.01", "0.1"], ([0.01, 0.1], "log")),
                                               (["1", "all", "flattened"], ([0.0, 1.0, 2.0], "linear"))])
def test_axis(columns, expected):
    assert report.axis(columns) == (columns, *expected)


@pytest.mark.parametrize(
    "experiment, lines",
    [(SWEEP, SWEPT), (SWEEP, SWEPT[2:3]), (MAP, MAPPED), (MAP, MAPPED[-1:]),
     (SWEEP, [{k: v for k, v in x.items() if k != "rank"} for x in SWEPT])],
)
def test_every_picture_is_drawn_whatever_is_missing(experiment, lines, tmp_path):
    report.VIEWS[experiment.view].draw(tmp_path / "picture.png", experiment, lines)
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"


def test_the_quick_table_and_picture(tmp_path):
    experiment = reproduce.EXPERIMENTS["quick"]
    rows = cells(
        report.quick_table(experiment, [line("FA", 0.5), line("FA", 0.7, error=(20.0, 30.0), seed=1)])
    )
    assert rows[3] == ["FA", "60.0 ± 14.1", "2", "15, 25"] and rows[2] == ["backprop", "not measured", "0",
                                                                           "–"]
    lines = [line("backprop", 0.9), line("FA", None, error=(math.nan, 3.0)), line("FA + Muon + norm", 0.8)]
    lines[1]["rank"][-1]["layers"]["layer 0"]["error"] = None
    report.draw_quick(tmp_path / "picture.png", experiment, lines)
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"


def test_every_experiment_has_a_view_and_colours():
    for experiment in reproduce.EXPERIMENTS.values():
        assert experiment.view in report.VIEWS
        for label in experiment.cells:
            assert report.colour(label).startswith("#")


def test_no_two_things_share_a_colour():
    assert len({*report.COLOURS.values(), *report.OTHERS}) == len(report.COLOURS) + len(report.OTHERS)
    assert report.colour("CNN: FA") == report.colour("FA") == report.COLOURS["FA"]
    labels = ["FA", "FA", "mine.MyRule", "mine.MyRule", "backprop"]
    chosen = report.colours(labels)
    assert (len(set(chosen)) == 5 and chosen[0] == report.COLOURS["FA"]
            and chosen[4] == report.COLOURS["backprop"])


def test_no_error_is_not_taken_for_a_collapse(tmp_path, monkeypatch):
    silent, collapsed = (line("CNN: FA", 0.1, "2", error=(0.0, 0.0)),
                         line("CNN: FA", 0.1, "12", error=(1.0, 1.0)))
    one = reproduce.Experiment(
        "a claim", "", {"CNN: FA": ""}, {"2": "2", "12": "12"}, "hidden layers", "sweep"
    )
    assert cells(report.sweep_table(one, [silent, collapsed]))[2] == ["CNN: FA", "10.0; no error", "10.0; 1"]
    drawn = figures(monkeypatch)
    report.draw_sweep(tmp_path / "picture.png", one, [silent, collapsed])
    (note,) = drawn[0].axes[1].texts
    assert "no error arrives" in note.get_text() and note.xy == (2.0, 0)
    zero, one_direction = drawn[0].axes[1].lines[0].get_ydata()
    assert math.isnan(zero) and one_direction == 1


def figures(monkeypatch):
    """What the pictures drawn from now on are made of."""
    drawn, save = [], report.save
    monkeypatch.setattr(report, "save", lambda figure, path: (drawn.append(figure), save(figure, path)))
    return drawn


def test_the_headline_shows_the_largest_scale_that_is_measured():
    full = reproduce.Experiment("", "", {}, paper={"FA": 1.4, "FA + norm": 37.1}, scale="All of it.")
    small = full._replace(scale="A part.", paper={})
    lines = [line("FA", 0.03), line("FA + norm", 0.1), line("backprop", 0.5), line("frozen features", 0.02)]
    text = report.headline(small, lines, full, [])
    assert cells(text.split("\n\n")[0])[2:5] == [["neither", "50.0", "3.0", "1.4"],
                                                ["Muon", "not measured", "not measured", "–"],
                                                ["norm", "not measured", "10.0", "37.1"]]
    assert "A part. One seed; frozen features reach 2.0." in text
    assert "All of it) has not been measured" in text
    text = report.headline(small, lines, full, [line("FA", 0.02), line("FA", 0.04, seed=1)])
    assert cells(text.split("\n\n")[0])[2] == ["neither", "50.0", "3.0", "not measured", "3.0 ± 1.4", "1.4"]
    assert "Full scale: All of it. 2 seeds; frozen" in text and "not been measured" not in text


def log(*losses):
    return [
        {"epoch": i, "train_loss": loss, "train_accuracy": 0.5,
         "test_accuracy": None if loss is None else 0.6}
        for i, loss in enumerate(losses, 1)
    ]


def test_a_runs_curves(tmp_path, monkeypatch):
    drawn = figures(monkeypatch)
    report.curves(tmp_path / "curves.png", log(3.0, 3000.0), "a run", classes=10)
    left, right = drawn[0].axes
    assert left.get_yscale() == "log" and list(left.lines[0].get_ydata()) == [3.0, 3000.0]
    assert [list(one.get_ydata()) for one in right.lines[:2]] == [[50.0, 50.0], [60.0, 60.0]]
    assert set(right.lines[2].get_ydata()) == {10.0} and "may lie below test" in drawn[0].get_supxlabel()
    report.curves(tmp_path / "diverged.png", log(None), "a run")
    assert (tmp_path / "diverged.png").read_bytes()[:4] == b"\x89PNG"

def recorded(*epochs, layers=("layers.0", "layers.1", "layers.2", "classifier")):
    """Lines of rank.jsonl; the error's rank is 10 × the layer's depth + the epoch, in layer 2 not known."""
    return [{"epoch": epoch, "layers": {
        name: {"error": None if i == 2 else {"effective_rank": 10.0 * i + epoch}}
        for i, name in enumerate(layers)}} for epoch in epochs]


def test_a_runs_curves_show_the_errors_rank_exactly_where_it_was_recorded(tmp_path, monkeypatch):
    drawn = figures(monkeypatch)
    report.curves(tmp_path / "plain.png", log(3.0, 2.0), "a run", 10)
    report.curves(tmp_path / "ranks.png", log(3.0, 2.0), "a run", 10, recorded(0, 2))
    report.curves(tmp_path / "diverged.png", log(None), "a run", 10, recorded(0))
    assert [len(figure.axes) for figure in drawn] == [2, 3, 3]
    panel = drawn[1].axes[2]
    assert panel.get_xlabel() == "epoch" and "effective rank of the error δ" in panel.get_ylabel()
    first, second, third = panel.lines                          # the classifier has an error of its own
    assert list(first.get_xdata()) == [0, 2] and list(first.get_ydata()) == [0.0, 2.0]
    assert list(second.get_ydata()) == [10.0, 12.0] and all(map(math.isnan, third.get_ydata()))
    light = [sum(to_rgb(line.get_color())) for line in panel.lines]
    assert light == sorted(light, reverse=True) and len(set(light)) == 3       # the deeper, the darker
    assert len({line.get_linewidth() for line in panel.lines}) == 3
    assert not drawn[2].axes[2].texts and drawn[2].axes[0].texts


def test_of_many_layers_the_legend_names_a_few_and_the_deepest(tmp_path, monkeypatch):
    drawn, names = figures(monkeypatch), [f"blocks.{i}.conv" for i in range(35)]
    report.curves(tmp_path / "ranks.png", log(3.0), "a run", 10,
                  recorded(0, 1, layers=[*names, "classifier"]))
    panel = drawn[0].axes[2]
    shown = [text.get_text() for text in panel.get_legend().get_texts()]
    assert len(panel.lines) == 35 and 4 <= len(shown) <= 8 and shown[-1] == names[-1]


def write_run(folder, records, **args):
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"args": {"rule": "fa", "muon": False, "norm": None, **args}})
    )
    (folder / "rank.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_a_runs_ranks_have_the_name_and_colour_of_the_tables(tmp_path, monkeypatch):
    records = line("FA", 0.5)["rank"]
    for record in records:
        for layer in record["layers"].values():
            layer["spectrum"] = [1.0, 0.5]
    runs = [write_run(tmp_path / "a", records), write_run(tmp_path / "b", records, muon=True, norm="batch"),
            write_run(tmp_path / "c", records, rule="mine.py:Rule", norm="layer"),
            write_run(tmp_path / "d", records)]
    read = [report.read_ranks(run) for run in runs]
    assert [name for name, _ in read] == ["FA", "FA + Muon + norm", "mine.Rule + layer norm", "FA"]
    assert read[0][1] == records
    drawn = figures(monkeypatch)
    report.draw_ranks(tmp_path / "ranks.png", read)
    curves = drawn[0].axes[0].lines[:4]
    assert [one.get_color() for one in curves[:2]] == [report.COLOURS["FA"],
                                                       report.COLOURS["FA + Muon + norm"]]
    assert len({one.get_color() for one in curves}) == 4
    widths = [one.get_linewidth() for one in curves]  # all four lie on each other, and each leaves a rim
    assert widths == sorted(widths, reverse=True) and len(set(widths)) == 4
    with pytest.raises(files.Problem, match="no record of ranks"):
        report.read_ranks(tmp_path)


# ---- python -m harness.report ------------------------------------------------------------------------------

ARGS = {"rule": "fa", "muon": False, "norm": None, "dataset": "gratings", "seed": 0, "exact": [],
        "epochs": 2, "lr": 0.02, "muon_lr": None, "weight_decay": 0.0005, "validate": None, "data": "data",
        "device": "cpu", "device_reason": "no GPU was found", "amp_reason": "as asked", "rule_digest": None}


def make_run(folder, *accuracies, diverged=None, version=2, **args):
    """A run's folder as train.py leaves it; returns how it is named on a command line."""
    folder.mkdir(parents=True)
    lines = [{"epoch": i, "diverged": False, "step": 4 * i, "train_loss": 2 / i, "train_accuracy": 0.5,
              "test_accuracy": accuracy, "seconds": 31.5} for i, accuracy in enumerate(accuracies, 1)]
    if diverged:
        lines.append({"epoch": len(lines) + 1, "diverged": True, "step": diverged, "train_loss": None,
                      "train_accuracy": None, "test_accuracy": None, "seconds": 1.0})
    config = {"version": version, "args": {**ARGS, "out": str(folder), **args}}
    (folder / "config.json").write_text(json.dumps(config))
    if lines:
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


@pytest.fixture
def compare(capsys):
    """The report's command line, in this process: (exit status, stdout, stderr)."""
    def run(*argv):
        try:
            status = report.main([str(arg) for arg in argv])
        except SystemExit as e:
            status = e.code
        return status, *capsys.readouterr()
    return run


def test_runs_side_by_side(compare, monkeypatch):
    drawn = figures(monkeypatch)
    runs = [make_run(Path("plain"), 0.1, 0.25, seed=0),
            make_run(Path("muon"), 0.5, 0.625, rule="mine.py:Rule", muon=True, muon_lr=0.01, seed=1,
                     exact=["layers.1", "layers.2"], amp_reason="else", rule_digest="f00", data="there"),
            make_run(Path("long"), 0.3, 0.4, epochs=3, weight_decay=0.0, norm="batch"),
            make_run(Path("wild"), 0.2, diverged=7, lr=5.0),
            make_run(Path("new"), epochs=12)]
    status, out, err = compare(*runs)
    assert status == 0 and err == "" and out.endswith("\n\ncompare.png\n")
    head, _, *rows = cells(out.partition("\n\n")[0])
    assert head == ["run", "rule", "test accuracy (%)", "epochs", "time", "what differs"]
    assert rows == [
        ["plain", "fa", "25.0", "2", "1m 03s", "--seed 0, --lr 0.02, --weight-decay 0.0005"],
        ["muon", "mine.py:Rule", "62.5", "2", "1m 03s",
         "--muon, --seed 1, --exact layers.1 layers.2, --lr 0.02, --muon-lr 0.01, --weight-decay 0.0005"],
        ["long", "fa", "unfinished, epoch 2 of 3: 40.0", "3", "1m 03s",
         "--norm batch, --seed 0, --lr 0.02, --weight-decay 0.0"],
        ["wild", "fa", "diverged at step 7", "2", "0m 32s", "--seed 0, --lr 5.0, --weight-decay 0.0005"],
        ["new", "fa", "no finished epoch", "12", "0m 00s", "--seed 0, --lr 0.02, --weight-decay 0.0005"]]
    assert Path("compare.png").read_bytes()[:4] == b"\x89PNG"
    accuracy, loss = drawn[0].axes
    assert loss.get_yscale() == "log" and "chance" in {line.get_label() for line in accuracy.lines}
    assert [list(line.get_ydata()) for line in accuracy.lines[:5]] == [
        [10, 25], [50, 62.5], [30, 40], [20], []]
    assert [list(line.get_ydata()) for line in loss.lines] == [[2, 1], [2, 1], [2, 1], [2], []]
    assert len({line.get_color() for line in loss.lines}) == 5
    assert [a.get_color() for a in accuracy.lines[:5]] == [b.get_color() for b in loss.lines]
    widths = [line.get_linewidth() for line in loss.lines]
    assert widths == sorted(widths, reverse=True) and len(set(widths)) == 5
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == [
        "plain", "muon", "long (unfinished, epoch 2 of 3)", "wild (diverged at step 7)",
        "new (no finished epoch)"]


def test_the_table_as_a_csv_file(compare):
    runs = [make_run(Path("a, b"), 0.1, 0.25, muon=True, muon_lr=0.01),
            make_run(Path("c"), 0.3, epochs=12, lr=0.5), make_run(Path("d"), diverged=3)]
    assert compare(*runs, "--csv", "t.csv", "--out", "p.svg")[0] == 0
    with open("t.csv", newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    assert head == ["run", "rule", "test accuracy (%)", "state", "epochs", "seconds", "muon", "lr", "muon_lr"]
    assert rows == [["a, b", "fa", "25.0", "finished", "2", "63.0", "True", "0.02", "0.01"],
                    ["c", "fa", "30.0", "unfinished, epoch 1 of 12", "12", "31.5", "False", "0.5", ""],
                    ["d", "fa", "", "diverged at step 3", "2", "1.0", "False", "0.02", ""]]
    assert "<svg" in Path("p.svg").read_text() and not Path("compare.png").exists()


def test_a_run_has_the_shortest_name_that_no_other_has(compare):
    runs = [make_run(Path(name), 0.1, 0.2) for name in ("x/low/run", "x/high/run", "y/high/run", "other")]
    out = compare(*runs, "other/../other", Path("x/low/run").absolute())[1]
    assert [row[0] for row in cells(out.partition("\n\n")[0])[2:]] == [
        "low/run", "x/high/run", "y/high/run", "other", "other", "low/run"]
    assert cells(out)[2][5] == "–"


def test_one_run_and_names_that_matplotlib_would_take_for_something_else(compare, monkeypatch):
    drawn = figures(monkeypatch)
    long = "fa-gain-3-" + "x" * 90 + "-muon-batch-gratings-cnn-s0"
    assert compare(make_run(Path(long), 0.1, 0.2))[::2] == (0, "")
    assert compare(make_run(Path("_a$b$_c$"), 0.1, 0.2), make_run(Path("new")))[::2] == (0, "")
    (name,), (hidden, _) = ([text.get_text() for text in figure.legends[0].get_texts()] for figure in drawn)
    assert len(name) == 100 and name.startswith("fa-gain-3-x") and name.endswith("-batch-gratings-cnn-s0")
    assert "…" in name and hidden == "_a$b$_c$"


def test_held_out_images_and_other_versions_are_not_taken_for_the_same(compare):
    test, held_out = make_run(Path("a"), 0.1, 0.2), make_run(Path("b"), 0.1, 0.2, validate=60, version=1)
    out = compare(test, held_out)[1]
    assert cells(out)[0][2] == "test or held-out accuracy (%)"
    assert [row[5] for row in cells(out)[2:4]] == ["version 2", "--validate 60, version 1"]
    assert cells(compare(held_out)[1])[0][2] == "held-out accuracy (%)"


def test_older_runs_lack_flags_that_came_later(compare):
    config = json.loads((Path(make_run(Path("a"), 0.1, 0.2, exact=[])) / "config.json").read_text())
    make_run(Path("b"), 0.1, 0.2)
    del config["args"]["exact"], config["args"]["validate"]
    Path("a/config.json").write_text(json.dumps(config))
    assert [row[5] for row in cells(compare("a", "b")[1])[2:4]] == ["–", "–"]


GOOD = '{"epoch": 1, "diverged": false, "step": 4, "train_loss": 1, "test_accuracy": 0.5, "seconds": 1}\n'
WRONG = {
    "no argument": ([], "arguments are required: RUN"),
    "no such folder": (["nowhere"], "nowhere is no run: nowhere/config.json: No such file or directory"),
    "no run": (["empty"], "empty is no run: empty/config.json: No such file"),
    "a file": (["file"], "file is no run: file/config.json: Not a directory"),
    "a broken name": (["two\nlines"], "two lines is no run"),
    "config no JSON": ("config.json", "{", "run/config.json is damaged"),
    "config garbage": ("config.json", b"\xff\xfe", "run/config.json is damaged"),
    "config a list": ("config.json", "[]", "run/config.json is damaged"),
    "config nothing": ("config.json", '{"args": {}}', "run/config.json is damaged ('epochs')"),
    "config without epochs": ("config.json", '{"args": {"rule": "fa"}}', "is damaged ('epochs')"),
    "config with words": ("config.json", json.dumps({"args": {**ARGS, "epochs": "two"}}), "is damaged"),
    "a rule of numbers": ("config.json", json.dumps({"args": {**ARGS, "rule": 3}}), "is damaged"),
    "half a line": ("log.jsonl", GOOD + GOOD[:30], "run/log.jsonl, line 2, is damaged"),
    "log garbage": ("log.jsonl", b"\xff\xfe", "run/log.jsonl"),
    "log of lists": ("log.jsonl", "[]\n", "run/log.jsonl, line 1, is damaged"),
    "log of nothing": ("log.jsonl", "{}\n", "run/log.jsonl, line 1, is damaged ('diverged')"),
    "log of words": ("log.jsonl", GOOD.replace("0.5", '"high"'), "line 1, is damaged"),
    "log of NaN": ("log.jsonl", GOOD + GOOD.replace("0.5", "NaN"), "line 2, is damaged"),
    "log of infinities": ("log.jsonl", GOOD.replace('s": 1}', 's": 1e999}'), "line 1, is damaged"),
    "log deep": ("log.jsonl", "[" * 100_000, "line 1, is damaged"),
    "log a folder": ("log.jsonl", None, "run/log.jsonl: Is a directory"),
    "picture nowhere": (["run", "--out", "nowhere/x.png"], "cannot write nowhere/x.png: No such file or dir"),
    "picture a folder": (["run", "--out", "empty"], "cannot write empty: Is a directory"),
    "picture no name": (["run", "--out", "."], "cannot write ."),
    "picture of no kind": (["run", "--out", "x.docx"], "cannot write x.docx: Format 'docx' is not supported"),
    "table nowhere": (["run", "--csv", "nowhere/x.csv"], "cannot write nowhere/x.csv: No such file"),
    "table a folder": (["run", "--csv", "empty"], "cannot write empty: Is a directory"),
    "one file twice": (["run", "--csv", "x", "--out", "empty/../x"], "--csv and --out name the same file"),
    "no flag": (["run", "--fast"], "unrecognized arguments: --fast"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_input_is_one_line(wrong, compare):
    *what, said = WRONG[wrong]
    make_run(Path("run"), 0.1, 0.2)
    Path("empty").mkdir()
    Path("file").touch()
    if len(what) == 2:                                          # a file of the run, and what it holds
        path, content = Path("run") / what[0], what[1]
        path.unlink()
        if content is None:
            path.mkdir()
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = set(Path().rglob("*"))
    status, _, err = compare(*(what[0] if len(what) == 1 else ["run"]))
    assert status == 2 and err.count("\n") == 1 and err.startswith("report: ") and said in err
    assert set(Path().rglob("*")) == before


def test_without_matplotlib_there_is_a_table(compare, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, out, err = compare(make_run(Path("run"), 0.1, 0.2), "--csv", "t.csv")
    assert status == 2 and "| 20.0 " in out and Path("t.csv").exists()
    assert err.startswith("report: cannot write compare.png: ") and err.count("\n") == 1


def test_two_real_runs(tmp_path, monkeypatch):
    drawn = figures(monkeypatch)
    small = [*SMALL, "--width", "8", "--device", "cpu"]
    assert train.main([*small, "--out", "fa"]) == 0
    assert train.main([*small, "--muon", "--norm", "--rank", "--out", "repaired"]) == 0
    assert [len(figure.axes) for figure in drawn] == [2, 3]     # with --rank, the rank of the error too
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}       # a terminal without "–"
    done = subprocess.run([sys.executable, "-m", "harness.report", tmp_path / "fa", tmp_path / "repaired",
                           "--out", tmp_path / "both.png", "--csv", tmp_path / "both.csv"],
                          cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    fa, repaired = cells(done.stdout)[2:4]
    final = [json.loads(Path(name, "log.jsonl").read_text().splitlines()[-1])["test_accuracy"]
             for name in ("fa", "repaired")]
    assert fa[:4] == ["fa", "fa", f"{100 * final[0]:.1f}", "2"] and fa[5] == "--lr 0.02"
    assert repaired[2] == f"{100 * final[1]:.1f}"
    assert repaired[5] == "--muon, --norm batch, --lr 0.05, --muon-lr 0.05, --rank 1"
    assert done.stdout.endswith(f"\n{tmp_path / 'both.png'}\n") and (tmp_path / "both.png").exists()
    assert [row.split(",")[0] for row in (tmp_path / "both.csv").read_text().splitlines()] == [
        "run", "fa", "repaired"]
