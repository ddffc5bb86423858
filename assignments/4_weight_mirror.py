"""4. The weight mirror: B learns W by watching the layer react to noise.

Akrout et al. (2019) let the network fall silent now and then and feed each layer white noise x. Its
answer is y = W x, so on average y xᵀ is W times the noise's variance: whoever sees both sides, as B's
synapse does, can find out W from the correlation, without any weight being read. Let B drift towards it,

    B ← B + rate · (mean of y xᵀ - B)

Fill in the one method: noise in, answer out, B moved. Use self.generator for the noise, so that a run can
be repeated; `products` sums y xᵀ over images and positions.

    python -m pytest tests/test_rule_contract.py --rule assignments/4_weight_mirror.py:MyRule --aligns 30
    python train.py --rule assignments/4_weight_mirror.py:MyRule --norm --rank
"""
import torch  # noqa: F401  (you will need it)
from torch import nn

import fa


def products(layer, y, x):
    """The sum, over images and positions, of y times x, in the shape of layer.weight."""
    if isinstance(layer, nn.Linear):
        return y.mT @ x
    return nn.grad.conv2d_weight(x, layer.weight.shape, y, layer.stride, layer.padding, layer.dilation,
                                 layer.groups)


class MyRule(fa.FA):
    learns = True                               # its feedback changes in training
    uses_weight = True                          # if only by the layer's answer
    needs_input = True                          # so that layer.input is there, whose shape the noise takes

    def __init__(self, seed=0, rate=0.1):
        super().__init__(seed)
        self.rate = rate

    def before_step(self, layer):
        """Called for each hidden layer after the backward pass, before the optimiser's step.

        Autograd is on here: measure under torch.no_grad().
        """
        raise NotImplementedError("feed the layer noise and move layer.feedback, a buffer, towards y xᵀ")
