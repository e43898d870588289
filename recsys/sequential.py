"""What may be looked at every hour: intervals that hold at all looks together, and a check of the
sample ratio that does.

An interval of a fixed end holds at one look; who looks often and stops at the first one without 0
errs far more often than it says. These hold at all looks at once, however many there are and
whenever one stops: Robbins' normal mixture, brought to A/B tests by Johari et al., "Always Valid
Inference: Continuous Monitoring of A/B Tests" (Operations Research 70(3), 2022, arXiv 1512.04922),
and to means whose variance is estimated by Waudby-Smith et al., "Time-uniform central limit theory
and asymptotic confidence sequences" (Annals of Statistics 52(6), 2024, arXiv 2103.06476). They are
as true as the normal distribution is: `measure_gap` says nothing before there are successes enough.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from recsys.experiment import ALARM_BELOW, Metric, Moments
from recsys.metrics import Interval

LEAST_SUCCESSES = 20
"""Expected in the smaller arm if both are alike; a distribution of fewer is not nearly normal."""
_PRIOR_USERS = 1000
"""So many users the prior of the sample ratio is worth: shares that are off by a tenth are found
early, and smaller faults later."""


@dataclass(frozen=True)
class Gap:
    """A metric of treatment, less the bar that control sets; above 0 it is over the bar."""

    control: float
    treatment: float
    interval: Interval
    """Of treatment less (1 + least uplift) x control; it holds at all looks together."""

    @property
    def relative(self) -> Interval | None:
        """To control, whose own noise is left out; None where that has no success."""
        if self.control == 0:
            return None
        gap, scale = self.interval, 1 / self.control
        return Interval(gap.mean * scale, gap.low * scale, gap.high * scale)


@dataclass(frozen=True)
class SequentialRatio:
    """Whether each arm has its share of the users, however often that is asked."""

    num_control: int
    num_treatment: int
    expected_share: float
    """Of treatment among both."""
    evidence: float
    """How often more likely the counts are under some other share; infinite for very much."""

    @property
    def is_alarm(self) -> bool:
        """No gap can be read; without a fault no look ever says so in 999 of 1,000 canaries."""
        return self.evidence > 1 / ALARM_BELOW


class Sums(NamedTuple):
    """What a metric needs of one arm: sums over its users, each a number or `[looks]`."""

    users: Any
    above: Any
    below: Any
    above_above: Any
    above_below: Any
    below_below: Any

    @classmethod
    def of(cls, arm: Moments, metric: Metric) -> "Sums":
        """At one look."""
        above, below = metric.above, metric.below
        return cls(
            arm.num_users,
            arm.total(above),
            arm.total(below),
            arm.product(above, above),
            arm.product(above, below),
            arm.product(below, below),
        )


def measure_gap(
    control: Moments,
    treatment: Moments,
    metric: Metric,
    *,
    wanted: float,
    error_rate: float,
    least_uplift: float = 0.0,
) -> Gap | None:
    """A metric of treatment against control; None while there is too little to be said. For the
    arguments see `measure_gaps`.
    """
    theirs, ours = Sums.of(control, metric), Sums.of(treatment, metric)
    gaps, radii = measure_gaps(
        theirs, ours, wanted=wanted, error_rate=error_rate, least_uplift=least_uplift
    )
    gap, radius = float(gaps), float(radii)
    if math.isnan(gap):
        return None
    interval = Interval(gap, gap - radius, gap + radius)
    return Gap(theirs.above / theirs.below, ours.above / ours.below, interval)


def measure_gaps(
    control: Sums,
    treatment: Sums,
    *,
    wanted: ArrayLike,
    error_rate: float,
    least_uplift: float = 0.0,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Treatment less the bar, and half the width of the interval around it; NaN where there is too
    little to be said.

    Users are what is counted, by the delta method of `recsys.experiment`. Their variance is taken
    to be the same in both arms: that of a small arm alone would be 0 as long as nobody there has
    clicked.

    Args:
        wanted: the gap that the interval is made narrowest for, in units of the metric.
        error_rate: of all looks together.
        least_uplift: relative; control times one more than this is the bar.
    """
    theirs, ours = (
        Sums(*(np.asarray(one, np.float64) for one in arm)) for arm in (control, treatment)
    )
    rate = (theirs.above + ours.above) / np.maximum(1, theirs.below + ours.below)
    is_enough = (np.minimum(theirs.users, ours.users) >= 2) & (
        rate * np.minimum(theirs.below, ours.below) >= LEAST_SUCCESSES
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        squares = _residual_squares(theirs) + _residual_squares(ours)
        user_variance = squares / (theirs.users + ours.users - 2)
        bar = 1 + least_uplift
        gap = ours.above / ours.below - bar * theirs.above / theirs.below
        variance = user_variance * (
            ours.users / ours.below**2 + bar**2 * theirs.users / theirs.below**2
        )
    variance = np.where(is_enough, variance, np.nan)
    return np.where(is_enough, gap, np.nan), mixture_radius(variance, wanted, error_rate)


def mixture_radius(
    variance: ArrayLike, wanted: ArrayLike, error_rate: float
) -> NDArray[np.float64]:
    """Half the width of an interval around an estimate, which holds at all looks together.

    Args:
        variance: of the estimate at a look, or at each of several.
        wanted: the standard deviation of the mixture: the size of what is looked for.
    """
    v = np.asarray(variance, np.float64)
    ratio = np.square(wanted) / np.where(v == 0, 1.0, v)
    square = 2 * v * (1 + 1 / ratio) * (np.log1p(ratio) / 2 - math.log(error_rate))
    return np.sqrt(square)


def check_ratio_again(
    num_control: int, num_treatment: int, expected_share: float
) -> SequentialRatio:
    """The users of both arms against the share that treatment was given among them: a beta mixture,
    exact at all looks together (Lindon & Malek, "Anytime-Valid Inference for Multinomial Count
    Data", NeurIPS 2022, arXiv 2011.03567).
    """
    ours, theirs = _PRIOR_USERS * expected_share, _PRIOR_USERS * (1 - expected_share)
    log_evidence = (
        _log_beta(ours + num_treatment, theirs + num_control)
        - _log_beta(ours, theirs)
        - num_treatment * math.log(expected_share)
        - num_control * math.log1p(-expected_share)
    )
    evidence = math.exp(log_evidence) if log_evidence < 700 else math.inf
    return SequentialRatio(num_control, num_treatment, expected_share, evidence)


def _residual_squares(arm: Sums) -> NDArray[np.float64]:
    """Squares of what each user's sum is above the mean's share of it, added up."""
    mean = arm.above / arm.below
    squares = arm.above_above - 2 * mean * arm.above_below + mean**2 * arm.below_below
    return np.maximum(0.0, np.asarray(squares, np.float64))


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
