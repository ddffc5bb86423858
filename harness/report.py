"""Says which table and which picture each kind of experiment has, and compares runs.

    python -m harness.report RUN [RUN ...]      # run folders side by side: a table, and compare.png
"""
from __future__ import annotations

import csv
import io
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from harness import files, pictures, rulefile, tables


class View(NamedTuple):
    table: Callable
    draw: Callable


VIEWS = {"epochs": View(tables.table, pictures.draw_epochs),
         "quick": View(tables.quick_table, pictures.draw_quick),
         "ways": View(tables.ways_table, pictures.draw_ways),
         "bars": View(tables.table, pictures.draw_bars),
         "blocks": View(tables.blocks_table, pictures.draw_epochs),
         "ranks": View(tables.rank_table, pictures.draw_recorded),
         "sweep": View(tables.sweep_table, pictures.draw_sweep),
         "map": View(tables.map_table, pictures.draw_map)}


DAMAGE = (LookupError, TypeError, ValueError, ArithmeticError, RecursionError)      # JSON, but not a run's


# ---- runs side by side -------------------------------------------------------------------------------------

# Arguments that have a column of their own, or are no choice of what is trained.
NOT_COMPARED = ("rule", "epochs", "out", "data", "device_reason", "amp_reason", "rule_digest")


def name_of(args: dict) -> str:
    """What the tables call a run with these arguments."""
    parts = [tables.RULES.get(args["rule"], rulefile.name(args["rule"]))]
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


def read_run(folder: Path) -> dict:
    """The run in this folder, with its state: "finished", or why it is not. Raises files.Problem."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
        args, asked = config["args"], int(config["args"]["epochs"])
        run = {"args": {**args, "version": config.get("version")}, "label": name_of(args),
               "chance": tables.chance(config), "measured": tables.measured([config])}
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
        table.append([name, rule, ": ".join(cell), str(asked), tables.span(seconds), differs])
    sizes = [max(map(len, column)) for column in zip(*table)][:-1] + [0]
    head, *body = [[text.ljust(size) for text, size in zip(row, sizes)] for row in table]
    return tables.markdown(head, body)


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
    figure, axes = pictures.figure_of(1, 2, size=(11, 4.2 + 0.2 * math.ceil(len(texts) / columns)))
    left, right = axes[0]
    shades = pictures.colours([run["label"] for run in runs])
    for run, shade, width in zip(runs, shades, pictures.widths(len(runs))):
        epochs = [line["epoch"] for line in run["done"]]
        style = {"color": shade, "marker": "o", "markersize": width + 1.5, "linewidth": width}
        left.plot(epochs, [100 * line["test_accuracy"] for line in run["done"]], **style)
        right.plot(epochs, [line["train_loss"] for line in run["done"]], **style)
    level = min(run["chance"] for run in runs)
    if level == max(run["chance"] for run in runs) > 0:
        left.axhline(level, color="#999999", linewidth=1, linestyle=":", label="chance")
        left.legend(frameon=False)
    left.set(xlabel="epoch", ylabel=rows[0][2], ylim=(0, 1.04 * left.get_ylim()[1]))
    pictures.loss_axis(right)
    for ax in axes[0]:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    legend = figure.legend(right.lines, map(str, range(len(texts))), loc="outside lower center",
                           ncols=columns, frameon=False, fontsize=9)
    for entry, text in zip(legend.get_texts(), texts):          # a folder's name may begin with _ or hold a $
        entry.set(text=text, parse_math=False)
    pictures.save(figure, path)


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
