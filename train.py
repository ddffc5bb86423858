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

Exit status: 0 done, 2 wrong input (one line says what), 3 the loss became infinite or NaN, 130 interrupted.
"""
from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import data
import fa
import intervene
import models
import muon
import norm
import parallel
import rank
import rulefile
import runs
import speed

VERSION = 1                     # raised by every change that moves the numbers of a run; results/ of another is not mixed in
DIVERGED = 3                    # exit status
# By data set: the paper's network for it, and what is trained when nothing else is asked for.
RECIPES = {"gratings": {"model": "cnn", "width": 16, "epochs": 12, "batch_size": 64},
           "cifar10": {"model": "cnn", "width": 32, "epochs": 50, "batch_size": 128},
           "cifar100": {"model": "resnet18", "width": 64, "epochs": 100, "batch_size": 128}}
WIDTHS = {"mlp": 512, "cnn": 32, "resnet18": 64, "resnet34": 64, "vgg11": 64}    # of a network that is not the recipe's


# ---- arguments -------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")               # one line; the usage is behind --help


def number(kind: type, low: float, high: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """An argparse type: a finite number of at least `low` (or above it) and at most `high`."""
    wanted = f"{'an integer' if kind is int else 'a finite number'} {'above' if above else 'of at least'} {low}"
    wanted += f" and at most {high}" if high < math.inf else ""

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None
        if not math.isfinite(value) or not low <= value <= high or (above and value == low):
            raise argparse.ArgumentTypeError(f"{text} is not {wanted}")
        return value
    return convert


def rule(text: str) -> str:
    """An argparse type: a rule that can be loaded."""
    try:
        rulefile.load(text)
    except rulefile.RuleFileError as e:
        raise argparse.ArgumentTypeError(str(e)) from None
    return text


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="train.py", description="Train one network by one learning rule.",
               epilog="The run folder holds config.json, log.jsonl, checkpoint.pt and curves.png.")
    g = p.add_argument_group("the experiment")
    g.add_argument("--rule", type=rule, default="fa", metavar="RULE",
                   help=f"how the error crosses a layer: {', '.join(fa.RULES)} (see fa.py; bp is backprop), or a class of "
                        "your own, my_rule.py:MyRule (default: fa)")
    g.add_argument("--muon", action="store_true",
                   help="orthogonalise the updates of hidden weights (default: Nesterov SGD for all weights)")
    g.add_argument("--norm", nargs="?", const="batch", choices=norm.KINDS,
                   help="normalise hidden activity; --norm alone is batch, the paper's (default: no normalisation at all)")
    g.add_argument("--dataset", default="gratings", metavar="DATA",
                   help=f"what to learn: {', '.join(data.NAMES)}, or a folder with train/ and test/ (or val/) and there a "
                        "folder of images for each class (default: gratings, which is generated and needs no download)")
    g.add_argument("--image-size", type=number(int, 8), metavar="PIXELS",
                   help="resize the images of a folder to this (default: 32)")
    g.add_argument("--model", choices=models.MODELS,
                   help="the network (default: the paper's, resnet18 for cifar100 and the 4-layer cnn otherwise)")
    g.add_argument("--width", type=number(int, 1),
                   help="channels of the first layer, units of the mlp (default: 64, 32 cnn, 512 mlp; 16 for the cnn on "
                        "gratings, for speed)")
    g.add_argument("--depth", type=number(int, 1),
                   help="hidden layers of the cnn or mlp (default: 4, the paper's; the others have their own)")
    g.add_argument("--init", choices=models.INITS,
                   help="initialisation of forward and feedback weights (default: he without --norm, torch with it; see "
                        "models.py)")
    g.add_argument("--feedback-gain", type=number(float, 0, above=True),
                   help="draw the feedback weights so many times larger (default: 1, like the forward weights)")
    g.add_argument("--feedback-orthogonal", action="store_true",
                   help="make the feedback weights orthogonal, of the same norm (default: as they are drawn)")
    g = p.add_argument_group("optimisation")
    g.add_argument("--epochs", type=number(int, 1),
                   help="passes over the training images (default: 12 gratings, 50 cifar10, 100 cifar100)")
    g.add_argument("--batch-size", type=number(int, 1),
                   help="images a step (default: 128; 64 for gratings, which are few)")
    g.add_argument("--lr", type=number(float, 0, above=True),
                   help="first learning rate of Nesterov SGD (default: 0.05 with --norm, 0.02 without, which diverges sooner)")
    g.add_argument("--muon-lr", type=number(float, 0, above=True),
                   help="first learning rate of Muon (default: 0.05 with --norm, 0.01 without, which diverges sooner)")
    g.add_argument("--weight-decay", type=number(float, 0), default=5e-4,
                   help="of both optimisers (default: 0.0005, usual for CIFAR)")
    g.add_argument("--muon-weight-decay", type=number(float, 0),
                   help="of Muon alone (default: that of both; Muon's steps do not shrink with the gradient)")
    intervention = g.add_mutually_exclusive_group()
    intervention.add_argument("--cut", type=number(int, 1), metavar="R",
                              help="keep the R largest singular values of every hidden update, norm kept (default: all)")
    intervention.add_argument("--flatten", action="store_true",
                              help="make the singular values of every hidden update equal, norm kept (default: as they are)")
    g.add_argument("--seed", type=number(int, 0, 2 ** 32 - 1), default=0,
                   help="of weights, feedback, order and augmentation (default: 0)")
    g.add_argument("--rank", nargs="?", const=1, type=number(int, 1), metavar="EVERY",
                   help="record ranks and alignments after every so many epochs, into rank.jsonl (default: never; --rank "
                        "alone: every epoch)")
    add_machine(p)
    return p


def add_machine(p: argparse.ArgumentParser) -> None:
    """Flags that say on what and where to train, and nothing of how."""
    g = p.add_argument_group("data and machine")
    g.add_argument("--subset", type=number(int, 1), metavar="N",
                   help="train on the first N images only; the test set stays whole (default: all)")
    g.add_argument("--validate", type=number(int, 1), metavar="N",
                   help="hold out the last N training images and measure on them instead of the test set, to choose "
                        "hyperparameters (default: the test set)")
    g.add_argument("--data", default="data", metavar="DIR", help="folder of the downloaded data sets (default: data)")
    g.add_argument("--out", metavar="DIR",
                   help="the run folder, new or empty (default: runs/ and a name made of the arguments)")
    g.add_argument("--device", default="auto",
                   help="cpu, cuda or cuda:N (default: auto, the first GPU where there is one)")
    g.add_argument("--graph", action=argparse.BooleanOptionalAction,
                   help="record the training step as a CUDA graph and replay it (default: on a GPU, where it is faster, if the "
                        "step is the same every time: one process, a rule of fa.py, no --cut or --flatten)")
    g.add_argument("--amp", action=argparse.BooleanOptionalAction,
                   help="bf16 in forward and backward, float32 for weights (default: on a GPU, where it is faster)")


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = parser()
    args = p.parse_args(argv)
    for flag in ("muon_lr", "muon_weight_decay"):
        if getattr(args, flag) is not None and not args.muon:
            p.error(f"--{flag.replace('_', '-')} has no effect without --muon: add --muon or leave it out")
    for flag in ("feedback_gain", "feedback_orthogonal"):
        if getattr(args, flag) and args.rule in ("bp", "frozen"):
            p.error(f"--{flag.replace('_', '-')} has no effect with --rule {args.rule}, which has no feedback weights")
    args.rule_digest = rulefile.digest(args.rule)
    recipe = RECIPES.get(args.dataset, RECIPES["cifar100"])         # a folder of images is treated like CIFAR-100
    if args.dataset not in data.NAMES and not Path(args.dataset).is_dir():
        p.error(f"--dataset {args.dataset}: choose from {', '.join(data.NAMES)}, or a folder of images, which this is not")
    if args.image_size and args.dataset in data.NAMES:
        p.error(f"--image-size has no effect on {args.dataset}, whose images are 32 pixels wide")
    args.model = args.model or recipe["model"]
    args.width = args.width or (recipe["width"] if args.model == recipe["model"] else WIDTHS[args.model])
    if args.depth and args.model not in ("cnn", "mlp"):
        p.error(f"--depth has no effect on {args.model}: choose --model cnn or mlp, or leave it out")
    for flag in ("cut", "flatten"):
        if getattr(args, flag) and args.model == "mlp" and args.depth == 1:
            p.error(f"--{flag} has no effect on an mlp of depth 1, which has no hidden weights beside stem and classifier")
    args.epochs = args.epochs or recipe["epochs"]
    args.batch_size = args.batch_size or recipe["batch_size"]
    args.lr = args.lr or (0.05 if args.norm else 0.02)
    if args.muon:
        args.muon_lr = args.muon_lr or (0.05 if args.norm else 0.01)
    if args.norm in ("batch", "whiten") and args.batch_size < 2:
        p.error(f"--norm {args.norm} compares images with each other and needs a --batch-size of at least 2")
    args.device, args.device_reason = choose_device(p, args.device)
    if args.graph and args.device.type != "cuda":
        p.error("--graph records CUDA kernels and needs a GPU")
    changing = next((flag for flag, asked in {
        "--cut": args.cut, "--flatten": args.flatten, "several processes": parallel.asked(),
        f"--rule {args.rule}": args.rule not in fa.RULES}.items() if asked), None)
    if args.graph and changing:
        p.error(f"--graph cannot be combined with {changing}: its Python may do something else in every step")
    if args.graph is None:
        args.graph = args.device.type == "cuda" and not changing
    args.amp_reason = "as asked"
    if args.amp is None:
        args.amp = args.device.type == "cuda" and torch.cuda.is_bf16_supported()
        args.amp_reason = f"default on a {'GPU' if args.device.type == 'cuda' else 'CPU'}"
    return args


def choose_device(p: argparse.ArgumentParser, name: str) -> tuple[torch.device, str]:
    available = torch.cuda.is_available()
    if name == "auto":
        return (torch.device("cuda"), "a GPU was found") if available else (torch.device("cpu"), "no GPU was found")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        p.error(f"--device {name}: choose cpu, cuda or cuda:N")
    if device.type == "cuda" and not available:
        p.error(f"--device {name}: torch {torch.__version__} finds no GPU here; leave --device out to use the CPU")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        p.error(f"--device {name}: there are {torch.cuda.device_count()} GPUs, counted from 0")
    return device, "as asked"


# ---- one epoch -------------------------------------------------------------------------------------------------

class Trainer:
    """A model, its rule, its optimisers and its data, one epoch at a time.

    model, handle   the network, and the handle of the rule that is attached to it
    optimisers      [Nesterov SGD], or [Muon, Nesterov SGD], each beside its first learning rate
    step            optimiser steps taken; total_steps of them bring the learning rates to 0
    """

    def __init__(self, args: argparse.Namespace, dataset: data.Dataset):
        self.args = args
        device = args.device
        self.train_images, self.train_labels = (t[:args.subset].to(device) for t in dataset[:2])
        share = slice(parallel.rank(), None, parallel.size())                   # of several processes each tests a part
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

        self.parallel = parallel.wrap(self.model, self.reached() if parallel.size() > 1 else set())

        hidden, others = muon.split(self.model)
        # intervene.py: an experiment upon the hidden updates, the same weights that Muon would have
        change = intervene.flatten if args.flatten else partial(intervene.cut, r=args.cut) if args.cut else None
        self.intervention = partial(intervene.updates, hidden, change) if change else contextlib.nullcontext
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
            divide = parallel.size() > 1
            self.optimisers.insert(0, (muon.Muon(hidden, rate(args.muon_lr), weight_decay=decay, divide=divide), args.muon_lr))
        self.repeat = speed.Graphed(self.descend, self.generator) if args.graph else self.descend
        self.step = 0
        self.steps_per_epoch = data.steps(len(self.train_images), args.batch_size)
        self.total_steps = args.epochs * self.steps_per_epoch
        self.recorder = self.trajectory = None
        if args.rank:
            self.recorder = rank.Recorder(self.model, self.handle, self.normalise(self.train_images[:512]),
                                          self.train_labels[:512])
            self.trajectory = rank.Trajectory(self.model)

    def forward(self, images: Tensor, model: torch.nn.Module | None = None) -> Tensor:
        """uint8 images -> logits."""
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.amp):
            return (model or self.model)(self.normalise(images))

    def reached(self) -> set[str]:
        """Names of the parameters that a backward pass gives a gradient; leaves no trace."""
        with rank.undisturbed(self.model):
            self.model.train()
            self.model.zero_grad()
            F.cross_entropy(self.model(self.normalise(self.train_images[:2])), self.train_labels[:2]).backward()
            return {name for name, p in self.model.named_parameters() if p.grad is not None}

    def update(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """One step on the chosen training images; returns its loss and how many were classified right, on the device."""
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

    def descend(self, chosen: Tensor, watch_update: bool = False, add_row: bool = False) -> tuple[Tensor, Tensor]:
        """The part of a step that is the same every time."""
        images, labels = data.batch(self.train_images, self.train_labels, chosen, self.generator, self.flip,
                                    (parallel.rank(), parallel.size()))
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
        return loss.detach(), (logits.argmax(1) == labels).sum()

    def epoch(self, label: str) -> dict:
        """Train for one epoch; returns the log line without its test accuracy. A loss or weight not finite ends it early."""
        def diverged(step: int) -> dict:
            return {"diverged": True, "step": step, "train_loss": None, "train_accuracy": None}

        self.model.train()
        losses, right, seen = [], 0, 0
        steps = data.indices(len(self.train_images), self.args.batch_size, self.generator)
        for chosen in tqdm(steps, label, self.steps_per_epoch, leave=False, disable=parallel.rank() > 0 or None, unit="step"):
            loss, correct = self.update(chosen)
            losses.append(loss)
            right, seen = right + correct, seen + len(chosen)
            if len(losses) % 20 == 0 or len(losses) == self.steps_per_epoch:    # reading a loss makes a GPU wait
                finite = parallel.mean(torch.stack(losses)).isfinite()
                if not finite.all():
                    return diverged(self.step - len(losses) + int(finite.int().argmin()) + 1)
        if not all(p.isfinite().all() for p in self.model.parameters()):        # the last update's, which no loss has seen yet
            return diverged(self.step)
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
        """Everything that the next epoch depends on."""
        return {"model": self.model.state_dict(), "optimisers": [o.state_dict() for o, _ in self.optimisers],
                "step": self.step, "generator": self.generator.get_state()}


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
    lines = [f"{title(args)} · {args.model}, {count:,} parameters · {args.dataset}, {images} · {where} ({args.device_reason}), "
             f"{'bf16 autocast' if args.amp else 'float32'} ({args.amp_reason})"
             f"{', steps in a CUDA graph' if args.graph else ''}"]
    for optimiser, lr in trainer.optimisers:
        tensors = [p for group in optimiser.param_groups for p in group["params"]]
        kind, what = {True: ("Muon", "hidden matrices"), False: ("Nesterov SGD", "tensors")}[isinstance(optimiser, muon.Muon)]
        lines.append(f"{kind}, learning rate {lr:g}: {len(tensors)} {what}, {sum(p.numel() for p in tensors):,} weights")
    return "\n".join(lines)


def span(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}h {minutes % 60:02}m" if minutes >= 60 else f"{minutes}m {seconds:02}s"


def train(args: argparse.Namespace, trainer: Trainer, folder: Path | None) -> int:
    """Run all epochs, writing the folder as they end; None in the processes that do not write. Returns the exit status."""
    settings = {key: str(value) if key == "device" else value for key, value in vars(args).items()}
    device = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    if folder:
        runs.write_json(folder / "config.json", {"args": settings, "version": VERSION, "device": device,
                                                 "processes": parallel.size(), **runs.provenance()})
    measured = "held-out" if args.validate else "test"
    log: list[dict] = []
    ranks: list[dict] = []

    def record(epoch: int) -> None:
        ranks.append({"epoch": epoch, **trainer.record()})
        if folder:
            runs.write_log(folder / "rank.jsonl", ranks)

    if args.rank:
        record(0)
    began = time.perf_counter()
    for epoch in range(1, args.epochs + 1):
        start = time.perf_counter()
        line = {"epoch": epoch, **trainer.epoch(f"epoch {epoch}/{args.epochs}")}
        line["test_accuracy"] = None if line["diverged"] else trainer.test()
        line["seconds"] = round(time.perf_counter() - start, 3)
        log.append(line)
        if folder:
            runs.write_log(folder / "log.jsonl", log)
        if line["diverged"]:
            break
        if args.rank and (epoch % args.rank == 0 or epoch == args.epochs):
            record(epoch)
        if not folder:
            continue
        state = {"epoch": epoch, "args": settings, **trainer.state()}
        runs.write(folder / "checkpoint.pt", partial(torch.save, state))
        left = (time.perf_counter() - began) / epoch * (args.epochs - epoch)
        print(f"epoch {epoch:3}/{args.epochs}  loss {line['train_loss']:7.4f}  train {line['train_accuracy']:6.1%}  "
              f"{measured} {line['test_accuracy']:6.1%}  {line['seconds']:6.1f} s  {span(left)} left", flush=True)
    if not folder:
        return DIVERGED if log[-1]["diverged"] else 0
    runs.draw(folder / "curves.png", log, f"{title(args)} · {args.model} · {args.dataset} · seed {args.seed}")
    if log[-1]["diverged"]:
        print(f"diverged: at step {log[-1]['step']} (epoch {log[-1]['epoch']}) the loss or a weight is not finite; a lower "
              f"--lr, --norm or --muon may help · {folder}", flush=True)
        return DIVERGED
    print(f"final {measured} accuracy {log[-1]['test_accuracy']:.1%} (epoch {args.epochs}, the last) · "
          f"{span(time.perf_counter() - began)} · {folder}", flush=True)
    return 0


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if not parallel.asked():
        return run(args)
    if args.device.type == "cuda":
        args.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    parallel.start(args.device)
    status = run(args)
    parallel.stop(together=status in (0, DIVERGED))             # another status may be that of one process alone
    return status


def load(args: argparse.Namespace) -> data.Dataset:
    """What the arguments ask for. Raises DataError."""
    with parallel.first_alone():                                # one process downloads, and the others find it done
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
    speaks = parallel.rank() == 0
    speed.prepare(args.device)
    try:
        dataset = load(args)
        trainer = Trainer(args, dataset)
        parts = [rulefile.name(args.rule), *["muon"] * args.muon, *[args.norm] * bool(args.norm),
                 Path(args.dataset).resolve().name, args.model, f"s{args.seed}"]
        folder = runs.create(args.out, "-".join(parts)) if speaks else None
    except (data.DataError, runs.RunError, rulefile.RuleFileError) as e:
        if speaks:
            print(f"train.py: {e}", file=sys.stderr)
        return 2
    if speaks:
        print(header(args, trainer), flush=True)
    try:
        return train(args, trainer, folder)
    except KeyboardInterrupt:
        if speaks:
            print(f"\ninterrupted; finished epochs are in {folder}", file=sys.stderr)
        return 130
    except speed.RecordError as e:
        print(f"train.py: {e}; add --no-graph", file=sys.stderr)
        return 2
    except Exception as e:                                      # of a rule out of anybody's file, or else it goes on
        reason = rulefile.explain(e, args.rule)
        if reason is None:
            raise
        if speaks:
            print(f"train.py: {reason}; finished epochs are in {folder}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    status = main()
    if parallel.asked():
        parallel.leave(status)
    sys.exit(status)
