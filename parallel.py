"""Several processes, one training: `torchrun --nproc-per-node N train.py ...`, on one machine or many.

Every process has the whole model and its share of each batch. After the backward pass torch's DistributedDataParallel
averages the gradients, so that all processes take the same step and their weights stay the same. What else a single process
would have seen whole is kept whole: statistics of normalisation over the batch (norm.py), the order and augmentation of
the images (data.py draws the same numbers everywhere), accuracies and losses (here). So N processes end with the weights
that one process would have had, but for rounding.

The surprising thing: feedback alignment needs nothing more. Every process draws the same B from the same seed, on the
CPU, so B is never sent; and Muon's orthogonalisation, which needs no data, is divided among the processes (muon.py).

Without torchrun there is one process, and nothing here does anything.
"""
from __future__ import annotations

import contextlib
import gc
import inspect
import os
import sys
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def asked() -> bool:
    """Was this process started by torchrun, as one of several? Raises ValueError for what another launcher left behind."""
    size = os.environ.get("WORLD_SIZE", "1")
    if not size.isdecimal():
        raise ValueError(f"the environment variable WORLD_SIZE is {size!r}, which is no number; unset it")
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if int(size) > 1 and missing:
        raise ValueError(f"the environment variable WORLD_SIZE is {size}, but {', '.join(missing)} are not set; unset it, or "
                         "start with torchrun")
    return int(size) > 1


def start(device: torch.device) -> None:
    """Meet the other processes: NCCL between GPUs, gloo between CPUs."""
    if device.type == "cuda":
        dist.init_process_group("nccl", device_id=device)       # or it would guess
    else:
        dist.init_process_group("gloo")


def stop(together: bool = True) -> None:
    """Leave. `together` waits for the others, as all must be done when the connection closes; not after an error of one."""
    if dist.is_initialized():
        if together:
            dist.barrier()
        gc.collect()                                            # a DistributedDataParallel left over would keep its threads
        dist.destroy_process_group()


def leave(status: int) -> None:
    """End this process at once. Where several train together, gloo's threads now and then abort one that winds down by itself
    ("terminate called without an active exception"), after all its work is done and written."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def rank() -> int:
    """Which process this is, from 0; number 0 writes and speaks for all."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def total(value: Tensor) -> Tensor:
    """The sum over the processes, the same in all of them."""
    if size() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def mean(value: Tensor) -> Tensor:
    return total(value) / size()


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """Process 0 goes first, then all others at once."""
    if size() > 1 and rank() > 0:
        dist.barrier()
    yield
    if size() > 1 and rank() == 0:
        dist.barrier()


def wrap(model: nn.Module, reached: set[str]) -> nn.Module:
    """The model as one that averages gradients after each backward pass; with one process, the model itself.

    reached   names of the parameters that a backward pass reaches. The others, such as frozen layers or feedback that
              learns by taking over its weight's gradient, are left out: DistributedDataParallel would wait for them.
    Weights and buffers are sent once, here, and never again.
    """
    if size() == 1:
        return model
    left_out = [name for name, _ in model.named_parameters() if name not in reached]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, left_out)
    parameters = inspect.signature(DistributedDataParallel).parameters         # torch 2.12 and later have a new name for it
    never = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
    return DistributedDataParallel(model, **{never: False})
