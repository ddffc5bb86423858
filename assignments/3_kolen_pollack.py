"""3. Kolen–Pollack: feedback weights that become the forward weights, though nobody transports them.

Kolen and Pollack (1994; Akrout et al. 2019) let B learn: it starts at random and takes the same updates
as W, weight decay λ included,

    W ← (1 - ηλ) W + ΔW        B ← (1 - ηλ) B + ΔW

so each step multiplies W - B by 1 - ηλ, and in the end the error goes back through B = W. Is that not
transport? No: W's gradient is the sum, over images and positions, of the products of the error above and
the input below, and B's synapse sees both itself. fa.py has this rule too, and there B takes the gradient
from layer.weight. Here it must make its own. Fill in the two methods:

    python -m pytest tests/test_rule_contract.py --rule assignments/3_kolen_pollack.py:MyRule --like kp
    python train.py --rule assignments/3_kolen_pollack.py:MyRule --norm --rank
"""
from torch import nn

import fa


def products(layer, error, x):
    """The sum, over images and positions, of error times input, in the shape and dtype of layer.weight."""
    if isinstance(layer, nn.Linear):
        return (error.mT @ x).to(layer.weight.dtype)
    return nn.grad.conv2d_weight(x, layer.weight.shape, error, layer.stride, layer.padding, layer.dilation,
                                 layer.groups).to(layer.weight.dtype)


class MyRule(fa.FA):
    learns = True                               # its feedback changes in training
    needs_input = True                          # so that layer.input is there

    def prepare(self, layer):
        """Called once for each hidden layer, before training."""
        raise NotImplementedError("make layer.feedback a parameter, drawn by self.draw(layer)")

    def backward(self, layer, error, input_shape):
        """Called in each backward pass; the optimiser's step comes after it."""
        raise NotImplementedError("give layer.feedback its gradient, then send the error as feedback "
                                  "alignment does")
