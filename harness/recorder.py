"""Records the ranks and alignments of a model while it trains.

`Recorder` measures every layer on a fixed batch, `Trajectory` keeps the gradients of successive steps, and
`Recording` is both of them over a whole run, as `train.py --rank` needs it. rank.py says what is measured and
why.
"""
from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fa
import models
import rank


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """A place to run the model in float32 (no autocast, no TF32) and leave no trace behind."""
    gradients = [(p, p.grad) for p in model.parameters()]
    buffers = [(b, b.clone()) for b in model.buffers()]
    kept = "training", "input", "output"                # the last two: what a rule with needs_input has seen
    attributes = [(vars(m), {key: vars(m)[key] for key in kept if key in vars(m)}) for m in model.modules()]
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device = next(model.parameters()).device
    try:
        with (torch.random.fork_rng([device] if device.type == "cuda" else []),
              torch.autocast(device.type, enabled=False), torch.enable_grad(),
              nn.utils.parametrize.cached()):           # a computed weight is one tensor in here
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for p, gradient in gradients:
            p.grad = gradient
        for module, before in attributes:
            for key in kept:
                module.pop(key, None)
            module.update(before)


class Recorder:
    """Measures every Linear and Conv2d of a model on a fixed probe batch, without touching the training.

    handle   what fa.attach returned; its exact() gives backprop's gradient at the same weights and batch
    images   (N, C, H, W) float32, as the model reads them; the paper's kind of study uses a few hundred
    labels   (N,) int64, or what else `loss` compares the model's output with
    loss     (output, labels) -> scalar, the training's

    measure() returns, for each layer by name that the model called,
        error, gradient, update, activation   {effective_rank, participation_ratio, stable_rank, ceiling} of
              error       δ at the layer's output, (N, out·H·W): at most N
              gradient    (out, in·kh·kw)
              update      W after minus W before the optimiser step last watched, (out, in·kh·kw), if one was
              activation  the layer's input x, of which the gradient δ xᵀ is made, (N, in·H·W): at most N
        spectrum          σ/σ₁ of the error, at SPECTRUM ranks from 1 to N
        cosine            mean |cos| between different images' activations
        angle_gradient    ∠(the rule's gradient, backprop's gradient) in degrees
        angle_error       ∠(the rule's error, backprop's error) at the layer's output, in degrees
        angle_weight      ∠(W, B) in degrees, where the layer has a feedback of W's shape
        norm_ratio        ‖B‖ / ‖W‖, there too
        branch            ‖b‖ / (‖b‖ + ‖s‖) where a residual branch begins, with b the error that comes to the
                          block's input through the branch, and s the one through the shortcut
    A value is None where a tensor holds infinite or NaN values, or an angle has a zero side. The pass is in
    training mode, as batch normalisation is when it learns.
    """

    SPECTRUM = (1, 2, 3, 5, 8, 12, 20, 32, 50, 80, 128, 200, 320, 512)

    def __init__(self, model: nn.Module, handle: fa.Attachment, images: Tensor, labels: Tensor,
                 loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy):
        self.model, self.handle, self.images, self.labels, self.loss = model, handle, images, labels, loss
        self.layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
        self._updates: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def watch_update(self) -> Iterator[None]:
        """Put this around optimiser.step(): the next measure() then knows the update that was applied."""
        before = {name: layer.weight.detach().clone() for name, layer in self.layers.items()}
        yield
        self._updates = {name: layer.weight.detach() - before[name] for name, layer in self.layers.items()}

    def state_dict(self) -> dict:
        return {"updates": self._updates}

    def load_state_dict(self, state: dict) -> None:
        self._updates = {name: update.to(self.images.device) for name, update in state["updates"].items()}

    def measure(self) -> dict[str, dict]:
        targets = self.handle.rule.targets
        if self.handle.rule.needs_targets:
            self.handle.rule.targets = self.labels
        with undisturbed(self.model):
            self.model.train()
            inputs, errors, gradients, branches = self._backward()
            with self.handle.exact():
                _, exact_errors, exact, _ = self._backward()
        self.handle.rule.targets = targets
        record = {}
        for name in inputs:
            layer = self.layers[name]
            spectrum = self._sigma(errors[name])
            relative = []
            if spectrum is not None:
                relative = [(spectrum[i - 1] / spectrum[0]).item() if spectrum[0] > 0 else 0.0
                            for i in self.SPECTRUM if i <= len(spectrum)]
            line = {"error": self._measured(errors[name], spectrum),
                    "gradient": self._measured(gradients[name]),
                    "activation": self._measured(inputs[name]),
                    "spectrum": relative,
                    "cosine": rank.mean_cosine(inputs[name].flatten(1)),
                    "angle_gradient": rank.angle(gradients[name], exact[name]),
                    "angle_error": rank.angle(errors[name], exact_errors[name])}
            if name in branches:
                line["branch"] = branches[name]
            if name in self._updates:
                line["update"] = self._measured(self._updates[name])
            feedback = getattr(layer, "feedback", None)
            if feedback is not None and feedback.shape == layer.weight.shape:
                line["angle_weight"] = rank.angle(layer.weight, feedback)
                line["norm_ratio"] = (feedback.norm() / layer.weight.norm()).item()
            record[name] = {key: None if isinstance(value, float) and not math.isfinite(value) else value
                            for key, value in line.items()}
        return record

    @staticmethod
    def _sigma(tensor: Tensor) -> Tensor | None:
        return rank.singular_values(tensor.flatten(1)) if tensor.isfinite().all() else None

    def _measured(self, tensor: Tensor, sigma: Tensor | None = None) -> dict[str, float] | None:
        """None where the tensor overflowed, as the error of plain feedback alignment may."""
        sigma = self._sigma(tensor) if sigma is None else sigma
        return None if sigma is None else {**rank.measures(sigma), "ceiling": len(sigma)}

    def _backward(self) -> tuple[dict, dict, dict, dict]:
        """By the rule in force: each called layer's input, the error at its output, its gradient, and the
        share of the branch in the error of the blocks' inputs."""
        calls: dict[str, tuple[Tensor, Tensor]] = {}
        branches: dict[str, tuple[Tensor, Tensor]] = {}         # a block's input, and the branch's copy of it

        def remember(name: str, layer: nn.Module, args: tuple, named: dict, output: Tensor) -> Tensor:
            calls[name] = ((*args, *named.values())[0].detach(), output)
            return output.clone()                       # an activation may write into it

        def enter(name: str, layer: nn.Module, args: tuple) -> Tensor:
            branches[name] = args[0], args[0].view_as(args[0])
            return branches[name][1]

        hooks = [layer.register_forward_hook(partial(remember, name), with_kwargs=True)
                 for name, layer in self.layers.items()]
        hooks += [block.conv1.register_forward_pre_hook(partial(enter, f"{name}.conv1"))
                  for name, block in self.model.named_modules() if isinstance(block, models.Block)]
        try:
            loss = self.loss(self.model(self.images), self.labels)
        finally:
            for hook in hooks:
                hook.remove()
        ran = [name for name in self.layers if name in calls]       # attention does not call all of its own
        tensors = [*(calls[name][1] for name in ran), *(self.layers[name].weight for name in ran),
                   *(tensor for pair in branches.values() for tensor in pair)]
        wanted = [t for t in tensors if t.requires_grad]
        found = iter(torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True))
        # Where none was wanted, the error is zero.
        both = [next(found) if t.requires_grad else torch.zeros_like(t) for t in tensors]
        shares = {}
        for i, name in enumerate(branches):
            whole, branch = (e.double() for e in both[2 * len(ran) + 2 * i:][:2])   # squares must not vanish
            shortcut = (whole - branch).norm()
            shares[name] = (branch.norm() / (branch.norm() + shortcut)).item()
        return ({name: calls[name][0] for name in ran}, dict(zip(ran, both)), dict(zip(ran, both[len(ran):])),
                shares)


class Trajectory:
    """Gradients of successive steps as rows of a matrix: do they explore many directions?

    A row per gradient would take steps × weights numbers. A count sketch keeps `size` of them: weight i is
    added, with a fixed random sign, to place i mod size. Inner products of rows, and so singular values, are
    kept on average with an error of about 1/√size (Charikar et al. 2002); layers of at most `size` weights
    are kept exactly. Call add() every k-th step, with k so large that there are a few hundred rows.
    """

    def __init__(self, model: nn.Module, size: int = 8192, seed: int = 0):
        self.layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
        self.size = size
        generator = torch.Generator().manual_seed(seed)
        self.signs = {name: (2 * torch.randint(2, (m.weight.numel(),), generator=generator) - 1).to(m.weight)
                      for name, m in self.layers.items()}
        self.rows: dict[str, list[Tensor]] = {name: [] for name in (*self.layers, "all layers")}

    def sketch(self, name: str, gradient: Tensor, exact: bool) -> Tensor:
        flat = gradient.detach().flatten().float()
        if exact and flat.numel() <= self.size:
            return flat
        signed = F.pad(flat * self.signs[name], (0, -flat.numel() % self.size))
        return signed.view(-1, self.size).sum(0)                # (size,)

    def add(self) -> None:
        """Remember the weight gradients as they are now: after backward(), before the optimiser's step."""
        total = 0
        for name, layer in self.layers.items():
            gradient = torch.zeros_like(layer.weight) if layer.weight.grad is None else layer.weight.grad
            self.rows[name].append(self.sketch(name, gradient, exact=True).clone())
            total = total + self.sketch(name, gradient, exact=False)
        self.rows["all layers"].append(total)

    def state_dict(self) -> dict:
        return {"rows": {name: torch.stack(rows) for name, rows in self.rows.items() if rows}}

    def load_state_dict(self, state: dict) -> None:
        for name, rows in state["rows"].items():
            self.rows[name] = list(rows.to(next(iter(self.signs.values())).device))

    def ranks(self, window: int = 50) -> dict[str, dict[str, float] | None]:
        """Effective rank of each layer's rows so far, and of the last `window` of them. At most their number.

        None where a row holds infinite or NaN values.
        """
        stacks = {name: torch.stack(rows) for name, rows in self.rows.items() if rows}
        return {name: {"rows": len(rows), "effective_rank": rank.effective_rank(rows),
                       "window": rank.effective_rank(rows[-window:])} if rows.isfinite().all() else None
                for name, rows in stacks.items()}


class Recording:
    """A Recorder and a Trajectory over a whole run of `epochs` epochs of `steps_per_epoch` steps."""

    def __init__(self, model: nn.Module, handle: fa.Attachment, images: Tensor, labels: Tensor,
                 steps_per_epoch: int, epochs: int):
        self.recorder, self.trajectory = Recorder(model, handle, images, labels), Trajectory(model)
        self.per_epoch = steps_per_epoch
        self.every = max(1, steps_per_epoch * epochs // 256)    # some 256 rows in all
        self.taken = 0

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Put this around every optimiser step: after backward(), with the gradients of the step in place."""
        if self.taken % self.every == 0:
            self.trajectory.add()
        # The update of an epoch's first step: at the very end the learning rate leaves little but rounding.
        first = self.taken % self.per_epoch == 0
        with self.recorder.watch_update() if first else contextlib.nullcontext():
            yield
        self.taken += 1

    def measure(self) -> dict:
        """What a line of rank.jsonl holds besides its epoch and step."""
        start = time.perf_counter()
        layers, trajectory = self.recorder.measure(), self.trajectory.ranks()
        return {"layers": layers, "trajectory": trajectory, "seconds": round(time.perf_counter() - start, 3)}

    def state_dict(self) -> dict:
        return {"taken": self.taken, "recorder": self.recorder.state_dict(),
                "trajectory": self.trajectory.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.taken = state["taken"]
        self.recorder.load_state_dict(state["recorder"])
        self.trajectory.load_state_dict(state["trajectory"])
