"""The same metric for kinds of users and requests: where a model is good and where it is not."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from recsys.context import UNKNOWN, ContextEncoder
from recsys.metrics import interval, ndcg
from recsys.tokens import TokenStore

_HISTORY_EDGES = (1, 5, 10, 20, 50, 100)
_POPULARITY_EDGES = (0, 1, 10, 100, 1000)
_SLICED_FIELDS = ("segment", "device")


def slice_labels(
    store: TokenStore,
    users_N: np.ndarray,
    targets_N: np.ndarray,
    counts_I: np.ndarray,
    context: ContextEncoder,
) -> dict[str, np.ndarray]:
    """A label for each target, object `[N]`, by events before it, by training events of its item
    (0: a cold item), and by segment and device where these are context fields.
    """
    labels = {
        "history_length": _label_ranges(targets_N - store.offsets_U[users_N], _HISTORY_EDGES),
        "item_training_events": _label_ranges(
            counts_I[store.items_T[targets_N]], _POPULARITY_EDGES
        ),
    }
    for name in _SLICED_FIELDS:
        if name in context.fields:
            values = np.array(["unknown", *context.vocabularies[name]], object)
            codes_N = store.context_TF[targets_N, context.fields.index(name)]
            labels[name] = values[np.where(codes_N < len(values), codes_N, UNKNOWN)]
    return labels


def slice_ndcg(
    ranks_N: np.ndarray, labels: Mapping[str, np.ndarray], *, k: int = 10, seed: int = 0
) -> dict[str, dict[str, dict[str, Any]]]:
    """NDCG@k of each label of each slicing: number of users, mean, and 95 % interval."""
    values_N = ndcg(ranks_N, k)
    return {
        name: {
            str(label): {
                "num_users": int((labels_N == label).sum()),
                **asdict(interval(values_N[labels_N == label], seed=seed)),
            }
            for label in dict.fromkeys(labels_N.tolist())
        }
        for name, labels_N in labels.items()
    }


def _label_ranges(numbers: np.ndarray, edges: tuple[int, ...]) -> np.ndarray:
    upper = [*(edge - 1 for edge in edges[1:]), None]
    names = [
        f"{low}+" if high is None else str(low) if low == high else f"{low}-{high}"
        for low, high in zip(edges, upper, strict=True)
    ]
    return np.array(names, object)[np.searchsorted(edges, numbers, side="right") - 1]
