"""What is counted of the newest weeks of the lake."""

from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pytest

from data_lake.buckets import bucket_of
from data_lake.schemas import TIMESTAMP, events_schema, items_schema, quarantine_schema
from data_lake.tables import commit_parts, create_table, upsert, write_part
from data_lake.weeks import Weeks, add_counts, count_bucket, describe_weeks
from ray_jobs.retraining.new_weeks import count_lake_rows, find_leaders, measure_weeks
from recsys.catalogue import Catalogue
from tests.ray_jobs.conftest import tiny_config


def test_the_items_with_the_most_training_events_lead():
    ids = pa.array(np.arange(600))
    leaders = find_leaders(Catalogue.build(ids, np.arange(600), None)).to_pylist()
    assert leaders == list(range(599, 99, -1))


def test_rows_are_counted_by_the_log(tmp_path):
    config = tiny_config(tmp_path)
    lake_uri = config.storage.lake_uri
    assert count_lake_rows(config) == {}
    table = create_table(lake_uri, "quarantine", quarantine_schema())
    assert count_lake_rows(config) == {"quarantine": 0}
    time = pa.array([0, 0, 0]).cast(pa.timestamp("us", tz="UTC"))
    rows = pa.table([["{}"] * 3, ["odd"] * 3, ["a"] * 3, time], schema=quarantine_schema())
    for _ in range(2):
        commit_parts(table, [write_part(lake_uri, "quarantine", rows)])
    assert count_lake_rows(config) == {"quarantine": 6}
    # What a report says of a week that was refused.
    table.restore(1)
    assert count_lake_rows(config) == {"quarantine": 3}


def make_events(num, until_us):
    """Thirty users and ten items over five weeks."""
    rng = np.random.default_rng(0)
    times = until_us - rng.integers(1, 35 * 86_400_000_000, num)
    columns = {
        "event_id": [f"e{number}" for number in range(num)],
        "user_id": rng.integers(0, 30, num),
        "item_id": rng.integers(0, 10, num),
        "event_type": ["view"] * num,
        "timestamp": pa.array(times).cast(TIMESTAMP),
        "ingested_at": pa.array(np.zeros(num, np.int64)).cast(TIMESTAMP),
        "arrival": np.arange(num),
    }
    events = pa.table(columns)
    buckets = pa.array(bucket_of(events["user_id"], 2))
    return events.append_column(pa.field("user_bucket", pa.int32()), buckets)


@pytest.mark.ray
def test_buckets_are_counted_apart_and_told_together(tmp_path, ray_cluster):
    config = tiny_config(tmp_path)
    lake_uri = config.storage.lake_uri
    weeks = Weeks.ending(datetime(2026, 1, 29, tzinfo=UTC), 7, 1, 4)
    events = make_events(2000, weeks.until_us)
    schema = events_schema("int64", "int64")
    table = create_table(lake_uri, "events", schema, num_buckets=2)
    parts = []
    for bucket in (0, 1):
        rows = events.filter(pa.array(events["user_bucket"].to_numpy() == bucket))
        columns = [
            rows[field.name] if field.name in rows.column_names else pa.nulls(len(rows), field.type)
            for field in schema
        ]
        parts.append(write_part(lake_uri, "events", pa.table(columns, schema=schema), bucket))
    commit_parts(table, parts)
    items = create_table(lake_uri, "items", items_schema("int64"))
    upsert(items, pa.table({"item_id": pa.array([8])}), "item_id")

    catalogue = Catalogue.build(pa.array(np.arange(8)), np.arange(8, 0, -1), None)
    found = measure_weeks(config, weeks, catalogue)
    leaders, known = find_leaders(catalogue), pa.array(np.arange(9))
    alone = add_counts([count_bucket(events, weeks, leaders)])
    assert found == describe_weeks(alone, weeks, leaders, known)
    assert sum(found.rows_W) == 2000
