"""harness/graph.py without a GPU: a stand-in that records a step's tensor operations and repeats them, and
nothing else.

Like a CUDA graph it runs no Python on replay, keeps every tensor where it was, and cannot ask for a value.
Whatever the step keeps in Python, such as a learning rate in a float, would be frozen in it; so equal weights
after many replays say that there is nothing of the kind.
"""
import copy
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import train
from harness import flags, graph, session
from test_train import an_epoch, parts
from conftest import ROOT


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("a graph cannot ask a tensor for its value")
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def replay(self):
        with torch.no_grad():
            for function, args, kwargs, result in self.calls:
                if not function.is_view:    # a view of a tensor that stays in place stays right
                    for old, new in zip(tree_leaves(result), tree_leaves(function(*args, **kwargs))):
                        if isinstance(old, torch.Tensor):
                            old.copy_(new)


def standing_in(trainer):
    """record(): runs the step once to see its operations, then puts everything back,
    as recording a CUDA graph runs nothing."""
    def record(step, generator):
        state = [*trainer.model.state_dict().values(),
                 *(t for optimiser, _ in trainer.optimisers for entry in optimiser.state.values()
                   for t in entry.values() if isinstance(t, torch.Tensor))]
        before, random = [t.detach().clone() for t in state], generator.get_state()
        recorder = Recorder()
        with recorder:
            results = step()
        with torch.no_grad():
            for tensor, value in zip(state, before):
                tensor.copy_(value)
        generator.set_state(random)
        return recorder.replay, results
    return record


def trained(case, replayed, monkeypatch, change=None):
    """(weights, losses) after two epochs with learning rates in tensors,
    by running every step or by replaying one."""
    small = ["--device", "cpu", "--width", "4", "--batch-size", "16", "--epochs", "2", "--subset", "160"]
    args = flags.parse([*small, *case.split()])
    args.graph = True                                           # fused SGD, learning rates in tensors
    if change:
        monkeypatch.setattr(train.Trainer, "step", change(train.Trainer.step))
    trainer = train.Trainer(args, data.gratings(160, 30))
    step = (graph.Graphed(trainer.step, trainer.generator, record=standing_in(trainer)) if replayed else
            trainer.step)
    losses = an_epoch(trainer, args, step) + an_epoch(trainer, args, step, done=10)
    assert not replayed or step.replay is not None
    return copy.deepcopy(trainer.model.state_dict()), losses


@pytest.mark.parametrize("case", ["--rule fa --norm", "--rule fa --muon",
                                  "--rule fa --muon --norm --model resnet18 --width 8",
                                  "--rule kp --muon --norm layer", "--rule dfa --norm whiten",
                                  "--rule sign --norm rms", "--rule frozen --norm",
                                  "--rule bp --muon --norm"])
def test_a_replayed_step_is_the_step(case, monkeypatch):
    ran, replayed = (trained(case, how, monkeypatch) for how in (False, True))
    assert replayed[1] == ran[1]
    for name, value in ran[0].items():
        assert torch.equal(replayed[0][name], value), name


def test_a_checkpoint_written_without_a_graph_goes_on_in_one():
    small = "--device cpu --width 4 --batch-size 16 --epochs 3 --subset 160 --muon --norm".split()
    trainers = []
    for how in ("before", "run", "replayed"):
        args = flags.parse(small)
        args.graph = how != "before"
        trainers.append(train.Trainer(args, data.gratings(160, 30)))
    before, ran, replayed = trainers
    an_epoch(before, args)
    state, losses = session.gather(*parts(before)), []
    graphed = graph.Graphed(replayed.step, replayed.generator, record=standing_in(replayed))
    for trainer, step in ((ran, ran.step), (replayed, graphed)):
        session.restore(copy.deepcopy(state), *parts(trainer))
        losses.append(an_epoch(trainer, args, step, done=10) + an_epoch(trainer, args, step, done=20))
    assert losses[0] == losses[1] and graphed.replay is not None
    for name, value in ran.model.state_dict().items():
        assert torch.equal(replayed.model.state_dict()[name], value), name


def test_with_tensors_for_learning_rates_the_numbers_are_those_without(monkeypatch):
    """Fused SGD rounds otherwise; after one epoch the weights agree to float32 rounding."""
    weights = []
    for tensors in (False, True):
        args = flags.parse("--device cpu --width 4 --batch-size 16 --epochs 1 --subset 64 --norm --rule bp"
                           .split())
        args.graph = tensors
        trainer = train.Trainer(args, data.gratings(64, 30))
        an_epoch(trainer, args)
        weights.append(trainer.model.state_dict())
    for name, value in weights[0].items():
        assert torch.allclose(value, weights[1][name], rtol=1e-3, atol=1e-5), name


def frozen_rate(descend):
    """A step with a learning rate in a float: what a graph would not see change."""
    def changed(self, *args):
        for optimiser, _ in self.optimisers:
            for group in optimiser.param_groups:
                if isinstance(group["lr"], torch.Tensor):
                    group["lr"] = float(group["lr"].numpy())
        return descend(self, *args)
    return changed


def asking(descend):
    def changed(self, *args):
        results = descend(self, *args)
        return results if results[0].item() > 0 else None
    return changed


def test_the_stand_in_can_fail(monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(AssertionError,
                                                       match="cannot ask a tensor for its value"):
        trained("--rule fa --norm", True, patch, asking)
    losses = []
    for replayed in (False, True):
        with monkeypatch.context() as patch:
            losses.append(trained("--rule fa --norm", replayed, patch, frozen_rate)[1])
    assert losses[0] != losses[1]


def test_what_cannot_be_recorded_is_said():
    def refuse(run, generator):
        raise RuntimeError("operation not permitted when stream is capturing\n"
                           "Compile with `TORCH_USE_CUDA_DSA`")

    step = graph.Graphed(lambda x: (x,), torch.Generator(), warm_up=0, record=refuse)
    with pytest.raises(graph.RecordError) as stopped:
        step(torch.ones(1))
    assert str(stopped.value) == ("the step cannot be recorded as a CUDA graph: "
                                  "operation not permitted when stream is capturing")


def test_memory_is_kept():
    """In processes of their own: the pages of a large tensor that dies stay,
    so the next ones cause few page faults."""
    code = """
import resource, sys, torch
sys.path.insert(0, {root!r})
from harness import graph
kept = graph.keep_memory() if {keep} else True
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2 ** 24)
before = faults()
for _ in range(8):
    torch.ones(2 ** 24)
print(int(kept), faults() - before)
"""
    found = {}
    for keep in (True, False):
        done = subprocess.run([sys.executable, "-c", code.format(root=str(ROOT), keep=keep)],
                              capture_output=True, text=True, check=True)
        found[keep] = [int(word) for word in done.stdout.split()]
    if not found[True][0] or found[False][1] < 1000:
        pytest.skip("this C library has no such setting, or keeps the memory anyway")
    assert found[True][1] < found[False][1] / 2, found


def test_the_results_of_a_replay_are_not_written_over():
    step = graph.Graphed(lambda x: (x * 2,), torch.Generator(), warm_up=1,
                         record=lambda run, _: (lambda: None, run()))
    first, second = step(torch.ones(2)), step(torch.ones(2))
    assert torch.equal(first[0], second[0]) and second[0] is not step.results[0]


@pytest.mark.parametrize("wrong, said", {"--graph --device cpu": "needs a GPU"}.items())
def test_wrong_arguments(wrong, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(wrong.split())
    assert stopped.value.code == 2 and said in capsys.readouterr().err
