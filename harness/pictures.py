"""Draws the pictures of runs and of experiments, and saves what the lessons draw.

In curves one colour stands for one thing in every picture: `colour(label)`. No curve can hide another:
where two coincide, the later one is thinner, and the earlier one shows as its rim.
"""
from __future__ import annotations

import math
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness import files, recorder, tables

os.environ["MPLBACKEND"] = "Agg"     # before matplotlib is imported: the backend of a notebook may stop that

# Okabe & Ito 2008 for what the paper compares, Tol 2021 for the rest: both are safe for the colour-blind.
COLOURS = {"backprop": "#888888", "backprop + Muon": "#CC79A7", "backprop + norm": "#000000",
           "backprop + Muon + norm": "#009E73", "frozen features": "#999933",
           "FA": "#D55E00", "FA + Muon": "#E69F00", "FA + norm": "#56B4E9", "FA + Muon + norm": "#0072B2",
           "FA + Muon + norm, no weights in shortcuts": "#661188",
           "backprop + Muon + norm, no weights in shortcuts": "#66BB44",
           "FA + Muon + norm, no weights in shortcuts, first convolutions fixed": "#884422",
           "DFA": "#882255", "sign-symmetry": "#44AA99", "Kolen–Pollack": "#332288",
           "FA + Muon + norm, no weights in shortcuts, Muon decay 0.05": "#CC6677", "B × 3": "#AA4499"}
OTHERS = ("#7F5539", "#BB5566", "#004488", "#997700", "#AA3377", "#5A7D2A", "#6C4AB6")      # what a user adds


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
    layers = list(zip(*[tables.effective_ranks(record, "error") for record in ranks]))
    named = names[::-1 - len(names) // 8]                       # the deepest and some others, 8 at most
    epochs = [record["epoch"] for record in ranks]
    for i, (name, layer, width) in enumerate(zip(names, layers, widths(len(names))), 1):
        ax.plot(epochs, [nan(rank) for rank in layer], "o-", linewidth=width, markersize=width + 1.5,
                color=colormaps["Blues"](0.25 + 0.75 * i / len(names)), label=name if name in named else None)
    ax.set(xlabel="epoch", ylabel="effective rank of the error δ", ylim=(0, 1.04 * ax.get_ylim()[1]))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


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
        for line in tables.select(lines, label):
            ranks = tables.effective_ranks(line["rank"][-1], "error")
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
    """Test accuracy by epoch, one colour a cell, a line a seed, named at its end; × where it diverged."""
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import MaxNLocator
    ends, there = [], [label for label in experiment.cells if tables.select(lines, label)]
    low = min(tables.chance(line) for line in lines)
    name: dict[str, Any] = dict(textcoords="offset points", va="center", fontsize=11, annotation_clip=False,
                                path_effects=[withStroke(linewidth=3, foreground="white")])
    for label, width in zip(there, widths(len(there))):
        cell = tables.select(lines, label)
        for line in cell:
            epochs = [e for e in line["epochs"] if e["test_accuracy"] is not None]
            axes.plot([e["epoch"] for e in epochs], [100 * e["test_accuracy"] for e in epochs], "o-",
                      markersize=width + 0.5, color=colour(label), linewidth=width)
            if line["diverged"]:
                axes.plot(line["epochs"][-1]["epoch"], low, "x", markersize=9, color=colour(label))
        last, height = max(line["epochs"][-1]["epoch"] for line in cell), tables.mean_accuracy(cell)
        if height is None:
            axes.annotate(f"{label}: diverged", (last, low), xytext=(8, 0), color=colour(label), **name)
        else:
            ends.append([height, last, label])
    top = max((height for height, *_ in ends), default=low)
    places, placed = [], -1e9
    for height, *_ in sorted(ends):                             # names apart from each other
        placed = max(height, placed + 0.055 * (top - low))
        places.append(placed)
    for (_, last, label), place in zip(sorted(ends), places):
        axes.annotate(label, (last, place - (places[-1] - top) / 2), xytext=(6, 0), color=colour(label),
                      **name)
    axes.axhline(low, color="#999999", linewidth=1, linestyle=":")
    axes.annotate("chance", (0.7 * max(line["epochs"][-1]["epoch"] for line in lines), low), xytext=(0, 7),
                  textcoords="offset points", color="#666666")
    axes.set(xlabel="epoch", ylabel=f"{tables.measured(lines)} accuracy (%)",
             ylim=(0, None), xlim=(0.7, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def draw_recorded(path: Path, experiment, lines: list[dict]) -> None:
    draw_ranks(path, [(line["label"], line["rank"]) for line in lines if line["seed"] == 0])


def draw_sweep(path: Path, experiment, lines: list[dict]) -> None:
    """Accuracy against the columns, a panel for each kind of network; below it the rank of the error."""
    recorded = all("rank" in line for line in lines)
    names = tables.panels(experiment)
    figure, grid = figure_of(1 + recorded, len(names), sharey="row",
                             size=(max(7.5, 2 + 4 * len(names)), 4 + 3 * recorded))
    ticks, positions, scale = axis(list(experiment.columns))
    # Columns that are numbers come first; the others have no order, so no line leads from one to the next.
    numbers = sum(column.replace(".", "").isdecimal() for column in experiment.columns)
    floor = min(tables.chance(line) for line in lines)
    for j, panel in enumerate(names):
        labels = [label for label in experiment.cells if label.rpartition(": ")[0] == panel]
        for label, width in zip(labels, widths(len(labels))):
            style = {"marker": "o", "markersize": width + 1.5, "linewidth": width, "color": colour(label),
                     "label": label.rpartition(": ")[2]}
            cells = [tables.select(lines, label, column) for column in experiment.columns]
            heights = [nan(tables.mean_accuracy(cell)) for cell in cells]
            grid[0, j].plot(positions[:numbers], heights[:numbers], **style)
            if numbers < len(positions):
                style |= {"linestyle": "none", "markersize": 7, "label": None if numbers else style["label"]}
                grid[0, j].plot(positions[numbers:], heights[numbers:], **style)
            lost = [x for x, cell in zip(positions, cells) if cell and not tables.accuracies(cell)]
            grid[0, j].plot(lost, [floor] * len(lost), "x", markersize=9, color=colour(label))
            for x in lost:
                grid[0, j].annotate("diverged", (x, floor), xytext=(0, 7), textcoords="offset points",
                                    ha="center", fontsize=10, color=colour(label))
            if recorded:
                ranks: list = [[tables.hidden_error_rank(line) for line in cell] for cell in cells]
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
    grid[0, 0].set_ylabel(f"{tables.measured(lines)} accuracy (%)")
    if recorded:
        grid[1, 0].set_ylabel("effective rank of the error δ,\nmean of the layers")
    handles = {label: line for ax in grid[0] for line, label in zip(*ax.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False)
    save(figure, path)


def bars(ax, labels: list[str], lines: list[dict], shades: dict[str, str]) -> None:
    """The accuracy of each row, from the top down, each by its name without the panel's."""
    names = [label.rpartition(": ")[2] for label in labels]
    for i, (label, name) in enumerate(zip(labels, names)):
        cell = tables.select(lines, label)
        ax.barh(-i, nan(tables.mean_accuracy(cell)), color=shades[name])
        ax.text(tables.mean_accuracy(cell) or 0, -i, f" {tables.accuracy(cell)}", va="center", fontsize=11)
    ax.set_yticks(range(0, -len(labels), -1), names, fontsize=12)


def draw_bars(path: Path, experiment, lines: list[dict]) -> None:
    there = [label for label in experiment.cells if tables.select(lines, label)]
    figure, axes = figure_of(1, 1, size=(7.5, 1.5 + 0.4 * len(there)))
    kinds = ["backprop" if label.startswith("backprop") else "FA + Muon + norm" for label in there]
    bars(axes[0, 0], there, lines, dict(zip(there, map(colour, kinds))))
    axes[0, 0].margins(x=0.15)
    axes[0, 0].set_xlabel(f"{tables.measured(lines)} accuracy (%)", fontsize=12)
    save(figure, path)


def draw_ways(path: Path, experiment, lines: list[dict]) -> None:
    """By kind of shortcut: accuracies, and by residual block the branch's share of the error and its angle to
    backprop's. The bars' colours are those of the curves."""
    there = [label for label in experiment.cells if tables.select(lines, label)]
    tails = list(dict.fromkeys(label.partition(": ")[2] for label in there))
    shades = dict(zip(tails, colours(tails)))
    kinds = {panel: [label for label in there if label.partition(": ")[0] == panel]
             for panel in tables.panels(experiment)}
    figure, grid = figure_of(len(kinds), 3, size=(15, 1.5 + 0.75 * len(there)),
                             heights=[max(4, len(labels)) for labels in kinds.values()])
    for (left, *others), (panel, labels) in zip(grid, kinds.items()):
        bars(left, labels, lines, shades)
        for label, width in zip(labels, widths(len(labels))):
            cell, shade = tables.select(lines, label), shades[label.partition(": ")[2]]
            for ax, what in zip(others, tables.WAYS):
                seeds = [tables.by_block(line, *what) for line in cell]
                heights = [statistics.mean([value for value in block if value is not None] or [math.nan])
                           for block in zip(*seeds)]
                ax.plot(range(1, len(heights) + 1), heights, "o-", markersize=width + 1.5, color=shade,
                        linewidth=width)
        left.set_title(panel if "shortcut" in panel else f"shortcuts: {panel}", fontsize=12)
        left.set_ylim(0.4 - max(4, len(labels)), 0.6)
        best = max(nan(tables.mean_accuracy(tables.select(lines, label))) for label in there)
        left.set_xlim(0, 1.25 * best)
        for ax in others:
            ax.set(ylim=(-3, 103), xticks=range(1, 9))
            for block in (3, 5, 7):                             # there the shape changes
                ax.axvline(block, color="#CCCCCC", linewidth=1, zorder=0)
        others[1].axhline(90, color="#888888", linewidth=1, linestyle=":")
    grid[0, 1].set_title("share of the error that comes by the branch (%)", fontsize=12)
    grid[0, 2].set_title("angle of the error to backprop's (degrees)", fontsize=12)
    grid[-1, 0].set_xlabel(f"{tables.measured(lines)} accuracy (%)", fontsize=12)
    for ax in grid[-1, 1:]:
        ax.set_xlabel("residual block, from the first up", fontsize=12)
    figure.supxlabel("A curve has the colour of its bar. A thin vertical line marks a block that changes the "
                     "shape of the activations.", fontsize=12)
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
    names, columns, kinds = (tables.panels(experiment), list(experiment.columns),
                             {"error": "error δ", "gradient": "weight gradient"})
    rows = [(panel, kind) for kind in kinds for panel in names]
    figure, grid = figure_of(len(rows), len(columns), size=(2.6 * len(columns) + 1.5, 2 * len(rows)))
    from matplotlib.colors import TwoSlopeNorm
    image = None
    for i, (panel, kind) in enumerate(rows):
        for j, column in enumerate(columns):
            ax = grid[i, j]
            bp, fa = (tables.select(lines, f"{panel}: {label}", column) for label in ("backprop", "FA"))
            ax.set_facecolor("#DDDDDD")
            if bp and fa:
                both = [[tables.effective_ranks(record, kind) for record in records]
                        for records in zip(bp[0]["rank"], fa[0]["rank"])]
                ratios = [[tables.ratio(f, b) for b, f in zip(*ranks)] for ranks in both]
                logs = [[math.nan if r is None else math.log2(r) for r in layers] for layers in zip(*ratios)]
                epochs, depth = len(logs[0]), len(logs)
                image = ax.imshow(logs, cmap="RdBu", norm=TwoSlopeNorm(0, -4, 4), origin="lower",
                                  aspect="auto", extent=(-0.5, epochs - 0.5, 0.5, depth + 0.5))
                ax.set_xlim(-0.5, len(bp[0]["rank"]) - 0.5)
                ax.set_yticks(range(1, depth + 1))
                ax.set_xticks(range(0, len(bp[0]["rank"]), 5))
            title = f"{experiment.axis} {column}\n" * (i == 0)
            if kind == "error":
                reached = [tables.mean([tables.mean_accuracy(runs)]) for runs in (bp, fa)]
                title += f"backprop {reached[0]} %, FA {reached[1]} %"
            ax.set_title(title, fontsize=11)
            ax.set_ylabel(f"{panel}\n{kinds[kind]}\nlayer" if j == 0 else "", fontsize=12)
            ax.set_xlabel("epoch" if i == len(grid) - 1 else "", fontsize=12)
    if image is not None:
        bar = figure.colorbar(image, ax=grid, shrink=0.5, extend="both")
        bar.set_label("effective rank of FA ÷ of backprop", fontsize=12)
        bar.set_ticks([-4, -2, 0, 2, 4], labels=["1/16", "1/4", "1", "4", "16"])
    save(figure, path)
