"""How large drift becomes when nothing moved, learned from a calm period, and the thresholds that
follow.

Two things make calm weeks differ. Each meets other users, or the same users in another mood: that
is resampled. Windows of time are shifted within each group of users, all measures at once, and one
window is compared with the others; what a user does in a window stays together, so that events of
one user count as what they are, not as independent. And days differ for all users alike (a feast, a
campaign): where the same days of two windows differ by more than users explain, beyond doubt,
thresholds are raised by that factor.

One rate of false alarms holds for all measures together: Westfall & Young (1993), min-p. A
threshold is a quantile of each measure's own null, the same one for all, as far out as needed for
`false_alarm_rate` of the resamples to exceed any of them. The calm period is itself a sample, so
that further calm weeks exceed them somewhat more often where users are few:
`benchmarks/results/drift.md` has the measured rate.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from recsys.drift import Measure, measure_drift

LEAST_GROUPS = 20
"""Groups of users that must have counts: with fewer, shifts have too little to choose from."""
_PER_DRAW = 250
_NUM_DAY_RESAMPLES = 250
_BEYOND_DOUBT = 0.95

Counts = Mapping[str, np.ndarray]
"""By the name of a measure, counts `[G, W, P, K]`."""


@dataclass(frozen=True)
class Threshold:
    """What drift must exceed to be an alarm."""

    value: float
    quantile: float
    """Of the null, per measure; the rate of alarms over all measures follows from it."""
    usual: float
    """Median of the null."""
    dispersion: float
    """Variance between days, relative to what users explain; 1 where it is not beyond that."""


def can_be_judged(counts: np.ndarray) -> bool:
    """Whether a calm period `[G, W, P, K]` tells enough: every window has counts, and so have
    `LEAST_GROUPS` groups.
    """
    totals_GW = counts.sum(axis=(2, 3))
    enough_groups = np.count_nonzero(totals_GW.sum(axis=1)) >= LEAST_GROUPS
    return bool(enough_groups and (totals_GW.sum(axis=0) > 0).all())


def find_thresholds(
    measures: Sequence[Measure],
    counts: Counts,
    *,
    false_alarm_rate: float,
    num_resamples: int = 4000,
    seed: int = 0,
) -> dict[str, Threshold]:
    """Thresholds of all measures for a window like those of the calm period, against all of it.

    Raises: ValueError for fewer than two windows, or so few resamples that none may be an alarm.
    """
    num_windows = {counts[measure.name].shape[1] for measure in measures}
    if min(num_windows, default=2) < 2:
        raise ValueError("A calm period of one window cannot be compared with itself; take two.")
    if num_resamples * false_alarm_rate < 1:
        raise ValueError(
            f"{num_resamples} resamples do not tell an alarm in {1 / false_alarm_rate:.0f} runs; "
            f"take at least {np.ceil(1 / false_alarm_rate):.0f}."
        )
    if not measures:
        return {}
    null_RM = draw_null(measures, counts, num_resamples=num_resamples, seed=seed)
    num_above = _count_above(null_RM, false_alarm_rate)
    found = {}
    for m, measure in enumerate(measures):
        null_R = np.sort(null_RM[:, m])
        dispersion = find_dispersion(measure, counts[measure.name], seed=seed)
        scale = _scale(measure, counts[measure.name].shape[1], dispersion)
        found[measure.name] = Threshold(
            value=float(scale * null_R[-1 - num_above]),
            quantile=1 - num_above / num_resamples,
            usual=float(scale * np.median(null_R)),
            dispersion=dispersion,
        )
    return found


def draw_null(
    measures: Sequence[Measure], counts: Counts, *, num_resamples: int, seed: int = 0
) -> np.ndarray:
    """Drift of one window from the others where each group's windows are shifted at random, float64
    `[R, M]`; a resample shifts all measures alike.
    """
    num_groups, num_windows = counts[measures[0].name].shape[:2]
    windows = [counts[measure.name].sum(axis=2) for measure in measures]
    generator = np.random.default_rng(seed)
    null = []
    for start in range(0, num_resamples, _PER_DRAW):
        size = min(_PER_DRAW, num_resamples - start)
        shifts_RG = generator.integers(0, num_windows, (size, num_groups))
        chosen = _choose(shifts_RG, num_windows)
        pairs = zip(measures, windows, strict=True)
        null.append(np.stack([_drift_of(one, found, chosen) for one, found in pairs], axis=1))
    return np.concatenate(null)


def find_dispersion(measure: Measure, counts: np.ndarray, *, seed: int = 0) -> float:
    """How much more the same days of different windows differ than shifted users explain, as a
    ratio of variances; 1 where shifts alone do as much in one of twenty cases.

    Args:
        counts: `[G, W, P, K]`.
    """
    num_groups, num_windows = counts.shape[:2]
    generator = np.random.default_rng([seed, 1])
    shifts_RG = generator.integers(0, num_windows, (_NUM_DAY_RESAMPLES, num_groups))
    # The first one shifts nobody: that is what was observed.
    shifts_RG[0] = 0
    strength_R = np.zeros(len(shifts_RG))
    for window in range(num_windows):
        chosen = _choose((shifts_RG + window) % num_windows, num_windows)
        for day in np.moveaxis(counts, 2, 0):
            drift_R = _drift_of(measure, day, chosen)
            strength_R += drift_R if measure.is_squared else drift_R**2
    observed, null_R = strength_R[0], strength_R[1:]
    if observed <= np.quantile(null_R, _BEYOND_DOUBT):
        return 1.0
    return float(max(1.0, observed / null_R.mean()))


def _choose(shifts_RG: np.ndarray, num_windows: int) -> np.ndarray:
    """One-hot rows, float64 `[R, G * W]`: a product with them adds up the window of each group."""
    one_hot = np.arange(num_windows) == shifts_RG[..., None]
    return np.asarray(one_hot.reshape(len(shifts_RG), -1), np.float64)


def _drift_of(measure: Measure, counts_GWK: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Drift of the chosen windows, one a group, from all others; `[R]`."""
    counts_K = counts_GWK.reshape(-1, counts_GWK.shape[2]).astype(np.float64)
    current_RK = chosen @ counts_K
    return measure_drift(measure, counts_K.sum(axis=0) - current_RK, current_RK)


def _count_above(null_RM: np.ndarray, false_alarm_rate: float) -> int:
    """How many resamples may lie above each threshold, so that at most the given share of them lies
    above any.
    """
    num_resamples = len(null_RM)
    # Rank 1 is the largest; of equal values each has the rank of the last, and is no alarm then.
    ranks_RM = np.empty(null_RM.shape, np.int64)
    for m, null_R in enumerate(null_RM.T):
        ranks_RM[:, m] = num_resamples - np.searchsorted(np.sort(null_R), null_R, side="left")
    best_R = np.sort(ranks_RM.min(axis=1))
    # With k allowed, resamples of rank <= k are alarms; one more than that must not be.
    first_beyond = best_R[int(false_alarm_rate * num_resamples)]
    return int(first_beyond - 1)


def _scale(measure: Measure, num_windows: int, dispersion: float) -> float:
    """From one window against the others of the calm period to a further one against all of it.

    The variances are 1 + 1 / (W - 1) and 1 + 1 / W, in units of one window's.
    """
    variance = dispersion * (1 - 1 / num_windows**2)
    return float(variance if measure.is_squared else np.sqrt(variance))
