"""harness/report.py: the numbers of the tables by hand, and every picture drawn."""
import json
import math

import pytest
from matplotlib.colors import to_rgb

import reproduce
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
    full = reproduce.Experiment("", "", {"FA": "", "FA + norm": "", "frozen features": ""},
                                paper={"FA": 1.4, "FA + norm": 37.1}, scale="All of it.")
    small = full._replace(scale="A part.", paper={})
    text = report.headline(small, [line("FA", 0.03), line("FA + norm", 0.1)], full, [])
    assert cells(text.split("\n\n")[0])[2:] == [["FA", "3.0", "1", "1.4"], ["FA + norm", "10.0", "1", "37.1"],
                                               ["frozen features", "–", "", "–"]]
    assert "A part." in text and "All of it) has not been measured" in text
    text = report.headline(small, [line("FA", 0.03)], full, [line("FA", 0.02), line("FA", 0.04, seed=1)])
    assert cells(text.split("\n\n")[0])[2] == ["FA", "3.0", "1", "3.0 ± 1.4", "2", "1.4"]
    assert "Full scale: All of it." in text and "not been measured" not in text


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
