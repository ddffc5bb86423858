"""A solution of assignments/2_newton_schulz.py."""


def orthogonalise(matrix, steps=40):
    """P Qᵀ of the matrix P Σ Qᵀ, of shape (m, n); a new tensor of the same shape and dtype."""
    X = matrix / (matrix.norm() + 1e-30)
    for _ in range(steps):
        X = (3 * X - X @ X.mT @ X) / 2
    return X
