"""What several processes that train one model together have to agree on.

    torchrun --nproc-per-node N train.py ...            # on one machine or many

Every process has the whole model and its share of each batch. After the backward pass torch's
DistributedDataParallel averages the gradients, so that all processes take the same step and their weights
stay the same. What else a single process would have seen whole is kept whole: the statistics of normalisation
are taken over all processes' images (`BatchNorm`, `Whitening`), every process draws the order and the
augmentation of all images, and `total` and `mean` add up losses and accuracies. So N processes end with the
weights that one process would have had, but for rounding.

The surprising thing: feedback alignment needs nothing more. Every process draws the same B from the same
seed, on the CPU, so B is never sent; and Muon's orthogonalisation, which needs no data, is divided among the
processes (`Muon`).

Without torchrun there is one process, and nothing here does anything.
"""
from __future__ import annotations

import gc
import inspect
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules._functions import SyncBatchNorm
from torch.nn.parallel import DistributedDataParallel

import muon
import norm
from harness import recorder


# ---- the processes -----------------------------------------------------------------------------------------

def asked() -> bool:
    """Did torchrun start this process as one of several? Raises ValueError for a half of its variables."""
    size = os.environ.get("WORLD_SIZE", "1")
    if not size.isdecimal():
        raise ValueError(f"the environment variable WORLD_SIZE is {size!r}, which is no number; unset it")
    needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in os.environ]
    if int(size) > 1 and missing:
        raise ValueError(f"the environment variable WORLD_SIZE is {size}, but {', '.join(missing)} are not "
                         "set; unset it, or start with torchrun")
    return int(size) > 1


def start(device: torch.device) -> None:
    """Meet the other processes: NCCL between GPUs, gloo between CPUs."""
    if device.type == "cuda":
        dist.init_process_group("nccl", device_id=device)       # or it would guess
    else:
        dist.init_process_group("gloo")


def stop(together: bool = True) -> None:
    """Leave the others. `together` waits until all are done, as they must be when the connection closes;
    after an error of one process alone there is nothing to wait for."""
    if dist.is_initialized():
        if together:
            dist.barrier()
        gc.collect()                            # a DistributedDataParallel left over would keep its threads
        dist.destroy_process_group()


def leave(status: int) -> int:
    """The status, to exit with. One of several processes ends here and at once: gloo's threads now and then
    abort a process that winds down by itself, all its work done ("terminate called without an active
    exception")."""
    if asked():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def index() -> int:
    """Which process this is, from 0; number 0 writes and speaks for all."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def total(value: Tensor) -> Tensor:
    """The sum over the processes, the same in all of them."""
    if size() > 1:
        value = value.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(value)
    return value


def mean(value: Tensor) -> Tensor:
    return total(value) / size()


def share(images: Tensor) -> Tensor:
    """The part of the images, or of their labels, that belongs to this process."""
    return images.tensor_split(size())[index()]


# ---- the lessons' parts, over all processes ----------------------------------------------------------------

def wrap(model: nn.Module, images: Tensor, labels: Tensor) -> nn.Module:
    """The model as one that averages gradients after each backward pass; with one process, the model itself.

    images, labels   a few, as the model reads them, to see which parameters a backward pass reaches. The
                     others, such as frozen layers or feedback that learns by its weight's gradient,
                     are left out: DistributedDataParallel would wait for them.
    Weights and buffers are sent once, here, and never again. The model's own normalisation layers become
    those below.
    """
    if size() == 1:
        return model
    with recorder.undisturbed(model):
        model.train()
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        reached = {name for name, p in model.named_parameters() if p.grad is not None}
    for layer in model.modules():
        if type(layer) is norm.BatchNorm:
            layer.__class__ = BatchNorm
        elif type(layer) is norm.Whitening:
            layer.__class__ = Whitening
    left_out = {name: p for name, p in model.named_parameters() if name not in reached}
    for p in left_out.values():
        # Statistics over all processes make zeros of an error that never came, and p would decay.
        p.register_post_accumulate_grad_hook(_forget)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(left_out))
    parameters = inspect.signature(DistributedDataParallel).parameters      # torch 2.12 renamed this one
    never = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
    return DistributedDataParallel(model, **{never: False})


def _forget(p: Tensor) -> None:
    p.grad = None


class BatchNorm(norm.BatchNorm):
    """norm.BatchNorm over the images of all processes; on a GPU by torch's own kernels, which know no CPU."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        if x.is_cuda:
            return SyncBatchNorm.apply(x, self.weight, self.bias, self.running_mean, self.running_var,
                                       self.eps, self.momentum, dist.group.WORLD, size())
        axes, count = (0, *range(2, x.dim())), size() * x.numel() // x.shape[1]
        shape = (1, -1, *[1] * (x.dim() - 2))
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(torch.promote_types(x.dtype, self.weight.dtype))
            mean = _Mean.apply(wide.mean(axes))
            centred = wide - mean.view(shape)
            variance = _Mean.apply(centred.square().mean(axes))
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
                self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var), self.momentum)
            gain = self.weight / (variance + self.eps).sqrt()
            return (centred * gain.view(shape) + self.bias.view(shape)).to(x.dtype)


class Whitening(norm.Whitening):
    """norm.Whitening over the images of all processes."""

    def of_batch(self, rows: Tensor) -> tuple[Tensor, Tensor, int]:
        mean = _Mean.apply(rows.mean(-1, keepdim=True))
        centred = rows - mean
        return mean, _Mean.apply(centred @ centred.mT / rows.shape[-1]), size() * rows.shape[-1]


class _Mean(torch.autograd.Function):
    """`mean`, for autograd: v counts 1/n in every process's mean, so its gradient is the mean of theirs.

    torch has this too, but under another name in each of the versions that we support.
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        return mean(v)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return mean(gradient)


class Muon(muon.Muon):
    """muon.Muon, where each process orthogonalises a share of the matrices and the others get the result."""

    def orthogonalise(self, updates: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        work = [U.numel() * min(U.shape) for U in updates]
        loads, mine = [0] * size(), []
        for i in sorted(range(len(updates)), key=lambda i: -work[i]):   # the largest first, to whom has least
            k = loads.index(min(loads))
            loads[k] += work[i]
            if k == index():
                mine.append(i)
        mine.sort()
        done = dict(zip(mine, super().orthogonalise([updates[i] for i in mine], group)))
        every = [done[i] if i in done else torch.zeros_like(U) for i, U in enumerate(updates)]
        flat = torch.cat([result.flatten() for result in every])
        dist.all_reduce(flat)                           # what another process did is zero here
        parts = flat.split([U.numel() for U in updates])
        return [part.view(U.shape) for part, U in zip(parts, updates)]
