"""Train one network by one rule, and leave a folder of evidence.

    python train.py                                               # fa on gratings: under a minute on a laptop
    python train.py --muon --norm                                 # the same, repaired
    python train.py --rule fa --muon --norm --dataset cifar100    # the paper's headline run, ResNet-18
    torchrun --nproc-per-node 4 train.py ...                      # the same on four GPUs

The paper (Boeshertz, Pascanu & Clopath 2026) trains deep networks by feedback alignment (fa.py) and repairs
its collapsing error signal in two ways: Muon for the hidden weights (muon.py) and normalised hidden activity
(norm.py). Each is a flag. This is the page on which everything meets:

    images ──▶ model ──▶ loss ──▶ backward, where fa.py's hooks carry the error ──▶ Muon and SGD ──▶ weights

The learning rates fall to 0 along a cosine. The reported accuracy is that of the last epoch, never of the
best one. What else a run needs (its folder, going on where it was stopped, several processes, CUDA graphs) is
in harness/ and appears here as one call each; harness/README.md lists the exit statuses.
"""
from __future__ import annotations

import argparse
import contextlib
import math
import sys
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import data
import fa
import muon
import rank
from harness import files, flags, graph, parallel, recorder, rulefile, session


class Trainer:
    """A network, its rule, its optimisers and its images.

    model, handle   the network, and the handle of the rule that is attached to it
    optimisers      [Nesterov SGD], or [Muon, Nesterov SGD], each beside its initial learning rate
    """

    def __init__(self, args: argparse.Namespace, dataset: data.Dataset):
        device = args.device
        self.images, self.labels = (t[:args.subset].to(device) for t in dataset[:2])            # uint8, int64
        self.test_images, self.test_labels = (t.to(device) for t in dataset[2:4])
        self.normalise = data.Normalise(self.images)
        self.flip = args.dataset != "gratings"                      # mirroring changes a grating's class
        self.generator = torch.Generator(device).manual_seed(args.seed)         # order and augmentation
        self.autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=args.amp)

        # The network. In channels_last the kernels need not reorder activations: a step on a CPU takes a
        # quarter less time.
        torch.manual_seed(args.seed)
        self.model = flags.network(args, len(dataset.classes), self.images.shape[-1])
        self.model.to(device, memory_format=torch.channels_last)

        # Feedback alignment, or another rule, carries the error back through every layer but the stem.
        rule = rulefile.make(rulefile.load(args.rule), args.seed)
        self.handle = fa.attach(self.model, rule, except_=args.exact)
        self.network = parallel.wrap(self.model, self.normalise(self.images[:2]), self.labels[:2])

        # Muon takes the hidden weights, Nesterov SGD all others; or SGD takes all.
        hidden, others = muon.split(self.model)
        cut = partial(rank.cut, r=args.cut) if args.cut else None
        change = rank.flatten if args.flatten else cut
        self.changed = partial(rank.updates, hidden, change) if change else contextlib.nullcontext
        if not args.muon:
            hidden, others = [], list(self.model.parameters())
        in_tensors = args.graph or device.type == "cuda"        # where a CUDA graph reads its learning rates
        rate = partial(torch.tensor, device=device) if in_tensors else float
        sgd = torch.optim.SGD(others, rate(args.lr), momentum=0.9, nesterov=True,
                              weight_decay=args.weight_decay, fused=in_tensors or None)
        self.optimisers: list[tuple[torch.optim.Optimizer, float]] = [(sgd, args.lr)]
        if hidden:
            decay = args.weight_decay if args.muon_weight_decay is None else args.muon_weight_decay
            kind = parallel.Muon if parallel.size() > 1 else muon.Muon
            matrices = kind(hidden, rate(args.muon_lr), weight_decay=decay, dtype=flags.muon_dtype(device))
            self.optimisers.insert(0, (matrices, args.muon_lr))
        session.each_in_one(self.model, [optimiser for optimiser, _ in self.optimisers])

        # With --rank, record ranks and alignments on the first 512 images, and the gradients' trajectory.
        self.recording: recorder.Recording | None = None
        if args.rank:
            per_epoch = data.steps(len(self.images), args.batch_size)
            self.recording = recorder.Recording(self.model, self.handle, self.normalise(self.images[:512]),
                                                self.labels[:512], per_epoch, args.epochs)
        self.watched = self.recording.step if self.recording else contextlib.nullcontext

    def step(self, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step on the chosen images.

        Returns the loss, how many images were classified correctly, and `session.largest`, all on the device.
        """
        batch = data.batch(self.images, self.labels, chosen, self.generator, self.flip)
        images, labels = (parallel.share(part) for part in batch)   # each process takes its part
        with self.autocast():
            logits = self.network(self.normalise(images))
        loss = F.cross_entropy(logits.float(), labels)
        self.model.zero_grad()
        if self.handle.rule.needs_targets:
            self.handle.rule.targets = labels
        loss.backward()                                             # fa.py's hooks run in here
        self.handle.before_step()
        with self.watched(), self.changed():                        # --rank; --cut and --flatten
            for optimiser, _ in self.optimisers:
                optimiser.step()
        return loss.detach(), (logits.argmax(1) == labels).sum(), session.largest(loss, self.model)

    @torch.no_grad()
    def test(self) -> float:
        """Accuracy on the whole test set."""
        self.model.eval()
        correct = torch.zeros((), dtype=torch.int64, device=self.images.device)
        for images, labels in zip(self.test_images.split(1000), self.test_labels.split(1000)):
            with self.autocast():
                correct += (self.model(self.normalise(images)).argmax(1) == labels).sum()
        return correct.item() / len(self.test_labels)


def load(args: argparse.Namespace) -> data.Dataset:
    """The data set that the arguments ask for. Raises files.Problem."""
    dataset = data.load(args.dataset, args.data, args.image_size or 32)
    if args.validate:
        try:
            dataset = data.hold_out(dataset, args.validate)
        except ValueError as e:
            raise files.Problem(f"--validate {args.validate}: {e}") from e
    flags.check(args, len(dataset.train_images), parallel.size())
    return dataset


def main(argv: list[str] | None = None) -> int:
    """From the command line to the exit status."""
    args = flags.parse(argv)
    with session.Run(args) as run:
        dataset = load(args)
        trainer = Trainer(args, dataset)
        step = graph.Graphed(trainer.step, trainer.generator) if args.graph else trainer.step
        run.begin(trainer.model, trainer.handle, trainer.optimisers, trainer.generator,
                  trainer.recording, dataset)
        for _ in run.epochs():
            trainer.model.train()
            for chosen in run.batches(len(trainer.images), args.batch_size):
                for optimiser, first in trainer.optimisers:
                    graph.set_rate(optimiser, first * (1 + math.cos(math.pi * run.progress())) / 2)
                run.saw(*step(chosen))
            run.log(trainer.test())
    return run.status


if __name__ == "__main__":
    sys.exit(parallel.leave(main()))
