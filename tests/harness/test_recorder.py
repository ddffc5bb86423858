"""harness/recorder.py: records what autograd computes by either rule, leaves no trace in the model, and goes
on where it was."""
import functools
import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fa
import models
import rank
from harness import recorder


def small(norm="batch"):
    torch.manual_seed(0)
    model = models.cnn(norm=norm, width=4, size=8)
    handle = fa.attach(model, fa.FA(seed=0))
    return model, handle, torch.randn(20, 3, 8, 8), torch.randint(10, (20,))


def by_autograd(model, x, labels):
    """By layer: its input, the error at its output, and its gradient."""
    inputs, errors = {}, {}

    def watch(layer, args, y, name):
        inputs[name] = args[0].detach()
        y.register_hook(lambda g: errors.__setitem__(name, g))

    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    hooks = [layer.register_forward_hook(functools.partial(watch, name=name))
             for name, layer in layers.items()]
    gradients = torch.autograd.grad(F.cross_entropy(model(x), labels), [m.weight for m in layers.values()])
    for hook in hooks:
        hook.remove()
    return inputs, errors, dict(zip(layers, gradients))


def test_the_recorder_measures_what_autograd_computes():
    model, handle, x, labels = small()
    inputs, errors, gradients = by_autograd(model, x, labels)
    with handle.exact():
        _, exact_errors, exact = by_autograd(model, x, labels)
    record = recorder.Recorder(model, handle, x, labels).measure()
    assert list(record) == list(gradients)
    for name, line in record.items():
        layer = model.get_submodule(name)
        for kind, tensor in (("error", errors), ("gradient", gradients), ("activation", inputs)):
            matrix = tensor[name].flatten(1)
            assert line[kind]["effective_rank"] == pytest.approx(rank.effective_rank(matrix), rel=1e-3)
            assert line[kind]["stable_rank"] == pytest.approx(rank.stable_rank(matrix), rel=1e-3)
            assert line[kind]["ceiling"] == min(matrix.shape)
        sigma = torch.linalg.svdvals(errors[name].flatten(1))
        assert line["spectrum"][:3] == pytest.approx((sigma[:3] / sigma[0]).tolist(), rel=1e-3)
        assert line["cosine"] == pytest.approx(rank.mean_cosine(inputs[name].flatten(1)))
        assert line["angle_gradient"] == pytest.approx(rank.angle(gradients[name], exact[name]), abs=0.05)
        assert line["angle_error"] == pytest.approx(rank.angle(errors[name], exact_errors[name]), abs=0.05)
        if name != "layers.0":
            assert line["angle_weight"] == rank.angle(layer.weight, layer.feedback)
            assert line["norm_ratio"] == pytest.approx((layer.feedback.norm() / layer.weight.norm()).item())
    assert record["classifier"]["angle_gradient"] < 0.05 and record["layers.1"]["angle_gradient"] > 30


def test_the_recorder_leaves_no_trace():
    model, handle, x, labels = small()
    model.eval()
    model.norms[0].train()
    model.norms[1].register_forward_hook(lambda m, args, y: F.dropout(y, 0.1))         # draws random numbers
    handle.rule.needs_targets, handle.rule.targets = True, "the training's"
    F.cross_entropy(model(x), labels).backward()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    gradients = [(p.grad, p.grad.clone()) for p in model.parameters()]
    modes, generator = [m.training for m in model.modules()], torch.get_rng_state()
    handle.rule.needs_input, model.layers[1].input = True, "the training's"
    hooks = [len(m._forward_hooks) for m in model.modules()]
    recorder.Recorder(model, handle, x, labels).measure()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is g and torch.equal(g, copy) for p, (g, copy) in zip(model.parameters(), gradients))
    assert modes == [m.training for m in model.modules()] and torch.equal(generator, torch.get_rng_state())
    assert hooks == [len(m._forward_hooks) for m in model.modules()]
    assert handle.rule.targets == model.layers[1].input == "the training's"
    assert "output" not in vars(model.layers[1]) and "input" not in vars(model.layers[2])


def test_activations_in_place_and_computed_weights_change_nothing():
    records = []
    for change in "none", "in place", "weight_norm":
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=change == "in place"), nn.Flatten(),
                              nn.Linear(4 * 36, 8), nn.ReLU(inplace=change == "in place"), nn.Linear(8, 5))
        x, labels = torch.randn(20, 3, 8, 8), torch.arange(20) % 5
        if change == "weight_norm":
            nn.utils.parametrizations.weight_norm(model[3])
        records.append([recorder.Recorder(model, fa.attach(model, rule), x, labels).measure()
                        for rule in (fa.BP(), fa.FA(seed=0))])
    for kind in "error", "gradient":
        for record in records[1:]:
            for mine, first in zip(record, records[0]):
                assert {name: line[kind]["effective_rank"] for name, line in mine.items()} == pytest.approx(
                    {name: line[kind]["effective_rank"] for name, line in first.items()}, rel=1e-4)
    angles = [record[1]["3"]["angle_gradient"] for record in records]
    assert angles == pytest.approx([angles[0]] * 3, abs=0.1)


@pytest.mark.parametrize("shortcut", ["conv", "none"])
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
    F.cross_entropy(model(x), labels).backward()
    kept = dict(seen)                                           # measure() runs these hooks too
    record = recorder.Recorder(model, handle, x, labels).measure()
    assert [name for name in record if "branch" in record[name]] == [f"blocks.{i}.conv1" for i in range(8)]
    for i in (0, 1, 3, 5, 7):                                   # where the shortcut is an identity
        whole, through = kept["whole", i], kept["sum", i]
        b, s = (whole - through).norm(), through.norm()
        expected = 1 if shortcut == "none" else (b / (b + s)).item()
        assert record[f"blocks.{i}.conv1"]["branch"] == pytest.approx(expected, rel=1e-3)


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
    assert record["stem"]["gradient"]["effective_rank"] == 0    # its weight is not trained
    json.dumps(record, allow_nan=False)


def test_an_overflow_is_recorded_as_none():
    model, handle, x, labels = small(norm=None)
    with torch.no_grad():
        model.classifier.weight.fill_(math.inf)
    record = recorder.Recorder(model, handle, x, labels).measure()
    assert record["classifier"]["error"] is None and record["classifier"]["angle_gradient"] is None
    json.dumps(record, allow_nan=False)


def test_the_sketch_changes_the_measured_rank_by_less_than_5_percent():
    """100 gradients of 30,000 weights and of rank 60, once exactly and once sketched to 4096 numbers."""
    model = nn.Sequential(nn.Linear(300, 100, bias=False))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(100, 60, generator=generator) @ torch.randn(60, 30_000, generator=generator)
    exact, sketched = recorder.Trajectory(model, size=30_000), recorder.Trajectory(model, size=4096)
    for row in rows:
        model[0].weight.grad = row.view(100, 300)
        exact.add()
        sketched.add()
    a, b = exact.ranks()["0"], sketched.ranks()
    assert a["effective_rank"] == pytest.approx(rank.effective_rank(rows), rel=1e-4)
    assert a["window"] == pytest.approx(rank.effective_rank(rows[-50:]), rel=1e-4)
    assert sketched.rows["0"][0].numel() == 4096 and b["0"]["rows"] == 100
    for key in ("effective_rank", "window"):
        assert b["0"][key] == pytest.approx(a[key], rel=0.05) == b["all layers"][key]


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
        weight.grad.fill_(step)
        with recording.step(), torch.no_grad():
            weight[0, 0, 0, step % 3] += 1 + step
        if step in (0, 199):
            assert recording.recorder._updates["layers.1"].sum() == pytest.approx(1)
    assert recording.recorder._updates["layers.1"].sum() == pytest.approx(201)
    line = recording.measure()
    assert line["layers"]["layers.1"]["update"]["effective_rank"] == pytest.approx(1)
    rows = recording.trajectory.rows["layers.1"]
    assert [row[0].item() for row in rows] == list(range(0, 203, 2))
    assert list(line) == ["layers", "trajectory", "seconds"] and line["trajectory"]["layers.1"]["rows"] == 102
