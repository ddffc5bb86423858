"""Makes the tables of results: Markdown, as results/README.md holds them.

A result is a line of results/NAME.jsonl as experiment.py writes it, with the label of its row and column
beside it. Accuracies are those of the last epoch, in %, mean ± standard deviation over seeds. Nothing here
knows how the results were made.
"""
from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable

RULES = {"bp": "backprop", "fa": "FA", "dfa": "DFA", "sign": "sign-symmetry", "kp": "Kolen–Pollack",
         "frozen": "frozen features"}


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
SHOWN = HEADLINE | {f"{rule}{BEYOND}" for rule in ("backprop", "FA")}


def headline(experiment, lines: list[dict], full, whole: list[dict],
             noted: Callable[[str, list[dict]], str] = lambda text, lines: text) -> str:
    """The paper's table beside ours, by repair, and what goes beyond it.

    full    the experiment at the paper's scale
    whole   its results so far
    noted   adds to a text what else a reader has to know of the lines that are shown
    """
    lines, whole = ([line for line in each if line["label"] in SHOWN] for each in (lines, whole))
    scales = [lines, whole] if experiment is not full and whole else [lines]
    head = ["test accuracy (%)", "backprop", "FA", "FA at full scale", "FA at full scale, the paper"]
    rows = []
    for repair in [*REPAIRS, BEYOND] if select(lines, f"FA{BEYOND}") else REPAIRS:
        ours = [accuracy(select(lines, f"backprop{repair}"))]
        ours += [accuracy(select(at_scale, f"FA{repair}")) for at_scale in scales]
        rows.append([repair[3:] or "neither", *ours, full.paper.get(f"FA{repair}", "–")])
    note = noted(f"{experiment.scale} {seeds(lines)}; frozen features reach "
                 f"{accuracy(select(lines, 'frozen features'))}.", lines)
    if len(scales) > 1:
        devices = ", ".join(dict.fromkeys(line["device"] for line in whole))
        note += f" Full scale: {full.scale.rstrip('.')}, on {devices}. {seeds(whole)}."
    elif experiment is not full:
        note += f" The full scale ({full.scale.rstrip('.')}) has not been measured here yet."
    return f"{markdown(head[:2 + len(scales)] + head[4:], rows)}\n\n{note}"


def seeds(lines: list[dict]) -> str:
    """How many the rows have that were measured."""
    counts = sorted(Counter(line["label"] for line in lines).values())
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
        arrives = [seed for seed in ranks if any(seed)]
        silent = len(ranks) - len(arrives)
        some = f" ({silent} of {len(ranks)}: no error)" if silent else ""
        cells.append(f"{by_layer(arrives)}{some} | {by_layer(angles)}" if arrives or not ranks
                     else "no error | –")
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


def panels(experiment) -> list[str]:
    """The parts of the labels before a colon, in order; [""] where there are none."""
    return list(dict.fromkeys(label.rpartition(": ")[0] for label in experiment.cells))


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
