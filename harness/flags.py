"""Every flag of a training run, with the reason for its default, and which flags cannot be combined.

`parse` turns a command line into complete arguments. What the user leaves out comes from the recipe of the
data set; a wrong input ends with one line and status 2. With `--resume RUN` the arguments are those that the
run began with.
"""
from __future__ import annotations

import argparse
import fnmatch
import io
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

import data
import fa
import models
import norm
from harness import files, parallel, rulefile

CONFIG = "config.json"          # in a run's folder: what was asked for
# Every change that moves a run's numbers raises the version; results of different versions are not mixed.
VERSION = 2
# For each data set the paper's network, and what is trained when nothing else is asked for.
RECIPES = {"gratings": {"model": "cnn", "width": 16, "epochs": 12, "batch_size": 64},
           "cifar10": {"model": "cnn", "width": 32, "epochs": 50, "batch_size": 128},
           "cifar100": {"model": "resnet18", "width": 64, "epochs": 100, "batch_size": 128}}
# The width of a network that is not the recipe's.
WIDTHS = {"mlp": 512, "cnn": 32, "resnet18": 64, "resnet34": 64, "vgg11": 64}


class Parser(argparse.ArgumentParser):
    """Prints on any terminal: a letter that it lacks becomes a question mark."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")

    def error(self, message: str) -> NoReturn:
        # One line; the usage is behind --help.
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def unread() -> int:
    """Nobody reads the output any more, as in `python fa.py | head`: the rest of it goes nowhere, or Python
    would complain when it exits. Returns the exit status."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141


def number(kind: type, low: float, high: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """An argparse type: a finite number of at least `low` (or above it) and at most `high`."""
    what = "an integer" if kind is int else "a finite number"
    wanted = f"{what} {'above' if above else 'of at least'} {low}"
    wanted += f" and at most {high}" if high < math.inf else ""

    def convert(text: str) -> float:
        try:
            value = kind(text)
            finite = math.isfinite(value)
        except (ValueError, OverflowError):         # not a number, or an integer too large for any float
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not {wanted}") from None
        if not finite or not low <= value <= high or (above and value == low):
            raise argparse.ArgumentTypeError(f"{text} is not {wanted}")
        return value
    return convert


def rule(text: str) -> str:
    """An argparse type: a rule that can be loaded."""
    try:
        rulefile.load(text)
    except rulefile.RuleFileError as e:
        raise argparse.ArgumentTypeError(str(e)) from None
    return rulefile.written(*rulefile.parse(text))


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="train.py", description="Train one network by one learning rule.",
               epilog="The run folder holds config.json, log.jsonl, checkpoint.pt and curves.png.")
    g = p.add_argument_group("the experiment")
    g.add_argument("--rule", type=rule, default="fa", metavar="RULE",
                   help=f"how the error crosses a layer: {', '.join(fa.RULES)} (see fa.py; bp is backprop), "
                        "or a class of your own, my_rule.py:MyRule; with hyperparameters: 'fa(gain=3)' "
                        "(default: fa)")
    g.add_argument("--muon", action="store_true",
                   help="orthogonalise the updates of hidden weights (default: Nesterov SGD for all weights)")
    g.add_argument("--norm", nargs="?", const="batch", choices=norm.KINDS,
                   help="normalise hidden activity; --norm alone is batch, the paper's "
                        "(default: no normalisation)")
    g.add_argument("--dataset", default="gratings", metavar="DATA",
                   help=f"what to learn: {', '.join(data.NAMES)}, or a folder with train/ and test/ "
                        "(or val/) and there a folder of images for each class "
                        "(default: gratings, which is generated, not downloaded)")
    g.add_argument("--seed", type=number(int, 0, 2 ** 32 - 1), default=0,
                   help="of weights, feedback, order and augmentation (default: 0)")
    g.add_argument("--exact", nargs="+", default=[], metavar="LAYER",
                   help="layers that keep exact backprop whatever the rule, by name or pattern, such as "
                        "'blocks.*.shortcut.0' (default: none but the stem)")
    g = p.add_argument_group("network")
    g.add_argument("--model", choices=models.MODELS,
                   help="the network "
                        "(default: the paper's, resnet18 for cifar100 and the 4-layer cnn otherwise)")
    g.add_argument("--width", type=number(int, 1, 2 ** 16),
                   help="channels of the first layer, units of the mlp "
                        "(default: 64, 32 cnn, 512 mlp; 16 for the cnn on gratings, for speed)")
    g.add_argument("--depth", type=number(int, 1, 2 ** 10),
                   help="hidden layers of the cnn or mlp "
                        "(default: 4, the paper's; fixed in the other models)")
    g.add_argument("--shortcut", choices=models.SHORTCUTS,
                   help="where a residual block changes the shape: conv, a 1×1 convolution, or pad, means of "
                        "2×2 pixels and zeros for new channels; none: no shortcuts at all (default: conv)")
    g.add_argument("--init", choices=models.INITS,
                   help="initialisation of forward and feedback weights "
                        "(default: he without --norm, torch with it; see models.py)")
    g = p.add_argument_group("data")
    g.add_argument("--data", default="data", metavar="DIR",
                   help="folder of the downloaded data sets (default: data)")
    g.add_argument("--image-size", type=number(int, 8, 2 ** 12), metavar="PIXELS",
                   help="resize the images of a folder to this (default: 32)")
    g.add_argument("--subset", type=number(int, 1), metavar="N",
                   help="train on the first N images only; the test set stays whole (default: all)")
    g.add_argument("--validate", type=number(int, 1), metavar="N",
                   help="hold out the last N training images and measure on them instead of the test set, "
                        "to choose hyperparameters (default: the test set)")
    g = p.add_argument_group("optimisers")
    g.add_argument("--epochs", type=number(int, 1),
                   help="passes over the training images (default: 12 gratings, 50 cifar10, 100 cifar100)")
    g.add_argument("--batch-size", type=number(int, 1),
                   help="images per step (default: 128; 64 for gratings, which are few)")
    g.add_argument("--lr", type=number(float, 0, above=True),
                   help="initial learning rate of Nesterov SGD "
                        "(default: 0.05 with --norm; 0.02 without, which diverges sooner)")
    g.add_argument("--muon-lr", type=number(float, 0, above=True),
                   help="initial learning rate of Muon "
                        "(default: 0.05 with --norm; 0.01 without, which diverges sooner)")
    g.add_argument("--weight-decay", type=number(float, 0), default=5e-4,
                   help="of both optimisers (default: 0.0005, usual for CIFAR)")
    g.add_argument("--muon-weight-decay", type=number(float, 0),
                   help="of Muon alone (default: --weight-decay; its steps ignore the size of the gradient)")
    g = p.add_argument_group("intervention on the hidden updates (rank.py)").add_mutually_exclusive_group()
    g.add_argument("--cut", type=number(int, 1, 2 ** 16), metavar="R",
                   help="keep the R largest singular values of every update, norm kept (default: all)")
    g.add_argument("--flatten", action="store_true",
                   help="make the singular values of every update equal, norm kept (default: as they are)")
    g = p.add_argument_group("records")
    g.add_argument("--out", metavar="DIR",
                   help="the run folder, new or empty (default: runs/ and a name made of the arguments)")
    g.add_argument("--resume", metavar="RUN", type=Path,
                   help="go on with the run in this folder, with its arguments; you may change only "
                        "--epochs, --data, --device, --graph, and give --out to write elsewhere "
                        "(default: a new run)")
    g.add_argument("--rank", nargs="?", const=1, type=number(int, 1), metavar="EVERY",
                   help="record ranks and alignments after every so many epochs, into rank.jsonl "
                        "(default: never; --rank alone: every epoch)")
    g = p.add_argument_group("machine")
    g.add_argument("--device", default="auto",
                   help="cpu, cuda or cuda:N (default: auto, the first GPU where there is one)")
    g.add_argument("--graph", action=argparse.BooleanOptionalAction,
                   help="record the training step as a CUDA graph and replay it "
                        "(default: on a GPU, if the step is the same every time: one process, "
                        "a rule of fa.py, no --rank, --cut or --flatten)")
    g.add_argument("--deterministic", action="store_true",
                   help="the same bits in every run on a GPU too, by operations that may be slower "
                        "(default: a GPU may sum in any order; on a CPU all bits are the same anyway)")
    g.add_argument("--amp", action=argparse.BooleanOptionalAction,
                   help="bf16 in forward and backward, float32 for weights "
                        "(default: if the GPU or CPU has instructions for it, and so is faster; "
                        "on a CPU not for gratings, whose numbers the README prints)")
    return p


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The complete arguments; whatever is wrong ends the process with one line and status 2."""
    p = parser()
    args = p.parse_args(argv)
    try:
        parallel.asked()
    except ValueError as e:
        p.error(str(e))
    if args.resume:
        args = resumed(p, argv, args.resume)
    for flag in ("muon_lr", "muon_weight_decay"):
        if getattr(args, flag) is not None and not args.muon:
            p.error(f"--{flag.replace('_', '-')} has no effect without --muon: add --muon or leave it out")
    rule = rulefile.load(args.rule)
    if parallel.asked() and rule.learns and rule.needs_input:
        p.error(f"--rule {args.rule} learns from layers' inputs, and each process sees others: use one")
    args.rule_digest = rulefile.digest(args.rule)
    if args.resume and args.rule_digest != args.saved["rule_digest"]:
        p.error(f"--resume {args.resume}: {args.rule} has changed since; "
                "a run goes on only with the rule that it began with")
    recipe = RECIPES.get(args.dataset, RECIPES["cifar100"])     # a folder of images is treated like CIFAR-100
    if args.dataset not in data.NAMES and not os.path.isdir(args.dataset):
        p.error(f"--dataset {args.dataset}: choose from {', '.join(data.NAMES)}, "
                "or a folder of images, which this is not")
    if args.image_size and args.dataset in data.NAMES:
        p.error(f"--image-size has no effect on {args.dataset}, whose images are 32 pixels wide")
    args.model = args.model or recipe["model"]
    args.width = args.width or (recipe["width"] if args.model == recipe["model"] else WIDTHS[args.model])
    if args.depth and args.model not in ("cnn", "mlp"):
        p.error(f"--depth has no effect on {args.model}: choose --model cnn or mlp, or leave it out")
    for flag in ("cut", "flatten"):
        if getattr(args, flag) and args.model == "mlp" and args.depth == 1:
            p.error(f"--{flag} has no effect on an mlp of depth 1, "
                    "which has no hidden weights beside stem and classifier")
    if args.shortcut and not args.model.startswith("resnet"):
        p.error(f"--shortcut has no effect on {args.model}: choose --model resnet18 or resnet34")
    if args.exact and args.rule == "bp":
        p.error("--exact has no effect with --rule bp, which is exact everywhere")
    with torch.device("meta"):                                  # for the names alone
        layers = fa.find(network(args, classes=10))[0] if args.exact else {}
    for pattern in args.exact:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in layers):
            p.error(f"--exact {pattern}: {args.model} has no such layer, but {', '.join(layers)}")
    args.epochs = args.epochs or recipe["epochs"]
    args.batch_size = args.batch_size or recipe["batch_size"]
    args.lr = args.lr or (0.05 if args.norm else 0.02)
    if args.muon:
        args.muon_lr = args.muon_lr or (0.05 if args.norm else 0.01)
    if args.norm in ("batch", "whiten") and args.batch_size < 2:
        p.error(f"--norm {args.norm} compares images with each other and needs a --batch-size of at least 2")
    args.device, args.device_reason = choose_device(p, args.device)
    strided = args.model.startswith("resnet") and args.shortcut in (None, "conv")
    if strided and args.width < 8 and args.device.type == "cpu":
        p.error(f"--width {args.width}: below 8 torch's CPU library computes wrong gradients of 1×1 "
                "shortcuts, or crashes (oneDNN issue 6035); choose --width 8, or --shortcut pad")
    if args.graph and args.device.type != "cuda":
        p.error("--graph records CUDA kernels and needs a GPU")
    changes = {"--cut": args.cut, "--flatten": args.flatten, "--rank": args.rank,
               "several processes": parallel.asked(),
               f"--rule {args.rule}": rulefile.parse(args.rule)[0] not in fa.RULES}
    changing = next((flag for flag, asked in changes.items() if asked), None)
    if args.graph and changing:
        p.error(f"--graph cannot be combined with {changing}: its Python may do something else in every step")
    if args.graph is None:
        args.graph = args.device.type == "cuda" and not changing
    args.amp_reason = "as the run began" if args.resume else "as asked"
    if args.amp is None:
        # The README prints the numbers of gratings on a CPU.
        kept = args.device.type == "cpu" and args.dataset == "gratings"
        args.amp = not kept and computes_bf16(args.device)
        processor = "GPU" if args.device.type == "cuda" else "CPU"
        here = f"this {processor} has {'it' if args.amp else 'no bf16'}"
        args.amp_reason = "default for gratings" if kept else here
    return args


def network(args: argparse.Namespace, classes: int, size: int = 32) -> nn.Module:
    """The network that the arguments ask for."""
    own = {key: getattr(args, key) for key in ("depth", "shortcut") if getattr(args, key)}
    return models.MODELS[args.model](classes, args.norm, args.width, init=args.init, size=size, **own)


FREE = ("data", "device", "epochs", "graph", "out")             # what a resumed run may be given anew


def resumed(p: argparse.ArgumentParser, argv: list[str] | None, folder: Path) -> argparse.Namespace:
    """The arguments of the run in `folder`, but for those given anew; `saved` are those that it had."""
    try:
        config = read_config(folder)
    except files.Problem as e:
        p.error(f"--resume {folder}: {e}")
    saved = config["args"]
    flags = vars(p.parse_args([])).keys() - {"resume"}
    if config.get("version") != VERSION or not saved.keys() >= set(fixed()):
        p.error(f"--resume {folder}: it was made by version {config.get('version')} of train.py, commit "
                f"{config.get('commit')}, and this is version {VERSION}")
    p.set_defaults(**{key: saved[key] for key in flags - {"graph", "out"}})
    if str(saved["device"]).startswith("cuda") and not torch.cuda.is_available():
        p.set_defaults(device="auto")
    args = p.parse_args(argv)
    changed = [f"--{key.replace('_', '-')} was {saved[key]} and is {getattr(args, key)}" for key in fixed()
               if getattr(args, key) != saved[key]]
    if changed:
        p.error(f"--resume {folder}: {', '.join(changed)}; a run goes on as it began, "
                f"only --{', --'.join(FREE)} may differ")
    args.saved = saved
    return args


def read_config(folder: Path) -> dict:
    """What a run's config.json says. Raises Problem if there is no run."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise files.Problem(f"{folder} is no run to go on with: {path}: {e.strerror or e}") from e
    except ValueError as e:
        raise files.Problem(f"{folder} is no run to go on with: {path} is no JSON ({e})") from e
    if not isinstance(config, dict) or not isinstance(config.get("args"), dict):
        raise files.Problem(f"{folder} is no run to go on with: {path} holds no arguments")
    return config


def check(args: argparse.Namespace, count: int, processes: int) -> None:
    """Raise Problem if a data set of `count` training images cannot be trained on like this."""
    if args.subset and args.subset > count:
        raise files.Problem(f"--subset {args.subset}: {args.dataset} has {count} training images"
                            + (" that are not held out" if args.validate else ""))
    if args.norm in ("batch", "whiten") and args.subset == 1:
        raise files.Problem(f"--subset 1: --norm {args.norm} compares images with each other and needs two")
    batch = min(args.subset or count, args.batch_size)
    if batch % processes:
        raise files.Problem(f"a batch of {batch} images cannot be divided among {processes} processes")


def choose_device(p: argparse.ArgumentParser, name: str) -> tuple[torch.device, str]:
    """(device, why). A GPU gets its number here and becomes the current one, for all streams and graphs."""
    available = torch.cuda.is_available()
    if name == "auto" and not available:
        return torch.device("cpu"), "no GPU was found"
    try:
        device = torch.device("cuda" if name == "auto" else name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        p.error(f"--device {name}: choose cpu, cuda or cuda:N")
    if device.type == "cpu":
        return device, "as asked"
    if not available:
        p.error(f"--device {name}: torch {torch.__version__} finds no GPU here; "
                "leave --device out to use the CPU")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) if parallel.asked() else device.index or 0)
    if device.index >= torch.cuda.device_count():
        p.error(f"--device {name}: there are {torch.cuda.device_count()} GPUs, counted from 0")
    trouble = try_out(device)
    if trouble and name == "auto":
        return torch.device("cpu"), f"a GPU was found but fails: {trouble}"
    if trouble:
        p.error(f"--device {name}: the GPU fails: {trouble}; leave --device out to use the CPU")
    return device, "a GPU was found" if name == "auto" else "as asked"


def try_out(device: torch.device) -> str:
    """Make this GPU the current one and add two numbers on it. Returns why that fails, or "".

    A torch that was built without kernels for a card finds the card, and fails at the first operation.
    """
    try:
        torch.cuda.set_device(device)
        torch.ones(1, device=device).add(1).item()
    except RuntimeError as e:
        return str(e).splitlines()[0]
    return ""


def computes_bf16(device: torch.device) -> bool:
    """Does this device have instructions for bf16? Where it is only emulated, float32 is faster."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)       # is_bf16_supported() counts emulation
    # On x86 oneDNN's word is not enough: it says yes to every AVX512, and without AVX512-BF16 it converts to
    # float32 and back.
    x86 = torch.cpu._is_avx2_supported()
    return (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
            and (not x86 or torch.cpu._is_avx512_bf16_supported()))


def muon_dtype(device: torch.device) -> torch.dtype:
    """What Muon iterates in: bf16 is enough, but where it is only emulated float32 is many times faster."""
    return torch.bfloat16 if computes_bf16(device) else torch.float32


def fixed() -> list[str]:
    """The flags that a run keeps when it goes on."""
    return sorted(vars(parser().parse_args([])).keys() - {"resume", *FREE})


def settings(args: argparse.Namespace) -> dict:
    """The arguments as config.json has them."""
    kept = {key: value for key, value in vars(args).items() if key not in ("resume", "saved")}
    return {**kept, "device": str(args.device)}
