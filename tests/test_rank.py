"""rank.py against matrices whose answer is known by hand, and an SVD."""
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

MEASURES = [rank.effective_rank, rank.participation_ratio, rank.stable_rank]


def with_spectrum(sigma, m=40, n=60):
    generator = torch.Generator().manual_seed(0)
    k = len(sigma)
    P = torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=torch.float64))[0]
    Q = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64))[0]
    return P @ torch.tensor(sigma, dtype=torch.float64).diag() @ Q.mT


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_n_equal_singular_values_have_rank_n(measure, n):
    M = with_spectrum([3.0] * n)
    for matrix in (M, M.mT, 1e-30 * M, 1e200 * M, M.float()):
        assert measure(matrix) == pytest.approx(n, rel=1e-3 if n > 1 else 1e-2)
    assert measure(torch.eye(n)) == pytest.approx(n)


def test_two_unequal_singular_values_by_hand():
    M = with_spectrum([3.0, 1.0])
    assert rank.effective_rank(M) == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))), rel=1e-5)
    assert rank.participation_ratio(M) == pytest.approx((9 + 1) ** 2 / (81 + 1))
    assert rank.stable_rank(M) == pytest.approx((9 + 1) / 9)


def test_the_docstrings_example():
    M = with_spectrum([1 / i for i in range(1, 101)], 100, 100)
    assert [round(measure(M), 1) for measure in MEASURES] == [39.7, 2.5, 1.6]


@pytest.mark.parametrize("shape", [(30, 200), (200, 30), (50, 50)], ids=str)
def test_singular_values_are_an_svds(shape):
    torch.manual_seed(0)
    M = torch.randn(shape)
    expected = torch.linalg.svdvals(M.double())
    assert torch.allclose(rank.singular_values(M), expected, rtol=1e-9)
    p = expected / expected.sum()
    assert rank.effective_rank(M) == pytest.approx(torch.exp(-(p * p.log()).sum()).item(), rel=1e-9)


@pytest.mark.parametrize("measure", MEASURES)
def test_rotation_and_scale_change_nothing(measure):
    torch.manual_seed(0)
    M = torch.randn(20, 30, dtype=torch.float64)
    P, Q = (torch.linalg.qr(torch.randn(k, k, dtype=torch.float64))[0] for k in (20, 30))
    assert measure(7 * P @ M @ Q) == pytest.approx(measure(M))


@pytest.mark.parametrize("measure", MEASURES)
def test_edges(measure):
    assert measure(torch.zeros(3, 4)) == 0
    assert measure(torch.ones(3, 4)) == pytest.approx(1, abs=1e-6)
    for bad in (torch.zeros(0, 4), torch.zeros(4), torch.zeros(2, 3, 4), torch.tensor([[1, math.nan]]),
                torch.tensor([[1, math.inf]])):
        with pytest.raises(ValueError):
            measure(bad)


def test_angle():
    a = torch.tensor([[1.0, 0.0]])
    assert rank.angle(a, torch.tensor([[0.0, 2.0]])) == pytest.approx(90)
    assert rank.angle(a, torch.tensor([[3.0, 3.0]])) == pytest.approx(45)
    assert rank.angle(a, 5 * a) == 0 and rank.angle(a, -a) == pytest.approx(180)
    assert math.isnan(rank.angle(a, 0 * a))
    with pytest.raises(ValueError):
        rank.angle(a, torch.ones(2))


def test_mean_cosine():
    rows = torch.tensor([[1.0, 0.0], [-2.0, 0.0], [0.0, 3.0]])
    assert rank.mean_cosine(rows) == pytest.approx((1 + 0 + 0) / 3)


# ---- the recorder ------------------------------------------------------------------------------------------------

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

    hooks = [model.get_submodule(name).register_forward_hook(functools.partial(watch, name=name)) for name in names]
    F.cross_entropy(model(x), labels).backward()
    for hook in hooks:
        hook.remove()
    with handle.exact():
        true = torch.autograd.grad(F.cross_entropy(model(x), labels), [model.get_submodule(n).weight for n in names])
    record = rank.Recorder(model, handle, x, labels).measure()
    assert list(record) == names
    for name, exact in zip(names, true):
        layer, line = model.get_submodule(name), record[name]
        for kind, tensor in {"error": errors[name], "gradient": layer.weight.grad, "activation": inputs[name]}.items():
            assert line[kind]["effective_rank"] == pytest.approx(rank.effective_rank(tensor.flatten(1)), rel=1e-3)
            assert line[kind]["stable_rank"] == pytest.approx(rank.stable_rank(tensor.flatten(1)), rel=1e-3)
            assert line[kind]["ceiling"] == min(tensor.flatten(1).shape)
        assert line["spectrum"][0] == 1 and len(line["spectrum"]) <= len(rank.Recorder.SPECTRUM)
        assert line["cosine"] == pytest.approx(rank.mean_cosine(inputs[name].flatten(1)))
        assert line["angle_gradient"] == pytest.approx(rank.angle(layer.weight.grad, exact), abs=0.05)
        if name != names[0]:
            assert line["angle_weight"] == rank.angle(layer.weight, layer.feedback)
    assert record["classifier"]["angle_gradient"] < 0.05 and record["layers.1"]["angle_gradient"] > 30


class Odd(nn.Module):
    """A layer that never runs, one that gets its input by name, a frozen stem, and attention, which calls no out_proj."""

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
    record = rank.Recorder(model, fa.attach(model, fa.RULES["bp"]()), x, targets, F.mse_loss).measure()
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
    rank.Recorder(model, handle, x, labels).measure()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is g and torch.equal(g, copy) for p, (g, copy) in zip(model.parameters(), gradients))
    assert modes == [m.training for m in model.modules()] and torch.equal(generator, torch.get_rng_state())
    assert all(len(m._forward_hooks) == 0 for m in model.modules())


def test_the_update_is_the_one_that_was_applied():
    model, handle, x, labels = small()
    recorder = rank.Recorder(model, handle, x, labels)
    assert "update" not in recorder.measure()["layers.1"]
    hidden, _ = muon.split(model)
    optimiser = muon.Muon(hidden, lr=0.1)
    F.cross_entropy(model(x), labels).backward()
    before = model.layers[1].weight.detach().clone()
    with recorder.watch_update():
        optimiser.step()
    expected = rank.effective_rank((model.layers[1].weight.detach() - before).flatten(1))
    update = recorder.measure()["layers.1"]["update"]
    assert update["effective_rank"] == pytest.approx(expected) and expected > 7.5       # of 8: Muon's is nearly full


def test_an_overflow_is_recorded_as_none():
    model, handle, x, labels = small(norm=None)
    with torch.no_grad():
        model.classifier.weight.fill_(math.inf)
    record = rank.Recorder(model, handle, x, labels).measure()
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
    exact, sketched = rank.Trajectory(model, size=60_000), rank.Trajectory(model, size=8192)
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


def test_the_picture_and_its_errors(tmp_path, capsys, monkeypatch):
    model, handle, x, labels = small()
    recorder, trajectory = rank.Recorder(model, handle, x, labels), rank.Trajectory(model)
    F.cross_entropy(model(x), labels).backward()
    lines = []
    for epoch in range(3):
        lines.append({"epoch": epoch, "layers": recorder.measure(), "trajectory": trajectory.ranks()})
        trajectory.add()
    for line in lines[1:]:                                      # an overflow leaves a gap, not an error
        line["layers"]["layers.3"].update(gradient=None, error=None, spectrum=[], angle_gradient=None)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"args": {"rule": "fa", "muon": name == "b", "norm": None}}))
        (tmp_path / name / "rank.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    picture = tmp_path / "rank.png"
    assert rank.main([str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(picture)]) == 0
    assert picture.read_bytes()[:4] == b"\x89PNG"
    labels = []
    monkeypatch.setattr(rank, "draw", lambda path, runs: labels.append([label for label, _ in runs]))
    (tmp_path / "c").symlink_to(tmp_path / "a")
    for name in ("alice", "bob"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank.jsonl").write_text((tmp_path / "a" / "rank.jsonl").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps({"args": {"rule": f"handed in/{name}.py:MyRule", "muon": False,
                                                                          "norm": None}}))
    assert rank.main([str(tmp_path / name) for name in "abc"]) == 0            # equal labels are told apart by the folder
    assert rank.main([str(tmp_path / "alice"), str(tmp_path / "bob")]) == 0
    assert labels == [["fa + no norm (a)", "fa + muon + no norm", "fa + no norm (c)"],
                      ["alice.MyRule + no norm", "bob.MyRule + no norm"]]
    monkeypatch.undo()
    capsys.readouterr()
    for wrong in ([str(tmp_path)], [str(tmp_path / "a")] * 8, [str(tmp_path / "a"), "--out", str(tmp_path / "no" / "x.png")],
                  [str(tmp_path / "a"), "--out", str(tmp_path / "x.docx")]):
        assert rank.main(wrong) == 2
        err = capsys.readouterr().err
        assert err.startswith("rank.py: ") and err.count("\n") == 1
