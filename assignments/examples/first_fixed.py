"""Is an error by B better than none? FA that leaves the first convolution of each block as it was drawn.

    python train.py --rule assignments/examples/first_fixed.py:FirstFixed --model resnet18 --muon --norm

The second one learns, from the error that the shortcuts bring to the branch's end.
"""
import fa


class FirstFixed(fa.FA):
    def backward(self, layer, error, input_shape):
        if layer.crossing.name.endswith((".conv1", ".conv2")):      # no error enters a block's branch
            return None
        return super().backward(layer, error, input_shape)
