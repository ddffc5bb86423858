"""Runs what is missing of a list of runs, and keeps the results.

A run is train.py with the experiment's arguments, in a process of its own. When it ends, one JSON line with
its arguments, seed, versions, commit, data, device and log is added to NAME.jsonl. A run whose line is there
already (the same arguments, seed and flags.VERSION) is not run again, and one that was killed is resumed; so
the same command, given again, goes on where a killed one stopped. Tables are written from those lines alone.

Nothing here knows which experiments there are: reproduce.py lists them.
"""
from __future__ import annotations

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

from harness import files, flags, report, rulefile, tables

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
DIVERGED = 3                # train.py's exit status where a number was not finite: a result like any other
CIFAR = {"cifar10": 50_000, "cifar100": 50_000}                 # training images
REORDERED = 2               # the version that put CIFAR's images into another order; no other data changed
ORTHOGONAL = "assignments/examples/orthogonal.py:Orthogonal"
# Not part of an experiment: where and in which precision it runs (each result says), and the recorder.
NEUTRAL = ("out", "data", "device", "device_reason", "amp", "amp_reason", "rank", "graph")


class Experiment(NamedTuple):
    claim: str                  # what the paper says, and what this tests
    common: str                 # arguments of all runs
    cells: dict[str, str]       # label -> arguments of its own; "panel: label" for a picture of panels
    columns: dict[str, str] = {"": ""}      # each cell once with each column's text in place of {}
    axis: str = ""              # what the columns are
    view: str = "epochs"        # how report.py shows it
    paper: dict[str, float] = {}            # label -> the paper's test accuracy in %, where it gives one
    seeds: int = 1              # seeds 0, 1, ... by default
    scale: str = ""             # of which network, images and epochs the claim is tested


class Job(NamedTuple):
    label: str
    column: str
    argv: list[str]
    key: str                    # the run's identity: every argument's value, and flags.VERSION


# ---- which runs --------------------------------------------------------------------------------------------

def jobs(experiment: Experiment, seeds: int, changes: list[str], version: int | None = None) -> list[Job]:
    """All runs of an experiment. flags.parse raises SystemExit for an argument that train.py refuses."""
    listed = []
    for seed in range(seeds):
        for label, own in experiment.cells.items():
            for column, text in experiment.columns.items():
                argv = shlex.split(f"{experiment.common} {own}".replace("{}", text))
                argv += [*changes, "--seed", str(seed)]
                identity = key(vars(flags.parse(argv)), version or flags.VERSION)
                listed.append(Job(label, column, argv, identity))
    return listed


def key(args: dict, version: int) -> str:
    if args["dataset"] not in CIFAR:
        version = max(version, REORDERED)
    # A flag that came later is absent from older results; its default is None or False.
    chosen = {k: v for k, v in args.items() if k not in NEUTRAL and v is not None and v is not False
              and v != []}
    gain = chosen.pop("feedback_gain", None)                    # flags once, now a rule's hyperparameters
    if chosen.pop("feedback_orthogonal", False):
        chosen["rule"], chosen["rule_digest"] = ORTHOGONAL, rulefile.digest(ORTHOGONAL)
    if gain:
        chosen["rule"] = rulefile.written(*rulefile.parse(f"{chosen['rule']}(gain={gain})"))
    if args.get("amp_reason") == "as asked":                    # an experiment about precision
        chosen["amp"] = args["amp"]
    return json.dumps({**chosen, "version": version}, sort_keys=True)


def beside(experiment: Experiment, rule: str) -> Experiment:
    """The experiment, and after each run of feedback alignment the same with another rule."""
    cells, name = {}, rulefile.name(rule)
    for label, own in experiment.cells.items():
        cells[label] = own
        if re.search(r"--rule fa\b", own):
            other = re.sub(r"\bFA\b", lambda _: name, label)
            cells[other] = own.replace("--rule fa", f"--rule {shlex.quote(rule)}")
    if len(cells) == len(experiment.cells):
        raise files.Problem("this experiment does not name the rule run by run; --rule has nothing to add "
                            "to it")
    return experiment._replace(cells=cells)


def complete(job: Job, done: dict[str, dict]) -> bool:
    """Is its result there, with the ranks if they are asked for? Recording them does not change the rest."""
    return job.key in done and ("--rank" not in job.argv or "rank" in done[job.key])


# ---- results -----------------------------------------------------------------------------------------------

def read(path: Path) -> dict[str, dict]:
    """NAME.jsonl as key -> line. Raises files.Problem naming a line that is not a result."""
    lines = {}
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else [], 1):
        try:
            line = json.loads(text)
            lines[key(line["args"], line["version"])] = line
        except (ValueError, KeyError) as e:
            raise files.Problem(f"{path}, line {number} is not a result ({e}); restore it from git or "
                                "delete it") from e
    return lines


def results(experiment: Experiment, path: Path) -> list[dict]:
    """The lines that a README's table shows: the experiment as it stands, every seed that was run.

    All are of one version: an older one's, as long as it has more of them than the newer.
    """
    done = read(path)
    most = 1 + max((line["seed"] for line in done.values()), default=-1)
    versions = sorted({flags.VERSION, *(line["version"] for line in done.values())}, reverse=True)
    return max(([named(job, done) for job in jobs(experiment, most, [], version) if complete(job, done)]
                for version in versions), key=len)


def named(job: Job, done: dict[str, dict]) -> dict:
    """A result under the names that the experiment gives it today."""
    return {**done[job.key], "label": job.label, "column": job.column}


def table(experiment: Experiment, lines: list[dict]) -> str:
    """The experiment's table, and under it what a reader has to know of the images, and which rows no run
    has been made of."""
    if not lines:
        return "Not measured yet."
    there = {line["label"] for line in lines}
    measured = {label: own for label, own in experiment.cells.items() if label in there}
    text = report.VIEWS[experiment.view].table(experiment._replace(cells=measured), lines)
    missing = "; ".join(label for label in experiment.cells if label not in there)
    return noted(text, lines) + (f"\n\nNot measured yet: {missing}." if missing else "")


def noted(table: str, lines: list[dict], gap: str = "\n\n") -> str:
    """The table, and after a gap what a reader has to know of the images that these results saw, and of
    their precision where it depended on the machine."""
    notes = dict.fromkeys(note for line in lines if line["args"]["dataset"] in CIFAR
                          for note in remarks(line))
    bf16 = [line["args"].get("amp", False) for line in lines if line["args"].get("amp_reason") != "as asked"]
    if 0 < sum(bf16) < len(bf16):
        notes[f"In bf16: {sum(bf16)} of the {len(bf16)} runs; the others in float32."] = None
    return gap.join([table, " ".join(notes)]) if notes else table


def remarks(line: dict) -> list[str]:
    """On a result with CIFAR. Version 1 did not record its data; its CIFAR-10 had 25,000 training images."""
    name, old, said = line["args"]["dataset"], line["version"] < REORDERED, []
    whole = CIFAR[name]
    count = line.get("data", {}).get("train_images", 25_000 if old and name == "cifar10" else whole)
    if old:
        said.append("Version 1, another order of images.")
    if count < whole:
        of = f"{count:,} of the {whole:,} training images of {name.replace('cifar', 'CIFAR-')}"
        said.append(f"From a copy that has {of}.")
    return said


def written(text: str, tables: dict[str, str]) -> str:
    """A README with these tables between its <!-- NAME --> and <!-- end -->."""
    for name, content in tables.items():
        block = re.compile(f"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = block.sub(lambda m: f"{m[1]}{content}\n{m[2]}", text)    # noqa: B023  (sub calls it at once)
    return text


# ---- running -----------------------------------------------------------------------------------------------

def devices(asked: str, count: int) -> queue.Queue:
    """A place for each of `count` runs at a time, spread over several GPUs unless one was named."""
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
    """Where a run is until its result is in the file at `path`: there one that was killed is found again."""
    name = hashlib.sha256(json.dumps([str(path.resolve()), job.argv, job.key]).encode()).hexdigest()
    return Path("runs") / f"{path.stem}-{name[:12]}"


def wait_for(folder: Path) -> None:
    """Until no process writes to it: of a killed experiment a run may be left that has not noticed yet."""
    said = False
    while folder.exists():
        try:
            with files.claim(folder):
                return
        except files.Problem as e:
            if not said:
                print(f"{e}", file=sys.stderr, flush=True)
            said = True
            time.sleep(0.5)


def run(path: Path, job: Job, root: str, threads: int, running: dict, device: str) -> dict:
    """One run of train.py in a process of its own, or what is left of one; returns its result line."""
    folder = begun(path, job) / "run"
    folder.parent.mkdir(parents=True, exist_ok=True)
    begins = not (folder / "config.json").exists()
    what = [*job.argv, "--out", str(folder)] if begins else ["--resume", str(folder)]
    command = [sys.executable, str(TRAIN), *what, "--data", root, "--device", device]
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}       # the caller's own number is kept
    with files.claim(folder.parent) as held:        # train.py holds it too, should this process be killed
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                   errors="replace", env=environment, pass_fds=held)
        running[job.key] = process, folder / "log.jsonl"
        _, error = process.communicate()
        del running[job.key]
    if process.returncode not in (0, DIVERGED):
        raise files.Problem(f"{' '.join(job.argv)} ended in {folder} with status {process.returncode}: "
                            f"{error.strip()[-2000:]}")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    log = lines_in(folder / "log.jsonl")
    ranks = folder / "rank.jsonl"
    recorded = {"rank": lines_in(ranks)} if ranks.exists() else {}
    return {"experiment": path.stem, "label": job.label, "seed": config["args"]["seed"],
            "final_test_accuracy": log[-1]["test_accuracy"], "diverged": log[-1]["diverged"],
            "seconds": round(sum(line["seconds"] for line in log), 1), "device": config["device"],
            "commit": config["commit"], "version": config["version"], "versions": config["versions"],
            "data": config["data"], "args": config["args"], "epochs": log, **recorded}


def lines_in(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run_missing(path: Path, missing: list[Job], done: dict[str, dict], at_a_time: int, root: str,
                device: str) -> None:
    """Run what is missing, `at_a_time`, and add each result to `done` and to the file at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    running: dict = {}
    threads = max(1, (os.cpu_count() or 1) // at_a_time)
    began, total = time.time(), sum(flags.parse(job.argv).epochs for job in missing)
    finished, places = 0, devices(device, at_a_time)
    for job in missing:
        wait_for(begun(path, job))
    with ThreadPoolExecutor(at_a_time) as pool:
        waiting = {pool.submit(run_at, places, path, job, root, threads, running): job for job in missing}
        try:
            while waiting:
                for future in [f for f in waiting if f.done()]:
                    job, line = waiting.pop(future), future.result()
                    finished += len(line["epochs"])
                    done[job.key] = line
                    files.write_lines(path, list(done.values()))
                    if begun(path, job).exists():      # whoever asks for this run again gets a new one
                        begun(path, job).rename(f"{begun(path, job)}-{time.time_ns()}")
                    show("")
                    which = ", ".join(filter(None, (job.label, job.column, f"seed {line['seed']}")))
                    print(f"{which}: {tables.percent(line)}, {tables.span(line['seconds'])}", flush=True)
                logs = [log for _, log in list(running.values()) if log.exists()]
                epochs = finished + sum(log.read_text().count("\n") for log in logs)
                left = (tables.span((time.time() - began) / epochs * (total - epochs)) if epochs
                        else "unknown time")
                show(f"{len(missing) - len(waiting)} of {len(missing)} runs done, {left} left")
                time.sleep(0.5)
            show("")
        finally:                                        # an error or Ctrl-C: the results so far are kept
            for future in waiting:
                future.cancel()
            for process, _ in list(running.values()):
                process.terminate()


def show(progress: str) -> None:
    """Write over the terminal's last line; where there is no terminal, nothing."""
    if sys.stderr.isatty():
        print(f"\r\033[K{progress}", end="", file=sys.stderr, flush=True)
