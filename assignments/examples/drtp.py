"""Direct random target projection (Frenkel, Lefebvre & Bol 2021): the targets take the place of the error.

With a softmax the output's error is e = (p - y) / N for a batch of N. DRTP drops the prediction p: each
hidden layer gets -Bᵀy / N, known before the forward pass has ended. Only the true class gets an error, of the
correct sign.

    python train.py --rule assignments/examples/drtp.py:DRTP --muon --norm
"""
from torch.nn import functional as F

import fa


class DRTP(fa.DFA):
    needs_targets = True                                    # self.targets: the labels of the batch, (N,)

    def signal(self, error):                                # the output's own error, (N, classes)
        return -F.one_hot(self.targets, error.shape[1]).to(error.dtype) / len(error)
