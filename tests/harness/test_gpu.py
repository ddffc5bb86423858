"""What a GPU needs of us, as far as it shows without one: a step asks for no value and stays on the device,
the right card in the right precision, recording on one stream, one line when something fails.

test_graph.py replays steps; here nothing is computed on a GPU."""
import contextlib
import types
from pathlib import Path

import pytest
import torch
from test_train import SMALL, made_cifar100, parts, small_gratings  # noqa: F401  (a fixture)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import fa
import train
from harness import flags, graph, parallel, session


def made(case="", cuda_settings=False):
    """A trainer on the CPU; with `cuda_settings`, its optimisers as on a GPU."""
    args = flags.parse([*SMALL, "--device", "cpu", *case.split()])
    if cuda_settings:
        args.graph = True                                       # learning rates in tensors, fused SGD
    return train.Trainer(args, data.gratings())


# ---- a step on a device whose tensors have no values -------------------------------------------------------

class OnMeta(TorchDispatchMode):
    """Every tensor of every operation must be on torch's meta device, which can be asked for no value: what a
    step may do here, it may do while a CUDA graph records it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        # Fused SGD writes in place and returns nothing; torch has not told it of the meta device.
        fused = function is torch.ops.aten._fused_sgd_.tensor_lr
        result = None if fused else function(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, torch.Tensor) and not leaf.is_meta:
                raise AssertionError(f"{function} has a tensor of shape {tuple(leaf.shape)} on {leaf.device}")
        return result


def step_on_meta(case, fault=None):
    """One step on the CPU, after which momentum and feedback are there, and the next one on meta."""
    trainer = made(case, cuda_settings=True)
    for _ in range(3):                          # until a rule has seen that its feedback moves
        trainer.step(torch.arange(16))
    trainer.model.zero_grad()
    torch.__future__.set_swap_module_params_on_conversion(True)     # the optimisers' parameters are the same
    try:
        trainer.model.to("meta")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    for optimiser, _ in trainer.optimisers:
        for holder in [*optimiser.param_groups, *optimiser.state.values()]:
            holder.update({k: v.to("meta") for k, v in holder.items() if isinstance(v, torch.Tensor)})
    for holder in (trainer, trainer.normalise):
        vars(holder).update({k: v.to("meta") for k, v in vars(holder).items() if isinstance(v, torch.Tensor)})
    if fault:
        network = trainer.network
        trainer.network = lambda images: fault(network(images))
    with OnMeta():
        return trainer.step(torch.arange(16, device="meta"))


@pytest.mark.parametrize("rule", fa.RULES)
def test_a_step_asks_for_no_value_and_stays_on_the_device(rule):
    for rest in ("", "--norm layer --muon --amp", "--norm rms --depth 2",           # whiten: no autocast
                 *["--muon --norm --model resnet18 --width 8"] * (rule == "fa")):
        assert all(result.is_meta for result in step_on_meta(f"--rule {rule} {rest}"))


def test_whatever_leaves_the_device_is_caught():
    stray = torch.ones(10)
    for fault in (lambda y: y * y.sum().item(), lambda y: y + y[y > 0].sum(), lambda y: y.cpu().to(y.device),
                  lambda y: y + stray, lambda y: y + stray[0]):
        assert fault(torch.ones(4, 10)).shape == (4, 10)        # on the CPU there is nothing wrong with it
        with pytest.raises((AssertionError, RuntimeError)):
            step_on_meta("--norm", fault)


# ---- which card, and in which precision --------------------------------------------------------------------

@pytest.fixture
def card(monkeypatch):
    """card(...) makes torch say that there are GPUs; it returns those that were made the current one."""
    def pretend(count=2, capability=(8, 0), trouble=None):
        current, ones = [], torch.ones
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", current.append)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

        def made(size, device):
            assert device == current[-1]
            if trouble:
                raise RuntimeError(trouble)
            return ones(size)

        monkeypatch.setattr(torch, "ones", made)
        return current
    return pretend


def refused(*argv, capsys):
    """The one line that these arguments end with."""
    with pytest.raises(SystemExit) as stopped:
        flags.parse([*argv])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1
    return said


def test_the_gpu_that_is_chosen_is_the_current_one(card, capsys):
    current = card()
    for asked, number in (([], 0), (["--device", "cuda:1"], 1)):
        args = flags.parse(asked)
        assert args.device == torch.device("cuda", number) == current[-1] and args.graph
    assert "there are 2 GPUs, counted from 0" in refused("--device", "cuda:99", capsys=capsys)


def test_under_torchrun_every_process_takes_its_own_gpu(card, monkeypatch):
    current = card()
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "here",
                        "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert flags.parse(["--device", "cuda"]).device == torch.device("cuda", 1) == current[-1]
    started = []
    monkeypatch.setattr(torch.distributed, "init_process_group",
                        lambda *args, **kwargs: started.append((args, kwargs)))
    parallel.start(torch.device("cuda", 1))
    parallel.start(torch.device("cpu"))
    assert started == [(("nccl",), {"device_id": torch.device("cuda", 1)}), (("gloo",), {})]


def test_a_gpu_that_this_torch_has_no_kernels_for_is_named_and_not_used(card, capsys):
    card(trouble="CUDA error: no kernel image is available\nCUDA errors might be reported later")
    args = flags.parse([])
    assert args.device.type == "cpu" and not args.graph
    assert args.device_reason == "a GPU was found but fails: CUDA error: no kernel image is available"
    assert "no kernel image is available" in refused("--device", "cuda:1", capsys=capsys)


@pytest.mark.parametrize("capability, bf16", [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_bf16_is_not_emulated_on_a_gpu(capability, bf16, card):
    card(capability=capability)
    args = flags.parse(["--muon"])
    assert (args.amp, args.amp_reason) == (bf16, f"this GPU has {'it' if bf16 else 'no bf16'}")
    assert flags.muon_dtype(args.device) == (torch.bfloat16 if bf16 else torch.float32)


@pytest.mark.parametrize("onednn, avx2, avx512_bf16, expected", [
    (True, True, True, True), (True, True, False, False),       # x86; the second has AVX512, but not for bf16
    (True, False, False, True), (False, False, False, False),   # Arm with bf16, and without
    (None, False, True, False)])                                # a torch without oneDNN
def test_a_cpu_is_asked_whether_it_computes_bf16(onednn, avx2, avx512_bf16, expected, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn is not None)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn is not False)
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: avx2)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    cpu = torch.device("cpu")
    assert flags.computes_bf16(cpu) == expected == (flags.muon_dtype(cpu) == torch.bfloat16)


def test_a_run_goes_on_in_its_precision(monkeypatch, capsys):
    made_cifar100(Path("data"))
    monkeypatch.setattr(flags, "computes_bf16", lambda device: True)
    assert not flags.parse([]).amp                              # the README prints the numbers of gratings
    small = ["--dataset", "cifar100", "--model", "cnn", *SMALL[2:]]
    assert train.main([*small, "--epochs", "1", "--out", "run"]) == 0
    assert "bf16 autocast (this CPU has it)" in capsys.readouterr().out
    monkeypatch.setattr(flags, "computes_bf16", lambda device: False)
    assert not flags.parse(small).amp and flags.parse([*small, "--amp"]).amp
    assert train.main(["--resume", "run", "--epochs", "2"]) == 0
    assert "bf16 autocast (as the run began)" in capsys.readouterr().out


@pytest.mark.parametrize("there", [False, True])
def test_what_belongs_to_the_device_is_not_taken_from_a_checkpoint(there):
    """From a CPU to a GPU and back: learning rates stay the tensors or numbers that they are here,
    and SGD fused or not."""
    saved, ours = made("--muon --norm", cuda_settings=there), made("--muon --norm", cuda_settings=not there)
    chosen = torch.arange(32)
    saved.step(chosen)
    own = [[{key: group[key] for key in session.OF_THE_DEVICE if key in group}
            for group in optimiser.param_groups]
           for optimiser, _ in ours.optimisers]
    assert {"lr", "fused", "foreach", "dtype"} <= {key for groups in own for group in groups for key in group}
    own[0][0]["dtype"] = ours.optimisers[0][0].param_groups[0]["dtype"] = torch.float32     # an older card
    session.restore(session.gather(*parts(saved)), *parts(ours))
    for (optimiser, _), before in zip(ours.optimisers, own):
        for group, kept in zip(optimiser.param_groups, before):
            assert all(group[key] is value for key, value in kept.items())
    ours.step(chosen)


# ---- recording, settings, memory ---------------------------------------------------------------------------

@pytest.fixture
def runtime(monkeypatch):
    """A torch.cuda that notes what is asked of it: [(what, stream)]."""
    asked, streams = [], ["default"]

    class Stream:
        def wait_stream(self, other):
            pass

    class Graph:
        def register_generator_state(self, generator):
            asked.append(("generator", streams[-1]))

        def replay(self):
            asked.append(("replay", streams[-1]))

    @contextlib.contextmanager
    def within(stream):
        streams.append(stream)
        yield
        streams.pop()

    @contextlib.contextmanager
    def graph(_, stream):
        with within(stream):
            asked.append(("capture", stream))
            yield

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams[-1] if streams[1:] else Stream())
    return asked, streams


class OnCuda(torch.Tensor):
    device = torch.device("cuda")


@pytest.mark.parametrize("version, registered", [("2.9.1", True), ("2.14.0", False)])
def test_warm_up_and_recording_are_on_one_stream(version, registered, runtime, monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    asked, streams = runtime

    def run(x):
        asked.append(("step", streams[-1]))
        return (torch.ones(1),)

    step = graph.Graphed(run, torch.Generator(), warm_up=2)
    for _ in range(4):
        step(torch.ones(1).as_subclass(OnCuda))
    side = asked[0][1]
    assert side != "default"
    recorded = [*[("generator", side)] * registered, ("capture", side), ("step", side)]
    assert asked == [("step", side), ("step", side), *recorded, ("replay", "default"), ("replay", "default")]


@pytest.mark.parametrize("deterministic", [False, True])
def test_float32_is_float32_and_empty_tensors_stay_empty(deterministic, monkeypatch):
    backends = [(torch.backends.cudnn, "allow_tf32"), (torch.backends.cuda.matmul, "allow_tf32"),
                (torch.backends.cudnn, "benchmark"), (torch.utils.deterministic, "fill_uninitialized_memory")]
    before = [getattr(where, name) for where, name in backends]
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        for where, name in backends:
            setattr(where, name, True)
        graph.prepare(torch.device("cuda"), deterministic)
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
        assert torch.utils.deterministic.fill_uninitialized_memory == (not deterministic)
        assert torch.are_deterministic_algorithms_enabled() == deterministic
    finally:
        torch.use_deterministic_algorithms(False)
        for (where, name), value in zip(backends, before):
            setattr(where, name, value)


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has 1.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
                 "you tried to allocate 2 GiB. Error code 12 (Cannot allocate memory)"), MemoryError()])
@pytest.mark.parametrize("rule", ["fa", "mine.py:Mine"])
def test_memory_that_is_full_is_one_line(rule, error, monkeypatch, capsys):
    Path("mine.py").write_text("import fa\nclass Mine(fa.FA):\n    pass\n")

    def full(self, *_):
        raise error

    monkeypatch.setattr(train.Trainer, "step", full)
    assert train.main([*SMALL, "--rule", rule, "--device", "cpu", "--out", "run"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "the memory is full" in said and "smaller --batch-size" in said
    assert "tried to allocate 2 GiB" in said or not str(error)


def test_batch_norm_over_gpus_is_torchs_own(monkeypatch):
    called = []
    monkeypatch.setattr(parallel, "size", lambda: 4)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(parallel.SyncBatchNorm, "apply", lambda *args: called.append(args) or args[0])
    layer, x = parallel.BatchNorm(3), types.SimpleNamespace(is_cuda=True)
    assert layer(x) is x
    (args,) = called
    assert args[1] is layer.weight and args[3] is layer.running_mean
    assert args[5:7] == (layer.eps, layer.momentum) and args[8] == 4
