from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_lake.buckets import bucket_of
from data_lake.ingest import (
    PartTask,
    Target,
    complete_events,
    cut_groups,
    drop_duplicates,
    group_edges,
    load_part,
    merge_group,
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


def task(index=0, path="x", columns=COLUMNS):
    config = SourceConfig(path=path, format="csv", columns=columns)
    return PartTask(config, Part(path, 0, 10_000), index)


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


def some_events(target, ids, *, user=1, index=0):
    rows = rows_of([user] * len(ids), event_id=pa.array(ids))
    return complete_events(rows, task(index), target)


def read_parts(target, report):
    """Event ids by bucket, as they stand in the files."""
    root = table_uri(target.lake_uri, "events")
    return {
        part.bucket: pq.ParquetFile(f"{root}/{part.path}").read()["event_id"].to_pylist()
        for part in report.parts
    }


def test_events_get_all_columns_in_the_order_of_their_buckets(target):
    events = complete_events(rows_of(range(20)), task(3), target)
    assert events.schema == target.schema
    buckets = bucket_of(pa.array(range(20)), 4)
    assert events["user_bucket"].to_pylist() == sorted(buckets)
    assert events["user_id"].to_pylist() == np.argsort(buckets, kind="stable").tolist()
    assert events["device"].null_count == 20
    assert set(events["ingested_at"].cast(pa.int64()).to_pylist()) == {NOW_US}


def test_arrival_counts_rows_within_a_part_and_parts_above(target):
    first = complete_events(rows_of([1, 1]), task(0), target)["arrival"].to_pylist()
    second = complete_events(rows_of([1, 1]), task(2), target)["arrival"].to_pylist()
    assert first == [0, 1]
    assert second == [2 * 2**32, 2 * 2**32 + 1]


def test_ids_are_derived_only_where_a_source_has_none(target):
    given = complete_events(rows_of([1], event_id=pa.array(["e1"])), task(), target)
    derived = complete_events(rows_of([1, 1]), task(), target)["event_id"].to_pylist()
    assert given["event_id"].to_pylist() == ["e1"]
    assert len(set(derived)) == 2


def test_no_rows_are_no_events(target):
    assert complete_events(rows_of([]), task(), target).num_rows == 0


@pytest.mark.parametrize(("num_buckets", "num_groups"), [(16, 16), (16, 3), (5, 4), (1, 1)])
def test_every_bucket_is_in_one_group(num_buckets, num_groups):
    edges = group_edges(num_buckets, num_groups)
    sizes = np.diff(edges)
    assert (edges[0], edges[-1]) == (0, num_buckets)
    assert sizes.min() >= 1
    assert sizes.max() - sizes.min() <= 1


def test_groups_hold_their_buckets_and_nothing_is_lost(target):
    events = complete_events(rows_of(range(50)), task(), target)
    groups = cut_groups(events, group_edges(4, 2))
    assert [set(group["user_bucket"].to_pylist()) for group in groups] == [{0, 1}, {2, 3}]
    assert pa.concat_tables(groups).equals(events)


def test_the_first_of_equal_ids_stays(target):
    events = some_events(target, ["a", "b", "a", "c", "b", "a"])
    kept = drop_duplicates(events)
    assert kept["event_id"].to_pylist() == ["a", "b", "c"]
    assert kept["arrival"].to_pylist() == [0, 1, 3]


def test_ids_that_are_known_go_altogether(target):
    events = some_events(target, ["a", "b", "a", "c"])
    assert drop_duplicates(events, pa.array(["a", "z"]))["event_id"].to_pylist() == ["b", "c"]
    assert drop_duplicates(events, pa.array(["a", "b", "c"])).num_rows == 0


def test_merging_writes_one_part_a_bucket_in_order_of_arrival(target):
    pieces = [some_events(target, ["a", "b"]), some_events(target, ["b", "c"], index=1)]
    other = some_events(target, ["x"], user=2)
    report = merge_group({}, target, *pieces, other)
    mine, others = (int(bucket_of(pa.array([user]), 4)[0]) for user in (1, 2))
    assert mine != others
    assert read_parts(target, report) == {mine: ["a", "b", "c"], others: ["x"]}
    assert report.num_duplicates == 1


def test_merging_leaves_out_what_was_committed(target):
    first = merge_group({}, target, some_events(target, ["a", "b"]))
    (part,) = first.parts
    existing = {part.bucket: [f"{table_uri(target.lake_uri, 'events')}/{part.path}"]}
    second = merge_group(existing, target, some_events(target, ["b", "c"]))
    assert list(read_parts(target, second).values()) == [["c"]]
    again = merge_group(existing, target, some_events(target, ["b", "a"]))
    assert (again.parts, again.num_duplicates) == ([], 2)


def test_a_part_is_loaded_and_its_bad_rows_are_written_with_their_source(tmp_path, target):
    file = tmp_path / "a.csv"
    file.write_text("user_id,item_id,event_type,timestamp\n1,2,view,1\nx,2,view,1\n1,2\n")
    columns = {name: name for name in COLUMNS if name != "event_id"}
    report, rows = load_part(task(path=str(file), columns=columns), target)
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
    file = tmp_path / "a.csv"
    file.write_text("event_id,user_id,item_id,event_type,timestamp\ne,x,2,view,1\n")
    known = replace(task(path=str(file)), is_quarantined=True)
    report, _ = load_part(known, target)
    assert (report.num_rejected, report.quarantine) == (1, None)


IDS = st.lists(st.tuples(st.sampled_from("abcde"), st.integers(1, 3)), max_size=12)


@settings(max_examples=30, deadline=None)
@given(IDS, IDS)
def test_each_distinct_event_is_kept_exactly_once(tmp_path_factory, first, second):
    folder = tmp_path_factory.mktemp("lake")
    schema = events_schema("int64", "int64")
    target = Target(str(folder / "lake"), {}, schema, num_buckets=4, started_us=NOW_US)
    kept, existing = [], {}
    for index, events in enumerate((first, second)):
        file = folder / f"{index}.csv"
        lines = [f"{name}{user},{user},7,view,{NOW_US}" for name, user in events]
        file.write_text("\n".join([",".join(COLUMNS), *lines, ""]))
        this = task(index, str(file))
        _, rows = load_part(this, target)
        groups = cut_groups(complete_events(rows, this, target), group_edges(4, 2))
        for group in groups:
            report = merge_group(existing, target, group)
            kept += [one for ids in read_parts(target, report).values() for one in ids]
            for part in report.parts:
                uri = f"{table_uri(target.lake_uri, 'events')}/{part.path}"
                existing.setdefault(part.bucket, []).append(uri)
    assert sorted(kept) == sorted({f"{name}{user}" for name, user in first + second})
