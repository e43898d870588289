"""What a model must beat: popularity, recent popularity, co-visitation, and collaborative
filtering.

Each is a `evaluation.Scorer`, fitted on training events alone; when it scores, it reads a user's
whole history before the target, as a model does. Recent popularity alone counts what others have
done since. They run on the CPU.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, Self

import numpy as np
import torch
from implicit.cpu.als import AlternatingLeastSquares
from scipy import sparse
from scipy.linalg import lapack
from threadpoolctl import threadpool_limits
from torch import Tensor

from recsys.catalogue import NUM_SPECIAL
from recsys.covisitation import DECAY, RECENT_EVENTS, find_neighbours
from recsys.evaluation import Scorer
from recsys.interactions import (
    blocks_of,
    event_matrix,
    history_matrix,
    keep_best,
    training_counts,
    training_matrix,
)
from recsys.splits import Split
from recsys.tokens import TokenStore

_HOUR_US = 3_600_000_000
_DAY_US = 24 * _HOUR_US
_TIE_BREAK = 1e-6
_PAIRS_PER_BLOCK = 10_000_000


class Baseline(Scorer, Protocol):
    """A scorer that learns from the training part of a store."""

    def fit(self, store: TokenStore, split: Split, num_rows: int) -> Self:
        """Reads the training events; `num_rows` are the rows of the catalogue. Returns itself."""
        ...


class Popularity:
    """Training events of each item, the same for everybody."""

    name = "popularity"

    def fit(self, store: TokenStore, split: Split, num_rows: int) -> Self:
        self._scores_I = training_counts(store, split, num_rows).astype(np.float32)
        return self

    def score(self, store: TokenStore, users_B: np.ndarray, targets_B: np.ndarray) -> Tensor:
        return _finished(np.repeat(self._scores_I[None], len(users_B), axis=0))


class RecentPopularity:
    """Events of all users in the `days` before the full hour of a target; equal ones, and all where
    there are none, in the order of training events.

    As a live shop counts what was clicked just now, it reads held-out events too, whoever's they
    are, once they lie before that hour: on a temporal cut those since training ended. Nothing at or
    after the hour is read, and of the target its hour alone. Without a time there is no such event.
    """

    name = "recent-popularity"

    def __init__(self, days: float = 7) -> None:
        """`days` may be a fraction."""
        self._window_us = round(days * _DAY_US)

    def fit(self, store: TokenStore, split: Split, num_rows: int) -> Self:
        order_T = np.argsort(store.timestamps_T, kind="stable")
        self._times_T = store.timestamps_T[order_T]
        self._items_T = store.items_T[order_T]
        counts_I = training_counts(store, split, num_rows)
        self._tie_break_I = counts_I / (counts_I.max() + 1)
        return self

    def score(self, store: TokenStore, users_B: np.ndarray, targets_B: np.ndarray) -> Tensor:
        # A missing time becomes 1970, before which no event of a log lies.
        hours_B = np.maximum(store.timestamps_T[targets_B], 0) // _HOUR_US
        hours_H, rows_B = np.unique(hours_B, return_inverse=True)
        return _finished(self._score_hours(hours_H)[rows_B])

    def _score_hours(self, hours_H: np.ndarray) -> np.ndarray:
        """Scores at the beginning of each hour, ascending, fp32 `[H, I]`: the window moves on, and
        each event is counted in and out once.
        """
        firsts_H = np.searchsorted(self._times_T, hours_H * _HOUR_US - self._window_us)
        lasts_H = np.searchsorted(self._times_T, hours_H * _HOUR_US)
        num_rows = len(self._tie_break_I)
        scores_HI = np.empty((len(hours_H), num_rows), np.float32)
        counts_I = np.zeros(num_rows, np.int64)
        first = last = firsts_H[0]
        for h, (next_first, next_last) in enumerate(zip(firsts_H, lasts_H, strict=True)):
            counts_I += np.bincount(self._items_T[last:next_last], minlength=num_rows)
            counts_I -= np.bincount(self._items_T[first:next_first], minlength=num_rows)
            scores_HI[h] = counts_I + self._tie_break_I
            first, last = next_first, next_last
        return scores_HI


class Covisitation:
    """Neighbours of the user's last events (see `covisitation.find_neighbours`), summed with
    decay.
    """

    name = "covisitation"

    def __init__(self, *, window: int = 10, backward: float = 0.3, neighbours: int = 500) -> None:
        self._window = window
        self._backward = backward
        self._neighbours = neighbours

    def fit(self, store: TokenStore, split: Split, num_rows: int) -> Self:
        self._similarity_II = find_neighbours(
            store,
            split,
            num_rows,
            limit=self._neighbours,
            window=self._window,
            backward=self._backward,
        )
        self._tie_break_I = _tie_break(store, split, num_rows)
        return self

    def score(self, store: TokenStore, users_B: np.ndarray, targets_B: np.ndarray) -> Tensor:
        starts_B = np.maximum(store.offsets_U[users_B], targets_B - RECENT_EVENTS)
        num_rows = len(self._tie_break_I)
        recent_BI = event_matrix(store, starts_B, targets_B, num_rows, decay=DECAY)
        return _finished(_dense(recent_BI @ self._similarity_II, self._tie_break_I))


class ItemKNN:
    """Sum over the user's items of their shrunk cosine `common / (sqrt(n_i n_j) + shrinkage)`.

    Each item keeps its `neighbours` most similar. Source: Sarwar et al. (2001),
    doi:10.1145/371920.372071; shrinkage as in Dacrema et al. (2019), doi:10.1145/3298689.3347058.
    """

    name = "item-knn"

    def __init__(self, *, neighbours: int = 50, shrinkage: float = 10) -> None:
        self._neighbours = neighbours
        self._shrinkage = shrinkage

    def fit(self, store: TokenStore, split: Split, num_rows: int) -> Self:
        users_UI = training_matrix(store, split, num_rows)
        items_IU = users_UI.T.tocsr()
        norms_I = np.sqrt(np.diff(items_IU.indptr)).astype(np.float32)
        # Pairs that a block of items meets: for each of its users, the length of that history.
        pairs_I = items_IU @ np.diff(users_UI.indptr)

        blocks = []
        for first, last in blocks_of(pairs_I, _PAIRS_PER_BLOCK):
            common = (items_IU[first:last] @ users_UI).tocsr()
            rows = np.repeat(np.arange(first, last), np.diff(common.indptr))
            common.data /= norms_I[rows] * norms_I[common.indices] + self._shrinkage
            common.data[rows == common.indices] = 0
            blocks.append(keep_best(common, self._neighbours))
        self._similarity_II = sparse.vstack(blocks, format="csr")
        self._tie_break_I = _tie_break(store, split, num_rows)
        return self

    def score(self, store: TokenStore, users_B: np.ndarray, targets_B: np.ndarray) -> Tensor:
        history_BI = _histories(store, users_B, targets_B, len(self._tie_break_I))
        return _finished(_dense(history_BI @ self._similarity_II, self._tie_break_I))


class ALS:
    """Matrix factorisation of implicit feedback; a user's factors are solved from the whole history
    before the target. Source: Hu, Koren & Volinsky (2008), doi:10.1109/ICDM.2008.22.
    """

    name = "als"

    def __init__(
        self,
        *,
        factors: int = 128,
        regularisation: float = 1.0,
        confidence: float = 5.0,
        iterations: int = 15,
        seed: int = 0,
    ) -> None:
        # implicit warns, rightly, when a threaded BLAS runs beneath its own threads.
        with threadpool_limits(1, "blas"):
            self._als = AlternatingLeastSquares(
                factors=factors,
                regularization=regularisation,
                alpha=confidence,
                iterations=iterations,
                num_threads=torch.get_num_threads(),
                random_state=seed,
            )

    def fit(self, store: TokenStore, split: Split, num_rows: int) -> Self:
        users_UI = sparse.csr_matrix(training_matrix(store, split, num_rows))
        with threadpool_limits(1, "blas"):
            self._als.fit(users_UI, show_progress=False)
        return self

    def score(self, store: TokenStore, users_B: np.ndarray, targets_B: np.ndarray) -> Tensor:
        history_BI = _histories(store, users_B, targets_B, len(self._als.item_factors))
        with threadpool_limits(1, "blas"):
            users_BD = self._als.recalculate_user(users_B, sparse.csr_matrix(history_BI))
        return _finished(users_BD @ self._als.item_factors.T)


class EASE:
    """Linear autoencoder without self-weights, in closed form: `-P_ij / P_jj` with
    `P = inv(X'X + ridge * I)`. Source: Steck (2019), doi:10.1145/3308558.3313710.

    Memory grows with the square of the number of items, 8 bytes a pair, and time with the cube.
    """

    name = "ease"
    max_items = 15_000

    def __init__(self, *, ridge: float = 300) -> None:
        self._ridge = ridge

    def fit(self, store: TokenStore, split: Split, num_rows: int) -> Self:
        """Raises: ValueError for more than `max_items`."""
        if num_rows - NUM_SPECIAL > self.max_items:
            raise ValueError(
                f"EASE inverts a matrix of items x items and stops at {self.max_items:,} items; "
                f"the catalogue has {num_rows - NUM_SPECIAL:,}. Leave ease out of the baselines."
            )
        users_UI = training_matrix(store, split, num_rows)
        gram_II = (users_UI.T @ users_UI).astype(np.float64).toarray(order="F")
        np.fill_diagonal(gram_II, gram_II.diagonal() + self._ridge)
        weights_II = _invert_in_place(gram_II)
        weights_II /= -weights_II.diagonal()
        np.fill_diagonal(weights_II, 0)
        self._weights_II = weights_II.astype(np.float32)
        return self

    def score(self, store: TokenStore, users_B: np.ndarray, targets_B: np.ndarray) -> Tensor:
        history_BI = _histories(store, users_B, targets_B, len(self._weights_II))
        return _finished(history_BI @ self._weights_II)


def make_baselines(
    names: tuple[str, ...],
    *,
    recent_days: float = 7,
    seed: int = 0,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Baseline]:
    """Unfitted baselines with the settings of their classes but for those in `settings`. Raises
    ValueError for a name that is not in `BASELINES`.
    """
    unknown = [name for name in names if name not in BASELINES]
    if unknown:
        raise ValueError(f"There is no baseline {unknown[0]!r}; choose of: {', '.join(BASELINES)}.")
    given: dict[str, dict[str, Any]] = {
        "recent-popularity": {"days": recent_days},
        "als": {"seed": seed},
    }
    for name, values in (settings or {}).items():
        given[name] = given.get(name, {}) | dict(values)
    return [BASELINES[name](**given.get(name, {})) for name in names]


BASELINES: Mapping[str, Callable[..., Baseline]] = {
    "popularity": Popularity,
    "recent-popularity": RecentPopularity,
    "covisitation": Covisitation,
    "item-knn": ItemKNN,
    "als": ALS,
    "ease": EASE,
}


def _invert_in_place(matrix_II: np.ndarray) -> np.ndarray:
    """The inverse of a positive definite fp64 matrix in Fortran's order, in its own memory."""
    inverse_II: np.ndarray
    factor_II, failed = lapack.dpotrf(matrix_II, lower=1, overwrite_a=1)
    assert not failed
    inverse_II, failed = lapack.dpotri(factor_II, lower=1, overwrite_c=1)
    assert not failed
    # The factorisation knows the lower triangle alone.
    for row in range(len(inverse_II) - 1):
        inverse_II[row, row + 1 :] = inverse_II[row + 1 :, row]
    return inverse_II


def _histories(
    store: TokenStore, users_B: np.ndarray, targets_B: np.ndarray, num_rows: int
) -> sparse.csr_array:
    return history_matrix(store, store.offsets_U[users_B], targets_B, num_rows)


def _tie_break(store: TokenStore, split: Split, num_rows: int) -> np.ndarray:
    """At most 1e-6 of a score, fp32 `[I]`: orders by popularity what has no, or equal, evidence."""
    counts_I = training_counts(store, split, num_rows)
    shares_I: np.ndarray = counts_I / max(counts_I.max(), 1)
    return (_TIE_BREAK * shares_I).astype(np.float32)


def _dense(scores_BI: sparse.csr_array, tie_break_I: np.ndarray) -> np.ndarray:
    """Their sum, fp32 `[B, I]`, without a second matrix of that size."""
    dense_BI: np.ndarray = scores_BI.toarray()
    dense_BI += tie_break_I
    return dense_BI


def _finished(scores_BI: np.ndarray) -> Tensor:
    scores_BI[:, :NUM_SPECIAL] = -np.inf
    return torch.from_numpy(scores_BI.astype(np.float32, copy=False))
