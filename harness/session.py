"""A run from its folder to its exit status: logs, signals, resuming and errors, kept out of train.py.

    config.json             arguments, the command, versions, commit, device
    log.jsonl               one JSON object an epoch
    rank.jsonl              with --rank, one JSON object a recording
    checkpoint.pt           all that the rest of the run depends on, for torch.load(..., weights_only=True)
    checkpoint.previous.pt  the one before
    curves.png              loss and accuracy by epoch; with --rank, the rank of the error

    with Run(args) as run:
        run.begin(model, handle, ...)           # a new folder, or the state in which the run was stopped
        for epoch in run.epochs():
            for chosen in run.batches(...):     # which images; the rest of an epoch that was interrupted
                run.saw(loss, correct, ...)     # the first number that is not finite ends the run
            run.log(accuracy)
    sys.exit(run.status)

Whatever ends the `with` block becomes one line on stderr and an exit status; only bugs in this project stay
tracebacks. Ctrl-C and SIGTERM wait until the step is done. A run that was killed goes on from its last
checkpoint, or from the one before if the last is damaged.
"""
from __future__ import annotations

import argparse
import contextlib
import math
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import data
import fa
import muon
from harness import cache, files, flags, graph, parallel, pictures, rulefile, tables

CHECKPOINT, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
# The least time between two checkpoints: on a fast GPU an epoch takes little longer than writing one.
CHECKPOINT_SECONDS = 30
DIVERGED = 3                    # exit status
# What an optimiser keeps as it is here and does not take from a checkpoint.
OF_THE_DEVICE = ("lr", "fused", "foreach", "capturable", "dtype")


class Diverged(Exception):
    """A number is no longer finite."""


class Stopped(Exception):
    """Ctrl-C or SIGTERM came, and the step is done."""


class Run:
    """See above.

    status      the exit status, once the block is left
    folder      the run's folder, in the process that writes; None in the others
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.status, self.step = args, 0, 0
        self.folder: Path | None = None
        self.lines: list[dict] = []                             # of log.jsonl
        self.ranks: list[dict] = []                             # of rank.jsonl
        self.spent = 0.0                                        # seconds of an epoch that was interrupted
        self._interrupted: dict | None = None                   # and what it had come to
        self._held = contextlib.ExitStack()

    def __enter__(self) -> Run:
        if parallel.asked():
            parallel.start(self.args.device)
        graph.prepare(self.args.device, self.args.deterministic)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> bool:
        reason = None
        try:
            if error is not None:
                self.status, reason = self._explain(error)
        finally:
            self._held.close()
        if reason and parallel.index() == 0:
            print(reason, file=sys.stderr)
        # All processes end together with these two; any other status may be that of one process alone.
        parallel.stop(together=error is None or self.status == DIVERGED)
        return error is None or self.status != 0

    def _explain(self, error: BaseException) -> tuple[int, str]:
        """The exit status and what to say; status 0 for an unexpected error, which stays a traceback."""
        kept = f"; finished epochs are in {self.folder}" if self.folder else ""
        if isinstance(error, Stopped):
            return self._signals.status, (f"stopped after step {self.step} of {self.steps}; "
                                          f"go on with: python train.py --resume {self.folder}")
        if isinstance(error, Diverged):
            return DIVERGED, ""
        if isinstance(error, files.Problem | fa.HookError):
            return 2, f"train.py: {error}"
        if isinstance(error, BrokenPipeError):                  # `python train.py | head`
            return flags.unread(), f"train.py: nobody reads the output any more{kept}"
        if isinstance(error, graph.RecordError):
            return 2, f"train.py: {error}; add --no-graph"
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error):
            asked = re.search(r"ried to allocate [\d.]+ \w+", str(error))
            return 2, (f"train.py: the memory is full{f' (t{asked[0]})' if asked else ''}; choose a smaller "
                       f"--batch-size or --width{kept}")
        if isinstance(error, KeyboardInterrupt):
            when = f"at once{kept}" if kept else "before the run began"
            return 130, f"train.py: stopped {when}"
        reason = rulefile.explain(error, self.args.rule)        # if it comes from a user's own rule
        return (2, f"train.py: {reason}{kept}") if reason else (0, "")

    def say(self, text: str) -> None:
        if parallel.index() == 0:
            print(text, flush=True)

    # ---- before the first step -----------------------------------------------------------------------------

    def begin(self, model: nn.Module, handle: fa.Attachment,
              optimisers: list[tuple[torch.optim.Optimizer, float]],
              generator: torch.Generator, recording: Any, dataset: data.Dataset) -> None:
        """Make the run's folder, or open the one to go on with. Raises Problem.

        No other process can open the folder until the run ends.
        """
        args = self.args
        self.model, self.handle, self.generator, self.recording = model, handle, generator, recording
        self._parts = model, handle, [optimiser for optimiser, _ in optimisers], generator, recording
        self.per_epoch = data.steps(args.subset or len(dataset.train_images), args.batch_size)
        self.steps = args.epochs * self.per_epoch
        digest, self.classes = cache.digest(dataset), len(dataset.classes)
        self.identity = {"version": flags.VERSION, "data": digest,
                         **{f"--{key.replace('_', '-')}": getattr(args, key) for key in flags.fixed()}}
        speaks = parallel.index() == 0
        if args.resume and speaks:
            self._held.enter_context(files.claim(args.resume))
        state, damage = read_checkpoint(args.resume) if args.resume else (None, "")
        if state:
            self._load(state)
        else:
            self.feedback = rulefile.feedback_digest(handle)
        if speaks:
            saw = {"digest": digest, "train_images": len(dataset.train_images) + (args.validate or 0)}
            self._open(state, damage, saw, header(args, model, optimisers, dataset))
        self._signals = self._held.enter_context(Signals(listen=parallel.size() == 1))
        self._kept = time.perf_counter()                        # when the last checkpoint was written

    def _open(self, state: dict | None, damage: str, saw: dict, head: str) -> None:
        """Make or open the folder, write its config.json, and say the first words."""
        args = self.args
        self.folder = args.resume if args.resume and not args.out else create(args.out, name(args))
        if self.folder != args.resume:
            self._held.enter_context(files.claim(self.folder))
        on_gpu = args.device.type == "cuda"
        device = torch.cuda.get_device_name(args.device) if on_gpu else f"{os.cpu_count()} CPU cores"
        here = {"device": device, "processes": parallel.size(), **provenance()}
        config = {"version": flags.VERSION, "data": saw, **here}
        if args.resume:                                         # how it began, and each time it went on
            config = flags.read_config(args.resume)
            config["resumed"] = [*config.get("resumed", []), {"step": self.step, **here}]
        files.write_json(self.folder / flags.CONFIG, {**config, "args": flags.settings(args)})
        self.say(head)
        if not args.resume:
            return
        if damage:
            self.say(f"{damage}; going on from the one before")
            # In the damaged one's place, so that the next checkpoint keeps this good one as its previous.
            if not args.out:
                os.replace(args.resume / PREVIOUS, args.resume / CHECKPOINT)
        if args.epochs != args.saved["epochs"]:
            self.say(f"--epochs is {args.epochs} and was {args.saved['epochs']}: "
                     "from here on the learning rates follow the new cosine")
        if state and state["device"] != args.device.type:
            self.say(f"on {args.device.type}, begun on {state['device']}: "
                     "from here on order and augmentation are drawn anew")
        self.say(f"going on after step {self.step} of {self.steps}, epoch {len(self.lines)} of {args.epochs}")
        files.write_lines(self.folder / "log.jsonl", self.lines)
        if args.rank:
            files.write_lines(self.folder / "rank.jsonl", self.ranks)

    # ---- the training --------------------------------------------------------------------------------------

    def epochs(self) -> Iterator[int]:
        """The epochs that are left; after the last of them come the last words and the picture."""
        self._began, self._first = time.perf_counter(), len(self.lines)
        if self.args.rank and not self.ranks:
            self._record(0)
        for epoch in range(self._first + 1, self.args.epochs + 1):
            self._start = time.perf_counter() - self.spent
            yield epoch
        self._end()

    def batches(self, count: int, size: int) -> Iterator[Tensor]:
        """Which of `count` images each batch of this epoch holds; if it was interrupted, the batches left."""
        self._epoch = self._interrupted or {"order": self.generator.get_state(),
                                            "losses": [], "correct": 0, "seen": 0}
        now = self.generator.get_state()
        self.generator.set_state(self._epoch["order"])      # the same order again; part of it may be done
        chosen = list(data.indices(count, size, self.generator))
        if self._interrupted:
            self.generator.set_state(now)
        self._losses, self._largest = list(self._epoch["losses"]), []
        self._interrupted = None
        done, number = len(self._losses), len(self.lines) + 1
        for batch in tqdm(chosen[done:], f"epoch {number}/{self.args.epochs}", len(chosen), initial=done,
                          leave=False, unit="step", disable=parallel.index() > 0 or None):
            self._epoch["seen"] += len(batch)
            yield batch

    def progress(self) -> float:
        """Which part of all steps is done, from 0 to 1."""
        return self.step / self.steps

    def saw(self, loss: Tensor, correct: Tensor, largest: Tensor) -> None:
        """Note what a step gave. Raises Diverged at a number not finite, Stopped after Ctrl-C or SIGTERM."""
        self.step += 1
        self._losses.append(loss)
        self._largest.append(largest)
        self._epoch["correct"] = self._epoch["correct"] + correct
        stop, last = self._signals.status, len(self._losses) == self.per_epoch
        often = 20 if loss.device.type == "cuda" else 1         # reading a number makes a GPU wait
        if len(self._largest) == often or last or stop:
            finite = parallel.mean(torch.stack(self._largest)).isfinite().all(1)
            if not finite.all():
                self._diverge(int(finite.int().argmin()))
            self._largest = []
        if stop and not last:
            self._interrupted = {**self._epoch, "losses": torch.stack(self._losses)}
            self.spent = time.perf_counter() - self._start
            self._checkpoint()
            raise Stopped

    def log(self, accuracy: float) -> None:
        """Write and say what this epoch came to. Raises Stopped after Ctrl-C or SIGTERM."""
        epoch, loss = len(self.lines) + 1, parallel.mean(torch.stack(self._losses)).mean().item()
        correct = parallel.total(self._epoch["correct"]).item()
        self._write({"epoch": epoch, "diverged": False, "step": self.step, "train_loss": loss,
                     "train_accuracy": correct / self._epoch["seen"], "test_accuracy": accuracy})
        if self.args.rank and (epoch % self.args.rank == 0 or epoch == self.args.epochs):
            self._record(epoch)
        stop = self._signals.status                             # read once: a signal may come at any moment
        if stop or epoch == self.args.epochs or time.perf_counter() - self._kept >= CHECKPOINT_SECONDS:
            self._checkpoint()
        line = self.lines[-1]
        seconds_an_epoch = (time.perf_counter() - self._began) / (epoch - self._first)
        left = (self.args.epochs - epoch) * seconds_an_epoch
        self.say(f"epoch {epoch:3}/{self.args.epochs}  loss {loss:7.4f}  "
                 f"train {line['train_accuracy']:6.1%}  {measured(self.args)} {accuracy:6.1%}  "
                 f"{line['seconds']:6.1f} s  {tables.span(left)} left")
        if stop and epoch < self.args.epochs:
            raise Stopped

    def _write(self, line: dict) -> None:
        self.lines.append({**line, "seconds": round(time.perf_counter() - self._start, 3)})
        self.spent = 0.0
        if self.folder:
            files.write_lines(self.folder / "log.jsonl", self.lines)

    def _record(self, epoch: int) -> None:
        self.ranks.append({"epoch": epoch, "step": self.step, **self.recording.measure()})
        if self.folder:
            files.write_lines(self.folder / "rank.jsonl", self.ranks)

    def _diverge(self, which: int) -> None:
        """Write and say which number was not finite, and at which of the last steps."""
        step = self.step - len(self._largest) + which + 1
        what = culprit(parallel.mean(self._largest[which]), self.model)
        self._write({"epoch": len(self.lines) + 1, "diverged": True, "step": step, "train_loss": None,
                     "train_accuracy": None, "not_finite": what, "test_accuracy": None})
        self._draw()
        self.say(f"diverged: at step {step} (epoch {len(self.lines)}) {what} is not finite; "
                 f"a lower --lr, --norm or --muon may help · {self.folder}")
        raise Diverged

    def _end(self) -> None:
        self._draw()
        last = self.lines[-1]
        self.say(f"final {measured(self.args)} accuracy {last['test_accuracy']:.1%} "
                 f"(epoch {last['epoch']}, the last) · "
                 f"{tables.span(time.perf_counter() - self._began)} · {self.folder}")

    def _draw(self) -> None:
        if self.folder:
            path = self.folder / "curves.png"
            heading = f"{title(self.args)} · {self.args.model} · {self.args.dataset} · seed {self.args.seed}"
            pictures.picture(path, lambda: pictures.curves(path, self.lines, heading, self.classes,
                                                           self.ranks, measured(self.args)))

    # ---- checkpoints ---------------------------------------------------------------------------------------

    def _checkpoint(self) -> None:
        """Write a checkpoint. Raises Problem if the rule changed its feedback weights and does not say so."""
        now = rulefile.feedback_digest(self.handle)
        if self.feedback and self.feedback != now and not self.handle.rule.learns:
            raise files.Problem(f"{self.args.rule}: the feedback weights have changed since the run began; "
                                "expected a rule that leaves them alone, or says learns = True")
        self.feedback, self._kept = now, time.perf_counter()
        if self.folder:
            state = {"identity": self.identity, "device": self.args.device.type,
                     "log": self.lines, "ranks": self.ranks, "spent": self.spent,
                     "feedback": now, "step": self.step, "interrupted": self._interrupted,
                     **gather(*self._parts)}
            files.write_tensors(self.folder / CHECKPOINT, state, keep=self.folder / PREVIOUS)

    def _load(self, state: dict) -> None:
        """Go on from a checkpoint. Raises Problem, saying what differs, if it is not one of this run."""
        args, theirs = self.args, state.get("identity", {})
        other = [f"{key} {theirs.get(key)} and not {value}" for key, value in self.identity.items()
                 if theirs.get(key) != value]
        if other:
            raise files.Problem(f"the checkpoint is not this run's; it was made with {', '.join(other)}")
        if state["interrupted"] and state["device"] != args.device.type:
            raise files.Problem(f"the run was stopped within an epoch on a {state['device']} device, "
                                f"and can go on within it only on such a device, not on {args.device.type}")
        if state["step"] > self.steps:
            raise files.Problem(f"the run has made {state['step']} steps already, "
                                f"and --epochs {args.epochs} are {self.steps}; give more epochs")
        try:
            restore(state, *self._parts)
        except (RuntimeError, ValueError, KeyError) as e:
            raise files.Problem(f"the checkpoint does not fit the network: {str(e)[:300]}") from e
        if state["device"] != args.device.type:                 # the other's generator cannot go on here
            self.generator.manual_seed(args.seed + state["step"])
        self._interrupted = state["interrupted"] and {
            key: value.to(args.device) if isinstance(value, Tensor) and key != "order" else value
            for key, value in state["interrupted"].items()}
        self.lines, self.ranks, self.step = state["log"], state["ranks"], state["step"]
        self.spent, self.feedback = state["spent"], state["feedback"]
        if not self.handle.rule.learns and rulefile.feedback_digest(self.handle) != self.feedback:
            raise files.Problem("the checkpoint's feedback weights are not those that the run began with")


def gather(model: nn.Module, handle: fa.Attachment, optimisers: list[torch.optim.Optimizer],
           generator: torch.Generator, recording: Any) -> dict:
    """All that the rest of the training depends on."""
    return {"model": model.state_dict(), "rule": handle.rule.state_dict(), "generator": generator.get_state(),
            "optimisers": [o.state_dict() for o in optimisers], "torch_generator": torch.get_rng_state(),
            "recording": recording and recording.state_dict()}


def restore(state: dict, model: nn.Module, handle: fa.Attachment, optimisers: list[torch.optim.Optimizer],
            generator: torch.Generator, recording: Any) -> None:
    """Undo `gather`. Raises RuntimeError, ValueError or KeyError for the state of another network."""
    model.load_state_dict(state["model"])
    for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
        ours = [{key: group[key] for key in OF_THE_DEVICE if key in group}
                for group in optimiser.param_groups]
        optimiser.load_state_dict(saved)
        for group, own in zip(optimiser.param_groups, ours):
            group.update(own)                                   # lr: the tensor that a CUDA graph reads
    if len(generator.get_state()) == len(state["generator"]):
        generator.set_state(state["generator"])
    handle.rule.load_state_dict(state["rule"])
    torch.set_rng_state(state["torch_generator"])
    if recording:
        recording.load_state_dict(state["recording"])


def read_checkpoint(folder: Path) -> tuple[dict | None, str]:
    """(state, what went wrong) of the last checkpoint, or of the one before if the last is damaged.

    The state is None if there is no checkpoint yet. Raises Problem if there are some and none can be read.
    Nothing in them is executed.
    """
    said = []
    for path in (folder / CHECKPOINT, folder / PREVIOUS):
        if path.exists():
            try:
                state = files.read(path)
                if isinstance(state, dict):
                    return state, "; ".join(said)
                said.append(f"{path} is damaged (it holds no state)")
            except files.Problem as e:
                said.append(str(e))
    if said:
        raise files.Problem(f"{'; '.join(said)}: there is nothing to go on from; "
                            "start the run again with another --out")
    return None, ""


def create(folder: str | os.PathLike | None, name: str) -> Path:
    """Make an empty run folder: `folder`, or runs/<name>, or runs/<name>-2, ... where that is taken.

    Raises Problem if it cannot be made, or if `folder` already holds something: runs are evidence, and none
    is written over.
    """
    path = Path(folder) if folder is not None else Path("runs") / name
    try:
        if folder is not None:
            path.mkdir(parents=True, exist_ok=True)
            files.tidy(path)
            if not any(path.iterdir()):
                return path
            again = f", or go on with it by --resume {path}" if (path / flags.CONFIG).exists() else ""
            raise files.Problem(f"{path} is not empty, and a run never writes over another; "
                                f"choose a new --out{again}")
        for number in range(2, 1_000_000):
            with contextlib.suppress(FileExistsError):          # if two runs start at once, one gets the name
                path.parent.mkdir(exist_ok=True)
                path.mkdir()
                return path
            path = path.with_name(f"{name}-{number}")
    except OSError as e:
        raise files.Problem(f"cannot make the run folder {path}: {e.strerror or e}; "
                            "choose another --out") from e
    raise files.Problem(f"there are a million runs called {name}; choose an --out")


# ---- signals, and numbers that are not finite --------------------------------------------------------------

class Signals:
    """Defers Ctrl-C and SIGTERM to the end of the step: read `status` then. A second Ctrl-C acts at once.

    status      0, or 128 + the signal's number, which is what a shell expects a process to end with
    listen      False for several processes: they would stop after different steps and wait for each other
    """

    def __init__(self, listen: bool = True) -> None:
        self.status, self.listen = 0, listen

    def __enter__(self) -> Signals:
        # Python lets only the main thread handle signals.
        hears = self.listen and threading.current_thread() is threading.main_thread()
        asked = (signal.SIGINT, signal.SIGTERM) if hears else ()
        self._before = {number: signal.signal(number, self._remember) for number in asked}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: types.FrameType | None) -> None:
        if self.status and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.status = 128 + number


@torch.no_grad()
def largest(loss: Tensor, model: nn.Module) -> Tensor:
    """The loss, and the largest absolute value of each gradient and weight: not finite if an entry is not."""
    trained = [p for p in model.parameters() if p.grad is not None]
    return torch.stack([loss, *torch._foreach_norm([p.grad for p in trained] + trained, math.inf)])


def culprit(largest: Tensor, model: nn.Module) -> str:
    """What was not finite first: of several tensors the last, since backward begins at the last layer."""
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    loss, gradients, weights = largest.isfinite().tensor_split([1, 1 + len(trained)])
    if not loss:
        return "the loss"
    of, finite = ("gradient", gradients) if not gradients.all() else ("update", weights)
    bad = [name for name, good in zip(trained, finite.tolist()) if not good]
    return f"the {of} of {bad[-1]}"


def each_in_one(model: nn.Module, optimisers: list[torch.optim.Optimizer]) -> None:
    """Raise RuntimeError unless each parameter is in exactly one optimiser.

    In two it would move twice, in none not at all.
    """
    owned = Counter(p for optimiser in optimisers for group in optimiser.param_groups
                    for p in group["params"])
    wrong = [name for name, p in model.named_parameters() if owned[p] != 1]
    if wrong:
        raise RuntimeError(f"not in exactly one optimiser: {', '.join(wrong)}")


# ---- words -------------------------------------------------------------------------------------------------

def measured(args: argparse.Namespace) -> str:
    return "held-out" if args.validate else "test"


def name(args: argparse.Namespace) -> str:
    """The name of the run's folder, unless --out gives another."""
    parts = [rulefile.name(args.rule)]
    if args.muon:
        parts.append("muon")
    if args.norm:
        parts.append(args.norm)
    parts += [Path(args.dataset).resolve().name, args.model, f"s{args.seed}"]
    return re.sub(r"[^\w.-]+", "-", "-".join(parts)).strip("-")      # the rule may be fa(gain=3)


def title(args: argparse.Namespace) -> str:
    parts = [rulefile.name(args.rule),
             "muon" if args.muon else "",
             f"{args.norm} norm" if args.norm else "no norm",
             f"updates cut to rank {args.cut}" if args.cut else "",
             "flattened updates" if args.flatten else ""]
    return " + ".join(part for part in parts if part)


def header(args: argparse.Namespace, model: nn.Module, optimisers: list[tuple[torch.optim.Optimizer, float]],
           dataset: data.Dataset) -> str:
    """What runs where and why, and which optimiser updates what."""
    count = sum(p.numel() for p in model.parameters())
    images = (f"{args.subset or len(dataset.train_images):,} + {len(dataset.test_images):,}"
              f"{' held-out' if args.validate else ''} images")
    on_gpu = args.device.type == "cuda"
    where = torch.cuda.get_device_name(args.device) if on_gpu else "cpu"
    where += f", {parallel.size()} processes" if parallel.size() > 1 else ""
    float32 = "float32, no TF32" if on_gpu else "float32"
    precision = "bf16 autocast" if args.amp else float32
    lines = [f"{title(args)} · {args.model}, {count:,} parameters · {args.dataset}, {images} · "
             f"{where} ({args.device_reason}), {precision} ({args.amp_reason})"
             f"{', steps in a CUDA graph' if args.graph else ''}"]
    for optimiser, rate in optimisers:
        tensors = [p for group in optimiser.param_groups for p in group["params"]]
        is_muon = isinstance(optimiser, muon.Muon)
        kind, what = ("Muon", "hidden matrices") if is_muon else ("Nesterov SGD", "tensors")
        weights = sum(p.numel() for p in tensors)
        lines.append(f"{kind}, learning rate {rate:g}: {len(tensors)} {what}, {weights:,} weights")
    return "\n".join(lines)


def provenance() -> dict:
    """What numbers depend on besides the arguments: command, commit (None outside a checkout), versions, and
    of the CPU what decides the order in which it adds."""
    cpu = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    return {"command": " ".join(sys.argv), "commit": commit(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "cpu": cpu}}


def commit() -> str | None:
    """The project's commit, with "+changes" if one of the Python files differs from it."""
    git = ["git", "-C", str(Path(__file__).resolve().parent.parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py"]).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+changes" if changed else "")
