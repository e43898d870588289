"""How far the present has moved away from a reference period, as one number a measure.

A measure is a function of counts that add up over users and days, so that they can be gathered
anywhere in any order. `drift_null` says how large the number becomes when nothing moved. Axes
beside those of `recsys`:

    G  groups of users      P  days of a window
    W  windows of time      K  counts of a measure (here: not results)
    R  resamples
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import gammaln

Kind = Literal["shares", "rise", "fall", "coverage"]

SMOOTHING = 0.5
"""Events that each bin gets on top, spread as both periods together are."""
HEAD, TORSO, TAIL, UNSEEN = range(4)
POPULARITY_LABELS = ("head", "torso", "tail", "unseen")
_HEAD_SHARE, _TORSO_SHARE = 0.5, 0.9


@dataclass(frozen=True)
class Measure:
    """What is watched.

    shares: counts are a histogram, drift is its PSI.
    rise, fall: counts are (without, with) something; drift is by how much its share rose or fell,
        below 0 where it went the other way.
    coverage: counts are the number of lists, then of those that show each of some items; drift is
        the difference of `covered_share`, without its sign.
    """

    name: str
    kind: Kind
    labels: tuple[str, ...]
    """What each count is of, `[K]`."""

    @property
    def is_squared(self) -> bool:
        """Whether drift grows with the square of what shares differ by."""
        return self.kind == "shares"


def measure_drift(measure: Measure, reference_K: np.ndarray, current_K: np.ndarray) -> np.ndarray:
    """Drift of one period of counts from another, float64 `[...]` of counts `[..., K]`."""
    if measure.kind == "shares":
        return psi(reference_K, current_K)
    if measure.kind == "coverage":
        reference, current = covered_shares(reference_K, current_K)
        difference: np.ndarray = np.abs(current - reference)
        return difference
    rise: np.ndarray = share_with(current_K) - share_with(reference_K)
    return rise if measure.kind == "rise" else -rise


def comparable_size(measure: Measure, reference_K: np.ndarray, current_K: np.ndarray) -> np.ndarray:
    """Number of events (lists, for coverage) that both periods are worth when they are compared:
    the noise of a share's difference has the variance of a share of so many, float64 `[...]`.
    """
    num_reference, num_current = (
        counts_K[..., 0] if measure.kind == "coverage" else counts_K.sum(axis=-1)
        for counts_K in (reference_K, current_K)
    )
    both = np.maximum(num_reference + num_current, 1)
    size: np.ndarray = num_reference * (num_current / both)
    return size


def psi(reference_K: np.ndarray, current_K: np.ndarray) -> np.ndarray:
    """Population stability index of two histograms `[..., K]`, in nats: 0 where shares are equal.

    The same both ways round. A bin that one side lacks (a category that is new, or gone) is kept
    finite by `SMOOTHING`; one that both lack counts nothing.
    """
    p_K, q_K = smoothed_shares(reference_K, current_K)
    found: np.ndarray = ((q_K - p_K) * _log_ratio(q_K, p_K)).sum(axis=-1)
    return found


def jensen_shannon(reference_K: np.ndarray, current_K: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence of two histograms `[..., K]` in bits, smoothed as in `psi`: 0 where
    shares are equal, below 1. Source: Lin (1991), doi:10.1109/18.61115.
    """
    p_K, q_K = smoothed_shares(reference_K, current_K)
    middle_K = (p_K + q_K) / 2
    both = p_K * _log_ratio(p_K, middle_K) + q_K * _log_ratio(q_K, middle_K)
    found: np.ndarray = np.maximum(both.sum(axis=-1) / (2 * np.log(2)), 0.0)
    return found


def smoothed_shares(reference_K: np.ndarray, current_K: np.ndarray) -> tuple[np.ndarray, ...]:
    """Shares of both histograms. Either gets `SMOOTHING * K` events on top that are spread as both
    together are: equal shares stay equal however much one side outnumbers the other.
    """
    both_K = reference_K + current_K
    pooled_K = both_K / np.maximum(both_K.sum(axis=-1, keepdims=True), 1)
    extra = SMOOTHING * both_K.shape[-1]
    reference, current = (
        (counts_K + extra * pooled_K) / (counts_K.sum(axis=-1, keepdims=True) + extra)
        for counts_K in (reference_K, current_K)
    )
    return reference, current


def share_with(counts_K: np.ndarray) -> np.ndarray:
    """Share of the second of two counts `[..., 2]`; 0 where there are none."""
    share: np.ndarray = counts_K[..., 1] / np.maximum(counts_K.sum(axis=-1), 1)
    return share


def covered_shares(reference_K: np.ndarray, current_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of both periods the share of items that so many lists show as are half of the smaller one."""
    num_lists = np.minimum(reference_K[..., 0], current_K[..., 0]) // 2
    return covered_share(reference_K, num_lists), covered_share(current_K, num_lists)


def covered_share(counts_K: np.ndarray, num_lists: np.ndarray) -> np.ndarray:
    """Expected share of items that `num_lists` lists, drawn of all, show.

    More lists show more items; for equally many the shares can be compared. Source: Hurlbert
    (1971), rarefaction, doi:10.2307/1934145.

    Args:
        counts_K: number of lists, then of those that show each item, `[..., K]`.
        num_lists: `[...]`, at most the number of lists.
    """
    total, drawn = counts_K[..., :1].astype(np.float64), np.asarray(num_lists)[..., None]
    others_K = total - counts_K[..., 1:]
    left_K = others_K - drawn
    log_missed_K = (
        gammaln(others_K + 1)
        - gammaln(np.maximum(left_K, 0) + 1)
        - gammaln(total + 1)
        + gammaln(total - drawn + 1)
    )
    missed: np.ndarray = np.where(left_K < 0, 0.0, np.exp(np.minimum(log_missed_K, 0.0)))
    share: np.ndarray = 1 - missed.mean(axis=-1)
    return share


def popularity_buckets(counts_I: np.ndarray) -> np.ndarray:
    """HEAD for the items that half of the events fall on, TORSO for those of the next 40 %, TAIL
    for the rest, UNSEEN for items without any; uint8 `[I]`.
    """
    order = np.argsort(-counts_I, kind="stable")
    before = np.cumsum(counts_I[order]) - counts_I[order]
    share_before = before / max(1, counts_I.sum())
    buckets_I = np.empty(len(counts_I), np.uint8)
    buckets_I[order] = np.searchsorted((_HEAD_SHARE, _TORSO_SHARE), share_before, side="right")
    buckets_I[counts_I == 0] = UNSEEN
    return buckets_I


def _log_ratio(p_K: np.ndarray, q_K: np.ndarray) -> np.ndarray:
    """Natural logarithm of `p / q`, 0 where there is no p."""
    ratio_K = np.divide(p_K, q_K, out=np.ones_like(p_K), where=p_K > 0)
    logarithm_K: np.ndarray = np.log(ratio_K)
    return logarithm_K
