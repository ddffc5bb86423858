"""A solution of assignments/1_project.py."""
from torch import nn
from torch.nn import functional as F

import fa


class MyRule(fa.FA):
    def backward(self, layer, error, input_shape):
        """δ at the layer's output -> δ at its input."""
        B = layer.feedback.to(error.dtype)
        if isinstance(layer, nn.Linear):
            return error @ B
        reached = [(n - 1) * s - 2 * p + d * (k - 1) + 1 for n, s, p, d, k in zip(
            error.shape[2:], layer.stride, layer.padding, layer.dilation, layer.kernel_size)]
        more = [wanted - size for wanted, size in zip(input_shape[2:], reached)]
        return F.conv_transpose2d(error, B, None, layer.stride, layer.padding, more, layer.groups,
                                  layer.dilation)
