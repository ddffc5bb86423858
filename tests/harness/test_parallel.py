"""harness/parallel.py: two processes train as one would, to the same weights, and only one of them speaks and
writes."""
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import train
from harness import parallel

# Run by two processes under torchrun, and by one alone: a few steps in float64 a case, to a file a case.
WORKER = """
import sys
import torch
sys.path.insert(0, {root!r})
import data, fa, muon, train
from harness import flags, parallel
from torch.nn import functional as F

cases, folder = sys.argv[2:], sys.argv[1]
torch.set_default_dtype(torch.float64)
single = data.Normalise.__call__
data.Normalise.__call__ = lambda self, images: single(self, images).double()
torch.Tensor.float = torch.Tensor.double                        # the loss too
if parallel.asked():
    parallel.start(torch.device("cpu"))
for number, case in enumerate(cases):
    small = ["--device", "cpu", "--width", "4", "--batch-size", "16", "--epochs", "2", "--subset", "64"]
    args = flags.parse([*small, *case.split()])
    trainer = train.Trainer(args, data.gratings(64, 30))
    for optimiser, _ in trainer.optimisers:
        for group in optimiser.param_groups:
            if "steps" in group:
                group["dtype"] = torch.float64
    losses, correct = [], 0
    for epoch in range(2):
        trainer.model.train()
        for chosen in data.indices(64, 16, trainer.generator):
            loss, right, _ = trainer.step(chosen)
            losses.append(parallel.mean(loss).item())
            correct += parallel.total(right).item()
    accuracy = trainer.test()
    if parallel.index() == 0:
        torch.save({{"model": trainer.model.state_dict(), "loss": losses, "accuracy": [correct, accuracy]}},
                   f"{{folder}}/{{number}}.pt")
    weights = torch.cat([p.flatten() for p in trainer.model.state_dict().values() if p.is_floating_point()])
    assert torch.equal(parallel.mean(weights), weights), "the processes have different weights"
    del trainer, optimiser, group, loss
parallel.stop()
parallel.leave(0)
"""
CASES = ["--rule fa --norm", "--rule fa --muon --norm whiten", "--rule kp --muon", "--rule dfa --norm layer",
         "--rule frozen --norm --model mlp --weight-decay 0.1", "--rule bp --norm --model resnet18 --width 8"]


def launch(tmp_path, *command, processes):
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    return subprocess.run([sys.executable, *torchrun * (processes > 1), *command], cwd=tmp_path,
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folders = []
    for processes in (1, 2):
        folder = tmp_path_factory.mktemp(f"processes{processes}")
        (folder / "worker.py").write_text(WORKER.format(root=str(ROOT)))
        done = launch(folder, "worker.py", str(folder), *CASES, processes=processes)
        assert done.returncode == 0, done.stderr
        folders.append(folder)
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_end_with_the_weights_of_one(case, both):
    alone, together = (torch.load(folder / f"{CASES.index(case)}.pt", weights_only=True) for folder in both)
    assert alone["model"].keys() == together["model"].keys()
    for name, value in alone["model"].items():
        assert torch.allclose(value, together["model"][name], rtol=1e-6, atol=1e-9), name
    assert together["loss"] == pytest.approx(alone["loss"], rel=1e-7)
    assert together["accuracy"] == alone["accuracy"]


@pytest.mark.slow
def test_only_one_process_speaks_and_writes(tmp_path):
    done = launch(tmp_path, str(ROOT / "train.py"), "--muon", "--norm", "--subset", "64", "--width", "4",
                  "--epochs", "2", "--device", "cpu", "--rank", processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("epoch   1/2") == 1 and done.stdout.count("final test accuracy") == 1
    assert "Warning" not in done.stderr, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    config = json.loads((folder / "config.json").read_text())
    assert config["processes"] == 2 and len((folder / "rank.jsonl").read_text().splitlines()) == 3


def test_a_batch_that_cannot_be_divided_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(parallel, "size", lambda: 2)
    assert train.main(["--batch-size", "33", "--device", "cpu"]) == 2
    assert capsys.readouterr().err == "train.py: a batch of 33 images cannot be divided among 2 processes\n"
    assert not (tmp_path / "runs").exists()


def test_shares_of_a_batch_are_the_batch(monkeypatch):
    """Also one that cannot be divided evenly."""
    batch, shares = torch.arange(22).view(11, 2), []
    assert torch.equal(parallel.share(batch), batch) and torch.equal(parallel.total(batch), batch)    # one
    monkeypatch.setattr(parallel, "size", lambda: 4)
    for k in range(4):
        monkeypatch.setattr(parallel, "index", lambda k=k: k)
        shares.append(parallel.share(batch))
    assert torch.equal(torch.cat(shares), batch) and {len(share) for share in shares} == {2, 3}
