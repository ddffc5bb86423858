"""The paper's claims, each a short list of runs, a table and a picture.

    python reproduce.py quick --out mine                 # gratings: feedback alignment fails, and is repaired
    python reproduce.py --list                           # all experiments: claim, number of runs, hours
    python reproduce.py rank --jobs 2                    # two runs at a time
    python reproduce.py cifar10 --set epochs=1 subset=1000
    python reproduce.py quick --rule my_rule.py:MyRule   # your rule beside backprop and feedback alignment
    python reproduce.py --check                          # do both READMEs still say what results/ says?

A run is `train.py` with the arguments listed here. Its result is one line of results/NAME.jsonl. Nothing else
makes numbers for the READMEs: their tables, between <!-- NAME --> and <!-- end -->, are written from those
lines. What was measured already is not run again (harness/experiment.py).
"""
from __future__ import annotations

import sys
from pathlib import Path

from harness import claims
from harness.experiment import ORTHOGONAL, Experiment

RESULTS = Path(__file__).resolve().parent / "results"
READMES = [RESULTS.parent / "README.md", RESULTS / "README.md"]

REPAIRS = {"backprop": "--rule bp", "FA": "--rule fa", "FA + Muon": "--rule fa --muon",
           "FA + norm": "--rule fa --norm", "FA + Muon + norm": "--rule fa --muon --norm"}
ALL = {"backprop": "--rule bp", "backprop + Muon": "--rule bp --muon", "backprop + norm": "--rule bp --norm",
       "backprop + Muon + norm": "--rule bp --muon --norm", **REPAIRS}
# The best of each row of results/tune.jsonl.
TUNED = {"backprop": "--lr 0.03", "backprop + Muon": "--muon-lr 0.01", "backprop + norm": "--lr 0.03",
         "backprop + Muon + norm": "--muon-lr 0.03", "FA": "--lr 0.01", "FA + Muon": "--muon-lr 0.003",
         "FA + norm": "--lr 0.1", "FA + Muon + norm": "--muon-lr 0.03"}
GRID = {k: f"{v} {TUNED[k].split()[0]} {{}}" for k, v in ALL.items()}      # each row's flag, for any rate
SHORTCUTS_ONLY = "assignments/examples/shortcuts_only.py:ShortcutsOnly"
FIRST_FIXED = "assignments/examples/first_fixed.py:FirstFixed"
PAD, FIXED, DECAY = ", no weights in shortcuts", ", first convolutions fixed", ", Muon decay 0.05"
BEST, BEST_BP = f"FA + Muon + norm{PAD}", f"backprop + Muon + norm{PAD}"


def wider(rows: dict[str, str]) -> dict[str, str]:
    """These rows, frozen features and what goes beyond the paper, in the order in which they are run."""
    rows = rows | {f"{k}{PAD}": f"{v} --shortcut pad" for k, v in rows.items()}
    rows[f"{BEST}{FIXED}"] = rows[BEST].replace("--rule fa", f"--rule {FIRST_FIXED}")
    rows |= {f"{k}{DECAY}": f"{rows[k]} --muon-weight-decay 0.05" for k in (BEST, BEST_BP)}
    rows["frozen features"] = "--rule frozen --norm"
    return {k: rows[k] for k in (
        "FA + Muon + norm", "backprop + Muon + norm", "FA + norm", BEST, "FA + Muon",
        "backprop + norm", "frozen features", "FA", "backprop + Muon", "backprop",
        BEST_BP, f"{BEST}{FIXED}", f"{BEST}{DECAY}", f"{BEST_BP}{DECAY}")}


WIDER = wider({k: f"{v} {TUNED[k]}" for k, v in ALL.items()})
PAPER = {"FA": 1.4, "FA + Muon": 25.3, "FA + norm": 37.1, "FA + Muon + norm": 46.1}     # CIFAR-100, ResNet-18
SMALL = "the first 10,000 training images of {}, 10 epochs, the whole test set."
CNN, CNN_SCALE = ("--dataset cifar10 --width 16 --subset 10000 --epochs 10",
                  "The 4-layer CNN of width 16, " + SMALL.format("CIFAR-10"))
RESNET, RESNET_SCALE = ("--dataset cifar100 --model resnet18 --width 16 --subset 10000",
                        "ResNet-18 of width 16, " + SMALL.format("CIFAR-100"))
HELD_OUT = "ResNet-18 of width 16, 10,000 training images of CIFAR-100, 10,000 others to measure on, "

EXPERIMENTS = {
    "quick": Experiment(
        "Feedback alignment fails on a CNN; Muon and activity normalisation together repair it.",
        "--dataset gratings --rank 4",
        {k: REPAIRS[k] for k in ("backprop", "FA", "FA + Muon + norm")}, view="quick",
        scale="The 4-layer CNN of width 16, gratings, 12 epochs."),
    "cifar10": Experiment(
        "On a deep network each repair lifts feedback alignment, and both together the most.",
        "--dataset cifar10 --model resnet18 --width 16 --subset 10000 --epochs 10",
        {k: ALL[k] for k in ("backprop + norm", "FA", "FA + Muon", "FA + norm", "FA + Muon + norm")}, seeds=2,
        scale="ResNet-18 of width 16, " + SMALL.format("CIFAR-10")),
    "rank": Experiment(
        "The signal of feedback alignment has a lower rank than backprop's; Muon and normalisation raise it.",
        "--dataset cifar10 --subset 10000 --epochs 12 --weight-decay 0 --rank",
        {"backprop + norm": ALL["backprop + norm"], **REPAIRS}, view="ranks", seeds=3,
        scale="The 4-layer CNN of width 32, the first 10,000 training images of CIFAR-10, 12 epochs, no "
              "weight decay, Nesterov SGD, of learning rate 0.02 without normalisation."),
    "rank-map": Experiment(
        "Where the collapse is and where it is not: initialisation × learning rate × layer × time.",
        f"{CNN} --weight-decay 0 --rank --lr {{}}",
        {f"{name}: {label}": f"--init {init} {REPAIRS[label]}"
         for name, init in (("He", "he"), ("torch's default", "torch")) for label in ("backprop", "FA")},
        {lr: lr for lr in ("0.002", "0.005", "0.02", "0.05")}, "learning rate", "map",
        scale=CNN_SCALE + " No weight decay."),
    "intervention": Experiment(
        "Is it the rank? Updates are forced to rank r, or to full rank, for backprop and feedback alignment.",
        f"{CNN} {{}}",
        {f"{panel}: {label}{norm}": f"{REPAIRS[label]} {own}"
         for panel, own, norm in (("learning rate 0.02", "--lr 0.02", ""),
                                  ("learning rate 0.005", "--lr 0.005", ""),
                                  ("batch norm, learning rate 0.05", "--lr 0.05 --norm", " + norm"))
         for label in ("backprop", "FA")},
        {**{r: f"--cut {r}" for r in ("1", "2", "4", "8", "16", "32")}, "all": "", "equal": "--flatten"},
        "singular values kept, r", "sweep", scale=CNN_SCALE),
    "depth": Experiment(
        "On deep networks feedback alignment fails, and the repairs are worth more than on shallow ones.",
        "--dataset cifar10 --subset 10000 --epochs 10 --rank 10 --depth {}",
        {f"{panel}: {label}": f"--model {size} {own}"
         for panel, size in (("MLP", "mlp --width 256"), ("CNN", "cnn --width 16"))
         for label, own in {"backprop + norm": ALL["backprop + norm"], **REPAIRS}.items()},
        {depth: depth for depth in ("2", "4", "8", "12")}, "hidden layers", "sweep",
        scale="MLP of width 256 and CNN of width 16, " + SMALL.format("CIFAR-10")),
    "tune": Experiment(
        "No claim: one grid of learning rates for every row of `cifar100-small`, on held-out images.",
        f"{RESNET} --epochs 5 --validate 10000",
        GRID, {lr: lr for lr in ("0.001", "0.003", "0.01", "0.03", "0.1")},
        "learning rate, of Muon where there is Muon", "sweep", scale=HELD_OUT + "5 epochs."),
    "tune-half": Experiment(
        "No claim: are the learning rates of `tune` right at the width of `cifar100-half`, too?",
        f"{RESNET} --epochs 5 --validate 10000".replace("width 16", "width 32"),
        {k: GRID[k] for k in ("FA + Muon + norm", "backprop + Muon + norm", "FA + norm")} |
        {BEST: f"{GRID['FA + Muon + norm']} --shortcut pad"},
        {lr: lr for lr in ("0.01", "0.03", "0.1", "0.3")},
        "learning rate, of Muon where there is Muon", "sweep",
        scale=HELD_OUT.replace("width 16", "width 32") + "5 epochs."),
    "cifar100-small": Experiment(
        "The paper's headline table at a small scale, with the learning rates that `tune` found best.",
        f"{RESNET} --epochs 10",
        {**{k: f"{v} {TUNED[k]}" for k, v in ALL.items()}, "frozen features": "--rule frozen --norm"},
        seeds=3, scale=RESNET_SCALE),
    "precision": Experiment(
        "No claim: does bf16, the default on CIFAR where the machine computes it, change the accuracy?",
        "--model resnet18 --width 16 --subset 10000 --epochs 10 --rule fa --muon --norm",
        {f"{name}, {precision}": f"--dataset {images} {flag}"
         for name, images in (("CIFAR-10", "cifar10"), ("CIFAR-100", "cifar100 --muon-lr 0.03"))
         for precision, flag in (("float32", "--no-amp"), ("bf16", "--amp"))}, view="bars", seeds=3,
        scale="FA + Muon + norm, ResNet-18 of width 16, " + SMALL.format("each")),
    "improve": Experiment(
        "Beyond the paper: what lifts feedback alignment further, with both repairs and shortcuts without "
        "weights?",
        f"{RESNET} --epochs 10 --validate 10000 --muon --norm --shortcut pad",
        {"backprop": "--rule bp", "backprop, Muon decay 0.05": "--rule bp --muon-weight-decay 0.05",
         "FA": "--rule fa", "Muon decay 0.05": "--rule fa --muon-weight-decay 0.05",
         "Muon decay 0.2": "--rule fa --muon-weight-decay 0.2",
         "first convolutions fixed, Muon decay 0.05": f"--rule {FIRST_FIXED} --muon-weight-decay 0.05",
         "whitening": "--rule fa --norm whiten",
         "orthogonal B": f"--rule {ORTHOGONAL}", "B × 3": "--rule 'fa(gain=3)'",
         "Muon at 0.02": "--rule fa --muon-lr 0.02", "Muon at 0.1": "--rule fa --muon-lr 0.1",
         "SGD at 0.02": "--rule fa --lr 0.02", "SGD at 0.1": "--rule fa --lr 0.1",
         "SGD decay 0.005": "--rule fa --weight-decay 0.005 --muon-weight-decay 0.0005"},
        view="bars", seeds=3, scale=HELD_OUT + "10 epochs."),
    "shortcut": Experiment(
        "Beyond the paper: by which ways does the error of feedback alignment travel in a ResNet, and where "
        "is it lost?",
        f"{RESNET} --epochs 10 --validate 10000 --muon --norm --rank 10",
        {f"{panel}: {label}": f"{flag} {own}".strip() for panel, flag, labels in (
            ("no weights", "--shortcut pad", ("backprop", "exact, branches send nothing", "FA",
                                              "FA, classifier exact", "FA, branches send nothing",
                                              f"FA{FIXED}", "B × 3", "B × 0.1")),
            ("1×1 convolutions", "", ("backprop", "FA", "FA, shortcuts exact", "FA, branches send nothing",
                                      f"FA{FIXED}", "B = W at the start", "frozen features")),
            ("no shortcuts", "--shortcut none", ("backprop", "FA")))
         for label, own in {
             "backprop": "--rule bp",
             "exact, branches send nothing": f"--rule {SHORTCUTS_ONLY} --exact 'blocks.*.conv2' classifier",
             "FA": "--rule fa", "frozen features": "--rule frozen",
             "FA, classifier exact": "--rule fa --exact classifier",
             "FA, shortcuts exact": "--rule fa --exact 'blocks.*.shortcut.0'",
             "FA, branches send nothing": f"--rule {SHORTCUTS_ONLY}",
             f"FA{FIXED}": f"--rule {FIRST_FIXED}",
             "B = W at the start": "--rule assignments/examples/transported_once.py:TransportedOnce",
             "B × 3": "--rule 'fa(gain=3)'", "B × 0.1": "--rule 'fa(gain=0.1)'"}.items() if label in labels},
        view="ways", seeds=3, scale=HELD_OUT + "10 epochs, Muon and batch normalisation."),
    "size": Experiment(
        "Beyond the paper: do shortcuts without weights help feedback alignment in a wider and in a deeper "
        "ResNet too?",
        "--dataset cifar100 --subset 10000 --epochs 10 --validate 10000 --muon --norm {}",
        {"backprop": "--rule bp", f"backprop{PAD}": "--rule bp --shortcut pad",
         "FA": "--rule fa", f"FA{PAD}": "--rule fa --shortcut pad"},
        {"width 32": "--model resnet18 --width 32", "34 layers": "--model resnet34 --width 16"}, "ResNet",
        "sweep", scale="ResNet-18 of width 32 and ResNet-34 of width 16, 10,000 training images of "
                       "CIFAR-100, 10,000 others to measure on, 10 epochs, Muon and batch normalisation."),
    "rules": Experiment(
        "Beyond the paper: the rules of fa.py in one common setting, with both repairs.",
        f"{CNN} --muon --norm",
        {"backprop": "--rule bp", "Kolen–Pollack": "--rule kp", "sign-symmetry": "--rule sign",
         "FA": "--rule fa", "DFA": "--rule dfa", "frozen features": "--rule frozen"},
        seeds=3, scale=CNN_SCALE),
    "norms": Experiment(
        "Batch normalisation is said to help by making activations orthogonal. Whitening goes further: does "
        "it help more?",
        f"{CNN} {{}}", {k: ALL[k] for k in ("backprop", "backprop + Muon", "FA", "FA + Muon")},
        {"none": "", **{kind: f"--norm {kind}" for kind in ("rms", "layer", "batch", "whiten")}},
        "normalisation", "sweep", seeds=3, scale=CNN_SCALE),
    "cifar100-quarter": Experiment(
        "The paper's headline table at a quarter of the width, and FA with shortcuts that have no weights.",
        "--dataset cifar100 --width 16 --epochs 10 --rank 10", WIDER, view="blocks",
        scale="ResNet-18 of width 16, all of CIFAR-100, 10 epochs."),
    "cifar100-half": Experiment(
        "The paper's headline table at half the width, and FA with shortcuts that have no weights.",
        "--dataset cifar100 --width 32 --epochs 30 --rank 30", WIDER, view="blocks",
        scale="ResNet-18 of width 32, all of CIFAR-100, 30 epochs."),
    "cifar100": Experiment(
        "The paper's headline table, and FA with shortcuts that have no weights.",
        "--dataset cifar100", wider(ALL), paper=PAPER,
        scale="ResNet-18 of width 64, all of CIFAR-100, 100 epochs."),
}
# README's headline table shows the first of these that has all its rows.
HEADLINE = ["cifar100", "cifar100-half", "cifar100-quarter", "cifar100-small"]


def main(argv: list[str] | None = None) -> int:
    """From the command line to the exit status."""
    return claims.main(argv, claims.Claims(EXPERIMENTS, HEADLINE, RESULTS, READMES))


if __name__ == "__main__":
    sys.exit(main())
