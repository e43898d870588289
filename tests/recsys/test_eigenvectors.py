"""Leading eigenvectors against those of the whole matrix."""

import numpy as np
import pytest
import torch
from scipy import sparse

from recsys.eigenvectors import leading_eigenvectors


def make_matrix(values: np.ndarray) -> tuple[sparse.csr_array, np.ndarray]:
    """A symmetric matrix of these eigenvalues, the largest first, and its eigenvectors."""
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.standard_normal((len(values), len(values))))
    matrix = (basis * values) @ basis.T
    return sparse.csr_array(matrix.astype(np.float32)), basis


def find(matrix: sparse.csr_array, num_vectors: int) -> np.ndarray:
    return leading_eigenvectors(matrix, num_vectors, seed=1, device=torch.device("cpu")).numpy()


def test_they_are_those_of_the_whole_matrix():
    matrix, exact = make_matrix(np.array([0.9, 0.7, 0.5, *np.linspace(0.2, -0.2, 97)]))
    found = find(matrix, 3)
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.abs(found.T @ exact[:, :3]), np.eye(3), atol=1e-3)


def test_a_spectrum_without_a_gap_is_found_but_for_its_edge():
    # As graphs of neighbours have it: a few large ones, then a slope down to many around zero.
    values = np.sort(np.concatenate([0.1 + 0.5 / np.arange(1, 101), np.linspace(0.1, -0.3, 900)]))
    matrix, exact = make_matrix(values[::-1])
    found = find(matrix, 40)
    np.testing.assert_allclose(found.T @ found, np.eye(40), atol=1e-4)
    assert np.square(exact[:, :10].T @ found).sum() > 10 * 0.999
    assert np.sum(found * (matrix @ found)) > 0.99 * values[-40:].sum()


def test_large_negative_eigenvalues_are_not_wanted():
    matrix, exact = make_matrix(np.array([0.6, 0.5, *np.linspace(0.1, -0.1, 36), -0.9, -0.99]))
    found = find(matrix, 2)
    np.testing.assert_allclose(np.abs(found.T @ exact[:, :2]), np.eye(2), atol=1e-3)


@pytest.mark.parametrize("num_rows", [1, 5, 12])
def test_a_small_matrix_is_taken_apart_whole(num_rows):
    matrix, exact = make_matrix(np.linspace(0.9, -0.9, num_rows))
    found = find(matrix, 10)
    wanted = min(10, num_rows)
    assert found.shape == (num_rows, wanted)
    positive = (num_rows + 1) // 2
    angles = np.abs(found.T @ exact[:, :wanted])[:positive, :positive]
    np.testing.assert_allclose(angles, np.eye(positive), atol=1e-3)


def test_blocks_of_columns_change_nothing(monkeypatch):
    matrix, _ = make_matrix(np.linspace(0.9, -0.5, 60))
    whole = find(matrix, 5)
    monkeypatch.setattr("recsys.eigenvectors._COLUMNS_PER_BLOCK", 3)
    in_blocks = find(matrix, 5)
    np.testing.assert_allclose(np.abs(whole.T @ in_blocks), np.eye(5), atol=1e-3)


def test_an_empty_matrix_has_some_directions():
    found = find(sparse.csr_array((30, 30), dtype=np.float32), 4)
    np.testing.assert_allclose(found.T @ found, np.eye(4), atol=1e-4)


@pytest.mark.gpu
def test_a_gpu_finds_the_same():
    matrix, _ = make_matrix(np.linspace(0.9, -0.5, 200))
    gpu = torch.device("cuda")
    found = leading_eigenvectors(matrix, 5, seed=1, device=gpu)
    assert found.device.type == "cuda"
    np.testing.assert_allclose(
        np.abs(find(matrix, 5).T @ found.cpu().numpy()), np.eye(5), atol=1e-2
    )
