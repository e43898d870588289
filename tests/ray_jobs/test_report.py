"""The report of an evaluation: what it says, and what it leaves out."""

import copy

import pytest

from ray_jobs.report import describe_cut, describe_result, write_report
from recsys.metrics import METRICS

FACTS = {
    "seed": 3,
    "recipe": {"name": "bert4rec", "model": {"dim": 64}},
    "best": {"epoch": 2, "ndcg10": 0.12},
    "history": [
        {"epoch": 1, "loss": 5.0, "ndcg10": float("nan")},
        {"epoch": 2, "loss": 4.0, "ndcg10": 0.12},
    ],
}
LEAVE_ONE_OUT = {"kind": "leave-one-out", "validation_from": None, "test_from": None}


def fact(mean, num_users=50):
    return {"mean": mean, "low": mean - 0.01, "high": mean + 0.01, "num_users": num_users}


def row(mean):
    lists = {"coverage@10": 0.5, "gini@10": 0.7, "novelty@10": 8.0, "popularity@10": 0.9}
    return {**{metric: fact(mean) for metric in METRICS}, **lists, "seconds": 1.0}


def comparison(difference, lift):
    return {
        "difference": difference,
        "difference_low": difference - 0.01,
        "difference_high": difference + 0.01,
        "lift": lift,
        "lift_low": None if lift is None else lift - 0.1,
        "lift_high": None if lift is None else lift + 0.1,
        "is_significant": abs(difference) > 0.01,
    }


@pytest.fixture
def evaluation():
    slices = {
        "segment": {"new": fact(0.2), "loyal | old": fact(0.1), "rare": fact(0.0, 2)},
        "device": {"unknown": fact(0.15, 102)},
    }
    return {
        "run": "r1",
        "recipe": "bert4rec",
        "protocol": LEAVE_ONE_OUT,
        "target_event_types": [],
        "filter_seen": True,
        "sequences_version": 4,
        "items_version": 2,
        "sequences_from": {"events_version": 9, "users_version": None, "rules": "x"},
        "seed": 5,
        "timezone": "Europe/Berlin",
        "num_users": 102,
        "num_test_users": 300,
        "num_items": 1000,
        "targets_sha256": "ab" * 32,
        "rows": {"model": row(0.15), "model, time-blind": row(0.14), "popularity": row(0.1)},
        "comparisons": {"popularity": comparison(0.05, 0.5)},
        "comparisons_time_blind": {"popularity": comparison(0.04, 0.4)},
        "skipped_baselines": {"ease": "50,000 items; it stops at 12,000"},
        "strongest_baseline": "popularity",
        "slices": slices,
        "baseline_slices": copy.deepcopy(slices),
        "against": None,
        "command": "python -m ray_jobs.evaluate --config synthetic",
        "evaluated_at": "2026-11-21T10:00:00+00:00",
    }


@pytest.fixture
def report(tmp_path, evaluation):
    """Writes a report, with changes to the evaluation; returns its Markdown and its pictures."""

    def write(**changes):
        write_report(tmp_path, evaluation | changes, FACTS)
        assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
        pictures = {path.stem for path in (tmp_path / "plots").iterdir()}
        return (tmp_path / "report.md").read_text(), pictures

    return write


def test_what_is_needed_to_repeat_it_is_there(report):
    text, _ = report()
    assert "| Test pairs (sha256) | " + "ab" * 32 in text
    assert "| Versions of the tables | sequences 4, events 9, items 2 |" in text
    assert "| Seeds | training 3, sample and intervals 5 |" in text
    assert "| Users | 102 of 300 with a test event |" in text
    assert "| Items seen before | left out of the ranking |" in text
    assert "| Clock of hours and weekdays | Europe/Berlin |" in text
    assert "python -m ray_jobs.evaluate --config synthetic" in text
    assert '"dim": 64' in text


def test_every_metric_stands_with_its_interval(report):
    text, _ = report()
    assert text.count("0.1500 [0.1400, 0.1600]") >= len(METRICS)
    assert "| popularity | +50.0 % [40.0, 60.0] | +40.0 % [30.0, 50.0] |" in text
    assert "Left out: ease (50,000 items; it stops at 12,000)." in text


def test_chosen_settings_are_named(report):
    trials = [
        {"settings": {"window": 2, "backward": 0.3}, "ndcg10": 0.2},
        {"settings": {"window": 5, "backward": 0.3}, "ndcg10": 0.1},
    ]
    text, _ = report(
        baseline_trials={"covisitation": trials},
        baseline_settings={"covisitation": trials[0]["settings"]},
    )
    assert (
        "Settings of covisitation: window 2, backward 0.3; of 2 on validation targets, whose "
        "NDCG@10 went from 0.1000 to 0.2000."
    ) in text
    assert "Settings of" not in report()[0]


def test_one_part_is_no_slicing(report):
    text, pictures = report()
    assert pictures == {"rows", "training", "lists", "slice-segment"}
    assert "by device" not in text


def test_small_parts_are_in_the_table_and_not_in_the_picture(report):
    text, _ = report()
    assert "Drawn are the 2 of 3 with the most users." in text
    assert "| rare | 2 | 0.0000" in text
    assert "| loyal \\| old | 50 |" in text


def test_all_hours_are_drawn_as_lines_and_weekdays_as_bars(report, tmp_path):
    hours = {f"{hour:02d}": fact(0.1, 1 + hour) for hour in range(24)}
    weekdays = {"Monday": fact(0.1), "Sunday": fact(0.2)}
    slices = {"hour": hours, "weekday": weekdays}
    text, _ = report(slices=slices, baseline_slices=slices)
    assert "Drawn are the" not in text
    panels = {
        name: (tmp_path / "plots" / f"slice-{name}.svg").read_text().count('<g id="axes_')
        for name in slices
    }
    # Lines stand above a panel of their own with the users; bars name the users in their labels.
    assert panels == {"hour": 2, "weekday": 1}


def test_the_dates_of_a_temporal_cut_are_said(report):
    cut = {
        "kind": "temporal-cut",
        "validation_from": "2025-03-20T00:00:00Z",
        "test_from": "2025-03-25T12:00:00Z",
    }
    text, _ = report(protocol=cut)
    assert (
        "| Protocol | temporal-cut: training before 2025-03-20 00:00 UTC, validation from then on, "
        "test from 2025-03-25 12:00 UTC, the first target event of a user in each |" in text
    )
    text, _ = report(protocol={**cut, "cut_target": "last"})
    assert "the last target event of a user in each |" in text


def test_a_comparison_of_runs_has_a_picture_and_a_table(report):
    found = {"NDCG@10": comparison(0.02, 0.2), "HR@10": comparison(0.005, None)}
    rows = {"model": found, "model, time-blind": found}
    text, pictures = report(against={"run": "r0", "recipe": "sasrec", "rows": rows})
    assert "## Against the run r0" in text
    assert "| NDCG@10 | +0.0200 [0.0100, 0.0300] | +20.0 % [10.0, 30.0] |" in text
    assert "| HR@10 | +0.0050 [-0.0050, 0.0150] | +0.0050 [-0.0050, 0.0150] |" in text
    assert "against" in pictures


def test_without_baselines_the_model_stands_alone(report, evaluation):
    rows = {name: facts for name, facts in evaluation["rows"].items() if "model" in name}
    nothing = {"comparisons": {}, "comparisons_time_blind": {}, "baseline_slices": {}}
    text, _ = report(rows=rows, strongest_baseline=None, **nothing)
    assert "NDCG@10 0.1500 [0.1400, 0.1600] on 102 test users and 1,000 items." in text


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        (0.05, "above popularity, the strongest baseline, beyond noise (+50.0 %"),
        (0.005, "above popularity, the strongest baseline, within noise (+50.0 %"),
        (-0.05, "below popularity, the strongest baseline, beyond noise (+50.0 %"),
    ],
)
def test_the_result_says_how_it_stands_to_the_strongest_baseline(evaluation, difference, words):
    found = {"popularity": comparison(difference, 0.5)}
    assert words in describe_result(evaluation | {"comparisons": found})


def test_leave_one_out_has_no_dates():
    assert describe_cut(LEAVE_ONE_OUT) == (
        "the last event of each user tests, the one before validates"
    )
