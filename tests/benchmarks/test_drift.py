"""The benchmark of drift: what its changes change, and how it reports."""

import numpy as np
import pyarrow as pa
import pytest

from benchmarks.drift import (
    EVENT_CHANGES,
    LIST_CHANGES,
    SHOP,
    UNKNOWN_IDS,
    add_runs,
    interval,
    render,
    summarise,
)
from data_lake.synthetic import build_shop

LAW = build_shop(SHOP.model_copy(update={"num_items": 50, "num_categories": 5}), 0)
CHOSEN = np.array([True, False, True])


def events():
    return pa.table(
        {
            "item_id": LAW.catalogue.item_ids[:3],
            "device": ["mobile"] * 3,
            "timestamp": pa.array([0, 1, 2], pa.timestamp("us", tz="UTC")),
        }
    )


@pytest.mark.parametrize("name", EVENT_CHANGES)
def test_only_the_chosen_events_change(name):
    change, _ = EVENT_CHANGES[name]
    changed = change(LAW, events(), CHOSEN, np.random.default_rng(1))
    assert changed.schema == events().schema
    assert changed.slice(1, 1) == events().slice(1, 1)
    assert changed != events()


def test_unknown_items_are_none_of_the_shop():
    assert not set(UNKNOWN_IDS) & set(build_shop(SHOP, 0).catalogue.item_ids)


@pytest.mark.parametrize("name", LIST_CHANGES)
def test_only_the_chosen_lists_change(name):
    lists = pa.table({"item_ids": [["1"], ["2"], ["3"]], "score": [0.0, 1.0, 2.0]})
    change, _ = LIST_CHANGES[name]
    changed = change(LAW, lists, CHOSEN, np.random.default_rng(1))
    assert changed.slice(1, 1) == lists.slice(1, 1)
    assert changed != lists


def test_the_interval_of_a_share_is_wilsons():
    low, high = interval(5, 100)
    assert (low, high) == (pytest.approx(0.0215, abs=1e-4), pytest.approx(0.1118, abs=1e-4))
    assert interval(0, 10)[0] == 0


def test_the_report_has_a_row_for_each_change_and_strength():
    name = "events come from desktops"
    found = {(name, 0.1): [{"context_device"}, {"items"}, set(), {"context_device"}]}
    result = {
        "machine": "a machine",
        "seconds": 9.0,
        "users": 10,
        "events_of_the_current_week": 100.0,
        "measures": ["items"],
        "false_alarm_rate_asked": 0.05,
        "calm_runs": 20,
        "runs_with_false_alarm": 1,
        "false_alarms_by_measure": {"items": 1},
        "detection": summarise(found),
    }
    text = render(result)
    assert f"| {name} | context_device | 4 | 50% (75%) |" in text
    assert "1 of 20 runs without drift raised any alarm, 5.0%" in text


def test_runs_that_are_added_count_like_those_of_the_record():
    first = {
        "seconds": 5.0,
        "events_of_the_current_week": 10.0,
        "calm_runs": 3,
        "runs_with_false_alarm": 1,
        "false_alarms_by_measure": {"items": 1},
        "detection": ["as it was"],
    }
    second = first | {"calm_runs": 1, "events_of_the_current_week": 30.0, "detection": []}
    both = add_runs(first, second)
    assert (both["calm_runs"], both["runs_with_false_alarm"]) == (4, 2)
    assert both["events_of_the_current_week"] == (3 * 10 + 30) / 4
    assert both["false_alarms_by_measure"] == {"items": 2}
    assert both["detection"] == ["as it was"]
