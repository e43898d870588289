from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_lake import ingest
from data_lake.buckets import bucket_of
from data_lake.errors import SourceError
from data_lake.ingest import (
    PartTask,
    Target,
    complete_events,
    load_events,
    load_part,
    load_rows,
    order_by_bucket,
)
from data_lake.schemas import TIMESTAMP, events_schema
from data_lake.sources import Part, SourceConfig
from data_lake.tables import table_uri

NOW_US = 1_760_000_000_000_000
COLUMNS = {name: name for name in ("event_id", "user_id", "item_id", "event_type", "timestamp")}


@pytest.fixture
def target(tmp_path):
    schema = events_schema("int64", "int64")
    return Target(str(tmp_path / "lake"), {}, schema, num_buckets=4, started_us=NOW_US)


def task(index=0, path="x", columns=COLUMNS, kind="csv"):
    config = SourceConfig(path=path, format=kind, columns=columns)
    return PartTask(config, Part(path, 0, 10_000), index, digest=f"digest {index}")


def rows_of(users, **columns):
    """Normalised rows of these users, one microsecond apart."""
    num_rows = len(users)
    return pa.table(
        {
            "user_id": pa.array(users, pa.int64()),
            "item_id": pa.array([7] * num_rows, pa.int64()),
            "event_type": pa.array(["view"] * num_rows, pa.string()),
            "timestamp": pa.array(np.arange(num_rows) + NOW_US).cast(TIMESTAMP),
        }
        | columns
    )


def write_csv(path, lines):
    path.write_text("\n".join([",".join(COLUMNS), *lines, ""]))
    return str(path)


def test_events_are_ordered_by_bucket_and_arrival(target):
    events = order_by_bucket(complete_events(rows_of(range(20)), task(3), target))
    buckets = bucket_of(pa.array(range(20)), 4)
    assert events["user_bucket"].to_pylist() == sorted(buckets)
    assert events["user_id"].to_pylist() == np.argsort(buckets, kind="stable").tolist()


def test_arrival_counts_rows_within_a_part_and_parts_above(target):
    first = complete_events(rows_of([1, 1]), task(0), target)["arrival"].to_pylist()
    second = complete_events(rows_of([1, 1]), task(2), target, 5)["arrival"].to_pylist()
    assert first == [0, 1]
    assert second == [2 * 2**32 + 5, 2 * 2**32 + 6]


def test_ids_are_derived_only_where_a_source_has_none(target):
    given = complete_events(rows_of([1], event_id=pa.array(["e1"])), task(), target)
    derived = complete_events(rows_of([1, 1]), task(), target)["event_id"].to_pylist()
    assert given["event_id"].to_pylist() == ["e1"]
    assert len(set(derived)) == 2


def test_no_rows_are_no_events(target):
    assert complete_events(rows_of([]), task(), target).num_rows == 0


def test_a_part_is_loaded_and_its_bad_rows_are_written_with_their_source(tmp_path, target):
    file = tmp_path / "a.csv"
    file.write_text("user_id,item_id,event_type,timestamp\n1,2,view,1\nx,2,view,1\n1,2\n")
    columns = {name: name for name in COLUMNS if name != "event_id"}
    [(report, rows)] = load_part(task(path=str(file), columns=columns), target)
    assert (report.num_read, report.num_rejected, rows.num_rows) == (3, 3, 0)
    written = f"{table_uri(target.lake_uri, 'quarantine')}/{report.quarantine.path}"
    quarantined = pq.ParquetFile(written).read()
    assert quarantined["reason"].to_pylist() == [
        "timestamp is before 1990",
        "user_id is not a whole number",
        "the line has too few or too many fields, an open quote, or is no JSON object",
    ]
    assert set(quarantined["source"].to_pylist()) == {str(file)}


def test_bad_rows_that_are_in_quarantine_are_counted_only(tmp_path, target):
    file = write_csv(tmp_path / "a.csv", ["e,x,2,view,1"])
    known = replace(task(path=file), is_quarantined=True)
    [(report, _)] = load_part(known, target)
    assert (report.num_rejected, report.quarantine) == (1, None)


def test_small_parts_are_loaded_together_in_their_order(tmp_path, target):
    files = [
        write_csv(tmp_path / f"{n}.csv", [f"e{n},1,{n},view,{NOW_US}", "bad,,1,view,1"])
        for n in range(3)
    ]
    tasks = [task(n, file) for n, file in enumerate(files)]
    [(reports, events)] = load_events(tasks, target)
    assert [(report.digest, report.num_read, report.num_rejected) for report in reports] == [
        (f"digest {n}", 2, 1) for n in range(3)
    ]
    assert events["event_id"].to_pylist() == ["e0", "e1", "e2"]
    assert events["arrival"].to_pylist() == [0, 2**32, 2 * 2**32]


def test_a_large_part_comes_in_batches_with_one_count_of_arrival(tmp_path, target, monkeypatch):
    monkeypatch.setattr(ingest, "_BATCH_ROWS", 2)
    monkeypatch.setattr("data_lake.readers._BATCH_ROWS", 2)
    rows = rows_of([1] * 5, event_id=pa.array(list("abcde")))
    pq.write_table(rows, tmp_path / "a", row_group_size=5)
    part = Part(str(tmp_path / "a"), 0, 1)
    loaded = list(load_events([replace(task(kind="parquet"), part=part)], target))
    assert [events["event_id"].to_pylist() for _, events in loaded] == [
        ["a", "b"],
        ["c", "d"],
        ["e"],
    ]
    assert [events["arrival"].to_pylist() for _, events in loaded] == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("load", [load_rows, lambda one, target: list(load_events([one], target))])
def test_a_load_that_fails_leaves_no_quarantine(tmp_path, target, monkeypatch, load):
    def read_and_fail(source, part, options):
        yield from read_part(source, part, options)
        raise SourceError("the rest cannot be read")

    read_part = ingest.read_part
    monkeypatch.setattr(ingest, "read_part", read_and_fail)
    file = write_csv(tmp_path / "a.csv", ["e,x,2,view,1"])
    with pytest.raises(SourceError, match="the rest"):
        load(task(path=file), target)
    assert not list(Path(target.lake_uri).rglob("*.parquet"))
