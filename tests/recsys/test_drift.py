"""Measures of drift: what they are of counts, and how often thresholds are exceeded."""

from math import comb, log, log2

import numpy as np
import pytest

from data_lake import weeks
from recsys.drift import (
    HEAD,
    SMOOTHING,
    TAIL,
    TORSO,
    UNSEEN,
    Measure,
    comparable_size,
    covered_share,
    jensen_shannon,
    measure_drift,
    popularity_buckets,
    psi,
    smoothed_shares,
)
from recsys.drift_null import (
    LEAST_GROUPS,
    can_be_judged,
    draw_null,
    find_dispersion,
    judge_drift,
    least_resamples,
)

DEVICES = Measure("device", "shares", ("mobile", "desktop", "app", "(other)"))
CLICKS = Measure("clicks", "fall", ("no click", "click"))
UNKNOWN = Measure("unknown", "rise", ("known", "unknown"))
MEASURES = (DEVICES, CLICKS, UNKNOWN)
SHARES = {"device": (0.5, 0.3, 0.2, 0.0), "clicks": (0.9, 0.1), "unknown": (0.98, 0.02)}


def array(*counts):
    return np.array(counts, float)


def draw(generator, shares, *, size, groups=64, windows=3, days=4, clumps=5):
    """Counts `[G, W, P, K]`, of which each group draws `clumps` at once, as one user would."""
    means = np.asarray(shares) * size / clumps
    return clumps * generator.poisson(means, (groups, windows, days, len(shares)))


def judge(counts, current, *, rate=0.05, **changes):
    """Verdicts on `[G, K]` of the measures that there are counts `[G, W, P, K]` of."""
    measures = [one for one in MEASURES if one.name in counts]
    arguments = {"false_alarm_rate": rate, "num_resamples": 200} | changes
    return judge_drift(measures, counts, current, **arguments)


def find_alarms(generator, shares, *, size=30, volume=1.0, **drawing):
    """Measures whose last window of three is an alarm; it has the given shares, and a volume
    relative to the others.
    """
    calm = {name: draw(generator, SHARES[name], size=size, windows=2, **drawing) for name in SHARES}
    last = {
        name: draw(generator, shares[name], size=volume * size, windows=1, **drawing)
        for name in SHARES
    }
    judged = judge(calm, {name: one.sum(axis=(1, 2)) for name, one in last.items()})
    return {name for name, one in judged.items() if one.is_alarm}


@pytest.mark.parametrize("divergence", [psi, jensen_shannon])
def test_equal_shares_do_not_differ_however_many_events_there_are(divergence):
    counts = array(5, 3, 0, 2)
    assert divergence(counts, counts) == 0
    assert divergence(counts, 100 * counts) == pytest.approx(0, abs=1e-12)
    assert divergence(np.zeros(4), counts) == pytest.approx(0, abs=1e-12)
    assert divergence(np.zeros(4), np.zeros(4)) == 0


@pytest.mark.parametrize("divergence", [psi, jensen_shannon])
def test_divergences_are_the_same_both_ways_round(divergence):
    generator = np.random.default_rng(0)
    left, right = generator.poisson(3.0, (2, 50, 8)).astype(float)
    np.testing.assert_allclose(divergence(left, right), divergence(right, left), atol=1e-15)
    assert (divergence(left, right) >= 0).all()


def test_the_psi_of_many_events_is_that_of_the_book():
    expected = (0.7 - 0.5) * log(0.7 / 0.5) + (0.3 - 0.5) * log(0.3 / 0.5)
    assert psi(array(5e9, 5e9), array(7e9, 3e9)) == pytest.approx(expected)


def test_jensen_shannon_of_periods_that_share_nothing_is_a_bit():
    assert jensen_shannon(array(1e9, 0), array(0, 1e9)) == pytest.approx(1, abs=1e-6)
    middle = (1.0 * log2(1 / 0.75) + 0.5 * log2(0.5 / 0.75) + 0.5 * log2(0.5 / 0.25)) / 2
    assert jensen_shannon(array(1e9, 0), array(5e8, 5e8)) == pytest.approx(middle, abs=1e-6)


def test_psi_grows_with_the_shift():
    reference = array(500, 300, 200)
    drifts = [psi(reference, reference + step * array(-1, 0, 1)) for step in range(0, 500, 50)]
    assert drifts == sorted(drifts)
    assert drifts[0] == 0


def test_a_category_that_is_new_has_a_finite_weight():
    reference, current = smoothed_shares(array(100, 0), array(80, 20))
    extra = SMOOTHING * 2
    assert reference[1] == pytest.approx(extra * 20 / 200 / (100 + extra))
    assert current[1] == pytest.approx((20 + extra * 20 / 200) / (100 + extra))
    assert reference.sum() == current.sum() == pytest.approx(1)
    assert np.isfinite(psi(array(100, 0), array(0, 100)))


def test_shares_rise_and_fall():
    reference, current = array(90, 10), array(70, 30)
    assert measure_drift(UNKNOWN, reference, current) == pytest.approx(0.2)
    assert measure_drift(CLICKS, reference, current) == pytest.approx(-0.2)
    assert measure_drift(CLICKS, reference, np.zeros(2)) == pytest.approx(0.1)


def test_coverage_is_what_equally_many_lists_show():
    # Ten lists; of two items one is in six of them, the other in all but one.
    drawn = 3
    missed = (comb(4, drawn) / comb(10, drawn), 0.0)
    counts = array(10, 6, 9)
    assert covered_share(counts, np.array(drawn)) == pytest.approx(1 - sum(missed) / 2)
    assert covered_share(counts, np.array(0)) == pytest.approx(0)


def test_more_lists_of_the_same_kind_are_no_drift_of_coverage():
    measure = Measure("coverage", "coverage", ("lists", *"abcdefgh"))
    shares = np.linspace(0.01, 0.9, 8)
    few, many = (np.array([size, *(size * shares)]) for size in (100, 10_000))
    assert measure_drift(measure, few, many) < 0.03
    narrow = np.array([10_000, *(10_000 * shares * (shares > 0.5))])
    assert measure_drift(measure, many, narrow) > 0.3


def test_buckets_hold_half_of_the_events_the_next_forty_percent_and_the_rest():
    counts = np.array([0, 50, 6, 40, 4, 0])
    assert popularity_buckets(counts).tolist() == [UNSEEN, HEAD, TAIL, TORSO, TAIL, UNSEEN]
    assert popularity_buckets(np.zeros(2)).tolist() == [UNSEEN, UNSEEN]


@pytest.mark.parametrize(
    "drawing",
    [
        {},
        {"groups": 24, "clumps": 60},  # few users, each of whom does much at once
        {"volume": 0.3},
        {"volume": 3.0},
    ],
    ids=["many users", "few users", "a week of few events", "a week of many"],
)
def test_alarms_without_drift_are_as_rare_as_asked_for(drawing):
    runs = [find_alarms(np.random.default_rng(seed), SHARES, **drawing) for seed in range(100)]
    num_alarms = sum(bool(alarms) for alarms in runs)
    # 5 are expected; a rate of 0.05 gives more than 12 in one of 600 tries.
    assert 1 <= num_alarms <= 12


def test_a_window_like_all_others_is_an_alarm_exactly_as_often_as_asked_for():
    # Each of the resamples, taken for what was observed, would be judged by the same null.
    generator = np.random.default_rng(8)
    windows = {one.name: draw(generator, SHARES[one.name], size=9).sum(2) for one in MEASURES}
    null = draw_null(MEASURES, windows, num_resamples=999)
    ranks = (null[None] >= null[:, None]).sum(axis=1)
    best = ranks.min(axis=1)
    allowed = max(k for k in range(1, 1000) if (best <= k).mean() <= 0.05)
    calm = {name: one[:, :-1, None] for name, one in windows.items()}
    current = {name: one[:, -1] for name, one in windows.items()}
    judged = judge(calm, current, num_resamples=999)
    for m, measure in enumerate(MEASURES):
        assert judged[measure.name].quantile == 1 - allowed / 1000
        assert judged[measure.name].is_alarm == (ranks[0, m] <= allowed)


def test_what_one_user_does_is_seldom_an_alarm():
    num_alarms = 0
    for seed in range(40):
        windows = draw(np.random.default_rng(seed), SHARES["device"], size=30).sum(axis=2)
        windows[0, 2, 3] = windows.sum()
        judged = judge({"device": windows[:, :-1, None]}, {"device": windows[:, -1]})["device"]
        assert judged.drift > 1
        num_alarms += judged.is_alarm
    # Shifts put that window last in one resample of three: 40 * 3 * 0.05 = 6 are expected.
    assert num_alarms <= 12


@pytest.mark.parametrize(
    ("name", "shares"),
    [("device", (0.35, 0.45, 0.2, 0.0)), ("clicks", (0.95, 0.05)), ("unknown", (0.94, 0.06))],
)
def test_a_planted_shift_is_found_where_it_is(name, shares):
    runs = [find_alarms(np.random.default_rng(seed), SHARES | {name: shares}) for seed in range(10)]
    assert sum(name in alarms for alarms in runs) >= 9


def test_users_whose_events_come_in_clumps_raise_thresholds():
    generator = np.random.default_rng(3)
    found = []
    for clumps in (1, 10):
        windows = draw(generator, SHARES["device"], size=60, clumps=clumps)
        judged = judge({"device": windows[:, :-1]}, {"device": windows[:, -1].sum(axis=1)})
        found.append(judged["device"].threshold)
    assert found[1] > 5 * found[0]


def test_days_that_differ_for_everybody_raise_thresholds():
    generator = np.random.default_rng(4)
    calm = draw(generator, SHARES["device"], size=200, windows=2, days=7, clumps=1)
    assert find_dispersion(DEVICES, calm) == 1
    tilt = generator.uniform(0.7, 1.3, (1, 2, 7, 1))
    restless = calm * np.concatenate([tilt, 2 - tilt, np.ones((1, 2, 7, 2))], axis=-1)
    assert find_dispersion(DEVICES, restless) > 5


def test_verdicts_are_the_same_again():
    counts = draw(np.random.default_rng(5), SHARES["device"], size=30)
    calm, current = {"device": counts[:, :-1]}, {"device": counts[:, -1].sum(axis=1)}
    assert judge(calm, current, seed=7) == judge(calm, current, seed=7)


def test_more_measures_have_thresholds_further_out():
    generator = np.random.default_rng(6)
    many = [Measure(f"m{number}", "shares", DEVICES.labels) for number in range(8)]
    counts = {one.name: draw(generator, SHARES["device"], size=30) for one in many}
    calm = {name: one[:, :-1] for name, one in counts.items()}
    current = {name: one[:, -1].sum(axis=1) for name, one in counts.items()}
    alone, together = (
        judge_drift(some, calm, current, false_alarm_rate=0.1, num_resamples=999)["m0"]
        for some in (many[:1], many)
    )
    assert alone.quantile == pytest.approx(0.9)
    # Independent ones need 1 - 0.1 / 8 each, nearly.
    assert together.quantile == pytest.approx(1 - 0.1 / 8, abs=0.005)


def test_a_few_events_are_worth_no_more_however_many_the_others_are():
    assert comparable_size(DEVICES, array(6, 6), array(3, 3)) == 12 * 6 / 18
    assert comparable_size(DEVICES, array(6e9, 6e9), array(3, 3)) == pytest.approx(6)
    lists = Measure("coverage", "coverage", ("lists", "a"))
    assert comparable_size(lists, array(10, 9), array(10, 2)) == 5
    assert comparable_size(lists, array(0, 0), array(0, 0)) == 0


def test_a_calm_period_needs_users_and_windows():
    counts = np.zeros((64, 2, 7, 4))
    counts[: LEAST_GROUPS - 1] = 1
    assert not can_be_judged(counts)
    counts[LEAST_GROUPS - 1] = 1
    assert can_be_judged(counts)
    counts[:, 1] = 0
    assert not can_be_judged(counts)


@pytest.mark.parametrize(
    ("windows", "rate", "message"),
    [
        (1, 0.05, "A calm period of one window does not tell how days differ; take two"),
        (
            2,
            0.001,
            "200 resamples do not tell a false alarm rate of 0.001 over 1 measures; take at",
        ),
    ],
)
def test_too_little_to_tell_is_refused(windows, rate, message):
    counts = {"device": np.ones((64, windows, 7, 4))}
    with pytest.raises(ValueError, match=message):
        judge(counts, {"device": np.ones((64, 4))}, rate=rate)


def test_each_measure_needs_a_resample_beyond_its_threshold():
    assert least_resamples(13, 0.01) == 1300
    assert least_resamples(0, 0.01) == 1


def test_nothing_to_judge_has_no_verdicts():
    assert judge_drift([], {}, {}, false_alarm_rate=0.01) == {}


def test_both_houses_mean_the_same_by_the_divergence_of_jensen_and_shannon():
    left, right = np.random.default_rng(1).integers(1, 9, (2, 20)) * 10**9
    assert weeks.divergence(left, right) == pytest.approx(float(jensen_shannon(left, right)))
