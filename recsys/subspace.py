"""The strongest directions of a symmetric matrix that is only ever multiplied with."""

from collections.abc import Callable

import numpy as np

_OVERSAMPLING = 8


def leading_eigenvectors(
    multiply: Callable[[np.ndarray], np.ndarray],
    num_rows: int,
    num_vectors: int,
    rng: np.random.Generator,
    *,
    iterations: int = 8,
) -> np.ndarray:
    """About those of the largest eigenvalues, one a column, fp32 `[num_rows, num_vectors]`, the
    strongest first; fewer columns where there are fewer rows.

    By subspace iteration (Halko et al., 2011, doi:10.1137/090771806) on a matrix without negative
    eigenvalues: `iterations + 1` products with a basis of `num_vectors + 8` columns. The closer the
    eigenvalues beyond are to the last one that is wanted, the more of theirs is left in the last
    columns.
    """
    width = min(num_vectors + _OVERSAMPLING, num_rows)
    basis = rng.standard_normal((num_rows, width), dtype=np.float32)
    for _ in range(iterations):
        basis, _ = np.linalg.qr(multiply(basis))
    _, rotation = np.linalg.eigh(basis.T @ multiply(basis))
    strongest_first = rotation[:, ::-1][:, :num_vectors]
    vectors: np.ndarray = basis @ strongest_first
    return vectors
