"""harness/recorder.py against what autograd computes, and without a trace in what it records."""
import functools
import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fa
import models
import muon
import rank
from harness import recorder


def small(norm="batch"):
    torch.manual_seed(0)
    model = models.cnn(norm=norm, width=4, size=8)
    handle = fa.attach(model, fa.FA(seed=0))
    return model, handle, torch.randn(20, 3, 8, 8), torch.randint(10, (20,))


def test_the_recorder_measures_what_autograd_computes():
    model, handle, x, labels = small()
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    errors, inputs = {}, {}

    def watch(layer, args, y, name):
        inputs[name] = args[0].detach()
        y.register_hook(lambda g: errors.__setitem__(name, g))

    hooks = [model.get_submodule(name).register_forward_hook(functools.partial(watch, name=name))
             for name in names]
    F.cross_entropy(model(x), labels).backward()
    for hook in hooks:
        hook.remove()
    ours = dict(errors)
    hooks = [model.get_submodule(name).register_forward_hook(functools.partial(watch, name=name))
             for name in names]
    with handle.exact():
        weights = [model.get_submodule(name).weight for name in names]
        true = torch.autograd.grad(F.cross_entropy(model(x), labels), weights)
    exact_errors, errors = errors, ours
    for hook in hooks:
        hook.remove()
    record = recorder.Recorder(model, handle, x, labels).measure()
    assert list(record) == names
    for name, exact in zip(names, true):
        layer, line = model.get_submodule(name), record[name]
        tensors = {"error": errors[name], "gradient": layer.weight.grad, "activation": inputs[name]}
        for kind, matrix in ((kind, tensor.flatten(1)) for kind, tensor in tensors.items()):
            assert line[kind]["effective_rank"] == pytest.approx(rank.effective_rank(matrix), rel=1e-3)
            assert line[kind]["stable_rank"] == pytest.approx(rank.stable_rank(matrix), rel=1e-3)
            assert line[kind]["ceiling"] == min(matrix.shape)
        assert line["spectrum"][0] == 1 and len(line["spectrum"]) <= len(recorder.Recorder.SPECTRUM)
        assert line["cosine"] == pytest.approx(rank.mean_cosine(inputs[name].flatten(1)))
        assert line["angle_gradient"] == pytest.approx(rank.angle(layer.weight.grad, exact), abs=0.05)
        assert line["angle_error"] == pytest.approx(rank.angle(errors[name], exact_errors[name]), abs=0.05)
        if name != names[0]:
            assert line["angle_weight"] == rank.angle(layer.weight, layer.feedback)
            assert line["norm_ratio"] == pytest.approx((layer.feedback.norm() / layer.weight.norm()).item())
    assert record["classifier"]["angle_gradient"] < 0.05 and record["layers.1"]["angle_gradient"] > 30


@pytest.mark.parametrize("shortcut", models.SHORTCUTS)
def test_the_share_of_the_branch_in_a_blocks_error(shortcut):
    """What an identity brings is the error of the sum; the rest of the error at the input is the branch's."""
    torch.manual_seed(0)
    model = models.resnet18(5, "batch", 8, shortcut=shortcut)
    x, labels, seen = torch.randn(4, 3, 8, 8), torch.arange(4), {}
    handle = fa.attach(model, fa.FA(gain=3))
    for i, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda m, args, i=i: args[0].register_hook(
            lambda g: seen.__setitem__(("whole", i), g)) and None)
        block.norm2.register_forward_hook(lambda m, args, y, i=i: y.register_hook(
            lambda g: seen.__setitem__(("sum", i), g)) and None)
    model.train()
    F.cross_entropy(model(x), labels).backward()
    kept = dict(seen)                                           # measure() runs these hooks too
    record = recorder.Recorder(model, handle, x, labels).measure()
    assert [name for name in record if "branch" in record[name]] == [f"blocks.{i}.conv1" for i in range(8)]
    for i in range(8):
        whole, through = kept["whole", i], kept["sum", i]
        if shortcut == "none":
            assert record[f"blocks.{i}.conv1"]["branch"] == 1
        elif i not in (2, 4, 6):
            b, s = (whole - through).norm(), through.norm()
            assert record[f"blocks.{i}.conv1"]["branch"] == pytest.approx((b / (b + s)).item(), rel=1e-3)
            assert 0 < record[f"blocks.{i}.conv1"]["branch"] < 1


class Odd(nn.Module):
    """A layer that never runs, one fed by name, a frozen stem, and attention, which calls no out_proj."""

    def __init__(self):
        super().__init__()
        self.stem, self.unused, self.named = nn.Linear(6, 8), nn.Linear(3, 3), nn.Linear(8, 8)
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 1)
        self.stem.requires_grad_(False)

    def forward(self, x):
        h = self.named(input=self.stem(x).relu())
        return self.head(self.attention(h, h, h)[0].mean(1))


def test_the_recorder_records_what_ran_by_the_loss_of_the_training():
    torch.manual_seed(0)
    model, x, targets = Odd(), torch.randn(5, 4, 6), torch.randn(5, 1)
    record = recorder.Recorder(model, fa.attach(model, fa.RULES["bp"]()), x, targets, F.mse_loss).measure()
    assert list(record) == ["stem", "named", "head"]
    F.mse_loss(model(x), targets).backward()
    exact = rank.effective_rank(model.named.weight.grad)
    assert record["named"]["gradient"]["effective_rank"] == pytest.approx(exact, rel=1e-3)
    error = 2 / 5 * (model(x) - targets).detach()               # of the mean of 5 squares
    assert record["head"]["error"]["stable_rank"] == pytest.approx(rank.stable_rank(error))
    assert record["stem"]["gradient"]["effective_rank"] == 0    # its weight is not trained
    json.dumps(record, allow_nan=False)


def test_the_recorder_leaves_no_trace():
    model, handle, x, labels = small()
    model.eval()
    model.norms[0].train()
    F.cross_entropy(model(x), labels).backward()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    gradients = [(p.grad, p.grad.clone()) for p in model.parameters()]
    modes, generator = [m.training for m in model.modules()], torch.get_rng_state()
    recorder.Recorder(model, handle, x, labels).measure()
    assert handle.rule.targets is None
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is g and torch.equal(g, copy) for p, (g, copy) in zip(model.parameters(), gradients))
    assert modes == [m.training for m in model.modules()] and torch.equal(generator, torch.get_rng_state())
    assert all(len(m._forward_hooks) == 0 for m in model.modules())


def test_the_update_is_the_one_that_was_applied():
    model, handle, x, labels = small()
    watcher = recorder.Recorder(model, handle, x, labels)
    assert "update" not in watcher.measure()["layers.1"]
    hidden, _ = muon.split(model)
    optimiser = muon.Muon(hidden, lr=0.1)
    F.cross_entropy(model(x), labels).backward()
    before = model.layers[1].weight.detach().clone()
    with watcher.watch_update():
        optimiser.step()
    expected = rank.effective_rank((model.layers[1].weight.detach() - before).flatten(1))
    update = watcher.measure()["layers.1"]["update"]
    assert update["effective_rank"] == pytest.approx(expected) and expected > 7.5   # of 8: nearly full


def test_an_overflow_is_recorded_as_none():
    model, handle, x, labels = small(norm=None)
    with torch.no_grad():
        model.classifier.weight.fill_(math.inf)
    record = recorder.Recorder(model, handle, x, labels).measure()
    assert record["classifier"]["error"] is None and record["classifier"]["angle_gradient"] is None
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize("true_rank", [3, 30, None])
def test_the_sketch_changes_the_measured_rank_by_less_than_5_percent(true_rank):
    """200 gradients of 60,000 weights, once exactly and once sketched to 8192 numbers."""
    model = nn.Sequential(nn.Linear(300, 200, bias=False))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 60_000, generator=generator)
    if true_rank:
        rows = torch.randn(200, true_rank, generator=generator) @ rows[:true_rank]
    exact, sketched = recorder.Trajectory(model, size=60_000), recorder.Trajectory(model, size=8192)
    for row in rows:
        model[0].weight.grad = row.view(200, 300)
        exact.add()
        sketched.add()
    a, b = exact.ranks(), sketched.ranks()
    assert a["0"]["effective_rank"] == pytest.approx(rank.effective_rank(rows), rel=1e-4)
    assert a["0"]["window"] == pytest.approx(rank.effective_rank(rows[-50:]), rel=1e-4)
    for key in ("effective_rank", "window"):
        assert b["0"][key] == pytest.approx(a["0"][key], rel=0.05) and b["0"][key] != a["0"][key]
        assert b["all layers"][key] == pytest.approx(a["0"][key], rel=0.05)
    assert sketched.rows["0"][0].numel() == 8192 and b["0"]["rows"] == 200


def test_a_recording_is_both_over_a_run_and_goes_on_where_it_was():
    """3 epochs of 200 steps: the update is that of an epoch's first step, every second step leaves a row."""
    model, handle, x, labels = small()
    recording = recorder.Recording(model, handle, x, labels, steps_per_epoch=200, epochs=3)
    F.cross_entropy(model(x), labels).backward()
    weight = model.layers[1].weight
    for step in range(203):
        if step == 202:                                         # a stop and a new start
            saved, recording = recording.state_dict(), recorder.Recording(model, handle, x, labels, 200, 3)
            recording.load_state_dict(saved)
        with recording.step(), torch.no_grad():
            weight[0, 0, 0, step % 3] += 1 + step
        if step in (0, 199):
            assert recording.recorder._updates["layers.1"].sum() == pytest.approx(1)
    assert recording.recorder._updates["layers.1"].sum() == pytest.approx(201)
    line = recording.measure()
    assert list(line) == ["layers", "trajectory", "seconds"] and line["trajectory"]["layers.1"]["rows"] == 102
