"""Which item stands beside which: pairs counted inside a window of each user's training events.

Occurrences are worked through in blocks of items, so memory is bounded by the block and not by the
number of pairs.
"""

import numpy as np
from scipy import sparse

from recsys.interactions import blocks_of, keep_best, training_positions
from recsys.splits import Split
from recsys.tokens import TokenStore

RECENT_EVENTS = 10
"""Events at the end of a history whose neighbours are recommended."""
DECAY = 0.7
"""Weight of an event's neighbours against those of the event after it."""

_OCCURRENCES_PER_BLOCK = 500_000


def find_neighbours(
    store: TokenStore,
    split: Split,
    num_rows: int,
    *,
    limit: int,
    window: int = 10,
    backward: float = 0.3,
) -> sparse.csr_array:
    """The `limit` best neighbours of each item, fp32 `[I, I]`, best first within a row.

    Two events `d` apart count `1 / d` from the earlier item to the later, and `backward` times that
    from the later to the earlier (1: symmetric, 0: directional); an item is not its own neighbour.
    A score is the sum of a pair over the occurrences of the item: how much of the neighbour an
    occurrence has beside it.
    """
    positions_T = training_positions(store, split)
    items_T = store.items_T[positions_T]
    users_T = np.repeat(np.arange(store.num_users), split.train_end_U - store.offsets_U[:-1])
    counts_I = np.bincount(items_T, minlength=num_rows)
    offsets = {d: 1 / d for d in range(1, window + 1)}
    if backward:
        offsets |= {-d: backward / d for d in range(1, window + 1)}

    blocks = []
    by_item_T = np.argsort(items_T, kind="stable")
    ends_I = np.cumsum(counts_I)
    for first, last in blocks_of(counts_I, _OCCURRENCES_PER_BLOCK):
        places = by_item_T[ends_I[first] - counts_I[first] : ends_I[last - 1]]
        pairs = _count_pairs(items_T, users_T, places, offsets, num_rows)[first:last]
        rows = np.repeat(np.arange(first, last), np.diff(pairs.indptr))
        pairs.data /= counts_I[rows]
        blocks.append(keep_best(pairs, limit))
    neighbours: sparse.csr_array = sparse.vstack(blocks, format="csr")
    return neighbours


def _count_pairs(
    items_T: np.ndarray,
    users_T: np.ndarray,
    places: np.ndarray,
    offsets: dict[int, float],
    num_rows: int,
) -> sparse.csr_array:
    """Weighted pairs of the items at `places` with those at each offset, fp32 `[I, I]`."""
    rows, columns, weights = [], [], []
    for offset, weight in offsets.items():
        here = places[(places + offset >= 0) & (places + offset < len(items_T))]
        there = here + offset
        is_pair = (users_T[here] == users_T[there]) & (items_T[here] != items_T[there])
        rows.append(items_T[here[is_pair]])
        columns.append(items_T[there[is_pair]])
        weights.append(np.full(len(rows[-1]), weight, np.float32))
    coordinates = (np.concatenate(rows), np.concatenate(columns))
    pairs = sparse.coo_array(
        (np.concatenate(weights), coordinates), shape=(num_rows, num_rows), dtype=np.float32
    )
    return pairs.tocsr()
