"""reproduce.py: the list of experiments, and READMEs whose tables cannot drift from results/."""
import json

import pytest

import reproduce
from harness import experiment, flags, report

TINY = "--dataset gratings --subset 64 --width 2 --epochs 1"


@pytest.fixture(name="tiny")
def tiny_experiment(tmp_path, monkeypatch):
    """An experiment of two cells, with a README and a results folder of its own."""
    one = reproduce.Experiment(
        "a claim", TINY, {"backprop": "--rule bp", "FA": "--rule fa"}, paper={"FA": 1.5}
    )
    monkeypatch.setattr(reproduce, "EXPERIMENTS", {"tiny": one})
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(reproduce, "README", tmp_path / "README.md")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("before\n<!-- tiny -->\nold\n<!-- end -->\nafter\n")
    return tmp_path


def counted(monkeypatch, fail_at=None, seconds=1.0):
    """reproduce.run without a process: makes a result, and counts the calls."""
    calls = []

    def run(path, job, *_):
        calls.append(job)
        if len(calls) == fail_at:
            raise KeyboardInterrupt
        args = {k: v for k, v in vars(flags.parse(job.argv)).items() if k not in experiment.NEUTRAL}
        accuracy = 0.5 + 0.1 * args["seed"]
        return {"experiment": path.stem, "label": job.label, "seed": args["seed"],
                "final_test_accuracy": accuracy, "args": args, "diverged": False, "seconds": seconds,
                "version": flags.VERSION, "epochs": [{"epoch": 1, "test_accuracy": accuracy, "step": 2}]}

    monkeypatch.setattr(experiment, "run", run)
    return calls


def test_end_to_end_with_real_runs(tiny, capsys):
    assert reproduce.main(["tiny", "--jobs", "2", "--device", "cpu"]) == 0
    lines = [json.loads(line) for line in (tiny / "results" / "tiny.jsonl").read_text().splitlines()]
    assert {line["label"] for line in lines} == {"backprop", "FA"}
    for line in lines:
        assert {"experiment", "args", "seed", "final_test_accuracy", "diverged", "device", "commit",
                "versions", "epochs"} <= line.keys()
        assert line["args"]["width"] == 2 and len(line["epochs"]) == 1
        assert line["data"]["train_images"] == 5000 and len(line["data"]["digest"]) >= 16
        assert line["final_test_accuracy"] == line["epochs"][-1]["test_accuracy"]
    assert (tiny / "results" / "tiny.png").read_bytes()[:4] == b"\x89PNG"
    readme = (tiny / "README.md").read_text()
    assert readme.startswith("before\n<!-- tiny -->\n|  | test ") and readme.endswith("<!-- end -->\nafter\n")
    assert (
        f"| FA | {100 * next(x for x in lines if x['label'] == 'FA')['final_test_accuracy']:.1f} | 1 | 1.5 | "
        in readme
    )
    assert "2 of 2 runs" not in capsys.readouterr().out
    assert reproduce.main(["tiny", "--device", "cpu"]) == 0
    assert "2 of 2 runs are in results/tiny.jsonl already" in capsys.readouterr().out


def test_recorded_ranks_become_columns_and_a_picture(tiny, monkeypatch, capsys):
    one = reproduce.Experiment("a claim", TINY + " --rank", {"FA": "--rule fa"}, view="ranks")
    monkeypatch.setattr(reproduce, "EXPERIMENTS", {"tiny": one})
    assert reproduce.main(["tiny", "--device", "cpu"]) == 0
    (line,) = [json.loads(line) for line in (tiny / "results" / "tiny.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in line["rank"]] == [0, 1]
    last = line["rank"][-1]["layers"]
    wanted = ", ".join(f"{last[f'layers.{i}']['gradient']['effective_rank']:.0f}" for i in range(4))
    assert f" | {wanted} | " in (tiny / "README.md").read_text()
    assert "| error δ | gradient | update | trajectory | cosine |" in capsys.readouterr().out
    assert (tiny / "results" / "tiny.png").read_bytes()[:4] == b"\x89PNG"
    last["layers.1"]["gradient"] = None                         # an overflow
    line["rank"][-1]["trajectory"]["all layers"] = None
    ranks = report.rank_table(one, [line]).splitlines()[-1].split(" | ")
    assert ranks[4].split(", ")[1] == "–" and ranks[6] == "–"


def test_results_of_ones_own(tiny, monkeypatch, capsys):
    calls = counted(monkeypatch)
    assert reproduce.main(["tiny"]) == 0
    readme = (tiny / "README.md").read_text()
    assert reproduce.main(["tiny", "--out", "mine", "--seeds", "2"]) == 0 and len(calls) == 6
    assert sorted(p.name for p in (tiny / "mine").iterdir()) == ["tiny.jsonl", "tiny.png"]
    assert (tiny / "README.md").read_text() == readme           # it speaks of results/ alone
    capsys.readouterr()
    (tiny / "file").write_text("")
    assert reproduce.main(["tiny", "--out", "file/mine"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("reproduce.py: ") and err.count("\n") == 1


def test_the_table(tiny, monkeypatch):
    counted(monkeypatch)
    assert reproduce.main(["tiny", "--seeds", "3"]) == 0
    assert "| FA | 60.0 ± 10.0 | 3 | 1.5 | +58.5 |" in (tiny / "README.md").read_text()
    one = reproduce.EXPERIMENTS["tiny"]
    lost = {"label": "FA", "diverged": True, "final_test_accuracy": None}
    kept = {"label": "FA", "diverged": False, "final_test_accuracy": 0.25}
    assert "| FA | 25.0 (1 of 2 diverged) | 2 | 1.5 | +23.5 |" in report.table(one, [lost, kept])
    assert "| FA | – (1 of 1 diverged) | 1 |" in report.table(one, [lost])
    assert "| backprop | not measured | 0 |" in report.table(one, [lost])


def test_a_grid_of_learning_rates(tiny, monkeypatch):
    one = reproduce.Experiment(
        "no claim",
        TINY,
        {"FA": "--rule fa --lr {}", "FA + Muon": "--rule fa --muon --muon-lr {}"},
        {"0.1": "0.1", "0.2": "0.2"},
        "learning rate",
        "sweep",
    )
    monkeypatch.setattr(reproduce, "EXPERIMENTS", {"tiny": one})
    calls = counted(monkeypatch)
    assert reproduce.main(["tiny"]) == 0 and len(calls) == 4
    assert [c.argv[-4:-2] for c in calls] == [["--lr", "0.1"], ["--lr", "0.2"], ["--muon-lr", "0.1"],
                                              ["--muon-lr", "0.2"]]
    readme = (tiny / "README.md").read_text()
    assert (
        "| learning rate | 0.1 | 0.2 |\n| --- | --- | --- |\n| FA | 50.0 | 50.0 |\n| FA + Muon | 50.0 |"
        in readme
    )
    assert (tiny / "results" / "tiny.png").read_bytes()[:4] == b"\x89PNG"


def test_check_goes_red_when_a_number_is_edited(tiny, monkeypatch):
    counted(monkeypatch)
    assert reproduce.main(["tiny"]) == 0 and reproduce.main(["--check"]) == 0
    readme = tiny / "README.md"
    readme.write_text(readme.read_text().replace("50.0", "51.0"))
    assert reproduce.main(["--check"]) == 1
    assert reproduce.main(["tiny"]) == 0 and reproduce.main(["--check"]) == 0


def test_the_tuned_learning_rates_are_the_grids_best():
    lines = reproduce.results("tune", reproduce.RESULTS)
    assert len(lines) == 8 * len(reproduce.EXPERIMENTS["tune"].columns)
    for label, flag in reproduce.TUNED.items():
        best = max((line for line in report.select(lines, label) if not line["diverged"]),
                   key=lambda line: line["final_test_accuracy"])
        assert flag.split() == ["--muon-lr" if "Muon" in label else "--lr", best["column"]], label


def test_check_looks_at_both_readmes_and_where_out_says(tiny, monkeypatch, capsys):
    counted(monkeypatch)
    second = tiny / "results" / "README.md"
    second.parent.mkdir()
    second.write_text("<!-- tiny -->\nold\n<!-- end -->\n")
    assert reproduce.main(["tiny"]) == 0 and "| FA | 50.0 | 1 |" in second.read_text()
    assert (
        reproduce.main(["tiny", "--out", "mine"]) == 0 and reproduce.main(["--check", "--out", "mine"]) == 0
    )
    mine = tiny / "mine" / "tiny.jsonl"
    mine.write_text(mine.read_text().replace('"final_test_accuracy": 0.5', '"final_test_accuracy": 0.25'))
    capsys.readouterr()
    assert (
        reproduce.main(["--check", "--out", "mine"]) == 1 and "differs from mine/" in capsys.readouterr().out
    )
    assert reproduce.main(["--check"]) == 0
    second.write_text(second.read_text().replace("50.0", "51.0"))
    assert reproduce.main(["--check"]) == 1 and "results/README.md differs" in capsys.readouterr().out
    assert reproduce.main(["--check", "--out", "nowhere"]) == 2


def test_the_list_names_claim_runs_and_hours(tiny, monkeypatch, capsys):
    def hours():
        assert reproduce.main(["--list"]) == 0
        return capsys.readouterr().out

    monkeypatch.setitem(reproduce.EXPERIMENTS, "tiny", reproduce.EXPERIMENTS["tiny"]._replace(seeds=3))
    assert hours().startswith("tiny: 6 runs, not measured yet\n    a claim")
    counted(monkeypatch, seconds=900.0)
    assert reproduce.main(["tiny", "--seeds", "1"]) == 0
    capsys.readouterr()
    assert hours().startswith("tiny: 6 runs, 1.50 hours\n")     # 2 of the 6 took a quarter of an hour each


def test_what_is_announced_is_what_is_run(tiny, monkeypatch, capsys):
    counted(monkeypatch)
    monkeypatch.setitem(
        reproduce.EXPERIMENTS, "tiny", reproduce.EXPERIMENTS["tiny"]._replace(scale="One epoch.")
    )
    for changes, said in (
        ([], "tiny: a claim One epoch."),
        (["--set", "epochs=2", "width=3"], "tiny: a claim One epoch. But with epochs=2, width=3."),
    ):
        assert reproduce.main(["tiny", *changes]) == 0
        assert capsys.readouterr().out.splitlines()[0] == said


def test_help_is_short(capsys):
    with pytest.raises(SystemExit):
        reproduce.main(["--help"])
    text = capsys.readouterr().out
    assert "--list" in text and len(text.splitlines()) < 45 and max(map(len, text.split("\n\n")[-1:])) < 100


def test_the_real_readme_says_what_results_say():
    assert reproduce.main(["--check"]) == 0


@pytest.mark.parametrize(
    "wrong, why",
    [([], "name one experiment"), (["nothing"], "invalid choice"),
     (["tiny", "--check"], "name one experiment"), (["tiny", "--jobs", "0"], "at least 1"),
     (["tiny", "--set", "width"], "FLAG=VALUE"), (["tiny", "--set", "width=0"], "at least 1"),
     (["tiny", "--set", "seed=3"], "with --seeds"),
     (["tiny", "--set", "nonsense=1"], "unrecognized arguments")],
)
def test_wrong_input(tiny, wrong, why, capsys):
    with pytest.raises(SystemExit) as e:
        reproduce.main(wrong)
    err = capsys.readouterr().err
    assert e.value.code == 2 and why in err and err.count("\n") == 1
