"""The leading eigenvectors of a symmetric sparse matrix, for many rows and some hundred vectors."""

import warnings
from collections.abc import Iterator

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

_ROUNDS = 3
_DEGREE = 8
_OVERSAMPLING = 8
_COLUMNS_PER_BLOCK = 32


def leading_eigenvectors(
    matrix_II: sparse.csr_array, num_vectors: int, *, seed: int, device: torch.device
) -> Tensor:
    """Those of the largest eigenvalues, one a column, fp32 `[I, E]` on the device, the largest
    first; fewer columns where there are fewer rows. All eigenvalues must lie between -1 and 1, and
    those that are wanted above 0.

    By Chebyshev-filtered subspace iteration (Zhou, Saad, Tiago & Chelikowsky, 2006,
    doi:10.1016/j.jcp.2006.03.017): to a basis a little wider than wanted is applied, three times, a
    polynomial of the matrix that stays small up to the smallest eigenvalue found so far and grows
    fast beyond. That takes 28 products of the matrix with the basis. Eigenvectors whose values
    hardly differ from the first that is not wanted are mixtures with its neighbours. In memory are
    the matrix and up to three copies of the basis.
    """
    num_rows = matrix_II.shape[0]
    width = min(num_vectors + _OVERSAMPLING, num_rows)
    # Drawn by the CPU, so that every device begins with the same.
    drawn_IE = np.random.default_rng(seed).standard_normal((num_rows, width), dtype=np.float32)
    graph_II = _to_torch(matrix_II, device)
    basis_IE, values_E = _approximate(graph_II, torch.from_numpy(drawn_IE).to(device))
    for _ in range(_ROUNDS):
        edge = max(0.0, float(values_E[-1]))
        for columns in _blocks(width):
            basis_IE[:, columns] = _filter(graph_II, basis_IE[:, columns], edge)
        basis_IE, values_E = _approximate(graph_II, basis_IE)
    return basis_IE[:, :num_vectors]


def _to_torch(matrix_II: sparse.csr_array, device: torch.device) -> Tensor:
    with warnings.catch_warnings():
        # That such matrices are new in torch; ours are only multiplied with.
        warnings.filterwarnings("ignore", "Sparse", UserWarning)
        return torch.sparse_csr_tensor(
            torch.from_numpy(matrix_II.indptr),
            torch.from_numpy(matrix_II.indices),
            torch.from_numpy(matrix_II.data),
            size=matrix_II.shape,
            device=device,
        )


def _filter(graph_II: Tensor, block_IC: Tensor, edge: float) -> Tensor:
    """The Chebyshev polynomial, at most 1 in size for eigenvalues between -1 and the edge, times
    the block.
    """
    centre, half = (edge - 1) / 2, (edge + 1) / 2
    before_IC = block_IC.contiguous()
    now_IC = (graph_II @ before_IC - centre * before_IC) / half
    for _ in range(_DEGREE - 1):
        after_IC = (2 / half) * (graph_II @ now_IC - centre * now_IC) - before_IC
        before_IC, now_IC = now_IC, after_IC
    return now_IC


def _approximate(graph_II: Tensor, basis_IE: Tensor) -> tuple[Tensor, Tensor]:
    """The best eigenvectors in the span of the basis, the largest first, and their values
    (Rayleigh-Ritz).
    """
    basis_IE, _ = torch.linalg.qr(basis_IE)
    projected_EE = torch.empty_like(basis_IE[: basis_IE.shape[1]])
    for columns in _blocks(basis_IE.shape[1]):
        projected_EE[:, columns] = basis_IE.T @ (graph_II @ basis_IE[:, columns].contiguous())
    values_E, rotation_EE = torch.linalg.eigh(projected_EE)
    return basis_IE @ rotation_EE.flip(1), values_E.flip(0)


def _blocks(num_columns: int) -> Iterator[slice]:
    for first in range(0, num_columns, _COLUMNS_PER_BLOCK):
        yield slice(first, first + _COLUMNS_PER_BLOCK)
