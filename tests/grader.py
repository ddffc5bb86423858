"""The grader behind `python -m pytest tests/test_rule_contract.py --rule ...`: a process of its own for each submission.

Whatever a submission does, such as sys.exit, an endless loop, or another default dtype, is then its own fault alone. pytest
collects the properties to check; `run` starts `python -m pytest` anew for each rule, as many at once as there are cores; each
of these children writes a line for every property that it has judged (`record`). A property without a line was not kept.
"""
from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

import rulefile

GRADES: dict[str, dict[str, tuple[bool, str]]] = {}             # rule -> property -> (kept, why not or a remark)
SPARE = 30      # seconds: a child starts, and ends itself when its time is over; only where it does not, is it killed


# ---- in a child --------------------------------------------------------------------------------------------------

def limit(folder: str, seconds: int) -> None:
    """End this process when its time is over. The file `trace` then says where it was, also after a crash."""
    trace = os.open(Path(folder, "trace"), os.O_WRONLY | os.O_CREAT)            # open until the process ends
    faulthandler.enable(trace)
    faulthandler.dump_traceback_later(seconds, exit=True, file=trace)


def record(folder: str, item: pytest.Item, report: pytest.TestReport, call: pytest.CallInfo) -> None:
    """One line of the file `grades`: which property, passed or failed or skipped, and why."""
    if report.when == "teardown" or (report.when == "setup" and report.passed):
        return
    why = ""
    if call.excinfo:
        error = call.excinfo.value
        why = rulefile.explain(error, item.callspec.params["submitted"]) or " ".join(str(error).split())
    with open(Path(folder, "grades"), "a", encoding="utf-8") as file:
        file.write(json.dumps([item.originalname, report.outcome, why.removeprefix("Skipped: ")]) + "\n")


# ---- in the grader -----------------------------------------------------------------------------------------------

def run(session: pytest.Session) -> None:
    """Have every rule graded, and tell pytest the results as if it had run the tests itself."""
    items: dict[str, list[pytest.Item]] = {}
    for item in session.items:
        items.setdefault(item.callspec.params["submitted"], []).append(item)
    GRADES.update({rule: {} for rule in items})                 # in this order, whoever is ready first
    with tempfile.TemporaryDirectory() as folder:
        folders = {rule: Path(folder, str(number)) for number, rule in enumerate(items)}
        for place in folders.values():
            place.mkdir()
        commands = {rule: _command(rule, items[rule], folders[rule], session.config) for rule in items}
        seconds = session.config.getoption("--seconds")
        for rule, status in _children(commands, seconds + SPARE):
            judged = _judged(folders[rule])
            for item in items[rule]:
                outcome, why = judged.get(item.originalname) or ("failed", _death(rule, folders[rule], status, seconds))
                GRADES[rule][item.function.__doc__.splitlines()[0]] = outcome != "failed", why
                longrepr = (str(item.path), 0, why) if outcome == "skipped" else why
                report = pytest.TestReport(item.nodeid, item.location, {}, outcome, longrepr, "call")
                item.ihook.pytest_runtest_logreport(report=report)


def _command(rule: str, items: list[pytest.Item], folder: Path, config: pytest.Config) -> list[str]:
    # -s: what a submission prints goes nowhere, and not into a file of pytest's that could fill the disk. pytest's own
    # faulthandler plugin would cancel the time limit at the first failure.
    return [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "-p", "no:faulthandler",
            f"--rule={rule}", f"--like={config.getoption('--like') or ''}", f"--seconds={config.getoption('--seconds')}",
            f"--graded-to={folder}", *(f"{item.path}::{item.originalname}" for item in items)]


def _children(commands: dict[str, list[str]], seconds: float):
    """Run them, as many at once as there are cores. Yields (rule, exit status), or None for one that had to be killed."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    waiting, running = list(commands), {}
    try:
        while waiting or running:
            while waiting and len(running) < cores:
                # A session of its own: Ctrl-C reaches the grader only, and with the child ends what the child started.
                process = subprocess.Popen(commands[waiting[0]], env=environment, start_new_session=True,
                                           stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                running[waiting.pop(0)] = process, time.monotonic() + seconds
            time.sleep(0.02)
            for rule, (process, end) in list(running.items()):
                status = process.poll()
                if status is not None or time.monotonic() > end:
                    _kill(running.pop(rule)[0])
                    yield rule, status
    finally:                                                    # also after Ctrl-C
        for process, _ in running.values():
            _kill(process)


def _kill(process: subprocess.Popen) -> None:
    """With all that it started."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()


def _judged(folder: Path) -> dict[str, tuple[str, str]]:
    grades = folder / "grades"
    lines = grades.read_text(encoding="utf-8").splitlines() if grades.exists() else []
    return {name: (outcome, why) for name, outcome, why in map(json.loads, lines)}


def _death(rule: str, folder: Path, status: int | None, seconds: int) -> str:
    """Why a child judged no more properties."""
    path = str(Path(rule.rpartition(":")[0]))
    trace = (folder / "trace").read_text(errors="replace") if (folder / "trace").exists() else ""
    frame = re.search(rf'File "{re.escape(path)}", line (\d+) in (.+)', trace)      # the innermost comes first
    where = frame[1] + (f", in {frame[2]}" if frame[2] != "<module>" else "") if frame else ""
    what = (f"it was still running after {seconds} seconds; --seconds allows more" if status is None or "Timeout (" in trace
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
            if kept:
                write(f"  ok      {text}")
            elif text == failed[why][0]:
                for each in failed[why]:
                    write(f"  FAILED  {each}")
            else:
                continue                                        # stands above, with its reason
            if why:
                write(f"            {why}")
    write("")
    for rule, grades in GRADES.items():
        write(f"{sum(kept for kept, _ in grades.values()):2} of {len(grades)}  {rule}")
