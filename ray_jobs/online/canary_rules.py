"""What is done with a canary, from what its visitors did. Pure: no log, no registry.

A fault that shows at once (visitors who are missing, lists that lower rungs gave) goes before what
visitors like; no canary is promoted beside one.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ray_jobs.sections.serving import CanaryConfig
from recsys.attribution import Tally
from recsys.experiment import DEGRADED, METRICS, Moments
from recsys.sequential import Gap, SequentialRatio, check_ratio_again, measure_gap

Decision = Literal["promote", "roll back", "wait"]

_METRICS = ("click_through", "conversion")
NUM_INTERVALS = len(_METRICS) + 1


@dataclass(frozen=True)
class Look:
    """What is known of a canary at one moment."""

    days: float
    """Since the comparison began."""
    ratio: SequentialRatio
    degraded: Gap | None
    """None: too little to be said, here and below."""
    gaps: Mapping[str, Gap | None]
    """By metric."""

    def facts(self) -> dict[str, Any]:
        """The same as JSON."""
        ratio = self.ratio
        return {
            "days": round(self.days, 3),
            "users_champion": ratio.num_control,
            "users_canary": ratio.num_treatment,
            "sample_ratio_alarm": ratio.is_alarm,
            "degraded": None if self.degraded is None else asdict(self.degraded),
            **{name: None if gap is None else asdict(gap) for name, gap in self.gaps.items()},
        }


@dataclass(frozen=True)
class Verdict:
    """What is to be done, and why."""

    decision: Decision
    reason: str
    """A sentence."""


def look_at(found: Tally, shown: Tally, share: float, days: float, limits: CanaryConfig) -> Look:
    """Measures everything that `decide` asks for.

    Args:
        found: lists whose window is over, joined with events.
        shown: all lists, whatever became of them.
        share: of the canary among the visitors of both.
    """
    rate = limits.error_rate / NUM_INTERVALS
    degraded = measure_gap(
        shown.control, shown.treatment, DEGRADED, wanted=limits.max_degraded, error_rate=rate
    )
    gaps = {name: _measure(name, found.control, found.treatment, limits) for name in _METRICS}
    ratio = check_ratio_again(shown.control.num_users, shown.treatment.num_users, share)
    return Look(days, ratio, degraded, gaps)


def decide(look: Look, limits: CanaryConfig) -> Verdict:
    """Promotes, rolls back or waits."""
    fault = _find_fault(look, limits)
    if fault is not None:
        return Verdict("roll back", fault)
    for name, gap in look.gaps.items():
        if gap is not None and gap.interval.high < 0:
            return Verdict("roll back", f"{_describe(name, gap)}, which is below the bar.")
    primary = look.gaps[limits.primary]
    if primary is not None and primary.interval.low > 0:
        return Verdict("promote", f"{_describe(limits.primary, primary)}, which is over the bar.")
    if look.days < limits.max_days:
        return Verdict("wait", _say_what_is_missing(limits.primary, primary))
    return _decide_at_end(primary, limits)


def _measure(name: str, control: Moments, treatment: Moments, limits: CanaryConfig) -> Gap | None:
    metric = METRICS[name]
    # A bar above the champion is for the metric that promotes.
    bar = limits.least_uplift if name == limits.primary else min(0.0, limits.least_uplift)
    rate = control.total(metric.above) / max(1.0, control.total(metric.below))
    return measure_gap(
        control,
        treatment,
        metric,
        # Without any success in control there is nothing to be said of it, whatever is wanted.
        wanted=limits.wanted_uplift * rate or 1.0,
        error_rate=limits.error_rate / NUM_INTERVALS,
        least_uplift=bar,
    )


def _find_fault(look: Look, limits: CanaryConfig) -> str | None:
    ratio, degraded = look.ratio, look.degraded
    if ratio.is_alarm:
        share = ratio.num_treatment / (ratio.num_control + ratio.num_treatment)
        return (
            f"{share:.2%} of the visitors are the canary's instead of {ratio.expected_share:.2%}: "
            "some are missing in one of the arms, so that nothing can be compared."
        )
    if degraded is not None and degraded.interval.low > limits.max_degraded:
        return (
            f"{degraded.treatment:.1%} of its lists come from a lower rung, {degraded.control:.1%} "
            f"of the champion's; {limits.max_degraded:.1%} more are allowed."
        )
    return None


def _decide_at_end(primary: Gap | None, limits: CanaryConfig) -> Verdict:
    over = f"{limits.max_days:g} days are over"
    if limits.at_end != "better":
        return Verdict(limits.at_end, f"{over}, which is configured to {limits.at_end}.")
    if primary is None:
        return Verdict("roll back", f"{over} with too few visitors to say anything.")
    decision: Decision = "promote" if primary.interval.mean >= 0 else "roll back"
    return Verdict(decision, f"{over}, and {_describe(limits.primary, primary)}.")


def _say_what_is_missing(name: str, primary: Gap | None) -> str:
    if primary is None:
        return "There are too few visitors yet to say anything."
    return f"{_describe(name, primary)}, which leaves it open."


def _describe(name: str, gap: Gap) -> str:
    """The gap in percent of the champion's metric where that is not 0."""
    found, scale, unit = gap.relative, 100.0, " %"
    if found is None:
        found, scale, unit = gap.interval, 1.0, ""
    ends = f"[{scale * found.low:+.2f}, {scale * found.high:+.2f}]"
    return f"{name} is {scale * found.mean:+.2f}{unit} {ends} from the bar"
