"""The grader behind `python -m pytest tests/test_rule_contract.py --rule ...`: a process for each submission.

Whatever a submission does, such as sys.exit, an endless loop, or another default dtype, is then its own fault
alone. pytest collects the properties to check; `run` starts a child for each rule, as many at once as there
are cores; a child runs pytest once more, with one rule, and writes a line for each property it has judged.
A property without a line was not kept.
"""
from __future__ import annotations

import contextlib
import csv
import faulthandler
import json
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from harness import pictures, rulefile, tables

GRADES: dict[str, dict[str, tuple[bool, str]]] = {}     # rule -> property -> (kept, why not or a remark)
PROGRESS: dict[str, list] = {}  # rule -> after each epoch on the gratings (accuracy in %, ∠(W, B) in degrees)
SPARE = 30      # seconds: a child ends itself when its time is over; if it has not by then, it is killed


# ---- in a child --------------------------------------------------------------------------------------------

@dataclass
class Child:
    """Runs pytest with one rule, and is the plugin that writes the results to its file `grades`."""

    folder: Path
    rule: str
    seconds: int
    its_known: dict[str, list]
    args: list[str]
    running: ClassVar = False                           # in this process
    known: ClassVar[dict[str, list]] = {}               # progress of fa.py's rules, trained once for all

    def run(self) -> None:
        if hasattr(os, "setsid"):
            os.setsid()     # Ctrl-C reaches the grader only, and with the child ends what the child started
        # What a submission prints goes nowhere, and what it asks for has an end.
        with open(os.devnull, "r+") as nothing:
            for number in range(3):
                os.dup2(nothing.fileno(), number)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")
        self.folder.mkdir()
        with open(self.folder / "trace", "w") as trace:     # where it was when it crashed or ran out of time
            faulthandler.enable(trace)
            faulthandler.dump_traceback_later(self.seconds, exit=True, file=trace)
            Child.running, Child.known, os.environ["PYTEST_ADDOPTS"] = True, self.its_known, ""
            # pytest's own faulthandler plugin would cancel the time limit at the first failure
            args = ["-s", "-p", "no:cacheprovider", "-p", "no:faulthandler", *self.args]
            status = pytest.main(args, plugins=[self])
            os._exit(status)                                    # and does not wait for threads that are left

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = (yield).get_result()
        if report.when == "teardown" or (report.when == "setup" and report.passed):
            return
        why = ""
        if call.excinfo:
            why = rulefile.explain(call.excinfo.value, self.rule) or " ".join(str(call.excinfo.value).split())
        with open(self.folder / "grades", "a", encoding="utf-8") as file:
            file.write(json.dumps([item.originalname, report.outcome, why.removeprefix("Skipped: "),
                                   dict(item.user_properties)]) + "\n")


# ---- in the grader -----------------------------------------------------------------------------------------

def run(session: pytest.Session) -> None:
    """Have every rule graded, and tell pytest the results as if it had run the tests itself."""
    items: dict[str, list[pytest.Item]] = {}
    for item in session.items:
        items.setdefault(item.callspec.params["submitted"], []).append(item)
    GRADES.update({rule: {} for rule in items})                 # in this order, whoever is ready first
    with tempfile.TemporaryDirectory() as folder:
        option, context, known, children = session.config.getoption, _context(), {}, []
        drawn = ["bp", "fa"] if option("--picture") else []
        if {item.originalname for item in session.items} & {"test_learns", "test_beats"}:
            with context.Pool(1) as pool:           # in a clean process, and not in this one: see _context
                for name in {"frozen", option("--beats") or "frozen", *drawn}:
                    known[name] = pool.apply(_progress, (name,))
            PROGRESS.update((name, known[name]) for name in drawn)
        asked = [f"{name}={option(name)}" for name in ("--like", "--beats", "--aligns") if option(name)]
        for rule, its in items.items():
            tests = dict.fromkeys(f"{item.path}::{item.originalname}" for item in its)
            children.append(Child(Path(folder, str(len(children))), rule, option("--seconds"), known,
                                  [f"--rule={rule}", *asked, *tests]))
        for child, status in _run(context, children):
            judged = _judged(child.folder)
            for item in items[child.rule]:
                outcome, why, noted = judged.get(item.originalname) or ("failed", _death(child, status), {})
                if "progress" in noted:
                    PROGRESS[child.rule] = noted["progress"]
                GRADES[child.rule][item.function.__doc__.splitlines()[0]] = outcome != "failed", why
                longrepr = (str(item.path), 0, why) if outcome == "skipped" else why
                report = pytest.TestReport(item.nodeid, item.location, {}, outcome, longrepr, "call")
                item.ihook.pytest_runtest_logreport(report=report)


def _context():
    """How to start a process. A fork need not import everything again, but is safe only on Linux, where torch
    sees no GPU, and as long as this process has not called backward: autograd's threads do not survive it.
    """
    torch.optim.SGD([torch.zeros(1)], lr=0)             # the first optimiser imports a good part of torch
    fork = sys.platform == "linux" and not torch.cuda.is_available()
    return multiprocessing.get_context("fork" if fork else "spawn")


def _run(context, waiting: list[Child]):
    """As many at once as there are cores. Yields (child, exit status, or None if it had to be killed)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    running: list[tuple] = []
    try:
        while waiting or running:
            while waiting and len(running) < cores:
                child = waiting.pop(0)
                process = context.Process(target=child.run)
                process.start()
                running.append((child, process, time.monotonic() + child.seconds + SPARE))
            time.sleep(0.02)
            for each in running[:]:
                child, process, end = each
                status = process.exitcode                       # None: it is still running
                if status is not None or time.monotonic() > end:
                    _kill(process)
                    running.remove(each)
                    yield child, status
    finally:                                                    # also after Ctrl-C
        for _, process, _ in running:
            _kill(process)


def _kill(process: multiprocessing.Process) -> None:
    """With all that it started."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def _progress(rule: str) -> list:
    import test_rule_contract
    return test_rule_contract.progress(rulefile.load(rule))


def _judged(folder: Path) -> dict[str, tuple[str, str, dict]]:
    """By the test's name; of one with several cases the first that failed, or else the last."""
    grades, judged = folder / "grades", {}
    for line in grades.read_text(encoding="utf-8").splitlines() if grades.exists() else []:
        name, *result = json.loads(line)
        if judged.get(name, ["passed"])[0] != "failed":
            judged[name] = result
    return judged


def _death(child: Child, status: int | None) -> str:
    """Why a child judged no more properties."""
    path, trace = str(Path(child.rule.rpartition(":")[0])), child.folder / "trace"
    trace = trace.read_text(errors="replace") if trace.exists() else ""
    frame = re.search(rf'File "{re.escape(path)}", line (\d+) in (.+)', trace)  # the innermost comes first
    where = frame[1] + (f", in {frame[2]}" if frame[2] != "<module>" else "") if frame else ""
    late = status is None or "Timeout (" in trace
    what = (f"it was still running after {child.seconds} seconds; --seconds allows more" if late
            else f"it was killed by {signal.Signals(-status).name}" if status < 0
            else f"it ended Python itself, with exit status {status}")
    return f"{path}, line {where}: {what}" if where else what


def report(write) -> None:
    """Each property of each rule, each reason once, and the scores."""
    for rule, grades in GRADES.items():
        write(f"\n{rule}")
        failed: dict[str, list[str]] = {}                       # reason -> properties
        for text, (kept, why) in grades.items():
            if not kept:
                failed.setdefault(why, []).append(text)
        if any(len(texts) == len(grades) > 1 for texts in failed.values()):
            write(f"  FAILED  nothing could be checked: {next(iter(failed))}")
            continue
        for text, (kept, why) in grades.items():
            texts = [text] if kept else failed.pop(why, [])     # none if they stand above, with the reason
            for each in texts:
                write(f"  {'ok    ' if kept else 'FAILED'}  {each}")
            if texts and why:
                write(f"            {why}")
    write("")
    for rule in ranked():
        reached = f"{accuracy(rule):5.1f} %  " if accuracy(rule) is not None else ""
        write(f"{score(rule):2} of {len(GRADES[rule])}  {reached}{rule}")


def score(rule: str) -> int:
    return sum(kept for kept, _ in GRADES[rule].values())


def accuracy(rule: str) -> float | None:
    """Reached on the gratings, in %, if that was tried."""
    return PROGRESS[rule][-1][0] if rule in PROGRESS else None


def ranked() -> list[str]:
    """The rules, by their scores, and where these are the same by accuracy."""
    return sorted(GRADES, key=lambda rule: (-score(rule), -(accuracy(rule) or 0)))


def keep(write, config: pytest.Config) -> None:
    """The table and the picture, where they are asked for."""
    table, picture = config.getoption("--csv"), config.getoption("--picture")
    try:
        if table:
            with open(table, "w", newline="", encoding="utf-8") as file:
                rows = csv.writer(file)
                texts = dict.fromkeys(text for grades in GRADES.values() for text in grades)
                rows.writerow(["rule", "score", "of", "accuracy", *texts, "reasons"])
                for rule in ranked():
                    grades = GRADES[rule]
                    reached = "" if accuracy(rule) is None else f"{accuracy(rule):.1f}"
                    why = dict.fromkeys(why for kept, why in grades.values() if not kept)
                    rows.writerow([rule, score(rule), len(grades), reached,
                                   *(int(grades[text][0]) for text in texts), "; ".join(why)])
            write(f"\n{table}")
        if picture and PROGRESS:
            draw(picture)
            write(f"\n{picture}")
    except (OSError, ValueError) as e:                          # a folder that is not there; an odd ending
        write(f"\n{table or picture} cannot be written: {getattr(e, 'strerror', None) or e}")


def draw(path: Path) -> None:
    """Accuracy by epoch of each rule, and the angle between its W and B, beside fa and bp."""
    figure, ((left, right),) = pictures.figure_of(1, 2, size=(10, 4))
    labels = [tables.RULES.get(rule) or rulefile.name(rule) for rule in PROGRESS]
    for label, progress, shade, width in zip(labels, PROGRESS.values(), pictures.colours(labels),
                                             pictures.widths(len(labels))):
        style = {"color": shade, "linewidth": width, "marker": "o", "markersize": width + 1.5}
        epochs = range(1, len(progress) + 1)
        left.plot(epochs, [reached for reached, _ in progress], label=label, **style)
        if progress[-1][1] is not None:
            right.plot(epochs, [degrees for _, degrees in progress], **style)
    left.set(xlabel="epoch", ylabel="test accuracy on gratings (%)", ylim=(0, 100))
    right.set(xlabel="epoch", ylabel="∠(W, B) in degrees, mean over layers", ylim=(0, 95))
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    pictures.save(figure, path)
