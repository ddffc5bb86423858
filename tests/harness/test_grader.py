"""tests/grader.py: what a submission does is its own fault alone, is named for what it is, and is said once;
then come the scores, a table and a picture. And tests/test_rule_contract.py: each property can be missed."""
import csv
import functools
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import conftest
import grader
import pytest
from conftest import ROOT

GRADER = [sys.executable, "-m", "pytest", ROOT / "tests" / "test_rule_contract.py", "-p", "no:cacheprovider"]
HEAD = "import fa, torch\nclass MyRule(fa.FA):\n"
PREPARE = "    def prepare(self, layer):\n        "
BEFORE_STEP = "    def before_step(self, layer):\n        "
BACKWARD = "    def backward(self, layer, error, input_shape):\n        "
LEARNS, USES = "    learns = True\n", "    uses_weight = True\n"
SEND = "return fa.project(layer, layer.feedback, error, input_shape)\n"
SIGNS = "return fa.project(layer, layer.weight.sign() * layer.feedback.abs(), error, input_shape)\n"
COUNTS = "    calls = 0\n" + BACKWARD + (
    "self.calls += 1\n        return fa.project(layer, layer.feedback / self.calls, error, input_shape)\n")
EVERYTHING, W = "nothing could be checked", "does not read W"
CHANGES, SAVES = "leaves W and the error", "goes on from what it saved"

SUBMISSIONS = {         # its name: (source, the properties that it lacks or None, what is said)
    "fine": (HEAD + "    pass\n", [], []),
    "signs": (HEAD + USES + BACKWARD + SIGNS, [], ["uses_weight = True; W is read in backward"]),
    # ---- weight transport
    "silent": (HEAD + BACKWARD + SIGNS, [W], ["backward reads W"]),
    "copies_when_prepared": (HEAD + PREPARE + "layer.register_buffer('feedback', layer.weight.data * 1)\n",
                             [W], ["prepare reads W"]),
    "copies_before_step": (HEAD + LEARNS + BEFORE_STEP + "layer.feedback.copy_(layer.weight)\n",
                           [W], ["before_step reads W"]),
    "says_that_it_copies": (HEAD + LEARNS + USES + BEFORE_STEP + "layer.feedback.copy_(3 * layer.weight)\n",
                            [W], ["is W itself"]),
    "copies_by_a_hook": (HEAD + LEARNS + PREPARE + "super().prepare(layer)\n"
                         "        layer.register_forward_pre_hook("
                         "lambda layer, args: (layer.feedback.copy_(layer.weight), None)[1])\n",
                         [W, "leaves plain backprop"], ["is backprop's own"]),
    # ---- W and the error are not its own
    "halves": (HEAD + BACKWARD + "error *= 0.5\n        " + SEND, [CHANGES],
               ["backward changes the error that it is given"]),
    "moves_w_itself": (HEAD + BEFORE_STEP + "layer.weight.data -= 0.1 * layer.weight.grad\n", [CHANGES],
                       ["before_step changes layer.weight"]),
    # ---- what is not saved, or not seeded
    "forgetful": (HEAD + PREPARE + "self.B = getattr(self, 'B', {})\n"
                  "        self.B[layer] = self.draw(layer)\n" + BACKWARD +
                  "return fa.project(layer, self.B[layer], error, input_shape)\n", [SAVES],
                  ["cannot be saved"]),
    "counts": (HEAD + COUNTS, [], []),
    "counts_in_vain": (HEAD + "    def state_dict(self):\n        return {}\n"
                       "    def load_state_dict(self, state):\n        pass\n" + COUNTS, [SAVES],
                       ["goes another way than the rule that was saved"]),
    "unseeded": (HEAD + PREPARE + "layer.register_buffer('feedback', torch.rand(layer.weight.shape) - 0.5)\n"
                 + BACKWARD + SEND, ["is deterministic"], []),
    # ---- what must not touch its neighbours
    "nonsense": ("import fa\nnonsense (", EVERYTHING, ["nonsense.py, line 2: SyntaxError"]),
    "leaves_late": (HEAD + "    calls = 0\n" + BACKWARD + "self.calls += 1\n"
                    "        if self.calls > 12: raise SystemExit(0)\n        " + SEND, None,
                    ["leaves_late.py, line 6, in backward: SystemExit: 0"]),
    "ends_late": (HEAD + "    def __deepcopy__(self, memo):\n        import os; os._exit(3)\n",
                  ["works after copy.deepcopy", "leaves plain backprop behind"], ["with exit status 3"]),
    "crashes": (HEAD + BACKWARD + "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)\n", EVERYTHING,
                ["crashes.py, line 4, in backward: it was killed by SIGSEGV"]),
    "asks": ("input('Which rule? ')\n", EVERYTHING, ["asks.py, line 1: EOFError"]),
    "interrupts": ("raise KeyboardInterrupt\n", EVERYTHING, ["it ended Python itself, with exit status 2"]),
    "is_loud_and_lingers": ("import threading, time\nprint('loud ' * 10 ** 7)\n"
                            "threading.Thread(target=time.sleep, args=(10 ** 6,)).start()\n"
                            + HEAD + "    pass\n", [], []),
    "patches": ("import fa, torch, warnings\ntorch.set_default_dtype(torch.float64)\n"
                "fa.project = lambda layer, weight, error, shape: error.new_zeros(shape)\n"
                "warnings.simplefilter('error')\n" + HEAD + "    pass\n", None, []),
}


def graded(folder, *args, **submissions):
    """(What pytest did, the report by submission)."""
    for name, source in submissions.items():
        (folder / f"{name}.py").write_text(source)
    rules = [text for name in submissions for text in ("--rule", f"{name}.py:MyRule")]
    done = subprocess.run([*GRADER, *rules, *args], cwd=folder, capture_output=True, text=True,
                          input="an answer")                    # which no submission gets to read
    parts = [part for part in done.stdout.split("\n\n") if ".py:MyRule\n  " in part]
    return done, {part.split(".py:")[0].strip(): part for part in parts}


@pytest.fixture(scope="module")
def everybody(tmp_path_factory):
    return graded(tmp_path_factory.mktemp("submissions"), "-k", "not learns",
                  **{name: source for name, (source, _, _) in SUBMISSIONS.items()})


@pytest.mark.slow
@pytest.mark.parametrize("name", SUBMISSIONS)
def test_each_is_judged_by_itself(name, everybody):
    done, parts = everybody
    _, lacks, said = SUBMISSIONS[name]
    part, failed = parts[name], [line for line in parts[name].splitlines() if "FAILED" in line]
    for text in said:
        assert part.count(text) == 1, part                      # and once
    if lacks == EVERYTHING:
        assert len(failed) == 1 and EVERYTHING in failed[0], part
    elif lacks is not None:
        assert len(failed) == len(lacks) and all(any(text in line for line in failed) for text in lacks), part
    score = 0 if lacks == EVERYTHING else 11 - len(lacks or [])
    assert lacks is None or f"{score:2} of 11  {name}.py:MyRule" in done.stdout


@pytest.mark.slow
def test_the_report_needs_no_knowledge_of_pytest(everybody):
    done, parts = everybody
    assert done.returncode == 1 and parts.keys() == SUBMISSIONS.keys()
    assert "Traceback" not in done.stdout + done.stderr and "def test" not in done.stdout
    assert done.stdout.count("of 11  ") == len(SUBMISSIONS) and "loud loud" not in done.stdout


@pytest.mark.slow
def test_one_that_never_ends(tmp_path):
    _, parts = graded(tmp_path, "--seconds", "3", "-k", "not learns",
                      loops=HEAD + BACKWARD + "while True: pass\n")
    assert ("nothing could be checked: loops.py, line 4, in backward: it was still running after 3 seconds"
            in parts["loops"])


@pytest.mark.slow
def test_an_interrupt_ends_everything(tmp_path):
    """The grader, the submission, and what the submission started."""
    (tmp_path / "starts.py").write_text(
        "import os, subprocess, time\nother = subprocess.Popen(['sleep', '1000000'])\n"
        "open('pids', 'w').write(f'{os.getpid()} {other.pid}\\n')\ntime.sleep(10 ** 6)\n")
    command = [*GRADER, "--rule", "starts.py:MyRule"]
    # A shell that started the tests in the background may have them ignore Ctrl-C.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, preexec_fn=heed) as process:
        pids = tmp_path / "pids"
        while not (pids.exists() and pids.read_text().endswith("\n")):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait() == 2

    def is_gone(pid):
        try:
            return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] == "Z"
        except (FileNotFoundError, ProcessLookupError):
            return True

    while not all(map(is_gone, pids.read_text().split())):      # killed, if perhaps not yet noticed
        time.sleep(0.05)


def test_grades_are_ranked_reported_kept_in_a_table_and_drawn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    half = {"sends": (True, ""), "copies": (False, "it forgot"), "saves": (False, "it forgot"),
            "reads": (True, "and says so")}
    monkeypatch.setattr(grader, "GRADES", {
        "none.py:R": dict.fromkeys(half, (False, "line 2")), "slow.py:R": half, "fast.py:R": half})
    monkeypatch.setattr(grader, "PROGRESS", {"slow.py:R": [(40.0, 80.0), (50.0, 70.0)],
                                             "fast.py:R": [(40.0, None), (60.0, None)]})
    lines, names = [], ["fast.py:R", "slow.py:R", "none.py:R"]
    grader.report(lines.append)
    assert lines == ["\nnone.py:R", "  FAILED  nothing could be checked: line 2"] + [
        line for name in ("slow.py:R", "fast.py:R")
        for line in (f"\n{name}", "  ok      sends", "  FAILED  copies", "  FAILED  saves",
                     "            it forgot", "  ok      reads", "            and says so")
    ] + ["", " 2 of 4   60.0 %  fast.py:R", " 2 of 4   50.0 %  slow.py:R", " 0 of 4  none.py:R"]

    asked = {"--csv": "grades.csv", "--picture": tmp_path / "grades.png"}
    grader.keep(lines.append, SimpleNamespace(getoption=asked.get))
    with open("grades.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["rule"] for row in rows] == names
    assert rows[0] == {"rule": "fast.py:R", "score": "2", "of": "4", "accuracy": "60.0", "sends": "1",
                       "copies": "0", "saves": "0", "reads": "1", "reasons": "it forgot"}
    assert not rows[2]["accuracy"] and (tmp_path / "grades.png").read_bytes().startswith(b"\x89PNG")
    asked["--csv"] = "no/where.csv"
    grader.keep(lines.append, SimpleNamespace(getoption=asked.get))
    assert lines[-1] == "\nno/where.csv cannot be written: No such file or directory"


def test_a_rule_to_be_like_that_cannot_be_read_is_no_submissions_fault():
    asked = {"--seconds": 120, "--rule": ["fine.py:MyRule"], "--like": "no.py:MyRule"}
    config = SimpleNamespace(getoption=asked.get, option=SimpleNamespace())
    with pytest.raises(pytest.UsageError, match="--like no.py: No such file or directory"):
        conftest.pytest_configure(config)
