"""tutorial.ipynb: its saved outputs are those of one whole run, it repeats no lesson, and it still runs."""
import ast
import json
import re
import shutil

import pytest

from conftest import ROOT

PATH = ROOT / "tutorial.ipynb"
LESSONS = ("fa", "muon", "norm", "rank", "models", "data", "train")


def cells(kind):
    notebook = json.loads(PATH.read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def pictures(cell):
    return sum("image/png" in output.get("data", {}) for output in cell["outputs"])


def defined(code):
    """The functions and classes that this code defines, but for methods."""
    return {node.name for node in ast.parse(code).body
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}


# ---- as it is saved ----------------------------------------------------------------------------------------

def test_it_is_a_valid_notebook_and_small():
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(nbformat.read(PATH, as_version=4))
    assert PATH.stat().st_size < 1_000_000


def test_every_cell_has_run_once_from_the_first_to_the_last():
    assert [cell["execution_count"] for cell in cells("code")] == list(range(1, len(cells("code")) + 1))


def test_no_output_is_an_error_or_names_a_folder_of_the_machine_that_made_it():
    shown = 0
    for cell in cells("code"):
        for output in cell["outputs"]:
            assert output["output_type"] != "error" and output.get("name") != "stderr", source(cell)
            # A picture is base64, in which any four letters may turn up.
            data = {kind: text for kind, text in output.get("data", {}).items() if kind != "image/png"}
            said = json.dumps([output.get("text"), data])
            assert not re.search(r"/tmp|/work|/root|/home|Traceback", said), said
        shown += pictures(cell)
    assert shown >= 8


def test_it_defines_nothing_that_a_lesson_defines():
    lessons = set().union(*(defined((ROOT / f"{name}.py").read_text(encoding="utf-8")) for name in LESSONS))
    assert {"project", "newton_schulz", "Trainer"} <= lessons           # it looks at the right things
    for cell in cells("code"):
        assert not defined(source(cell)) & lessons, source(cell)


def test_it_imports_every_lesson_and_links_only_to_what_there_is():
    code = "\n".join(source(cell) for cell in cells("code"))
    assert all(re.search(rf"^import {name}$", code, re.MULTILINE) for name in LESSONS)
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", "\n".join(source(cell) for cell in cells("markdown")))
    assert links and all((ROOT / link).is_file() for link in links), links


# ---- as it runs --------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_it_runs_and_leaves_nothing_behind(monkeypatch, tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    for place in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):                 # what Jupyter keeps, usually at home
        monkeypatch.setenv(place, str(tmp_path / place))
    copy = tmp_path / "copy"                    # in which nobody else writes
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "data", "runs", "mine"))
    written = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()}
    notebook = nbformat.read(PATH, as_version=4)
    nbclient.NotebookClient(notebook, timeout=3600, kernel_name="python3",
                            resources={"metadata": {"path": str(copy)}}).execute()
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()} == written
    ran = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [pictures(cell) for cell in ran] == [pictures(cell) for cell in cells("code")]
