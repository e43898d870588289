"""Two rankings of the same users' targets, compared pair by pair."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys.metrics import Interval, accuracy, resampled_means


@dataclass(frozen=True)
class Comparison:
    """`difference` is ours minus theirs; `lift` the same relative to theirs (None where theirs is
    0).
    """

    metric: str
    difference: Interval
    lift: Interval | None

    @property
    def is_significant(self) -> bool:
        """The 95 % interval of the difference excludes 0."""
        return self.difference.low > 0 or self.difference.high < 0

    @property
    def is_better(self) -> bool:
        """Ours is above theirs, beyond noise."""
        return self.difference.low > 0


def compare(
    our_ranks_N: np.ndarray,
    their_ranks_N: np.ndarray,
    *,
    metric: str = "NDCG@10",
    seed: int = 0,
    num_resamples: int = 1000,
) -> Comparison:
    """Paired bootstrap over users: both rankings keep their values of a drawn user together.

    Args:
        our_ranks_N: rank of each user's target, from 1.
        their_ranks_N: ranks of the same targets in the same order.
        metric: one of the names of `metrics.accuracy`.

    Raises: ValueError when the users are not as many, or the metric is unknown.
    """
    if our_ranks_N.shape != their_ranks_N.shape:
        raise ValueError(
            f"A paired comparison needs the same users: {len(our_ranks_N)} ranks against "
            f"{len(their_ranks_N)}."
        )
    pairs_N2 = np.stack([_values(our_ranks_N, metric), _values(their_ranks_N, metric)], axis=1)
    return _compare_values(pairs_N2, metric, seed, num_resamples)


def compare_seeds(
    our_ranks_SN: np.ndarray,
    their_ranks_SN: np.ndarray,
    *,
    metric: str = "NDCG@10",
    seed: int = 0,
    num_resamples: int = 1000,
) -> Comparison:
    """As `compare`, of several trainings each: a user's value is the mean over the S trainings.

    The interval tells how far other users would have changed the difference of these trainings; it
    knows nothing of other seeds, for which the differences of single seeds are there to be read.

    Raises: ValueError when the users are not as many, or the metric is unknown.
    """
    if our_ranks_SN.shape[1:] != their_ranks_SN.shape[1:]:
        raise ValueError(
            f"A paired comparison needs the same users: {our_ranks_SN.shape[1]} ranks against "
            f"{their_ranks_SN.shape[1]}."
        )
    pairs_N2 = np.stack(
        [_mean_over_seeds(ranks_SN, metric) for ranks_SN in (our_ranks_SN, their_ranks_SN)], axis=1
    )
    return _compare_values(pairs_N2, metric, seed, num_resamples)


def _mean_over_seeds(ranks_SN: np.ndarray, metric: str) -> np.ndarray:
    values_N: np.ndarray = np.mean([_values(ranks_N, metric) for ranks_N in ranks_SN], axis=0)
    return values_N


def _values(ranks_N: np.ndarray, metric: str) -> np.ndarray:
    values = accuracy(ranks_N)
    if metric not in values:
        raise ValueError(f"There is no metric {metric!r}; choose one of: {', '.join(values)}.")
    return values[metric]


def _compare_values(pairs_N2: np.ndarray, metric: str, seed: int, num_resamples: int) -> Comparison:
    our_R, their_R = resampled_means(pairs_N2, seed=seed, num_resamples=num_resamples).T
    our_mean, their_mean = pairs_N2.mean(axis=0)
    difference = _interval(our_mean - their_mean, our_R - their_R)
    if their_R.min() == 0:
        return Comparison(metric, difference, None)
    return Comparison(metric, difference, _interval(our_mean / their_mean - 1, our_R / their_R - 1))


def find_target_difference(ours: pa.Table, theirs: pa.Table) -> str | None:
    """What keeps two runs from being compared, in words; None where they rank the same targets.

    Both tables have the columns user_id and item_id, a row a user, in any order.
    """
    rows = _match_users(ours, theirs)
    if rows.null_count or len(ours) != len(theirs):
        return (
            f"{len(ours):,} users are ranked against {len(theirs):,}, and "
            f"{len(ours) - rows.null_count:,} of them are the same"
        )
    differs = pc.not_equal(_as_text(ours, "item_id"), _as_text(theirs, "item_id").take(rows))
    num_others = pc.sum(differs).as_py()
    if num_others:
        return f"{num_others:,} of the {len(ours):,} users stand before another item"
    return None


def align_ranks(ours: pa.Table, theirs: pa.Table, column: str) -> np.ndarray:
    """Their ranks in the order of our users, int32 `[N]`.

    Raises: ValueError when the targets differ.
    """
    difference = find_target_difference(ours, theirs)
    if difference:
        raise ValueError(f"Two runs are compared on the same targets alone: {difference}.")
    ranks: np.ndarray = theirs[column].to_numpy()[_match_users(ours, theirs).to_numpy()]
    return ranks


def _match_users(ours: pa.Table, theirs: pa.Table) -> pa.Array:
    """Row of `theirs` for each row of `ours`, null where the user is not there."""
    return pc.index_in(_as_text(ours, "user_id"), _as_text(theirs, "user_id"))


def _as_text(table: pa.Table, column: str) -> pa.Array:
    return table[column].combine_chunks().cast(pa.string())


def _interval(estimate: float, resamples_R: np.ndarray) -> Interval:
    low, high = np.quantile(resamples_R, (0.025, 0.975))
    return Interval(float(estimate), float(low), float(high))
