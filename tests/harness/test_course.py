"""The course of assignments/: a stub fails, its solution passes, and what is wrong with others is said.

Wrong solutions are made of the right ones in tests/solutions/.
"""
import csv
import subprocess
import sys

import pytest
from conftest import ROOT

RULES, FUNCTIONS = "test_rule_contract.py", "test_orthogonal_contract.py"
SIGNS, DIVIDED = "layer.weight.sign() * layer.feedback.abs()", "X = matrix / (matrix.norm() + 1e-30)"
QUICK = ["-k", "not learns"]
# stub: (solution, what checks it, further arguments, {a wrong line: (what it replaces, what is said)})
COURSE = {
    "1_project.py:MyRule": ("project.py", RULES, [*QUICK, "--like", "fa"], {
        "more = 0": ("more = [wanted - size for wanted, size in zip(input_shape[2:], reached)]",
                     "expected the error at its input, shape"),
        "error, B.flip(2, 3), None": ("error, B, None", "differ from what they are under fa"),
    }),
    "2_newton_schulz.py:orthogonalise": ("newton_schulz.py", FUNCTIONS, [], {
        "X = matrix / 1": (DIVIDED, "divide by the norm first"),
        "X = matrix / matrix.norm()": (DIVIDED, "division by its norm"),
        "range(3)": ("range(steps)", "where all should be 1 to 0.01"),
        "X = matrix.div_(matrix.norm() + 1e-30)": (DIVIDED, "it changed the matrix that it was given"),
    }),
    "3_kolen_pollack.py:MyRule": ("kolen_pollack.py", RULES, [*QUICK, "--like", "kp"], {
        "super().prepare(layer)": ("layer.feedback = nn.Parameter(self.draw(layer))",
                                   "no parameters of the model, so no optimiser updates them"),
        "pass": ("layer.feedback.grad = products(layer, error, layer.input)",
                 "under kp, most of all 10.feedback"),
        "learns = False": ("learns = True", "the feedback weights changed in training"),
    }),
    "4_weight_mirror.py:MyRule": ("weight_mirror.py", RULES, [*QUICK, "--aligns", "30"], {
        "-= self.rate *": ("+= self.rate *", "the angle between W and B is"),
        "uses_weight = False": ("uses_weight = True", "before_step reads W"),
    }),
    "5_your_own.py:MyRule": ("your_own.py", RULES, ["--beats", "fa", "--picture", "grades.png"], {
        "layer.feedback": (SIGNS, "where fa reaches"),
        "0 * layer.feedback": (SIGNS, "where frozen hidden layers reach"),
    }),
}


@pytest.mark.slow
@pytest.mark.parametrize("stub", COURSE)
def test_the_stub_fails_its_solution_passes_and_wrong_ones_are_told_why(stub, tmp_path):
    solution, contract, options, faults = COURSE[stub]
    file, _, name = stub.partition(":")
    solved = (ROOT / "tests" / "solutions" / solution).read_text()
    sources = {"solved": solved, "stub": (ROOT / "assignments" / file).read_text()}
    for i, (line, (right, _)) in enumerate(faults.items()):
        assert solved.count(right) == 1, right
        sources[f"wrong{i}"] = solved.replace(right, line)
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
    if "--picture" in options:
        reached = {name: float(row["accuracy"]) for name, row in rows.items() if row["accuracy"]}
        assert reached["solved"] > reached["wrong0"] > 30 and "stub" not in reached
        assert (tmp_path / "grades.png").read_bytes().startswith(b"\x89PNG")
