"""Weights transported once: B = W at the start, and never again. Does the alignment stay while W learns?

    python train.py --rule assignments/examples/transported_once.py:TransportedOnce --muon --norm --rank
"""
import fa


class TransportedOnce(fa.FA):
    uses_weight = True                                      # it reads W, if only once

    def draw(self, layer):
        return layer.weight.detach().clone()
