"""harness/rulefile.py: a rule out of anybody's file trains like a built-in one, its hyperparameters are part
of the run's identity, and whatever is wrong with it is one line that names the file and the line in it."""
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_reproduce import counted

import reproduce
import train
from harness import experiment, flags, rulefile

HEAD = "import fa, torch\nclass MyRule(fa.FA):\n"
BACKWARD = "    def backward(self, layer, error, input_shape):\n        "
KEEPS = "    def prepare(self, layer):\n        super().prepare(layer)\n        self.kept = {}\n"
MINE, SMALL = "my_rule.py:MyRule", ["--device", "cpu", "--subset", "128", "--width", "4", "--epochs", "2"]
(SIGNS,) = [block for block in re.findall("```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
            if "class MyRule" in block]                         # the README's rule is a whole file


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def refused(capsys):
    """The line that a command says before it ends with status 2, and that it leaves nothing behind."""
    def run(*argv, main=train.main):
        before = set(Path().rglob("*"))
        with pytest.raises(SystemExit) as stopped:
            main([*argv])
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.count("\n") == 1 and "Traceback" not in error, error
        assert set(Path().rglob("*")) == before
        return error
    return run


def write(source, name="my_rule.py"):
    Path(name).write_text(source)


def test_the_readmes_rule_from_a_file_is_sign_symmetry(tmp_path):
    write(SIGNS)
    assert len(SIGNS.splitlines()) <= 10
    for rule, out in (("sign", "built-in"), (MINE, "own")):
        assert train.main(["--rule", rule, "--muon", "--norm", *SMALL, "--out", out]) == 0
    ours, own = ([{k: v for k, v in json.loads(line).items() if k != "seconds"}
                  for line in (tmp_path / out / "log.jsonl").read_text().splitlines()]
                 for out in ("built-in", "own"))
    assert ours == own
    assert not list(tmp_path.glob("**/__pycache__"))
    args = json.loads((tmp_path / "own" / "config.json").read_text())["args"]
    assert args["rule"] == MINE and args["rule_digest"] == rulefile.digest(MINE)


BROKEN = {                                                      # source: (line in it or None, what is said)
    HEAD + BACKWARD + "retrn error\n": (4, "SyntaxError: invalid syntax; expected Python"),
    "import fa\nimport nowhere_to_be_found\n": (2, "ModuleNotFoundError"),
    "import sys\nsys.exit(3)\n": (2, "SystemExit"),
    "import fa\nclass Other(fa.FA): pass\n": (None, "has no class MyRule; expected one of: Other"),
    "MyRule = 3\n": (None, "MyRule is not a subclass of fa.Rule; expected one of: class MyRule(fa.FA)"),
    "import fa\nclass MyRule(fa.Rule): pass\n": (None, "MyRule has no backward"),
    HEAD + BACKWARD + "return error\n":
        (3, "returned a tensor of shape (4, 3), torch.float32 on cpu for Linear(in_features=5, "
            "out_features=3, bias=True); expected the error at its input, shape (4, 5)"),
    HEAD + BACKWARD + "return super().backward(layer, error, input_shape) / 0\n":
        (3, "returned NaN or infinity for Linear"),
    HEAD + BACKWARD + "raise SystemExit(0)\n": (4, "in backward: SystemExit: 0"),
    HEAD + BACKWARD + "return error * self.targets[0]\n": (4, "in backward: TypeError"),
    HEAD + BACKWARD + "return layer.input * error.sum()\n":
        (4, "has no attribute 'input'; expected needs_input = True in the class"),
    HEAD + "    def before_step(self):\n        pass\n":
        (3, "MyRule.before_step cannot be called as before_step(self, layer)"),
    HEAD + "    backward = None\n": (None, "MyRule.backward cannot be called as backward(self, layer,"),
    HEAD + "    def before_step(self, layer):\n        raise ValueError('two\\nlines')\n":
        (4, "in before_step: ValueError: two lines"),
    HEAD + "    def before_step(self, layer):\n        layer.feedback.mul_(0.9)\n":
        (None, "MyRule changes its feedback weights; expected fixed ones, or learns = True in the class"),
    HEAD + "    def __init__(self):\n        super().__init__()\n":
        (None, "expected an __init__(self, seed=0, ...)"),
    HEAD + "    def __init__(self, seed=0):\n        pass\n": (None, "does not call super().__init__(seed)"),
    HEAD + KEEPS.format("{layer: 1}"): (None, "self.kept of MyRule cannot be saved in a checkpoint"),
}


@pytest.mark.parametrize("source", BROKEN, ids=[said[:40] for _, said in BROKEN.values()])
def test_a_broken_file_is_one_line_and_nothing_is_left_behind(source, refused):
    write(source)
    error, (number, said) = refused("--rule", MINE, *SMALL), BROKEN[source]
    assert "my_rule.py" + (f", line {number}" if number else "") in error and said in error, error


def test_a_file_that_cannot_be_read(refused):
    Path("binary.py").write_bytes(b"\xff\xfe\x00")
    for text, said in {
        "missing.py:MyRule": "missing.py: No such file or directory; expected a Python file with the class",
        "lottery": "'lottery' is no rule: choose from bp, fa, dfa, sign, kp, frozen, or name a class in a",
        "binary.py:MyRule": "binary.py: 'utf-8' codec can't decode",
    }.items():
        assert said in refused("--rule", text)
    assert "missing.py: No such" in refused("quick", "--rule", "missing.py:MyRule", main=reproduce.main)


@pytest.mark.parametrize("wrong, said", {
    "return error[:0]": "late.py, line 4: MyRule.backward returned a tensor of shape (0,",
    "raise KeyError('late')": "late.py, line 7, in backward: KeyError: 'late'",
    "raise SystemExit(0)": "late.py, line 7, in backward: SystemExit: 0"}.items())
def test_an_error_in_the_middle_of_a_run_names_its_line_and_keeps_the_epochs_before_it(wrong, said, capsys):
    write(HEAD + "    calls = 0\n" + BACKWARD + "MyRule.calls += 1\n        if MyRule.calls > 60:\n"
          f"            {wrong}\n        return super().backward(layer, error, input_shape)\n", "late.py")
    assert train.main(["--rule", "late.py:MyRule", *SMALL, "--batch-size", "16"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"train.py: {said}") and error.count("\n") == 1
    (folder,) = Path("runs").iterdir()
    assert folder.name == "late.MyRule-gratings-cnn-s0"
    assert (folder / "log.jsonl").read_text().count("\n") == 1


def test_an_error_of_ours_is_not_blamed_on_the_file(monkeypatch):
    write(SIGNS)
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main(["--rule", MINE, *SMALL])


DECAY = HEAD + """    def __init__(self, seed=0, decay=0.5, sign=False):
        super().__init__(seed)
        if decay < 0:
            raise ValueError("decay is below 0")
        self.decay, self.sign = decay, sign

""" + BACKWARD + "return super().backward(layer, error * self.decay, input_shape)\n"


def test_hyperparameters_are_the_constructors_and_part_of_a_runs_identity():
    write(DECAY)
    made = rulefile.make(rulefile.load(f"{MINE}(sign=True, decay=0.25)"), 3)
    plain = rulefile.make(rulefile.load(MINE), 3)
    assert (made.decay, made.sign, plain.decay) == (0.25, True, 0.5) and type(made).__name__ == "MyRule"
    assert torch.equal(made.generator.get_state(), plain.generator.get_state())
    args = vars(flags.parse(["--rule", f"{MINE}( sign=True,decay = 2.0)"]))
    assert args["rule"] == f"{MINE}(decay=2, sign=True)"        # one text for all spellings
    assert experiment.key(args, 2) != experiment.key({**args, "rule": MINE}, 2)


@pytest.mark.parametrize("rule, gain, orthogonal", [
    ("fa(gain=3)", 3.0, False), (experiment.ORTHOGONAL, None, True),
    (f"{experiment.ORTHOGONAL}(gain=3)", 3.0, True)])
def test_results_from_when_they_were_flags_are_found(rule, gain, orthogonal):
    asked = vars(flags.parse(["--rule", rule]))
    plain = {**asked, "rule": "fa", "rule_digest": None}
    old = {**plain, "feedback_gain": gain, "feedback_orthogonal": orthogonal}
    assert experiment.key(old, 2) == experiment.key(asked, 2) != experiment.key(plain, 2)


@pytest.mark.parametrize("rule, said", {
    "fa(seed=3)": "FA has no hyperparameter seed; it takes gain (and --seed gives its seed)",
    "fa(gain=1e999)": "expected a finite number above 0",
    "fa(3)": "expected NAME=VALUE",
    "fa(gain=[3])": "expected NAME=VALUE",
    "fa(gain=open('x'))": "expected NAME=VALUE",
    "fa(gain=3": "is no rule",
    "my_rule.py:MyRule(decya=1)": "my_rule.py: MyRule has no hyperparameter decya; it takes decay, sign",
    "my_rule.py:MyRule(decay=-1)": "my_rule.py: MyRule(seed=0) failed: decay is below 0",
}.items())
def test_a_wrong_hyperparameter_is_one_line(rule, said, refused):
    write(DECAY)
    assert said in refused("--rule", rule, *SMALL)


@pytest.mark.parametrize("source", [KEEPS.format("[1, 'two', {3: torch.ones(1)}]"),
                                    KEEPS.format("{layer: 1}").replace("self.kept", "self._kept"),
                                    KEEPS.format("{layer: 1}") + "    state_dict = dict\n"])
def test_what_a_rule_keeps_can_be_saved_or_is_its_own_affair(source):
    write(HEAD + source)
    assert rulefile.load(MINE)


def test_a_changed_file_is_another_rule():
    digests = []
    for source in (SIGNS, SIGNS.replace("uses_weight = True", "uses_weight = 3"), SIGNS):
        write(source)
        digests.append(rulefile.digest(MINE))
        assert rulefile.load(MINE).uses_weight == (3 if len(digests) == 2 else 1)
    assert digests[0] == digests[2] != digests[1] and rulefile.digest("fa") is None


def test_trying_a_rule_leaves_the_generators_alone():
    write(HEAD + BACKWARD + "torch.rand(3)\n        return None\n")
    torch.manual_seed(0)
    before = torch.get_rng_state()
    rulefile.load(MINE)
    assert torch.equal(torch.get_rng_state(), before)


def test_reproduce_puts_it_beside_feedback_alignment(tmp_path, monkeypatch):
    write(SIGNS)
    cells = {"backprop": "--rule bp", "FA": "--rule fa", "FA + norm": "--rule fa --norm"}
    one, calls = reproduce.Experiment("a claim", "", cells), counted(monkeypatch)
    assert experiment.beside(one, MINE).cells == {**cells, "my_rule.MyRule": f"--rule {MINE}",
                                                  "my_rule.MyRule + norm": f"--rule {MINE} --norm"}
    none = one._replace(cells={"DFA": "--rule dfa"})
    monkeypatch.setattr(reproduce, "EXPERIMENTS", {"tiny": one, "none": none})
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path / "results")
    assert reproduce.main(["tiny", "--device", "cpu", "--rule", MINE]) == 0 and len(calls) == 5
    assert not Path("results").exists() and Path("mine/tiny.jsonl").read_text().count("\n") == 5
    assert reproduce.main(["none", "--device", "cpu", "--rule", MINE]) == 2
