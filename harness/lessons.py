"""The demonstrations of the lessons: what `python fa.py`, muon.py, norm.py and rank.py print and draw.

The last line of a lesson calls `main(name)`. `two_ways` and `gratings` draw the README's two pictures:

    python -c "from harness import lessons; lessons.two_ways('results/two-ways.png')"
"""
from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import data
import fa
import muon
import norm
import rank
from harness import files, flags, pictures, report

DEPTHS = {1: "#8FC1E3", 2: "#3182BD", 3: "#08306B"}            # a layer by its depth: the deeper, the darker


def main(name: str, argv: list[str] | None = None) -> None:
    """The command line of a lesson: its demonstration, with a picture where one is asked for."""
    parser = flags.Parser(prog=f"{name}.py", description=DEMONSTRATIONS[name].__doc__)
    parser.add_argument("--out", type=Path, metavar="FILE", help="save a picture too, such as lesson.png")
    if name == "rank":
        parser.add_argument("runs", nargs="*", type=Path, metavar="RUN",
                            help="instead, draw the ranks that these runs recorded (to FILE, or rank.png)")
    args = parser.parse_args(argv)
    try:
        if getattr(args, "runs", None):
            args.out = args.out or Path("rank.png")
            draw_runs(args.out, args.runs)
        else:
            draw = DEMONSTRATIONS[name]()
            if args.out:
                draw(args.out)
        if args.out:
            print(args.out)
        sys.stdout.flush()
    except BrokenPipeError:
        parser.exit(flags.unread())
    except (files.Problem, OSError, ValueError, ImportError) as e:      # a folder, a format, no matplotlib
        reason = " ".join(str(getattr(e, "strerror", None) or e).split())
        parser.exit(2, f"{parser.prog}: {reason}{f' ({args.out})' if isinstance(e, OSError) else ''}\n")


# ---- fa.py -------------------------------------------------------------------------------------------------

def feedback_alignment() -> Callable[[Path], None]:
    """A student network learns a random teacher by feedback alignment. Watch W turn towards B."""
    print("        loss   ∠(W, B) in degrees   ∠(FA's gradient, backprop's gradient)")
    print("  step          layer 2  layer 3       layer 1  layer 2  layer 3")
    history = learn("fa", say=True)
    others = {"backprop": learn("bp"), "frozen features": learn("frozen")}
    print("The classifier's gradient (layer 3) is exact: FA changes the error below it. "
          "The angles below 90° are why FA works.")
    ends = {label: sum(row[1] for row in rows[-7:]) / 7 for label, rows in {"FA": history, **others}.items()}
    print("Mean loss from step 700 on: " + ", ".join(f"{label} {end:.4f}" for label, end in ends.items()))
    return lambda path: draw_alignment(path, history, others)


def learn(rule: str, say: bool = False) -> list[tuple[int, float, list[float], list[float]]]:
    """Rows of (step, loss, ∠(W, B) of layers 2 and 3, ∠(FA's gradient, backprop's) of layers 1 to 3)."""
    torch.manual_seed(0)                                        # the same networks and data for every rule
    teacher = nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 10))
    student = nn.Sequential(nn.Linear(30, 60), nn.Tanh(), nn.Linear(60, 60), nn.Tanh(), nn.Linear(60, 10))
    layers = [student[0], student[2], student[4]]
    handle = fa.attach(student, fa.RULES[rule](seed=0))
    optimiser = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    history = []
    for step in range(1001):
        x = torch.randn(128, 30)
        loss = (student(x) - teacher(x).detach()).square().mean()
        optimiser.zero_grad()
        loss.backward()
        if step in (0, 1, 2, 3, 5, 7, 10, 14, 20, 30) or step % 50 == 0:
            weights, gradients = [], []
            if rule == "fa":
                with handle.exact():                            # same batch, same weights, true gradient
                    true_loss = (student(x) - teacher(x)).square().mean()
                    exact = torch.autograd.grad(true_loss, [layer.weight for layer in layers])
                weights = [rank.angle(layer.weight, layer.feedback) for layer in layers[1:]]
                gradients = [rank.angle(layer.weight.grad, g) for layer, g in zip(layers, exact)]
            history.append((step, loss.item(), weights, gradients))
            if say and step in (0, 10, 30, 100, 300, 1000):
                print(f"{step:6} {loss.item():6.3f}  {weights[0]:7.1f}  {weights[1]:7.1f}       "
                      f"{gradients[0]:7.1f}  {gradients[1]:7.1f}  {gradients[2]:7.1f}")
        optimiser.step()
    return history


def draw_alignment(path: Path, history: list[tuple], others: dict[str, list[tuple]]) -> None:
    figure, axes = pictures.figure_of(1, 3, size=(13, 4.2))
    left, middle, right = axes[0]
    place = lambda step: step + 1                               # a logarithmic axis has no 0
    for label, rows in {"FA": history, **others}.items():
        steps = [place(row[0]) for row in rows]
        left.plot(steps, [row[1] for row in rows], color=pictures.colour(label), linewidth=2)
        name = label.replace(" features", "\nhidden\nlayers")
        name_end(left, name, steps[-1], rows[-1][1], pictures.colour(label))
    left.set(title="FA learns, and not by its classifier alone", ylabel="loss", yscale="log")
    steps = [place(row[0]) for row in history]
    for panel, column, first in ((middle, 2, 2), (right, 3, 1)):
        for layer, curve in enumerate(zip(*[row[column] for row in history]), first):
            panel.plot(steps, curve, color=DEPTHS[layer], linewidth=2)
            name_end(panel, f"layer {layer}", steps[-1], curve[-1], DEPTHS[layer])
        panel.axhline(90, color="#666666", linewidth=1, linestyle=":")
        panel.annotate("90°: unrelated directions", (1, 95), color="#666666", fontsize=11)
        panel.set(ylim=(-3, 104), ylabel="degrees")
    right.annotate("0°: the classifier's gradient is exact", (1, 3), color=DEPTHS[3], fontsize=11)
    middle.set_title("as W turns towards B")
    right.set_title("and FA's gradient towards backprop's")
    for panel in axes.flat:
        panel.set(xscale="log", xlabel="step")
        panel.set_xticks([1, 11, 101, 1001], ["0", "10", "100", "1000"])
        panel.minorticks_off()
    pictures.save(figure, Path(path))


def name_end(panel: Any, name: str, x: float, y: float, colour: str) -> None:
    """A curve's name, to the right of its end."""
    panel.annotate(name, (x, y), xytext=(5, 0), textcoords="offset points", va="center", color=colour,
                   fontsize=11, annotation_clip=False)


# ---- muon.py -----------------------------------------------------------------------------------------------

def orthogonalisation() -> Callable[[Path], None]:
    """A matrix with the steep spectrum of a gradient, before and after Newton–Schulz."""
    torch.manual_seed(0)
    P, Q = torch.linalg.qr(torch.randn(64, 64))[0], torch.linalg.qr(torch.randn(256, 64))[0]
    X = P @ torch.logspace(0, -3, 64).diag() @ Q.mT             # singular values from 1 down to 0.001
    print("singular values of a 64 x 256 matrix, by rank")
    print("steps        1st     16th     32nd     48th     64th")
    for steps in range(8):
        sigma = torch.linalg.svdvals(muon.newton_schulz(X, steps, torch.float32))
        print(f"{steps:5}   " + "".join(f"{sigma[i].item():9.4f}" for i in (0, 15, 31, 47, 63)))
    bf16, f32 = muon.newton_schulz(X).float(), muon.newton_schulz(X, dtype=torch.float32)
    print(f"bf16 and float32 differ by {((bf16 - f32).norm() / f32.norm()).item():.1%} after 5 steps")
    before, after = rank.angle(X, P @ Q.mT), rank.angle(f32, P @ Q.mT)
    print(f"angle to the exact P Qᵀ: {before:.0f}° before, {after:.0f}° after 5 steps")
    return lambda path: draw_orthogonalisation(path, X)


def draw_orthogonalisation(path: Path, X: Tensor) -> None:
    figure, axes = pictures.figure_of(1, 2, size=(12, 4.4))
    left, right = axes[0]
    a, b, c = muon.COEFFICIENTS
    shades = {0: "#999999", 1: "#8FC1E3", 2: "#3182BD", 5: "#08306B"}       # the more steps, the darker
    start = sigma = torch.linspace(0, 1, 2001, dtype=torch.float64)
    for steps in range(6):
        if steps:
            sigma = a * sigma + b * sigma ** 3 + c * sigma ** 5
        if steps in shades:
            name = f"{steps} step{'s' * (steps != 1)}"
            left.plot(start.tolist(), sigma.tolist(), color=shades[steps], linewidth=2, label=name)
            values = torch.linalg.svdvals(muon.newton_schulz(X, steps, torch.float32))
            right.plot(range(1, len(values) + 1), values.tolist(), color=shades[steps], linewidth=2)
            if steps == 0:
                largest = values[0].item()
    for panel in (left, right):
        panel.axhline(1, color="#666666", linewidth=1, linestyle=":")
        panel.set_ylim(0, 1.35)
    left.set(title="p(σ) = 3.4445 σ - 4.7750 σ³ + 2.0315 σ⁵, repeated", xlabel="singular value before",
             ylabel="after")
    right.set(title="singular values of a 64 × 256 matrix, largest first", xlabel="i", ylabel="σ_i")
    why = f"σ₁ = 1 starts at {largest:.2f}:\nX is first divided by\nits norm ‖X‖_F = {1 / largest:.2f}"
    right.annotate(why, (1, largest), xytext=(27, 0.47), color="#666666", fontsize=11, va="center",
                   arrowprops={"arrowstyle": "->", "color": "#666666", "shrinkB": 4})
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", frameon=False)
    pictures.save(figure, Path(path))


# ---- norm.py -----------------------------------------------------------------------------------------------

def normalisation(depth: int = 32, width: int = 256, images: int = 256) -> Callable[[Path], None]:
    """Random inputs through a deep random ReLU network: do they stay apart?"""
    kinds = [None, *norm.KINDS]
    head = "".join(f"{kind or 'none':>8}" for kind in kinds)
    print(f"{images} random inputs through {depth} random ReLU layers of width {width}")
    print("mean cosine between two inputs' activations      | effective rank of the activations, of 256")
    print(f"layer {head}   |{head}")
    x = {kind: torch.randn(images, width, generator=torch.Generator().manual_seed(0)) for kind in kinds}
    cosines, ranks = {kind: [] for kind in kinds}, {kind: [] for kind in kinds}
    generator = torch.Generator().manual_seed(1)
    for layer in range(1, depth + 1):
        W = torch.randn(width, width, generator=generator) * (2 / width) ** 0.5         # He: keeps the scale
        for kind in kinds:
            x[kind] = norm.make(kind, width)(x[kind] @ W.mT).relu().detach()
            cosines[kind].append(rank.mean_cosine(x[kind]))
            ranks[kind].append(rank.effective_rank(x[kind]))
        if layer in (1, 2, 4, 8, 16, 32):
            print(f"{layer:5} " + "".join(f"{cosines[kind][-1]:8.3f}" for kind in kinds) + "   |"
                  + "".join(f"{ranks[kind][-1]:8.1f}" for kind in kinds))
    print("Only batch normalisation and whitening compare the inputs with each other, "
          "and only they keep them apart.")
    return lambda path: draw_normalisation(path, cosines, ranks)


def draw_normalisation(path: Path, cosines: dict[str | None, list[float]],
                       ranks: dict[str | None, list[float]]) -> None:
    figure, axes = pictures.figure_of(1, 2, size=(12, 4.4))
    left, right = axes[0]
    # The widest first, so that a curve that lies on another leaves it a rim.
    styles = {None: ("#BBBBBB", 6.0), "layer": ("#C9A227", 3.5), "rms": ("#5A3A00", 1.2),
              "batch": ("#5A7D2A", 4.5), "whiten": ("#C6E48B", 1.5)}
    for kind, (colour, linewidth) in styles.items():
        depth = range(1, len(cosines[kind]) + 1)
        left.plot(depth, cosines[kind], color=colour, linewidth=linewidth, label=kind or "none")
        right.plot(depth, ranks[kind], color=colour, linewidth=linewidth)
    left.set(title="do all inputs look alike?", xlabel="layer", ylim=(0, 1.02),
             ylabel="mean cosine between two inputs' activations")
    right.set(title="and how many directions are left?", xlabel="layer", yscale="log", ylim=(1, 256),
              ylabel="effective rank of the activations")
    right.set_yticks([1, 4, 16, 64, 256], ["1", "4", "16", "64", "256"])
    right.minorticks_off()
    figure.legend(loc="outside right center", frameon=False, title="normalisation")
    pictures.save(figure, Path(path))


# ---- rank.py -----------------------------------------------------------------------------------------------

def measures() -> Callable[[Path], None]:
    """Matrices whose rank is known, and what the measures say; one of them cut and flattened."""
    torch.manual_seed(0)
    P, Q = torch.linalg.qr(torch.randn(100, 100))[0], torch.linalg.qr(torch.randn(300, 100))[0]
    low = torch.randn(100, 5).double() @ torch.randn(5, 300).double()       # in float32, rounding fills it
    falling = P @ (0.9 ** torch.arange(100)).diag() @ Q.mT
    examples = {"100 equal singular values": P @ Q.mT,
                "Gaussian": torch.randn(100, 300),
                "σ_i = 1/i": P @ (1 / torch.arange(1, 101)).diag() @ Q.mT,
                "product of 100×5 and 5×300": low,
                "the same plus 1 % noise": low + 0.01 * low.std() * torch.randn(100, 300),
                "one row repeated": torch.randn(1, 300).expand(100, 300),
                "σ_i = 0.9^i": falling,
                "0.9^i, cut to 4": rank.cut(falling.double(), 4),
                "0.9^i, flattened": rank.flatten(falling)}
    print(f"{'matrix, 100 × 300':28}{'rank':>6}{'effective':>11}{'participation':>15}{'stable':>8}")
    for name, M in examples.items():
        exact = torch.linalg.matrix_rank(M.double()).item()
        print(f"{name:28}{exact:6}{rank.effective_rank(M):11.1f}{rank.participation_ratio(M):15.1f}"
              f"{rank.stable_rank(M):8.1f}")
    return lambda path: draw_measures(path, examples)


def draw_measures(path: Path, examples: dict[str, Tensor]) -> None:
    """A panel for each spectrum, with the number of directions that count."""
    figure, axes = pictures.figure_of(3, 3, size=(12, 7.5), sharey="all")
    for panel, (name, M) in zip(axes.flat, examples.items()):
        sigma = torch.linalg.svdvals(M.double())
        count = rank.effective_rank(M)
        panel.bar(range(1, 101), (sigma / sigma[0]).tolist(), width=1, color="#3182BD")
        panel.axvline(count + 0.5, color="#000000", linewidth=1.5, linestyle="--")
        right = count < 60
        panel.annotate(f"effective rank {count:.1f}", (count + (2.5 if right else -1.5), 1.12), va="center",
                       ha="left" if right else "right", fontsize=12)
        panel.set(title=name, xlim=(0, 102), ylim=(0, 1.25))
    for panel in axes[:, 0]:
        panel.set_ylabel("σ_i / σ_1")
    for panel in axes[-1]:
        panel.set_xlabel("i")
    pictures.save(figure, Path(path))


def draw_runs(path: Path, runs: list[Path]) -> None:
    """The recorded ranks of runs, side by side. Raises files.Problem."""
    found = [report.read_ranks(run) for run in runs]
    labels = [label for label, _ in found]
    pictures.draw_ranks(path, [(f"{label} ({run.name})" if labels.count(label) > 1 else label, records)
                             for run, (label, records) in zip(runs, found)])


# ---- the README's pictures ---------------------------------------------------------------------------------

def two_ways(path: str | os.PathLike) -> None:
    """Forward through W₁, W₂, W₃; the ways back of backprop, FA and DFA."""
    figure, axes = pictures.figure_of(1, 3, size=(14, 4.4))
    ways = {"backprop": ("backprop: the same weights, transposed",
                         "δ₂ = W₃ᵀ δ₃ ⊙ φ′(a₂)", "δ₁ = W₂ᵀ δ₂ ⊙ φ′(a₁)"),
            "FA": ("feedback alignment: fixed random B", "δ₂ = B₃ᵀ δ₃ ⊙ φ′(a₂)", "δ₁ = B₂ᵀ δ₂ ⊙ φ′(a₁)"),
            "DFA": ("direct: straight from the output", "δ₂ = B₃ᵀ δ₃ ⊙ φ′(a₂)", "δ₁ = B₂ᵀ δ₃ ⊙ φ′(a₁)")}
    for panel, (rule, (title, *equations)) in zip(axes[0], ways.items()):
        colour, letter = pictures.colour(rule), "W" if rule == "backprop" else "B"
        box = {"boxstyle": "circle,pad=0.3", "facecolor": "white"}
        for i, name in enumerate(("x", "h₁", "h₂", "y")):
            panel.annotate(name, (i, 1), ha="center", va="center", fontsize=15,
                           bbox={**box, "edgecolor": "black"})
            if i:
                arrow(panel, (i - 1, 1), (i, 1), "black")
                panel.annotate(f"W{'₁₂₃'[i - 1]}", (i - 0.5, 1.1), ha="center", fontsize=15)
                panel.annotate(f"δ{'₁₂₃'[i - 1]}", (i, 0), ha="center", va="center", fontsize=15,
                               color=colour, bbox={**box, "edgecolor": colour})
        arrow(panel, (3, 1), (3, 0), "black")
        panel.annotate("loss", (3.08, 0.5), fontsize=13, va="center")
        arrow(panel, (3, 0), (2, 0), colour)
        height = -0.22 if rule == "DFA" else 0.12
        panel.annotate(f"{letter}₃ᵀ", (2.5, height), ha="center", fontsize=15, color=colour)
        if rule == "DFA":
            arrow(panel, (3, 0), (1, 0), colour, curve=0.35)
            panel.annotate("B₂ᵀ", (1.8, 0.28), ha="center", fontsize=15, color=colour)
        else:
            arrow(panel, (2, 0), (1, 0), colour)
            panel.annotate(f"{letter}₂ᵀ", (1.5, 0.12), ha="center", fontsize=15, color=colour)
        panel.annotate("\n".join(equations), (1.5, -0.38), ha="center", va="top", fontsize=15, color=colour)
        panel.annotate(title, (1.5, 1.38), ha="center", fontsize=15, color=colour)
        panel.set(xlim=(-0.3, 3.5), ylim=(-0.8, 1.5))
        panel.axis("off")
    pictures.save(figure, Path(path))


def arrow(panel: Any, start: tuple[float, float], end: tuple[float, float], colour: str,
          curve: float = 0) -> None:
    panel.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 2,
                                               "shrinkA": 17, "shrinkB": 17,
                                               "connectionstyle": f"arc3,rad={curve}"})


# ---- data.py -----------------------------------------------------------------------------------------------

def images() -> Callable[[Path], None]:
    """The made data set: what its ten classes have in common, pixel by pixel."""
    dataset = data.gratings()
    pixels, test = dataset.train_images.float(), dataset.test_images.float()
    means = torch.stack([pixels[dataset.train_labels == k].mean(0) for k in range(10)])     # (10, 3, 32, 32)
    print("stripes at      images   mean red   green    blue")
    for k, name in enumerate(dataset.classes):
        red, green, blue = means[k].mean((1, 2)).tolist()
        print(f"{name:12}{(dataset.train_labels == k).sum():10}{red:11.1f}{green:8.1f}{blue:8.1f}")
    nearest = torch.cdist(test.flatten(1), means.flatten(1)).argmin(1)
    correct = (nearest == dataset.test_labels).float().mean().item()
    print(f"The nearest of the ten mean images is that of its own class for {correct:.1%} of the test images "
          "(chance: 10 %):\nno pixel or colour reveals the class.")
    return gratings


def gratings(path: str | os.PathLike) -> None:
    """Three gratings of each of the ten classes."""
    dataset = data.gratings(500, 1)
    figure, axes = pictures.figure_of(3, 10, size=(13, 4.3))
    for k, name in enumerate(dataset.classes):
        for i, image in enumerate(dataset.train_images[dataset.train_labels == k][:3]):
            axes[i, k].imshow(image.permute(1, 2, 0).numpy())
            axes[i, k].axis("off")
        axes[0, k].set_title(name.replace(" degrees", "°"), fontsize=16)
    pictures.save(figure, Path(path))


DEMONSTRATIONS: dict[str, Callable[[], Callable[[Path], None]]] = {
    "fa": feedback_alignment, "muon": orthogonalisation, "norm": normalisation, "rank": measures,
    "data": images}
