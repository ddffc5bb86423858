"""Makes the tables and pictures: one of each per kind of experiment, and one that compares runs.

    python -m harness.report RUN [RUN ...]      # run folders side by side: a table, and compare.png

A result is a line of results/NAME.jsonl as experiment.py writes it, with the label of its row and column
beside it. Tables are Markdown, as results/README.md holds them; accuracies are those of the last epoch, in %,
mean ± standard deviation over seeds. Nothing here knows how the results were made.

One colour stands for one thing in every picture: `colour(label)`. No curve can hide another: where two
coincide, the later one is thinner, and the earlier one shows as its rim.
"""
from __future__ import annotations

import csv
import io
import json
import math
import os
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from harness import files, recorder, rulefile

os.environ["MPLBACKEND"] = "Agg"     # before matplotlib is imported: the backend of a notebook may stop that

# Okabe & Ito 2008 for what the paper compares, Tol 2021 for the rest: both are safe for the colour-blind.
COLOURS = {"backprop": "#888888", "backprop + Muon": "#CC79A7", "backprop + norm": "#000000",
           "backprop + Muon + norm": "#009E73", "frozen features": "#999933",
           "FA": "#D55E00", "FA + Muon": "#E69F00", "FA + norm": "#56B4E9", "FA + Muon + norm": "#0072B2",
           "FA + Muon + norm, no weights in shortcuts": "#661188",
           "backprop + Muon + norm, no weights in shortcuts": "#66BB44",
           "FA + Muon + norm, no weights in shortcuts, first convolutions fixed": "#884422",
           "DFA": "#882255", "sign-symmetry": "#44AA99", "Kolen–Pollack": "#332288",
           "FA + Muon + norm, no weights in shortcuts, Muon decay 0.05": "#CC6677",
           "Muon decay 0.05": "#6699CC", "B × 3": "#AA4499", "orthogonal B": "#117733"}
OTHERS = ("#7F5539", "#BB5566", "#004488", "#997700", "#AA3377", "#5A7D2A", "#6C4AB6")      # what a user adds
RULES = {"bp": "backprop", "fa": "FA", "dfa": "DFA", "sign": "sign-symmetry", "kp": "Kolen–Pollack",
         "frozen": "frozen features"}


DAMAGE = (LookupError, TypeError, ValueError, ArithmeticError, RecursionError)      # JSON, but not a run's


# ---- numbers -----------------------------------------------------------------------------------------------

def percent(line: dict) -> str:
    if line["diverged"]:
        return f"diverged at step {line['epochs'][-1]['step']}"
    return f"{100 * line['final_test_accuracy']:.1f} %"


def accuracies(cell: list[dict]) -> list[float]:
    """In %, of the seeds that did not diverge."""
    return [100 * line["final_test_accuracy"] for line in cell if not line["diverged"]]


def mean_accuracy(cell: list[dict]) -> float | None:
    known = accuracies(cell)
    return statistics.mean(known) if known else None


def accuracy(cell: list[dict]) -> str:
    """Mean ± standard deviation in %, and how many runs diverged."""
    if not cell:
        return "not measured"
    known = accuracies(cell)
    text = f"{statistics.mean(known):.1f}" if known else "–"
    if len(known) > 1:
        text += f" ± {statistics.stdev(known):.1f}"
    if len(known) < len(cell):
        text += f" ({len(cell) - len(known)} of {len(cell)} diverged)"
    return text


def chance(line: dict) -> float:
    """In %, of guessing; 0 for a folder of images, whose classes are not known here."""
    return {"gratings": 10.0, "cifar10": 10.0, "cifar100": 1.0}.get(line["args"]["dataset"], 0.0)


def measured(lines: list[dict]) -> str:
    """On which images: "held-out" training images where the experiment chooses something by them."""
    return "held-out" if any(line.get("args", {}).get("validate") for line in lines) else "test"


def select(lines: list[dict], label: str, column: str | None = None) -> list[dict]:
    return [line for line in lines if line["label"] == label and (column is None or line["column"] == column)]


def effective_ranks(record: dict, kind: str) -> list[float | None]:
    """Of each layer but the classifier, from the stem up; `record` is a line of rank.jsonl."""
    return [(layer.get(kind) or {}).get("effective_rank") for layer in list(record["layers"].values())[:-1]]


def trajectory_rank(record: dict) -> float | None:
    return (record["trajectory"].get("all layers") or {}).get("effective_rank")


def hidden_error_rank(line: dict) -> float | None:
    """Effective rank of the error δ after training, the mean of all layers but the classifier.

    It is 0 only where no error arrives at all, as behind units that are all silent. That is no collapse of
    its rank: an error of which one direction is left has rank 1.
    """
    known = [r for r in effective_ranks(line["rank"][-1], "error") if r is not None]
    return statistics.mean(known) if known and not line["diverged"] else None


def span(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}h {minutes % 60:02}m" if minutes >= 60 else f"{minutes}m {seconds:02}s"


def mean(values: list[float | None], digits: int = 0) -> str:
    known = [v for v in values if v is not None]
    return f"{statistics.mean(known):.{digits}f}" if known else "–"


# ---- tables ------------------------------------------------------------------------------------------------

def markdown(head: list[str], rows: list[list]) -> str:
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows])


def wider(table: str, head: str, cells: list[str]) -> str:
    """The table with more columns on its right: their heads, and for each row their cells, between bars."""
    first, rule, *rows = table.splitlines()
    more = [f" {head} |", " --- |" * (head.count("|") + 1), *[f" {cell} |" for cell in cells]]
    return "\n".join(line + addition for line, addition in zip([first, rule, *rows], more))


def table(experiment, lines: list[dict]) -> str:
    """A row a cell: accuracy, n, the paper's value and the difference to it where it gives one."""
    head, rows = ["", f"{measured(lines)} accuracy (%)", "n"], []
    if experiment.paper:
        head += ["the paper", "difference"]
    for label in experiment.cells:
        cell = select(lines, label)
        row = [label, accuracy(cell), len(cell)]
        if experiment.paper:
            paper, ours = experiment.paper.get(label), mean_accuracy(cell)
            known = paper is not None and ours is not None
            row += [paper or "–", f"{ours - paper:+.1f}" if known else ""]      # type: ignore[operator]
        rows.append(row)
    return markdown(head, rows)


REPAIRS = ("", " + Muon", " + norm", " + Muon + norm")
HEADLINE = {f"{rule}{repair}" for rule in ("backprop", "FA") for repair in REPAIRS} | {"frozen features"}
BEYOND = " + Muon + norm, no weights in shortcuts"


def headline(experiment, lines: list[dict], full, whole: list[dict]) -> str:
    """The paper's table beside ours, by repair, and what goes beyond it.

    full    the experiment at the paper's scale
    whole   its results so far
    """
    scales = [lines, whole] if experiment is not full and whole else [lines]
    head = ["test accuracy (%)", "backprop", "FA", "FA at full scale", "FA at full scale, the paper"]
    rows = []
    for repair in [*REPAIRS, BEYOND] if select(lines, f"FA{BEYOND}") else REPAIRS:
        ours = [accuracy(select(lines, f"backprop{repair}"))]
        ours += [accuracy(select(at_scale, f"FA{repair}")) for at_scale in scales]
        rows.append([repair[3:] or "neither", *ours, full.paper.get(f"FA{repair}", "–")])
    note = (f"{experiment.scale} {seeds(lines)}; frozen features reach "
            f"{accuracy(select(lines, 'frozen features'))}.")
    if len(scales) > 1:
        devices = ", ".join(dict.fromkeys(line["device"] for line in whole))
        note += f" Full scale: {full.scale.rstrip('.')}, on {devices}. {seeds(whole)}."
    elif experiment is not full:
        note += f" The full scale ({full.scale.rstrip('.')}) has not been measured here yet."
    return f"{markdown(head[:2 + len(scales)] + head[4:], rows)}\n\n{note}"


def seeds(lines: list[dict]) -> str:
    """How many the rows of the headline table have that were measured."""
    shown = HEADLINE | {f"{rule}{BEYOND}" for rule in ("backprop", "FA")}
    counts = sorted(Counter(line["label"] for line in lines if line["label"] in shown).values())
    if counts[0] < counts[-1]:
        return f"{counts[0]} to {counts[-1]} seeds a row"
    return "One seed" if counts[-1] == 1 else f"{counts[-1]} seeds"


def rank_table(experiment, lines: list[dict]) -> str:
    """The table, and what was recorded after the last epoch, by layer from the stem up to the last before the
    classifier.

    Effective ranks of the error, gradient and update; that of the network's trajectory; mean |cos| between
    the activations of different images at the layer's output; degrees between the gradient and backprop's.
    """
    cells = []
    for label in experiment.cells:
        finals = [line["rank"][-1] for line in select(lines, label)]
        layers = [list(final["layers"].values()) for final in finals]
        texts = [by_layer([effective_ranks(final, kind) for final in finals])
                 for kind in ("error", "gradient", "update")]
        texts.append(mean([trajectory_rank(final) for final in finals]))
        texts.append(by_layer([[layer["cosine"] for layer in each[1:]] for each in layers], digits=2))
        texts.append(by_layer([[layer["angle_gradient"] for layer in each[:-1]] for each in layers]))
        cells.append(" | ".join(texts))
    return wider(table(experiment, lines), "error δ | gradient | update | trajectory | cosine | angle", cells)


def quick_table(experiment, lines: list[dict]) -> str:
    """The table, and the effective ranks of the error after the last epoch, by layer from the stem up."""
    return wider(table(experiment, lines), "rank of the error δ",
                 [by_layer([effective_ranks(line["rank"][-1], "error") for line in select(lines, label)])
                  for label in experiment.cells])


def ways_table(experiment, lines: list[dict]) -> str:
    """The table, and after the last epoch, by residual block: the branch's share of the error, and the angle
    to backprop's error at the branch's end; and the mean ‖B‖ / ‖W‖ there."""
    cells = []
    for label in experiment.cells:
        share, angle, size = ([by_block(line, *what) for line in select(lines, label)] for what in WAYS)
        cells.append(f"{by_layer(share)} | {by_layer(angle)} | {mean([v for each in size for v in each], 2)}")
    return wider(table(experiment, lines), "branch's share (%) | ∠ error (°) | ‖B‖ / ‖W‖", cells)


def blocks_table(experiment, lines: list[dict]) -> str:
    """The table, and of the error at the end of each residual block's branch, from the first block up, after
    the last epoch: its effective rank, and its angle to backprop's."""
    cells = []
    for label in experiment.cells:
        cell = [line for line in select(lines, label) if not line["diverged"]]
        ranks = [[(end["error"] or {}).get("effective_rank")
                  for name, end in line["rank"][-1]["layers"].items() if name.endswith(".conv2")]
                 for line in cell]
        angles = [by_block(line, "conv2", "angle_error", 1) for line in cell]
        arrives = any(rank for seed in ranks for rank in seed)
        cells.append(f"{by_layer(ranks)} | {by_layer(angles)}" if arrives or not ranks else "no error | –")
    return wider(table(experiment, lines), "rank of the error δ | ∠ error (°)", cells)


# What is recorded of residual blocks: of which layer, under which name, and times what.
WAYS = ("conv1", "branch", 100), ("conv2", "angle_error", 1), ("conv2", "norm_ratio", 1)


def by_block(line: dict, part: str, key: str, times: float) -> list[float | None]:
    """A number of each block's layer `part` after the last epoch, from the first block up."""
    layers = line["rank"][-1]["layers"]
    found = [layer.get(key) for name, layer in layers.items() if name.endswith(f".{part}")]
    return [None if value is None else times * value for value in found]


def by_layer(seeds: list[list[float | None]], digits: int = 0) -> str:
    """Each layer's mean over the seeds."""
    return ", ".join(mean(list(layer), digits) for layer in zip(*seeds)) or "–"


def sweep_table(experiment, lines: list[dict]) -> str:
    """A row a cell, a column a value: accuracy, and after a semicolon the mean rank of the error."""
    def cell(label: str, column: str) -> str:
        found = select(lines, label, column)
        recorded = [hidden_error_rank(line) for line in found if "rank" in line]
        if not recorded:
            return accuracy(found)
        return accuracy(found) + ("; no error" if set(recorded) == {0} else f"; {mean(recorded)}")

    rows = [[label, *[cell(label, column) for column in experiment.columns]] for label in experiment.cells]
    return markdown([experiment.axis, *experiment.columns], rows)


def map_table(experiment, lines: list[dict]) -> str:
    """A row for each initialisation and learning rate: accuracies; FA's rank ÷ backprop's, seed 0."""
    rows = []
    for panel in panels(experiment):
        for column in experiment.columns:
            bp, fa = (select(lines, f"{panel}: {label}", column) for label in ("backprop", "FA"))
            finals: list = [x[0]["rank"][-1] if x and not x[0]["diverged"] else None for x in (bp, fa)]
            texts = ["–"] * 3
            if None not in finals:
                pairs = [
                    zip(*(effective_ranks(final, kind) for final in finals)) for kind in ("error", "gradient")
                ]
                texts = [", ".join(mean([ratio(f, b)], 2) for b, f in layers) for layers in pairs]
                texts.append(mean([ratio(trajectory_rank(finals[1]), trajectory_rank(finals[0]))], 2))
            rows.append([panel, column, accuracy(bp), accuracy(fa), *texts])
    head = ["initialisation", experiment.axis, "backprop (%)", "FA (%)", "error δ", "gradient", "trajectory"]
    return markdown(head, rows)


def ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


# ---- pictures ----------------------------------------------------------------------------------------------

def panels(experiment) -> list[str]:
    """The parts of the labels before a colon, in order; [""] where there are none."""
    return list(dict.fromkeys(label.rpartition(": ")[0] for label in experiment.cells))


def colour(label: str) -> str:
    """Of a row, by its name; what nobody foresaw, such as a rule of your own, takes one of the others."""
    name = label.rpartition(": ")[2]
    return COLOURS.get(name) or OTHERS[sum(name.encode()) % len(OTHERS)]


def colours(labels: Sequence[str]) -> list[str]:
    """Of the rows of one picture: each its own; where another row has that already, one that is left."""
    chosen: list[str] = []
    for label in labels:
        left = [colour(label), *OTHERS, *COLOURS.values()]
        chosen.append(next((one for one in left if one not in chosen), left[0]))
    return chosen


def figure_of(*shape: int, size: tuple[float, float], sharey: str = "none",
              heights: list[int] | None = None):
    """(figure, axes as an array of that shape): no display needed, no frame around the axes."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(*shape, figsize=size, layout="constrained", squeeze=False, sharey=sharey,
                                height_ratios=heights)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def widths(count: int) -> list[float]:
    """Of curves in one panel: the later one is drawn the thinner it is, so that the one under it is a rim."""
    return [4 - 2.6 * i / max(1, count - 1) for i in range(count)]


def loss_axis(ax) -> None:
    """Logarithmic: a loss that runs away and one that falls from 2 to 0.02 can both be read."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):                          # 0.6 and not 6e-01
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    ax.set(xlabel="epoch", ylabel="training loss (nats), logarithmic", yscale="log")
    ax.yaxis.set_major_formatter(Plain())
    ax.yaxis.set_minor_formatter(Plain())


def save(figure, path: Path) -> None:
    """In the format that the path's ending names, or as PNG."""
    from matplotlib import pyplot as plt
    kind = path.suffix[1:] or "png"
    files.write(path, lambda partial: figure.savefig(partial, dpi=130, format=kind))
    plt.close(figure)


def picture(path: Path, draw: Callable[[], object]) -> bool:
    """Call draw(); where it fails, say so in one line and return False: it must never cost a result."""
    try:
        draw()
    except Exception as e:  # noqa: BLE001  (a broken matplotlib, a full disk: whatever it is, it is said)
        print(f"cannot draw {path}: {type(e).__name__}: {' '.join(str(e).split())}", file=sys.stderr)
        return False
    return True


# ---- pictures of runs --------------------------------------------------------------------------------------

def curves(path: Path, log: list[dict], title: str, classes: int | None = None,
           ranks: Sequence[dict] = (), images: str = "test") -> None:
    """curves.png: loss; accuracies, on training and on `images`, and chance where `classes` are given; the
    error's rank if recorded."""
    from matplotlib.ticker import MaxNLocator
    figure, axes = figure_of(1, 3 if ranks else 2, size=(14.5 if ranks else 9, 3.8))
    left, right = axes[0, :2]
    finished = [line for line in log if line["test_accuracy"] is not None]
    epochs = [line["epoch"] for line in finished]
    left.plot(epochs, [line["train_loss"] for line in finished], "o-", color="#000000", markersize=3)
    loss_axis(left)
    for key, label, style, shade in (("train_accuracy", "training images", "o--", "#999999"),
                                     ("test_accuracy", f"{images} images", "o-", "#000000")):
        heights = [100 * line[key] for line in finished]
        right.plot(epochs, heights, style, markersize=3, color=shade, label=label)
    if classes:
        right.axhline(100 / classes, color="#999999", linewidth=1, linestyle=":", label="chance")
    right.set(xlabel="epoch", ylabel="accuracy (%)", ylim=(0, None))
    right.legend(frameon=False)
    if ranks:
        error_ranks(axes[0, 2], ranks)
    for ax in (left, right):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if not finished:
            ax.text(0.5, 0.5, "diverged in the first epoch", ha="center", transform=ax.transAxes)
    figure.suptitle(title, fontsize=10)
    figure.supxlabel(
        "Training accuracy is measured on augmented images, while the weights still change: it may "
        f"lie below {images} accuracy.",
        fontsize=9,
    )
    save(figure, path)


def error_ranks(ax, ranks: Sequence[dict]) -> None:
    """By epoch: a curve for each layer but the classifier, the deeper the darker."""
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator
    names = list(ranks[0]["layers"])[:-1]
    layers = list(zip(*[effective_ranks(record, "error") for record in ranks]))
    named = names[::-1 - len(names) // 8]                       # the deepest and some others, 8 at most
    epochs = [record["epoch"] for record in ranks]
    for i, (name, layer, width) in enumerate(zip(names, layers, widths(len(names))), 1):
        ax.plot(epochs, [nan(rank) for rank in layer], "o-", linewidth=width, markersize=width + 1.5,
                color=colormaps["Blues"](0.25 + 0.75 * i / len(names)), label=name if name in named else None)
    ax.set(xlabel="epoch", ylabel="effective rank of the error δ", ylim=(0, 1.04 * ax.get_ylim()[1]))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def name_of(args: dict) -> str:
    """What the tables call a run with these arguments."""
    parts = [RULES.get(args["rule"], rulefile.name(args["rule"]))]
    if args["muon"]:
        parts.append("Muon")
    if args["norm"]:
        parts.append("norm" if args["norm"] == "batch" else f"{args['norm']} norm")
    return " + ".join(parts)


def read_ranks(run: Path) -> tuple[str, list[dict]]:
    """A run's name as the tables have it, and its records. Raises files.Problem where there are none."""
    try:
        args = json.loads((run / "config.json").read_text(encoding="utf-8"))["args"]
        records = [json.loads(line) for line in (run / "rank.jsonl").read_text(encoding="utf-8").splitlines()]
        return name_of(args), [*records[:-1], dict(records[-1])]       # one at least
    except (OSError, *DAMAGE) as e:
        raise files.Problem(f"{run} has no record of ranks ({e}); make one with train.py --rank") from e


def draw_ranks(path: Path, runs: list[tuple[str, list[dict]]]) -> None:
    """Six panels, a run in one colour: rank by depth and over epochs, spectrum, trajectory, alignment."""
    from matplotlib.ticker import MaxNLocator
    figure, panels = figure_of(2, 3, size=(12, 7))
    (by_depth, spectrum, over_epochs), (gradients, trajectory, alignment) = panels
    shades = colours([label for label, _ in runs])
    for (label, records), shade, width in zip(runs, shades, widths(len(runs))):
        style = {"color": shade, "marker": "o", "markersize": width + 1.5, "linewidth": width}
        last = records[-1]["layers"]
        names = list(last)[:-1] or list(last)                   # the classifier's error has few directions
        hidden, depth = names[1:] or names, range(1, len(names) + 1)
        epochs = [record["epoch"] for record in records]

        def ranks(layers: dict, names: list[str], kind: str) -> list[float]:
            return [layers[n][kind]["effective_rank"] if layers[n][kind] else math.nan for n in names]

        by_depth.plot(depth, ranks(last, names, "error"), label=label, **style)
        gradients.plot(depth, ranks(last, names, "gradient"), **style)
        if last[hidden[-1]]["spectrum"]:
            sigma = last[hidden[-1]]["spectrum"]
            spectrum.plot(recorder.Recorder.SPECTRUM[:len(sigma)], sigma, **style)
        over_epochs.plot(
            epochs, [ranks(record["layers"], hidden[-1:], "gradient")[0] for record in records], **style
        )
        rows = [
            (r["epoch"], r["trajectory"]["all layers"]) for r in records if r["trajectory"].get("all layers")
        ]
        trajectory.plot([epoch for epoch, _ in rows], [t["effective_rank"] for _, t in rows], **style)
        angles = [[r["layers"][n]["angle_gradient"] for n in hidden] for r in records]
        alignment.plot(epochs, [sum(a) / len(a) if None not in a else math.nan for a in angles], **style)
    ceilings = {kind: [(last[n][kind] or {}).get("ceiling", math.nan) for n in names]
                for kind in ("error", "gradient")}
    by_depth.plot(depth, ceilings["error"], ":", color="#888888", label="largest possible")
    gradients.plot(depth, ceilings["gradient"], ":", color="#888888")
    trajectory.plot([e for e, _ in rows], [t["rows"] for _, t in rows], ":", color="#888888")
    alignment.axhline(90, linestyle=":", color="#888888", label="90°: unrelated")
    alignment.legend(frameon=False, fontsize=9)
    by_depth.set(title="error δ, after training", xlabel="layer, from the stem up",
                 ylabel="effective rank")
    gradients.set(title="weight gradient, after training", xlabel="layer, from the stem up",
                  ylabel="effective rank")
    over_epochs.set(title=f"weight gradient of layer {len(names)}", xlabel="epoch", ylabel="effective rank")
    trajectory.set(title="gradient trajectory, whole network", xlabel="epoch", ylabel="effective rank so far")
    spectrum.set(title=f"error δ of layer {len(names)}, after training", xlabel="i", yscale="log",
                 ylabel="singular value σ_i / σ_1", xscale="log", ylim=(1e-4, 1.5))
    alignment.set(title="angle to backprop's gradient", xlabel="epoch",
                  ylabel=f"degrees, mean of layers 2 to {len(names)}", ylim=(-4, None))
    for axes in (by_depth, gradients, over_epochs, trajectory):
        axes.set_ylim(0, None)
    for axes in (by_depth, gradients, over_epochs, trajectory, alignment):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure.legend(*by_depth.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    save(figure, path)


# ---- pictures of experiments -------------------------------------------------------------------------------


def draw_epochs(path: Path, experiment, lines: list[dict]) -> None:
    figure, axes = figure_of(1, 1, size=(max(7.5, 4.5 + 0.09 * max(map(len, experiment.cells))), 4))
    accuracy_by_epoch(axes[0, 0], experiment, lines)
    save(figure, path)


def draw_quick(path: Path, experiment, lines: list[dict]) -> None:
    """Left the accuracy by epoch, right the rank of the error by layer: the failure, and its error."""
    figure, axes = figure_of(1, 2, size=(11, 4))
    accuracy_by_epoch(axes[0, 0], experiment, lines)
    right = axes[0, 1]
    for label in experiment.cells:
        for line in select(lines, label):
            ranks = effective_ranks(line["rank"][-1], "error")
            depth = range(1, len(ranks) + 1)
            right.plot(
                depth, [math.nan if r is None else r for r in ranks], "o-", color=colour(label), linewidth=2
            )
    ceiling = next(iter(lines[0]["rank"][-1]["layers"].values()))["error"]["ceiling"]
    right.set(title="rank of the error δ after training", xlabel="layer, from the stem up",
              xticks=list(depth), ylabel=f"effective rank (at most {ceiling})", ylim=(0, None))
    axes[0, 0].set(title="accuracy")
    save(figure, path)


def accuracy_by_epoch(axes, experiment, lines: list[dict]) -> None:
    """Test accuracy by epoch, one colour a cell, a line a seed, each named at its end."""
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import MaxNLocator
    ends = []
    for label, width in zip(experiment.cells, widths(len(experiment.cells))):
        cell = select(lines, label)
        for line in cell:
            epochs = [e for e in line["epochs"] if e["test_accuracy"] is not None]
            axes.plot([e["epoch"] for e in epochs], [100 * e["test_accuracy"] for e in epochs], "o-",
                      markersize=width + 0.5, color=colour(label), linewidth=width)
            last = epochs[-1]["epoch"] if epochs else 0
        if cell:
            height = mean_accuracy(cell)
            ends.append([chance(cell[0]) if height is None else height, last, label])
    low = min(chance(line) for line in lines)
    top = max(height for height, *_ in ends)
    places, placed = [], -1e9
    for height, *_ in sorted(ends):                             # names apart from each other
        placed = max(height, placed + 0.055 * (top - low))
        places.append(placed)
    for (_, last, label), place in zip(sorted(ends), places):
        axes.annotate(label, (last, place - (places[-1] - top) / 2), xytext=(6, 0),
                      textcoords="offset points", va="center", color=colour(label), fontsize=11,
                      annotation_clip=False, path_effects=[withStroke(linewidth=3, foreground="white")])
    axes.axhline(low, color="#999999", linewidth=1, linestyle=":")
    axes.annotate("chance", (0.7 * max(last for _, last, _ in ends), low), xytext=(0, 7),
                  textcoords="offset points", color="#666666")
    axes.set(xlabel="epoch", ylabel=f"{measured(lines)} accuracy (%)", ylim=(0, None), xlim=(0.7, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def draw_recorded(path: Path, experiment, lines: list[dict]) -> None:
    draw_ranks(path, [(line["label"], line["rank"]) for line in lines if line["seed"] == 0])


def draw_sweep(path: Path, experiment, lines: list[dict]) -> None:
    """Accuracy against the columns, a panel for each kind of network; below it the rank of the error."""
    recorded = all("rank" in line for line in lines)
    names = panels(experiment)
    figure, grid = figure_of(1 + recorded, len(names), sharey="row",
                             size=(max(7.5, 2 + 4 * len(names)), 4 + 3 * recorded))
    ticks, positions, scale = axis(list(experiment.columns))
    # Columns that are numbers come first; the others have no order, so no line leads from one to the next.
    numbers = sum(column.replace(".", "").isdecimal() for column in experiment.columns)
    floor = min(chance(line) for line in lines)
    for j, panel in enumerate(names):
        labels = [label for label in experiment.cells if label.rpartition(": ")[0] == panel]
        for label, width in zip(labels, widths(len(labels))):
            style = {"marker": "o", "markersize": width + 1.5, "linewidth": width, "color": colour(label),
                     "label": label.rpartition(": ")[2]}
            cells = [select(lines, label, column) for column in experiment.columns]
            heights = [nan(mean_accuracy(cell)) for cell in cells]
            grid[0, j].plot(positions[:numbers], heights[:numbers], **style)
            if numbers < len(positions):
                style |= {"linestyle": "none", "markersize": 7, "label": None if numbers else style["label"]}
                grid[0, j].plot(positions[numbers:], heights[numbers:], **style)
            lost = [x for x, cell in zip(positions, cells) if cell and not accuracies(cell)]
            grid[0, j].plot(lost, [floor] * len(lost), "x", markersize=9, color=colour(label))
            for x in lost:
                grid[0, j].annotate("diverged", (x, floor), xytext=(0, 7), textcoords="offset points",
                                    ha="center", fontsize=10, color=colour(label))
            if recorded:
                ranks: list = [[hidden_error_rank(line) for line in cell] for cell in cells]
                means = [statistics.mean(r) if r and None not in r else math.nan for r in ranks]
                # Where no error arrives there is no rank: the curve has a gap there, and a mark of its own.
                grid[1, j].plot(positions, [height or math.nan for height in means], **style)
                for x in [x for x, height in zip(positions, means) if height == 0]:
                    grid[1, j].plot(x, 0, "o", markerfacecolor="white", color=colour(label), clip_on=False)
                    grid[1, j].annotate("no error arrives:\nzero, not collapsed", (x, 0), xytext=(0, 9),
                                        ha="center", textcoords="offset points", fontsize=10,
                                        color=colour(label))
        grid[0, j].axhline(floor, color="#999999", linewidth=1, linestyle=":", label="chance")
        grid[0, j].set_title(panel)
    for ax in grid.flat:
        ax.set(xscale=scale, xlabel=experiment.axis, ylim=(0, None))
        ax.set_xticks(positions, ticks)
        ax.minorticks_off()
    grid[0, 0].set_ylabel(f"{measured(lines)} accuracy (%)")
    if recorded:
        grid[1, 0].set_ylabel("effective rank of the error δ,\nmean of the layers")
    handles = {label: line for ax in grid[0] for line, label in zip(*ax.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False)
    save(figure, path)


def bars(ax, labels: list[str], lines: list[dict], shades: dict[str, str]) -> None:
    """The accuracy of each row, from the top down, each by its name without the panel's."""
    names = [label.rpartition(": ")[2] for label in labels]
    for i, (label, name) in enumerate(zip(labels, names)):
        cell = select(lines, label)
        ax.barh(-i, nan(mean_accuracy(cell)), color=shades[name])
        ax.text(mean_accuracy(cell) or 0, -i, f" {accuracy(cell)}", va="center", fontsize=11)
    ax.set_yticks(range(0, -len(labels), -1), names, fontsize=12)


def draw_bars(path: Path, experiment, lines: list[dict]) -> None:
    there = [label for label in experiment.cells if select(lines, label)]
    figure, axes = figure_of(1, 1, size=(7.5, 1.5 + 0.4 * len(there)))
    bars(axes[0, 0], there, lines, dict(zip(there, colours(there))))
    axes[0, 0].margins(x=0.15)
    axes[0, 0].set_xlabel(f"{measured(lines)} accuracy (%)", fontsize=12)
    save(figure, path)


def draw_ways(path: Path, experiment, lines: list[dict]) -> None:
    """By kind of shortcut: accuracies, and by residual block the branch's share of the error and its angle to
    backprop's. The bars' colours are those of the curves."""
    there = [label for label in experiment.cells if select(lines, label)]
    tails = list(dict.fromkeys(label.partition(": ")[2] for label in there))
    shades = dict(zip(tails, colours(tails)))
    kinds = {panel: [label for label in there if label.partition(": ")[0] == panel]
             for panel in panels(experiment)}
    figure, grid = figure_of(len(kinds), 3, size=(15, 1.5 + 0.75 * len(there)),
                             heights=[max(4, len(labels)) for labels in kinds.values()])
    for (left, *others), (panel, labels) in zip(grid, kinds.items()):
        bars(left, labels, lines, shades)
        for label, width in zip(labels, widths(len(labels))):
            cell, shade = select(lines, label), shades[label.partition(": ")[2]]
            for ax, what in zip(others, WAYS):
                seeds = [[nan(value) for value in by_block(line, *what)] for line in cell]
                heights = [statistics.mean(block) for block in zip(*seeds)]
                ax.plot(range(1, len(heights) + 1), heights, "o-", markersize=width + 1.5, color=shade,
                        linewidth=width)
        left.set_title(panel if "shortcut" in panel else f"shortcuts: {panel}", fontsize=12)
        left.set_ylim(0.4 - max(4, len(labels)), 0.6)
        left.set_xlim(0, 1.25 * max(nan(mean_accuracy(select(lines, label))) for label in there))
        for ax in others:
            ax.set(ylim=(-3, 103), xticks=range(1, 9))
            for block in (3, 5, 7):                             # there the shape changes
                ax.axvline(block, color="#CCCCCC", linewidth=1, zorder=0)
        others[1].axhline(90, color="#888888", linewidth=1, linestyle=":")
    grid[0, 1].set_title("share of the error that comes by the branch (%)", fontsize=12)
    grid[0, 2].set_title("angle of the error to backprop's (degrees)", fontsize=12)
    grid[-1, 0].set_xlabel(f"{measured(lines)} accuracy (%)", fontsize=12)
    for ax in grid[-1, 1:]:
        ax.set_xlabel("residual block, from the first up", fontsize=12)
    figure.supxlabel("Where a line is grey, the block changes the shape of the activations.", fontsize=12)
    save(figure, path)


def nan(value: float | None) -> float:
    return math.nan if value is None else value


def axis(columns: list[str]) -> tuple[list[str], list[float], str]:
    """(tick labels, positions, scale): by value if all columns are numbers, in order otherwise."""
    try:
        positions = [float(column) for column in columns]
    except ValueError:
        return columns, [float(i) for i in range(len(columns))], "linear"
    return columns, positions, "log" if max(positions) >= 10 * min(positions) else "linear"


def draw_map(path: Path, experiment, lines: list[dict]) -> None:
    """Heat maps of FA's rank ÷ backprop's: a panel for each quantity, initialisation and rate; seed 0."""
    names, columns, kinds = (panels(experiment), list(experiment.columns),
                             {"error": "error δ", "gradient": "weight gradient"})
    rows = [(panel, kind) for kind in kinds for panel in names]
    figure, grid = figure_of(len(rows), len(columns), size=(2.6 * len(columns) + 1.5, 2 * len(rows)))
    from matplotlib.colors import TwoSlopeNorm
    image = None
    for i, (panel, kind) in enumerate(rows):
        for j, column in enumerate(columns):
            ax = grid[i, j]
            bp, fa = (select(lines, f"{panel}: {label}", column) for label in ("backprop", "FA"))
            ax.set_facecolor("#DDDDDD")
            if bp and fa:
                ratios = [[ratio(f, b) for b, f in zip(effective_ranks(x, kind), effective_ranks(y, kind))]
                          for x, y in zip(bp[0]["rank"], fa[0]["rank"])]
                logs = [[math.nan if r is None else math.log2(r) for r in layers] for layers in zip(*ratios)]
                epochs, depth = len(logs[0]), len(logs)
                image = ax.imshow(logs, cmap="RdBu", norm=TwoSlopeNorm(0, -4, 4), origin="lower",
                                  aspect="auto", extent=(-0.5, epochs - 0.5, 0.5, depth + 0.5))
                ax.set_xlim(-0.5, len(bp[0]["rank"]) - 0.5)
                ax.set_yticks(range(1, depth + 1))
                ax.set_xticks(range(0, len(bp[0]["rank"]), 5))
            title = f"{experiment.axis} {column}\n" * (i == 0)
            if kind == "error":
                title += f"backprop {mean([mean_accuracy(bp)])} %, FA {mean([mean_accuracy(fa)])} %"
            ax.set_title(title, fontsize=11)
            ax.set_ylabel(f"{panel}\n{kinds[kind]}\nlayer" if j == 0 else "", fontsize=12)
            ax.set_xlabel("epoch" if i == len(grid) - 1 else "", fontsize=12)
    if image is not None:
        bar = figure.colorbar(image, ax=grid, shrink=0.5, extend="both")
        bar.set_label("effective rank of FA ÷ of backprop", fontsize=12)
        bar.set_ticks([-4, -2, 0, 2, 4], labels=["1/16", "1/4", "1", "4", "16"])
    save(figure, path)


class View(NamedTuple):
    table: Callable
    draw: Callable


VIEWS = {"epochs": View(table, draw_epochs), "quick": View(quick_table, draw_quick),
         "ways": View(ways_table, draw_ways), "bars": View(table, draw_bars),
         "blocks": View(blocks_table, draw_epochs), "ranks": View(rank_table, draw_recorded),
         "sweep": View(sweep_table, draw_sweep), "map": View(map_table, draw_map)}


# ---- runs side by side -------------------------------------------------------------------------------------

# Arguments that have a column of their own, or are no choice of what is trained.
NOT_COMPARED = ("rule", "epochs", "out", "data", "device_reason", "amp_reason", "rule_digest")


def read_run(folder: Path) -> dict:
    """The run in this folder, with its state: "finished", or why it is not. Raises files.Problem."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
        args, asked = config["args"], int(config["args"]["epochs"])
        run = {"args": {**args, "version": config.get("version")}, "label": name_of(args),
               "chance": chance(config), "measured": measured([config])}
        log = read_log(folder / "log.jsonl")
    except OSError as e:
        raise files.Problem(f"{folder} is no run: {e.filename}: {e.strerror}") from e
    except DAMAGE as e:
        raise files.Problem(f"{path} is damaged ({e})") from e
    done = [line for line in log if not line["diverged"]]
    reached = round(100 * done[-1]["test_accuracy"], 2) if done else None
    state = f"unfinished, epoch {len(done)} of {asked}" if done else "no finished epoch"
    if len(done) < len(log):
        reached, state = None, f"diverged at step {log[-1]['step']}"
    elif len(done) >= asked:
        state = "finished"
    return {**run, "done": done, "reached": reached, "state": state,
            "seconds": round(sum(line["seconds"] for line in log), 1)}


def read_log(path: Path) -> list[dict]:
    """The lines of log.jsonl; none before the first epoch has ended. Raises files.Problem, OSError."""
    log = []
    for number, text in enumerate(path.read_bytes().splitlines() if path.exists() else [], 1):
        try:
            log.append(json.loads(text))
            known = ["epoch", "step", "seconds"]
            known += [] if log[-1]["diverged"] else ["test_accuracy", "train_loss"]
            if not all(math.isfinite(log[-1][key]) for key in known):
                raise ValueError("a number is not finite")
        except DAMAGE as e:
            raise files.Problem(f"{path}, line {number}, is damaged ({e})") from e
    return log


def names(folders: list[Path]) -> list[str]:
    """Of each folder its name, or as much of its path as no other of the folders ends in."""
    paths, found = [Path(os.path.abspath(folder)).parts for folder in folders], []
    for path in paths:
        count = 1
        while any(other != path and other[-count:] == path[-count:] for other in paths):
            count += 1
        found.append(str(Path(*path[-count:])))
    return found


def given(key: str, value: object) -> str:
    """An argument as it is typed; "" where it was not given."""
    if value is None or value is False or value == []:
        return ""
    flag = key if key == "version" else f"--{key.replace('_', '-')}"           # the version is no flag
    return " ".join([flag, *map(str, [] if value is True else value if isinstance(value, list) else [value])])


def side_by_side(folders: list[Path], runs: list[dict]) -> list[list]:
    """A row a run, below their heads: what all runs have, then the arguments that are not the same in all."""
    keys = [key for key in dict.fromkeys(key for run in runs for key in run["args"])
            if key not in NOT_COMPARED and len({given(key, run["args"].get(key)) for run in runs}) > 1]
    images = " or ".join(sorted({run["measured"] for run in runs}, reverse=True))
    rows: list[list] = [["run", "rule", f"{images} accuracy (%)", "state", "epochs", "seconds", *keys]]
    for name, run in zip(names(folders), runs):
        rows.append([name, run["args"]["rule"], run["reached"], run["state"], run["args"]["epochs"],
                     run["seconds"], *map(run["args"].get, keys)])
    return rows


def readable(rows: list[list]) -> str:
    """The rows for people, in columns: state and accuracy in one cell, the arguments as they are typed."""
    (_, _, accuracy, _, _, _, *keys), *rows = rows
    table = [["run", "rule", accuracy, "epochs", "time", "what differs"]]
    for name, rule, reached, state, asked, seconds, *values in rows:
        cell = [] if state == "finished" else [state]
        cell += [] if reached is None else [f"{reached:.1f}"]
        differs = ", ".join(filter(None, map(given, keys, values))) or "–"
        table.append([name, rule, ": ".join(cell), str(asked), span(seconds), differs])
    sizes = [max(map(len, column)) for column in zip(*table)][:-1] + [0]
    head, *body = [[text.ljust(size) for text, size in zip(row, sizes)] for row in table]
    return markdown(head, body)


def write_csv(path: Path, rows: list[list]) -> None:
    table = io.StringIO(newline="")
    csv.writer(table).writerows(rows)
    files.write(path, lambda partial: partial.write_text(table.getvalue(), encoding="utf-8", newline=""))


def draw_side_by_side(path: Path, rows: list[list], runs: list[dict]) -> None:
    """Left accuracy, right training loss by epoch: a run in one colour, and below them its name."""
    from matplotlib.ticker import MaxNLocator
    texts = []
    for name, _, _, state, *_ in rows[1:]:
        short = name if len(name) <= 100 else f"{name[:50]}…{name[-49:]}"
        texts.append(short + f" ({state})" * (state != "finished"))
    columns = max(1, min(4, 140 // (max(map(len, texts)) + 6)))
    figure, axes = figure_of(1, 2, size=(11, 4.2 + 0.2 * math.ceil(len(texts) / columns)))
    left, right = axes[0]
    shades = colours([run["label"] for run in runs])
    for run, shade, width in zip(runs, shades, widths(len(runs))):
        epochs = [line["epoch"] for line in run["done"]]
        style = {"color": shade, "marker": "o", "markersize": width + 1.5, "linewidth": width}
        left.plot(epochs, [100 * line["test_accuracy"] for line in run["done"]], **style)
        right.plot(epochs, [line["train_loss"] for line in run["done"]], **style)
    level = min(run["chance"] for run in runs)
    if level == max(run["chance"] for run in runs) > 0:
        left.axhline(level, color="#999999", linewidth=1, linestyle=":", label="chance")
        left.legend(frameon=False)
    left.set(xlabel="epoch", ylabel=rows[0][2], ylim=(0, 1.04 * left.get_ylim()[1]))
    loss_axis(right)
    for ax in axes[0]:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    legend = figure.legend(right.lines, map(str, range(len(texts))), loc="outside lower center",
                           ncols=columns, frameon=False, fontsize=9)
    for entry, text in zip(legend.get_texts(), texts):          # a folder's name may begin with _ or hold a $
        entry.set(text=text, parse_math=False)
    save(figure, path)


def main(argv: list[str] | None = None) -> int:
    """From the command line to the exit status."""
    from harness import flags                                   # session imports this file
    p = flags.Parser(prog="report", description="Compare runs of train.py, finished or not.")
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the folder of a run")
    p.add_argument("--out", type=Path, metavar="FILE", default=Path("compare.png"),
                   help="the picture: accuracy and loss by epoch (default: compare.png)")
    p.add_argument("--csv", type=Path, metavar="FILE",
                   help="the table as a file, a column for each argument that differs (default: none)")
    args = p.parse_args(argv)
    if args.csv and os.path.abspath(args.csv) == os.path.abspath(args.out):
        p.error("--csv and --out name the same file")
    what: object = "the table"
    try:
        runs = [read_run(folder) for folder in args.runs]
        rows = side_by_side(args.runs, runs)
        print(readable(rows) + "\n", flush=True)
        if args.csv:
            what = args.csv
            write_csv(args.csv, rows)
        what = args.out
        draw_side_by_side(args.out, rows, runs)
        print(args.out, flush=True)
    except BrokenPipeError:
        return flags.unread()
    except files.Problem as e:
        p.error(str(e))
    except (OSError, ValueError, ImportError) as e:             # a format, no name, no matplotlib
        p.error(f"cannot write {what}: {e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
