"""How often `ray_jobs.canary` decides wrongly, on simulated canaries with a known effect that are
looked at every hour.

    python -m benchmarks.canary --replications 2_000

Visitors come back at random over two weeks, and differ by far in how often they come and click; at
each of 336 looks the rules of the job decide on what is known by then. Each case counts, over all
canaries, how many were promoted and rolled back before the end, after how many days, and the same
for 95 % intervals of a fixed end, looked at as often.

Writes `benchmarks/results/canary.md`; the last line printed is one JSON object.
"""

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.experiment import CLICK_RATE
from benchmarks.measure import machine
from ray_jobs.online.canary_rules import NUM_INTERVALS
from ray_jobs.sections.serving import CanaryConfig
from recsys.sequential import Sums, check_ratio_again, measure_gaps

RESULTS = Path(__file__).parent / "results"
DAYS = 14
LOOKS = 24 * DAYS
LIMITS = CanaryConfig(max_days=DAYS)
_BUY_RATE = 0.1
"""Of a clicked list."""
_Z = 1.959964
_ROLLED_BACK, _WAITED, _PROMOTED = -1, 0, 1


@dataclass(frozen=True)
class Traffic:
    """Who comes within the two weeks, and what the canary does to them."""

    users: int = 3_000
    """Of both versions together."""
    share: float = 0.2
    """Of the canary."""
    effect: float = 0.0
    """Relative, on the rate at which each user clicks."""
    mean_lists: float = 8.0
    degraded: float = 0.005
    """Share of lists from a lower rung, of the champion."""
    extra_degraded: float = 0.0
    """The canary's above that."""


@dataclass(frozen=True)
class Ends:
    """Shares of the canaries of one case."""

    promoted: float
    """Before the two weeks were over; so the next ones."""
    rolled_back: float
    fixed_promoted: float
    """By 95 % intervals of a fixed end."""
    fixed_rolled_back: float
    promoted_at_end: float
    """Of those left over: with the better click-through at the end."""
    median_days: float | None
    """Until a decision before the end, where there was any."""


def main() -> None:
    """Parses; simulates each case and records how it ended."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replications", type=int, default=2_000)
    arguments = parser.parse_args()
    started = time.perf_counter()
    found = {}
    for name, traffic in make_cases().items():
        found[name] = (traffic, simulate(traffic, arguments.replications))
        print(f"{name}: {found[name][1]}", flush=True)
    RESULTS.mkdir(exist_ok=True)
    record = render(found, arguments.replications, time.perf_counter() - started)
    (RESULTS / "canary.md").write_text(record)
    rates = {name: asdict(ends) for name, (_, ends) in found.items()}
    print(json.dumps({"replications": arguments.replications, **rates}))


def make_cases() -> dict[str, Traffic]:
    """An equal challenger, worse ones, better ones, and one whose ranker fails."""
    plain = Traffic()
    return {
        "equal": plain,
        "equal, half of the visitors": replace(plain, share=0.5),
        "equal, a canary of 5 %": replace(plain, share=0.05),
        "10 % worse": replace(plain, effect=-0.1),
        "30 % worse": replace(plain, effect=-0.3),
        "10 % better": replace(plain, effect=0.1),
        "30 % better": replace(plain, effect=0.3),
        "30 % better, half of the visitors": replace(plain, effect=0.3, share=0.5),
        "equal, 10 % of its lists degraded": replace(plain, extra_degraded=0.1),
    }


def simulate(traffic: Traffic, num: int, *, seed: int = 0) -> Ends:
    """How so many canaries of a case end."""
    rng = np.random.default_rng(seed)
    canaries = [follow(draw_lists(traffic, rng), traffic.share) for _ in range(num)]
    ends, looks, fixed, estimates = (np.array(column) for column in zip(*canaries, strict=True))
    is_early = ends != _WAITED
    return Ends(
        promoted=float((ends == _PROMOTED).mean()),
        rolled_back=float((ends == _ROLLED_BACK).mean()),
        fixed_promoted=float((fixed == _PROMOTED).mean()),
        fixed_rolled_back=float((fixed == _ROLLED_BACK).mean()),
        promoted_at_end=float((~is_early & (estimates >= 0)).mean()),
        median_days=float(np.median(looks[is_early] + 1)) / 24 if is_early.any() else None,
    )


def draw_lists(traffic: Traffic, rng: np.random.Generator) -> dict[str, NDArray[Any]]:
    """Lists by user and time: their look, user, whether the user is the canary's, and whether the
    list was clicked, bought from and degraded; each `[lists]`.
    """
    num = traffic.users
    lists_U = 1 + rng.poisson((traffic.mean_lists - 1) * rng.gamma(0.5, 2.0, num))
    is_treated_U = rng.random(num) < traffic.share
    # A mean of 0.2 below; most users hardly click, and some often.
    rate_U = CLICK_RATE / 0.2 * rng.beta(0.5, 2.0, num) * (1 + traffic.effect * is_treated_U)
    users = np.repeat(np.arange(num), lists_U)
    hours = 24 * (rng.integers(DAYS, size=len(users)) + rng.beta(3, 2, len(users)))
    # One number holds both, and numbers are sorted sooner than places.
    hours = np.sort(users * 2.0 * LOOKS + hours) - users * 2.0 * LOOKS
    is_treated = is_treated_U[users]
    is_clicked = rng.random(len(users)) < rate_U[users]
    degraded_rate = traffic.degraded + traffic.extra_degraded * is_treated
    return {
        "look": np.clip(hours.astype(np.int64), 0, LOOKS - 1),
        "user": users,
        "is_treated": is_treated,
        "clicked": is_clicked,
        "bought": is_clicked & (rng.random(len(users)) < _BUY_RATE),
        "degraded": rng.random(len(users)) < degraded_rate,
    }


def follow(lists: Mapping[str, NDArray[Any]], share: float) -> tuple[int, int, int, float]:
    """How a canary ends and at which look, how it ends by fixed intervals, and the gap of its
    click-through at the last look.
    """
    arms = [{name: rows[side] for name, rows in lists.items()} for side in _sides(lists)]
    clicks, converts, degrades = (
        [measure(arm) for arm in arms] for measure in (sum_clicks, sum_buyers, sum_degraded)
    )
    counts = [np.asarray(arm.users).astype(int).tolist() for arm in clicks]
    is_missing = np.array(
        [check_ratio_again(*pair, share).is_alarm for pair in zip(*counts, strict=True)]
    )
    rate = LIMITS.error_rate / NUM_INTERVALS
    ends = []
    for is_fixed in (False, True):
        gaps = [
            _interval(arms_of, limit, rate, is_fixed=is_fixed)
            for arms_of, limit in (
                (clicks, LIMITS.wanted_uplift * _rates(clicks[0])),
                (converts, LIMITS.wanted_uplift * _rates(converts[0])),
                (degrades, LIMITS.max_degraded),
            )
        ]
        (low, high), (_, conversion_high), (degraded_low, _) = gaps
        with np.errstate(invalid="ignore"):
            is_bad = is_missing | (degraded_low > LIMITS.max_degraded)
            is_bad |= (high < 0) | (conversion_high < 0)
            ends.append(_first(is_bad, low > 0))
    estimate = float(_rates(clicks[1])[-1] - _rates(clicks[0])[-1])
    (end, look), (fixed, _) = ends
    return end, look, fixed, estimate


def sum_clicks(arm: Mapping[str, NDArray[Any]]) -> Sums:
    """Clicked lists of all lists, at each look."""
    return _sum_marks(arm, arm["clicked"])


def sum_degraded(arm: Mapping[str, NDArray[Any]]) -> Sums:
    """Lists of a lower rung, of all lists."""
    return _sum_marks(arm, arm["degraded"])


def sum_buyers(arm: Mapping[str, NDArray[Any]]) -> Sums:
    """Users who bought, of all users."""
    users = _at_looks(arm, _count_before(arm["user"], np.ones(len(arm["user"]))) == 0)
    is_first = arm["bought"] & (_count_before(arm["user"], arm["bought"]) == 0)
    buyers = _at_looks(arm, is_first)
    return Sums(users, buyers, users, buyers, buyers, users)


def _sum_marks(arm: Mapping[str, NDArray[Any]], marks: NDArray[Any]) -> Sums:
    """Sums over users of a sum over their lists, and of squares, which a list adds to."""
    marks = marks.astype(np.float64)
    num = _count_before(arm["user"], np.ones(len(marks)))
    num_marked = _count_before(arm["user"], marks)
    return Sums(
        users=_at_looks(arm, num == 0),
        above=_at_looks(arm, marks),
        below=_at_looks(arm, np.ones(len(marks))),
        above_above=_at_looks(arm, marks * (2 * num_marked + 1)),
        above_below=_at_looks(arm, num_marked + marks * (num + 1)),
        below_below=_at_looks(arm, 2 * num + 1),
    )


def _sides(lists: Mapping[str, NDArray[Any]]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    is_treated = lists["is_treated"]
    return ~is_treated, is_treated


def _count_before(users: NDArray[Any], marks: NDArray[Any]) -> NDArray[np.float64]:
    """Marks of the same user in rows above, `[lists]`."""
    sums = np.cumsum(marks, dtype=np.float64) - marks
    starts = np.flatnonzero(np.diff(users, prepend=-1))
    counts = np.diff(np.append(starts, len(users)))
    before: NDArray[np.float64] = sums - np.repeat(sums[starts], counts)
    return before


def _at_looks(arm: Mapping[str, NDArray[Any]], values: NDArray[Any]) -> NDArray[np.float64]:
    """The sum of values up to each look."""
    return np.cumsum(np.bincount(arm["look"], values, LOOKS))


def _rates(sums: Sums) -> NDArray[np.float64]:
    rates: NDArray[np.float64] = sums.above / np.maximum(1, sums.below)
    return np.where(rates > 0, rates, 1.0)


def _interval(
    arms: list[Sums], wanted: Any, rate: float, *, is_fixed: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The ends at each look; of fixed ones the same variance is what counts."""
    gap, radius = measure_gaps(*arms, wanted=wanted, error_rate=rate)
    if is_fixed:
        radius = _Z * _standard_error(arms)
    return gap - radius, gap + radius


def _standard_error(arms: list[Sums]) -> NDArray[np.float64]:
    """Of the gap, each arm with a variance of its own."""
    variance = np.zeros(LOOKS)
    for arm in arms:
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = arm.above / arm.below
            squares = arm.above_above - 2 * mean * arm.above_below + mean**2 * arm.below_below
            variance += np.maximum(0, squares) / arm.below**2
    return np.sqrt(variance)


def _first(is_bad: NDArray[np.bool_], is_good: NDArray[np.bool_]) -> tuple[int, int]:
    """What comes first, and at which look; what is bad goes before."""
    decided = np.flatnonzero(is_bad | is_good)
    if not len(decided):
        return _WAITED, LOOKS
    look = int(decided[0])
    return (_ROLLED_BACK if is_bad[look] else _PROMOTED), look


def render(found: Mapping[str, tuple[Traffic, Ends]], num: int, seconds: float) -> str:
    """The record as Markdown."""
    lines = [
        f"| {name} | {traffic.share:.0%} | {ends.promoted:.1%} | {ends.rolled_back:.1%} "
        f"| {_days(ends.median_days)} | {ends.promoted_at_end:.1%} "
        f"| {1 - ends.promoted - ends.rolled_back - ends.promoted_at_end:.1%} "
        f"| {ends.fixed_promoted:.1%} | {ends.fixed_rolled_back:.1%} |"
        for name, (traffic, ends) in found.items()
    ]
    plain = Traffic()
    return "\n".join(
        [
            "# Canaries with a known effect",
            "",
            f"{num:,} simulated canaries a case, looked at every hour of {DAYS} days; "
            f"{machine()}, {seconds:.0f} s.",
            f"Regenerate: `python -m benchmarks.canary --replications {num}`.",
            "",
            f"{plain.users:,} visitors of both versions, who see {plain.mean_lists:g} lists on "
            f"average (a gamma mixture of Poisson counts) at any time of the two weeks, and click "
            f"on {CLICK_RATE:.0%} of them on average, at a rate of their own (a beta distribution "
            f"with most of its mass near 0); {_BUY_RATE:.0%} of clicked lists are bought from, "
            f"{plain.degraded:.1%} of all lists come from a lower rung. Rules are those of "
            f"`ray_jobs.canary` with `error_rate = {LIMITS.error_rate:g}`: an equal challenger may "
            "be promoted or rolled back before the end in that share of the canaries at most.",
            "",
            "| case | canary | promoted early | rolled back early | median days "
            "| better at the end | worse at the end | fixed 95 %: promoted "
            "| fixed 95 %: rolled back |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
            *lines,
            "",
            '"Fixed 95 %" are intervals of an end that was fixed beforehand, looked at as often: '
            "the first one without 0 decides. Canaries that are left over at the end are promoted "
            'or rolled back by their estimate (`at_end = "better"`).',
            "",
        ]
    )


def _days(days: float | None) -> str:
    return "-" if days is None else f"{days:.1f}"


if __name__ == "__main__":
    main()
