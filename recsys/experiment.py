"""What one version does better than another: ratios over what their users did, with intervals that
hold for users.

A version is given to a user, and one user's lists are alike; so users are what is counted, and the
variance of a ratio such as clicked lists per list is that of the delta method over users (Deng et
al., "Applying the Delta Method in Metric Analytics", KDD 2018, doi 10.1145/3219819.3219919). All of
it follows from sums over users of products of two columns, which can be added up anywhere.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from recsys.metrics import Interval

COLUMNS = (
    "users",
    "lists",
    "clicked_lists",
    "bought_lists",
    "buyers",
    "before",
    "degraded_lists",
)
"""What is known of a user, C of them: 1, lists seen, of these clicked and bought from, whether any
was bought from, how active the user was before, and lists that a lower rung gave."""
ALARM_BELOW = 0.001
"""A sample ratio this improbable means that something is broken."""
POWER = 0.8

_NORMAL = NormalDist()
_Z = _NORMAL.inv_cdf(0.975)
_NEEDED = _Z + _NORMAL.inv_cdf(POWER)
"""Standard errors that a difference must measure to be found with that power."""


@dataclass(frozen=True)
class Metric:
    """The sum of one column over the sum of another."""

    above: str
    below: str
    meaning: str


METRICS: Mapping[str, Metric] = {
    "click_through": Metric("clicked_lists", "lists", "lists with a click on an item, of all"),
    "conversion": Metric("buyers", "users", "users who bought an item of a list, of all"),
    "bought_lists": Metric("bought_lists", "lists", "lists with an item that was bought, of all"),
    "lists_per_user": Metric("lists", "users", "lists that a user saw"),
}
DEGRADED = Metric("degraded_lists", "lists", "lists that a lower rung gave, of all")
"""What serving did, and not what users did: no uplift is wanted of it."""


@dataclass(frozen=True)
class Moments:
    """Sums over the users of one arm; those of two groups of users add up."""

    products_CC: np.ndarray
    """Of the product of two columns, float64; the first column is 1 for each user."""

    @classmethod
    def of(cls, values_UC: np.ndarray) -> "Moments":
        """From the values of each user, columns as in `COLUMNS`."""
        return cls(values_UC.T @ values_UC)

    @classmethod
    def none(cls) -> "Moments":
        """Of no user."""
        return cls(np.zeros((len(COLUMNS), len(COLUMNS))))

    @property
    def num_users(self) -> int:
        return int(self.products_CC[0, 0])

    def total(self, column: str) -> float:
        """The sum of a column."""
        return float(self.products_CC[0, COLUMNS.index(column)])

    def product(self, first: str, second: str) -> float:
        """The sum of the product of two columns."""
        return float(self.products_CC[COLUMNS.index(first), COLUMNS.index(second)])

    def plus(self, column: str, changes: Mapping[str, float]) -> "Moments":
        """With other columns, times a number each, added to one."""
        matrix_CC = np.eye(len(COLUMNS))
        for name, factor in changes.items():
            matrix_CC[COLUMNS.index(column), COLUMNS.index(name)] += factor
        return Moments(matrix_CC @ self.products_CC @ matrix_CC.T)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.products_CC + other.products_CC)


@dataclass(frozen=True)
class Ratio:
    """A metric of one arm."""

    mean: float
    variance: float
    """Of the mean, by the delta method."""

    @property
    def relative_variance(self) -> float:
        """To the square of the mean. An uplift of every user's rate leaves it as it is."""
        return self.variance / self.mean**2 if self.mean else math.inf

    @property
    def interval(self) -> Interval:
        """95 %."""
        return _around(self.mean, math.sqrt(self.variance))


@dataclass(frozen=True)
class Uplift:
    """A metric of treatment against control; intervals are of 95 %."""

    metric: str
    control: Ratio
    treatment: Ratio
    difference: Interval
    relative: Interval | None
    """To control, by Fieller's theorem; None where control may be 0."""
    p_value: float

    @property
    def is_significant(self) -> bool:
        """The interval of the difference excludes 0."""
        return self.difference.low > 0 or self.difference.high < 0

    @property
    def variance(self) -> float:
        """Of the difference."""
        return self.control.variance + self.treatment.variance

    @property
    def detectable(self) -> float:
        """The smallest relative uplift that as many users show with a power of 80 %, its own share
        of the variance included; infinite where nothing can be found.
        """
        ours, theirs = self.treatment.relative_variance, self.control.relative_variance
        factor = 1 - _NEEDED**2 * ours
        if not factor > 0 or not math.isfinite(theirs):
            return math.inf
        # uplift = needed * sqrt(theirs + ours * (1 + uplift) ** 2), solved for the uplift.
        slope = _NEEDED**2 * ours
        root = math.sqrt(slope**2 + factor * _NEEDED**2 * (theirs + ours))
        return (slope + root) / factor

    def days_needed(self, days_seen: float, wanted: float) -> float:
        """Days after which a relative uplift of `wanted` is found with a power of 80 %, if users
        keep coming as they came; infinite where an arm has no success.
        """
        ours, theirs = self.treatment.relative_variance, self.control.relative_variance
        return days_seen * (_NEEDED / wanted) ** 2 * (theirs + ours * (1 + wanted) ** 2)


@dataclass(frozen=True)
class SampleRatio:
    """Whether each arm has its share of the users."""

    num_control: int
    num_treatment: int
    expected_share: float
    """Of treatment among both."""
    p_value: float
    """Of a chi-square test."""

    @property
    def share(self) -> float:
        """Of treatment among both."""
        return self.num_treatment / (self.num_control + self.num_treatment)

    @property
    def is_alarm(self) -> bool:
        """No uplift can be read: users are missing from one arm, and nobody knows which."""
        return self.p_value < ALARM_BELOW


def measure_ratio(moments: Moments, metric: str) -> Ratio:
    """A metric of one arm with its variance. Raises: ValueError for fewer than two users, or where
    what is divided by is 0.
    """
    above, below = METRICS[metric].above, METRICS[metric].below
    num_users, divisor = moments.num_users, moments.total(below)
    if num_users < 2 or divisor == 0:
        raise ValueError(
            f"{metric} needs two users who saw a list, and there are {num_users}; wait for more."
        )
    mean = moments.total(above) / divisor
    # What a user's sum is above the mean's share of it; these residuals add up to 0.
    squares = (
        moments.product(above, above)
        - 2 * mean * moments.product(above, below)
        + mean**2 * moments.product(below, below)
    )
    return Ratio(mean, max(0.0, squares) * num_users / (num_users - 1) / divisor**2)


def compare_arms(control: Moments, treatment: Moments, metric: str) -> Uplift:
    """A metric of treatment against control.

    Raises: ValueError as `measure_ratio`, and for a metric that is none of `METRICS`.
    """
    if metric not in METRICS:
        raise ValueError(f"There is no metric {metric!r}; choose one of: {', '.join(METRICS)}.")
    ours, theirs = measure_ratio(treatment, metric), measure_ratio(control, metric)
    difference = ours.mean - theirs.mean
    standard_error = math.sqrt(ours.variance + theirs.variance)
    return Uplift(
        metric,
        theirs,
        ours,
        _around(difference, standard_error),
        relative_uplift(ours, theirs),
        _p_value(difference, standard_error),
    )


def relative_uplift(ours: Ratio, theirs: Ratio) -> Interval | None:
    """Ours over theirs, less 1, with the interval of Fieller's theorem: the quotients that the
    difference `ours - quotient * theirs` does not tell from 0. None where it has no two ends.
    """
    square = theirs.mean**2 - _Z**2 * theirs.variance
    if square <= 0:
        return None
    root = math.sqrt(max(0.0, ours.mean**2 * theirs.variance + ours.variance * square))
    middle = ours.mean * theirs.mean
    low, high = ((middle + sign * _Z * root) / square - 1 for sign in (-1, 1))
    return Interval(ours.mean / theirs.mean - 1, low, high)


def adjust(control: Moments, treatment: Moments, metric: str) -> tuple[Moments, Moments]:
    """Both arms with what a user's activity before the experiment foretells taken out of a metric
    (CUPED; Deng et al., WSDM 2013, doi 10.1145/2433396.2433413): the expected uplift is the same,
    its variance is less. Only this metric may be read from them.
    """
    above, below = METRICS[metric].above, METRICS[metric].below
    both = control + treatment
    mean_before = both.total("before") / both.num_users
    variance = both.product("before", "before") - both.num_users * mean_before**2
    if variance <= 0:
        return control, treatment
    mean = both.total(above) / both.total(below)
    covariance = both.product(above, "before") - mean * both.product(below, "before")
    slope = covariance / variance
    changes = {"before": -slope, "users": slope * mean_before}
    return control.plus(above, changes), treatment.plus(above, changes)


def check_sample_ratio(num_control: int, num_treatment: int, expected_share: float) -> SampleRatio:
    """Compares the users of both arms with the share that treatment was given among them.

    Raises: ValueError when there is no user.
    """
    num_users = num_control + num_treatment
    if num_users == 0:
        raise ValueError("A sample ratio needs users, and there are none; wait for some.")
    expected = num_users * expected_share
    chi_square = (num_treatment - expected) ** 2 / (expected * (1 - expected_share))
    p_value = math.erfc(math.sqrt(chi_square / 2))
    return SampleRatio(num_control, num_treatment, expected_share, p_value)


def _around(mean: float, standard_error: float) -> Interval:
    return Interval(mean, mean - _Z * standard_error, mean + _Z * standard_error)


def _p_value(difference: float, standard_error: float) -> float:
    """Two-sided."""
    if standard_error == 0:
        return 1.0 if difference == 0 else 0.0
    return math.erfc(abs(difference) / standard_error / math.sqrt(2))
