"""reproduce.py: runs only what is missing, keeps every result, and writes README tables that cannot drift."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

import data
import options
import report
import reproduce
import train
from test_data import good
from test_train import without_time

TINY = "--dataset gratings --subset 64 --width 2 --epochs 1"


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """An experiment of two cells, with a README and a results folder of its own."""
    experiment = reproduce.Experiment("a claim", TINY, {"backprop": "--rule bp", "FA": "--rule fa"}, paper={"FA": 1.5})
    monkeypatch.setattr(reproduce, "EXPERIMENTS", {"tiny": experiment})
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(reproduce, "README", tmp_path / "README.md")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("before\n<!-- tiny -->\nold\n<!-- end -->\nafter\n")
    return tmp_path


def counted(monkeypatch, fail_at=None):
    """reproduce.run without a process: makes a result, and counts the calls."""
    calls = []

    def run(path, job, *_):
        calls.append(job)
        if len(calls) == fail_at:
            raise KeyboardInterrupt
        args = {k: v for k, v in vars(train.parse(job.argv)).items() if k not in reproduce.NEUTRAL}
        accuracy = 0.5 + 0.1 * args["seed"]
        return {"experiment": path.stem, "label": job.label, "seed": args["seed"], "final_test_accuracy": accuracy,
                "args": args, "diverged": False, "seconds": 1.0, "version": train.VERSION,
                "epochs": [{"epoch": 1, "test_accuracy": accuracy, "step": 2}]}

    monkeypatch.setattr(reproduce, "run", run)
    return calls


def test_end_to_end_with_real_runs(tiny, capsys):
    assert reproduce.main(["tiny", "--jobs", "2", "--device", "cpu"]) == 0
    lines = [json.loads(line) for line in (tiny / "results" / "tiny.jsonl").read_text().splitlines()]
    assert {line["label"] for line in lines} == {"backprop", "FA"}
    for line in lines:
        assert {"experiment", "args", "seed", "final_test_accuracy", "diverged", "device", "commit", "versions",
                "epochs"} <= line.keys()
        assert line["args"]["width"] == 2 and len(line["epochs"]) == 1
        assert line["final_test_accuracy"] == line["epochs"][-1]["test_accuracy"]
    assert (tiny / "results" / "tiny.png").read_bytes()[:4] == b"\x89PNG"
    readme = (tiny / "README.md").read_text()
    assert readme.startswith("before\n<!-- tiny -->\n|  | test ") and readme.endswith("<!-- end -->\nafter\n")
    assert f"| FA | {100 * next(x for x in lines if x['label'] == 'FA')['final_test_accuracy']:.1f} | 1 | 1.5 | " in readme
    assert "2 of 2 runs" not in capsys.readouterr().out
    assert reproduce.main(["tiny", "--device", "cpu"]) == 0
    assert "2 of 2 runs are in results/tiny.jsonl already" in capsys.readouterr().out


def test_a_result_says_which_data_it_saw(tmp_path, monkeypatch, capsys):
    torch.save(good(), tmp_path / "cifar100.pt")
    experiment = reproduce.Experiment("a claim", f"{TINY} --subset 3 --dataset cifar100 --model cnn", {"FA": "--rule fa"})
    monkeypatch.setattr(reproduce, "EXPERIMENTS", {"tiny": experiment})
    monkeypatch.setattr(reproduce, "README", tmp_path / "README.md")
    monkeypatch.chdir(tmp_path)
    assert reproduce.main(["tiny", "--device", "cpu", "--data", ".", "--out", "mine"]) == 0
    line = json.loads((tmp_path / "mine" / "tiny.jsonl").read_text())
    assert line["version"] == train.VERSION == 2
    assert line["data"] == {"digest": data.digest(data.load("cifar100", tmp_path)), "train_images": 4}
    (config,) = (tmp_path / "runs").glob("tiny-*/run/config.json")
    assert json.loads(config.read_text())["data"] == line["data"]
    assert "\n\nFrom a copy that has 4 of the 50,000 training images of CIFAR-100.\n" in capsys.readouterr().out


def test_results_of_version_1_are_shown_until_the_experiment_is_run_again(tiny, monkeypatch):
    experiment = reproduce.EXPERIMENTS["tiny"]
    monkeypatch.setitem(reproduce.EXPERIMENTS, "tiny", experiment._replace(common=TINY + " --dataset cifar10 --model cnn"))
    readme, path = tiny / "README.md", tiny / "results" / "tiny.jsonl"
    with monkeypatch.context() as earlier:
        earlier.setattr(train, "VERSION", 1)
        counted(earlier)
        assert reproduce.main(["tiny", "--seeds", "2"]) == 0
    old, version_1 = path.read_text(), readme.read_text()
    note = ("\n\nVersion 1, another order of images. From a copy that has 25,000 of the 50,000 training images of CIFAR-10.\n"
            "<!-- end -->")
    assert note in version_1 and "| FA | 55.0 ± 7.1 | 2 |" in version_1
    calls = counted(monkeypatch, fail_at=3)
    assert reproduce.main(["tiny", "--seeds", "2"]) == 130 and len(calls) >= 3  # none of version 1 counts
    assert path.read_text().count("\n") == 4 + 2 and path.read_text().startswith(old)
    assert reproduce.main(["--check"]) == 0 and readme.read_text() == version_1
    counted(monkeypatch)
    assert reproduce.main(["tiny", "--seeds", "2"]) == 0
    assert path.read_text().startswith(old) and "Version 1" not in readme.read_text() and "± 7.1 | 2 |" in readme.read_text()


def test_what_another_order_of_cifar_does_not_touch_is_not_run_again(tiny, monkeypatch):
    calls = counted(monkeypatch)
    assert reproduce.main(["tiny"]) == 0
    path = tiny / "results" / "tiny.jsonl"
    path.write_text(path.read_text().replace('"version": 2', '"version": 1'))
    assert reproduce.main(["--check"]) == 0 and reproduce.main(["tiny"]) == 0 and len(calls) == 2


def test_recorded_ranks_become_columns_and_a_picture(tiny, monkeypatch, capsys):
    experiment = reproduce.Experiment("a claim", TINY + " --rank", {"FA": "--rule fa"}, view="ranks")
    monkeypatch.setattr(reproduce, "EXPERIMENTS", {"tiny": experiment})
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
    ranks = report.rank_table(experiment, [line]).splitlines()[-1].split(" | ")
    assert ranks[4].split(", ")[1] == "–" and ranks[6] == "–"


def test_a_recorded_run_that_diverges_at_once_is_counted(tiny, monkeypatch, capsys):
    experiment = reproduce.Experiment("a claim", TINY + " --rank --lr 1e30 --batch-size 16", {"FA": "--rule fa"}, view="ranks")
    monkeypatch.setattr(reproduce, "EXPERIMENTS", {"tiny": experiment})
    assert reproduce.main(["tiny", "--device", "cpu"]) == 0
    assert "| FA | – (1 of 1 diverged) | 1 | " in (tiny / "README.md").read_text()
    assert (tiny / "results" / "tiny.png").read_bytes()[:4] == b"\x89PNG"


def test_only_what_is_missing_is_run(tiny, monkeypatch):
    calls = counted(monkeypatch, fail_at=2)
    assert reproduce.main(["tiny"]) == 130                      # interrupted in the second run: the first is kept
    assert len((tiny / "results" / "tiny.jsonl").read_text().splitlines()) == 1
    calls = counted(monkeypatch)
    assert reproduce.main(["tiny"]) == 0 and len(calls) == 1
    assert reproduce.main(["tiny", "--seeds", "3"]) == 0 and len(calls) == 5
    assert reproduce.main(["tiny", "--set", "width=3"]) == 0 and len(calls) == 7
    monkeypatch.setattr(train, "VERSION", train.VERSION + 1)
    assert reproduce.main(["tiny"]) == 0 and len(calls) == 9
    assert len((tiny / "results" / "tiny.jsonl").read_text().splitlines()) == 10


def test_killed_half_way_and_resumed(tmp_path):
    command = [sys.executable, str(ROOT / "reproduce.py"), "quick", "--out", "mine", "--device", "cpu",
               "--set", "epochs=1", "subset=320", "width=2"]
    results = tmp_path / "mine" / "quick.jsonl"
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not results.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)                         # in the second of three runs
    assert process.wait() == -signal.SIGKILL
    first = results.read_text()
    assert first.count("\n") == 1 and not (tmp_path / "mine" / "quick.png").exists()
    again = subprocess.run([*command, "--jobs", "2"], cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0 and "1 of 3 runs are in mine/quick.jsonl already" in again.stdout
    assert results.read_text().startswith(first) and results.read_text().count("\n") == 3
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert {line["label"] for line in lines} == {"backprop", "FA", "FA + Muon + norm"} and all("rank" in line for line in lines)


def test_a_run_killed_in_its_middle_goes_on_there(tmp_path, monkeypatch):
    command = [sys.executable, str(ROOT / "reproduce.py"), "quick", "--out", "mine", "--device", "cpu",
               "--jobs", str(os.cpu_count()), "--set", "epochs=40", "subset=64", "width=2", "rank=20"]     # a thread each
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, env=environment,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def finished():
        """Epochs of each run."""
        return [path.read_text().count("\n") for path in tmp_path.glob("runs/*/run/log.jsonl")]

    while max(finished(), default=0) < 2:                       # with the second line the first checkpoint is there too
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert max(finished()) < 40 and not list((tmp_path / "mine").iterdir())
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert again.returncode == 0, again.stderr
    configs = [json.loads(path.read_text()) for path in tmp_path.glob("runs/*/run/config.json")]
    resumed = [config["args"]["rule"] for config in configs if "resumed" in config and config["resumed"][0]["step"] >= 1]
    assert len(configs) == 3 and resumed
    monkeypatch.chdir(tmp_path)
    results = [json.loads(text) for text in (tmp_path / "mine" / "quick.jsonl").read_text().splitlines()]
    for job in reproduce.jobs(reproduce.EXPERIMENTS["quick"], 1, ["--epochs=40", "--subset=64", "--width=2",
                                                                     "--rank=20"]):
        assert train.main([*job.argv, "--device", "cpu", "--out", job.label]) == 0
        (line,) = [line for line in results if line["label"] == job.label]
        for key, name in (("epochs", "log.jsonl"), ("rank", "rank.jsonl")):
            whole = [json.loads(text) for text in (tmp_path / job.label / name).read_text().splitlines()]
            assert without_time(line[key]) == without_time(whole)


def test_a_result_without_the_ranks_that_are_asked_for_is_run_again(tiny, monkeypatch):
    calls = counted(monkeypatch)
    assert reproduce.main(["tiny"]) == 0 and len(calls) == 2
    experiment = reproduce.EXPERIMENTS["tiny"]
    monkeypatch.setitem(reproduce.EXPERIMENTS, "tiny", experiment._replace(common=TINY + " --rank"))
    job = reproduce.jobs(reproduce.EXPERIMENTS["tiny"], 1, [])[0]
    done = reproduce.read(tiny / "results" / "tiny.jsonl")
    assert job.key in done and not reproduce.complete(job, done)
    assert reproduce.complete(job, {job.key: {**done[job.key], "rank": []}})


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


def test_precision_tells_runs_apart_where_it_was_asked_for(monkeypatch):
    keys = {}
    for here in (False, True):                                  # on a machine that has bf16 or not
        monkeypatch.setattr(options, "computes_bf16", lambda device: here)              # noqa: B023
        keys[here] = [reproduce.jobs(reproduce.Experiment("", f"--dataset cifar10 {asked}", {"FA": ""}), 1, [])[0].key
                      for asked in ("", "--amp", "--no-amp")]
    assert keys[False] == keys[True] and len(set(keys[True])) == 3


def test_a_result_from_another_machine_counts(tiny, monkeypatch):
    calls = counted(monkeypatch)
    assert reproduce.main(["tiny"]) == 0
    path = tiny / "results" / "tiny.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:                                      # run on a GPU, by a train.py without --depth, under another label
        line["args"].update(amp=True, device="cuda")
        del line["args"]["depth"]
        line["label"] = "old name"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert reproduce.main(["--check"]) == 0 and reproduce.main(["tiny"]) == 0 and len(calls) == 2


def test_the_table(tiny, monkeypatch):
    counted(monkeypatch)
    assert reproduce.main(["tiny", "--seeds", "3"]) == 0
    assert "| FA | 60.0 ± 10.0 | 3 | 1.5 | +58.5 |" in (tiny / "README.md").read_text()
    experiment = reproduce.EXPERIMENTS["tiny"]
    lost = {"label": "FA", "diverged": True, "final_test_accuracy": None}
    kept = {"label": "FA", "diverged": False, "final_test_accuracy": 0.25}
    assert "| FA | 25.0 (1 of 2 diverged) | 2 | 1.5 | +23.5 |" in report.table(experiment, [lost, kept])
    assert "| FA | – (1 of 1 diverged) | 1 |" in report.table(experiment, [lost])
    assert "| backprop | not measured | 0 |" in report.table(experiment, [lost])


def test_a_grid_of_learning_rates(tiny, monkeypatch):
    experiment = reproduce.Experiment("no claim", TINY,
                                      {"FA": "--rule fa --lr {}", "FA + Muon": "--rule fa --muon --muon-lr {}"},
                                      {"0.1": "0.1", "0.2": "0.2"}, "learning rate", "sweep")
    monkeypatch.setattr(reproduce, "EXPERIMENTS", {"tiny": experiment})
    calls = counted(monkeypatch)
    assert reproduce.main(["tiny"]) == 0 and len(calls) == 4
    assert [c.argv[-4:-2] for c in calls] == [["--lr", "0.1"], ["--lr", "0.2"], ["--muon-lr", "0.1"], ["--muon-lr", "0.2"]]
    readme = (tiny / "README.md").read_text()
    assert "| learning rate | 0.1 | 0.2 |\n| --- | --- | --- |\n| FA | 50.0 | 50.0 |\n| FA + Muon | 50.0 |" in readme
    assert (tiny / "results" / "tiny.png").read_bytes()[:4] == b"\x89PNG"


def test_check_goes_red_when_a_number_is_edited(tiny, monkeypatch):
    counted(monkeypatch)
    assert reproduce.main(["tiny"]) == 0 and reproduce.main(["--check"]) == 0
    readme = tiny / "README.md"
    readme.write_text(readme.read_text().replace("50.0", "51.0"))
    assert reproduce.main(["--check"]) == 1
    assert reproduce.main(["tiny"]) == 0 and reproduce.main(["--check"]) == 0


def test_the_tuned_learning_rates_are_the_grids_best():
    lines = reproduce.lines_of("tune")
    assert len(lines) == 8 * len(reproduce.EXPERIMENTS["tune"].columns)
    for label, rate in reproduce.TUNED.items():
        best = max((line for line in report.select(lines, label) if not line["diverged"]),
                   key=lambda line: line["final_test_accuracy"])
        assert float(best["column"]) == rate, label


def test_the_real_readme_says_what_results_say():
    assert reproduce.main(["--check"]) == 0


@pytest.mark.parametrize("wrong, why", [([], "name one experiment"), (["nothing"], "invalid choice"),
                                        (["tiny", "--check"], "name one experiment"),
                                        (["tiny", "--jobs", "0"], "at least 1"), (["tiny", "--set", "width"], "FLAG=VALUE"),
                                        (["tiny", "--set", "width=0"], "at least 1"),
                                        (["tiny", "--set", "seed=3"], "with --seeds"),
                                        (["tiny", "--set", "nonsense=1"], "unrecognized arguments")])
def test_wrong_input(tiny, wrong, why, capsys):
    with pytest.raises(SystemExit) as e:
        reproduce.main(wrong)
    err = capsys.readouterr().err
    assert e.value.code == 2 and why in err and err.count("\n") == 1


def test_a_damaged_results_file_is_named(tiny, capsys):
    (tiny / "results").mkdir()
    (tiny / "results" / "tiny.jsonl").write_text('{"half": ')
    assert reproduce.main(["tiny"]) == 2
    assert "tiny.jsonl, line 1 is not a result" in capsys.readouterr().err


def test_a_run_that_fails_says_why(tiny, monkeypatch, capsys):
    assert reproduce.main(["tiny", "--set", "subset=999999", "--device", "cpu"]) == 2
    assert "gratings has 5000 training images" in capsys.readouterr().err


@pytest.mark.parametrize("asked, gpus, jobs, places", [
    ("auto", 0, 2, ["auto", "auto"]), ("auto", 1, 2, ["auto", "auto"]), ("cuda", 2, 3, ["cuda:0", "cuda:1", "cuda:0"]),
    ("auto", 4, 2, ["cuda:0", "cuda:1"]), ("cuda:1", 4, 2, ["cuda:1", "cuda:1"]), ("cpu", 4, 1, ["cpu"])])
def test_runs_are_spread_over_the_gpus(asked, gpus, jobs, places, monkeypatch):
    monkeypatch.setattr(reproduce.torch.cuda, "device_count", lambda: gpus)
    free = reproduce.devices(asked, jobs)
    assert [free.get() for _ in range(jobs)] == places


def test_a_run_gives_its_place_back(monkeypatch):
    free = reproduce.devices("cpu", 1)
    monkeypatch.setattr(reproduce, "run", lambda *args: args)
    assert reproduce.run_at(free, "name") == ("name", "cpu")
    monkeypatch.setattr(reproduce, "run", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        reproduce.run_at(free, "name")
    assert free.get_nowait() == "cpu"
