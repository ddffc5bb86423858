"""What is here only for speed: the step as one CUDA graph on a GPU, and memory that is kept on a CPU.

A step of ResNet-18 with Muon is about six hundred operations. A fast GPU runs most of them in less time
than Python needs to ask for the next, and waits. A CUDA graph remembers the launches of a step, with the
addresses of all tensors, and repeats them with one call. The hooks of fa.py run while the graph is recorded;
what they launched is in it.

What is recorded must be the same next time, so

    whatever changes from step to step is a tensor that stays where it is: weights, momentum, batch, learning
    rates, random state (between the replays the schedule writes new numbers into the learning rates);
    nothing asks a tensor for its value (`.item()`, `if loss > ...`), which would wait for the GPU;
    what happens only once, such as the first momentum or the choice of convolution algorithms, has happened
    before: the first calls just run the step.

Python code inside the step runs while it is recorded and never again: a rule that counts its calls will count
wrong.

On a CPU the time goes elsewhere. When a large tensor dies, the C library gives its memory back to the system,
and the next tensor pays for it page by page; in a step with large batches this takes a sixth of the time or
more (see tests/benchmark.py).
"""
from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

import torch
from torch import Tensor

Step = Callable[[Tensor], tuple[Tensor, ...]]
M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1                           # of glibc's malloc.h


def prepare(device: torch.device, deterministic: bool = False) -> None:
    """Called once, before training.

    deterministic   on a GPU too the same bits in every run, by operations that may be slower
    """
    if device.type != "cuda":
        keep_memory()
        return
    # "float32" means float32. By default convolutions would round their factors to 10 bits (TF32), matrix
    # products would not.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")             # cuBLAS asks for it
        torch.use_deterministic_algorithms(True)
        # Otherwise a kernel writes NaN into each empty tensor.
        torch.utils.deterministic.fill_uninitialized_memory = False
    else:
        # Shapes never change: try the algorithms once and keep the fastest.
        torch.backends.cudnn.benchmark = True


def set_rate(optimiser: torch.optim.Optimizer, value: float) -> None:
    """Give all parameters this learning rate, written into the tensor that holds it if there is one."""
    for group in optimiser.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def keep_memory() -> bool:
    """Let this process keep the memory of dead tensors for the next ones.

    Returns False where the C library has no such setting.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):                # not glibc; on Windows a TypeError
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1))


class RecordError(RuntimeError):
    """The step cannot be recorded as a CUDA graph, and why."""


def record_cuda(step: Callable[[], tuple], generator: torch.Generator) -> tuple[Callable[[], None], tuple]:
    """(replay, the tensors that each replay fills). Recording runs nothing.

    It records on the current stream, which must not be the default one: there nothing can be recorded.
    """
    graph = torch.cuda.CUDAGraph()
    if torch.__version__ < (2, 14):         # later versions find the generator themselves, and would warn
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        results = step()
    return graph.replay, results


class Graphed:
    """Call it like `step`: it runs the step a few times, then records it, and from then on replays it.

    step        takes a tensor whose shape never changes and returns tensors; see above for what it may do
    generator   the random generator that the step draws from
    warm_up     calls that just run
    record      how to record: record_cuda, or the stand-in of the tests
    The first call after the warm-up raises RecordError if there is something in the step that no graph can
    hold, and torch.OutOfMemoryError where the step itself would.
    """

    def __init__(self, step: Step, generator: torch.Generator, warm_up: int = 3,
                 record: Callable = record_cuda):
        self.step, self.generator, self.warm_up, self.record = step, generator, warm_up, record
        self.replay: Callable[[], None] | None = None
        self.stream: torch.cuda.Stream | None = None

    def __call__(self, argument: Tensor) -> tuple[Tensor, ...]:
        if self.warm_up > 0:
            self.warm_up -= 1
            return self._aside(lambda: self.step(argument), argument.device)
        if self.replay is None:
            self.argument = argument.clone()
            try:
                self.replay, self.results = self._aside(
                    lambda: self.record(lambda: self.step(self.argument), self.generator), argument.device)
            except RuntimeError as e:
                # Ending a recording that failed raises once more; the first error says what happened.
                first: BaseException = e
                while first.__context__:
                    first = first.__context__
                if isinstance(first, torch.OutOfMemoryError):
                    raise first from None
                reason = str(first).splitlines()[0]
                raise RecordError(f"the step cannot be recorded as a CUDA graph: {reason}") from e
        self.argument.copy_(argument)
        self.replay()
        return tuple(result.clone() for result in self.results)         # the next replay writes over them

    def _aside(self, call: Callable[[], tuple], device: torch.device) -> tuple:
        """Run it on a stream of its own, since nothing can be recorded on the default one.

        It is always the same stream, since libraries keep memory of their own for each.
        """
        if device.type != "cuda":
            return call()
        self.stream = self.stream or torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            results = call()
        torch.cuda.current_stream().wait_stream(self.stream)
        return results
