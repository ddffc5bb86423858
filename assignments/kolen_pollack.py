"""Assignment: Kolen–Pollack learning, feedback weights that become the forward weights (Akrout et al. 2019).

Feedback alignment keeps its feedback weights B fixed. Kolen and Pollack (1994) let them learn: B starts at
random and takes the same updates as W, weight decay λ included,

    W ← (1 - ηλ) W + ΔW        B ← (1 - ηλ) B + ΔW

so W - B shrinks by 1 - ηλ a step, and in the end the error goes back through B = W without any weight ever
transported.

Fill in the two methods, one line each, then see it learn and have it graded (from the project's folder):

    python train.py --rule assignments/kolen_pollack.py:MyRule --norm
    python -m pytest tests/test_rule_contract.py --rule assignments/kolen_pollack.py:MyRule --like kp
"""
from torch import nn  # noqa: F401  (you will need it)

import fa


class MyRule(fa.FA):
    learns = True                               # its feedback changes in training

    def prepare(self, layer):
        """Called once for each hidden layer, before training."""
        raise NotImplementedError("make layer.feedback a parameter, drawn by self.draw(layer)")

    def before_step(self, layer):
        """Called for each hidden layer after the backward pass, before the optimiser's step."""
        raise NotImplementedError("give layer.feedback the gradient that layer.weight has")
