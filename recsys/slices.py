"""The same metric for kinds of users and requests: where a model is good and where it is not."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from recsys.context import NO_TIME, UNKNOWN, ContextConfig, ContextEncoder
from recsys.metrics import interval, ndcg
from recsys.tokens import TokenStore

_HISTORY_EDGES = (1, 5, 10, 20, 50, 100)
_POPULARITY_EDGES = (0, 1, 10, 100, 1000)
_HOUR_US = 3_600_000_000
_PAUSES_US = {
    "under 1 min": 0,
    "1-10 min": _HOUR_US // 60,
    "10-60 min": _HOUR_US // 6,
    "1-24 h": _HOUR_US,
    "1-7 days": 24 * _HOUR_US,
    "over 7 days": 7 * 24 * _HOUR_US,
}
_CLOCK = {
    "hour": tuple(f"{hour:02d}" for hour in range(24)),
    "weekday": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
}


@dataclass(frozen=True)
class Slicing:
    """One way to divide N targets."""

    names: tuple[str, ...]
    """In the order in which they are shown."""
    codes_N: np.ndarray
    """Index of each target's name."""


def slice_targets(
    store: TokenStore,
    users_N: np.ndarray,
    targets_N: np.ndarray,
    counts_I: np.ndarray,
    context: ContextEncoder,
) -> dict[str, Slicing]:
    """Targets by events before them, by training events of their item (0: a cold item), by the time
    since the event before, by hour and weekday on the shop's clock whether the model reads them or
    not, and by each categorical field of the encoder of the store: device, segment, what the shop
    added. Where no target has a time there are none by time, hour and weekday.
    """
    slicings = {
        "history_length": _by_range(targets_N - store.offsets_U[users_N], _HISTORY_EDGES),
        "item_training_events": _by_range(counts_I[store.items_T[targets_N]], _POPULARITY_EDGES),
    }
    times_us = store.timestamps_T[targets_N]
    if (times_us != NO_TIME).any():
        slicings["time_since_last_event"] = _by_pause(times_us, store.timestamps_T[targets_N - 1])
        slicings |= _by_clock(times_us, context.config.timezone)
    for f, name in enumerate(context.config.categorical):
        slicings[name] = _by_code(store.context_TF[targets_N, f], context.vocabularies[name])
    return slicings


def slice_ndcg(
    ranks_N: np.ndarray, slicings: Mapping[str, Slicing], *, k: int = 10, seed: int = 0
) -> dict[str, dict[str, dict[str, Any]]]:
    """NDCG@k of each part of each slicing that has a target: number of users, mean, and 95 %
    interval, in the order of the names.
    """
    values_N = ndcg(ranks_N, k)
    return {
        title: {
            slicing.names[code]: _facts(values_N[slicing.codes_N == code], seed)
            for code in np.unique(slicing.codes_N)
        }
        for title, slicing in slicings.items()
    }


def _facts(values_N: np.ndarray, seed: int) -> dict[str, Any]:
    return {"num_users": len(values_N), **asdict(interval(values_N, seed=seed))}


def _by_range(numbers_N: np.ndarray, edges: tuple[int, ...]) -> Slicing:
    upper = [*(edge - 1 for edge in edges[1:]), None]
    names = [
        f"{low}+" if high is None else str(low) if low == high else f"{low}-{high}"
        for low, high in zip(edges, upper, strict=True)
    ]
    return Slicing(tuple(names), _range_of(numbers_N, edges))


def _range_of(numbers_N: np.ndarray, edges: tuple[int, ...]) -> np.ndarray:
    return np.searchsorted(edges, numbers_N, side="right") - 1


def _by_pause(times_us: np.ndarray, previous_us: np.ndarray) -> Slicing:
    pauses_us = np.maximum(times_us - previous_us, 0)
    return Slicing(tuple(_PAUSES_US), _range_of(pauses_us, tuple(_PAUSES_US.values())))


def _by_clock(times_us: np.ndarray, timezone: str) -> dict[str, Slicing]:
    config = ContextConfig(categorical=(), time=("hour", "weekday"), timezone=timezone)
    codes_NF = ContextEncoder(config, {}).encode(times_us, times_us, {})
    return {name: _by_code(codes_NF[:, f], _CLOCK[name]) for f, name in enumerate(config.fields)}


def _by_code(codes_N: np.ndarray, values: tuple[str, ...]) -> Slicing:
    """By a context field, whose code 0 means unknown; that comes last unless it is a value too."""
    names = tuple(dict.fromkeys((*values, "unknown")))
    is_known_N = (codes_N != UNKNOWN) & (codes_N <= len(values))
    return Slicing(
        names, np.where(is_known_N, codes_N.astype(np.int64) - 1, names.index("unknown"))
    )
