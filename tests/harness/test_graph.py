"""harness/graph.py without a GPU: a replayed step is the step, whatever the rule; what cannot be recorded is
said in one line.

A stand-in records a step's tensor operations and repeats them. Like a CUDA graph it runs no Python on replay,
keeps every tensor where it was, and cannot ask for a value. Whatever the step keeps in Python, such as a
learning rate in a float, would be frozen in it; so equal weights after many replays say that there is nothing
of the kind.
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


def made(case, tensors=True):
    """(trainer, args): with `tensors`, learning rates in tensors and fused SGD, as on a GPU."""
    small = "--device cpu --width 4 --batch-size 16 --epochs 3 --subset 160"
    args = flags.parse(f"{small} {case}".split())
    args.graph = tensors
    return train.Trainer(args, data.gratings(160, 30)), args


def graphed(trainer):
    return graph.Graphed(trainer.step, trainer.generator, record=standing_in(trainer))


def assert_same_weights(one, other):
    for name, value in one.model.state_dict().items():
        assert torch.equal(other.model.state_dict()[name], value), name


@pytest.mark.parametrize("case", ["--rule fa", "--rule fa --muon --norm --model resnet18 --width 8",
                                  "--rule kp --muon --norm layer", "--rule dfa --norm whiten",
                                  "--rule sign --norm rms", "--rule frozen --norm"])
def test_a_replayed_step_is_the_step_also_after_a_checkpoint_written_without_a_graph(case):
    before, args = made(case, tensors=False)
    an_epoch(before, args)
    state = session.gather(*parts(before))
    (ran, _), (replayed, _) = made(case), made(case)
    step, losses = graphed(replayed), []
    for trainer, way in ((ran, ran.step), (replayed, step)):
        session.restore(copy.deepcopy(state), *parts(trainer))
        losses.append(an_epoch(trainer, args, way, done=10))
    assert losses[0] == losses[1] and step.replay is not None
    assert_same_weights(ran, replayed)


def test_learning_rates_in_tensors_give_the_numbers_of_those_in_floats():
    """Fused SGD rounds otherwise; after one epoch the weights agree to float32 rounding."""
    weights = []
    for tensors in (False, True):
        trainer, args = made("--subset 64 --norm --rule bp", tensors)
        an_epoch(trainer, args)
        weights.append(trainer.model.state_dict())
    for name, value in weights[0].items():
        assert torch.allclose(value, weights[1][name], rtol=1e-3, atol=1e-5), name


def frozen_rate(step, trainer):
    """A step with a learning rate in a float: what a graph would not see change."""
    def changed(chosen):
        for optimiser, _ in trainer.optimisers:
            for group in optimiser.param_groups:
                if isinstance(group["lr"], torch.Tensor):
                    group["lr"] = float(group["lr"].numpy())
        return step(chosen)
    return changed


def test_the_stand_in_can_fail():
    with pytest.raises(AssertionError, match="cannot ask a tensor for its value"), Recorder():
        torch.ones(1).item()
    losses = []
    for replayed in (False, True):
        trainer, args = made("--norm")
        trainer.step = frozen_rate(trainer.step, trainer)
        losses.append(an_epoch(trainer, args, graphed(trainer) if replayed else None))
    assert losses[0] != losses[1]


def test_the_results_of_a_replay_are_not_written_over():
    step = graph.Graphed(lambda x: (x * 2,), torch.Generator(), warm_up=1,
                         record=lambda run, _: (lambda: None, run()))
    first, second = step(torch.ones(2)), step(torch.ones(2))
    assert torch.equal(first[0], second[0]) and second[0] is not step.results[0]


def failing(error):
    """As torch.cuda.graph does: it ends the recording, which complains, and hides the first error."""
    def record(step, generator):
        try:
            raise error
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture\nmore")
    return graph.Graphed(lambda x: (x,), torch.Generator(), warm_up=0, record=record)


def test_of_a_recording_that_fails_the_first_error_is_said_in_one_line():
    with pytest.raises(graph.RecordError, match="as a CUDA graph: operation not permitted$"):
        failing(RuntimeError("operation not permitted\nmore"))(torch.ones(1))
    with pytest.raises(torch.OutOfMemoryError, match="2.00 GiB"):       # is no fault of the recording
        failing(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))(torch.ones(1))


def test_memory_is_kept():
    """In a process of its own: the pages of a large tensor that dies stay, so the next ones cause few page
    faults."""
    code = f"""
import resource, sys, torch
sys.path.insert(0, {str(ROOT)!r})
from harness import graph

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(2 ** 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before, kept = faults(), graph.keep_memory()
faults()
print(before, int(kept), faults())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, kept, after = map(int, done.stdout.split())
    if not kept or before < 1000:
        pytest.skip("this C library has no such setting, or keeps the memory anyway")
    assert after < before / 2
