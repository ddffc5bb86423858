"""The grader: what a submission does is its own fault alone, is named for what it is, and is said once."""
import functools
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow

GRADER = [sys.executable, "-m", "pytest", ROOT / "tests" / "test_rule_contract.py", "-p", "no:cacheprovider"]
HEAD = "import fa, torch\nfrom torch import nn\nclass MyRule(fa.FA):\n"
PREPARE = "    def prepare(self, layer):\n        "
BEFORE_STEP = "    def before_step(self, layer):\n        "
BACKWARD = "    def backward(self, layer, error, input_shape):\n        "
LEARNS, USES = "    learns = True\n", "    uses_weight = True\n"
SEND = "return fa.project(layer, layer.feedback, error, input_shape)\n"
SIGNS = "return fa.project(layer, layer.weight.sign() * layer.feedback.abs(), error, input_shape)\n"
MIRROR = BEFORE_STEP + ("x = self.noise(layer)\n"                # noise in, correlation out
                        "        with torch.no_grad():\n"
                        "            y = layer.forward(x).flatten(1)\n"
                        "            layer.feedback += 1e-3 * y.mean()\n"
                        "    def noise(self, layer):\n"
                        "        shape = (2, layer.in_features) if isinstance(layer, nn.Linear) else (2, "
                        "layer.in_channels, 9, 9)\n"
                        "        return torch.randn(shape, generator=self.generator).to(layer.weight)\n")
EVERYTHING, W = "nothing could be checked", "does not read W"
CHANGES, SAVES, SEED = "leaves W and the error", "goes on from what it saved", "is deterministic"

SUBMISSIONS = {         # its name: (source, the properties that it lacks, what is said)
    "fine": (HEAD + "    pass\n", [], []),
    "signs": (HEAD + USES + BACKWARD + SIGNS, [], ["uses_weight = True; W is read in backward"]),
    # ---- weight transport
    "silent": (HEAD + BACKWARD + SIGNS, [W], ["backward reads W"]),
    "copies_when_prepared": (HEAD + PREPARE + "layer.register_buffer('feedback', layer.weight.data * 1)\n",
                             [W], ["prepare reads W"]),
    "copies_before_step": (HEAD + LEARNS + BEFORE_STEP + "layer.feedback.copy_(layer.weight)\n",
                           [W], ["before_step reads W"]),
    "copies_in_backward": (HEAD + LEARNS + BACKWARD + "layer.feedback.copy_(layer.weight)\n        " + SEND,
                           [W], ["backward reads W"]),
    "keeps_a_copy_of_its_own": (HEAD + "    copies = {}\n" + BACKWARD +
                                "W = self.copies.setdefault(layer, layer.weight.clone())\n        "
                                "return fa.project(layer, W, error, input_shape)\n",
                                [W, SAVES], ["backward reads W"]),
    "copies_by_a_hook": (HEAD + LEARNS + PREPARE + "super().prepare(layer)\n"
                         "        layer.register_forward_pre_hook("
                         "lambda layer, args: (layer.feedback.copy_(layer.weight), None)[1])\n",
                         [W, "leaves plain backprop"], ["is backprop's own"]),
    "mirror": (HEAD + LEARNS + USES + MIRROR, [], ["uses_weight = True; W is read in before_step"]),
    "mirror_that_says_nothing": (HEAD + LEARNS + MIRROR, [W], ["before_step reads W"]),
    "kp": (HEAD + LEARNS + PREPARE + "layer.feedback = nn.Parameter(self.draw(layer))\n" + BEFORE_STEP +
           "layer.feedback.grad = layer.weight.grad.clone()\n", [], []),
    # ---- W and the error are not its own
    "halves": (HEAD + BACKWARD + "error *= 0.5\n        " + SEND, [CHANGES],
               ["backward changes the error that it is given"]),
    "moves_w_itself": (HEAD + BEFORE_STEP + "layer.weight.data -= 0.1 * layer.weight.grad\n", [CHANGES],
                         ["before_step changes layer.weight"]),
    "decays": (HEAD + BACKWARD + "layer.weight.data *= 0.99\n        " + SEND, [CHANGES],
               ["backward changes layer.weight"]),
    # ---- what is not saved
    "forgetful": (HEAD + PREPARE + "self.B = getattr(self, 'B', {})\n"
                  "        self.B[layer] = self.draw(layer)\n" + BACKWARD +
                  "return fa.project(layer, self.B[layer], error, input_shape)\n", [SAVES],
                  ["cannot be saved"]),
    "counts": (HEAD + "    calls = 0\n" + BACKWARD + "self.calls += 1\n        "
               "return fa.project(layer, layer.feedback / self.calls, error, input_shape)\n", [], []),
    "counts_in_vain": (HEAD + "    calls = 0\n    def state_dict(self):\n        return {}\n"
                       "    def load_state_dict(self, state):\n        pass\n" + BACKWARD +
                       "self.calls += 1\n        "
                       "return fa.project(layer, layer.feedback / self.calls, error, input_shape)\n", [SAVES],
                       ["goes another way than the rule that was saved"]),
    "unseeded": (HEAD + PREPARE + "layer.register_buffer('feedback', torch.rand(layer.weight.shape) - 0.5)\n"
                 + BACKWARD + "return fa.project(layer, layer.feedback, error, input_shape)\n", [SEED], []),
    # ---- what must not touch its neighbours
    "nonsense": ("import fa\nnonsense (", EVERYTHING, ["nonsense.py, line 2: SyntaxError"]),
    "leaves": (HEAD + BACKWARD + "raise SystemExit(0)\n", EVERYTHING,
               ["leaves.py, line 5, in backward: SystemExit: 0"]),
    "leaves_late": (HEAD + "    calls = 0\n" + BACKWARD + "self.calls += 1\n"
                    "        if self.calls > 12: raise SystemExit(0)\n        " + SEND, None,
                    ["leaves_late.py, line 7, in backward: SystemExit: 0"]),
    "ends": (HEAD + BACKWARD + "import os; os._exit(0)\n", EVERYTHING,
             ["it ended Python itself, with exit status 0"]),
    "ends_late": (HEAD + "    def __deepcopy__(self, memo):\n        import os; os._exit(3)\n",
                  ["works after copy.deepcopy", "leaves plain backprop behind"], ["with exit status 3"]),
    "kills": (HEAD + BACKWARD + "import os, signal; os.kill(os.getpid(), signal.SIGKILL)\n", EVERYTHING,
              ["it was killed by SIGKILL"]),
    "crashes": (HEAD + BACKWARD + "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)\n", EVERYTHING,
                ["crashes.py, line 5, in backward: it was killed by SIGSEGV"]),
    "asks": ("input('Which rule? ')\n", EVERYTHING, ["asks.py, line 1: EOFError"]),
    "interrupts": ("raise KeyboardInterrupt\n", EVERYTHING, ["it ended Python itself, with exit status 2"]),
    "is_loud": ("print('loud ' * 10 ** 7)\n" + HEAD + "    pass\n", [], []),
    "lingers": ("import threading, time\nthreading.Thread(target=time.sleep, args=(10 ** 6,)).start()\n" +
                HEAD + "    pass\n", [], []),
    "uses_float64": ("import torch\ntorch.set_default_dtype(torch.float64)\n" + HEAD + "    pass\n",
                     None, []),
    "patches": ("import fa\nfa.project = lambda layer, weight, error, shape: error.new_zeros(shape)\n"
                "import warnings\nwarnings.simplefilter('error')\n" + HEAD + "    pass\n", None, []),
}


def graded(folder, *args, **submissions):
    """(What pytest did, the report by submission)."""
    for name, source in submissions.items():
        (folder / f"{name}.py").write_text(source)
    rules = [text for name in submissions for text in ("--rule", f"{name}.py:MyRule")]
    done = subprocess.run([*GRADER, *rules, *args], cwd=folder, capture_output=True, text=True)
    parts = [part for part in done.stdout.split("\n\n") if ".py:MyRule\n  " in part]
    return done, {part.split(".py:")[0].strip(): part for part in parts}


@pytest.fixture(scope="module")
def everybody(tmp_path_factory):
    return graded(tmp_path_factory.mktemp("submissions"), "-k", "not learns",
                  **{name: source for name, (source, _, _) in SUBMISSIONS.items()})


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


def test_the_report_needs_no_knowledge_of_pytest(everybody):
    done, parts = everybody
    assert done.returncode == 1 and parts.keys() == SUBMISSIONS.keys()
    assert "Traceback" not in done.stdout + done.stderr and "def test" not in done.stdout
    assert done.stdout.count("of 11  ") == len(SUBMISSIONS) and "loud loud" not in done.stdout


def test_one_that_never_ends(tmp_path):
    done, parts = graded(tmp_path, "--seconds", "3", "-k", "not learns",
                         loops=HEAD + BACKWARD + "while True: pass\n",
                         waits="import time\ntime.sleep(10 ** 6)\n")
    late = "it was still running after 3 seconds"
    assert f"nothing could be checked: loops.py, line 5, in backward: {late}" in parts["loops"]
    assert f"nothing could be checked: waits.py, line 2: {late}" in parts["waits"]


def test_a_rule_to_be_like_that_cannot_be_read_is_nobodys_fault(tmp_path):
    done, _ = graded(tmp_path, "--like", "no.py:MyRule", fine=HEAD + "    pass\n")
    assert done.returncode == 4 and "fine" not in done.stdout
    assert "--like no.py: No such file or directory" in done.stderr


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
    for pid in map(int, pids.read_text().split()):
        while True:                                             # killed; its parent may still have to notice
            try:
                state = open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0]
            except (FileNotFoundError, ProcessLookupError):
                break
            if state == "Z":
                break
            time.sleep(0.05)
