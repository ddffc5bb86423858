"""Shared by all tests: the project's folder on the path, the devices that this machine has, and the grader's report.

    python -m pytest tests/test_rule_contract.py --rule my_rule.py:MyRule --rule "submissions/*.py:MyRule"
"""
import glob
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import fa  # noqa: E402
import rulefile  # noqa: E402

torch.set_num_threads(1)        # the tensors are tiny: one thread is faster, and its bits are the same on every machine


@pytest.fixture(params=["cpu"] + ["cuda"] * torch.cuda.is_available())
def device(request):
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def only_the_device_asked_for(request, monkeypatch):
    """A test that does not take `device` runs on the CPU, and its processes too, also where there is a GPU."""
    if "device" not in request.fixturenames:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


# ---- the grader: --rule, and a report that needs no knowledge of pytest ----------------------------------------------

GRADES: dict[str, dict[str, tuple[bool | None, str]]] = {}      # rule -> property -> (kept, or None if it does not apply; why)


def pytest_addoption(parser):
    parser.addoption("--rule", action="append", default=[], metavar="FILE.py:CLASS",
                     help="the rule that test_rule_contract.py checks; may be given again, and FILE may be a pattern "
                          "(default: the rules of fa.py)")
    parser.addoption("--like", metavar="RULE", help="also check that it does what this rule of fa.py does, such as kp")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--like"):
        items[:] = [item for item in items if item.originalname != "test_like"]


def pytest_configure(config):
    if config.getoption("--rule"):                              # the report below says all
        config.option.tbstyle, config.option.reportchars, config.option.verbose = "no", "N", -1


def chosen(config) -> list[str]:
    """The rules to check. A pattern becomes the files that it matches; what matches nothing is kept, to be named as missing."""
    rules = []
    for text in config.getoption("--rule"):
        path, colon, name = text.rpartition(":")
        files = sorted(glob.glob(path)) if colon else []
        rules += [f"{file}:{name}" for file in files] or [text]
    return rules or list(fa.RULES)


def pytest_generate_tests(metafunc):
    if "rule" in metafunc.fixturenames and metafunc.module.__name__ == "test_rule_contract":
        metafunc.parametrize("rule", chosen(metafunc.config), indirect=True)


@pytest.fixture
def rule(request):
    """The class to check, with the text that named it as `.named`."""
    try:
        return rulefile.load(request.param)
    except rulefile.RuleFileError as e:
        pytest.fail(str(e), pytrace=False)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if item.module.__name__ != "test_rule_contract" or (report.passed and report.when != "call") or report.when == "teardown":
        return
    named, text = item.callspec.params["rule"], ""
    if call.excinfo:
        text = rulefile.explain(call.excinfo.value, named) or " ".join(str(call.excinfo.value).split())
    kept = None if report.skipped else report.passed
    GRADES.setdefault(named, {})[item.function.__doc__.splitlines()[0]] = kept, text.removeprefix("Skipped: ")


def pytest_terminal_summary(terminalreporter, config):
    if not config.getoption("--rule"):
        return
    write = terminalreporter.write_line
    for named, grades in GRADES.items():
        reasons = {why for kept, why in grades.values() if kept is False}
        write(f"\n{named}")
        if len(reasons) == 1 and len(grades) > 1 and not any(kept for kept, _ in grades.values()):
            write(f"  FAILED  it cannot be loaded: {reasons.pop()}")
            continue
        for text, (kept, why) in grades.items():
            write(f"  {'ok    ' if kept else '-     ' if kept is None else 'FAILED'}  {text}")
            if why:
                write(f"            {why}")
    write("")
    for named, grades in GRADES.items():
        counted = [kept for kept, _ in grades.values() if kept is not None]
        write(f"{sum(counted):2} of {len(counted)}  {named}")
