"""How results are shown: one table and one picture for each kind of experiment.

A result is a line of results/NAME.jsonl as reproduce.py writes it, with the label of its row and column beside it. Tables are
Markdown, as the README holds them; accuracies are those of the last epoch, in %, mean ± standard deviation over seeds. Every
function here takes an experiment (see reproduce.Experiment) and its lines, and knows nothing of how they were made.
"""
from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import rank
import runs

COLOURS = {"backprop": "#888888", "backprop + norm": "#000000", "backprop + Muon": "#CC79A7",
           "backprop + Muon + norm": "#009E73", "frozen features": "#999933", "FA": "#D55E00", "FA + Muon": "#E69F00",
           "FA + norm": "#56B4E9", "FA + Muon + norm": "#0072B2",
           "DFA": "#E69F00", "sign-symmetry": "#009E73", "Kolen–Pollack": "#0072B2",
           "B × 3": "#D55E00", "orthogonal B": "#009E73", "B × 3, orthogonal": "#000000", "Muon decay 0.05": "#E69F00",
           "B × 3, Muon decay 0.05": "#CC79A7"}                            # Okabe & Ito 2008: safe for the colour-blind
OTHERS = ("#AA4499", "#882255", "#117733", "#661100", "#44AA99")          # Tol 2021, for the rows that a user adds


# ---- numbers ---------------------------------------------------------------------------------------------------

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
    """Effective rank of the error δ after training, the mean of all layers but the classifier."""
    known = [r for r in effective_ranks(line["rank"][-1], "error") if r is not None]
    return statistics.mean(known) if known and not line["diverged"] else None


def mean(values: list[float | None], digits: int = 0) -> str:
    known = [v for v in values if v is not None]
    return f"{statistics.mean(known):.{digits}f}" if known else "–"


# ---- tables ----------------------------------------------------------------------------------------------------

def markdown(head: list[str], rows: list[list]) -> str:
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows])


def table(experiment, lines: list[dict]) -> str:
    """A row a cell: accuracy, n, the paper's value and the difference to it where it gives one."""
    rows = []
    for label in experiment.cells:
        cell = select(lines, label)
        paper, ours = experiment.paper.get(label), mean_accuracy(cell)
        difference = f"{ours - paper:+.1f}" if paper is not None and ours is not None else ""
        rows.append([label, accuracy(cell), len(cell), *[paper or "–", difference] * bool(experiment.paper)])
    return markdown(["", f"{measured(lines)} accuracy (%)", "n", *["the paper", "difference"] * bool(experiment.paper)], rows)


def rank_table(experiment, lines: list[dict]) -> str:
    """The table, and after the last epoch, by layer from the stem up to the last before the classifier: effective ranks of the
    error, gradient and update; that of the network's trajectory; mean |cos| between the activations of different images at the
    layer's output; degrees between the gradient and backprop's.
    """
    head, rule, *rows = table(experiment, lines).splitlines()
    result = [head + " error δ | gradient | update | trajectory | cosine | angle |", rule + " --- |" * 6]
    for label, row in zip(experiment.cells, rows):
        finals = [line["rank"][-1] for line in select(lines, label)]
        layers = [list(final["layers"].values()) for final in finals]
        texts = [by_layer([effective_ranks(final, kind) for final in finals]) for kind in ("error", "gradient", "update")]
        texts.append(mean([trajectory_rank(final) for final in finals]))
        texts.append(by_layer([[layer["cosine"] for layer in each[1:]] for each in layers], digits=2))
        texts.append(by_layer([[layer["angle_gradient"] for layer in each[:-1]] for each in layers]))
        result.append(row + "".join(f" {text} |" for text in texts))
    return "\n".join(result)


def quick_table(experiment, lines: list[dict]) -> str:
    """The table, and the effective ranks of the error after the last epoch, by layer from the stem up."""
    head, rule, *rows = table(experiment, lines).splitlines()
    ranks = [by_layer([effective_ranks(line["rank"][-1], "error") for line in select(lines, label)])
             for label in experiment.cells]
    return "\n".join([head + " rank of the error δ |", rule + " --- |", *[f"{row} {text} |" for row, text in zip(rows, ranks)]])


def by_layer(seeds: list[list[float | None]], digits: int = 0) -> str:
    """Each layer's mean over the seeds."""
    return ", ".join(mean(list(layer), digits) for layer in zip(*seeds)) or "–"


def sweep_table(experiment, lines: list[dict]) -> str:
    """A row a cell, a column a value: accuracy, and after a semicolon the mean rank of the error where it was recorded."""
    def cell(label: str, column: str) -> str:
        found = select(lines, label, column)
        recorded = [hidden_error_rank(line) for line in found if "rank" in line]
        return accuracy(found) + (f"; {mean(recorded)}" if recorded else "")

    rows = [[label, *[cell(label, column) for column in experiment.columns]] for label in experiment.cells]
    return markdown([experiment.axis, *experiment.columns], rows)


def map_table(experiment, lines: list[dict]) -> str:
    """A row for each initialisation and learning rate: accuracies, and by layer FA's rank ÷ backprop's, of seed 0."""
    rows = []
    for panel in panels(experiment):
        for column in experiment.columns:
            bp, fa = (select(lines, f"{panel}: {label}", column) for label in ("backprop", "FA"))
            finals: list = [x[0]["rank"][-1] if x and not x[0]["diverged"] else None for x in (bp, fa)]
            texts = ["–"] * 3
            if None not in finals:
                texts = [", ".join(mean([ratio(f, b)], 2) for b, f in zip(*(effective_ranks(x, kind) for x in finals)))
                         for kind in ("error", "gradient")]
                texts.append(mean([ratio(trajectory_rank(finals[1]), trajectory_rank(finals[0]))], 2))
            rows.append([panel, column, accuracy(bp), accuracy(fa), *texts])
    return markdown(["initialisation", experiment.axis, "backprop (%)", "FA (%)", "error δ", "gradient", "trajectory"], rows)


def ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


# ---- pictures --------------------------------------------------------------------------------------------------

def panels(experiment) -> list[str]:
    """The parts of the labels before a colon, in order; [""] where there are none."""
    return list(dict.fromkeys(label.rpartition(": ")[0] for label in experiment.cells))


def colour(label: str) -> str:
    """Of a row by its name; rows that nobody foresaw, such as a rule of your own, take what is left, by their text."""
    name = label.rpartition(": ")[2]
    return COLOURS.get(name) or OTHERS[sum(name.encode()) % len(OTHERS)]


def figure_of(*shape: int, size: tuple[float, float], sharey: str = "none"):
    """(figure, axes as an array of that shape): no display needed, no frame around the axes."""
    os.environ["MPLBACKEND"] = "Agg"                            # a notebook's backend may stop the import
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(*shape, figsize=size, layout="constrained", squeeze=False, sharey=sharey)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure, path: Path) -> None:
    from matplotlib import pyplot as plt
    runs.write(path, lambda partial: figure.savefig(partial, dpi=130, format="png"))
    plt.close(figure)


def draw_epochs(path: Path, experiment, lines: list[dict]) -> None:
    figure, axes = figure_of(1, 1, size=(7.5, 4))
    accuracy_by_epoch(axes[0, 0], experiment, lines)
    save(figure, path)


def draw_quick(path: Path, experiment, lines: list[dict]) -> None:
    """Left the accuracy by epoch, right the rank of the error by layer: the failure, and what the error looks like then."""
    figure, axes = figure_of(1, 2, size=(11, 4))
    accuracy_by_epoch(axes[0, 0], experiment, lines)
    right = axes[0, 1]
    for label in experiment.cells:
        for line in select(lines, label):
            ranks = effective_ranks(line["rank"][-1], "error")
            depth = range(1, len(ranks) + 1)
            right.plot(depth, [math.nan if r is None else r for r in ranks], "o-", color=colour(label), linewidth=2)
    right.set(title="rank of the error δ after training", xlabel="layer, from the stem up", ylim=(0, None), xticks=list(depth),
              ylabel=f"effective rank (at most {next(iter(lines[0]['rank'][-1]['layers'].values()))['error']['ceiling']})")
    axes[0, 0].set(title="accuracy")
    save(figure, path)


def accuracy_by_epoch(axes, experiment, lines: list[dict]) -> None:
    """Test accuracy by epoch, one colour a cell, a line a seed, each named at its end."""
    from matplotlib.ticker import MaxNLocator
    ends = []
    for label in experiment.cells:
        cell = select(lines, label)
        for line in cell:
            epochs = [e for e in line["epochs"] if e["test_accuracy"] is not None]
            axes.plot([e["epoch"] for e in epochs], [100 * e["test_accuracy"] for e in epochs], "o-", markersize=3,
                      color=colour(label), linewidth=2)
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
        axes.annotate(label, (last, place - (places[-1] - top) / 2), xytext=(6, 0), textcoords="offset points", va="center",
                      color=colour(label), fontsize=11, annotation_clip=False)
    axes.axhline(low, color="#999999", linewidth=1, linestyle=":")
    axes.annotate("chance", (0.7 * max(last for _, last, _ in ends), low), xytext=(0, 7), textcoords="offset points",
                  color="#666666")
    axes.set(xlabel="epoch", ylabel=f"{measured(lines)} accuracy (%)", ylim=(0, None), xlim=(0.7, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def draw_ranks(path: Path, experiment, lines: list[dict]) -> None:
    first = [(line["label"], line["rank"]) for line in lines if line["seed"] == 0]
    runs.write(path, lambda partial: rank.draw(partial, first, [colour(label) for label, _ in first], "png"))


def draw_sweep(path: Path, experiment, lines: list[dict]) -> None:
    """Accuracy against the columns, a panel for each kind of network; below it the rank of the error, where recorded."""
    recorded = all("rank" in line for line in lines)
    names = panels(experiment)
    figure, grid = figure_of(1 + recorded, len(names), sharey="row",
                             size=(max(7.5, 2 + 4 * len(names)), 4 + 3 * recorded))
    ticks, positions, scale = axis(list(experiment.columns))
    for j, panel in enumerate(names):
        for label in [label for label in experiment.cells if label.rpartition(": ")[0] == panel]:
            style = {"marker": "o", "markersize": 4, "linewidth": 2, "color": colour(label), "label": label.rpartition(": ")[2]}
            cells = [select(lines, label, column) for column in experiment.columns]
            grid[0, j].plot(positions, [nan(mean_accuracy(cell)) for cell in cells], **style)
            if recorded:
                ranks: list = [[hidden_error_rank(line) for line in cell] for cell in cells]
                grid[1, j].plot(positions, [statistics.mean(r) if r and None not in r else math.nan for r in ranks], **style)
        grid[0, j].axhline(min(chance(line) for line in lines), color="#999999", linewidth=1, linestyle=":")
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


def nan(value: float | None) -> float:
    return math.nan if value is None else value


def axis(columns: list[str]) -> tuple[list[str], list[float], str]:
    """(tick labels, positions, scale): numeric if all columns are numbers, logarithmic if they span much; else in order."""
    try:
        positions = [float(column) for column in columns]
    except ValueError:
        return columns, [float(i) for i in range(len(columns))], "linear"
    return columns, positions, "log" if max(positions) >= 10 * min(positions) else "linear"


def draw_map(path: Path, experiment, lines: list[dict]) -> None:
    """Heat maps of FA's rank ÷ backprop's: a panel for each quantity, initialisation and rate; seed 0."""
    names, columns, kinds = panels(experiment), list(experiment.columns), {"error": "error δ", "gradient": "weight gradient"}
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


VIEWS = {"epochs": View(table, draw_epochs), "quick": View(quick_table, draw_quick), "ranks": View(rank_table, draw_ranks),
         "sweep": View(sweep_table, draw_sweep), "map": View(map_table, draw_map)}
