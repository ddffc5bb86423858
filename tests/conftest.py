"""Shared by all tests: the project's folder on the path, the devices that this machine has, and the grader.

    python -m pytest tests/test_rule_contract.py --rule my_rule.py:MyRule --rule "submissions/*.py:MyRule"
"""
import functools
import glob
import os
import sys
from pathlib import Path

# The tensors are tiny: one thread is faster, and its bits are the same on every machine.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import fa  # noqa: E402
import grader  # noqa: E402
from harness import rulefile  # noqa: E402


@pytest.fixture(params=["cpu"] + ["cuda"] * torch.cuda.is_available())
def device(request):
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def only_the_device_asked_for(request, monkeypatch):
    """A test that does not take `device` runs on the CPU, and its processes too, also where there is a
    GPU."""
    if "device" not in request.fixturenames:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


# ---- the grader: tests/grader.py checks each rule that --rule names in a process of its own ----------------

def pytest_addoption(parser):
    parser.addoption("--rule", action="append", default=[], metavar="FILE.py:CLASS",
                     help="the rule that test_rule_contract.py checks; may be given again, and FILE may be a "
                          "pattern (default: the rules of fa.py)")
    parser.addoption("--like", metavar="RULE",
                     help="also check that it does what this rule of fa.py does, such as kp")
    parser.addoption("--beats", metavar="RULE",
                     help="also check that it learns the gratings better than this rule, such as fa")
    parser.addoption("--aligns", type=float, metavar="DEGREES",
                     help="also check that its feedback comes as near as this to W while the model trains")
    parser.addoption("--csv", type=Path, metavar="FILE", help="write a table of scores and reasons too")
    parser.addoption("--picture", type=Path, metavar="FILE",
                     help="draw accuracy and the angle between W and B, beside fa and bp")
    parser.addoption("--seconds", type=int, default=120, metavar="S",
                     help="the time that each rule may take (default: 120; a usual one takes far less)")


def pytest_configure(config):
    if config.getoption("--seconds") < 1:
        raise pytest.UsageError("--seconds: expected 1 or more")
    if config.getoption("--rule"):                              # the grader's report says all
        config.option.tbstyle, config.option.reportchars, config.option.verbose = "no", "N", -1
        for option in ("--like", "--beats"):
            try:
                rulefile.digest(config.getoption(option) or "fa")
            except rulefile.RuleFileError as e:
                raise pytest.UsageError(f"{option} {e}") from e


def chosen(config) -> list[str]:
    """The rules to check. A pattern becomes the files that it matches; what matches nothing is kept, to be
    named as missing."""
    rules = []
    for text in config.getoption("--rule"):
        path, colon, name = text.rpartition(":")
        files = sorted(glob.glob(path)) if colon and not grader.Child.running else []
        rules += [f"{file}:{name}" for file in files] or [text]
    return list(dict.fromkeys(rules))


def pytest_generate_tests(metafunc):
    if "submitted" in metafunc.fixturenames:
        default = getattr(metafunc.module, "DEFAULT", list(fa.RULES))
        metafunc.parametrize("submitted", chosen(metafunc.config) or default, indirect=True)


@pytest.fixture
def submitted(request):
    """The class to check, as it is, or what else the contract loads."""
    # A property of rules is that they can be saved: it says so itself.
    load = getattr(request.module, "load", functools.partial(rulefile.load, saves=False))
    try:
        found = load(request.param)
    except rulefile.RuleFileError as e:
        pytest.fail(str(e), pytrace=False)
    if not callable(found):
        pytest.fail(f"{request.param}: there is no such name in the file", pytrace=False)
    return found


def pytest_collection_modifyitems(config, items):
    for option in ("--like", "--beats", "--aligns"):
        if not config.getoption(option):
            items[:] = [i for i in items if getattr(i, "originalname", "") != option.replace("--", "test_")]
    if config.getoption("--rule"):
        items[:] = [item for item in items if "submitted" in getattr(item, "fixturenames", ())]


def pytest_runtestloop(session):
    config = session.config
    if not config.getoption("--rule") or config.getoption("collectonly") or grader.Child.running:
        return None                                             # pytest runs the tests itself
    grader.run(session)
    return True


def pytest_terminal_summary(terminalreporter):
    if grader.GRADES and not grader.Child.running:
        grader.report(terminalreporter.write_line)
        grader.keep(terminalreporter.write_line, terminalreporter.config)
