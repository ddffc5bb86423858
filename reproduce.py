"""The paper's claims, each a short list of runs, a table and a picture.

    python reproduce.py quick --out mine                 # gratings: feedback alignment fails, and is repaired
    python reproduce.py --list                           # all experiments: claim, number of runs, hours
    python reproduce.py rank --jobs 2                    # two runs at a time
    python reproduce.py cifar10 --set epochs=1 subset=1000
    python reproduce.py quick --rule my_rule.py:MyRule   # your rule beside backprop and feedback alignment
    python reproduce.py --check                          # do both READMEs still say what results/ says?

A run is `train.py` with the arguments listed here. Its result is one line of results/NAME.jsonl. Nothing else
makes numbers for the READMEs: their tables, between <!-- NAME --> and <!-- end -->, are written from those
lines. What was measured already is not run again (harness/experiment.py).
"""
from __future__ import annotations

import argparse
import sys
import textwrap
from functools import partial
from pathlib import Path

from harness import experiment as experiments
from harness import files, flags, report, session
from harness.experiment import Experiment

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
README = HERE / "README.md"

REPAIRS = {"backprop": "--rule bp", "FA": "--rule fa", "FA + Muon": "--rule fa --muon",
           "FA + norm": "--rule fa --norm", "FA + Muon + norm": "--rule fa --muon --norm"}
ALL = {"backprop": "--rule bp", "backprop + Muon": "--rule bp --muon", "backprop + norm": "--rule bp --norm",
       "backprop + Muon + norm": "--rule bp --muon --norm", **REPAIRS}
# The best of each row of results/tune.jsonl.
TUNED = {"backprop": "--lr 0.1", "backprop + Muon": "--muon-lr 0.01", "backprop + norm": "--lr 0.03",
         "backprop + Muon + norm": "--muon-lr 0.03", "FA": "--lr 0.01", "FA + Muon": "--muon-lr 0.003",
         "FA + norm": "--lr 0.1", "FA + Muon + norm": "--muon-lr 0.03"}
PAD = "FA + Muon + norm, no weights in shortcuts"
WIDER = {k: f"{v} {TUNED[k]}" for k, v in ALL.items()}
WIDER |= {PAD: WIDER["FA + Muon + norm"] + " --shortcut pad", "frozen features": "--rule frozen --norm"}
WIDER = {k: WIDER[k] for k in ("FA + Muon + norm", "backprop + Muon + norm", "FA + norm", PAD, "FA + Muon",
                               "backprop + norm", "frozen features", "FA", "backprop + Muon", "backprop")}
PAPER = {"FA": 1.4, "FA + Muon": 25.3, "FA + norm": 37.1, "FA + Muon + norm": 46.1}     # CIFAR-100, ResNet-18
SMALL = "the first 10,000 training images of {}, 10 epochs, the whole test set."
CNN, CNN_SCALE = ("--dataset cifar10 --width 16 --subset 10000 --epochs 10",
                  "The 4-layer CNN of width 16, " + SMALL.format("CIFAR-10"))
RESNET, RESNET_SCALE = ("--dataset cifar100 --model resnet18 --width 16 --subset 10000",
                        "ResNet-18 of width 16, " + SMALL.format("CIFAR-100"))
HELD_OUT = "ResNet-18 of width 16, 10,000 training images of CIFAR-100, 10,000 others to measure on, "

EXPERIMENTS = {
    "quick": Experiment(
        "Feedback alignment fails on a CNN; Muon and activity normalisation together repair it.",
        "--dataset gratings --rank 4",
        {k: REPAIRS[k] for k in ("backprop", "FA", "FA + Muon + norm")}, view="quick",
        scale="The 4-layer CNN of width 16, gratings, 12 epochs."),
    "cifar10": Experiment(
        "On a deep network each repair lifts feedback alignment, and both together the most.",
        "--dataset cifar10 --model resnet18 --width 16 --subset 10000 --epochs 10",
        {k: ALL[k] for k in ("backprop + norm", "FA", "FA + Muon", "FA + norm", "FA + Muon + norm")}, seeds=2,
        scale="ResNet-18 of width 16, " + SMALL.format("CIFAR-10")),
    "rank": Experiment(
        "The signal of feedback alignment has a lower rank than backprop's; Muon and normalisation raise it.",
        "--dataset cifar10 --subset 10000 --epochs 12 --weight-decay 0 --rank",
        {"backprop + norm": ALL["backprop + norm"], **REPAIRS}, view="ranks",
        scale="The 4-layer CNN of width 32, the first 10,000 training images of CIFAR-10, 12 epochs, no "
              "weight decay, Nesterov SGD, of learning rate 0.02 without normalisation."),
    "rank-map": Experiment(
        "Where the collapse is and where it is not: initialisation × learning rate × layer × time.",
        f"{CNN} --weight-decay 0 --rank --lr {{}}",
        {f"{name}: {label}": f"--init {init} {REPAIRS[label]}"
         for name, init in (("He", "he"), ("torch's default", "torch")) for label in ("backprop", "FA")},
        {lr: lr for lr in ("0.002", "0.005", "0.02", "0.05")}, "learning rate", "map",
        scale=CNN_SCALE + " No weight decay."),
    "intervention": Experiment(
        "Is it the rank? Updates are forced to rank r, or to full rank, for backprop and feedback alignment.",
        f"{CNN} {{}}",
        {f"{panel}: {label}{norm}": f"{REPAIRS[label]} {own}"
         for panel, own, norm in (("learning rate 0.02", "--lr 0.02", ""),
                                  ("learning rate 0.005", "--lr 0.005", ""),
                                  ("batch norm, learning rate 0.05", "--lr 0.05 --norm", " + norm"))
         for label in ("backprop", "FA")},
        {**{r: f"--cut {r}" for r in ("1", "2", "4", "8", "16", "32")}, "all": "", "equal": "--flatten"},
        "singular values kept, r", "sweep", scale=CNN_SCALE),
    "depth": Experiment(
        "The deeper the network, the worse feedback alignment, and the more the repairs are worth.",
        "--dataset cifar10 --subset 10000 --epochs 10 --rank 10 --depth {}",
        {f"{panel}: {label}": f"--model {size} {own}"
         for panel, size in (("MLP", "mlp --width 256"), ("CNN", "cnn --width 16"))
         for label, own in {"backprop + norm": ALL["backprop + norm"], **REPAIRS}.items()},
        {depth: depth for depth in ("2", "4", "8", "12")}, "hidden layers", "sweep",
        scale="MLP of width 256 and CNN of width 16, " + SMALL.format("CIFAR-10")),
    "tune": Experiment(
        "No claim: one grid of learning rates for every row of `cifar100-small`, off the test set.",
        f"{RESNET} --epochs 5 --validate 10000",
        {k: f"{v} {TUNED[k].split()[0]} {{}}" for k, v in ALL.items()},
        {lr: lr for lr in ("0.001", "0.003", "0.01", "0.03", "0.1")},
        "learning rate, of Muon where there is Muon", "sweep", scale=HELD_OUT + "5 epochs."),
    "cifar100-small": Experiment(
        "The paper's headline table at a small scale, with the learning rates that `tune` found best.",
        f"{RESNET} --epochs 10",
        {**{k: f"{v} {TUNED[k]}" for k, v in ALL.items()}, "frozen features": "--rule frozen --norm"},
        seeds=3, scale=RESNET_SCALE),
    "improve": Experiment(
        "Beyond the paper: what lifts feedback alignment with both repairs further?",
        f"{RESNET} --epochs 10 --validate 10000 --muon --norm",
        {"FA + Muon + norm": "--rule fa", "B × 3": "--rule 'fa(gain=3)'",
         "orthogonal B": f"--rule {experiments.ORTHOGONAL}",
         "B × 3, orthogonal": f"--rule '{experiments.ORTHOGONAL}(gain=3)'",
         "Muon decay 0.05": "--rule fa --muon-weight-decay 0.05",
         "B × 3, Muon decay 0.05": "--rule 'fa(gain=3)' --muon-weight-decay 0.05"},
        scale=HELD_OUT + "10 epochs."),
    "shortcut": Experiment(
        "Beyond the paper: by which ways does the error of feedback alignment travel in a ResNet, and where "
        "is it lost?",
        f"{RESNET} --epochs 10 --validate 10000 --muon --norm --rank 10",
        {f"{panel}: {label}": f"{flag} {own}".strip() for panel, flag, labels in (
            ("no weights", "--shortcut pad", ("backprop", "FA", "FA, branches send nothing", "B × 3",
                                              "B × 0.1")),
            ("1×1 convolutions", "", ("backprop", "FA", "FA, shortcuts exact", "FA, branches send nothing",
                                      "B = W at the start", "frozen features")),
            ("no shortcuts", "--shortcut none", ("backprop", "FA")))
         for label, own in {
             "backprop": "--rule bp", "FA": "--rule fa", "frozen features": "--rule frozen",
             "FA, shortcuts exact": "--rule fa --exact 'blocks.*.shortcut.0'",
             "FA, branches send nothing": "--rule assignments/examples/shortcuts_only.py:ShortcutsOnly",
             "B = W at the start": "--rule assignments/examples/transported_once.py:TransportedOnce",
             "B × 3": "--rule 'fa(gain=3)'", "B × 0.1": "--rule 'fa(gain=0.1)'"}.items() if label in labels},
        view="ways", seeds=3, scale=HELD_OUT + "10 epochs, Muon and batch normalisation."),
    "rules": Experiment(
        "Beyond the paper: the rules of fa.py in one common setting, with both repairs.",
        f"{CNN} --muon --norm",
        {"backprop": "--rule bp", "Kolen–Pollack": "--rule kp", "sign-symmetry": "--rule sign",
         "FA": "--rule fa", "DFA": "--rule dfa", "frozen features": "--rule frozen"},
        seeds=3, scale=CNN_SCALE),
    "norms": Experiment(
        "Batch normalisation is said to help by making activations orthogonal. Whitening does so directly: "
        "does it help more?",
        f"{CNN} {{}}", {k: ALL[k] for k in ("backprop", "backprop + Muon", "FA", "FA + Muon")},
        {"none": "", **{kind: f"--norm {kind}" for kind in ("rms", "layer", "batch", "whiten")}},
        "normalisation", "sweep", scale=CNN_SCALE),
    "cifar100-quarter": Experiment(
        "The paper's headline table at a quarter of the width, and FA with shortcuts that have no weights.",
        "--dataset cifar100 --width 16 --epochs 10 --rank 10", WIDER, paper=PAPER,
        scale="ResNet-18 of width 16, all of CIFAR-100, 10 epochs."),
    "cifar100-half": Experiment(
        "The paper's headline table at half the width, and FA with shortcuts that have no weights.",
        "--dataset cifar100 --width 32 --epochs 30", WIDER, paper=PAPER,
        scale="ResNet-18 of width 32, all of CIFAR-100, 30 epochs."),
    "cifar100": Experiment(
        "The paper's headline table.",
        "--dataset cifar100", {**ALL, "frozen features": "--rule frozen --norm"}, paper=PAPER,
        scale="ResNet-18 of width 64, all of CIFAR-100, 100 epochs."),
}


# ---- the READMEs -------------------------------------------------------------------------------------------

def results(name: str, folder: Path) -> list[dict]:
    return experiments.results(EXPERIMENTS[name], folder / f"{name}.jsonl")


def tables(folder: Path) -> dict[str, str]:
    """What stands between the READMEs' marks, by name, from the results in this folder."""
    there = [name for name in EXPERIMENTS if folder == RESULTS or (folder / f"{name}.jsonl").exists()]
    found = {name: results(name, folder) for name in there}
    content = {name: experiments.table(EXPERIMENTS[name], lines) for name, lines in found.items()}
    if {"cifar100-small", "cifar100"} <= found.keys():
        small, full = found["cifar100-small"], found["cifar100"]
        table = report.headline(EXPERIMENTS["cifar100-small"], small, EXPERIMENTS["cifar100"], full)
        content["headline"] = experiments.noted(table, small + full, gap=" ")
    return content


def outdated(folder: Path) -> dict[Path, str]:
    """The READMEs whose tables are not what the results in this folder say, and what they should be."""
    content, wrong = tables(folder), {}
    for path in (README, RESULTS / "README.md"):
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if experiments.written(text, content) != text:
            wrong[path] = experiments.written(text, content)
    return wrong


def check(folder: Path) -> int:
    """Print whether the READMEs say what the results in this folder say. Returns the exit status."""
    if not any(folder.glob("*.jsonl")):
        raise files.Problem(f"{folder} holds no results to compare with; name a folder that --out was given")
    wrong = outdated(folder)
    for path in wrong:
        print(f"{path} differs from {folder.name}/: run the experiment again, which writes the table anew")
    if not wrong:
        print(f"README.md and results/README.md say what {folder.name}/ says")
    return 1 if wrong else 0


def overview(folder: Path) -> str:
    """Each experiment with its claim, its number of runs, and the hours that results here say they take."""
    parts: list[str] = []
    machines: dict[str, None] = {}
    for name, experiment in EXPERIMENTS.items():
        lines = results(name, folder)
        machines.update(dict.fromkeys(line["device"] for line in lines if "device" in line))
        runs = len(experiment.cells) * len(experiment.columns) * experiment.seeds
        hours = sum(line["seconds"] for line in lines) / max(1, len(lines)) * runs / 3600
        took = f"{hours:.2f} hours" if lines else "not measured yet"
        text = f"{experiment.claim} {experiment.scale}"
        parts += [f"{name}: {runs} runs, {took}", textwrap.indent(textwrap.fill(text, 90), "    ")]
    where = ", ".join(machines) or "no runs"
    return "\n".join(parts) + f"\n\nHours: of one run after another, by {folder.name}/ ({where})."


# ---- command line ------------------------------------------------------------------------------------------

def parse(argv: list[str] | None) -> argparse.Namespace:
    p = flags.Parser(prog="reproduce.py", description="Run what is missing of an experiment.",
                     epilog="python reproduce.py --list says which experiments there are.")
    p.add_argument("name", nargs="?", choices=EXPERIMENTS, metavar="NAME",
                   help="the experiment, such as quick")
    p.add_argument("--list", action="store_true", help="list the experiments: claim, number of runs, hours")
    p.add_argument("--check", action="store_true",
                   help="only compare the READMEs' tables with results/, or with --out's folder; status 1 if "
                        "they differ")
    p.add_argument("--out", type=Path, metavar="DIR",
                   help="folder of results of your own; all runs are then run on your machine (default: "
                        "results/, where the READMEs' numbers are, and whose runs are not repeated)")
    p.add_argument("--seeds", type=flags.number(int, 1),
                   help="runs of each row (default: the experiment's own number)")
    p.add_argument("--set", nargs="+", default=[], metavar="FLAG=VALUE", dest="changes",
                   help="arguments of train.py that replace the experiment's, such as epochs=10 width=16")
    p.add_argument("--rule", type=flags.rule, metavar="RULE",
                   help="another rule beside feedback alignment, such as dfa or my_rule.py:MyRule; what "
                        "results/ has already is not run again, and all goes to --out (default there: mine)")
    p.add_argument("--jobs", type=flags.number(int, 1), default=1,
                   help="runs at a time, sharing the cores, and the GPUs if there are several (default: 1)")
    p.add_argument("--data", default="data", metavar="DIR",
                   help="folder of the downloaded data sets (default: data)")
    p.add_argument("--device", default="auto", help="as for train.py (default: auto)")
    args = p.parse_args(argv)
    if args.rule and not args.out:
        args.out = Path("mine")
    if (args.name is not None) + args.check + args.list != 1:
        p.error("name one experiment, or --list or --check: " + ", ".join(EXPERIMENTS))
    for change in args.changes:
        if "=" not in change:
            p.error(f"--set {change}: write FLAG=VALUE, such as epochs=10")
        if change.startswith("seed="):
            p.error(f"--set {change}: the seeds of an experiment are 0, 1, ...; say how many with --seeds")
    return args


def reproduce(args: argparse.Namespace) -> None:
    """Run what is missing of an experiment; print its table, draw its picture, write the READMEs anew."""
    folder = args.out or RESULTS
    path = folder / f"{args.name}.jsonl"
    experiment, done = EXPERIMENTS[args.name], experiments.read(path)
    if args.rule:
        experiment = experiments.beside(experiment, args.rule)
        done = experiments.read(RESULTS / path.name) | done
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
    if report.picture(picture, lambda: report.VIEWS[experiment.view].draw(picture, experiment, lines)):
        print(picture)
    if not args.changes and not args.out:
        for path, text in outdated(RESULTS).items():
            files.write(path, partial(Path.write_text, data=text, encoding="utf-8"))


def main(argv: list[str] | None = None) -> int:
    session.speak_anywhere()
    args = parse(argv)
    try:
        if args.check:
            return check(args.out or RESULTS)
        if args.list:
            print(overview(args.out or RESULTS))
        else:
            reproduce(args)
        return 0
    except (files.Problem, OSError) as e:
        print(f"reproduce.py: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on with the runs that are missing", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
