"""How many directions does a matrix really use? Three measures of rank that noise does not fool.

The rank of a matrix counts the singular values σ₁ ≥ σ₂ ≥ … that are not zero. In floating point none is, so a measure must
weigh them. With p_i = σ_i / Σσ, the share of direction i:

    effective rank         exp(-Σ p_i log p_i)      Roy & Vetterli 2007: the exponential of the entropy of the shares
    participation ratio    (Σ σ²)² / Σ σ⁴           counts energy, so it is ruled by the few largest directions
    stable rank            ‖M‖_F² / σ₁² = Σ σ² / σ₁²

All lie between 1 and min(m, n), are n for n equal singular values, do not change when M is scaled or rotated, and are
defined as 0 for a zero matrix. The literature mixes up their names: look at the formula. The surprising thing is how far they
differ: of 100 singular values falling as 1/i, the effective rank is 40, the participation ratio 2.5, the stable rank 1.6.

Boeshertz, Pascanu & Clopath (2026) find that feedback alignment's signal has a low effective rank. What is measured:

    error δ      (N, C·H·W), a row per image. At most N
    gradient     (out, in·kh·kw), a layer's weight gradient. At most min(out, in·kh·kw)
    trajectory   (steps, weights), a row per gradient of successive steps. At most the number of steps

The singular values come from a Gram matrix of the smaller side in float64 (σ² are its eigenvalues): for 512 × 4608 that is
four times faster than an SVD, and float64 keeps what squaring loses. `python rank.py` measures some known matrices;

    python train.py --muon --norm --rank                        # records into the run folder
    python rank.py RUN [RUN ...] --out rank.png                 # draws runs side by side
"""
from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F


# ---- measures --------------------------------------------------------------------------------------------------

def singular_values(matrix: Tensor) -> Tensor:
    """σ of an (m, n) matrix, float64 (min(m, n),), largest first. Below about 1e-8 σ₁ they are rounding.

    Raises ValueError unless the matrix has two dimensions, is not empty and is finite, as must be σ₁.
    """
    if matrix.dim() != 2 or matrix.numel() == 0:
        raise ValueError(f"rank is measured of a non-empty matrix, not of shape {tuple(matrix.shape)}")
    M = matrix.detach().double()
    largest = M.abs().max()
    if not largest.isfinite():
        raise ValueError("the matrix holds infinite or NaN values, so it has no rank")
    if largest > 0:
        M = M / largest                                         # σ² must neither overflow nor vanish
    if M.shape[0] > M.shape[1]:
        M = M.mT
    eigenvalues = torch.linalg.eigvalsh(M @ M.mT)               # ascending; rounding may make a zero negative
    sigma = eigenvalues.clamp(min=0).sqrt().flip(0) * largest
    if sigma[0].isinf():
        raise ValueError("the matrix is too large: its singular values are beyond the range of float64")
    return sigma


def effective_rank(matrix: Tensor) -> float:
    """exp(-Σ p log p), p = σ/Σσ, of an (m, n) matrix: 1 to min(m, n); 0 for a zero matrix (Roy & Vetterli 2007)."""
    return measures(singular_values(matrix))["effective_rank"]


def participation_ratio(matrix: Tensor) -> float:
    """(Σσ²)² / Σσ⁴ of an (m, n) matrix: 1 to min(m, n); 0 for a zero matrix."""
    return measures(singular_values(matrix))["participation_ratio"]


def stable_rank(matrix: Tensor) -> float:
    """‖M‖_F² / σ₁² of an (m, n) matrix: 1 to min(m, n); 0 for a zero matrix."""
    return measures(singular_values(matrix))["stable_rank"]


def measures(sigma: Tensor) -> dict[str, float]:
    """All three of singular values that are known already, largest first."""
    if sigma[0] == 0:
        return {"effective_rank": 0.0, "participation_ratio": 0.0, "stable_rank": 0.0}
    p, energy = sigma / sigma.sum(), (sigma / sigma[0]).square()
    return {"effective_rank": torch.exp(-torch.special.xlogy(p, p).sum()).item(),       # xlogy: 0 log 0 = 0
            "participation_ratio": (energy.sum().square() / energy.square().sum()).item(),
            "stable_rank": energy.sum().item()}


def angle(a: Tensor, b: Tensor) -> float:
    """Angle between two tensors of one shape, taken as vectors, in degrees: 0 same direction, 90 unrelated, 180 opposite.

    NaN where one of them is zero. Raises ValueError if the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"no angle between shapes {tuple(a.shape)} and {tuple(b.shape)}")
    a, b = (v.detach().flatten().double() for v in (a, b))
    a, b = a / a.norm(), b / b.norm()
    return (2 * torch.atan2((a - b).norm(), (a + b).norm())).rad2deg().item()   # exact near 0 and 180, unlike arccos


def mean_cosine(rows: Tensor) -> float:
    """Mean |cos| between different rows of (N, n): 0 if all are orthogonal, 1 if all point the same way. Zero rows count 0."""
    unit = F.normalize(rows.detach().double(), dim=1)
    n = len(rows)
    cosines = (unit @ unit.mT).abs()
    return ((cosines.sum() - cosines.diagonal().sum()) / (n * (n - 1))).item()


# ---- the recorder ----------------------------------------------------------------------------------------------

@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """A place to run the model in float32 (no autocast, no TF32) and leave no trace in it or in the random generators."""
    gradients = [(p, p.grad) for p in model.parameters()]
    buffers = [(b, b.clone()) for b in model.buffers()]
    modes = [(m, m.training) for m in model.modules()]
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device = next(model.parameters()).device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.autocast(device.type, enabled=False), \
                torch.enable_grad():
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for p, gradient in gradients:
            p.grad = gradient
        for module, training in modes:
            module.training = training


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
        angle_weight      ∠(W, B) in degrees, where the layer has a feedback of W's shape
        angle_gradient    ∠(the rule's gradient, backprop's gradient) in degrees
    A value is None where a tensor holds infinite or NaN values, or an angle has a zero side. The pass is in training mode, as
    batch normalisation is when it learns.
    """

    SPECTRUM = (1, 2, 3, 5, 8, 12, 20, 32, 50, 80, 128, 200, 320, 512)

    def __init__(self, model: nn.Module, handle, images: Tensor, labels: Tensor,
                 loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy):
        self.model, self.handle, self.images, self.labels, self.loss = model, handle, images, labels, loss
        self.layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
        self._updates: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def watch_update(self) -> Iterator[None]:
        """Put this around optimiser.step(): the next measure() then knows the update that was really applied."""
        before = {name: layer.weight.detach().clone() for name, layer in self.layers.items()}
        yield
        self._updates = {name: layer.weight.detach() - before[name] for name, layer in self.layers.items()}

    def state_dict(self) -> dict:
        return {"updates": self._updates}

    def load_state_dict(self, state: dict) -> None:
        self._updates = {name: update.to(self.images.device) for name, update in state["updates"].items()}

    def measure(self) -> dict[str, dict]:
        with undisturbed(self.model):
            self.model.train()
            inputs, errors, gradients = self._backward()
            with self.handle.exact():
                exact = self._backward()[2]
        record = {}
        for name in inputs:
            layer = self.layers[name]
            spectrum = self._sigma(errors[name])
            relative = [] if spectrum is None else [(spectrum[rank - 1] / spectrum[0]).item() if spectrum[0] > 0 else 0.0
                                                    for rank in self.SPECTRUM if rank <= len(spectrum)]
            line = {"error": self._measured(errors[name], spectrum),
                    "gradient": self._measured(gradients[name]),
                    "activation": self._measured(inputs[name]),
                    "spectrum": relative,
                    "cosine": mean_cosine(inputs[name].flatten(1)),
                    "angle_gradient": angle(gradients[name], exact[name])}
            if name in self._updates:
                line["update"] = self._measured(self._updates[name])
            feedback = getattr(layer, "feedback", None)
            if feedback is not None and feedback.shape == layer.weight.shape:
                line["angle_weight"] = angle(layer.weight, feedback)
            record[name] = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        return record

    @staticmethod
    def _sigma(tensor: Tensor) -> Tensor | None:
        return singular_values(tensor.flatten(1)) if tensor.isfinite().all() else None

    def _measured(self, tensor: Tensor, sigma: Tensor | None = None) -> dict[str, float] | None:
        """None where the tensor overflowed, as the error of plain feedback alignment may."""
        sigma = self._sigma(tensor) if sigma is None else sigma
        return None if sigma is None else {**measures(sigma), "ceiling": len(sigma)}

    def _backward(self) -> tuple[dict, dict, dict]:
        """The input of each layer that was called, the error at its output, and its weight gradient, by the rule in force."""
        calls: dict[str, tuple[Tensor, Tensor]] = {}
        hooks = [layer.register_forward_hook(lambda layer, args, named, y, name=name:
                                             calls.update({name: ((*args, *named.values())[0].detach(), y)}), with_kwargs=True)
                 for name, layer in self.layers.items()]
        try:
            loss = self.loss(self.model(self.images), self.labels)
        finally:
            for hook in hooks:
                hook.remove()
        ran = [name for name in self.layers if name in calls]               # attention calls not all of its layers
        tensors = [*(calls[name][1] for name in ran), *(self.layers[name].weight for name in ran)]
        wanted = [t for t in tensors if t.requires_grad]
        found = iter(torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True))
        both = [next(found) if t.requires_grad else torch.zeros_like(t) for t in tensors]   # no error is one of zeros
        return {name: calls[name][0] for name in ran}, dict(zip(ran, both)), dict(zip(ran, both[len(ran):]))


class Trajectory:
    """Gradients of successive steps as rows of a matrix, a layer each and all together: do they explore many directions?

    A row per gradient would take steps × weights numbers. A count sketch keeps `size` of them: weight i is added, with a
    fixed random sign, to place i mod size. Inner products of rows, and so singular values, are kept on average with an
    error of about 1/√size (Charikar et al. 2002); layers of at most `size` weights are kept exactly. Call add() every k-th
    step, with k so large that there are a few hundred rows.
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
        return {name: {"rows": len(rows), "effective_rank": effective_rank(rows), "window": effective_rank(rows[-window:])}
                if rows.isfinite().all() else None for name, rows in stacks.items()}


# ---- pictures --------------------------------------------------------------------------------------------------

COLOURS = ("#000000", "#D55E00", "#0072B2", "#E69F00", "#56B4E9", "#009E73", "#CC79A7")   # Okabe & Ito 2008, colour-blind safe


def read(run: Path) -> tuple[str, list[dict]]:
    """A run's name and its records. Raises ValueError where the folder holds none."""
    try:
        args = json.loads((run / "config.json").read_text())["args"]
        records = [json.loads(line) for line in (run / "rank.jsonl").read_text().splitlines()]
    except (OSError, ValueError, KeyError) as e:
        raise ValueError(f"{run} has no record of ranks ({e}); make one with train.py --rank") from e
    file, _, rule = args["rule"].rpartition(":")
    rule = f"{Path(file).stem}.{rule}" if file else rule
    return " + ".join([rule, *["muon"] * args["muon"], args["norm"] or "no norm"]), records


def draw(path: Path, runs: list[tuple[str, list[dict]]], colours: Sequence[str] = COLOURS, kind: str | None = None) -> None:
    """Six panels, the same colour for a run in all: rank by depth and over epochs, spectrum, trajectory, alignment.

    kind   of picture, such as "png", where the path's ending does not say it
    """
    os.environ["MPLBACKEND"] = "Agg"                            # a notebook's backend may stop the import
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator
    figure, panels = plt.subplots(2, 3, figsize=(12, 7), layout="constrained")
    (by_depth, spectrum, over_epochs), (gradients, trajectory, alignment) = panels
    for (label, records), colour in zip(runs, colours):
        style = {"color": colour, "marker": "o", "markersize": 3, "linewidth": 1.8}
        last = records[-1]["layers"]
        names, depth = list(last), range(1, len(last) + 1)
        hidden = names[1:-1] or names
        epochs = [record["epoch"] for record in records]

        def ranks(layers: dict, names: list[str], kind: str) -> list[float]:
            return [layers[n][kind]["effective_rank"] if layers[n][kind] else math.nan for n in names]

        by_depth.plot(depth, ranks(last, names, "error"), label=label, **style)
        gradients.plot(depth, ranks(last, names, "gradient"), **style)
        if last[hidden[-1]]["spectrum"]:
            sigma = last[hidden[-1]]["spectrum"]
            spectrum.plot(Recorder.SPECTRUM[:len(sigma)], sigma, **style)
        over_epochs.plot(epochs, [ranks(record["layers"], hidden[-1:], "gradient")[0] for record in records], **style)
        rows = [(r["epoch"], r["trajectory"]["all layers"]) for r in records if r["trajectory"].get("all layers")]
        trajectory.plot([epoch for epoch, _ in rows], [t["effective_rank"] for _, t in rows], **style)
        angles = [[r["layers"][n]["angle_gradient"] for n in hidden] for r in records]
        alignment.plot(epochs, [sum(a) / len(a) if None not in a else math.nan for a in angles], **style)
    ceilings = {kind: [(last[n][kind] or {}).get("ceiling", math.nan) for n in names] for kind in ("error", "gradient")}
    by_depth.plot(depth, ceilings["error"], ":", color="#888888", label="largest possible")
    gradients.plot(depth, ceilings["gradient"], ":", color="#888888")
    trajectory.plot([e for e, _ in rows], [t["rows"] for _, t in rows], ":", color="#888888")
    alignment.axhline(90, linestyle=":", color="#888888")       # unrelated directions
    by_depth.set(title="error δ, after training", xlabel="layer, from stem to classifier", ylabel="effective rank")
    gradients.set(title="weight gradient, after training", xlabel="layer, from stem to classifier", ylabel="effective rank")
    over_epochs.set(title=f"weight gradient of {hidden[-1]}", xlabel="epoch", ylabel="effective rank")
    trajectory.set(title="gradient trajectory, whole network", xlabel="epoch", ylabel="effective rank so far")
    spectrum.set(title=f"error δ of {hidden[-1]}", xlabel="i", ylabel="singular value σ_i / σ_1", xscale="log", yscale="log")
    alignment.set(title="angle to backprop's gradient", xlabel="epoch", ylabel="degrees, mean of hidden layers",
                  ylim=(-4, None))
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (by_depth, gradients, over_epochs, trajectory):
        axes.set_ylim(0, None)
    for axes in (by_depth, gradients, over_epochs, trajectory, alignment):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    spectrum.set_ylim(1e-4, 1.5)                                # what is smaller does not count
    figure.legend(*by_depth.get_legend_handles_labels(), loc="outside upper center", ncols=len(runs) + 1, frameon=False,
                  fontsize=10)
    figure.savefig(path, dpi=110, format=kind)
    plt.close(figure)


# ---- a demonstration -------------------------------------------------------------------------------------------

def demonstrate(out: Path | None = None) -> None:
    """Matrices whose rank is known, and what the measures say."""
    torch.manual_seed(0)
    P, Q = torch.linalg.qr(torch.randn(100, 100))[0], torch.linalg.qr(torch.randn(300, 100))[0]
    low = (torch.randn(100, 5).double() @ torch.randn(5, 300).double())   # in float32 rounding would give it full rank
    examples = {"100 equal singular values": P @ Q.mT,
                "σ_i = 1/i": P @ (1 / torch.arange(1, 101)).diag() @ Q.mT,
                "σ_i = 0.9^i": P @ (0.9 ** torch.arange(100)).diag() @ Q.mT,
                "Gaussian": torch.randn(100, 300),
                "product of 100×5 and 5×300": low,
                "the same plus 1 % noise": low + 0.01 * low.std() * torch.randn(100, 300),
                "one row repeated": torch.randn(1, 300).expand(100, 300)}
    print(f"{'matrix, 100 × 300':28}{'rank':>6}{'effective':>11}{'participation':>15}{'stable':>8}")
    for name, M in examples.items():
        exact = torch.linalg.matrix_rank(M.double()).item()
        print(f"{name:28}{exact:6}{effective_rank(M):11.1f}{participation_ratio(M):15.1f}{stable_rank(M):8.1f}")
    if out:
        _draw_examples(out, examples)
        print(out)


def _draw_examples(out: Path, examples: dict[str, Tensor]) -> None:
    """Each spectrum, and how many of its directions count."""
    os.environ["MPLBACKEND"] = "Agg"                            # a notebook's backend may stop the import
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
    for i, (M, colour) in enumerate(zip(examples.values(), COLOURS)):
        sigma = torch.linalg.svdvals(M.double())
        left.plot(range(1, 101), sigma / sigma[0], color=colour, linewidth=2)
        right.barh(-i, effective_rank(M), color=colour, height=0.6)
        right.annotate(f"{effective_rank(M):.1f}", (effective_rank(M) + 1, -i), va="center", fontsize=11)
    left.set(title="singular values", xlabel="i", ylabel="σ_i / σ_1", ylim=(-0.03, 1.05))
    right.set(title="effective rank: how many of them count", xlabel="effective rank (at most 100)", xlim=(0, 110))
    right.set_yticks([-i for i in range(len(examples))], examples, fontsize=11)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=130)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="rank.py", description="Draw the recorded ranks of runs; without a run, a demonstration.")
    p.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folder of a run made with train.py --rank")
    p.add_argument("--out", type=Path, metavar="FILE", help="the picture (default: rank.png, none of the demonstration)")
    args = p.parse_args(argv)
    try:
        if not args.runs:
            demonstrate(args.out)
            return 0
        args.out = args.out or Path("rank.png")
        if len(args.runs) > len(COLOURS):
            raise ValueError(f"{len(args.runs)} runs are more than can be told apart; choose at most {len(COLOURS)}")
        read_runs = [read(run) for run in args.runs]
        labels = [label for label, _ in read_runs]
        draw(args.out, [(f"{label} ({run.name})" if labels.count(label) > 1 else label, records)
                        for run, (label, records) in zip(args.runs, read_runs)])
    except (ValueError, OSError, ImportError) as e:
        print(f"rank.py: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
