"""Pictures: what they show, and that they can be drawn of anything."""

import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest

from ray_jobs.plots import (
    draw_against,
    draw_asha,
    draw_drift,
    draw_importance,
    draw_lists,
    draw_objective,
    draw_parallel,
    draw_rows,
    draw_shares,
    draw_slices,
    draw_training,
    to_svg,
)

NAN = float("nan")


def fact(mean, num_users=100):
    return {"mean": mean, "low": 0.9 * mean, "high": 1.1 * mean, "num_users": num_users}


def row(mean, **lists):
    return {"NDCG@10": fact(mean), "HR@10": fact(2 * mean), **lists}


def texts(figure):
    figure.draw_without_rendering()
    return [label.get_text() for axes in figure.axes for label in axes.get_xticklabels()]


def test_epochs_without_validation_are_left_out_of_its_curve():
    history = [
        {"epoch": 1, "loss": 5.0, "ndcg10": NAN},
        {"epoch": 2, "loss": 4.0, "ndcg10": 0.1},
        {"epoch": 3, "loss": 3.0, "ndcg10": NAN},
        {"epoch": 4, "loss": 2.0, "ndcg10": 0.3},
    ]
    loss, validation = draw_training(history, best_epoch=4).axes
    assert loss.lines[0].get_xydata().tolist() == [[1, 5], [2, 4], [3, 3], [4, 2]]
    assert validation.lines[0].get_xydata().tolist() == [[2, 0.1], [4, 0.3]]
    assert validation.lines[1].get_xydata().tolist() == [[4, 0.3]]


def test_rows_are_bars_from_zero_with_their_intervals():
    figure = draw_rows({"model": row(0.2), "popularity": row(0.1)}, "popularity")
    ndcg, hr = figure.axes
    assert [bar.get_width() for bar in ndcg.patches] == [0.2, 0.1]
    assert [bar.get_width() for bar in hr.patches] == [0.4, 0.2]
    assert ndcg.lines[0].get_xdata().tolist() == pytest.approx([0.18, 0.22])
    assert ndcg.get_xlim()[0] == 0
    assert ndcg.yaxis_inverted()


@pytest.mark.parametrize("names", [("coverage@10", "gini@10"), ("coverage@10", "diversity@10")])
def test_lists_have_a_panel_for_each_figure_that_there_is(names):
    rows = {"model": row(0.2, **dict.fromkeys(names, 0.5))}
    assert len(draw_lists(rows, None).axes) == 2


def test_parts_stand_side_by_side_with_their_users():
    model = {"new": fact(0.2, 1203), "loyal": fact(0.1, 7)}
    baseline = {"new": fact(0.15), "loyal": fact(0.05)}
    figure = draw_slices("NDCG@10 by segment", model, baseline, "covisitation")
    assert texts(figure) == ["new\n1,203", "loyal\n7"]
    (axes,) = figure.axes
    assert [bar.get_height() for bar in axes.patches] == [0.2, 0.1, 0.15, 0.05]
    centres = [bar.get_x() + bar.get_width() / 2 for bar in axes.patches]
    assert np.allclose(centres, [-0.2, 0.8, 0.2, 1.2])
    assert axes.get_ylim()[0] == 0


def test_long_names_stand_left_of_lying_bars():
    model = {f"a segment with a long name, {n}": fact(0.1) for n in range(8)}
    (axes,) = draw_slices("by segment", model, {}, None).axes
    assert axes.get_xlim()[0] == 0
    assert len(axes.get_yticks()) == 8


def test_hours_are_lines_above_the_number_of_users():
    model = {f"{hour:02d}": fact(0.1, hour) for hour in range(24)}
    gains, users = draw_slices("by hour", model, model, "popularity", as_lines=True).axes
    assert len(gains.lines) == 2
    assert gains.get_ylim()[0] == 0
    assert [bar.get_height() for bar in users.patches] == list(range(24))


def test_a_difference_within_noise_is_hollow():
    found = {
        metric: {
            "difference": 0.01,
            "difference_low": 0.01 - width,
            "difference_high": 0.01 + width,
            "is_significant": width < 0.01,
        }
        for metric, width in (("HR@10", 0.005), ("NDCG@10", 0.02))
    }
    points = [
        line for line in draw_against(found, "a", "b").axes[0].lines if line.get_marker() == "o"
    ]
    assert [point.get_markerfacecolor() == "white" for point in points] == [False, True]


@pytest.mark.parametrize("label", ["$50 to $100", r"\alpha_$x^{", "<b>&amp;</b>", "a -- b"])
def test_any_label_can_be_drawn(label):
    parts = {label: fact(0.1), "other": fact(0.2)}
    ElementTree.fromstring(to_svg(draw_slices(label, parts, parts, "popularity")))


def test_nothing_but_zeros_can_be_drawn():
    zeros = {"a": fact(0.0), "b": fact(0.0)}
    to_svg(draw_slices("zeros", zeros, zeros, "popularity"))
    to_svg(draw_rows({"model": row(0.0)}, None))


def test_the_same_picture_has_the_same_bytes():
    history = [{"epoch": 1, "loss": 5.0, "ndcg10": 0.1}]
    assert to_svg(draw_training(history, 1)) == to_svg(draw_training(history, 1))


def test_drawing_leaves_no_figure_and_no_setting_behind():
    program = """
import sys, matplotlib
from ray_jobs.plots import draw_training, to_svg
before = matplotlib.rcParams.copy()
to_svg(draw_training([{"epoch": 1, "loss": 5.0, "ndcg10": 0.1}], 1))
assert matplotlib.rcParams.copy() == before
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_drift_is_drawn_in_thresholds_and_alarms_have_a_colour_of_their_own():
    measures = {
        "items": {"drift": 0.3, "threshold": 0.1, "usual": 0.05, "alarm": True},
        "hour": {"drift": 0.05, "threshold": 0.1, "usual": 0.05, "alarm": False},
        "clicks": {"drift": -9.0, "threshold": 0.1, "usual": 0.0, "alarm": False},
        "unknown": {"drift": 0.1, "threshold": 0.0, "usual": 0.0, "alarm": True},
    }
    (axes,) = draw_drift(measures).axes
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == pytest.approx([3, 0.5, -10, 2])
    colours = [bar.get_facecolor() for bar in axes.patches]
    assert colours[0] == colours[3] != colours[1] == colours[2]


def test_the_largest_shares_are_drawn_in_the_order_of_their_labels():
    labels = [f"v{number}" for number in range(30)]
    reference = [1 / 30] * 30
    current = [0.0] * 29 + [1.0]
    facts = {"labels": labels, "reference": reference, "current": current}
    (axes,) = draw_shares("device", facts).axes
    shown = [label.get_text() for label in axes.get_yticklabels()]
    assert len(shown) == 20
    assert shown == sorted(shown, key=labels.index)
    assert shown[-1] == "v29"


def test_the_best_so_far_of_a_search_only_rises():
    values = [0.2, 0.1, 0.3]
    points = [
        {"minutes": minute, "ndcg10": value, "error": 0.05, "is_stopped": value == 0.1}
        for minute, value in enumerate(values)
    ]
    (axes,) = draw_objective(points).axes
    assert axes.lines[0].get_ydata().tolist() == [0.2, 0.2, 0.3]
    assert axes.lines[1].get_ydata() == pytest.approx([0.15, 0.25])
    assert [axes.lines[place].get_markerfacecolor() == "white" for place in (2, 4, 6)] == [
        False,
        True,
        False,
    ]


def test_the_winner_of_a_search_is_drawn_in_front_and_stopped_trials_are_crossed():
    winner = {"epochs": [1, 2], "ndcg10": [0.1, 0.3], "is_stopped": False, "is_winner": True}
    stopped = {"epochs": [1], "ndcg10": [0.05], "is_stopped": True, "is_winner": False}
    (axes,) = draw_asha([winner, stopped]).axes
    assert [line.get_marker() for line in axes.lines] == ["o", "x", "None"]
    assert axes.lines[-1].get_ydata().tolist() == [0.1, 0.3]


def test_parallel_lines_pass_through_the_values_and_below_what_takes_no_part():
    trials = [({"rate": 1e-4, "kind": "a"}, 0.1), ({"rate": 1e-2}, 0.3), ({"rate": 1e-3}, 0.2)]
    (axes,) = draw_parallel(trials, ["rate", "kind"], {"rate"}).axes
    heights = [line.get_ydata().tolist() for line in axes.lines[:3]]
    # The worst first; the rate halfway between in its logarithm.
    assert [one[0] for one in heights] == pytest.approx([0, 0.5, 1])
    assert [one[1] < 0 for one in heights] == [False, True, True]
    assert [one[2] for one in heights] == pytest.approx([0, 0.5, 1])


def test_importance_is_a_bar_for_each_parameter():
    (axes,) = draw_importance({"optimiser.learning_rate": 0.7, "loss.$kind$": 0.0}).axes
    assert [bar.get_width() for bar in axes.patches] == [0.7, 0.0]
