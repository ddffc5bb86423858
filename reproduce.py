"""The paper's claims, each a short list of runs, a table and a picture.

    python reproduce.py quick --out mine             # gratings: feedback alignment fails, and is repaired
    python reproduce.py cifar10 --seeds 2 --jobs 2   # ResNet-18 at a small scale on real images
    python reproduce.py rank --jobs 2                # the rank of errors, gradients, updates and activations
    python reproduce.py cifar10 --set epochs=1 subset=1000
    python reproduce.py quick --rule my_rule.py:MyRule   # your own rule beside backprop and feedback alignment
    python reproduce.py --check                      # does the README still say what results/ says?

A run is `train.py` with the arguments listed below. When it ends, one JSON line with its arguments, seed, versions,
commit, data, device and log goes to results/NAME.jsonl, and nothing else makes numbers for the README: its tables stand
between <!-- NAME --> marks and are written from those lines. Runs whose line is there already (same arguments, seed and
train.VERSION) are not run again, and one that was killed is resumed, so a killed experiment goes on where it was. `--set`
changes arguments of all its runs.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import os
import queue
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

import options
import report
from harness import cache, rulefile
import runs
import train

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
README = HERE / "README.md"
# Arguments that are not part of an experiment: where and in which precision it runs (each result says), and the recorder.
REORDERED = 2                   # the version that put CIFAR's images into another order; other data are as they were
NEUTRAL = ("out", "data", "device", "device_reason", "amp", "amp_reason", "rank", "graph")


class Experiment(NamedTuple):
    claim: str                  # what the paper says, and what this tests
    common: str                 # arguments of all runs
    cells: dict[str, str]       # label -> arguments of its own; "panel: label" where the picture has several panels
    columns: dict[str, str] = {"": ""}      # each cell once with each column's text in place of {}
    axis: str = ""              # what the columns are
    view: str = "epochs"        # how report.py shows it
    paper: dict[str, float] = {}            # label -> the paper's test accuracy in %, where it gives one
    seeds: int = 1              # seeds 0, 1, ... by default


REPAIRS = {"backprop": "--rule bp", "FA": "--rule fa", "FA + Muon": "--rule fa --muon", "FA + norm": "--rule fa --norm",
           "FA + Muon + norm": "--rule fa --muon --norm"}
ALL = {**{k.replace("FA", "backprop"): v.replace("fa", "bp") for k, v in REPAIRS.items() if k != "backprop"}, **REPAIRS}
TUNED = {"backprop": 0.1, "backprop + Muon": 0.01, "backprop + norm": 0.03, "backprop + Muon + norm": 0.03, "FA": 0.01,
         "FA + Muon": 0.003, "FA + norm": 0.1, "FA + Muon + norm": 0.03}        # the best of each row of results/tune.jsonl
PAPER = {"FA": 1.4, "FA + Muon": 25.3, "FA + norm": 37.1, "FA + Muon + norm": 46.1}     # CIFAR-100, ResNet-18



def rate_flag(own: str) -> str:
    """The learning rate to tune for a run with these arguments: Muon's, where it has Muon."""
    return "--muon-lr" if "--muon" in own else "--lr"


EXPERIMENTS = {
    "quick": Experiment(
        "Feedback alignment fails on the 4-layer CNN; Muon and activity normalisation repair it. Gratings, 12 epochs.",
        "--dataset gratings --rank 4", {k: REPAIRS[k] for k in ("backprop", "FA", "FA + Muon + norm")}, view="quick"),
    "cifar10": Experiment(
        "On a deep network each fix lifts feedback alignment, and both together the most. ResNet-18 of width 16, the first "
        "10,000 training images of CIFAR-10, 10 epochs, the whole test set.",
        "--dataset cifar10 --model resnet18 --width 16 --subset 10000 --epochs 10",
        {"backprop + norm": "--rule bp --norm", **{k: v for k, v in REPAIRS.items() if k != "backprop"}}, seeds=2),
    "rank": Experiment(
        "The signal of feedback alignment has a lower rank than backprop's; Muon and normalisation raise it. The 4-layer CNN, "
        "the first 10,000 training images of CIFAR-10, 12 epochs, Nesterov SGD of learning rate 0.02 without normalisation.",
        "--dataset cifar10 --subset 10000 --epochs 12 --weight-decay 0 --rank",
        {"backprop + norm": "--rule bp --norm", **REPAIRS}, view="ranks"),
    "rank-map": Experiment(
        "Where the collapse is and where it is not: initialisation x learning rate x layer x time. The 4-layer CNN of width "
        "16, the first 10,000 training images of CIFAR-10, 10 epochs, Nesterov SGD, no normalisation, no weight decay.",
        "--dataset cifar10 --width 16 --subset 10000 --epochs 10 --weight-decay 0 --rank --lr {}",
        {f"{name}: {label}": f"--init {init} {REPAIRS[label]}" for name, init in (("He", "he"), ("torch's default", "torch"))
         for label in ("backprop", "FA")},
        {lr: lr for lr in ("0.002", "0.005", "0.02", "0.05")}, "learning rate", "map"),
    "intervention": Experiment(
        "Is it the rank? Backprop is forced to updates of rank r, feedback alignment to updates of full rank (intervene.py). "
        "The 4-layer CNN of width 16, the first 10,000 training images of CIFAR-10, 10 epochs, Nesterov SGD.",
        "--dataset cifar10 --width 16 --subset 10000 --epochs 10 {}",
        {f"{panel}: {label}{norm}": f"{REPAIRS[label]} {own}"
         for panel, own, norm in (("learning rate 0.02", "--lr 0.02", ""), ("learning rate 0.005", "--lr 0.005", ""),
                                  ("batch norm, learning rate 0.05", "--lr 0.05 --norm", " + norm"))
         for label in ("backprop", "FA")},
        {**{r: f"--cut {r}" for r in ("1", "2", "4", "8", "16", "32")}, "all": "", "equal": "--flatten"},
        "singular values kept, r", "sweep"),
    "depth": Experiment(
        "The deeper the network, the worse feedback alignment, and the more the fixes are worth. MLP of width 256 and CNN of "
        "width 16, the first 10,000 training images of CIFAR-10, 10 epochs.",
        "--dataset cifar10 --subset 10000 --epochs 10 --rank 10 --depth {}",
        {f"{panel}: {label}": f"--model {size} {own}"
         for panel, size in (("MLP", "mlp --width 256"), ("CNN", "cnn --width 16"))
         for label, own in {"backprop + norm": ALL["backprop + norm"], **REPAIRS}.items()},
        {depth: depth for depth in ("2", "4", "8", "12")}, "hidden layers", "sweep"),
    "tune": Experiment(
        "No claim: the same learning rates for every cell of the CIFAR-100 table, at a small scale (ResNet-18 of width 16, "
        "10,000 training images, 5 epochs), measured on 10,000 other training images, never on the test set.",
        "--dataset cifar100 --model resnet18 --width 16 --subset 10000 --epochs 5 --validate 10000",
        {k: f"{v} {rate_flag(v)} {{}}" for k, v in ALL.items()},
        {lr: lr for lr in ("0.001", "0.003", "0.01", "0.03", "0.1")}, "learning rate, of Muon where there is Muon", "sweep"),
    "cifar100-small": Experiment(
        "The paper's headline table at a small scale: ResNet-18 of width 16, the first 10,000 training images of CIFAR-100, 10 "
        "epochs, the whole test set, with the learning rates that `tune` found best.",
        "--dataset cifar100 --model resnet18 --width 16 --subset 10000 --epochs 10",
        {**{k: f"{v} {rate_flag(v)} {TUNED[k]}" for k, v in ALL.items()}, "frozen features": "--rule frozen --norm"}, seeds=3),
    "improve": Experiment(
        "Beyond the paper: what lifts feedback alignment with both fixes further? The small scale of `cifar100-small`, "
        "measured on 10,000 other training images, never on the test set.",
        "--dataset cifar100 --model resnet18 --width 16 --subset 10000 --epochs 10 --validate 10000 --rule fa --muon --norm",
        {"FA + Muon + norm": "", "B × 3": "--feedback-gain 3", "orthogonal B": "--feedback-orthogonal",
         "B × 3, orthogonal": "--feedback-gain 3 --feedback-orthogonal", "Muon decay 0.05": "--muon-weight-decay 0.05",
         "B × 3, Muon decay 0.05": "--feedback-gain 3 --muon-weight-decay 0.05"}),
    "rules": Experiment(
        "Beyond the paper: the rules of fa.py in one common setting, with both fixes. The 4-layer CNN of width 16, the first "
        "10,000 training images of CIFAR-10, 10 epochs, the whole test set.",
        "--dataset cifar10 --width 16 --subset 10000 --epochs 10 --muon --norm",
        {"backprop": "--rule bp", "Kolen–Pollack": "--rule kp", "sign-symmetry": "--rule sign", "FA": "--rule fa",
         "DFA": "--rule dfa", "frozen features": "--rule frozen"}, seeds=3),
    "norms": Experiment(
        "The paper explains that batch normalisation helps by making activations orthogonal. Whitening makes them so directly: "
        "does it help more? The 4-layer CNN of width 16, the first 10,000 training images of CIFAR-10, 10 epochs.",
        "--dataset cifar10 --width 16 --subset 10000 --epochs 10 {}",
        {"backprop": "--rule bp", "backprop + Muon": "--rule bp --muon", "FA": "--rule fa", "FA + Muon": "--rule fa --muon"},
        {"none": "", **{kind: f"--norm {kind}" for kind in ("rms", "layer", "batch", "whiten")}}, "normalisation", "sweep"),
    "cifar100": Experiment(
        "The paper's headline table: ResNet-18 on all of CIFAR-100, 100 epochs.",
        "--dataset cifar100", {**ALL, "frozen features": "--rule frozen --norm"}, paper=PAPER),
}


def beside(experiment: Experiment, rule: str) -> Experiment:
    """The experiment, and after each run of feedback alignment the same with another rule."""
    cells, name = {}, rulefile.name(rule)
    for label, own in experiment.cells.items():
        cells[label] = own
        if re.search(r"--rule fa\b", own):
            cells[re.sub(r"\bFA\b", lambda _: name, label)] = own.replace("--rule fa", f"--rule {shlex.quote(rule)}")
    if len(cells) == len(experiment.cells):
        raise runs.RunError("this experiment does not name the rule run by run; --rule has nothing to add to it")
    return experiment._replace(cells=cells)


# ---- runs ------------------------------------------------------------------------------------------------------

class Job(NamedTuple):
    label: str
    column: str
    argv: list[str]
    key: str                    # the run's identity: every argument's value, and train.VERSION


def jobs(experiment: Experiment, seeds: int, changes: list[str], version: int | None = None) -> list[Job]:
    """All runs of an experiment. Raises SystemExit, through train.parse, for an argument that train.py refuses."""
    listed = []
    for seed in range(seeds):
        for label, own in experiment.cells.items():
            for column, text in experiment.columns.items():
                argv = [*shlex.split(f"{experiment.common} {own}".replace("{}", text)), *changes, "--seed", str(seed)]
                listed.append(Job(label, column, argv, key(vars(train.parse(argv)), version or train.VERSION)))
    return listed


def key(args: dict, version: int) -> str:
    if args["dataset"] not in cache.CIFAR:
        version = max(version, REORDERED)
    chosen = {k: v for k, v in args.items() if k not in NEUTRAL and v is not None and v is not False}   # flags of later days
    if args.get("amp_reason") == "as asked":                    # an experiment about precision
        chosen["amp"] = args["amp"]
    return json.dumps({**chosen, "version": version}, sort_keys=True)


def complete(job: Job, done: dict[str, dict]) -> bool:
    """Is its result there, with the ranks if they are asked for? Recording them does not change the rest."""
    return job.key in done and ("--rank" not in job.argv or "rank" in done[job.key])


def read(path: Path) -> dict[str, dict]:
    """results/NAME.jsonl as key -> line. Raises RunError naming a line that is not JSON."""
    lines = {}
    for number, text in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        try:
            line = json.loads(text)
            lines[key(line["args"], line["version"])] = line
        except (ValueError, KeyError) as e:
            raise runs.RunError(f"{path}, line {number} is not a result ({e}); restore it from git or delete it") from e
    return lines


def devices(asked: str, count: int) -> queue.Queue:
    """A place for each of `count` runs at a time, spread over the GPUs where there are several and none was named."""
    gpus = torch.cuda.device_count() if asked in ("auto", "cuda") else 0
    places: queue.Queue = queue.Queue()
    for i in range(count):
        places.put(f"cuda:{i % gpus}" if gpus > 1 else asked)
    return places


def run_at(places: queue.Queue, *args: Any) -> dict:
    """`run` on the next place that is free."""
    place = places.get()
    try:
        return run(*args, place)    # type: ignore[call-arg]  # args are all that run takes but the last
    finally:
        places.put(place)


def begun(path: Path, job: Job) -> Path:
    """Where a run is until its result is in the file at `path`; so one that was killed before is found again."""
    name = hashlib.sha256(json.dumps([str(path.resolve()), job.argv, job.key]).encode()).hexdigest()
    return Path("runs") / f"{path.stem}-{name[:12]}"


def wait_for(folder: Path) -> None:
    """Until no process writes to it: of an experiment that was killed a run may be left that has not noticed yet."""
    said = False
    while folder.exists():
        try:
            with runs.claim(folder):
                return
        except runs.RunError as e:
            if not said:
                print(f"{e}", file=sys.stderr, flush=True)
            said = True
            time.sleep(0.5)


def run(path: Path, job: Job, root: str, threads: int, running: dict, device: str) -> dict:
    """One run of train.py in a process of its own, or what is left of one; returns its result line."""
    folder = begun(path, job) / "run"
    folder.parent.mkdir(parents=True, exist_ok=True)
    what = ["--resume", str(folder)] if (folder / runs.CONFIG).exists() else [*job.argv, "--out", str(folder)]
    command = [sys.executable, str(HERE / "train.py"), *what, "--data", root, "--device", device]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with runs.claim(folder.parent) as held:                     # train.py holds it too, should this process be killed
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
                                   pass_fds=held)
        running[job.key] = process, folder / "log.jsonl"
        _, error = process.communicate()
        del running[job.key]
    if process.returncode not in (0, train.DIVERGED):
        raise runs.RunError(f"{' '.join(job.argv)} ended in {folder} with status {process.returncode}: {error.strip()[-2000:]}")
    config = runs.read_config(folder)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    ranks = folder / "rank.jsonl"
    recorded = {"rank": [json.loads(line) for line in ranks.read_text().splitlines()]} if ranks.exists() else {}
    return {"experiment": path.stem, "label": job.label, "seed": config["args"]["seed"],
            "final_test_accuracy": log[-1]["test_accuracy"], "diverged": log[-1]["diverged"],
            "seconds": round(sum(line["seconds"] for line in log), 1), "device": config["device"],
            "commit": config["commit"], "version": config["version"], "versions": config["versions"], "data": config["data"],
            "args": config["args"], "epochs": log, **recorded}


def run_missing(path: Path, missing: list[Job], done: dict[str, dict], args: argparse.Namespace) -> None:
    """Run what is missing, `args.jobs` at a time, adding each result to the file at `path` as it comes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    running: dict = {}
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    began, total = time.time(), sum(train.parse(job.argv).epochs for job in missing)
    finished, places = 0, devices(args.device, args.jobs)
    for job in missing:
        wait_for(begun(path, job))
    with ThreadPoolExecutor(args.jobs) as pool:
        waiting = {pool.submit(run_at, places, path, job, args.data, threads, running): job for job in missing}
        try:
            while waiting:
                for future in [f for f in waiting if f.done()]:
                    job, line = waiting.pop(future), future.result()
                    finished += len(line["epochs"])
                    done[job.key] = line
                    runs.write_log(path, list(done.values()))
                    if begun(path, job).exists():               # whoever asks for this run again gets a new one
                        begun(path, job).rename(f"{begun(path, job)}-{time.time_ns()}")
                    show("")
                    print(", ".join([job.label, *[job.column] * bool(job.column), f"seed {line['seed']}"])
                          + f": {report.percent(line)}, {train.span(line['seconds'])}", flush=True)
                epochs = finished + sum(log.read_text().count("\n") for _, log in list(running.values()) if log.exists())
                left = train.span((time.time() - began) / epochs * (total - epochs)) if epochs else "unknown time"
                show(f"{len(missing) - len(waiting)} of {len(missing)} runs done, {left} left")
                time.sleep(0.5)
            show("")
        finally:                                                # an error or Ctrl-C: the results so far are kept
            for future in waiting:
                future.cancel()
            for process, _ in list(running.values()):
                process.terminate()


def show(progress: str) -> None:
    """Write over the terminal's last line; where there is no terminal, nothing."""
    if sys.stderr.isatty():
        print(f"\r\033[K{progress}", end="", file=sys.stderr, flush=True)


# ---- the README ------------------------------------------------------------------------------------------------

def lines_of(name: str) -> list[dict]:
    """The lines that the README's table shows: the experiment as it stands, every seed that was run.

    All are of one version: an older one's, as long as it has more of them than the newer.
    """
    experiment, done = EXPERIMENTS[name], read(RESULTS / f"{name}.jsonl")
    most = 1 + max((line["seed"] for line in done.values()), default=-1)
    versions = sorted({train.VERSION, *(line["version"] for line in done.values())}, reverse=True)
    return max(([shown(job, done) for job in jobs(experiment, most, [], version) if complete(job, done)]
                for version in versions), key=len)


def shown(job: Job, done: dict[str, dict]) -> dict:
    """A result under the names that the experiment gives it today."""
    return {**done[job.key], "label": job.label, "column": job.column}


def table(experiment: Experiment, lines: list[dict]) -> str:
    """The experiment's table, and under it what a reader has to know of the images."""
    notes = dict.fromkeys(note for line in lines if line["args"]["dataset"] in cache.CIFAR for note in remarks(line))
    return report.VIEWS[experiment.view].table(experiment, lines) + "\n\n" * bool(notes) + " ".join(notes)


def remarks(line: dict) -> list[str]:
    """On a result with CIFAR. Version 1 did not write down what it saw; its CIFAR-10 was a copy of 25,000 training images."""
    name, old = line["args"]["dataset"], line["version"] < REORDERED
    whole = cache.CIFAR[name].train * cache.CIFAR[name].classes
    count = line.get("data", {}).get("train_images", 25_000 if old and name == "cifar10" else whole)
    part = f"From a copy that has {count:,} of the {whole:,} training images of {name.replace('cifar', 'CIFAR-')}."
    return ["Version 1, another order of images."] * old + [part] * (count < whole)


def written(text: str) -> str:
    """The README with its tables written anew from results/."""
    for name, experiment in EXPERIMENTS.items():
        block = re.compile(f"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if block.search(text):
            content = table(experiment, lines_of(name)) + "\n"
            text = block.sub(lambda m: m[1] + content + m[2], text)     # noqa: B023  (sub calls it before content changes)
    return text


# ---- command line ----------------------------------------------------------------------------------------------

def parse(argv: list[str] | None) -> argparse.Namespace:
    p = options.Parser(prog="reproduce.py", description="Run an experiment of the paper, as far as it is missing.",
                     epilog="Experiments: " + " ".join(f"{name}: {e.claim}" for name, e in EXPERIMENTS.items()))
    p.add_argument("name", nargs="?", choices=EXPERIMENTS, help="the experiment")
    p.add_argument("--seeds", type=options.number(int, 1), help="runs of each cell (default: the experiment's own number)")
    p.add_argument("--set", nargs="+", default=[], metavar="FLAG=VALUE", dest="changes",
                   help="arguments of train.py that replace the experiment's, such as epochs=10 width=16")
    p.add_argument("--rule", type=options.rule, metavar="RULE",
                   help="another rule beside feedback alignment, such as dfa or my_rule.py:MyRule; what results/ has already "
                        "is not run again, and all goes to --out (default there: mine)")
    p.add_argument("--jobs", type=options.number(int, 1), default=1,
                   help="runs at a time, sharing the cores, and the GPUs if there are several (default: 1)")
    p.add_argument("--data", default="data", metavar="DIR", help="folder of the downloaded data sets (default: data)")
    p.add_argument("--device", default="auto", help="as for train.py (default: auto)")
    p.add_argument("--out", type=Path, metavar="DIR",
                   help="folder of results of your own; all runs are then run on your machine (default: results/, where the "
                        "README's numbers are, and whose runs are not repeated)")
    p.add_argument("--check", action="store_true",
                   help="only compare the README's tables with results/; status 1 if they differ")
    args = p.parse_args(argv)
    if args.rule and not args.out:
        args.out = Path("mine")
    if (args.name is None) != args.check:
        p.error("name one experiment, or --check: " + ", ".join(EXPERIMENTS))
    for change in args.changes:
        if "=" not in change:
            p.error(f"--set {change}: write FLAG=VALUE, such as epochs=10")
        if change.startswith("seed="):
            p.error(f"--set {change}: the seeds of an experiment are 0, 1, ...; say how many with --seeds")
    return args


def main(argv: list[str] | None = None) -> int:
    runs.speak_anywhere()
    args = parse(argv)
    try:
        if args.check:
            same = README.read_text(encoding="utf-8") == written(README.read_text(encoding="utf-8"))
            print("README.md says what results/ says" if same else
                  "README.md differs from results/: run the experiment again, which writes the table anew")
            return 0 if same else 1
        folder = args.out or RESULTS
        path = folder / f"{args.name}.jsonl"
        experiment, done = EXPERIMENTS[args.name], read(path)
        if args.rule:
            experiment, done = beside(experiment, args.rule), read(RESULTS / path.name) | done
        changes = [f"--{change.replace('_', '-')}" for change in args.changes]
        listed = jobs(experiment, args.seeds or experiment.seeds, changes)
        print(f"{args.name}: {experiment.claim}", flush=True)
        missing = [job for job in listed if not complete(job, done)]
        if len(missing) < len(listed):
            print(f"{len(listed) - len(missing)} of {len(listed)} runs are in {folder.name}/{path.name} already")
        run_missing(path, missing, done, args)
        picture = folder / ("-".join([args.name, *args.changes]).replace("/", "_") + ".png")
        lines = [shown(job, done) for job in listed]
        view = report.VIEWS[experiment.view]
        print("\n" + table(experiment, lines) + "\n", flush=True)
        if runs.picture(picture, lambda: view.draw(picture, experiment, lines)):
            print(picture)
        if README.exists() and not args.changes and not args.out:
            text = written(README.read_text(encoding="utf-8"))
            if text != README.read_text(encoding="utf-8"):
                runs.write(README, lambda partial: partial.write_text(text, encoding="utf-8"))
        return 0
    except (runs.RunError, OSError) as e:
        print(f"reproduce.py: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on with the runs that are missing", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
