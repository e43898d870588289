"""Metrics as ranx or RecTools takes them; `benchmarks.metrics_check` runs this file in the peer's
own environment, where nothing of ours can be imported.

    python metrics_peers.py ranx rankings.npz answers.npz
"""

import sys
from collections.abc import Mapping

import numpy as np

CUTOFFS = (5, 10, 20)


def ask_ranx(rankings: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Values of each user."""
    from ranx import Qrels, Run, evaluate

    # Padded, so that the order of text is that of numbers.
    users = [f"u{user:06d}" for user in range(len(rankings["targets"]))]
    relevant = {user: {str(item): 1} for user, item in zip(users, rankings["targets"], strict=True)}
    run = {
        user: {str(item): float(-place) for place, item in enumerate(items)}
        for user, items in zip(users, rankings["lists"], strict=True)
    }
    names = {"HR": "hit_rate", "NDCG": "ndcg", "MRR": "mrr"}
    metrics = {f"{ours}@{k}": f"{theirs}@{k}" for ours, theirs in names.items() for k in CUTOFFS}
    found = evaluate(Qrels(relevant), Run(run), list(metrics.values()), return_mean=False)
    return {ours: np.asarray(found[theirs], float) for ours, theirs in metrics.items()}


def ask_rectools(rankings: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Values of each user, and what the lists of ten are like."""
    import pandas as pd
    from rectools.metrics import (
        MRR,
        NDCG,
        CatalogCoverage,
        HitRate,
        IntraListDiversity,
        MeanInvUserFreq,
        PairwiseHammingDistanceCalculator,
    )

    num_users, length = rankings["lists"].shape
    users = np.arange(num_users)
    lists = pd.DataFrame(
        {
            "user_id": np.repeat(users, length),
            "item_id": rankings["lists"].ravel(),
            "rank": np.tile(np.arange(1, length + 1), num_users),
        }
    )
    targets = pd.DataFrame({"user_id": users, "item_id": rankings["targets"]})
    found = {}
    for k in CUTOFFS:
        metrics = {
            "HR": HitRate(k=k),
            "NDCG": NDCG(k=k, divide_by_achievable=True),
            "MRR": MRR(k=k),
        }
        for name, metric in metrics.items():
            of_users = metric.calc_per_user(lists, targets)
            found[f"{name}@{k}"] = of_users.reindex(users).to_numpy(float)

    items = np.arange(len(rankings["counts"]))
    # Every event, and one more of each item, by a user of its own: users of an item are then its
    # events, as our novelty counts them.
    events = pd.DataFrame({"item_id": np.repeat(items, rankings["counts"] + 1)})
    events["user_id"] = np.arange(len(events))
    categories = pd.DataFrame({"category": rankings["categories"]}, index=items)
    distances = PairwiseHammingDistanceCalculator(categories)
    found["coverage@10"] = CatalogCoverage(k=10, normalize=True).calc(lists, items)
    found["novelty@10"] = MeanInvUserFreq(k=10).calc(lists, events)
    found["diversity@10"] = IntraListDiversity(k=10, distance_calculator=distances).calc(lists)
    return {name: np.atleast_1d(values) for name, values in found.items()}


if __name__ == "__main__":
    _, peer, source, target = sys.argv
    ask = {"ranx": ask_ranx, "rectools": ask_rectools}[peer]
    np.savez(target, **ask(np.load(source)))
