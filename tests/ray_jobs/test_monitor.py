"""The monitor: what it compares, what it counts, and that it tells a calm week from another."""

import json
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prometheus_client.parser import text_string_to_metric_families

from data_lake.buckets import bucket_of
from data_lake.errors import TableError
from data_lake.freshness import newest_event
from data_lake.schemas import events_schema, items_schema, users_schema
from data_lake.tables import commit_parts, create_table, open_table, upsert, write_part
from ray_jobs import monitor
from ray_jobs.config import PipelineConfig
from ray_jobs.drift.axes import DAY_US, Periods
from ray_jobs.drift.reference import Reference
from ray_jobs.errors import JobError
from ray_jobs.sections.upkeep import MonitorConfig
from recsys.artifact import publish
from recsys.errors import ArtifactError
from recsys.registry import promote
from serve_app.exposures import SCHEMA
from tests.conftest import make_shop, write_artifact
from tests.ray_jobs.drift.toys import exposure

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
    users = rng.integers(0, NUM_USERS, num_events)
    return pa.table(
        {
            "user_id": [f"u{n}" for n in users],
            "session_id": [
                f"s{n} of day {at // DAY_US}" for n, at in zip(users, times, strict=True)
            ],
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
    """A list a minute before every third event, which has its item in so many of the cases; every
    fourth list is of somebody who is known by a session alone.
    """
    rng = np.random.default_rng(seed)
    seen = events.take(np.arange(0, events.num_rows, 3))
    lists = [rng.permutation(40)[:10].tolist() for _ in range(seen.num_rows)]
    rows = []
    for row, picked in zip(seen.to_pylist(), lists, strict=True):
        names = [f"i{n}" for n in picked if f"i{n}" != row["item_id"]]
        if rng.random() < hit_rate:
            names[3] = row["item_id"]
        at = row["timestamp"] - timedelta(minutes=1)
        user_id = None if len(rows) % 4 == 3 else row["user_id"]
        session_id = row["session_id"]
        rows.append(exposure(user_id, at, names, session_id=session_id, top_score=rng.normal()))
    folder = root / "exposures"
    folder.mkdir(parents=True, exist_ok=True)
    for day, some in groupby(rows, key=lambda row: row["timestamp"].date()):
        table = pa.Table.from_pylist(list(some), schema=SCHEMA)
        first_us = round(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp() * 1e6)
        pq.write_table(table, folder / f"exposures-{first_us}-{first_us:032x}.parquet")


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
    # Every third event had a list, and all of them are answered: those of sessions, a quarter, too.
    assert facts["measures"]["live_hit_rate"]["num_current"] == pytest.approx(
        7 * NUM_USERS / 3, rel=0.1
    )
    reference = (tmp_path / "monitor" / "reference.json").read_text()

    strange = make_events(range(CALM_DAYS, ALL_DAYS), seed=2, shuffled=True)
    write_events(tmp_path, strange)
    write_lists(tmp_path, strange, hit_rate=0.1)
    report = monitor.run(pipeline(tmp_path))
    facts = read_report(report)
    assert alarms(facts) >= DRIFT
    assert not alarms(facts) & {"context_segment", "context_hour", "history_length", "scores"}
    assert report.headline.startswith("drift in popularity, items")
    assert facts["current"]["unknown_items"] == pytest.approx(0.1, abs=0.02)
    # The same version serves: what is compared with is the same.
    assert (tmp_path / "monitor" / "reference.json").read_text() == reference

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

    # Five weeks lie before the last two, and four such windows are eight.
    report = monitor.run(pipeline(tmp_path, days=14, reference_windows=4))
    assert report.headline == "nothing could be judged"
    assert "popularity, items, categories" in report.figures["gaps"]
    assert "of the 4 windows of 14 days that end with" in report.figures["gaps"]


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
    kept = None if kept_day is None else Reference({}, kept_day * DAY_US, ())
    trained_us = None if trained_day is None else trained_day * DAY_US - 1
    periods = monitor.choose_periods(MonitorConfig(), 100 * DAY_US - 1, trained_us, kept)
    assert periods == Periods(expected_day * DAY_US, 100 * DAY_US, 2, 7)
    assert periods.reference_from_us == (expected_day - 14) * DAY_US


def test_periods_that_overlap_are_refused():
    asked = MonitorConfig(reference_until=datetime(2025, 10, 6, tzinfo=UTC))
    with pytest.raises(JobError, match=r"begins on 2025-10-01.*, before the reference period ends"):
        monitor.choose_periods(asked, START_US + 2 * DAY_US, None, None)


def test_the_newest_event_is_in_the_log(tmp_path):
    create_table(str(tmp_path / "lake"), "events", events_schema("string", "string"), num_buckets=2)
    assert newest_event(open_table(str(tmp_path / "lake"), "events")) is None
    events = make_events(range(2), seed=0)
    write_events(tmp_path, events)
    newest = newest_event(open_table(str(tmp_path / "lake"), "events"))
    assert newest == events["timestamp"][-1].as_py()
