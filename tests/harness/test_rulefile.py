"""A rule out of anybody's file: it trains like a built-in one, and whatever is wrong with it is one line."""
import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_reproduce import counted

import fa
import reproduce
import train
from harness import experiment, flags, rulefile

HEAD = "import fa, torch\nclass MyRule(fa.FA):\n"
BACKWARD = "    def backward(self, layer, error, input_shape):\n        "
SIGNS = HEAD + "    uses_weight = True\n" + BACKWARD + \
    "return fa.project(layer, layer.weight.sign() * layer.feedback.abs(), error, input_shape)\n"
KEEPS = "    def prepare(self, layer):\n        super().prepare(layer)\n        self.kept = {}\n"
SMALL = ["--device", "cpu", "--subset", "128", "--width", "4", "--epochs", "2"]

BROKEN = {                                                      # source: (line in it or None, what is said)
    HEAD + BACKWARD + "retrn error\n": (4, "SyntaxError: invalid syntax; expected Python"),
    HEAD + "  pass\n    pass\n": (4, "IndentationError"),
    "import fa\nimport nowhere_to_be_found\n": (2, "ModuleNotFoundError"),
    "import fa\n1 / 0\n": (2, "ZeroDivisionError: division by zero"),
    "import sys\nsys.exit(3)\n": (2, "SystemExit"),
    HEAD + BACKWARD + "raise SystemExit(0)\n": (4, "in backward: SystemExit: 0"),
    "import fa\nclass Other(fa.FA): pass\n": (None, "has no class MyRule; expected one of: Other"),
    "class MyRule: pass\n": (None, "MyRule is not a subclass of fa.Rule"),
    "MyRule = 3\n": (None, "MyRule is not a subclass of fa.Rule; expected one of: class MyRule(fa.FA)"),
    "import fa\nclass MyRule(fa.Rule): pass\n": (None, "MyRule has no backward"),
    HEAD + BACKWARD + "return layer.feedbck\n":
        (4, "in backward: AttributeError: 'Linear' object has no attribute 'feedbck'"),
    HEAD + BACKWARD + "return error\n":
        (3, "returned a tensor of shape (4, 3), torch.float32 on cpu for Linear(in_features=5, "
            "out_features=3, bias=True); expected the error at its input, shape (4, 5)"),
    HEAD + BACKWARD + "return super().backward(layer, error, input_shape).double()\n":
        (3, "torch.float64 on cpu for Linear"),
    HEAD + BACKWARD + "return super().backward(layer, error, input_shape) / 0\n":
        (3, "returned NaN or infinity for Linear"),
    HEAD + BACKWARD + "return 'error'\n": (3, "MyRule.backward returned 'error' for Linear"),
    HEAD + "    def backward(self, layer):\n        return None\n": (None, "TypeError"),
    HEAD + "    def prepare(self, layer):\n        layer.weight.no_such\n": (4, "in prepare: AttributeError"),
    HEAD + "    def before_step(self, layer):\n        raise KeyError('me')\n":
        (4, "in before_step: KeyError: 'me'"),
    HEAD + "    def __init__(self):\n        super().__init__()\n":
        (None, "expected an __init__(self, seed=0, ...)"),
    HEAD + "    def __init__(self, seed=0):\n        pass\n": (None, "does not call super().__init__(seed)"),
    HEAD + KEEPS.format("{layer: 1}"):
        (None, "self.kept of MyRule cannot be saved in a checkpoint; expected tensors, numbers, texts, and "
               "lists or dictionaries of them; give it a name that begins with _ or override state_dict"),
    HEAD + KEEPS.format("lambda: 1"): (None, "self.kept of MyRule cannot be saved in a checkpoint"),
}


@pytest.mark.parametrize("source", BROKEN, ids=[said[:40] for _, said in BROKEN.values()])
def test_a_broken_file_is_one_line_and_nothing_is_left_behind(source, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rule.py").write_text(source)
    for main in (train.main, lambda argv: reproduce.main(["quick", *argv[:2]])):
        with pytest.raises(SystemExit) as stopped:
            main(["--rule", "my_rule.py:MyRule", *SMALL])
        error = capsys.readouterr().err
        number, said = BROKEN[source]
        assert stopped.value.code == 2 and error.count("\n") == 1 and "Traceback" not in error
        assert (("my_rule.py" if number is None else f"my_rule.py, line {number}") in error
                and said in error), error
    assert [p.name for p in tmp_path.iterdir()] == ["my_rule.py"]


@pytest.mark.parametrize("text, said", {
    "missing.py:MyRule": "missing.py: No such file or directory; expected a Python file with the class "
                         "MyRule",
    ".:MyRule": ".: Is a directory; expected a Python file",
    "lottery": "'lottery' is no rule: choose from bp, fa, dfa, sign, kp, frozen, or name a class in a file "
               "of yours",
    "my_rule.py": "'my_rule.py' is no rule: choose from",
    "binary.py:MyRule": "binary.py: 'utf-8' codec can't decode",
}.items())
def test_a_file_that_cannot_be_read(text, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SystemExit) as stopped:
        train.main(["--rule", text])
    assert stopped.value.code == 2 and said in capsys.readouterr().err


def test_an_error_in_the_middle_of_a_run_names_its_line(tmp_path, monkeypatch, capsys):
    """On the command line as a student sees it: status 2, one line, and the epochs before it are kept."""
    late = HEAD + "    calls = 0\n" + BACKWARD + (
        "MyRule.calls += 1\n        if MyRule.calls > 60:\n            return error[:0]\n"
        "        return super().backward(layer, error, input_shape)\n")
    (tmp_path / "late.py").write_text(late)
    done = subprocess.run([sys.executable, ROOT / "train.py", "--rule", "late.py:MyRule", *SMALL,
                           "--batch-size", "16"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("train.py: late.py, line 4: MyRule.backward returned a tensor of shape (0,")
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder.name == "late.MyRule-gratings-cnn-s0"
            and len((folder / "log.jsonl").read_text().splitlines()) == 1)

    for wrong, said in (("raise KeyError('late')", "late.py, line 7, in backward: KeyError: 'late'"),
                        ("1 / 0", "ZeroDivisionError"),
                        ("raise SystemExit(0)", "in backward: SystemExit: 0")):
        (tmp_path / "late.py").write_text(late.replace("return error[:0]", wrong))
        monkeypatch.chdir(tmp_path)
        assert train.main(["--rule", "late.py:MyRule", *SMALL, "--batch-size", "16"]) == 2
        assert said in capsys.readouterr().err


def test_what_a_rule_keeps_can_be_saved_or_is_its_own_affair(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, source in enumerate([KEEPS.format("[1, 'two', {3: torch.ones(1)}]"),
                                     KEEPS.format("{layer: 1}").replace("self.kept", "self._kept"),
                                     KEEPS.format("{layer: 1}")
                                     + "    def state_dict(self):\n        return {}\n"]):
        (tmp_path / f"rule{number}.py").write_text(HEAD + source)
        assert rulefile.load(f"rule{number}.py:MyRule")
    (tmp_path / "unsaved.py").write_text(HEAD + KEEPS.format("{layer: 1}"))
    assert rulefile.load("unsaved.py:MyRule", saves=False)      # for the grader, which takes a point for it
    with pytest.raises(rulefile.RuleFileError, match="cannot be saved"):
        rulefile.load("unsaved.py:MyRule")


def test_an_error_of_ours_is_not_blamed_on_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rule.py").write_text(SIGNS)
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main(["--rule", "my_rule.py:MyRule", *SMALL])


def test_sign_symmetry_from_a_file_is_sign_symmetry(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rule.py").write_text(SIGNS)
    assert len(SIGNS.splitlines()) <= 10
    for rule, out in (("sign", "built-in"), ("my_rule.py:MyRule", "own")):
        assert train.main(["--rule", rule, "--muon", "--norm", *SMALL, "--out", out]) == 0
    ours, own = ([{k: v for k, v in json.loads(line).items() if k != "seconds"}
                  for line in (tmp_path / out / "log.jsonl").read_text().splitlines()]
                 for out in ("built-in", "own"))
    assert ours == own
    assert not list(tmp_path.glob("**/__pycache__"))
    args = json.loads((tmp_path / "own" / "config.json").read_text())["args"]
    assert args["rule"] == "my_rule.py:MyRule" and args["rule_digest"] == rulefile.digest("my_rule.py:MyRule")


def test_a_changed_file_is_another_rule(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    digests = []
    for source in (SIGNS, SIGNS + "\n# changed\n", SIGNS):
        (tmp_path / "my_rule.py").write_text(source)
        digests.append(rulefile.digest("my_rule.py:MyRule"))
        assert rulefile.load("my_rule.py:MyRule").uses_weight is True
    assert digests[0] == digests[2] != digests[1] and rulefile.digest("fa") is None
    (tmp_path / "my_rule.py").write_text(SIGNS.replace("uses_weight = True", "uses_weight = 3"))
    assert rulefile.load("my_rule.py:MyRule").uses_weight == 3


def test_a_constructor_of_ones_own_need_not_know_gain(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rule.py").write_text(
        HEAD + "    def __init__(self, seed=0):\n        super().__init__(seed)\n")
    chosen = rulefile.load("my_rule.py:MyRule")
    assert isinstance(rulefile.make(chosen, 0), fa.FA)
    with pytest.raises(SystemExit):
        train.main(["--rule", "my_rule.py:MyRule(gain=3)", *SMALL])
    assert "my_rule.py: MyRule has no hyperparameter gain; it takes none" in capsys.readouterr().err


DECAY = HEAD + """    def __init__(self, seed=0, decay=0.5, sign=False):
        super().__init__(seed)
        if decay < 0:
            raise ValueError("decay is below 0")
        self.decay, self.sign = decay, sign

""" + BACKWARD + "return super().backward(layer, error * self.decay, input_shape)\n"


def test_hyperparameters_are_the_constructors_and_part_of_a_runs_identity(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rule.py").write_text(DECAY)
    made = rulefile.make(rulefile.load("my_rule.py:MyRule(sign=True, decay=0.25)"), 3)
    plain = rulefile.make(rulefile.load("my_rule.py:MyRule"), 3)
    assert (made.decay, made.sign, plain.decay) == (0.25, True, 0.5) and type(made).__name__ == "MyRule"
    assert torch.equal(made.generator.get_state(), plain.generator.get_state())
    assert train.main(["--rule", "my_rule.py:MyRule( sign=True,decay = 2.0)", *SMALL, "--out", "run"]) == 0
    args = json.loads((tmp_path / "run" / "config.json").read_text())["args"]
    assert args["rule"] == "my_rule.py:MyRule(decay=2, sign=True)"             # one text for all spellings
    keys = {experiment.key({**args, "rule": rule}, 2) for rule in (args["rule"], "my_rule.py:MyRule")}
    assert len(keys) == 2
    for name, built_in in (("fa(gain=3)", 3), ("dfa(gain=2.5)", 2.5)):
        assert rulefile.make(rulefile.load(name), 0).gain == built_in
    assert train.main(["--resume", "run", "--epochs", "3"]) == 0


@pytest.mark.parametrize("rule, gain, orthogonal", [
    ("fa(gain=3)", 3.0, False), (experiment.ORTHOGONAL, None, True),
    (f"{experiment.ORTHOGONAL}(gain=3)", 3.0, True)])
def test_results_from_when_they_were_flags_are_found(rule, gain, orthogonal):
    asked = vars(flags.parse(["--rule", rule]))
    plain = {**asked, "rule": "fa", "rule_digest": None}
    old = {**plain, "feedback_gain": gain, "feedback_orthogonal": orthogonal}
    assert experiment.key(old, 2) == experiment.key(asked, 2) != experiment.key(plain, 2)


@pytest.mark.parametrize("rule, said", {
    "fa(gian=3)": "FA has no hyperparameter gian; it takes gain (and --seed gives its seed)",
    "fa(seed=3)": "FA has no hyperparameter seed",
    "bp(gain=3)": "BP has no hyperparameter gain; it takes none",
    "fa(gain=0)": "gain=0: expected a finite number above 0",
    "fa(gain=1e999)": "expected a finite number above 0",
    "fa(3)": "expected NAME=VALUE",
    "fa(gain=[3])": "expected NAME=VALUE",
    "fa(gain=open('x'))": "expected NAME=VALUE",
    "fa(gain=3": "is no rule",
    "fa(gain=3) + 1": "is no rule",
    "fa(gain='big')": "FA(seed=0) failed",
    "nothing(gain=3)": "'nothing' is no rule",
    "my_rule.py:MyRule(decya=1)": "my_rule.py: MyRule has no hyperparameter decya; it takes decay, sign",
    "my_rule.py:MyRule(decay=-1)": "my_rule.py: MyRule(seed=0) failed: decay is below 0",
}.items())
def test_a_wrong_hyperparameter_is_one_line(rule, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rule.py").write_text(DECAY)
    with pytest.raises(SystemExit) as stopped:
        train.main(["--rule", rule, *SMALL])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and said in error, error


def test_trying_a_rule_leaves_the_generators_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rule.py").write_text(HEAD + BACKWARD + "torch.rand(3)\n        return None\n")
    torch.manual_seed(0)
    before = torch.get_rng_state()
    rulefile.load("my_rule.py:MyRule")
    assert torch.equal(torch.get_rng_state(), before)


def test_reproduce_puts_it_beside_feedback_alignment(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rule.py").write_text(SIGNS)
    calls = counted(monkeypatch)
    experiment = reproduce.Experiment("a claim", "",
                                      {"backprop": "--rule bp", "FA": "--rule fa",
                                       "FA + norm": "--rule fa --norm"})
    monkeypatch.setattr(reproduce, "EXPERIMENTS",
                        {"tiny": experiment, "none": experiment._replace(cells={"backprop": "--rule bp"})})
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(reproduce, "README", tmp_path / "README.md")
    assert reproduce.main(["tiny", "--device", "cpu"]) == 0
    committed = (tmp_path / "results" / "tiny.jsonl").read_text()
    capsys.readouterr()
    assert reproduce.main(["tiny", "--device", "cpu", "--rule", "my_rule.py:MyRule"]) == 0
    printed = capsys.readouterr().out
    assert len(calls) == 5 and calls[-1].argv[:3] == ["--rule", "my_rule.py:MyRule", "--norm"]
    assert ("3 of 5 runs are in" in printed and "| my_rule.MyRule | " in printed
            and "| my_rule.MyRule + norm | " in printed)
    assert (tmp_path / "results" / "tiny.jsonl").read_text() == committed   # one's own goes elsewhere
    assert len((tmp_path / "mine" / "tiny.jsonl").read_text().splitlines()) == 5
    assert (tmp_path / "mine" / "tiny.png").exists()
    assert reproduce.main(["none", "--device", "cpu", "--rule", "dfa"]) == 2


def test_the_readmes_rule_is_a_whole_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall("```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (code,) = [block for block in blocks if "class MyRule" in block]
    (tmp_path / "my_rule.py").write_text(code)
    assert len(code.splitlines()) <= 10
    layer, error = torch.nn.Linear(4, 3), torch.randn(2, 3)
    both = [rulefile.make(rulefile.load(text), 0) for text in ("my_rule.py:MyRule", "sign")]
    sent = []
    for one in both:
        one.prepare(layer)
        sent.append(one.backward(layer, error, torch.Size((2, 4))))
    assert torch.equal(*sent)


def test_what_a_rule_must_declare_is_noticed_before_the_training(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    moves = "    def before_step(self, layer):\n        layer.feedback.mul_(0.9)\n"
    unasked = BACKWARD + "return error * self.targets[0]\n"
    for body, said in ((moves, "my_rule.py: MyRule changes its feedback weights; expected fixed ones, or"),
                       (unasked, "my_rule.py, line 4, in backward: TypeError")):
        body = HEAD + body
        (tmp_path / "my_rule.py").write_text(body)
        with pytest.raises(SystemExit):
            train.main(["--rule", "my_rule.py:MyRule", *SMALL])
        assert said in capsys.readouterr().err
