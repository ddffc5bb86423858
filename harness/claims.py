"""The command line of reproduce.py, and the tables that it rewrites in two READMEs.

Nothing here knows which experiments there are: reproduce.py lists them, and hands them over as `Claims`.
"""
from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from harness import experiment as experiments
from harness import files, flags, pictures, report, tables
from harness.experiment import Experiment


class Claims(NamedTuple):
    experiments: dict[str, Experiment]
    headline: list[str]         # of them, those of the paper's headline table, the largest scale first
    results: Path               # the folder of NAME.jsonl
    readmes: list[Path]


# ---- the READMEs -------------------------------------------------------------------------------------------

def contents(claims: Claims, folder: Path) -> dict[str, str]:
    """What stands between the READMEs' marks, by name, from the results in this folder."""
    found = {name: experiments.results(experiment, folder / f"{name}.jsonl")
             for name, experiment in claims.experiments.items()
             if folder == claims.results or (folder / f"{name}.jsonl").exists()}
    content = {name: experiments.table(claims.experiments[name], lines) for name, lines in found.items()}
    for name in claims.headline:
        experiment, lines = claims.experiments[name], found.get(name, [])
        if {line["label"] for line in lines} >= experiment.cells.keys() & tables.HEADLINE:
            full = claims.headline[0]
            content["headline"] = tables.headline(experiment, lines, claims.experiments[full],
                                                  found.get(full, []), partial(experiments.noted, gap=" "))
            break
    return content


def outdated(claims: Claims, folder: Path) -> dict[Path, str]:
    """The READMEs whose tables are not what the results in this folder say, and what they should be."""
    content, wrong = contents(claims, folder), {}
    for path in claims.readmes:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if experiments.written(text, content) != text:
            wrong[path] = experiments.written(text, content)
    return wrong


def check(claims: Claims, folder: Path) -> int:
    """Print whether the READMEs say what the results in this folder say. Returns the exit status."""
    if not any(folder.glob("*.jsonl")):
        raise files.Problem(f"{folder} holds no results to compare with; name a folder that --out was given")
    wrong = outdated(claims, folder)
    for path in wrong:
        print(f"{path} differs from {folder.name}/: run the experiment again, which writes the table anew")
    if not wrong:
        print(f"README.md and results/README.md say what {folder.name}/ says")
    return 1 if wrong else 0


def overview(claims: Claims, folder: Path) -> str:
    """Each experiment with its claim, its number of runs, and the hours that results here say they take."""
    parts: list[str] = []
    for name, experiment in claims.experiments.items():
        lines = experiments.results(experiment, folder / f"{name}.jsonl")
        machines = dict.fromkeys(line["device"] for line in lines)
        runs = len(experiment.cells) * len(experiment.columns) * experiment.seeds
        hours = sum(line["seconds"] for line in lines) / max(1, len(lines)) * runs / 3600
        took = f"{hours:.2f} hours on {' and '.join(machines)}" if lines else "not measured yet"
        text = f"{experiment.claim} {experiment.scale}"
        parts += [f"{name}: {runs} runs, {took}", textwrap.indent(textwrap.fill(text, 90), "    ")]
    return "\n".join(parts) + f"\n\nHours: of one run after another, by {folder.name}/."


# ---- command line ------------------------------------------------------------------------------------------

def parse(argv: list[str] | None, names: Iterable[str]) -> argparse.Namespace:
    """The command line of reproduce.py. Raises SystemExit with a line that says what is wrong."""
    p = flags.Parser(prog="reproduce.py", description="Run what is missing of an experiment.",
                     epilog="python reproduce.py --list says which experiments there are.")
    p.add_argument("name", nargs="?", choices=names, metavar="NAME",
                   help="the experiment, such as quick")
    p.add_argument("--list", action="store_true", help="list the experiments: claim, number of runs, hours")
    p.add_argument("--check", action="store_true",
                   help="only compare the READMEs' tables with results/, or with --out's folder; status 1 if "
                        "they differ")
    p.add_argument("--out", type=Path, metavar="DIR",
                   help="folder of results of your own; all runs are then run on your machine (default: "
                        "results/, where the READMEs' numbers are, and whose runs are not repeated)")
    p.add_argument("--seeds", type=flags.number(int, 1, 1000),
                   help="runs of each row (default: the experiment's own number)")
    p.add_argument("--set", nargs="+", default=[], metavar="FLAG=VALUE", dest="changes",
                   help="arguments of train.py that replace the experiment's, such as epochs=10 width=16")
    p.add_argument("--rule", type=flags.rule, metavar="RULE",
                   help="another rule beside feedback alignment, such as dfa or my_rule.py:MyRule; what "
                        "results/ has already is not run again, and all goes to --out (default there: mine)")
    p.add_argument("--jobs", type=flags.number(int, 1, 1000), default=1,
                   help="runs at a time, sharing the cores, and the GPUs if there are several (default: 1)")
    p.add_argument("--data", default="data", metavar="DIR",
                   help="folder of the downloaded data sets (default: data)")
    p.add_argument("--device", default="auto", help="as for train.py (default: auto)")
    args = p.parse_args(argv)
    if args.rule and not args.out:
        args.out = Path("mine")
    if (args.name is not None) + args.check + args.list != 1:
        p.error("name one experiment, or --list or --check: " + ", ".join(names))
    for change in args.changes:
        if "=" not in change:
            p.error(f"--set {change}: write FLAG=VALUE, such as epochs=10")
        if change.startswith("seed="):
            p.error(f"--set {change}: the seeds of an experiment are 0, 1, ...; say how many with --seeds")
    return args


def reproduce(args: argparse.Namespace, claims: Claims) -> None:
    """Run what is missing of an experiment; print its table, draw its picture, write the READMEs anew."""
    folder = args.out or claims.results
    path = folder / f"{args.name}.jsonl"
    experiment, done = claims.experiments[args.name], experiments.read(path)
    if args.rule:
        experiment = experiments.beside(experiment, args.rule)
        done = experiments.read(claims.results / path.name) | done
    changes = [f"--{change.replace('_', '-')}" for change in args.changes]
    listed = experiments.jobs(experiment, args.seeds or experiment.seeds, changes)
    but = f" But with {', '.join(args.changes)}." if args.changes else ""
    print(f"{args.name}: {experiment.claim} {experiment.scale}{but}", flush=True)
    missing = [job for job in listed if not experiments.complete(job, done)]
    if len(missing) < len(listed):
        print(f"{len(listed) - len(missing)} of {len(listed)} runs are in {folder.name}/{path.name} already")
    experiments.run_missing(path, missing, done, args.jobs, args.data, args.device)
    lines = [experiments.named(job, done) for job in listed]
    print("\n" + experiments.table(experiment, lines) + "\n", flush=True)
    picture = folder / ("-".join([args.name, *args.changes]).replace("/", "_") + ".png")
    if pictures.picture(picture, lambda: report.VIEWS[experiment.view].draw(picture, experiment, lines)):
        print(picture)
    if not args.changes and not args.out:
        for path, text in outdated(claims, claims.results).items():
            files.write(path, partial(Path.write_text, data=text, encoding="utf-8"))


def main(argv: list[str] | None, claims: Claims) -> int:
    """From the command line to the exit status."""
    args = parse(argv, claims.experiments)
    status = 0
    try:
        if args.check:
            status = check(claims, args.out or claims.results)
        elif args.list:
            print(overview(claims, args.out or claims.results))
        else:
            reproduce(args, claims)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        return flags.unread()
    except (files.Problem, OSError) as e:
        print(f"reproduce.py: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on with the runs that are missing", file=sys.stderr)
        return 130
