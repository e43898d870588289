from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from data_lake.buckets import bucket_of
from data_lake.errors import TableError
from data_lake.maintenance import Trace
from data_lake.schemas import TIMESTAMP, events_schema, users_schema
from data_lake.tables import commit_parts, create_table, open_table, read_table, upsert, write_part
from ray_jobs import build_sequences, maintain, materialize
from ray_jobs.config import PipelineConfig
from ray_jobs.errors import ConfigError
from ray_jobs.sections.upkeep import MaintainConfig

INGEST = {
    "user_id": "int64",
    "item_id": "int64",
    "num_buckets": 2,
    "events": [{"path": "events", "format": "parquet", "columns": {}}],
}
USERS = (1, 2, 3, 4, 5)
NOW = datetime(2025, 10, 9, 8, tzinfo=UTC)
WEEK = timedelta(hours=168)


def pipeline(tmp_path, **maintain):
    storage = {"root": str(tmp_path)}
    return PipelineConfig(name="toy", storage=storage, ingest=INGEST, maintain=maintain)


def add_events(tmp_path, item, start):
    """An event of each user with one item, a file a bucket."""
    lake, schema = str(tmp_path / "lake"), events_schema("int64", "int64")
    table = create_table(lake, "events", schema, num_buckets=2)
    parts = []
    for at, user in enumerate(USERS, start):
        number = int(bucket_of(pa.array([user]), 2)[0])
        values = [f"e{at}", user, item, "view", at, None, None, None, None, 0, at, number]
        columns = [
            pa.array([value], pa.int64()).cast(TIMESTAMP)
            if field.type == TIMESTAMP
            else pa.array([value], field.type)
            for value, field in zip(values, schema, strict=True)
        ]
        rows = pa.Table.from_arrays(columns, schema=schema)
        parts.append(write_part(lake, "events", rows, number))
    commit_parts(table, parts)


@pytest.fixture
def lake(tmp_path):
    """Three events of each of five users, whom the users table knows too."""
    for start, item in ((0, 10), (100, 11), (200, 12)):
        add_events(tmp_path, item, start)
    lake = str(tmp_path / "lake")
    users = create_table(lake, "users", users_schema("int64"), num_buckets=2)
    upsert(users, pa.table({"user_id": USERS, "segment": ["new"] * 5}), "user_id")
    return lake


def sequences_of(lake):
    rows = read_table(open_table(lake, "sequences")).to_pylist()
    return {row["user_id"]: row for row in rows}


@pytest.mark.ray
def test_the_whole_round_and_the_next_build(tmp_path, lake, ray_cluster):
    build_sequences.run(pipeline(tmp_path))
    materialize.run(pipeline(tmp_path))
    before = sequences_of(lake)
    (tmp_path / "exposures").mkdir()
    shown = pa.table({"user_id": ["3", None, "2", "3"], "recommendation_id": [*"abcd"]})
    pq.write_table(shown, tmp_path / "exposures" / "1.parquet")

    report = maintain.run(pipeline(tmp_path, forget=["3", "77"]))
    figures = report.figures
    assert report.headline.startswith("2 users forgotten (8 rows), ")
    gone = {name: num for name, num in figures.items() if name.endswith("_rows_forgotten")}
    assert gone == {
        "events_rows_forgotten": 3,
        "users_rows_forgotten": 1,
        "sequences_rows_forgotten": 1,
        "history_rows_forgotten": 1,
        "exposures_rows_forgotten": 2,
    }
    left = pq.read_table(tmp_path / "exposures" / "1.parquet")
    assert left["recommendation_id"].to_pylist() == ["b", "c"]
    assert "maintain" in (tmp_path / "metrics" / "maintain.prom").read_text()
    assert (figures["events_files_before"], figures["events_files"]) == (12, 2)
    assert figures["events_files_deleted"] == 0
    assert figures["user 77"] == "gone"
    assert figures["user 3"].startswith("5 files hold rows until a vacuum after ")
    assert 3 not in sequences_of(lake)
    histories = [pq.read_table(path) for path in (tmp_path / "history").rglob("*.parquet")]
    assert 3 not in pa.concat_tables(histories)["user_id"].to_pylist()

    build_sequences.run(pipeline(tmp_path))
    assert sequences_of(lake) == {user: row for user, row in before.items() if user != 3}

    again = maintain.run(
        pipeline(tmp_path, forget=["3"], retention_hours=0, unsafe_retention=True)
    ).figures
    assert {name: num for name, num in again.items() if name.endswith("_rows_forgotten")} == {
        name: 0 for name in gone
    }
    assert again["user 3"].startswith("gone")
    assert again["events_files_deleted"] > 0
    assert sequences_of(lake).keys() == {1, 2, 4, 5}


@pytest.mark.ray
def test_each_step_can_be_left_out(tmp_path, lake, ray_cluster):
    before = sorted(Path(lake).rglob("*.*"))
    off = {"compact": False, "vacuum": False, "checkpoint": False, "prove": False}
    assert maintain.run(pipeline(tmp_path, **off)).figures == {}
    assert sorted(Path(lake).rglob("*.*")) == before


def test_a_lake_without_tables_is_refused(tmp_path):
    with pytest.raises(TableError, match=r"There is no table in .*/lake; run ray_jobs\.ingest"):
        maintain.run(pipeline(tmp_path))


def test_an_id_that_does_not_fit_is_refused(tmp_path, lake):
    with pytest.raises(ConfigError, match=r"maintain\.forget does not fit: .* 'bob' is none"):
        maintain.run(pipeline(tmp_path, forget=["1", "bob"]))


def test_a_short_retention_is_refused_unless_it_is_meant():
    with pytest.raises(ValidationError, match=r"retention_hours = 23 would break jobs that read"):
        MaintainConfig(retention_hours=23)
    assert MaintainConfig(retention_hours=24).retention_hours == 24
    assert MaintainConfig(retention_hours=0, unsafe_retention=True).retention_hours == 0


@pytest.mark.parametrize(
    ("traces", "num_exported", "named_at", "expected"),
    [
        ([], 0, None, "gone"),
        (
            [Trace("a", False, NOW), Trace("b", False, NOW - WEEK)],
            0,
            None,
            "2 files hold rows until a vacuum after 2025-10-16T08:00:00+00:00",
        ),
        (
            [Trace("a", True, NOW)],
            1,
            None,
            "2 files in use hold rows or cannot be read, run this job again",
        ),
        (
            [],
            0,
            NOW,
            "gone; the log may name the user until a checkpoint after 2025-11-08T08:00:00+00:00",
        ),
    ],
)
def test_the_verdict_says_what_is_left_and_for_how_long(traces, num_exported, named_at, expected):
    assert maintain._verdict(traces, num_exported, named_at, WEEK) == expected
