"""harness/experiment.py: runs only what is missing, keeps every result, goes on where it was killed, and says
what is odd about a result."""
import contextlib
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
from harness import experiment, flags


def lines_of(path):
    return [json.loads(text) for text in path.read_text().splitlines()]


def test_only_what_is_missing_is_run(tiny, monkeypatch):
    path = tiny / "results" / "tiny.jsonl"
    calls = counted(monkeypatch, fail_at=2)
    assert reproduce.main(["tiny"]) == 130                      # interrupted in the second: the first is kept
    assert len(lines_of(path)) == 1
    calls = counted(monkeypatch)
    assert reproduce.main(["tiny"]) == 0 and len(calls) == 1
    assert reproduce.main(["tiny", "--seeds", "2"]) == 0 and len(calls) == 3
    assert reproduce.main(["tiny", "--set", "width=3"]) == 0 and len(calls) == 5
    with monkeypatch.context() as later:
        later.setattr(flags, "VERSION", flags.VERSION + 1)
        assert reproduce.main(["tiny"]) == 0 and len(calls) == 7 and len(lines_of(path)) == 8
    one = reproduce.EXPERIMENTS["tiny"]
    monkeypatch.setitem(reproduce.EXPERIMENTS, "tiny", one._replace(common=TINY + " --rank"))
    job, done = experiment.jobs(reproduce.EXPERIMENTS["tiny"], 1, [])[0], experiment.read(path)
    assert job.key in done and not experiment.complete(job, done)              # it lacks the ranks
    assert experiment.complete(job, {job.key: {**done[job.key], "rank": []}})


def test_a_result_from_another_machine_or_of_an_older_version_counts(tiny, monkeypatch):
    calls = counted(monkeypatch)
    assert reproduce.main(["tiny"]) == 0
    path = tiny / "results" / "tiny.jsonl"
    lines = lines_of(path)
    for line in lines:      # on a GPU, by a train.py without --depth, under another label; of the same images
        line["args"].update(amp=True, device="cuda")
        del line["args"]["depth"]
        line.update(label="old name", version=1)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert reproduce.main(["--check"]) == 0 and reproduce.main(["tiny"]) == 0 and len(calls) == 2


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
    assert ("\n\nVersion 1, another order of images. From a copy that has 25,000 of the 50,000 training "
            "images of CIFAR-10.\n<!-- end -->") in version_1 and "| FA | 55.0 ± 7.1 | 2 |" in version_1
    counted(monkeypatch, fail_at=3)
    assert reproduce.main(["tiny", "--seeds", "2"]) == 130      # none of version 1 counts
    assert path.read_text().count("\n") == 4 + 2 and path.read_text().startswith(old)
    assert reproduce.main(["--check"]) == 0 and readme.read_text() == version_1
    counted(monkeypatch)
    assert reproduce.main(["tiny", "--seeds", "2"]) == 0 and path.read_text().startswith(old)
    assert "Version 1" not in readme.read_text()


@pytest.mark.slow
def test_a_run_killed_in_its_middle_goes_on_there(tmp_path):
    command = [sys.executable, str(ROOT / "reproduce.py"), "quick", "--out", "mine", "--device", "cpu",
               "--jobs", "3", "--set", "epochs=40", "subset=64", "width=2", "rank=20"]
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def finished():
        return [len(lines_of(path)) for path in tmp_path.glob("runs/*/run/log.jsonl")]

    while max(finished(), default=0) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)                      # told to stop, a run leaves a checkpoint
    process.wait()
    assert max(finished()) < 40 and not list((tmp_path / "mine").iterdir())
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    configs = [json.loads(path.read_text()) for path in tmp_path.glob("runs/*/run/config.json")]
    assert len(configs) == 3 and any(one["resumed"][0]["step"] >= 1 for one in configs if "resumed" in one)
    for line in lines_of(tmp_path / "mine" / "quick.jsonl"):
        assert [one["epoch"] for one in line["epochs"]] == list(range(1, 41))
        assert [one["epoch"] for one in line["rank"]] == [0, 20, 40]


def test_runs_that_diverge_are_counted_and_runs_that_fail_say_why(tiny, monkeypatch, capsys):
    one = reproduce.Experiment(
        "a claim", TINY + " --rank --lr 1e30 --batch-size 16", {"FA": "--rule fa"}, view="ranks"
    )
    monkeypatch.setattr(reproduce, "EXPERIMENTS", {"tiny": one})
    assert reproduce.main(["tiny", "--device", "cpu"]) == 0
    assert "| FA | – (1 of 1 diverged) | 1 | " in (tiny / "README.md").read_text()
    assert (tiny / "results" / "tiny.png").read_bytes()[:4] == b"\x89PNG"
    assert reproduce.main(["tiny", "--set", "subset=999999", "--device", "cpu"]) == 2
    assert "gratings has 5000 training images" in capsys.readouterr().err
    (tiny / "results" / "tiny.jsonl").write_text('{"half": ')
    assert reproduce.main(["tiny"]) == 2
    assert "tiny.jsonl, line 1 is not a result" in capsys.readouterr().err


def test_a_table_says_what_is_odd_about_the_images():
    for name, count, said in (("cifar100", 4, "\n\nFrom a copy that has 4 of the 50,000 training images of "
                               "CIFAR-100."), ("cifar10", 50_000, ""), ("gratings", 5000, "")):
        line = {"args": {"dataset": name}, "version": 2, "data": {"train_images": count}}
        assert experiment.noted("the table", [line, line]) == "the table" + said


def test_a_table_says_how_many_runs_were_in_bf16_where_some_were_not():
    def line(amp, reason):
        args = {"dataset": "cifar100", "amp": amp, "amp_reason": reason}
        return {"args": args, "version": 2, "data": {"train_images": 50_000}}

    here, there = line(True, "this CPU has it"), line(False, "this CPU has no bf16")
    said = "the table\n\nIn bf16: 2 of the 3 runs; the others in float32."
    assert experiment.noted("the table", [here, there, here]) == said
    for lines in ([here, here], [there], [line(True, "as asked"), there]):
        assert experiment.noted("the table", lines) == "the table"


def test_precision_tells_runs_apart_where_it_was_asked_for(monkeypatch):
    keys = {}
    for here in (False, True):                                  # on a machine that has bf16 or not
        monkeypatch.setattr(flags, "computes_bf16", lambda device: here)  # noqa: B023
        keys[here] = [
            experiment.jobs(reproduce.Experiment("", f"--dataset cifar10 {asked}", {"FA": ""}), 1, [])[0].key
            for asked in ("", "--amp", "--no-amp")
        ]
    assert keys[False] == keys[True] and len(set(keys[True])) == 3


def test_runs_are_spread_over_the_gpus_and_give_their_places_back(monkeypatch):
    for asked, gpus, jobs, places in (("auto", 1, 2, ["auto", "auto"]), ("auto", 4, 2, ["cuda:0", "cuda:1"]),
                                      ("cuda", 2, 3, ["cuda:0", "cuda:1", "cuda:0"]),
                                      ("cuda:1", 4, 2, ["cuda:1", "cuda:1"])):
        monkeypatch.setattr(experiment.torch.cuda, "device_count", lambda: gpus)  # noqa: B023
        free = experiment.devices(asked, jobs)
        assert [free.get() for _ in range(jobs)] == places
    for run in (lambda *args: args, lambda *args: 1 / 0):
        free.put("cuda:1")
        monkeypatch.setattr(experiment, "run", run)
        with contextlib.suppress(ZeroDivisionError):
            assert experiment.run_at(free, "name") == ("name", "cuda:1")
        assert free.get_nowait() == "cuda:1"


def test_the_callers_number_of_threads_is_kept(tiny, monkeypatch):
    def start(command, env, **_):
        seen.add(env["OMP_NUM_THREADS"])
        raise OSError("seen")

    monkeypatch.setattr(subprocess, "Popen", start)
    for asked, used in (("7", "7"), (None, str(max(1, (os.cpu_count() or 1) // 2)))):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if asked:
            monkeypatch.setenv("OMP_NUM_THREADS", asked)
        seen = set()
        assert reproduce.main(["tiny", "--jobs", "2", "--device", "cpu"]) == 2
        assert seen == {used}
