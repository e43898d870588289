"""How large drift becomes when nothing moved, and whether that of a week is beyond it.

Weeks without drift differ, as each meets other users, or the same ones in another mood. If nothing
moved, the week that is judged is one more of them: exchanged for another one within a group of
users, it leaves everything as likely as it was. So all windows, the judged one among them, are
shifted at random within each group, all measures at once, and one window is compared with the
others as the judged one is. What a user does in a window stays together, so that events of one user
count as what they are, not as independent.

That is a permutation test, in which what was observed is one of the resamples (that shifts
nobody): for windows that can be exchanged its rate of false alarms is exact, however few and
unequal users are; Hoeffding (1952), doi:10.1214/aoms/1177729436, and Phipson & Smyth (2010),
doi:10.2202/1544-6115.1585. Thresholds from the calm weeks alone are estimates, and a new week
exceeds a quantile of few users' luck more often than its name says. What counts are sorted by must
come from all windows or from none, else it tells one from the others. Measured:
`benchmarks/results/drift.md`.

Resamples differ in their numbers of events, and fewer events differ by more: what is compared is
drift in units of the noise of so many events, `comparable_size`. Then a week of half the events is
not an alarm by itself; Chung & Romano (2013), doi:10.1214/13-AOS1090.

One rate of false alarms holds for all measures together: Westfall & Young (1993), min-p. Each is
held against a quantile of its own null, the same one for all, as far out as needed for
`false_alarm_rate` of the resamples to exceed any of them.

Two things lie outside. Days differ for all users alike (a feast, a campaign): where the same days
of two calm windows differ by more than users explain, beyond doubt, thresholds are raised by that
factor. And what a single user does, however much, moves one group only: one in W + 1 resamples does
as much, so that it is an alarm at most about W + 1 times as often as nothing is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor

import numpy as np

from recsys.drift import Measure, comparable_size, measure_drift

LEAST_GROUPS = 20
"""Groups of users that must have counts: with fewer, shifts have too little to choose from."""
_PER_DRAW = 250
_NUM_DAY_RESAMPLES = 250
_BEYOND_DOUBT = 0.95

Counts = Mapping[str, np.ndarray]
"""By the name of a measure."""


@dataclass(frozen=True)
class Judged:
    """Drift of the judged window from the calm ones, and what chance makes of it."""

    drift: float
    threshold: float
    """What drift must exceed to be an alarm."""
    quantile: float
    """Of the null, per measure; the rate of alarms over all measures follows from it."""
    usual: float
    """Median of the null."""
    dispersion: float
    """Variance between days, relative to what users explain; 1 where it is not beyond that."""

    @property
    def is_alarm(self) -> bool:
        return self.drift > self.threshold


def can_be_judged(calm: np.ndarray) -> bool:
    """Whether a calm period `[G, W, P, K]` tells enough: every window has counts, and so have
    `LEAST_GROUPS` groups.
    """
    totals_GW = calm.sum(axis=(2, 3))
    enough_groups = np.count_nonzero(totals_GW.sum(axis=1)) >= LEAST_GROUPS
    return bool(enough_groups and (totals_GW.sum(axis=0) > 0).all())


def least_resamples(num_measures: int, false_alarm_rate: float) -> int:
    """So many that each measure may have one resample beyond its threshold; with fewer, nothing is
    ever an alarm.
    """
    return max(1, ceil(num_measures / false_alarm_rate))


def judge_drift(
    measures: Sequence[Measure],
    calm: Counts,
    current: Counts,
    *,
    false_alarm_rate: float,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, Judged]:
    """Judges a window by a calm period of W windows of the same length.

    Args:
        calm: `[G, W, P, K]` of each measure.
        current: `[G, K]` of each measure.

    Raises: ValueError for fewer than two calm windows, or fewer than `least_resamples`.
    """
    if min((calm[measure.name].shape[1] for measure in measures), default=2) < 2:
        raise ValueError("A calm period of one window does not tell how days differ; take two.")
    needed = least_resamples(len(measures), false_alarm_rate)
    if num_resamples < needed:
        raise ValueError(
            f"{num_resamples} resamples do not tell a false alarm rate of {false_alarm_rate:g} "
            f"over {len(measures)} measures; take at least {needed}."
        )
    if not measures:
        return {}
    windows = {
        measure.name: _join_windows(calm[measure.name], current[measure.name])
        for measure in measures
    }
    null_RM = draw_null(measures, windows, num_resamples=num_resamples, seed=seed)
    num_above = _count_above(null_RM, false_alarm_rate)
    return {
        measure.name: _judge(
            measure,
            windows[measure.name],
            null_RM[:, m],
            num_above,
            find_dispersion(measure, calm[measure.name], seed=seed),
        )
        for m, measure in enumerate(measures)
    }


def draw_null(
    measures: Sequence[Measure], windows: Counts, *, num_resamples: int, seed: int = 0
) -> np.ndarray:
    """Strength of the drift of the last of V windows from the others where each group's windows are
    shifted at random, float64 `[R, M]`; a resample shifts all measures alike. The first of
    `num_resamples` and one more shifts nobody.

    Args:
        windows: `[G, V, K]` of each measure.
    """
    num_groups, num_windows = windows[measures[0].name].shape[:2]
    generator = np.random.default_rng(seed)
    null = []
    for start in range(0, num_resamples + 1, _PER_DRAW):
        size = min(_PER_DRAW, num_resamples + 1 - start)
        shifts_RG = generator.integers(0, num_windows, (size, num_groups))
        if start == 0:
            shifts_RG[0] = 0
        chosen = _choose((shifts_RG - 1) % num_windows, num_windows)
        null.append(np.stack([_strength(one, windows[one.name], chosen) for one in measures], 1))
    return np.concatenate(null)


def find_dispersion(measure: Measure, calm: np.ndarray, *, seed: int = 0) -> float:
    """How much more the same days of different windows differ than shifted users explain, as a
    ratio of variances; 1 where shifts alone do as much in one of twenty cases.

    Args:
        calm: `[G, W, P, K]`.
    """
    num_groups, num_windows = calm.shape[:2]
    generator = np.random.default_rng([seed, 1])
    shifts_RG = generator.integers(0, num_windows, (_NUM_DAY_RESAMPLES, num_groups))
    # The first one shifts nobody: that is what was observed.
    shifts_RG[0] = 0
    strength_R = np.zeros(len(shifts_RG))
    # Of two windows each is as far from the other: one is enough.
    for window in range(num_windows if num_windows > 2 else 1):
        chosen = _choose((shifts_RG + window) % num_windows, num_windows)
        for day in np.moveaxis(calm, 2, 0):
            drift_R = measure_drift(measure, *_sides(day, chosen))
            strength_R += drift_R if measure.is_squared else drift_R**2
    observed, null_R = strength_R[0], strength_R[1:]
    if observed <= np.quantile(null_R, _BEYOND_DOUBT):
        return 1.0
    return float(max(1.0, observed / null_R.mean()))


def _join_windows(calm: np.ndarray, current_GK: np.ndarray) -> np.ndarray:
    """All windows, `[G, V, K]`; the judged one is the last."""
    return np.concatenate([calm.sum(axis=2), current_GK[:, None]], axis=1)


def _judge(
    measure: Measure,
    windows_GVK: np.ndarray,
    null_R: np.ndarray,
    num_above: int,
    dispersion: float,
) -> Judged:
    windows_VK = windows_GVK.sum(axis=0)
    noise = 1 / _events_to_strength(measure, windows_VK[:-1].sum(axis=0), windows_VK[-1])
    raised = dispersion if measure.is_squared else np.sqrt(dispersion)
    return Judged(
        drift=float(noise * null_R[0]),
        threshold=float(noise * raised * np.sort(null_R)[-1 - num_above]),
        quantile=1 - num_above / len(null_R),
        usual=float(noise * raised * np.median(null_R)),
        dispersion=dispersion,
    )


def _choose(windows_RG: np.ndarray, num_windows: int) -> np.ndarray:
    """One-hot rows, float64 `[R, G * V]`: a product with them adds up the window of each group."""
    one_hot = np.arange(num_windows) == windows_RG[..., None]
    return np.asarray(one_hot.reshape(len(windows_RG), -1), np.float64)


def _sides(counts_GVK: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All other windows, and the chosen ones, one a group; each `[R, K]`."""
    counts_K = counts_GVK.reshape(-1, counts_GVK.shape[2]).astype(np.float64)
    current_RK = chosen @ counts_K
    return counts_K.sum(axis=0) - current_RK, current_RK


def _strength(measure: Measure, counts_GVK: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Drift of the chosen windows from the others in units of its noise, `[R]`."""
    sides = _sides(counts_GVK, chosen)
    strength_R: np.ndarray = measure_drift(measure, *sides) * _events_to_strength(measure, *sides)
    return strength_R


def _events_to_strength(
    measure: Measure, reference_K: np.ndarray, current_K: np.ndarray
) -> np.ndarray:
    """One over the noise of drift between so many events, but for a constant factor."""
    size = np.maximum(comparable_size(measure, reference_K, current_K), 1.0)
    strength: np.ndarray = size if measure.is_squared else np.sqrt(size)
    return strength


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
    first_beyond = best_R[floor(false_alarm_rate * num_resamples)]
    return int(first_beyond - 1)
