"""Does the error of a ResNet travel by the shortcuts alone? FA that sends none through a branch.

    python train.py --rule assignments/examples/shortcuts_only.py:ShortcutsOnly --model resnet18 --muon --norm

The branches still learn, each from the error that the shortcuts bring to its end.
"""
import fa


class ShortcutsOnly(fa.FA):
    def backward(self, layer, error, input_shape):
        if layer.crossing.name.endswith(".conv1"):          # the first layer of a block's branch
            return None
        return super().backward(layer, error, input_shape)
