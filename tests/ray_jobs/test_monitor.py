"""The monitor: what it compares, what it counts, and that it tells a calm week from another."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError

from data_lake.buckets import bucket_of
from data_lake.errors import SourceError, TableError
from data_lake.freshness import newest_event
from data_lake.schemas import events_schema, items_schema, users_schema
from data_lake.tables import commit_parts, create_table, open_table, upsert, write_part
from ray_jobs import monitor
from ray_jobs.config import MonitorConfig, PipelineConfig
from ray_jobs.drift.answers import count_lists
from ray_jobs.drift.axes import DAY_US, NUM_GROUPS, Periods, group_of
from ray_jobs.drift.counts import count_bucket
from ray_jobs.drift.gather import _refuse_empty_reference
from ray_jobs.drift.items import MISSING, OTHER, add_items, count_items, learn_items
from ray_jobs.drift.lists import ListsPlan, find_files, find_score_edges, split_lists
from ray_jobs.drift.plan import Plan, Visits
from ray_jobs.drift.verdict import Kept, read_kept, write_kept
from ray_jobs.errors import JobError
from recsys.artifact import publish
from recsys.drift_null import Threshold
from recsys.errors import ArtifactError
from recsys.registry import promote
from serve_app.exposures import SCHEMA
from tests.conftest import make_shop, write_artifact

START = datetime(2025, 10, 6, tzinfo=UTC)
START_US = round(START.timestamp() * 1e6)
CALM_DAYS, ALL_DAYS = 49, 56
NUM_USERS = 400
INGEST = {
    "user_id": "string",
    "item_id": "string",
    "num_buckets": 2,
    "events": [{"path": "events", "format": "parquet", "columns": {}}],
}
DRIFT = {"items", "unknown_items", "context_device", "live_hit_rate", "live_click_through"}


def pipeline(root, **settings):
    storage = {"root": str(root)}
    settings = {"num_resamples": 1000, "history_days": 7} | settings
    return PipelineConfig(name="toy", storage=storage, ingest=INGEST, monitor=settings)


def make_events(days, *, seed, shuffled=False):
    """Events of a toy shop as the lake has them, by time; a shuffled one has other favourites, more
    desktops, and a tenth of the events on items that are new.
    """
    rng = np.random.default_rng([seed, days[0]])
    num_events = NUM_USERS * len(days)
    weights = np.arange(1, 41.0) if shuffled else np.arange(40, 0, -1.0)
    items = rng.choice([f"i{n}" for n in range(40)], num_events, p=weights / weights.sum())
    if shuffled:
        items = np.where(rng.random(num_events) < 0.1, "brand new", items)
    first_us = START_US + days[0] * DAY_US
    times = np.sort(rng.integers(first_us, first_us + len(days) * DAY_US, num_events))
    devices = rng.choice(
        ["mobile", "desktop"], num_events, p=(0.3, 0.7) if shuffled else (0.6, 0.4)
    )
    return pa.table(
        {
            "user_id": [f"u{n}" for n in rng.integers(0, NUM_USERS, num_events)],
            "item_id": items,
            "timestamp": pa.array(times, pa.timestamp("us", tz="UTC")),
            "event_type": rng.choice(["view", "purchase"], num_events, p=(0.9, 0.1)),
            "device": devices,
        }
    )


def write_events(root, events):
    """Commits events to the lake, with what nobody asks for here."""
    schema = events_schema("string", "string")
    table = create_table(str(root / "lake"), "events", schema, num_buckets=2)
    bucket, parts = bucket_of(events["user_id"], 2), []
    for number in (0, 1):
        rows = events.filter(pa.array(bucket == number))
        known = dict(zip(rows.column_names, rows.columns, strict=True))
        known |= {"ingested_at": rows["timestamp"], "arrival": np.arange(rows.num_rows)}
        known["event_id"] = [f"{START_US}-{number}-{n}" for n in range(rows.num_rows)]
        columns = [known.get(field.name, pa.nulls(rows.num_rows, field.type)) for field in schema]
        whole = pa.table(dict(zip(schema.names, columns, strict=True)))
        parts.append(write_part(str(root / "lake"), "events", whole, number))
    commit_parts(table, parts)


def write_lists(root, events, *, hit_rate, seed=0):
    """A list a minute before every third event, which has its item in so many of the cases."""
    rng = np.random.default_rng(seed)
    seen = events.take(np.arange(0, events.num_rows, 3))
    lists = [rng.permutation(40)[:10].tolist() for _ in range(seen.num_rows)]
    rows = []
    for row, picked in zip(seen.to_pylist(), lists, strict=True):
        names = [f"i{n}" for n in picked if f"i{n}" != row["item_id"]]
        if rng.random() < hit_rate:
            names[3] = row["item_id"]
        at = row["timestamp"] - timedelta(minutes=1)
        rows.append(exposure(row["user_id"], at, names, top_score=rng.normal()))
    folder = root / "exposures"
    folder.mkdir(parents=True, exist_ok=True)
    for day, some in groupby(rows, key=lambda row: row["timestamp"].date()):
        table = pa.Table.from_pylist(list(some), schema=SCHEMA)
        first_us = round(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp() * 1e6)
        pq.write_table(table, folder / f"exposures-{first_us}-{first_us:032x}.parquet")


def exposure(user_id, at, item_ids, **others):
    row = dict.fromkeys(SCHEMA.names) | {"model_version": "v1", "source": "model"}
    return row | {"user_id": user_id, "timestamp": at, "item_ids": item_ids, **others}


def write_shop(root):
    """The tables of a lake with seven calm weeks, and a registry whose version was trained on
    it.
    """
    lake, shop = str(root / "lake"), make_shop()
    items = create_table(lake, "items", items_schema("string"))
    upsert(items, shop.catalogue.table.select(["item_id", "category"]), "item_id")
    users = create_table(lake, "users", users_schema("string"), num_buckets=2)
    names = [f"u{n}" for n in range(NUM_USERS)]
    segments = ["new", "loyal"] * (NUM_USERS // 2)
    upsert(users, pa.table({"user_id": names, "segment": segments}), "user_id")
    facts = {
        "trained_until_us": START_US + CALM_DAYS * DAY_US - 1,
        "published_at": datetime.now(UTC).isoformat(),
    }
    publish(root / "registry", "v1", partial(write_artifact, shop=shop), facts)
    promote(root / "registry", "v1")
    events = make_events(range(CALM_DAYS), seed=1)
    write_events(root, events)
    return events


def read_report(report):
    return json.loads(Path(report.figures["report"]).with_suffix(".json").read_text())


def alarms(facts):
    return {name for name, found in facts["measures"].items() if found["alarm"]}


def gauges(root):
    text = (root / "metrics" / "monitor.prom").read_text()
    return {
        (sample.name, sample.labels.get("measure")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.mark.ray
def test_a_calm_week_is_calm_and_another_is_not(tmp_path, ray_cluster):
    calm = write_shop(tmp_path)
    write_lists(tmp_path, calm, hit_rate=0.4)
    report = monitor.run(pipeline(tmp_path))
    facts = read_report(report)
    assert report.headline == "nothing moved beyond chance"
    assert facts["gaps"] == {}
    assert {"popularity", "items", "categories", "history_length", "coverage", "scores"} <= set(
        facts["measures"]
    )
    assert facts["current"]["live_hit_rate"] == pytest.approx(0.4, abs=0.05)
    assert facts["current"]["unknown_items"] == 0
    thresholds = (tmp_path / "monitor" / "thresholds.json").read_text()

    strange = make_events(range(CALM_DAYS, ALL_DAYS), seed=2, shuffled=True)
    write_events(tmp_path, strange)
    write_lists(tmp_path, strange, hit_rate=0.1)
    report = monitor.run(pipeline(tmp_path))
    facts = read_report(report)
    assert alarms(facts) >= DRIFT
    assert not alarms(facts) & {"context_segment", "context_hour", "history_length", "scores"}
    assert report.headline.startswith("drift in popularity, items")
    assert facts["current"]["unknown_items"] == pytest.approx(0.1, abs=0.02)
    # The same version serves: the reference period is the same, and so is what it told.
    assert (tmp_path / "monitor" / "thresholds.json").read_text() == thresholds

    found = gauges(tmp_path)
    for name in facts["measures"]:
        drift, threshold, alarm = (
            found[f"nextitem_drift_{figure}", name] for figure in ("value", "threshold", "alarm")
        )
        assert alarm == (drift > threshold) == (name in alarms(facts))
    assert found["nextitem_live_hit_rate_ratio", None] == facts["current"]["live_hit_rate"]
    assert found["nextitem_live_click_through_ratio", None] == pytest.approx(0.1, abs=0.05)
    assert found["nextitem_unknown_items_ratio", None] == facts["current"]["unknown_items"]
    assert 0 < found["nextitem_serving_version_age_seconds", None] < 3600
    age_s = (datetime.now(UTC) - START - timedelta(days=ALL_DAYS)).total_seconds()
    assert found["nextitem_newest_event_age_seconds", None] == pytest.approx(age_s, abs=3600)

    text = Path(report.figures["report"]).read_text()
    assert text.startswith("<!doctype html>")
    assert "What moved" in text
    assert 'src="http' not in text


@pytest.mark.ray
def test_without_lists_the_rest_is_judged_and_the_gap_is_stated(tmp_path, ray_cluster):
    write_shop(tmp_path)
    facts = read_report(monitor.run(pipeline(tmp_path, days=1, reference_windows=7)))
    assert alarms(facts) == set()
    assert facts["gaps"]["live_hit_rate"] == facts["gaps"]["coverage"] == "no list was logged"
    assert facts["gaps"]["scores"].startswith("no list of the version that serves has a score")
    assert facts["current"]["live_click_through"] is None
    assert ("nextitem_live_hit_rate_ratio", None) not in gauges(tmp_path)
    late = datetime(2026, 1, 2, tzinfo=UTC)
    with pytest.raises(JobError, match="There is no event in the current period, 2026-01-01"):
        monitor.run(pipeline(tmp_path, days=1, reference_windows=7, current_until=late))


def test_nothing_that_serves_is_one_sentence(tmp_path):
    with pytest.raises(ArtifactError, match=r"No version in .*registry serves yet; run"):
        monitor.run(pipeline(tmp_path))


def test_a_lake_without_events_is_one_sentence(tmp_path):
    publish(tmp_path / "registry", "v1", partial(write_artifact, shop=make_shop()), {})
    promote(tmp_path / "registry", "v1")
    with pytest.raises(TableError, match="There is no table 'events'"):
        monitor.run(pipeline(tmp_path))
    create_table(str(tmp_path / "lake"), "events", events_schema("string", "string"), num_buckets=2)
    with pytest.raises(JobError, match=r"The events table is empty; run ray_jobs\.ingest first"):
        monitor.run(pipeline(tmp_path))


def test_reports_need_a_folder(tmp_path):
    config = PipelineConfig(name="toy", storage={"root": "s3://shop/home"}, ingest=INGEST)
    with pytest.raises(JobError, match="written to a folder, not to s3://shop/home"):
        monitor.run(config)


def test_a_reference_period_without_events_is_one_sentence():
    counted = pa.table({"item_id": ["i1"], "first_us": [0], "even": [0], "odd": [0]})
    periods = Periods(START_US, START_US + 7 * DAY_US, 2, 7)
    with pytest.raises(JobError, match=r"reference period, 2025-09-22.* to 2025-10-06.*; set"):
        _refuse_empty_reference(counted, periods)


def test_a_rate_that_resamples_cannot_tell_is_refused():
    with pytest.raises(ValidationError, match="100 resamples do not tell a false_alarm_rate of"):
        MonitorConfig(num_resamples=100, false_alarm_rate=0.001)


@pytest.mark.parametrize(
    ("trained_day", "kept_day", "expected_day"),
    [
        (80, None, 80),  # trained before the current period
        (98, None, 93),  # trained on some of it
        (None, None, 93),
        (80, 75, 75),  # as in earlier runs for the version
        (80, 95, 80),  # which looked at later days
    ],
)
def test_the_reference_period_ends_with_training_and_before_the_current_one(
    trained_day, kept_day, expected_day
):
    kept = None if kept_day is None else Kept({"reference_until_us": kept_day * DAY_US}, (), {})
    trained_us = None if trained_day is None else trained_day * DAY_US - 1
    periods = monitor.choose_periods(MonitorConfig(), 100 * DAY_US - 1, trained_us, kept)
    assert periods == Periods(expected_day * DAY_US, 100 * DAY_US, 2, 7)
    assert periods.reference_from_us == (expected_day - 14) * DAY_US


def test_periods_that_overlap_are_refused():
    asked = MonitorConfig(reference_until=datetime(2025, 10, 6, tzinfo=UTC))
    with pytest.raises(JobError, match=r"begins on 2025-10-01.*, before the reference period ends"):
        monitor.choose_periods(asked, START_US + 2 * DAY_US, None, None)


def test_slots_are_days_of_the_reference_and_the_current_period():
    periods = Periods(2 * DAY_US, 5 * DAY_US, 2, 1)
    times = np.array([-1, 0, DAY_US, 2 * DAY_US, 4 * DAY_US, 5 * DAY_US])
    assert periods.slot_of(times).tolist() == [-1, 0, 1, -1, 2, -1]
    assert periods.window_start_us(np.array([0, 1])).tolist() == [0, DAY_US]


def plan_of(events, *, periods, **changes):
    """A plan for items `a` to `d`, of which the catalogue lacks `d`."""
    facts, labels = learn_items(
        events,
        pa.array(["a", "b", "c"]),
        pa.table({"item_id": ["a", "b"], "category": ["x", None]}),
    )
    plan = Plan(
        periods=periods,
        items=facts,
        category_labels=labels,
        context=make_shop().context,
        events_until_us=periods.current_until_us,
        attribution_us=3600 * 1_000_000,
        history_us=2 * DAY_US,
        click_types=(),
        score_edges=(),
        options={},
    )
    return replace(plan, **changes)


@pytest.fixture
def toy(tmp_path):
    """A file of events at day, user, item, type and device; and a plan: two reference days, one
    more between, and a current day.
    """
    rows = [
        (0.1, "u1", "a", "view", "mobile"),
        (0.2, "u1", "b", "view", "tv"),
        (1.2, "u1", "a", "purchase", None),
        (2.5, "u1", "d", "view", "mobile"),
        (3.1, "u1", "d", "view", "mobile"),
        (3.2, "u2", "a", "view", "desktop"),
    ]
    days, users, items, types, devices = zip(*rows, strict=True)
    times = pa.array([round(day * DAY_US) for day in days], pa.timestamp("us", tz="UTC"))
    path = str(tmp_path / "events.parquet")
    table = pa.table(
        {
            "user_id": users,
            "item_id": items,
            "event_type": types,
            "device": devices,
            "timestamp": times,
        }
    )
    pq.write_table(table, path)
    periods = Periods(2 * DAY_US, 4 * DAY_US, 2, 1)
    counted = count_items([path], periods, {})
    return path, plan_of(counted, periods=periods)


def counts_of(counts, plan, name):
    """What is not 0, as {slot: {label: count}}; groups added up."""
    labels = plan.measures[name].labels
    return {
        slot: {labels[k]: int(found[k]) for k in np.flatnonzero(found)}
        for slot, found in enumerate(counts[name].sum(axis=0))
        if found.any()
    }


def test_events_are_counted_by_slot_and_value(toy):
    path, plan = toy
    counts = count_bucket([path], [], plan)
    assert counts_of(counts, plan, "context_device") == {
        0: {"mobile": 1, OTHER: 1},
        1: {MISSING: 1},
        2: {"mobile": 1, "desktop": 1},
    }
    assert counts_of(counts, plan, "categories") == {
        0: {"x": 1, MISSING: 1},
        1: {"x": 1},
        2: {"x": 1, MISSING: 1},
    }
    assert counts_of(counts, plan, "context_segment")[2] == {MISSING: 2}
    assert counts_of(counts, plan, "context_hour")[0] == {"02": 1, "04": 1}


def test_items_are_unknown_where_the_version_or_an_earlier_one_lacks_them(toy):
    path, plan = toy
    counts = count_bucket([path], [], plan)
    # On day 0 everything is new; on day 3 the catalogue decides.
    assert counts_of(counts, plan, "unknown_items") == {
        0: {"unknown": 2},
        1: {"known": 1},
        2: {"known": 1, "unknown": 1},
    }


def test_histories_are_the_events_of_two_days_before(toy):
    path, plan = toy
    counts = count_bucket([path], [], plan)
    assert counts_of(counts, plan, "history_length") == {
        0: {"0": 1, "1": 1},
        1: {"2-4": 1},
        2: {"0": 1, "2-4": 1},
    }


def test_popularity_is_what_the_other_half_of_the_users_made_it(toy):
    path, plan = toy
    is_odd = group_of(pa.array(["u1"]))[0] % 2
    mine, others = plan.items.popularity_HI[is_odd], plan.items.popularity_HI[1 - is_odd]
    row = plan.items.find(pa.array(["a"]))[0]
    assert (mine[row], set(others)) == (0, {3})
    counts = count_bucket([path], [], plan)
    assert counts_of(counts, plan, "popularity")[0] == {"unseen": 2}


def shown(*lists):
    """Lists as tasks get them: day, user and items."""
    days, users, items = zip(*lists, strict=True)
    return pa.table(
        {
            "user_id": users,
            "group": np.zeros(len(lists), np.int64),
            "time_us": np.array([round(day * DAY_US) for day in days]),
            "item_ids": pa.array(items, pa.list_(pa.string())),
            "score": np.full(len(lists), np.nan),
        }
    )


HOUR = 1 / 24


def test_lists_are_hit_by_the_next_event_and_clicked_by_any(toy):
    path, plan = toy
    plan = replace(plan, attribution_us=3 * 3600 * 1_000_000)
    lists = shown(
        (0.1 - HOUR, "u1", ["b", "a"]),  # next is a: hit, click
        (0.1, "u1", ["a"]),  # what happens at that very moment is no answer; next is b: miss
        (0.1 - HOUR / 2, "u1", ["b"]),  # next is a: miss; b comes within three hours: click
        (1.2 - 4 * HOUR, "u1", ["a"]),  # too early for an answer
        (1.2 - HOUR, "u3", ["a"]),  # nobody answers
        (3.2 - HOUR, "u2", []),  # nothing was shown
        (4 - HOUR, "u2", ["a"]),  # the window is still open
    )
    counts = count_bucket([path], [], plan, lists)
    assert counts_of(counts, plan, "live_hit_rate") == {0: {"hit": 1, "miss": 2}, 2: {"miss": 1}}
    assert counts_of(counts, plan, "live_click_through") == {
        0: {"click": 2, "no click": 1},
        1: {"no click": 2},
        2: {"no click": 1},
    }
    purchases = count_bucket([path], [], replace(plan, click_types=("purchase",)), lists)
    assert counts_of(purchases, plan, "live_click_through")[0] == {"no click": 3}


def test_the_eleventh_item_is_no_hit(toy):
    path, plan = toy
    lists = shown((0.1 - HOUR / 2, "u1", ["z"] * 10 + ["a"]))
    counts = count_bucket([path], [], plan, lists)
    assert counts_of(counts, plan, "live_hit_rate") == {0: {"miss": 1}}
    assert counts_of(counts, plan, "live_click_through") == {0: {"click": 1}}


def test_coverage_counts_lists_and_those_of_each_known_item(toy):
    _, plan = toy
    lists = shown((0.1, "u1", ["a", "d", "z"]), (0.2, None, ["a", "b"]), (2.5, "u1", ["c"]))
    counts = count_lists(lists, plan)
    (found,) = counts_of(counts, plan, "coverage").values()
    assert sorted(found.values()) == [1, 2, 2]
    assert found["lists"] == 2


def test_scores_are_counted_by_decile(toy):
    _, plan = toy
    lists = shown((0.1, "u1", ["a"]), (0.2, "u1", ["a"]), (3.5, "u1", ["a"]))
    lists = lists.set_column(4, "score", pa.array([0.5, np.nan, 2.5]))
    counts = count_lists(lists, plan := replace(plan, score_edges=(1.0, 2.0)))
    assert counts_of(counts, plan, "scores") == {0: {"above -inf": 1}, 2: {"above 2": 1}}


def test_events_of_nobody_are_counted_as_nothing(toy):
    path, plan = toy
    late = replace(
        plan, periods=Periods(200 * DAY_US, 300 * DAY_US, 2, 1), events_until_us=300 * DAY_US
    )
    counts = count_bucket([path], [], late, shown((299.5, "u1", ["a"])))
    assert not counts["popularity"].any()
    assert counts["live_click_through"].sum() == 1


def test_counts_of_several_buckets_add_up():
    one = pa.table({"item_id": ["a", "b"], "first_us": [5, 6], "even": [1, 0], "odd": [0, 2]})
    two = pa.table({"item_id": ["b"], "first_us": [3], "even": [4], "odd": [1]})
    added = add_items([one, two]).sort_by("item_id").to_pylist()
    assert added == [
        {"item_id": "a", "first_us": 5, "even": 1, "odd": 0},
        {"item_id": "b", "first_us": 3, "even": 4, "odd": 3},
    ]


def test_groups_of_users_are_all_used():
    groups = group_of(pa.array([f"u{n}" for n in range(20_000)]))
    assert set(groups) == set(range(NUM_GROUPS))
    assert len(group_of(pa.array([], pa.string()))) == 0


def lists_plan(kind=None):
    periods = Periods(2 * DAY_US, 4 * DAY_US, 2, 1)
    return ListsPlan(periods, "v1", kind or pa.int64(), 3, {})


def write_log(folder, name, rows, schema=SCHEMA):
    folder.mkdir(exist_ok=True)
    names = set(schema.names)
    kept = [{key: value for key, value in row.items() if key in names} for row in rows]
    pq.write_table(pa.Table.from_pylist(kept, schema=schema), folder / name)
    return str(folder / name)


def test_files_are_pruned_by_the_time_in_their_names(tmp_path):
    for day in (-3, 0, 2, 3, 5):
        write_log(tmp_path, f"exposures-{max(0, day) * DAY_US}-{'ab' * 16}.parquet", [])
    (tmp_path / ".exposures-0-ab.parquet").touch()
    (tmp_path / "notes.txt").touch()
    (found,) = find_files(str(tmp_path), Periods(4 * DAY_US, 5 * DAY_US, 2, 1), {})
    assert [path.rpartition("/")[2].split("-")[1] for path in found] == [
        str(day * DAY_US) for day in (2, 3)
    ]
    assert find_files(str(tmp_path / "nothing"), Periods(0, 9, 2, 1), {}) == []


def test_lists_go_to_the_bucket_of_their_user(tmp_path):
    at = datetime(1970, 1, 1, 12, tzinfo=UTC)
    rows = [
        exposure("7", at, ["a"], top_score=0.5),
        exposure("guest", at, ["b"], top_score=0.7),
        exposure(None, at, ["c"], session_id="s1", model_version="v0", top_score=0.9),
        exposure("8", at + timedelta(days=30), ["d"]),
    ]
    path = write_log(tmp_path, "exposures-0-ab.parquet", rows)
    *pieces, scores = split_lists([path], lists_plan())
    (bucket,) = bucket_of(pa.array([7]), 3)
    assert [piece.num_rows for piece in pieces] == [*(int(n == bucket) for n in range(3)), 2]
    assert pieces[bucket]["group"].to_pylist() == group_of(pa.array([7])).tolist()
    assert pieces[3]["user_id"].to_pylist() == [None, None]
    # Scores of another version mean something else.
    np.testing.assert_array_equal(pieces[3]["score"], [0.7, np.nan])
    assert sorted(scores) == [0.5, 0.7]


def test_logs_without_scores_are_read(tmp_path):
    at = datetime(1970, 1, 1, tzinfo=UTC)
    schema = SCHEMA.remove(SCHEMA.get_field_index("top_score"))
    path = write_log(tmp_path, "exposures-0-ab.parquet", [exposure("u7", at, ["a"])], schema)
    *pieces, scores = split_lists([path], lists_plan(pa.string()))
    assert sum(piece.num_rows for piece in pieces) == 1
    assert len(scores) == 0
    assert find_score_edges([scores]) == ()


def test_a_log_that_is_no_log_is_named(tmp_path):
    path = tmp_path / "exposures-0-ab.parquet"
    path.write_text("lists")
    with pytest.raises(SourceError, match=r"exposures-0-ab\.parquet cannot be read as a log"):
        list(split_lists([str(path)], lists_plan()))


def test_deciles_cut_scores_into_equal_parts():
    edges = find_score_edges([np.arange(50.0), np.arange(50.0, 101)])
    assert edges == pytest.approx(tuple(range(10, 100, 10)))
    assert find_score_edges([np.ones(100)]) == (1.0,)


def test_thresholds_are_read_again_for_the_same_settings(tmp_path):
    origin = {"settings": {"version": "v1"}, "reference_until_us": 5}
    kept = Kept(origin, (0.5,), {"m": Threshold(1, 2, 3, 4)})
    write_kept(tmp_path, kept)
    assert read_kept(tmp_path, {"version": "v1"}) == kept
    assert read_kept(tmp_path, {"version": "v2"}) is None
    assert read_kept(tmp_path / "nothing", {"version": "v1"}) is None
    (tmp_path / "thresholds.json").write_text('{"computed_from": 3}')
    with pytest.raises(JobError, match=r"thresholds\.json is damaged .*; delete it"):
        read_kept(tmp_path, {"version": "v1"})


def test_the_newest_event_is_in_the_log(tmp_path):
    create_table(str(tmp_path / "lake"), "events", events_schema("string", "string"), num_buckets=2)
    assert newest_event(open_table(str(tmp_path / "lake"), "events")) is None
    events = make_events(range(2), seed=0)
    write_events(tmp_path, events)
    newest = newest_event(open_table(str(tmp_path / "lake"), "events"))
    assert newest == events["timestamp"][-1].as_py()


def test_visits_know_the_group_of_their_user():
    nothing = np.empty(0, np.int64)
    visits = Visits(pa.array(["u1", "u2"]), np.array([0, 1, 1]), nothing, nothing, {})
    first, second = group_of(pa.array(["u1", "u2"]))
    assert visits.groups_N.tolist() == [first, second, second]
