"""The course of assignments/: a stub fails, its solution passes, and what is wrong with others is said.

Wrong solutions are made of the right ones in tests/solutions/.
"""
import csv
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow

RULES, FUNCTIONS = "test_rule_contract.py", "test_orthogonal_contract.py"
B, SENT = "layer.feedback.to(error.dtype)", "return super().backward(layer, error, input_shape)"
GRADIENT = "layer.feedback.grad = products(layer, error, layer.input)"
NOISE = "torch.randn(layer.input.shape, generator=self.generator)"
MOVE = "layer.feedback += self.rate * (mean - layer.feedback)"
SIGNS = "layer.weight.sign() * layer.feedback.abs()"

QUICK = ["-k", "not learns"]
# stub: (solution, what checks it, further arguments, {a wrong line: (what it replaces, what is said)})
COURSE = {
    "1_project.py:MyRule": ("project.py", RULES, [*QUICK, "--like", "fa"], {
        "layer.weight.detach().to(error.dtype)": (B, "backward reads W"),
        "error @ B.mT": ("error @ B", "in backward: RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
        "more = 0": ("more = [wanted - size for wanted, size in zip(input_shape[2:], reached)]",
                     "expected the error at its input, shape"),
        "None, layer.stride, 0, more": ("None, layer.stride, layer.padding, more",
                                        "MyRule.backward returned a tensor of shape"),
        "error, B.flip(2, 3), None": ("error, B, None", "differ from what they are under fa"),
    }),
    "2_newton_schulz.py:orthogonalise": ("newton_schulz.py", FUNCTIONS, [], {
        "X = matrix / 1": ("X = matrix / (matrix.norm() + 1e-30)", "divide by the norm first"),
        "X = matrix / matrix.norm()": ("X = matrix / (matrix.norm() + 1e-30)", "division by its norm"),
        "(3 * X + X @ X.mT @ X) / 2": ("(3 * X - X @ X.mT @ X) / 2", "it returned NaN or infinity"),
        "range(3)": ("range(steps)", "where all should be 1 to 0.01"),
        "X = matrix.div_(matrix.norm() + 1e-30)": ("X = matrix / (matrix.norm() + 1e-30)",
                                                   "it changed the matrix that it was given"),
    }),
    "3_kolen_pollack.py:MyRule": ("kolen_pollack.py", RULES, [*QUICK, "--like", "kp"], {
        "super().prepare(layer)": ("layer.feedback = nn.Parameter(self.draw(layer))",
                                   "no parameters of the model, so no optimiser updates them"),
        "pass": (GRADIENT, "under kp, most of all 10.feedback"),
        "layer.feedback.grad = -products(layer, error, layer.input)": (GRADIENT, "are under kp"),
        "learns = False": ("learns = True", "the feedback weights changed in training"),
        "layer.feedback.data.copy_(layer.weight)": (GRADIENT, "backward reads W"),
    }),
    "4_weight_mirror.py:MyRule": ("weight_mirror.py", RULES, [*QUICK, "--aligns", "30"], {
        "layer.feedback -= self.rate * (mean - layer.feedback)": (MOVE, "the angle between W and B is"),
        "torch.ones(layer.input.shape)": (NOISE, "the angle between W and B is"),
        "layer.feedback += self.rate * mean.mean()": (MOVE, "the angle between W and B is"),
        "torch.rand(layer.input.shape, generator=self.generator)": (NOISE, "the angle between W and B is"),
        "uses_weight = False": ("uses_weight = True", "before_step reads W"),
    }),
    "5_your_own.py:MyRule": ("your_own.py", RULES, ["--beats", "fa"], {
        "layer.feedback": (SIGNS, "where fa reaches"),
        "0 * layer.feedback": (SIGNS, "where frozen hidden layers reach"),
        "self.draw(layer)": (SIGNS, "where fa reaches"),
        "layer.feedback.mT": (SIGNS, "RuntimeError"),
        "uses_weight = 0 == 1": ("uses_weight = True", "backward reads W"),
    }),
}


def wrong(solution, line, right):
    source = (ROOT / "tests" / "solutions" / solution).read_text()
    assert source.count(right) == 1, right
    return source.replace(right, line)


@pytest.mark.parametrize("stub", COURSE)
def test_the_stub_fails_its_solution_passes_and_wrong_ones_are_told_why(stub, tmp_path):
    solution, contract, options, faults = COURSE[stub]
    file, _, name = stub.partition(":")
    sources = {"solved": (ROOT / "tests" / "solutions" / solution).read_text(),
               "stub": (ROOT / "assignments" / file).read_text(),
               **{f"wrong{i}": wrong(solution, line, right)
                  for i, (line, (right, _)) in enumerate(faults.items())}}
    for each, source in sources.items():
        (tmp_path / f"{each}.py").write_text(source)
    command = [sys.executable, "-m", "pytest", ROOT / "tests" / contract, "-p", "no:cacheprovider"]
    done = subprocess.run([*command, "--rule", f"{tmp_path}/*.py:{name}", *options, "--csv", "grades.csv"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stdout
    with open(tmp_path / "grades.csv", newline="") as file:
        rows = {row["rule"].rpartition("/")[2].partition(".")[0]: row for row in csv.DictReader(file)}
    assert rows.keys() == sources.keys()
    assert rows["solved"]["score"] == rows["solved"]["of"] and not rows["solved"]["reasons"], done.stdout
    assert rows["stub"]["score"] == "0" and "NotImplementedError: " in rows["stub"]["reasons"], done.stdout
    for i, (_, said) in enumerate(faults.values()):
        row = rows[f"wrong{i}"]
        assert int(row["score"]) < int(row["of"]) and said in row["reasons"], (said, row["reasons"])


def test_grades_are_ranked_kept_in_a_table_and_drawn(tmp_path):
    sources = {"feedback": "import fa\nclass MyRule(fa.FA):\n    pass\n",
               "broken": "import fa\nclass MyRule(fa.FA):\n    def backward(self, layer):\n        pass\n",
               "signs": (ROOT / "tests" / "solutions" / "your_own.py").read_text()}
    for name, source in sources.items():
        (tmp_path / f"{name}.py").write_text(source)
    command = [sys.executable, "-m", "pytest", ROOT / "tests" / RULES, "-p", "no:cacheprovider", "--rule",
               "*.py:MyRule", "-k", "learns or finite"]
    done = subprocess.run([*command, "--csv", "grades.csv", "--picture", "grades.png"], cwd=tmp_path,
                          capture_output=True, text=True)
    ranking = [line.rpartition("  ")[2] for line in done.stdout.splitlines() if " of 2  " in line]
    assert ranking == ["signs.py:MyRule", "feedback.py:MyRule", "broken.py:MyRule"]
    rows = list(csv.DictReader(open(tmp_path / "grades.csv", newline="")))
    assert [row["score"] for row in rows] == ["2", "2", "0"] and [row["of"] for row in rows] == ["2"] * 3
    assert float(rows[0]["accuracy"]) > float(rows[1]["accuracy"]) > 30 and not rows[2]["accuracy"]
    assert any(key.startswith("learns the gratings") for key in rows[0])
    assert (tmp_path / "grades.png").read_bytes().startswith(b"\x89PNG")
    done = subprocess.run([*command, "-k", "finite", "--csv", "no/where.csv"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert "no/where.csv cannot be written: No such file or directory" in done.stdout
    assert "Traceback" not in done.stdout
