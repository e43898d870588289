"""Simulated traffic has the rates that it says, and the record tells what was counted."""

import numpy as np
import pytest

from benchmarks.experiment import CLICK_RATE, Rates, Traffic, draw_experiment, make_cases, render


def test_treatment_clicks_more_by_its_effect_and_has_its_share():
    traffic = Traffic(users=200_000, share=0.25, effect=0.2)
    control, treatment = draw_experiment(traffic, np.random.default_rng(0))
    rates = [arm.total("clicked_lists") / arm.total("lists") for arm in (control, treatment)]
    assert rates == pytest.approx([CLICK_RATE, 1.2 * CLICK_RATE], rel=0.03)
    assert treatment.num_users / 200_000 == pytest.approx(0.25, abs=0.005)
    assert control.total("lists") / control.num_users == pytest.approx(12, rel=0.02)


def test_the_cases_have_real_effects_and_none():
    effects = [traffic.effect for traffic in make_cases().values()]
    assert effects[:3] == [0, 0, 0]
    assert min(effects[3:]) > 0


def test_the_record_says_how_often_each_interval_was_right():
    rates = Rates(0.95, 0.94, 0.58, 0.05, 0.06, 0.8, 0.001)
    text = render({"no effect": (Traffic(), rates)}, 0.99, 400, 12.3)
    row = "| no effect | 2,000 | 50% | 0.0% | 95.0% | 94.0% | 58.0% | 5.0% | 6.0% | 80.0% | 0.10% |"
    assert row in text
    assert "two standard errors of such a share are 2.2%" in text
    assert "it finds 99.00%" in text
