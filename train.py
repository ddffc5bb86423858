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
    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")               # one line; the usage is behind --help


def number(kind: type, low: float, high: float = math.inf, above: bool = False):
    """An argparse type: a finite number of at least `low` (or above it) and at most `high`."""
    wanted = f"{'an integer' if kind is int else 'a finite number'} {'above' if above else 'of at least'} {low}"
    wanted += f" and at most {high}" if high < math.inf else ""

    def convert(text: str):
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
                   help=f"what to learn: {', '.join(data.NAMES)}, or a folder with train/ and test/ (or val/) and there a folder "
                        "of images for each class (default: gratings, which is generated and needs no download)")
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
    g.add_argument("--out", metavar="DIR", help="the run folder, new or empty (default: runs/ and a name made of the arguments)")
    g.add_argument("--resume", metavar="RUN", type=Path,
                   help="go on with the run in this folder, with its arguments; what else may be given is --epochs, --data, "
                        "--device, and --out to write elsewhere (default: a new run)")
    g.add_argument("--device", default="auto",
                   help="cpu, cuda or cuda:N (default: auto, the first GPU where there is one)")
    g.add_argument("--graph", action=argparse.BooleanOptionalAction,
                   help="record the training step as a CUDA graph and replay it (default: on a GPU, where it is faster, if the "
                        "step is the same every time: one process, a rule of fa.py, no --cut or --flatten)")
    g.add_argument("--deterministic", action="store_true",
                   help="the same bits in every run on a GPU too, by slower operations (default: on a GPU some additions come in "
                        "any order; on a CPU all bits are the same anyway)")
    g.add_argument("--amp", action=argparse.BooleanOptionalAction,
                   help="bf16 in forward and backward, float32 for weights (default: on a GPU, where it is faster)")


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = parser()
    args = p.parse_args(argv)
    if args.resume:
        args = resumed(p, argv, args.resume)
    for flag in ("muon_lr", "muon_weight_decay"):
        if getattr(args, flag) is not None and not args.muon:
            p.error(f"--{flag.replace('_', '-')} has no effect without --muon: add --muon or leave it out")
    for flag in ("feedback_gain", "feedback_orthogonal"):
        if getattr(args, flag) and args.rule in ("bp", "frozen"):
            p.error(f"--{flag.replace('_', '-')} has no effect with --rule {args.rule}, which has no feedback weights")
    args.rule_digest = rulefile.digest(args.rule)
    if args.resume and args.rule_digest != args.saved["rule_digest"]:
        p.error(f"--resume {args.resume}: {args.rule} has changed since; a run goes on only with the rule that it began with")
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


FREE = ("data", "device", "epochs", "graph", "out")             # what a resumed run may be given anew


def resumed(p: argparse.ArgumentParser, argv: list[str] | None, folder: Path) -> argparse.Namespace:
    """The arguments of the run in `folder`, with what may be given anew; `saved` are those that it had."""
    try:
        config = runs.read_config(folder)
    except runs.RunError as e:
        p.error(f"--resume {folder}: {e}")
    saved, flags = config["args"], vars(p.parse_args([])).keys() - {"resume"}
    fixed = sorted(flags - set(FREE))
    if config.get("version") != VERSION or not saved.keys() >= set(fixed):
        p.error(f"--resume {folder}: it was made by version {config.get('version')} of train.py, commit {config.get('commit')}; "
                f"this is version {VERSION}")
    p.set_defaults(**{key: saved[key] for key in flags - {"graph", "out"}})
    if str(saved["device"]).startswith("cuda") and not torch.cuda.is_available():
        p.set_defaults(device="auto")
    args = p.parse_args(argv)
    changed = [f"--{key.replace('_', '-')} was {saved[key]} and is {getattr(args, key)}" for key in fixed
               if getattr(args, key) != saved[key]]
    if changed:
        p.error(f"--resume {folder}: {', '.join(changed)}; a run goes on as it began, only --{', --'.join(FREE)} may differ")
    args.saved = saved
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
        self.data_digest = getattr(data, "digest", lambda d: "")(dataset)  # TEMPORARY
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
        each_in_one(self.model, [optimiser for optimiser, _ in self.optimisers])
        self.repeat = speed.Graphed(self.descend, self.generator) if args.graph else self.descend
        self.step = 0
        self.begun: dict | None = None                                          # an epoch that was interrupted
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
        first = self.recorder and self.step % self.steps_per_epoch == 0
        row = self.trajectory and self.step % max(1, self.total_steps // 256) == 0      # some 256 rows in all
        result = self.descend(chosen, first, row) if first or row else self.repeat(chosen)
        self.step += 1
        return result

    def descend(self, chosen: Tensor, watch_update: bool = False, add_row: bool = False) -> tuple[Tensor, Tensor, Tensor]:
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
        return loss.detach(), (logits.argmax(1) == labels).sum(), self.largest(loss)

    @torch.no_grad()
    def largest(self, loss: Tensor) -> Tensor:
        """The loss, and the largest absolute value of each gradient and each weight: where a number is not finite, so is this."""
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
                           disable=parallel.rank() > 0 or None):
            loss, correct, sizes = self.update(chosen)
            losses.append(loss)
            largest.append(sizes)
            right, seen = right + correct, seen + len(chosen)
            stop = interruption is not None and interruption.status is not None
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
                "rule_generator": self.handle.rule.generator.get_state(), "torch_generator": torch.get_rng_state(),
                "recorder": self.recorder and self.recorder.state_dict(),
                "trajectory": self.trajectory and self.trajectory.state_dict()}

    def load(self, state: dict, same_device: bool = True) -> None:
        """The way back. Raises RuntimeError, ValueError or KeyError for the state of another network.

        On another kind of device than before the generator cannot go on; it is seeded anew.
        """
        device = self.args.device
        self.model.load_state_dict(state["model"])
        for (optimiser, _), saved in zip(self.optimisers, state["optimisers"], strict=True):
            rates = [group["lr"] for group in optimiser.param_groups]           # the tensors that a CUDA graph reads
            optimiser.load_state_dict(saved)
            for group, rate in zip(optimiser.param_groups, rates):
                group["lr"] = rate
        self.step, self.begun = state["step"], state["begun"]
        if self.begun:
            self.begun = {key: value.to(device) if isinstance(value, Tensor) and key != "order" else value
                          for key, value in self.begun.items()}
        if same_device:
            self.generator.set_state(state["generator"])
        else:
            self.generator.manual_seed(self.args.seed + self.step)
        self.handle.rule.generator.set_state(state["rule_generator"])
        torch.set_rng_state(state["torch_generator"])
        if self.recorder:
            self.recorder.load_state_dict(state["recorder"])
            self.trajectory.load_state_dict(state["trajectory"])


def each_in_one(model: torch.nn.Module, optimisers: list[torch.optim.Optimizer]) -> None:
    """Raise RuntimeError unless each parameter is in exactly one optimiser: twice it would move twice, never it would not learn."""
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
    lines = [f"{title(args)} · {args.model}, {count:,} parameters · {args.dataset}, {images} · {where} ({args.device_reason}), "
             f"{'bf16 autocast' if args.amp else 'float32'} ({args.amp_reason}){', steps in a CUDA graph' if args.graph else ''}"]
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
        if self.feedback not in (None, now) and not trainer.handle.rule.learns:
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
            raise runs.RunError(f"the run was stopped within an epoch on a {state['device']} device, and goes on within it on such "
                                f"a device only, not on {self.args.device.type}")
        try:
            trainer.load(state, same_device=state["device"] == self.args.device.type)
        except (RuntimeError, ValueError, KeyError) as e:
            raise runs.RunError(f"the checkpoint does not fit the network: {' '.join(str(e).split())[:300]}") from e
        self.lines, self.ranks, self.spent, self.feedback = state["log"], state["ranks"], state["spent"], state["feedback"]
        if not trainer.handle.rule.learns and trainer.handle.digest() != self.feedback:
            raise runs.RunError("the checkpoint's feedback weights are not those that the run began with")


def fixed() -> list[str]:
    """The flags that a run keeps when it goes on."""
    return sorted(vars(parser().parse_args([])).keys() - {"resume", *FREE})


def settings(args: argparse.Namespace) -> dict:
    """The arguments as config.json has them."""
    return {key: str(value) if key == "device" else value for key, value in vars(args).items() if key not in ("resume", "saved")}


def identity(args: argparse.Namespace, trainer: Trainer) -> dict:
    """What a checkpoint must have in common with the run that goes on from it."""
    return {"version": VERSION, "data": trainer.data_digest, **{f"--{key.replace('_', '-')}": getattr(args, key) for key in fixed()}}


def train(args: argparse.Namespace, trainer: Trainer, log: Log) -> int:
    """Run all epochs that are left, writing the folder as they end. Returns the exit status."""
    first, began = len(log.lines), time.perf_counter()
    if first >= args.epochs:                                                    # resumed, and there was nothing left to do
        return end(log, began)
    if args.rank and not log.ranks:
        log.rank({"epoch": 0, **trainer.record()})
    measured = "held-out" if args.validate else "test"
    with contextlib.nullcontext() if parallel.size() > 1 else runs.Interruption() as interruption:
        for epoch in range(first + 1, args.epochs + 1):
            start = time.perf_counter() - log.spent
            line = trainer.epoch(f"epoch {epoch}/{args.epochs}", interruption)
            log.spent = time.perf_counter() - start
            if line is None:
                log.checkpoint(trainer)
                return stopped(trainer, log, interruption)
            line = {"epoch": epoch, **line, "test_accuracy": None if line["diverged"] else trainer.test(),
                    "seconds": round(time.perf_counter() - start, 3)}
            log.epoch(line)
            if line["diverged"]:
                return end(log, began)
            if args.rank and (epoch % args.rank == 0 or epoch == args.epochs):
                log.rank({"epoch": epoch, **trainer.record()})
            log.checkpoint(trainer)
            left = (time.perf_counter() - began) / (epoch - first) * (args.epochs - epoch)
            log.say(f"epoch {epoch:3}/{args.epochs}  loss {line['train_loss']:7.4f}  train {line['train_accuracy']:6.1%}  "
                    f"{measured} {line['test_accuracy']:6.1%}  {line['seconds']:6.1f} s  {span(left)} left")
            if interruption and interruption.status and epoch < args.epochs:
                return stopped(trainer, log, interruption)
    return end(log, began)


def stopped(trainer: Trainer, log: Log, interruption: runs.Interruption) -> int:
    print(f"stopped after step {trainer.step} of {trainer.total_steps}; go on with: python train.py --resume {log.folder}",
          file=sys.stderr)
    return interruption.status


def end(log: Log, began: float) -> int:
    """The last words and the picture. Returns the exit status."""
    last, took = log.lines[-1], span(time.perf_counter() - began)
    if log.folder:
        runs.draw(log.folder / "curves.png", log.lines, log.title)
    if last["diverged"]:
        log.say(f"diverged: at step {last['step']} (epoch {last['epoch']}) {last['not_finite']} is not finite; a lower --lr, --norm "
                f"or --muon may help · {log.folder}")
        return DIVERGED
    measured = "held-out" if log.args.validate else "test"
    log.say(f"final {measured} accuracy {last['test_accuracy']:.1%} (epoch {last['epoch']}, the last) · {took} · {log.folder}")
    return 0


def begin(args: argparse.Namespace, trainer: Trainer, held: contextlib.ExitStack) -> Log:
    """Make the run's folder, or open the one to go on with; it is ours until `held` closes. Raises RunError."""
    speaks = parallel.rank() == 0
    parts = [rulefile.name(args.rule), *["muon"] * args.muon, *[args.norm] * bool(args.norm),
             Path(args.dataset).resolve().name, args.model, f"s{args.seed}"]
    if args.resume and speaks:
        held.enter_context(runs.claim(args.resume))
    state, damage = runs.read_checkpoint(args.resume) if args.resume else (None, "")
    log = Log(args, None)
    if state:
        log.load(state, trainer)
    if not speaks:
        return log
    log.folder = args.resume if args.resume and not args.out else runs.create(args.out, "-".join(parts))
    if log.folder != args.resume:
        held.enter_context(runs.claim(log.folder))
    device = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    here = {"device": device, "processes": parallel.size(), **runs.provenance()}
    config = {"version": VERSION, **here}
    if args.resume:                                                             # what it began with, and each going on
        config = runs.read_config(args.resume)
        config["resumed"] = [*config.get("resumed", []), {"step": trainer.step, **here}]
    runs.write_json(log.folder / "config.json", {**config, "args": settings(args)})
    log.say(header(args, trainer))
    if args.resume:
        if damage and not args.out:
            runs.drop_damaged(args.resume)
        log.say("\n".join([*[f"{damage}; going on from the one before"] * bool(damage), *changes(args, state),
                           f"going on after step {trainer.step} of {trainer.total_steps}, epoch {len(log.lines)} of {args.epochs}"]))
        runs.write_log(log.folder / "log.jsonl", log.lines)
        if args.rank:
            runs.write_log(log.folder / "rank.jsonl", log.ranks)
    return log


def changes(args: argparse.Namespace, state: dict | None) -> list[str]:
    """What a resumed run has anew, and what it means."""
    said = []
    if args.epochs != args.saved["epochs"]:
        said.append(f"--epochs is {args.epochs} and was {args.saved['epochs']}: from here on the learning rates follow the new cosine")
    if state and state["device"] != args.device.type:
        said.append(f"on {args.device.type}, and began on {state['device']}: order and augmentation are drawn anew from here on")
    return said


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
    def complain(reason: object, status: int = 2) -> int:
        if parallel.rank() == 0:
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
    except speed.RecordError as e:
        return complain(f"{e}; add --no-graph")
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
