"""reproduce.py: runs what an experiment lists, and keeps the READMEs' tables to what results/ says."""
import json

import pytest

import reproduce
from harness import experiment, flags, pictures, tables

TINY = "--dataset gratings --subset 64 --width 2 --epochs 1"


@pytest.fixture(name="tiny")
def tiny_experiment(tmp_path, monkeypatch):
    """An experiment of two cells, with two READMEs and a results folder of its own."""
    one = reproduce.Experiment(
        "a claim", TINY, {"backprop": "--rule bp", "FA": "--rule fa"}, paper={"FA": 1.5}
    )
    monkeypatch.setattr(reproduce, "EXPERIMENTS", {"tiny": one})
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(reproduce, "READMES", [tmp_path / "README.md", tmp_path / "results" / "README.md"])
    monkeypatch.setattr(reproduce, "HEADLINE", [])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("before\n<!-- tiny -->\nold\n<!-- end -->\nafter\n")
    return tmp_path


def counted(monkeypatch, fail_at=None, seconds=1.0):
    """experiment.run without a process: makes a result, and counts the calls."""
    calls = []

    def run(path, job, *_):
        calls.append(job)
        if len(calls) == fail_at:
            raise KeyboardInterrupt
        args = {k: v for k, v in vars(flags.parse(job.argv)).items() if k not in experiment.NEUTRAL}
        accuracy = 0.5 + 0.1 * args["seed"]
        return {"experiment": path.stem, "label": job.label, "seed": args["seed"],
                "final_test_accuracy": accuracy, "args": args, "diverged": False, "seconds": seconds,
                "device": "a CPU", "version": flags.VERSION,
                "epochs": [{"epoch": 1, "test_accuracy": accuracy, "step": 2}]}

    monkeypatch.setattr(experiment, "run", run)
    return calls


def changed(monkeypatch, **fields):
    """The experiment with other fields."""
    monkeypatch.setitem(reproduce.EXPERIMENTS, "tiny", reproduce.EXPERIMENTS["tiny"]._replace(**fields))


def test_real_runs_become_results_a_table_and_a_picture(tiny, monkeypatch, capsys):
    changed(monkeypatch, common=TINY + " --rank", view="ranks", paper={})
    assert reproduce.main(["tiny", "--jobs", "2", "--device", "cpu"]) == 0
    lines = [json.loads(line) for line in (tiny / "results" / "tiny.jsonl").read_text().splitlines()]
    assert {line["label"] for line in lines} == {"backprop", "FA"}
    for line in lines:
        assert {"experiment", "seed", "diverged", "device", "commit", "versions"} <= line.keys()
        assert line["args"]["width"] == 2 and [record["epoch"] for record in line["rank"]] == [0, 1]
        assert line["data"]["train_images"] == 5000 and len(line["data"]["digest"]) >= 16
        assert line["final_test_accuracy"] == line["epochs"][-1]["test_accuracy"]
    assert (tiny / "results" / "tiny.png").read_bytes()[:4] == b"\x89PNG"
    line = next(line for line in lines if line["label"] == "FA")
    last = line["rank"][-1]["layers"]
    wanted = ", ".join(f"{last[f'layers.{i}']['gradient']['effective_rank']:.0f}" for i in range(4))
    readme = (tiny / "README.md").read_text()
    assert readme.startswith("before\n<!-- tiny -->\n|  | test ") and readme.endswith("<!-- end -->\nafter\n")
    assert f"| FA | {100 * line['final_test_accuracy']:.1f} | 1 | " in readme and f" | {wanted} | " in readme
    said = capsys.readouterr().out
    assert "| error δ | gradient | update | trajectory | cosine |" in said and "already" not in said
    assert reproduce.main(["tiny", "--device", "cpu"]) == 0
    assert "2 of 2 runs are in results/tiny.jsonl already" in capsys.readouterr().out


def test_the_real_readmes_say_what_results_say():
    assert reproduce.main(["--check"]) == 0


def test_the_tuned_learning_rates_are_the_grids_best():
    lines = experiment.results(reproduce.EXPERIMENTS["tune"], reproduce.RESULTS / "tune.jsonl")
    assert len(lines) == 8 * len(reproduce.EXPERIMENTS["tune"].columns)
    for label, flag in reproduce.TUNED.items():
        best = max((line for line in tables.select(lines, label) if not line["diverged"]),
                   key=lambda line: line["final_test_accuracy"])
        assert flag.split() == ["--muon-lr" if "Muon" in label else "--lr", best["column"]], label


def test_check_goes_red_when_a_number_is_edited_in_either_readme(tiny, monkeypatch, capsys):
    counted(monkeypatch)
    assert reproduce.main(["--check"]) == 2                     # there is nothing to compare with
    second = tiny / "results" / "README.md"
    second.parent.mkdir()
    second.write_text("<!-- tiny -->\nold\n<!-- end -->\n")
    assert reproduce.main(["tiny"]) == 0 and "| FA | 50.0 | 1 |" in second.read_text()
    for readme in (tiny / "README.md", second):
        assert reproduce.main(["--check"]) == 0
        readme.write_text(readme.read_text().replace("50.0", "51.0"))
        capsys.readouterr()
        assert reproduce.main(["--check"]) == 1 and f"{readme} differs" in capsys.readouterr().out
        assert reproduce.main(["tiny"]) == 0


def test_results_of_ones_own_leave_the_readmes_alone(tiny, monkeypatch, capsys):
    calls, readme = counted(monkeypatch), (tiny / "README.md").read_text()
    assert reproduce.main(["tiny", "--out", "mine", "--seeds", "2"]) == 0 and len(calls) == 4
    assert sorted(p.name for p in (tiny / "mine").iterdir()) == ["tiny.jsonl", "tiny.png"]
    assert (tiny / "README.md").read_text() == readme
    assert reproduce.main(["tiny"]) == 0 and len(calls) == 6
    assert reproduce.main(["tiny"]) == 0 and len(calls) == 6    # nothing is run again
    assert reproduce.main(["--check"]) == 0 and reproduce.main(["--check", "--out", "mine"]) == 1
    assert "differs from mine/" in capsys.readouterr().out
    (tiny / "file").write_text("")
    assert reproduce.main(["tiny", "--out", "file/mine"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("reproduce.py: ") and err.count("\n") == 1


def test_the_headline_is_of_the_largest_scale_that_has_all_rows(tiny, monkeypatch):
    readme, one = tiny / "README.md", reproduce.EXPERIMENTS["tiny"]
    large = one._replace(scale="All.")
    monkeypatch.setattr(reproduce, "EXPERIMENTS", {"tiny": one._replace(scale="Some."), "large": large})
    monkeypatch.setattr(reproduce, "HEADLINE", ["large", "tiny"])
    readme.write_text("<!-- headline -->\nold\n<!-- end -->\n")
    counted(monkeypatch)
    assert reproduce.main(["tiny"]) == 0 and "Some. One seed" in readme.read_text()
    counted(monkeypatch, fail_at=2)
    assert reproduce.main(["large"]) == 130 and reproduce.main(["tiny"]) == 0
    assert "Some. One seed" in readme.read_text() and "Full scale: All, on a CPU. One" in readme.read_text()
    counted(monkeypatch)
    assert reproduce.main(["large"]) == 0
    assert "All. One seed" in readme.read_text() and "Some." not in readme.read_text()


def test_the_table_has_means_and_deviations_beside_the_papers_numbers(tiny, monkeypatch, capsys):
    counted(monkeypatch)
    assert reproduce.main(["tiny", "--seeds", "3"]) == 0
    row = "| FA | 60.0 ± 10.0 | 3 | 1.5 | +58.5 |"
    assert row in (tiny / "README.md").read_text() and row in capsys.readouterr().out
    some = [{"label": "FA", "diverged": lost, "final_test_accuracy": None if lost else 0.25}
            for lost in (True, False)]
    table = tables.table(reproduce.EXPERIMENTS["tiny"], some)
    assert "| FA | 25.0 (1 of 2 diverged) | 2 | 1.5 | +23.5 |" in table and "not measured | 0 |" in table


def test_a_picture_marks_the_runs_that_diverged(monkeypatch):
    def line(label, *accuracies):
        return {"label": label, "diverged": None in accuracies, "final_test_accuracy": accuracies[-1],
                "args": {"dataset": "gratings", "validate": None},
                "epochs": [{"epoch": i, "test_accuracy": a} for i, a in enumerate(accuracies, 1)]}

    drawn = []
    monkeypatch.setattr(pictures, "save", lambda figure, path: drawn.append(figure.axes[0]))
    pictures.draw_epochs(None, reproduce.Experiment("", "", {"backprop": "", "FA": "", "FA + norm": ""}), [
        line("backprop", 0.5, 0.6, 0.7), line("FA", None), line("FA + norm", 0.3, 0.3, 0.4),
        line("FA + norm", 0.3, None)])
    names = {text.get_text(): text.xy[0] for text in drawn[0].texts if text.get_text() != "chance"}
    assert names == {"backprop": 3, "FA: diverged": 1, "FA + norm": 3}      # each where its last run ends
    marks = [curve.get_xydata().tolist() for curve in drawn[0].lines if curve.get_marker() == "x"]
    assert marks == [[[1, 10]], [[2, 10]]]                      # the epoch in which, at chance


def test_a_table_names_the_rows_that_are_not_measured_under_it():
    some = [{"label": "B", "diverged": False, "final_test_accuracy": 0.25, "args": {"dataset": "gratings"}}]
    table = experiment.table(reproduce.Experiment("", "", {"A": "", "B": "", "C, too": ""}), some)
    assert table.endswith("| B | 25.0 | 1 |\n\nNot measured yet: A; C, too.") and "| A |" not in table
    assert experiment.table(reproduce.Experiment("", "", {"B": ""}), some).endswith("| B | 25.0 | 1 |")


def test_what_is_announced_is_what_is_run(tiny, monkeypatch, capsys):
    calls = counted(monkeypatch)
    changed(monkeypatch, scale="One epoch.", cells={"FA": "--rule fa --lr {}"},
            columns={"0.1": "0.1", "0.2": "0.2"}, axis="learning rate", view="sweep")
    readme = (tiny / "README.md").read_text()
    assert reproduce.main(["tiny", "--set", "epochs=2", "width=3"]) == 0
    said = capsys.readouterr().out.splitlines()[0]
    assert said == "tiny: a claim One epoch. But with epochs=2, width=3."
    assert (tiny / "README.md").read_text() == readme           # it speaks of the experiment as listed
    assert reproduce.main(["tiny"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "tiny: a claim One epoch."
    table = "| learning rate | 0.1 | 0.2 |\n| --- | --- | --- |\n| FA | 50.0 | 50.0 |"
    assert table in (tiny / "README.md").read_text()
    found = [flags.parse(job.argv) for job in calls]
    assert [(args.lr, args.epochs, args.width) for args in found] == [
        (0.1, 2, 3), (0.2, 2, 3), (0.1, 1, 2), (0.2, 1, 2)]


def test_the_list_names_claim_runs_and_hours(tiny, monkeypatch, capsys):
    def said():
        assert reproduce.main(["--list"]) == 0
        return capsys.readouterr().out

    changed(monkeypatch, seeds=3)
    assert said().startswith("tiny: 6 runs, not measured yet\n    a claim")
    counted(monkeypatch, seconds=900.0)
    assert reproduce.main(["tiny", "--seeds", "1"]) == 0
    capsys.readouterr()
    assert said().startswith("tiny: 6 runs, 1.50 hours on a CPU\n")  # 2 of the 6: a quarter of an hour each


def test_wrong_input_is_one_line_and_status_2(tiny, capsys):
    for wrong, why in (("", "name one experiment"), ("nothing", "invalid choice"),
                       ("tiny --check", "name one experiment"), ("tiny --jobs 0", "at least 1"),
                       ("tiny --set width", "FLAG=VALUE"), ("tiny --set width=0", "at least 1"),
                       ("tiny --set seed=3", "with --seeds"),
                       ("tiny --set nonsense=1", "unrecognized arguments")):
        with pytest.raises(SystemExit) as e:
            reproduce.main(wrong.split())
        err = capsys.readouterr().err
        assert e.value.code == 2 and why in err and err.count("\n") == 1, wrong
