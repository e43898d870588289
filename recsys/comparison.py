"""Two rankings of the same users' targets, compared pair by pair."""

from dataclasses import dataclass

import numpy as np

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
    ours, theirs = accuracy(our_ranks_N), accuracy(their_ranks_N)
    if metric not in ours:
        raise ValueError(f"There is no metric {metric!r}; choose one of: {', '.join(ours)}.")

    pairs_N2 = np.stack([ours[metric], theirs[metric]], axis=1)
    our_R, their_R = resampled_means(pairs_N2, seed=seed, num_resamples=num_resamples).T
    our_mean, their_mean = pairs_N2.mean(axis=0)
    difference = _interval(our_mean - their_mean, our_R - their_R)
    if their_R.min() == 0:
        return Comparison(metric, difference, None)
    return Comparison(metric, difference, _interval(our_mean / their_mean - 1, our_R / their_R - 1))


def _interval(estimate: float, resamples_R: np.ndarray) -> Interval:
    low, high = np.quantile(resamples_R, (0.025, 0.975))
    return Interval(float(estimate), float(low), float(high))
