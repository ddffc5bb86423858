"""Feedback that favours no direction: B drawn as for FA, then orthogonal at each position of the kernel.

    python train.py --rule "assignments/examples/orthogonal.py:Orthogonal(gain=3)" --muon --norm
"""
import torch

import fa


class Orthogonal(fa.FA):
    def draw(self, layer):
        drawn = super().draw(layer)
        positions = drawn.flatten(2).permute(2, 0, 1) if drawn.dim() > 2 else drawn[None]   # (kh·kw, out, in)
        U, _, Vh = torch.linalg.svd(positions.float(), full_matrices=False)
        flat = (U @ Vh).permute(1, 2, 0).reshape(drawn.shape)
        return (flat * (drawn.norm() / flat.norm())).to(drawn)          # of the norm drawn
