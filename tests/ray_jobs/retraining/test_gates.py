"""Gates on made-up figures: each stands alone, and says its figure beside its limit."""

import pytest

from data_lake.weeks import WeekFigures
from ray_jobs.errors import ConfigError
from ray_jobs.job import load_config
from ray_jobs.retraining.gates import (
    check_agreement,
    check_baselines,
    check_data,
    check_export,
    check_gain,
    check_latency,
    check_popularity,
    check_quarantine,
    check_unknown_items,
    check_volume,
)
from ray_jobs.sections.upkeep import RetrainConfig

LIMITS = RetrainConfig()


def figures(rows=(1000, 900, 1100, 1000), *, num_new=1, **changes):
    usual = {
        "unknown_shares": (0.01,),
        "divergences": (0.02,),
        "agreements": (0.4,),
        "reference_agreement": 0.5,
    }
    return WeekFigures(rows, num_new, **(usual | changes))


def closed(found, num_new=1000, num_quarantined=2):
    verdicts = check_data(found, num_new, num_quarantined, LIMITS)
    return [verdict.gate for verdict in verdicts if not verdict.passed]


def test_a_usual_week_passes_every_gate():
    assert closed(figures()) == []


@pytest.mark.parametrize(
    ("found", "gates"),
    [
        (figures(rows=(100, 900, 1100, 1000)), ["volume-low"]),
        (figures(rows=(3000, 900, 1100, 1000)), ["volume-high"]),
        (figures(unknown_shares=(0.9,)), ["unknown-items"]),
        (figures(divergences=(0.6,)), ["popularity"]),
        (figures(agreements=(0.01,)), ["agreement"]),
        (figures(agreements=(-0.3,), divergences=(0.6,)), ["popularity", "agreement"]),
    ],
)
def test_each_fault_closes_its_gate(found, gates):
    assert closed(found) == gates


def test_half_of_the_rows_in_quarantine_are_too_many():
    assert closed(figures(), num_quarantined=1000) == ["quarantine"]


def test_quarantine_is_a_share_of_what_came():
    verdict = check_quarantine(90, 10, 0.1)
    assert (verdict.figure, verdict.passed) == (0.1, True)
    assert verdict.text == "10 of 100 new rows went to quarantine."
    assert check_quarantine(0, 0, 0.1).figure == 0


def test_volume_is_that_of_the_median_week_before():
    low, high = check_volume(figures(rows=(50, 90, 100, 900)), 0.6, 2.0)
    assert (low.figure, low.passed, low.limit) == (0.5, False, 0.6)
    assert (high.figure, high.passed) == (0.5, True)
    assert low.text == "50 events in the new week, a median of 100 in those before."


def test_of_two_new_weeks_the_worse_one_counts():
    low, high = check_volume(figures(rows=(100, 10, 100, 100), num_new=2), 0.5, 2.0)
    assert (low.figure, high.figure) == (0.1, 1.0)
    assert check_unknown_items((0.1, 0.3), 0.2).figure == 0.3
    assert check_popularity((0.1, 0.3), 0.2).figure == 0.3
    assert check_agreement((0.4, 0.1), 0.5, 0.5).figure == 0.2


def test_weeks_before_the_first_event_are_none():
    low, _ = check_volume(figures(rows=(100, 100, 0, 80, 0, 0)), 0.5, 2.0)
    assert low.figure == 100 / 80  # the median of 100, 0 and 80


def test_what_has_nothing_to_compare_with_passes_and_says_so():
    for rows in ((100, 0, 0), (100, 0, 0, 5)):
        low, high = check_volume(figures(rows=rows), 0.5, 2.0)
        assert (low.figure, low.passed, high.passed) == (None, True, True)
        assert "no week before" in low.text
    for reference, words in ((None, "not two weeks before"), (0.01, r"only 0.010")):
        verdict = check_agreement((-1.0,), reference, 0.5)
        assert (verdict.figure, verdict.passed) == (None, True)
        assert words in verdict.text


@pytest.mark.parametrize(
    ("ends", "limit", "passed"),
    [
        ((0.01, 0.05, 0.09), 0.0, True),
        ((-0.01, 0.05, 0.09), 0.0, False),
        ((-0.01, 0.02, 0.05), -0.02, True),
    ],
)
def test_a_challenger_wins_with_the_lower_end_of_its_interval(ends, limit, passed):
    low, mean, high = ends
    verdict = check_gain({"lift": mean, "lift_low": low, "lift_high": high}, limit)
    assert (verdict.figure, verdict.passed) == (low, passed)


def test_where_the_champion_finds_nothing_the_difference_counts():
    found = {"lift": None, "difference": 0.02, "difference_low": 0.01, "difference_high": 0.03}
    verdict = check_gain(found, 0.0)
    assert verdict.figure == 0.01
    assert verdict.text.endswith("+0.0200 [+0.0100, +0.0300].")


def test_the_strongest_baseline_decides():
    verdict = check_baselines({"popularity": 0.1, "item-knn": -0.01})
    assert (verdict.figure, verdict.passed) == (-0.01, False)
    assert "item-knn" in verdict.text
    assert check_baselines({}).passed


def test_an_export_is_refused_in_the_words_of_the_export():
    assert check_export("fp32", 1.0, 0.999, None).text == "fp32 is close to the model."
    verdict = check_export("int8", 0.1, 0.002, "int8 may lose 0.1 of NDCG@10 (at most 0.002)")
    assert (verdict.gate, verdict.passed) == ("export-int8", False)


def test_latency_is_relative_to_the_champion():
    assert check_latency(0.0026, 0.002, 1.3).passed
    assert check_latency(0.003, 0.002, 1.3).figure == pytest.approx(1.5)
    assert not check_latency(0.003, 0.002, 1.3).passed


def test_a_step_that_others_need_is_not_left_out_alone():
    with pytest.raises(ConfigError, match=r"skip names 'publish', on which 'canary' builds; add"):
        load_config("synthetic", ['retrain.skip=["publish"]'])
    skip = ("publish", "canary")
    assert load_config("synthetic", [f"retrain.skip={list(skip)}"]).retrain.skip == skip
