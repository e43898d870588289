"""How often the intervals of `recsys.experiment` are right, on simulated experiments with a known
effect.

    python -m benchmarks.experiment --replications 10_000

Users differ by far in how many lists they see and in how often they click, as users do. Each case
counts, over all replications, how many 95 % intervals held the truth, how many experiments found an
uplift, and the same for an interval that takes each list for a draw of its own.

Writes `benchmarks/results/experiment.md`; the last line printed is one JSON object.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.measure import machine
from recsys.experiment import (
    COLUMNS,
    Moments,
    adjust,
    check_sample_ratio,
    compare_arms,
    measure_ratio,
)

RESULTS = Path(__file__).parent / "results"
METRIC = "click_through"
CLICK_RATE = 0.12
"""Of a list, over all users of control."""
_BUY_RATE = 0.1
"""Of a clicked list."""
_Z = 1.959964


@dataclass(frozen=True)
class Traffic:
    """Who comes, and what the treatment does to them."""

    users: int = 2_000
    """Of both arms together."""
    share: float = 0.5
    """Of treatment."""
    effect: float = 0.0
    """Relative, on the rate at which each user clicks."""
    mean_lists: float = 12.0


@dataclass(frozen=True)
class Rates:
    """Shares of the replications of one case."""

    covered: float
    """95 % intervals of the difference that hold the truth."""
    covered_relative: float
    """Fieller's intervals of the relative uplift that do; all of the line without two ends does."""
    covered_by_lists: float
    """Intervals for which each list is a draw of its own."""
    found: float
    """Intervals of the difference without 0."""
    found_adjusted: float
    """The same with what users did before taken out."""
    variance_kept: float
    """What that leaves of the variance, on average."""
    ratio_alarms: float
    """Checks of the sample ratio that raise an alarm."""


def main() -> None:
    """Parses; simulates each case and records the rates."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replications", type=int, default=10_000)
    arguments = parser.parse_args()
    started = time.perf_counter()
    found = {}
    for name, traffic in make_cases().items():
        found[name] = (traffic, measure_rates(traffic, arguments.replications))
        print(f"{name}: {found[name][1]}", flush=True)
    alarms = measure_alarms(20_000, 0.5, 0.52, arguments.replications)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "experiment.md").write_text(
        render(found, alarms, arguments.replications, time.perf_counter() - started)
    )
    rates = {name: asdict(one) for name, (_, one) in found.items()}
    print(json.dumps({"replications": arguments.replications, "alarms_52": alarms, **rates}))


def make_cases() -> dict[str, Traffic]:
    """No effect and real ones, with even shares and with a canary's."""
    plain, canary = Traffic(), Traffic(users=10_000, share=0.1)
    return {
        "no effect": plain,
        "no effect, 200 users": replace(plain, users=200),
        "no effect, a canary of 10 %": canary,
        "uplift of 10 %": replace(plain, effect=0.1),
        "uplift of 10 %, a canary of 10 %": replace(canary, effect=0.1),
        "the detectable uplift": replace(plain, effect=detectable_effect(plain)),
    }


def simulate(traffic: Traffic, num: int, seed: int) -> Iterator[tuple[Moments, Moments]]:
    """Control and treatment of experiments, one after the other."""
    rng = np.random.default_rng(seed)
    for _ in range(num):
        yield draw_experiment(traffic, rng)


def draw_experiment(traffic: Traffic, rng: np.random.Generator) -> tuple[Moments, Moments]:
    """Control and treatment of one experiment."""
    num_users = traffic.users
    is_treated_U = rng.random(num_users) < traffic.share
    activity_U = rng.gamma(0.5, 2.0, num_users)
    lists_U = 1 + rng.poisson((traffic.mean_lists - 1) * activity_U)
    # A mean of 0.2 below; most users hardly click, and some often.
    rate_U = CLICK_RATE / 0.2 * rng.beta(0.5, 2.0, num_users)
    clicked_U = rng.binomial(lists_U, rate_U * (1 + traffic.effect * is_treated_U))
    bought_U = rng.binomial(clicked_U, _BUY_RATE)
    columns = {
        "users": np.ones(num_users),
        "lists": lists_U,
        "clicked_lists": clicked_U,
        "bought_lists": bought_U,
        "buyers": bought_U > 0,
        "before": np.log1p(rng.poisson(traffic.mean_lists * activity_U * rate_U / CLICK_RATE)),
        "degraded_lists": np.zeros(num_users),
    }
    values_UC = np.stack([columns[name] for name in COLUMNS], axis=1).astype(np.float64)
    return Moments.of(values_UC[~is_treated_U]), Moments.of(values_UC[is_treated_U])


def measure_rates(traffic: Traffic, num: int, *, seed: int = 0) -> Rates:
    """How often the intervals of a case are right."""
    truth = CLICK_RATE * traffic.effect
    rows = [_judge(arms, traffic, truth) for arms in simulate(traffic, num, seed)]
    return Rates(*np.mean(rows, axis=0).tolist())


def measure_power(traffic: Traffic, num: int, *, seed: int = 0) -> float:
    """Share of the experiments that find an uplift."""
    found = (compare_arms(*arms, METRIC) for arms in simulate(traffic, num, seed))
    return sum(one.difference.low > 0 for one in found) / num


def detectable_effect(traffic: Traffic) -> float:
    """The relative uplift that such an experiment says it could find, on average."""
    found = (compare_arms(*arms, METRIC) for arms in simulate(traffic, 200, 99))
    return float(np.mean([one.detectable for one in found]))


def measure_alarms(users: int, expected: float, actual: float, num: int) -> float:
    """Share of alarms where treatment has not the share that it was given."""
    arrived = np.random.default_rng(1).binomial(users, actual, num).tolist()
    checks = (check_sample_ratio(users - one, one, expected) for one in arrived)
    return sum(check.is_alarm for check in checks) / num


def interval_by_lists(control: Moments, treatment: Moments) -> tuple[float, float]:
    """The 95 % interval of the difference for which each list is a draw of its own."""
    rates, variances = [], []
    for arm in (control, treatment):
        rate = measure_ratio(arm, METRIC).mean
        rates.append(rate)
        variances.append(rate * (1 - rate) / arm.total("lists"))
    difference, error = rates[1] - rates[0], math.sqrt(sum(variances))
    return difference - _Z * error, difference + _Z * error


def _judge(arms: tuple[Moments, Moments], traffic: Traffic, truth: float) -> tuple[float, ...]:
    """The fields of `Rates`, of one experiment."""
    plain, adjusted = compare_arms(*arms, METRIC), compare_arms(*adjust(*arms, METRIC), METRIC)
    low, high = interval_by_lists(*arms)
    relative = plain.relative
    control, treatment = arms
    ratio = check_sample_ratio(control.num_users, treatment.num_users, traffic.share)
    return (
        plain.difference.low <= truth <= plain.difference.high,
        relative is None or relative.low <= traffic.effect <= relative.high,
        low <= truth <= high,
        plain.is_significant,
        adjusted.is_significant,
        adjusted.variance / plain.variance,
        ratio.is_alarm,
    )


def render(
    found: Mapping[str, tuple[Traffic, Rates]], alarms: float, num: int, seconds: float
) -> str:
    """The record as Markdown."""
    lines = [
        f"| {name} | {traffic.users:,} | {traffic.share:.0%} | {traffic.effect:.1%} "
        f"| {rates.covered:.1%} | {rates.covered_relative:.1%} | {rates.covered_by_lists:.1%} "
        f"| {rates.found:.1%} | {rates.found_adjusted:.1%} | {rates.variance_kept:.1%} "
        f"| {rates.ratio_alarms:.2%} |"
        for name, (traffic, rates) in found.items()
    ]
    noise = 2 * math.sqrt(0.05 * 0.95 / num)
    return "\n".join(
        [
            "# Experiments with a known effect",
            "",
            f"{num:,} simulated experiments a case; {machine()}, {seconds:.0f} s.",
            f"Regenerate: `python -m benchmarks.experiment --replications {num}`.",
            "",
            "A user sees 12 lists on average (a gamma mixture of Poisson counts) and clicks on "
            f"{CLICK_RATE:.0%} of them on average, at a rate of the user's own (a beta "
            "distribution with most of its mass near 0). 95 % intervals should hold the truth in "
            f"95 % of the experiments; two standard errors of such a share are {noise:.1%}.",
            "",
            "| case | users | treatment | uplift | holds the difference | holds the relative "
            "uplift | lists as draws | finds a difference | with CUPED | variance kept "
            "| ratio alarms |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
            *lines,
            "",
            '"Lists as draws" is the interval that counts lists instead of users. Where there is '
            "no uplift, what finds a difference is a false positive (5 % expected); at the "
            "detectable uplift it is the power, 80 % by definition. With 200 users, of whom a few "
            "see most lists, a normal distribution is only nearly true.",
            "",
            "The sample ratio is held against p < 0.001. Of experiments with 20,000 users in which "
            f"treatment has 52 % instead of 50 %, it finds {alarms:.2%}.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
