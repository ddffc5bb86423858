"""train.py as a user types it: the run folder, determinism, divergence, and every wrong input."""
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


def run(*args, out):
    assert train.main([*SMALL, *args, "--out", str(out)]) == 0
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return log, torch.load(out / "checkpoint.pt", weights_only=True)


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


def cli(*args, cwd, **env):
    return subprocess.run([sys.executable, str(ROOT / "train.py"), *args], cwd=cwd, capture_output=True,
                          text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **env})


def test_the_headline_command_on_the_command_line(tmp_path):
    made_cifar100(tmp_path / "data")
    done = cli("--rule", "fa", "--muon", "--norm", "--dataset", "cifar100", "--width", "8", "--epochs", "2",
               "--batch-size", "32", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    part = "data/cifar100.pt holds 96 of the 50,000 training images of cifar100\n"
    assert done.stderr == part                                  # no bar without a terminal, no warning
    head, sgd_and_muon, epochs, last = (done.stdout.splitlines()[i:j]
                                        for i, j in ((0, 1), (1, 3), (3, 5), (5, None)))
    precision = ("bf16 autocast (this CPU has it)" if flags.computes_bf16(torch.device("cpu")) else
                 "float32 (this CPU has no bf16)")
    assert head == ["fa + muon + batch norm · resnet18, 182,252 parameters · cifar100, 96 + 32 images · "
                    f"cpu (no GPU was found), {precision}"]
    assert sgd_and_muon == ["Muon, learning rate 0.05: 19 hidden matrices, 174,336 weights",
                            "Nesterov SGD, learning rate 0.05: 43 tensors, 7,916 weights"]
    assert re.match(r"epoch   1/2  loss +\d+\.\d{4}  train +\d+\.\d%  test +\d+\.\d%  "
                    r"+\d+\.\d s  \d+m \d\ds left", epochs[0])
    assert (re.match(r"final test accuracy \d+\.\d% \(epoch 2, the last\) · \d+m \d\ds · runs", last[0])
            and len(last) == 1)
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name == "fa-muon-batch-cifar100-resnet18-s0"
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoint.pt", "config.json", "curves.png",
                                                        "log.jsonl"]
    config = json.loads((folder / "config.json").read_text())
    assert (config["args"]["muon"] is True and config["args"]["norm"] == "batch"
            and config["args"]["lr"] == 0.05)
    assert config["versions"]["torch"] == torch.__version__ and "train.py --rule fa" in config["command"]
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in log] == [1, 2] and log[-1]["step"] == 6
    for line in log:
        assert {"epoch", "train_loss", "train_accuracy", "test_accuracy", "seconds"} <= line.keys()
        assert 0 <= line["train_accuracy"] <= 1 and 0 <= line["test_accuracy"] <= 1


def test_on_the_device(device, tmp_path):
    log, _ = run("--muon", "--norm", "--device", str(device), out=tmp_path / "run")
    assert len(log) == 2


@pytest.mark.parametrize("model", ["cnn", "resnet18", "mlp"])
def test_the_same_seed_gives_the_same_bits_and_another_does_not(model, tmp_path):
    args = ["--muon", "--norm", "--model", model, "--width", "8", "--device", "cpu"]
    a, first = run(*args, out=tmp_path / "a")
    b, second = run(*args, out=tmp_path / "b")
    c, third = run(*args, "--seed", "1", out=tmp_path / "c")
    assert without_time(a) == without_time(b) != without_time(c)
    assert (len(tensors(first)) > 10
            and all(torch.equal(x, y) for x, y in zip(tensors(first), tensors(second))))
    assert not torch.equal(first["model"]["classifier.feedback"], third["model"]["classifier.feedback"])


@pytest.mark.parametrize("args", [[], ["--muon", "--norm"], ["--rule", "bp"]], ids=str)
def test_recording_ranks_changes_no_bit_of_the_training(args, tmp_path):
    plain, first = run(*args, "--device", "cpu", out=tmp_path / "plain")
    recorded, second = run(*args, "--device", "cpu", "--rank", out=tmp_path / "recorded")
    assert without_time(plain) == without_time(recorded)
    assert all(torch.equal(x, y) for x, y in zip(tensors(first), tensors(second)))
    lines = [json.loads(line) for line in (tmp_path / "recorded" / "rank.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2] and not (tmp_path / "plain" / "rank.jsonl").exists()
    assert (lines[2]["trajectory"]["all layers"]["rows"] == 8
            and lines[2]["layers"]["layers.2"]["update"]["ceiling"] == 16)
    assert "update" not in lines[0]["layers"]["layers.2"]


@pytest.mark.parametrize("args", [[], ["--rule", "bp"], ["--norm", "layer"], ["--norm", "rms", "--muon"],
                                  ["--amp"], ["--depth", "2"], ["--depth", "1", "--muon", "--model", "mlp"]],
                         ids=str)
def test_every_kind_of_run(args, tmp_path):
    log, checkpoint = run(*args, "--device", "cpu", out=tmp_path / "run")
    assert len(log) == 2 and not log[-1]["diverged"]
    assert ("classifier.feedback" in checkpoint["model"]) == ("bp" not in args)


@pytest.mark.parametrize("args", [["--muon", "--norm"], []], ids=str)
def test_frozen_leaves_hidden_parameters_unchanged(args, tmp_path):
    _, checkpoint = run("--rule", "frozen", *args, "--rank", "--device", "cpu", out=tmp_path / "run")
    fresh = train.Trainer(flags.parse([*SMALL, *args, "--rule", "frozen", "--device", "cpu"]),
                          data.gratings()).model
    for name, p in fresh.named_parameters():                    # weight decay leaves them alone too
        assert torch.equal(p, checkpoint["model"][name]) == (not name.startswith("classifier"))


def test_repaired_feedback_alignment_learns(tmp_path, monkeypatch):
    easy = REAL_GRATINGS(1000, 500, noise=5)
    monkeypatch.setattr(data, "gratings", lambda: easy)
    assert train.main(["--muon", "--norm", "--width", "8", "--epochs", "8", "--batch-size", "32",
                       "--out", "run", "--device", "cpu"]) == 0
    last = json.loads(Path("run/log.jsonl").read_text().splitlines()[-1])
    assert last["test_accuracy"] > 0.4                          # chance is 10 %


def test_the_accuracy_is_that_of_the_saved_weights(tmp_path):
    log, checkpoint = run("--norm", "--device", "cpu", out=tmp_path / "run")
    args = flags.parse([*SMALL, "--norm", "--device", "cpu"])
    trainer = train.Trainer(args, data.gratings())
    trainer.model.load_state_dict(checkpoint["model"])
    trainer.model.train()
    assert trainer.test() == log[-1]["test_accuracy"]
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, checkpoint["model"][name])    # a test in training mode moves the statistics
    images, labels = trainer.test_images, trainer.test_labels
    predicted = trainer.model.eval()(trainer.normalise(images)).argmax(1)
    assert (predicted == labels).float().mean().item() == pytest.approx(log[-1]["test_accuracy"])


@pytest.mark.parametrize("args", [["--norm"], ["--norm", "--rule", "bp"], ["--norm", "--muon"]], ids=str)
def test_interventions_change_the_rank_of_the_hidden_updates_and_of_no_other(args, tmp_path):
    ranks = {}
    for name, own in {"plain": [], "cut": ["--cut", "1"], "flat": ["--flatten"]}.items():
        run(*args, *own, "--rank", out=tmp_path / name)
        layers = json.loads((tmp_path / name / "rank.jsonl").read_text().splitlines()[1])["layers"]
        ranks[name] = {layer: line["update"]["effective_rank"] for layer, line in layers.items()}
        ceilings = {layer: line["update"]["ceiling"] for layer, line in layers.items()}
    stem, *hidden, classifier = ranks["plain"]
    for layer in hidden:
        assert ranks["cut"][layer] == pytest.approx(1, abs=0.05) and ranks["plain"][layer] > 1.5
        assert ranks["flat"][layer] == pytest.approx(ceilings[layer], rel=0.01)
        assert ranks["plain"][layer] < 0.99 * ceilings[layer]
    for layer in (stem, classifier):
        assert ranks["cut"][layer] > 1.5 and ranks["flat"][layer] < 0.99 * ceilings[layer]


def test_the_initialisation_and_the_feedback_as_asked(tmp_path):
    def feedback(*args, name):
        model = run(*args, out=tmp_path / name)[1]["model"]
        return model["layers.2.feedback"]

    plain, he = feedback("--norm", name="plain"), feedback("--norm", "--init", "he", name="he")
    assert he.std() / plain.std() == pytest.approx(6 ** 0.5, rel=0.1)           # 2/fan_in to 1/(3 fan_in)
    assert torch.equal(feedback("--norm", "--rule", "fa(gain=3)", name="gain"), 3 * plain)


def test_muons_own_weight_decay(tmp_path):
    for name, own, decays in (("both", [], {1e-2}), ("own", ["--muon-weight-decay", "0"], {0.0, 1e-2})):
        state = run("--muon", "--weight-decay", "0.01", *own, out=tmp_path / name)[1]
        assert {group["weight_decay"] for o in state["optimisers"] for group in o["param_groups"]} == decays


def test_validation_never_sees_the_test_set(tmp_path, capsys, monkeypatch):
    few = data.gratings()
    spoilt = few._replace(test_images=few.test_images * 0, test_labels=few.test_labels * 0)
    a, _ = run("--validate", "100", "--norm", "--device", "cpu", out=tmp_path / "a")
    assert ("128 + 100 held-out images" in (out := capsys.readouterr().out)
            and "final held-out accuracy" in out)
    monkeypatch.setattr(data, "gratings", lambda: spoilt)
    b, _ = run("--validate", "100", "--norm", "--device", "cpu", out=tmp_path / "b")
    assert without_time(a) == without_time(b)


def test_the_learning_rates_follow_the_cosine(tmp_path, monkeypatch):
    real, rates = train.Trainer.step, []

    def step(self, chosen):
        rates.append([o.param_groups[0]["lr"] for o, _ in self.optimisers])
        return real(self, chosen)

    monkeypatch.setattr(train.Trainer, "step", step)
    run("--muon", "--norm", "--device", "cpu", out=tmp_path / "run")
    assert (len(rates) == 8 and rates[0] == [0.05, 0.05] and rates[4][0] == pytest.approx(0.025)
            and 0 < rates[7][0] < 0.005)


def test_divergence_ends_the_run_cleanly(tmp_path, capsys):
    status = train.main([*SMALL, "--lr", "1e30", "--device", "cpu", "--out", str(tmp_path / "run")])
    assert status == 3
    (line,) = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert (line["diverged"] is True and line["test_accuracy"] is None and line["train_loss"] is None
            and line["step"] == 2)
    assert f"diverged: at step {line['step']} (epoch 1) the loss is not finite" in capsys.readouterr().out
    assert (tmp_path / "run" / "curves.png").exists()


@pytest.mark.parametrize("step", [3, 8])
@pytest.mark.parametrize("where", ["loss", "gradient", "update"])
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
    last = json.loads(Path("run/log.jsonl").read_text().splitlines()[-1])
    what = "the loss" if where == "loss" else f"the {where} of layers.2.weight"
    assert ((last["diverged"], last["step"], last["not_finite"], last["test_accuracy"])
            == (True, step, what, None))
    assert len(calls) == step                                   # on a CPU it stops there
    assert f"at step {step} (epoch {(step + 3) // 4}) {what} is not finite" in capsys.readouterr().out


def test_each_parameter_is_in_exactly_one_optimiser():
    layer = torch.nn.Linear(2, 3)
    sgd = lambda *params: torch.optim.SGD(params, 0.1)
    session.each_in_one(layer, [sgd(layer.weight), sgd(layer.bias)])
    for wrong in ([sgd(layer.weight)], [sgd(layer.weight, layer.bias), sgd(layer.bias)]):
        with pytest.raises(RuntimeError, match="not in exactly one optimiser: bias"):
            session.each_in_one(layer, wrong)


def test_a_trainer_sees_a_parameter_that_nobody_trains(monkeypatch):
    monkeypatch.setattr(muon, "split", lambda model: ([model.layers[1].weight], [model.classifier.weight]))
    with pytest.raises(RuntimeError, match="not in exactly one optimiser: layers.0.weight"):
        train.Trainer(flags.parse([*SMALL, "--muon", "--norm", "--device", "cpu"]), data.gratings())


def test_default_folders_never_collide(tmp_path):
    for _ in range(2):
        assert train.main([*SMALL, "--epochs", "1", "--device", "cpu"]) == 0
    assert sorted(p.name for p in Path("runs").iterdir()) == ["fa-gratings-cnn-s0", "fa-gratings-cnn-s0-2"]


WRONG = {
    "--rule lottery": "'lottery' is no rule: choose from bp, fa",
    "--dataset mnist": "choose from gratings, cifar10, cifar100, or a folder of images, which this is not",
    "--model vgg": "invalid choice: 'vgg'",
    "--norm instance": "invalid choice: 'instance'",
    "--width 0": "not an integer of at least 1",
    "--epochs 0": "not an integer of at least 1",
    "--epochs 1.5": "not an integer",
    "--subset 0": "not an integer of at least 1",
    "--batch-size -3": "not an integer of at least 1",
    "--subset 257": "gratings has 256 training images",
    "--subset 200 --validate 100": "gratings has 156 training images that are not held out",
    "--validate 256": "none would be left",
    "--subset 1 --norm": "needs two",
    "--batch-size 1 --norm": "--batch-size of at least 2",
    "--lr 0": "not a finite number above 0",
    "--lr nan": "not a finite number above 0",
    "--lr inf": "not a finite number above 0",
    "--muon --muon-lr -1": "not a finite number above 0",
    "--muon-lr 0.1": "no effect without --muon",
    "--depth 0": "not an integer of at least 1",
    "--depth 3 --model resnet18": "no effect on resnet18",
    "--weight-decay -1": "at least 0",
    "--muon-weight-decay 0": "no effect without --muon",
    "--init xavier": "invalid choice: 'xavier'",
    "--exact layers.9": "cnn has no such layer, but layers.0, layers.1",
    "--exact layers.2 --rule bp": "which is exact everywhere",
    "--shortcut pad": "no effect on cnn: choose --model resnet18",
    "--shortcut long --model resnet18": "invalid choice: 'long'",
    "--cut 0": "not an integer of at least 1",
    "--cut 3 --flatten": "not allowed with argument --cut",
    "--cut 3 --model mlp --depth 1": "no hidden weights",
    "--rank 0": "not an integer of at least 1",
    "--seed -1": "at least 0",
    "--seed 99999999999999999999": "at most",
    "--device tpu": "choose cpu, cuda or cuda:N",
    "--device gpu7": "choose cpu, cuda or cuda:N",
    "--out full": "full is not empty",
    "--out full/file": "cannot make the run folder full/file: File exists",
    "--out full/file/run": "cannot make the run folder",
    "--out /proc/run": "cannot make the run folder",
    "--dataset cifar100 --data full/file": "cannot use full/file/cifar100.pt",
    "--dataset cifar100 --data other": "does not hold cifar100: it has 10 classes",
    "--dataset cifar100 --data truncated": "is damaged",
    "--dataset cifar100 --data nowhere": "cannot download cifar100",
    "--nonsense": "unrecognized arguments",
    "train": "unrecognized arguments: train",
    "--rule": "expected one argument",
    "--rule nowhere.py:Mine": "nowhere.py: No such file or directory",
    "--rule full/file:Mine": "full/file, line 1",
    "--rule full:Mine": "full: Is a directory",
    "--rule :": "is no rule",
    "--norm batch layer": "unrecognized arguments: layer",
    "--dataset full": "full is no data set",
    "--dataset \u0434\u0430\u043d\u043d\u044b\u0435": "choose from gratings, cifar10, cifar100, or a folder "
                                                      "of images",
    "--dataset cifar10 --data other": "cannot download cifar10",
    "--dataset cifar100 --data garbage": "is damaged",
    "--dataset cifar100 --data code": "is damaged",
    "--dataset cifar100 --data list": "it must be a dict",
    "--dataset cifar100 --data labels": "train_labels must be from 0 to 99",
    "--dataset cifar100 --data floats": "train_images must be uint8",
    "--dataset cifar100 --data /proc": "cannot use /proc/cifar100.pt: ",
    "--image-size 7": "not an integer of at least 8",
    "--image-size 64": "no effect on gratings",
    "--subset 1e3": "not an integer",
    "--validate 0": "not an integer of at least 1",
    "--width -1": "not an integer of at least 1",
    "--width 9e9": "not an integer",
    "--lr 1,5": "not a finite number",
    "--lr": "expected one argument",
    "--muon --muon-lr 0": "not a finite number above 0",
    "--muon --muon-weight-decay -1": "at least 0",
    "--graph": "needs a GPU",
    "--amp yes": "unrecognized arguments: yes",
    "--deterministic=1": "ignored explicit argument '1'",
    "--device cuda:99": "finds no GPU here",
    "--device meta": "choose cpu, cuda or cuda:N",
    "--out " + "long" * 100: "File name too long",
    "--resume": "expected one argument",
    "--resume nowhere": "nowhere is no run to go on with: nowhere/config.json: No such file or directory",
    "--resume full": "full is no run to go on with: full/config.json: No such file or directory",
    "--resume full/file": "full/file is no run to go on with",
    "--resume run --lr 0.1": "--lr was 0.02 and is 0.1; a run goes on as it began",
    "--resume run --rule bp --seed 1": "--rule was fa and is bp, --seed was 0 and is 1",
    "--resume run --muon": "--muon was False and is True; a run goes on",
    "--resume run --epochs 0": "not an integer of at least 1",
    "--resume run --out full": "full is not empty",
}


def test_every_flag_is_among_the_wrong_inputs():
    known = {flag for action in flags.parser()._actions for flag in action.option_strings[:1]}
    missing = {flag for flag in known - {"-h"} if not any(flag in case for case in WRONG)}
    assert not missing and len(WRONG) >= 60


class Code:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_input_is_one_line_and_status_2(wrong, tmp_path, capsys, monkeypatch):
    import torchvision
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "url", "http://127.0.0.1:9/cifar.tar.gz")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    cache = torch.load(made_cifar100(tmp_path / "other") / "cifar100.pt")
    torch.save({**cache, "classes": ["airplane", *"12345678", "truck"]}, tmp_path / "other" / "cifar100.pt")
    raw = (made_cifar100(tmp_path / "truncated") / "cifar100.pt").read_bytes()
    (tmp_path / "truncated" / "cifar100.pt").write_bytes(raw[:10000])
    spoilt = {"code": {"train_images": Code()}, "list": [cache],
              "labels": {**cache, "train_labels": cache["train_labels"] + 5},
              "floats": {**cache, "train_images": cache["train_images"].float()}}
    for folder, content in spoilt.items():
        (tmp_path / folder).mkdir()
        torch.save(content, tmp_path / folder / "cifar100.pt")
    (tmp_path / "garbage").mkdir()
    (tmp_path / "garbage" / "cifar100.pt").write_bytes(bytes(range(256)) * 50)
    if "--resume run" in wrong:
        train.main([*SMALL, "--epochs", "1", "--device", "cpu", "--out", "run"])
        capsys.readouterr()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    folders = sorted(p for p in tmp_path.rglob("*") if p.is_dir())
    try:
        status = train.main([*([] if "--resume" in wrong else [*SMALL[4:6], "--device", "cpu"]),
                             *wrong.split(" ")])
    except SystemExit as e:
        status = e.code
    out, err = capsys.readouterr()
    assert status == 2 and WRONG[wrong] in err and out == ""
    assert err.startswith("train.py: ") and err.count("\n") == 1 and err.endswith("\n")
    after = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and not p.name.endswith(".lock")}
    assert after == before                      # nothing written, nothing lost; a data folder may be new
    assert sorted(p for p in tmp_path.rglob("*") if p.is_dir() and p.name != "nowhere") == folders


def test_cuda_without_a_gpu(tmp_path):
    done = cli("--device", "cuda", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and not list(tmp_path.iterdir())
    assert done.stderr.count("\n") == 1 and "finds no GPU here; leave --device out" in done.stderr


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as e:
        train.main(["--help"])
    text = capsys.readouterr().out
    assert e.value.code == 0
    for action in flags.parser()._actions:
        assert action.help and action.option_strings[0] in text
