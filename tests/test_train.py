"""train.py as a user types it: the folder that a run leaves, the same bits from the same seed, what each flag
changes, numbers that are not finite, and every wrong input in one line with status 2."""
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch.nn import functional as F

import data
import muon
import train
from harness import flags, graph, session

REAL_GRATINGS = data.gratings
SMALL = ["--subset", "128", "--epochs", "2", "--width", "4", "--batch-size", "32"]


@pytest.fixture(autouse=True)
def small_gratings(monkeypatch, tmp_path):
    """In this process, few gratings, and a working directory that is thrown away."""
    few = REAL_GRATINGS(256, 64)
    monkeypatch.setattr(data, "gratings", lambda: few)
    monkeypatch.setattr(session, "CHECKPOINT_SECONDS", 0)        # after every epoch
    monkeypatch.chdir(tmp_path)


def made_cifar100(folder, n=96):
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    names = [f"class {i}" for i in range(100)]
    part = lambda n: (torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator),
                      torch.arange(n) % 100)
    torch.save(dict(zip(data.Dataset._fields, (*part(n), *part(32), names))), folder / "cifar100.pt")
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(*args, out):
    """The log of a run, and its checkpoint."""
    assert train.main([*SMALL, *args, "--device", "cpu", "--out", str(out)]) == 0
    return lines(out / "log.jsonl"), torch.load(out / "checkpoint.pt", weights_only=True)


def made(case):
    return train.Trainer(flags.parse([*SMALL, "--device", "cpu", *case.split()]), data.gratings())


def parts(trainer):
    """What session.gather and session.restore take."""
    return (trainer.model, trainer.handle, [o for o, _ in trainer.optimisers], trainer.generator,
            trainer.recording)


def an_epoch(trainer, args, step=None, done=0):
    """The losses of an epoch, trained as train.main does, after `done` steps, but without a session."""
    trainer.model.train()
    count, losses = len(trainer.images), []
    for chosen in data.indices(count, args.batch_size, trainer.generator):
        progress = (done + len(losses)) / (args.epochs * data.steps(count, args.batch_size))
        for optimiser, first in trainer.optimisers:
            graph.set_rate(optimiser, first * (1 + math.cos(math.pi * progress)) / 2)
        losses.append((step or trainer.step)(chosen)[0].item())
    return losses


def without_time(log):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in log]


def tensors(state):
    if isinstance(state, torch.Tensor):
        return [state]
    children = (state.values() if isinstance(state, dict) else
                state if isinstance(state, (list, tuple)) else [])
    return [t for child in children for t in tensors(child)]


# ---- a run -------------------------------------------------------------------------------------------------

def test_the_headline_command_on_the_command_line(tmp_path):
    made_cifar100(tmp_path / "data")
    command = "--rule fa --muon --norm --dataset cifar100 --width 8 --epochs 2 --batch-size 32"
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *command.split()], cwd=tmp_path,
                          capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    # No bar without a terminal, no warning.
    assert done.stderr == "data/cifar100.pt holds 96 of the 50,000 training images of cifar100\n"
    said = done.stdout.splitlines()
    assert said[0].startswith("fa + muon + batch norm · resnet18, 182,252 parameters · cifar100, "
                              "96 + 32 images · cpu (no GPU was found), ")
    assert said[1:3] == ["Muon, learning rate 0.05: 19 hidden matrices, 174,336 weights",
                         "Nesterov SGD, learning rate 0.05: 43 tensors, 7,916 weights"]
    assert re.match(r"epoch   1/2  loss +\d+\.\d{4}  train +\d+\.\d%  test +\d+\.\d%  +\d+\.\d s  ", said[3])
    assert re.match(r"final test accuracy \d+\.\d% \(epoch 2, the last\) · ", said[5])
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name == "fa-muon-batch-cifar100-resnet18-s0"
    assert {p.name for p in folder.iterdir()} == {"checkpoint.pt", "config.json", "curves.png", "log.jsonl"}
    config = json.loads((folder / "config.json").read_text())
    assert config["args"]["norm"] == "batch" and config["args"]["lr"] == 0.05
    assert config["versions"]["torch"] == torch.__version__ and "train.py --rule fa" in config["command"]
    assert config["versions"]["cpu"].endswith(f", {torch.get_num_threads()} threads")
    log = lines(folder / "log.jsonl")
    assert [(line["epoch"], line["step"]) for line in log] == [(1, 3), (2, 6)]
    assert all(0 <= line[key] <= 1 for line in log for key in ("train_accuracy", "test_accuracy"))


def test_repaired_feedback_alignment_learns(monkeypatch, device):
    easy = REAL_GRATINGS(1000, 300, noise=5)
    monkeypatch.setattr(data, "gratings", lambda: easy)
    assert train.main(["--muon", "--norm", "--width", "8", "--epochs", "6", "--batch-size", "32",
                       "--out", "run", "--device", str(device)]) == 0
    assert lines(Path("run/log.jsonl"))[-1]["test_accuracy"] > 0.25             # chance is 10 %


@pytest.mark.parametrize("args", [["--muon", "--norm"], ["--rule", "bp"]], ids=str)
def test_the_same_seed_gives_the_same_bits_whether_ranks_are_recorded_or_not(args, tmp_path):
    plain, first = run(*args, out=tmp_path / "plain")
    recorded, second = run(*args, "--rank", out=tmp_path / "recorded")
    assert without_time(plain) == without_time(recorded)
    assert len(tensors(first)) > 10
    assert all(torch.equal(x, y) for x, y in zip(tensors(first), tensors(second)))
    ranks = lines(tmp_path / "recorded" / "rank.jsonl")
    assert [line["epoch"] for line in ranks] == [0, 1, 2] and not (tmp_path / "plain" / "rank.jsonl").exists()
    assert ranks[2]["trajectory"]["all layers"]["rows"] == 8
    assert "update" in ranks[2]["layers"]["layers.2"] and "update" not in ranks[0]["layers"]["layers.2"]
    drawn, others = (made(" ".join([*args, "--seed", seed])).model.state_dict() for seed in "01")
    for key in ("layers.0.weight", *(key for key in drawn if key.endswith("feedback"))):
        assert not torch.equal(drawn[key], others[key])


def test_training_loss_and_accuracy_are_means_over_all_images_of_the_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "augment", lambda images, *rest: images)
    log, checkpoint = run("--lr", "1e-30", "--weight-decay", "0", out=tmp_path / "run")
    trainer = made("")
    trainer.model.load_state_dict(checkpoint["model"])
    logits = trainer.model.eval()(trainer.normalise(trainer.images))
    assert log[-1]["train_accuracy"] == (logits.argmax(1) == trainer.labels).double().mean().item()
    assert log[-1]["train_loss"] == pytest.approx(F.cross_entropy(logits, trainer.labels).item(), rel=1e-5)


def test_the_accuracy_is_that_of_the_saved_weights(tmp_path):
    log, checkpoint = run("--norm", "--amp", out=tmp_path / "run")
    trainer = made("--norm --amp")
    trainer.model.load_state_dict(checkpoint["model"])
    trainer.model.train()
    assert trainer.test() == log[-1]["test_accuracy"]
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, checkpoint["model"][name])    # a test in training mode moves the statistics
    trainer = made("--norm")
    images, labels = trainer.test_images, trainer.test_labels
    predicted = trainer.model.eval()(trainer.normalise(images)).argmax(1)
    assert trainer.test() == pytest.approx((predicted == labels).float().mean().item())


def test_interventions_change_the_rank_of_the_hidden_updates_and_of_no_other(tmp_path):
    ranks = {}
    for name, own in {"plain": [], "cut": ["--cut", "1"], "flat": ["--flatten"]}.items():
        run("--norm", *own, "--rank", out=tmp_path / name)
        layers = lines(tmp_path / name / "rank.jsonl")[1]["layers"]
        ranks[name] = {layer: line["update"]["effective_rank"] for layer, line in layers.items()}
        ceilings = {layer: line["update"]["ceiling"] for layer, line in layers.items()}
    stem, *hidden, classifier = ranks["plain"]
    for layer in hidden:
        assert ranks["cut"][layer] == pytest.approx(1, abs=0.05) and ranks["plain"][layer] > 1.5
        assert ranks["flat"][layer] == pytest.approx(ceilings[layer], rel=0.01)
        assert ranks["plain"][layer] < 0.99 * ceilings[layer]
    for layer in (stem, classifier):
        assert ranks["cut"][layer] > 1.5 and ranks["flat"][layer] < 0.99 * ceilings[layer]


def test_validation_never_sees_the_test_set(tmp_path, capsys, monkeypatch):
    few = data.gratings()
    spoilt = few._replace(test_images=few.test_images * 0, test_labels=few.test_labels * 0)
    a, _ = run("--validate", "100", "--norm", out=tmp_path / "a")
    said = capsys.readouterr().out
    assert "128 + 100 held-out images" in said and "final held-out accuracy" in said
    monkeypatch.setattr(data, "gratings", lambda: spoilt)
    b, _ = run("--validate", "100", "--norm", out=tmp_path / "b")
    assert without_time(a) == without_time(b)


def test_the_learning_rates_follow_the_cosine(tmp_path, monkeypatch):
    real, rates = train.Trainer.step, []

    def step(self, chosen):
        rates.append([o.param_groups[0]["lr"] for o, _ in self.optimisers])
        return real(self, chosen)

    monkeypatch.setattr(train.Trainer, "step", step)
    run("--muon", "--norm", out=tmp_path / "run")
    assert (len(rates) == 8 and rates[0] == [0.05, 0.05] and rates[4][0] == pytest.approx(0.025)
            and 0 < rates[7][0] < 0.005)


def test_a_step_is_nesterov_sgd_on_the_gradient_of_augmented_images():
    """By the same images, drawn again, and a fresh torch.optim.SGD."""
    ours, theirs = made("--rule bp"), made("--rule bp")
    sgd = torch.optim.SGD(theirs.model.parameters(), 0.02, 0.9, weight_decay=5e-4, nesterov=True)
    for chosen in torch.arange(128).split(32):
        loss, correct, _ = ours.step(chosen)
        images, labels = data.batch(theirs.images, theirs.labels, chosen, theirs.generator, flip=False)
        logits = theirs.model((images - theirs.normalise.mean) / theirs.normalise.std)
        expected = torch.nn.functional.cross_entropy(logits, labels)
        sgd.zero_grad()
        expected.backward()
        sgd.step()
        assert loss == expected.detach() and correct == (logits.argmax(1) == labels).sum()
    assert torch.allclose(theirs.normalise(theirs.images).mean((0, 2, 3)), torch.zeros(3), atol=1e-4)


def test_flags_reach_what_they_name():
    plain, he = made("--norm"), made("--norm --init he")
    ratio = he.model.layers[2].feedback.std() / plain.model.layers[2].feedback.std()
    assert ratio == pytest.approx(6 ** 0.5, rel=0.1)                            # 2/fan_in to 1/(3 fan_in)
    gain = made("--norm --rule fa(gain=3)").model.layers[2].feedback
    assert torch.equal(gain, 3 * plain.model.layers[2].feedback)
    assert [*made("--exact layers.*").handle.layers] == ["classifier"]
    for own, decays in (("", [0.01, 0.01]), ("--muon-weight-decay 0", [0, 0.01])):
        trainer = made(f"--muon --weight-decay 0.01 {own}")
        assert [o.param_groups[0]["weight_decay"] for o, _ in trainer.optimisers] == decays


# ---- what goes wrong ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("where, step", [("loss", 8), ("gradient", 3), ("gradient", 8), ("update", 3)])
def test_what_is_not_finite_is_found_at_its_step_with_its_layer(where, step, monkeypatch, capsys):
    """Infinity put into one place at one step: a gradient of layers.2, and of nothing above it,
    or a weight by its update."""
    real = train.Trainer.step
    calls = []

    def descend(self, *args):
        calls.append(self)
        now = len(calls) == step
        layer = self.model.layers[2]
        handles = []
        if now and where == "gradient":
            for below in self.model.layers[:3]:     # as an error that becomes infinite at layers.2 would do
                handles.append(below.weight.register_hook(lambda g: g * float("inf")))
        if now and where == "loss":
            handles.append(self.model.classifier.register_forward_hook(lambda m, x, y: y + float("nan")))
        if now and where == "update":
            handles.append(self.optimisers[-1][0].register_step_post_hook(
                lambda *_: layer.weight.data[1, 2, 0, 1].fill_(float("-inf"))))
        result = real(self, *args)
        for handle in handles:
            handle.remove()
        return result

    monkeypatch.setattr(train.Trainer, "step", descend)
    assert train.main([*SMALL, "--device", "cpu", "--out", "run"]) == 3
    last = lines(Path("run/log.jsonl"))[-1]
    what = "the loss" if where == "loss" else f"the {where} of layers.2.weight"
    assert last["diverged"] and (last["step"], last["not_finite"]) == (step, what)
    assert last["test_accuracy"] is last["train_loss"] is None
    assert len(calls) == step                                   # on a CPU it stops there
    assert f"at step {step} (epoch {(step + 3) // 4}) {what} is not finite" in capsys.readouterr().out
    assert Path("run/curves.png").exists()


def test_each_parameter_is_in_exactly_one_optimiser(monkeypatch):
    split = muon.split
    for wrong in (lambda model: (split(model)[0], split(model)[1][1:]),         # nobody trains the stem
                  lambda model: (split(model)[0] + split(model)[1][:1], split(model)[1])):
        monkeypatch.setattr(muon, "split", wrong)
        with pytest.raises(RuntimeError, match="not in exactly one optimiser: layers.0.weight"):
            made("--muon --norm")


WRONG = {
    "--rule lottery": "'lottery' is no rule: choose from bp, fa",
    "--dataset mnist": "choose from gratings, cifar10, cifar100, or a folder of images, which this is not",
    "--dataset cifar100 --data nowhere": "cannot download cifar100",
    "--image-size 64": "no effect on gratings",
    "--subset 257": "gratings has 256 training images",
    "--subset 200 --validate 100": "gratings has 156 training images that are not held out",
    "--validate 256": "at least 1 that is left",
    "--subset 1 --norm": "needs two",
    "--batch-size 1 --norm": "--batch-size of at least 2",
    "--epochs 0": "not an integer of at least 1",
    "--lr 0": "not a finite number above 0",
    "--lr nan": "not a finite number above 0",
    "--weight-decay inf": "not a finite number of at least 0",
    "--seed 99999999999999999999": "at most",
    "--width 99999999999999999999": "at most",
    "--cut 99999999999999999999": "at most",
    "--muon-lr 0.1": "no effect without --muon",
    "--muon-weight-decay 0": "no effect without --muon",
    "--depth 3 --model resnet18": "no effect on resnet18",
    "--shortcut pad": "no effect on cnn: choose --model resnet18",
    "--model resnet18 --width 7 --shortcut conv": "choose --width 8, or --shortcut pad",
    "--exact layers.9": "cnn has no such layer, but layers.0, layers.1",
    "--exact layers.2 --rule bp": "which is exact everywhere",
    "--cut 3 --flatten": "not allowed with argument --cut",
    "--cut 3 --model mlp --depth 1": "no hidden weights",
    "--device tpu": "choose cpu, cuda or cuda:N",
    "--device cuda:99": "finds no GPU here; leave --device out",
    "--graph": "needs a GPU",
    "--out full": "full is not empty",
    "--out full/file": "cannot make the run folder full/file: File exists",
    "--resume full": "full is no run to go on with: full/config.json: No such file or directory",
    "--resume run --rule bp --seed 1": "--rule was fa and is bp, --seed was 0 and is 1; a run goes on as it",
    "--resume run --out full": "full is not empty",
}


def test_wrong_input_is_one_line_and_status_2_and_changes_no_file(tmp_path, capsys, monkeypatch):
    import torchvision
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "url", "http://127.0.0.1:9/cifar.tar.gz")
    Path("full").mkdir()
    Path("full/file").write_text("kept")
    assert train.main([*SMALL, "--epochs", "1", "--device", "cpu", "--out", "run"]) == 0
    capsys.readouterr()

    def found():
        return {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")
                if p.suffix != ".lock" and p.name != "nowhere"}             # a data folder may be new

    before = found()
    for wrong, why in WRONG.items():
        try:
            status = train.main([*([] if "--resume" in wrong else ["--device", "cpu"]), *wrong.split(" ")])
        except SystemExit as e:
            status = e.code
        out, err = capsys.readouterr()
        assert status == 2 and why in err and out == "", wrong
        assert err.startswith("train.py: ") and err.count("\n") == 1 and err.endswith("\n"), wrong
        assert found() == before, wrong
