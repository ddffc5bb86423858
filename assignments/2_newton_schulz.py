"""2. Make all singular values of a matrix one, by matrix products alone.

Muon replaces an update M = P Σ Qᵀ by P Qᵀ: the same directions, each of the same length. An SVD would do
it, but a GPU is much faster at products. For a number σ, the map  σ ← (3 σ - σ³) / 2  leads every σ
between 0 and √3 to 1. Let M's singular values take part in it all at once: what is σ³ when σ is a matrix?
And how do you make sure that they lie below √3, whatever M is? (muon.py uses a polynomial of degree five,
which is faster but leaves σ between about 0.7 and 1.2. This one, Schulz's of 1933, gets there.)

    python -m pytest tests/test_orthogonal_contract.py --rule assignments/2_newton_schulz.py:orthogonalise
"""


def orthogonalise(matrix, steps=40):
    """P Qᵀ of the matrix P Σ Qᵀ, of shape (m, n); a new tensor of the same shape and dtype."""
    raise NotImplementedError("normalise the matrix, then iterate")
