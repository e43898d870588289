"""Orders events by user and time: no more is sorted than is out of order.

A file of the lake holds its users together, and later files hold later events: then rows are only
grouped by user, and users who are found out of order are mended. Rows that come scattered are first
sorted by user and time as far as 48 bits tell them, which is three passes over the rows.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.integer[Any]]
Order = NDArray[np.int64]

_DIGIT_BITS = 16
_KEY_BITS = 48
_SAMPLE = 2**14
"""First rows, whose users tell whether rows are scattered."""


def chronological_order(user: Ints, timestamp_us: Ints, ingested_us: Ints, arrival: Ints) -> Order:
    """Row order by user, timestamp, ingested_at, arrival; all arguments are `[E]`.

    `user` holds codes from 0, `arrival` tells rows of one ingest apart.
    """
    keys = (timestamp_us, ingested_us, arrival)
    is_scattered = np.count_nonzero(np.diff(user[:_SAMPLE])) > _SAMPLE // 2
    order = _rough_order(user, timestamp_us) if is_scattered else radix_order(user)
    rows = _of_disordered_users(order, user, keys)
    if len(rows):
        chosen = order[rows]
        order[rows] = chosen[np.lexsort((*(key[chosen] for key in keys[::-1]), user[chosen]))]
    return order


def radix_order(keys: Ints) -> Order:
    """A stable order of integers from 0 on: NumPy sorts 16 bits at a time in linear time."""
    if np.all(keys[1:] >= keys[:-1]):
        return np.arange(len(keys))
    order: Order | None = None
    for shift in range(0, int(keys.max()).bit_length(), _DIGIT_BITS):
        digits = (keys >> shift).astype(np.uint16)
        if order is None:
            order = np.argsort(digits, kind="stable")
        else:
            order = order[np.argsort(digits[order], kind="stable")]
    assert order is not None  # keys that are all 0 are in order
    return order


def run_starts(*keys: Ints) -> NDArray[np.int64]:
    """Index of each row that differs from the one before in any of the keys, row 0 included."""
    starts = np.ones(len(keys[0]), bool)
    starts[1:] = keys[0][1:] != keys[0][:-1]
    for key in keys[1:]:
        starts[1:] |= key[1:] != key[:-1]
    return np.flatnonzero(starts)


def _rough_order(user: Ints, timestamp_us: Ints) -> Order:
    """By user, and by time to the milliseconds that fit the key beside the user."""
    lowest = timestamp_us.min()
    user_bits = int(user.max()).bit_length()
    time_bits = (int(timestamp_us.max()) - int(lowest)).bit_length()
    dropped = max(0, user_bits + time_bits - _KEY_BITS)
    time = (timestamp_us - lowest) >> dropped
    return radix_order((user.astype(np.int64) << (time_bits - dropped)) | time)


def _of_disordered_users(order: Order, user: Ints, keys: tuple[Ints, ...]) -> Order:
    """Positions in `order`, which groups by user, of all rows of users who are out of order."""
    users = user[order]
    is_wrong = _is_wrong(order, users, keys)
    if not is_wrong.any():
        return np.empty(0, np.int64)
    flags = np.zeros(int(users[-1]) + 1, bool)
    flags[users[1:][is_wrong]] = True
    return np.flatnonzero(flags[users])


def _is_wrong(order: Order, users: Ints, keys: tuple[Ints, ...]) -> NDArray[np.bool_]:
    """Whether a row should stand before the one that it follows: `[E - 1]`."""
    first = keys[0][order]
    step = np.diff(first)
    same_user = users[1:] == users[:-1]
    is_wrong: NDArray[np.bool_] = same_user & (step < 0)
    # The further keys are looked at where the first one ties, which is seldom.
    ties = np.flatnonzero(same_user & (step == 0))
    is_open = np.ones(len(ties), bool)
    for key in keys[1:]:
        step = key[order[ties + 1]] - key[order[ties]]
        is_wrong[ties] |= is_open & (step < 0)
        is_open &= step == 0
    return is_wrong
