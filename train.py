"""Train one network by one rule, and leave a folder of evidence.

    python train.py                                                   # fa on gratings: under a minute on a laptop
    python train.py --muon --norm                                     # the same, repaired
    python train.py --rule fa --muon --norm --dataset cifar100        # the paper's headline run, ResNet-18
    torchrun --nproc-per-node 4 train.py ...                          # the same on four GPUs (parallel.py)

The paper (Boeshertz, Pascanu & Clopath 2026) trains deep networks by feedback alignment (fa.py) and repairs its collapsing
error signal in two ways: Muon for the hidden weights (muon.py) and normalised hidden activity (norm.py). Each is a flag.
This file only puts the pieces together:

    images ──▶ model ──▶ loss ──▶ backward, where fa.py's hooks carry the error ──▶ Muon and SGD ──▶ weights

The learning rates fall to 0 along a cosine. The reported accuracy is that of the last epoch, never of the best one.

A run that was stopped, whatever stopped it, goes on exactly where it was:

    python train.py --resume runs/fa-muon-batch-cifar100-resnet18-s0

Exit status: 0 done, 2 wrong input or a disk that is full (one line says what), 3 a number became infinite or NaN, 130 stopped
by Ctrl-C, 143 by SIGTERM.
"""
from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import data
import fa
import models
import muon
import rank
import rulefile
import runs
import speed
from harness import parallel, recorder
from options import VERSION, computes_bf16, fixed, parse, settings

DIVERGED = 3                    # exit status
CHECKPOINT_SECONDS = 30         # at least, between two of them: a fast GPU's epoch takes little longer than writing one
OF_THE_DEVICE = ("lr", "fused", "foreach", "capturable", "dtype")       # an optimiser's own, not from a checkpoint


# ---- one epoch -------------------------------------------------------------------------------------------------

class Trainer:
    """A model, its rule, its optimisers and its data, one epoch at a time.

    model, handle   the network, and the handle of the rule that is attached to it
    optimisers      [Nesterov SGD], or [Muon, Nesterov SGD], each beside its first learning rate
    step            optimiser steps taken; total_steps of them bring the learning rates to 0
    """

    def __init__(self, args: argparse.Namespace, dataset: data.Dataset):
        self.args = args
        self.data_digest = data.digest(dataset)
        self.data_count = len(dataset.train_images) + (args.validate or 0)      # all that are there, trained on or not
        device = args.device
        self.train_images, self.train_labels = (t[:args.subset].to(device) for t in dataset[:2])
        share = slice(parallel.index(), None, parallel.size())                   # of several processes each tests a part
        self.test_images, self.test_labels = (t[share].to(device) for t in dataset[2:4])
        self.test_count = len(dataset.test_images)
        self.normalise = data.Normalise(self.train_images)
        self.generator = torch.Generator(device).manual_seed(args.seed)         # order and augmentation
        self.flip = args.dataset != "gratings"                                  # a mirrored grating is another class

        torch.manual_seed(args.seed)
        depth = {"depth": args.depth} if args.depth else {}
        self.model = models.MODELS[args.model](len(dataset.classes), args.norm, args.width,
                                               size=dataset.train_images.shape[-1], init=args.init, **depth)
        # Channels last: the kernels need not reorder activations, a quarter less time for a step on a CPU.
        self.model.to(device, memory_format=torch.channels_last)
        chosen = rulefile.load(args.rule)
        self.handle = fa.attach(self.model, rulefile.make(chosen, args.seed, args.feedback_gain, args.feedback_orthogonal))

        self.parallel = parallel.wrap(self.model, self.normalise(self.train_images[:2]), self.train_labels[:2])

        hidden, others = muon.split(self.model)
        # rank.py: an experiment upon the hidden updates, the same weights that Muon would have
        change = rank.flatten if args.flatten else partial(rank.cut, r=args.cut) if args.cut else None
        self.intervention = partial(rank.updates, hidden, change) if change else contextlib.nullcontext
        if not args.muon:
            hidden, others = [], list(self.model.parameters())
        # What a CUDA graph repeats must find its learning rate in a tensor, which SGD takes there only in its fused form.
        fused = device.type == "cuda" or args.graph
        rate = partial(torch.tensor, device=device) if fused else float
        sgd = torch.optim.SGD(others, rate(args.lr), momentum=0.9, nesterov=True, weight_decay=args.weight_decay,
                              fused=fused or None)
        self.optimisers = [(sgd, args.lr)]
        if hidden:
            decay = args.weight_decay if args.muon_weight_decay is None else args.muon_weight_decay
            kind = parallel.Muon if parallel.size() > 1 else muon.Muon
            self.optimisers.insert(0, (kind(hidden, rate(args.muon_lr), weight_decay=decay,
                                                 dtype=muon_dtype(device)), args.muon_lr))
        each_in_one(self.model, [optimiser for optimiser, _ in self.optimisers])
        self.repeat = speed.Graphed(self.descend, self.generator) if args.graph else self.descend
        self.step = 0
        self.begun: dict | None = None                                          # an epoch that was interrupted
        self.steps_per_epoch = data.steps(len(self.train_images), args.batch_size)
        self.total_steps = args.epochs * self.steps_per_epoch
        self.recorder = self.trajectory = None
        if args.rank:
            self.recorder = recorder.Recorder(self.model, self.handle, self.normalise(self.train_images[:512]),
                                          self.train_labels[:512])
            self.trajectory = recorder.Trajectory(self.model)

    def forward(self, images: Tensor, model: torch.nn.Module | None = None) -> Tensor:
        """uint8 images -> logits."""
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.amp):
            return (model or self.model)(self.normalise(images))

    def update(self, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step on the chosen training images: loss, how many were classified right, `largest()`; all on the device."""
        factor = (1 + math.cos(math.pi * self.step / self.total_steps)) / 2
        for optimiser, lr in self.optimisers:
            for group in optimiser.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(lr * factor)
                else:
                    group["lr"] = lr * factor
        # The update of an epoch's first step: at the very end the learning rate is so small that rounding would be measured.
        first = self.recorder is not None and self.step % self.steps_per_epoch == 0
        row = self.trajectory is not None and self.step % max(1, self.total_steps // 256) == 0      # some 256 rows in all
        result = self.descend(chosen, first, row) if first or row else self.repeat(chosen)
        self.step += 1
        return result

    def descend(self, chosen: Tensor, watch_update: bool = False, add_row: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """The part of a step that is the same every time."""
        images, labels = data.batch(self.train_images, self.train_labels, chosen, self.generator, self.flip,
                                    (parallel.index(), parallel.size()))
        logits = self.forward(images, self.parallel)
        loss = F.cross_entropy(logits.float(), labels)
        self.model.zero_grad()
        loss.backward()                                                         # fa.py's hooks run in here
        self.handle.before_step()
        if add_row:
            self.trajectory.add()
        with self.recorder.watch_update() if watch_update else contextlib.nullcontext(), self.intervention():
            for optimiser, _ in self.optimisers:
                optimiser.step()
        return loss.detach(), (logits.argmax(1) == labels).sum(), self.largest(loss)

    @torch.no_grad()
    def largest(self, loss: Tensor) -> Tensor:
        """The loss, and the largest absolute value of each gradient and each weight: not finite where one of them is not."""
        trained = [p for p in self.model.parameters() if p.grad is not None]
        return torch.stack([loss, *torch._foreach_norm([p.grad for p in trained] + trained, math.inf)])

    def culprit(self, largest: Tensor) -> str:
        """What was not finite first. An error goes from the last layer to the first, so it is the last of the gradients."""
        trained = [name for name, p in self.model.named_parameters() if p.grad is not None]
        loss, gradients, weights = largest.isfinite().tensor_split([1, 1 + len(trained)])
        if not loss:
            return "the loss"
        of, finite = ("gradient", gradients) if not gradients.all() else ("update", weights)
        return f"the {of} of {[name for name, good in zip(trained, finite.tolist()) if not good][-1]}"

    def epoch(self, label: str, interruption: runs.Interruption | None = None) -> dict | None:
        """Train for one epoch, or for the rest of one; returns the log line without its test accuracy, or None if interrupted.

        The first number that is not finite ends it.
        """
        self.model.train()
        begun = self.begun or {"order": self.generator.get_state(), "losses": [], "right": 0, "seen": 0}
        now = self.generator.get_state()
        if self.begun:                                                          # the same order again, of which a part is done
            self.generator.set_state(begun["order"])
        steps = list(data.indices(len(self.train_images), self.args.batch_size, self.generator))
        if self.begun:
            self.generator.set_state(now)
        losses, right, seen, largest = list(begun["losses"]), begun["right"], begun["seen"], []
        often = 20 if self.args.device.type == "cuda" else 1                    # reading a number makes a GPU wait
        self.begun = None
        for chosen in tqdm(steps[len(losses):], label, len(steps), initial=len(losses), leave=False, unit="step",
                           disable=parallel.index() > 0 or None):
            loss, correct, sizes = self.update(chosen)
            losses.append(loss)
            largest.append(sizes)
            right, seen = right + correct, seen + len(chosen)
            stop = bool(interruption and interruption.status)
            if len(largest) == often or len(losses) == len(steps) or stop:
                finite = parallel.mean(torch.stack(largest)).isfinite().all(1)
                if not finite.all():
                    first = int(finite.int().argmin())
                    return {"diverged": True, "step": self.step - len(largest) + first + 1, "train_loss": None,
                            "train_accuracy": None, "not_finite": self.culprit(parallel.mean(largest[first]))}
                largest = []
            if stop and len(losses) < len(steps):
                self.begun = {"order": begun["order"], "losses": torch.stack(losses), "right": right, "seen": seen}
                return None
        return {"diverged": False, "step": self.step, "train_loss": parallel.mean(torch.stack(losses)).mean().item(),
                "train_accuracy": parallel.total(right).item() / seen}

    @torch.no_grad()
    def test(self) -> float:
        """Accuracy on the whole test set."""
        self.model.eval()
        right = torch.zeros((), dtype=torch.int64, device=self.args.device)
        for images, labels in zip(self.test_images.split(1000), self.test_labels.split(1000)):
            right += (self.forward(images).argmax(1) == labels).sum()
        return parallel.total(right).item() / self.test_count

    def record(self) -> dict:
        """A line of rank.jsonl."""
        start = time.perf_counter()
        layers, trajectory = self.recorder.measure(), self.trajectory.ranks()
        return {"step": self.step, "layers": layers, "trajectory": trajectory,
                "seconds": round(time.perf_counter() - start, 3)}

    def state(self) -> dict:
        """Everything that the rest of the training depends on."""
        return {"model": self.model.state_dict(), "optimisers": [o.state_dict() for o, _ in self.optimisers],
                "step": self.step, "begun": self.begun, "generator": self.generator.get_state(),
                "rule": self.handle.rule.state_dict(), "torch_generator": torch.get_rng_state(),
                "recorder": self.recorder and self.recorder.state_dict(),
                "trajectory": self.trajectory and self.trajectory.state_dict()}

    def load(self, state: dict, same_device: bool = True) -> None:
        """The way back. Raises RuntimeError, ValueError or KeyError for the state of another network.

        On another kind of device than before the generator cannot go on; it is seeded anew.
        """
        device = self.args.device
        self.model.load_state_dict(state["model"])
        for (optimiser, _), saved in zip(self.optimisers, state["optimisers"], strict=True):
            ours = [{key: group[key] for key in OF_THE_DEVICE if key in group} for group in optimiser.param_groups]
            optimiser.load_state_dict(saved)
            for group, own in zip(optimiser.param_groups, ours):
                group.update(own)                                               # lr: the tensor that a CUDA graph reads
        self.step, self.begun = state["step"], state["begun"]
        if self.begun:
            self.begun = {key: value.to(device) if isinstance(value, Tensor) and key != "order" else value
                          for key, value in self.begun.items()}
        if same_device:
            self.generator.set_state(state["generator"])
        else:
            self.generator.manual_seed(self.args.seed + self.step)
        self.handle.rule.load_state_dict(state["rule"])
        torch.set_rng_state(state["torch_generator"])
        if self.recorder:
            self.recorder.load_state_dict(state["recorder"])
            self.trajectory.load_state_dict(state["trajectory"])


def muon_dtype(device: torch.device) -> torch.dtype:
    """In which Muon iterates: bf16 is enough, but where it is only emulated float32 is many times faster."""
    return torch.bfloat16 if computes_bf16(device) else torch.float32


def each_in_one(model: torch.nn.Module, optimisers: list[torch.optim.Optimizer]) -> None:
    """Raise RuntimeError unless each parameter is in exactly one optimiser: in two it would move twice, in none not at all."""
    owned = Counter(p for optimiser in optimisers for group in optimiser.param_groups for p in group["params"])
    wrong = [name for name, p in model.named_parameters() if owned[p] != 1]
    if wrong:
        raise RuntimeError(f"not in exactly one optimiser: {', '.join(wrong)}")


# ---- a run -----------------------------------------------------------------------------------------------------

def title(args: argparse.Namespace) -> str:
    changed = [f"updates cut to rank {args.cut}"] * bool(args.cut) + ["flattened updates"] * args.flatten
    normed = f"{args.norm} norm" if args.norm else "no norm"
    return " + ".join([rulefile.name(args.rule), *["muon"] * args.muon, normed, *changed])


def header(args: argparse.Namespace, trainer: Trainer) -> str:
    """What runs where and why, and who updates what."""
    count = sum(p.numel() for p in trainer.model.parameters())
    where = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else "cpu"
    images = f"{len(trainer.train_images):,} + {trainer.test_count:,}{' held-out' if args.validate else ''} images"
    where += f", {parallel.size()} processes" if parallel.size() > 1 else ""
    precision = "bf16 autocast" if args.amp else "float32" + ", no TF32" * (args.device.type == "cuda")
    lines = [f"{title(args)} · {args.model}, {count:,} parameters · {args.dataset}, {images} · {where} ({args.device_reason}), "
             f"{precision} ({args.amp_reason})"
             f"{', steps in a CUDA graph' if args.graph else ''}"]
    for optimiser, lr in trainer.optimisers:
        tensors = [p for group in optimiser.param_groups for p in group["params"]]
        kind, what = {True: ("Muon", "hidden matrices"), False: ("Nesterov SGD", "tensors")}[isinstance(optimiser, muon.Muon)]
        lines.append(f"{kind}, learning rate {lr:g}: {len(tensors)} {what}, {sum(p.numel() for p in tensors):,} weights")
    return "\n".join(lines)


def span(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}h {minutes % 60:02}m" if minutes >= 60 else f"{minutes}m {seconds:02}s"


class Log:
    """What a run has to say: printed, and written into its folder; in the processes that do not speak, nothing at all."""

    def __init__(self, args: argparse.Namespace, folder: Path | None):
        self.args, self.folder = args, folder
        self.lines: list[dict] = []
        self.ranks: list[dict] = []
        self.spent = 0.0                                                        # seconds of an epoch that was interrupted
        self.feedback: str | None = None                                        # digest of the feedback weights
        self.title = f"{title(args)} · {args.model} · {args.dataset} · seed {args.seed}"

    def say(self, text: str) -> None:
        if self.folder:
            print(text, flush=True)

    def rank(self, line: dict) -> None:
        self.ranks.append(line)
        if self.folder:
            runs.write_log(self.folder / "rank.jsonl", self.ranks)

    def epoch(self, line: dict) -> None:
        self.lines.append(line)
        self.spent = 0.0
        if self.folder:
            runs.write_log(self.folder / "log.jsonl", self.lines)

    def checkpoint(self, trainer: Trainer) -> None:
        """After an epoch, or within one. Raises RuleFileError if the rule changed its feedback weights and does not say so."""
        now = trainer.handle.digest()
        if self.feedback and self.feedback != now and not trainer.handle.rule.learns:
            raise rulefile.RuleFileError(f"{self.args.rule}: the feedback weights have changed since the run began; expected a "
                                         "rule that leaves them alone, or says learns = True")
        self.feedback = now
        if self.folder:
            runs.write_checkpoint(self.folder, {
                "identity": identity(self.args, trainer), "device": self.args.device.type, "log": self.lines,
                "ranks": self.ranks, "spent": self.spent, "feedback": now, **trainer.state()})

    def load(self, state: dict, trainer: Trainer) -> None:
        """Go on from a checkpoint. Raises RunError, saying what differs, if it is not one of this run."""
        ours, theirs = identity(self.args, trainer), state.get("identity", {})
        other = [f"{key} {theirs.get(key)} and not {value}" for key, value in ours.items() if theirs.get(key) != value]
        if other:
            raise runs.RunError(f"the checkpoint is not this run's; it was made with {', '.join(other)}")
        if state["begun"] and state["device"] != self.args.device.type:
            raise runs.RunError(f"the run was stopped within an epoch on a {state['device']} device, and can go on within it "
                                f"only on such a device, not on {self.args.device.type}")
        try:
            trainer.load(state, same_device=state["device"] == self.args.device.type)
        except (RuntimeError, ValueError, KeyError) as e:
            raise runs.RunError(f"the checkpoint does not fit the network: {' '.join(str(e).split())[:300]}") from e
        if trainer.step > trainer.total_steps:
            raise runs.RunError(f"the run has made {trainer.step} steps already, and --epochs {self.args.epochs} are "
                                f"{trainer.total_steps}; give more epochs")
        self.lines, self.ranks, self.spent, self.feedback = state["log"], state["ranks"], state["spent"], state["feedback"]
        if not trainer.handle.rule.learns and trainer.handle.digest() != self.feedback:
            raise runs.RunError("the checkpoint's feedback weights are not those that the run began with")


def identity(args: argparse.Namespace, trainer: Trainer) -> dict:
    """What a checkpoint must have in common with the run that goes on from it."""
    flags = {f"--{key.replace('_', '-')}": getattr(args, key) for key in fixed()}
    return {"version": VERSION, "data": trainer.data_digest, **flags}


def train(args: argparse.Namespace, trainer: Trainer, log: Log) -> int:
    """Run all epochs that are left, writing the folder as they end. Returns the exit status."""
    first, began = len(log.lines), time.perf_counter()
    kept = began                                                                # when the last checkpoint was written
    if first >= args.epochs:                                                    # resumed, and there was nothing left to do
        return end(log, began)
    if args.rank and not log.ranks:
        log.rank({"epoch": 0, **trainer.record()})
    measured = "held-out" if args.validate else "test"
    # Of several processes each would stop after another step, and the others wait for it: there a signal is obeyed at once.
    with runs.Interruption(listen=parallel.size() == 1) as interruption:
        for epoch in range(first + 1, args.epochs + 1):
            start = time.perf_counter() - log.spent
            line = trainer.epoch(f"epoch {epoch}/{args.epochs}", interruption)
            log.spent = time.perf_counter() - start
            if line is None:
                log.checkpoint(trainer)
                return stopped(trainer, log, interruption.status)
            line = {"epoch": epoch, **line, "test_accuracy": None if line["diverged"] else trainer.test(),
                    "seconds": round(time.perf_counter() - start, 3)}
            log.epoch(line)
            if line["diverged"]:
                return end(log, began)
            if args.rank and (epoch % args.rank == 0 or epoch == args.epochs):
                log.rank({"epoch": epoch, **trainer.record()})
            stop = interruption.status                                          # asked once: it may come at any moment
            if stop or epoch == args.epochs or time.perf_counter() - kept >= CHECKPOINT_SECONDS:
                log.checkpoint(trainer)
                kept = time.perf_counter()
            left = (time.perf_counter() - began) / (epoch - first) * (args.epochs - epoch)
            log.say(f"epoch {epoch:3}/{args.epochs}  loss {line['train_loss']:7.4f}  train {line['train_accuracy']:6.1%}  "
                    f"{measured} {line['test_accuracy']:6.1%}  {line['seconds']:6.1f} s  {span(left)} left")
            if stop and epoch < args.epochs:
                return stopped(trainer, log, stop)
    return end(log, began)


def stopped(trainer: Trainer, log: Log, status: int) -> int:
    print(f"stopped after step {trainer.step} of {trainer.total_steps}; go on with: python train.py --resume {log.folder}",
          file=sys.stderr)
    return status


def end(log: Log, began: float) -> int:
    """The last words and the picture. Returns the exit status."""
    last, took = log.lines[-1], span(time.perf_counter() - began)
    if log.folder:
        picture = log.folder / "curves.png"
        runs.picture(picture, lambda: runs.draw(picture, log.lines, log.title))
    if last["diverged"]:
        log.say(f"diverged: at step {last['step']} (epoch {last['epoch']}) {last['not_finite']} is not finite; a lower --lr, "
                f"--norm or --muon may help · {log.folder}")
        return DIVERGED
    measured = "held-out" if log.args.validate else "test"
    log.say(f"final {measured} accuracy {last['test_accuracy']:.1%} (epoch {last['epoch']}, the last) · {took} · {log.folder}")
    return 0


def begin(args: argparse.Namespace, trainer: Trainer, held: contextlib.ExitStack) -> Log:
    """Make the run's folder, or open the one to go on with; it is ours until `held` closes. Raises RunError."""
    speaks = parallel.index() == 0
    parts = [rulefile.name(args.rule), *["muon"] * args.muon, *[args.norm] * bool(args.norm),
             Path(args.dataset).resolve().name, args.model, f"s{args.seed}"]
    if args.resume and speaks:
        held.enter_context(runs.claim(args.resume))
    state, damage = runs.read_checkpoint(args.resume) if args.resume else (None, "")
    log = Log(args, None)
    if state:
        log.load(state, trainer)
    else:
        log.feedback = trainer.handle.digest()
    if not speaks:
        return log
    log.folder = args.resume if args.resume and not args.out else runs.create(args.out, "-".join(parts))
    if log.folder != args.resume:
        held.enter_context(runs.claim(log.folder))
    device = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    here = {"device": device, "processes": parallel.size(), **runs.provenance()}
    saw = {"digest": trainer.data_digest, "train_images": trainer.data_count}
    config = {"version": VERSION, "data": saw, **here}
    if args.resume:                                                             # what it began with, and each going on
        config = runs.read_config(args.resume)
        config["resumed"] = [*config.get("resumed", []), {"step": trainer.step, **here}]
    runs.write_json(log.folder / "config.json", {**config, "args": settings(args)})
    log.say(header(args, trainer))
    if args.resume:
        if damage and not args.out:
            runs.drop_damaged(args.resume)
        for news in [*[f"{damage}; going on from the one before"] * bool(damage), *changes(args, state)]:
            log.say(news)
        log.say(f"going on after step {trainer.step} of {trainer.total_steps}, epoch {len(log.lines)} of {args.epochs}")
        runs.write_log(log.folder / "log.jsonl", log.lines)
        if args.rank:
            runs.write_log(log.folder / "rank.jsonl", log.ranks)
    return log


def changes(args: argparse.Namespace, state: dict | None) -> list[str]:
    """What a resumed run has anew, and what it means."""
    said = []
    if args.epochs != args.saved["epochs"]:
        said.append(f"--epochs is {args.epochs} and was {args.saved['epochs']}: from here on the learning rates follow the new "
                    "cosine")
    if state and state["device"] != args.device.type:
        said.append(f"on {args.device.type}, begun on {state['device']}: from here on order and augmentation are drawn anew")
    return said


def main(argv: list[str] | None = None) -> int:
    runs.speak_anywhere()
    args = parse(argv)
    if not parallel.asked():
        return run(args)
    parallel.start(args.device)
    status = run(args)
    parallel.stop(together=status in (0, DIVERGED))             # another status may be that of one process alone
    return status


def load(args: argparse.Namespace) -> data.Dataset:
    """What the arguments ask for. Raises DataError."""
    if True:
        dataset = data.load(args.dataset, args.data, args.image_size or 32)
    if args.validate:
        dataset = data.hold_out(dataset, args.validate)
    count = len(dataset.train_images)
    if args.subset and args.subset > count:
        raise data.DataError(f"--subset {args.subset}: {args.dataset} has {count} training images"
                             + (" that are not held out" if args.validate else ""))
    if args.norm in ("batch", "whiten") and args.subset == 1:
        raise data.DataError(f"--subset 1: --norm {args.norm} compares images with each other and needs two")
    batch = min(args.subset or count, args.batch_size)
    if batch % parallel.size():
        raise data.DataError(f"a batch of {batch} images cannot be divided among {parallel.size()} processes")
    return dataset


def run(args: argparse.Namespace) -> int:
    """From arguments to exit status, in one process; the first of several speaks for all."""
    def complain(reason: object, status: int = 2) -> int:
        if parallel.index() == 0:
            print(f"train.py: {reason}", file=sys.stderr)
        return status

    speed.prepare(args.device, args.deterministic)
    folder = args.resume
    try:
        with contextlib.ExitStack() as held:
            trainer = Trainer(args, load(args))
            log = begin(args, trainer, held)
            folder = log.folder
            return train(args, trainer, log)
    except (data.DataError, runs.RunError, rulefile.RuleFileError, fa.HookError) as e:
        return complain(e)
    except BrokenPipeError:                                     # `python train.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())          # or Python complains once more in the end
        return complain(f"nobody reads the output any more{f'; finished epochs are in {folder}' if folder else ''}", 141)
    except speed.RecordError as e:
        return complain(f"{e}; add --no-graph")
    except torch.OutOfMemoryError as e:
        return complain(f"the GPU's memory is full: {str(e).split('. ')[0]}; choose a smaller --batch-size or --width"
                        + f"; finished epochs are in {folder}" * bool(folder))
    except KeyboardInterrupt:
        return complain(f"stopped at once; finished epochs are in {folder}" if folder else "stopped before the run began", 130)
    except Exception as e:                                      # of a rule out of anybody's file, or else it goes on
        reason = rulefile.explain(e, args.rule)
        if reason is None:
            raise
        return complain(f"{reason}; finished epochs are in {folder}" if folder else reason)


if __name__ == "__main__":
    status = main()
    if parallel.asked():
        parallel.leave(status)
    sys.exit(status)
