"""harness/experiment.py: runs only what is missing, keeps every result, goes on where it was killed."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from test_reproduce import TINY, counted, tiny_experiment  # noqa: F401  (the fixture `tiny`)

import reproduce
import train
from harness import experiment, flags


def without_time(lines):
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.mark.parametrize(
    "name, data, version, said",
    [
        ("cifar100", {"train_images": 4}, 2,
         "\n\nFrom a copy that has 4 of the 50,000 training images of CIFAR-100."),
        ("cifar10", {"train_images": 50_000}, 2, ""),
        ("gratings", {"train_images": 5000}, 1, ""),
        ("cifar100", None, 1, "\n\nVersion 1, another order of images."),
    ],
)
def test_a_table_says_what_is_odd_about_the_images(name, data, version, said):
    line = {"args": {"dataset": name}, "version": version, **({"data": data} if data else {})}
    assert experiment.noted("the table", [line, line]) == "the table" + said


def test_the_callers_number_of_threads_is_kept(tiny, monkeypatch):
    for asked, used in (("7", "7"), (None, str(max(1, (os.cpu_count() or 1) // 2)))):
        if asked:
            monkeypatch.setenv("OMP_NUM_THREADS", asked)
        else:
            monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        seen = []

        def start(command, env, seen=seen, **_):
            seen.append(env["OMP_NUM_THREADS"])
            raise OSError("seen")

        monkeypatch.setattr(subprocess, "Popen", start)
        assert reproduce.main(["tiny", "--jobs", "2", "--device", "cpu"]) == 2
        assert seen and set(seen) == {used}


def test_results_of_version_1_are_shown_until_the_experiment_is_run_again(tiny, monkeypatch):
    one = reproduce.EXPERIMENTS["tiny"]
    monkeypatch.setitem(
        reproduce.EXPERIMENTS, "tiny", one._replace(common=TINY + " --dataset cifar10 --model cnn")
    )
    readme, path = tiny / "README.md", tiny / "results" / "tiny.jsonl"
    with monkeypatch.context() as earlier:
        earlier.setattr(flags, "VERSION", 1)
        counted(earlier)
        assert reproduce.main(["tiny", "--seeds", "2"]) == 0
    old, version_1 = path.read_text(), readme.read_text()
    note = ("\n\nVersion 1, another order of images. From a copy that has 25,000 of the 50,000 training "
            "images of CIFAR-10.\n<!-- end -->")
    assert note in version_1 and "| FA | 55.0 ± 7.1 | 2 |" in version_1
    calls = counted(monkeypatch, fail_at=3)
    assert reproduce.main(["tiny", "--seeds", "2"]) == 130 and len(calls) >= 3  # none of version 1 counts
    assert path.read_text().count("\n") == 4 + 2 and path.read_text().startswith(old)
    assert reproduce.main(["--check"]) == 0 and readme.read_text() == version_1
    counted(monkeypatch)
    assert reproduce.main(["tiny", "--seeds", "2"]) == 0
    assert (path.read_text().startswith(old) and "Version 1" not in readme.read_text()
            and "± 7.1 | 2 |" in readme.read_text())


def test_what_another_order_of_cifar_does_not_touch_is_not_run_again(tiny, monkeypatch):
    calls = counted(monkeypatch)
    assert reproduce.main(["tiny"]) == 0
    path = tiny / "results" / "tiny.jsonl"
    path.write_text(path.read_text().replace('"version": 2', '"version": 1'))
    assert reproduce.main(["--check"]) == 0 and reproduce.main(["tiny"]) == 0 and len(calls) == 2


def test_a_recorded_run_that_diverges_at_once_is_counted(tiny, monkeypatch, capsys):
    one = reproduce.Experiment(
        "a claim", TINY + " --rank --lr 1e30 --batch-size 16", {"FA": "--rule fa"}, view="ranks"
    )
    monkeypatch.setattr(reproduce, "EXPERIMENTS", {"tiny": one})
    assert reproduce.main(["tiny", "--device", "cpu"]) == 0
    assert "| FA | – (1 of 1 diverged) | 1 | " in (tiny / "README.md").read_text()
    assert (tiny / "results" / "tiny.png").read_bytes()[:4] == b"\x89PNG"


def test_only_what_is_missing_is_run(tiny, monkeypatch):
    calls = counted(monkeypatch, fail_at=2)
    assert reproduce.main(["tiny"]) == 130  # interrupted in the second run: the first is kept
    assert len((tiny / "results" / "tiny.jsonl").read_text().splitlines()) == 1
    calls = counted(monkeypatch)
    assert reproduce.main(["tiny"]) == 0 and len(calls) == 1
    assert reproduce.main(["tiny", "--seeds", "3"]) == 0 and len(calls) == 5
    assert reproduce.main(["tiny", "--set", "width=3"]) == 0 and len(calls) == 7
    monkeypatch.setattr(flags, "VERSION", flags.VERSION + 1)
    assert reproduce.main(["tiny"]) == 0 and len(calls) == 9
    assert len((tiny / "results" / "tiny.jsonl").read_text().splitlines()) == 10


@pytest.mark.slow
def test_a_run_killed_in_its_middle_goes_on_there(tmp_path, monkeypatch):
    command = [sys.executable, str(ROOT / "reproduce.py"), "quick", "--out", "mine", "--device", "cpu",
               "--jobs", str(os.cpu_count()), "--set", "epochs=40", "subset=64", "width=2",
               "rank=20"]  # a thread each
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, env=environment,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def finished():
        """Epochs of each run."""
        return [path.read_text().count("\n") for path in tmp_path.glob("runs/*/run/log.jsonl")]

    while max(finished(), default=0) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)  # a run that is told to stop leaves a checkpoint
    process.wait()
    assert max(finished()) < 40 and not list((tmp_path / "mine").iterdir())
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert again.returncode == 0, again.stderr
    configs = [json.loads(path.read_text()) for path in tmp_path.glob("runs/*/run/config.json")]
    resumed = [config["args"]["rule"] for config in configs
               if "resumed" in config and config["resumed"][0]["step"] >= 1]
    assert len(configs) == 3 and resumed
    monkeypatch.chdir(tmp_path)
    results = [json.loads(text) for text in (tmp_path / "mine" / "quick.jsonl").read_text().splitlines()]
    for job in experiment.jobs(reproduce.EXPERIMENTS["quick"], 1, ["--epochs=40", "--subset=64", "--width=2",
                                                                     "--rank=20"]):
        assert train.main([*job.argv, "--device", "cpu", "--out", job.label]) == 0
        (line,) = [line for line in results if line["label"] == job.label]
        for key, name in (("epochs", "log.jsonl"), ("rank", "rank.jsonl")):
            whole = [json.loads(text) for text in (tmp_path / job.label / name).read_text().splitlines()]
            assert without_time(line[key]) == without_time(whole)


def test_a_result_without_the_ranks_that_are_asked_for_is_run_again(tiny, monkeypatch):
    calls = counted(monkeypatch)
    assert reproduce.main(["tiny"]) == 0 and len(calls) == 2
    one = reproduce.EXPERIMENTS["tiny"]
    monkeypatch.setitem(reproduce.EXPERIMENTS, "tiny", one._replace(common=TINY + " --rank"))
    job = experiment.jobs(reproduce.EXPERIMENTS["tiny"], 1, [])[0]
    done = experiment.read(tiny / "results" / "tiny.jsonl")
    assert job.key in done and not experiment.complete(job, done)
    assert experiment.complete(job, {job.key: {**done[job.key], "rank": []}})


def test_precision_tells_runs_apart_where_it_was_asked_for(monkeypatch):
    keys = {}
    for here in (False, True):                                  # on a machine that has bf16 or not
        monkeypatch.setattr(flags, "computes_bf16", lambda device: here)  # noqa: B023
        keys[here] = [
            experiment.jobs(reproduce.Experiment("", f"--dataset cifar10 {asked}", {"FA": ""}), 1, [])[0].key
            for asked in ("", "--amp", "--no-amp")
        ]
    assert keys[False] == keys[True] and len(set(keys[True])) == 3


def test_a_result_from_another_machine_counts(tiny, monkeypatch):
    calls = counted(monkeypatch)
    assert reproduce.main(["tiny"]) == 0
    path = tiny / "results" / "tiny.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:  # run on a GPU, by a train.py without --depth, under another label
        line["args"].update(amp=True, device="cuda")
        del line["args"]["depth"]
        line["label"] = "old name"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert reproduce.main(["--check"]) == 0 and reproduce.main(["tiny"]) == 0 and len(calls) == 2


def test_a_damaged_results_file_is_named(tiny, capsys):
    (tiny / "results").mkdir()
    (tiny / "results" / "tiny.jsonl").write_text('{"half": ')
    assert reproduce.main(["tiny"]) == 2
    assert "tiny.jsonl, line 1 is not a result" in capsys.readouterr().err


def test_a_run_that_fails_says_why(tiny, monkeypatch, capsys):
    assert reproduce.main(["tiny", "--set", "subset=999999", "--device", "cpu"]) == 2
    assert "gratings has 5000 training images" in capsys.readouterr().err


@pytest.mark.parametrize(
    "asked, gpus, jobs, places",
    [("auto", 0, 2, ["auto", "auto"]), ("auto", 1, 2, ["auto", "auto"]),
     ("cuda", 2, 3, ["cuda:0", "cuda:1", "cuda:0"]), ("auto", 4, 2, ["cuda:0", "cuda:1"]),
     ("cuda:1", 4, 2, ["cuda:1", "cuda:1"]), ("cpu", 4, 1, ["cpu"])],
)
def test_runs_are_spread_over_the_gpus(asked, gpus, jobs, places, monkeypatch):
    monkeypatch.setattr(experiment.torch.cuda, "device_count", lambda: gpus)
    free = experiment.devices(asked, jobs)
    assert [free.get() for _ in range(jobs)] == places


def test_a_run_gives_its_place_back(monkeypatch):
    free = experiment.devices("cpu", 1)
    monkeypatch.setattr(experiment, "run", lambda *args: args)
    assert experiment.run_at(free, "name") == ("name", "cpu")
    monkeypatch.setattr(experiment, "run", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        experiment.run_at(free, "name")
    assert free.get_nowait() == "cpu"
