"""1. Send the error back through B, in place of W.

A layer computes a = W x. Backprop sends the error δ at its output to its input through W's transpose,
feedback alignment through a fixed random B of W's shape, `layer.feedback`. For nn.Linear it is one matrix
product. A convolution is a product too, with a large sparse matrix; the product with that matrix's
transpose is known as the transposed convolution, torch.nn.functional.conv_transpose2d. `fa.project` does
the same in another way: do without it.

Shapes, for images of any size:
    Linear    layer.feedback (out, in)                  error (N, out)           returns (N, in)
    Conv2d    layer.feedback (out, in / groups, k, k)   error (N, out, H', W')   returns (N, in, H, W)

Two different heights H may lead to the same H' when the stride is 2; conv_transpose2d takes an
output_padding, which you can work out from input_shape.

    python -m pytest tests/test_rule_contract.py --rule assignments/1_project.py:MyRule --like fa
"""
from torch import nn
from torch.nn import functional as F  # noqa: F401  (you will need it)

import fa


class MyRule(fa.FA):
    def backward(self, layer, error, input_shape):
        """δ at the layer's output -> δ at its input."""
        B = layer.feedback.to(error.dtype)      # noqa: F841  (in bf16 the error has fewer digits than B)
        if isinstance(layer, nn.Linear):
            raise NotImplementedError("send the error through a Linear layer: one matrix product")
        raise NotImplementedError("send the error through a Conv2d layer: stride, padding, dilation, groups")
