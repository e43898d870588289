"""The leading eigenvectors of a symmetric sparse matrix, for many rows and some hundred vectors."""

from collections.abc import Iterator

import numpy as np
from scipy import linalg, sparse

_ROUNDS = 3
_DEGREE = 8
_OVERSAMPLING = 8
_COLUMNS_PER_BLOCK = 32
_ROWS_PER_BLOCK = 65_536


def leading_eigenvectors(
    matrix_II: sparse.csr_array, num_vectors: int, rng: np.random.Generator
) -> np.ndarray:
    """Those of the largest eigenvalues, one a column, fp32 `[I, E]`, the largest first; fewer
    columns where there are fewer rows. All eigenvalues must lie between -1 and 1, and those that
    are wanted above 0.

    By Chebyshev-filtered subspace iteration (Zhou, Saad, Tiago & Chelikowsky, 2006,
    doi:10.1016/j.jcp.2006.03.017): to a basis a little wider than wanted is applied, three times, a
    polynomial of the matrix that stays small up to the smallest eigenvalue found so far and grows
    fast beyond. That takes 28 products of the matrix with the basis. Eigenvectors whose values
    hardly differ from the first that is not wanted are mixtures with its neighbours. In memory are
    the basis, blocks of it, and the matrix.
    """
    num_rows = matrix_II.shape[0]
    width = min(num_vectors + _OVERSAMPLING, num_rows)
    # Ordered by columns: blocks of them lie together, and LAPACK needs no copy.
    basis_IE = np.asfortranarray(rng.standard_normal((num_rows, width), dtype=np.float32))
    basis_IE, values_E = _approximate(matrix_II, basis_IE)
    for _ in range(_ROUNDS):
        edge = max(0.0, values_E[-1])
        for columns in _blocks(width, _COLUMNS_PER_BLOCK):
            basis_IE[:, columns] = _filter(matrix_II, basis_IE[:, columns], edge)
        basis_IE, values_E = _approximate(matrix_II, basis_IE)
    vectors_IE: np.ndarray = basis_IE[:, :num_vectors]
    return vectors_IE


def _filter(matrix_II: sparse.csr_array, block_IC: np.ndarray, edge: float) -> np.ndarray:
    """The Chebyshev polynomial, at most 1 in size for eigenvalues between -1 and the edge, times
    the block.
    """
    centre, half = (edge - 1) / 2, (edge + 1) / 2
    before_IC = np.ascontiguousarray(block_IC)
    now_IC: np.ndarray = (matrix_II @ before_IC - centre * before_IC) / half
    for _ in range(_DEGREE - 1):
        after_IC = (2 / half) * (matrix_II @ now_IC - centre * now_IC) - before_IC
        before_IC, now_IC = now_IC, after_IC
    return now_IC


def _approximate(
    matrix_II: sparse.csr_array, basis_IE: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The best eigenvectors in the span of the basis, the largest first, in its memory, and their
    values (Rayleigh-Ritz).
    """
    basis_IE, _ = linalg.qr(basis_IE, mode="economic", overwrite_a=True, check_finite=False)
    width = basis_IE.shape[1]
    projected_EE = np.empty((width, width), np.float32)
    for columns in _blocks(width, _COLUMNS_PER_BLOCK):
        product_IC = matrix_II @ np.ascontiguousarray(basis_IE[:, columns])
        projected_EE[:, columns] = basis_IE.T @ product_IC
    values_E, rotation_EE = linalg.eigh(projected_EE, check_finite=False)
    largest_first_EE = rotation_EE[:, ::-1]
    for rows in _blocks(len(basis_IE), _ROWS_PER_BLOCK):
        basis_IE[rows] = basis_IE[rows] @ largest_first_EE
    return basis_IE, values_E[::-1]


def _blocks(total: int, size: int) -> Iterator[slice]:
    for first in range(0, total, size):
        yield slice(first, min(first + size, total))
