"""Events of a token store as flat positions and sparse user-item matrices, without a loop over
users.
"""

from collections.abc import Iterator

import numpy as np
from scipy import sparse

from recsys.splits import Split
from recsys.tokens import TokenStore

_DAY_US = 86_400_000_000


def training_positions(store: TokenStore, split: Split) -> np.ndarray:
    """Indices into the tokens of every event that trains, int64, ascending."""
    return spans(store.offsets_U[:-1], split.train_end_U)


def training_counts(store: TokenStore, split: Split, num_rows: int) -> np.ndarray:
    """Training events of each catalogue row, int64 `[I]`."""
    return np.bincount(store.items_T[training_positions(store, split)], minlength=num_rows)


def training_matrix(store: TokenStore, split: Split, num_rows: int) -> sparse.csr_array:
    """Which user had which item in training, fp32 `[U, I]` of ones."""
    return history_matrix(store, store.offsets_U[:-1], split.train_end_U, num_rows)


def find_recent(timestamps_T: np.ndarray, days: float) -> np.ndarray:
    """Which events lie in the last `days` of their period, bool `[T]`; times in microseconds.

    The period ends at the 99.9 % quantile: a few events from a wrong clock do not move it.
    """
    if len(timestamps_T) == 0:
        return np.zeros(0, bool)
    end = np.quantile(timestamps_T, 0.999, method="higher")
    is_recent_T: np.ndarray = timestamps_T > end - days * _DAY_US
    return is_recent_T


def history_matrix(
    store: TokenStore, starts_B: np.ndarray, ends_B: np.ndarray, num_rows: int
) -> sparse.csr_array:
    """The distinct items of the tokens `starts_B:ends_B`, fp32 `[B, I]` of ones."""
    events_BI = event_matrix(store, starts_B, ends_B, num_rows)
    events_BI.sum_duplicates()
    events_BI.data[:] = 1
    return events_BI


def event_matrix(
    store: TokenStore,
    starts_B: np.ndarray,
    ends_B: np.ndarray,
    num_rows: int,
    *,
    decay: float = 1.0,
) -> sparse.csr_array:
    """One entry an event, fp32 `[B, I]`: 1 for the last of a row, `decay` for the one before, and
    so on.
    """
    positions = spans(starts_B, ends_B)
    indptr = np.concatenate([[0], np.cumsum(ends_B - starts_B)])
    ages = np.repeat(ends_B, ends_B - starts_B) - 1 - positions
    weights = np.power(np.float32(decay), ages, dtype=np.float32)
    shape = (len(starts_B), num_rows)
    return sparse.csr_array((weights, store.items_T[positions], indptr), shape=shape)


def spans(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """All integers of the ranges `starts:ends`, one range after the other, int64."""
    lengths = ends - starts
    before = np.cumsum(lengths) - lengths
    indices: np.ndarray = np.arange(lengths.sum()) + np.repeat(starts - before, lengths)
    return indices


def keep_best(matrix: sparse.csr_array, limit: int) -> sparse.csr_array:
    """The `limit` largest entries of each row, largest first; of equal ones the lower column."""
    counts = np.diff(matrix.indptr)
    rows = np.repeat(np.arange(matrix.shape[0]), counts)
    # Few entries of a long row are worth sorting: those that reach its `limit`-th.
    least = np.full(matrix.shape[0], -np.inf, matrix.dtype)
    for row in np.flatnonzero(counts > limit):
        entries = matrix.data[matrix.indptr[row] : matrix.indptr[row + 1]]
        least[row] = np.partition(entries, -limit)[-limit]
    candidates = np.flatnonzero(matrix.data >= least[rows])
    rows, data, columns = rows[candidates], matrix.data[candidates], matrix.indices[candidates]
    order = np.lexsort((columns, -data, rows))
    ends = np.cumsum(np.bincount(rows, minlength=matrix.shape[0]))
    places = np.arange(len(rows)) - np.concatenate([[0], ends])[rows]
    kept = order[places < limit]
    # The matrix's own dtype: int64 would make all indices as wide.
    indptr = np.zeros_like(matrix.indptr)
    np.cumsum(np.minimum(counts, limit), out=indptr[1:])
    return sparse.csr_array((data[kept], columns[kept], indptr), shape=matrix.shape)


def blocks_of(work_I: np.ndarray, budget: float) -> Iterator[tuple[int, int]]:
    """Ranges `first:last` over all rows, each of about `budget` work or of one row."""
    done_I = np.cumsum(work_I)
    cuts = (np.flatnonzero(np.diff(done_I // budget)) + 1).tolist()
    yield from zip([0, *cuts], [*cuts, len(work_I)], strict=True)
