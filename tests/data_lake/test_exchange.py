from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_lake import written
from data_lake.buckets import bucket_of
from data_lake.errors import TableError
from data_lake.exchange import (
    cut_groups,
    drop_known,
    first_of_each,
    group_edges,
    merge_events,
    merge_pieces,
    pack,
    reading_order,
    unpack,
)
from data_lake.ingest import PartTask, Target, complete_events, load_events, order_by_bucket
from data_lake.schemas import TIMESTAMP, events_schema
from data_lake.sources import Part, SourceConfig
from data_lake.tables import table_uri, write_part

NOW_US = 1_760_000_000_000_000
COLUMNS = {name: name for name in ("event_id", "user_id", "item_id", "event_type", "timestamp")}


@pytest.fixture
def target(tmp_path):
    schema = events_schema("int64", "int64", ("region",))
    return Target(str(tmp_path / "lake"), {}, schema, num_buckets=4, started_us=NOW_US)


def task(index=0, path="x"):
    config = SourceConfig(path=path, format="csv", columns=COLUMNS)
    return PartTask(config, Part(path, 0, 10_000), index)


def some_events(target, ids, *, users=None, times=None, index=0, **columns):
    """Events of user 1 unless said otherwise, a microsecond apart."""
    num_rows = len(ids)
    times = np.arange(num_rows) if times is None else np.array(times)
    rows = pa.table(
        {
            "event_id": pa.array(ids, pa.string()),
            "user_id": pa.array(users or [1] * num_rows),
            "item_id": pa.array([7] * num_rows, pa.int64()),
            "event_type": pa.array(["view"] * num_rows, pa.string()),
            "timestamp": pa.array(times + NOW_US).cast(TIMESTAMP),
        }
        | columns
    )
    return order_by_bucket(complete_events(rows, task(index), target))


def uri_of(target, part):
    return f"{table_uri(target.lake_uri, 'events')}/{part.path}"


def read_parts(target, report, column="event_id"):
    """A column by bucket, as it stands in the files."""
    return {
        part.bucket: pq.ParquetFile(uri_of(target, part)).read()[column].to_pylist()
        for part in report.parts
    }


def files_of(target):
    return sorted(Path(table_uri(target.lake_uri, "events")).rglob("*.parquet"))


@pytest.mark.parametrize(("num_buckets", "num_groups"), [(16, 16), (16, 3), (5, 4), (1, 1)])
def test_every_bucket_is_in_one_group(num_buckets, num_groups):
    edges = group_edges(num_buckets, num_groups)
    sizes = np.diff(edges)
    assert (edges[0], edges[-1]) == (0, num_buckets)
    assert sizes.min() >= 1
    assert sizes.max() - sizes.min() <= 1


def test_groups_hold_their_buckets_and_nothing_is_lost(target):
    events = some_events(target, [f"e{n}" for n in range(50)], users=list(range(50)))
    groups = cut_groups(events, group_edges(4, 2))
    assert [set(group["user_bucket"].to_pylist()) for group in groups] == [{0, 1}, {2, 3}]
    assert pa.concat_tables(groups).equals(events)


def test_what_is_packed_comes_out_bucket_by_bucket_in_the_order_of_the_pieces(target):
    pieces = [
        some_events(target, [f"e{n}" for n in range(i, i + 20)], users=list(range(20)), index=i)
        for i in (0, 20)
    ]
    unpacked = dict(unpack([pack(piece) for piece in pieces]))
    together = pa.concat_tables(pieces)
    for bucket, events in unpacked.items():
        wanted = together.filter(pa.compute.equal(together["user_bucket"], bucket))
        for name in events.column_names:
            assert events[name].to_pylist() == wanted[name].to_pylist()
    assert sorted(unpacked) == [0, 1, 2, 3]


def test_no_events_are_no_buckets(target):
    assert list(unpack([pack(some_events(target, []))])) == []


def test_pieces_may_differ_in_their_columns(target):
    plain = some_events(target, ["a"])
    more = some_events(target, ["b"], index=1, region=pa.array(["north"]))
    report = merge_pieces({}, target, pack(plain), pack(more))
    (regions,) = read_parts(target, report, "region").values()
    assert regions == [None, "north"]


def test_the_first_of_equal_ids_stays():
    ids = pa.array(["a", "b", "a", "c", "b", "a"])
    assert first_of_each(ids, pa.array([], pa.string())).tolist() == [0, 1, 3]


def test_ids_that_are_known_go_altogether():
    ids = pa.array(["a", "b", "a", "c"])
    assert first_of_each(ids, pa.array(["a", "z"])).tolist() == [1, 3]
    assert first_of_each(ids, pa.array(["a", "b", "c"])).tolist() == []


@pytest.mark.parametrize("kind", [pa.int64(), pa.string()])
def test_rows_are_read_by_user_time_and_arrival(kind):
    users = pa.array([3, 1, 3, 2, 1, 3]).cast(kind)
    times = pa.array([5, 9, 5, 0, 1, 4]).cast(TIMESTAMP)
    order = reading_order(pa.table({"user_id": users, "timestamp": times}))
    assert order.tolist() == [4, 1, 3, 5, 0, 2]


def test_text_ids_are_ordered_as_text():
    users = pa.array(["b", "", "é", "a", "B"])
    times = pa.array([0] * 5).cast(TIMESTAMP)
    order = reading_order(pa.table({"user_id": users, "timestamp": times}))
    assert users.take(pa.array(order)).to_pylist() == ["", "B", "a", "b", "é"]


def test_merging_writes_one_part_a_bucket_in_reading_order(target):
    first = some_events(target, ["a", "b", "x"], users=[1, 1, 2], times=[9, 3, 0])
    second = some_events(target, ["b", "c"], times=[3, 3], index=1)
    report = merge_pieces({}, target, pack(first), pack(second))
    mine, others = (int(bucket_of(pa.array([user]), 4)[0]) for user in (1, 2))
    assert mine != others
    assert read_parts(target, report) == {mine: ["b", "c", "a"], others: ["x"]}
    assert report.num_duplicates == 1


def test_a_part_has_all_columns_of_the_table_but_the_bucket(target):
    report = merge_pieces({}, target, pack(some_events(target, ["a"])))
    rows = pq.ParquetFile(uri_of(target, report.parts[0])).read()
    assert rows.column_names == [name for name in target.schema.names if name != "user_bucket"]
    (row,) = rows.to_pylist()
    assert (row["device"], row["region"], row["arrival"]) == (None, None, 0)
    assert row["ingested_at"].timestamp() * 1_000_000 == NOW_US


def test_events_in_any_order_merge_to_the_same(target):
    events = some_events(target, [f"e{n % 30}" for n in range(50)], users=list(range(50)))
    shuffled = events.take(pa.array(np.random.default_rng(0).permutation(50)))
    ordered = merge_pieces({}, target, pack(events))
    assert read_parts(target, merge_events({}, target, shuffled)) == read_parts(target, ordered)


def test_merging_leaves_out_what_was_committed(target):
    (part,) = merge_pieces({}, target, pack(some_events(target, ["a", "b"]))).parts
    existing = {part.bucket: [uri_of(target, part)]}
    second = merge_pieces(existing, target, pack(some_events(target, ["b", "c"])))
    assert list(read_parts(target, second).values()) == [["c"]]
    again = merge_pieces(existing, target, pack(some_events(target, ["b", "a"])))
    assert (again.parts, again.num_duplicates) == ([], 2)


def test_a_part_makes_room_for_what_came_at_the_same_time(target):
    (part,) = merge_pieces({}, target, pack(some_events(target, ["a", "b", "c"]))).parts
    (other,) = merge_pieces({}, target, pack(some_events(target, ["b", "z"]))).parts
    changed = drop_known(part, [uri_of(target, other)], target)
    assert list(read_parts(target, changed).values()) == [["a", "c"]]
    assert (changed.num_duplicates, changed.parts[0].num_rows) == (1, 2)

    (third,) = merge_pieces({}, target, pack(some_events(target, ["y"]))).parts
    assert drop_known(part, [uri_of(target, third)], target).parts == [part]
    gone = drop_known(other, [uri_of(target, part), uri_of(target, third)], target)
    assert gone.num_duplicates == 1
    nothing = drop_known(part, [uri_of(target, part)], target)
    assert (nothing.parts, nothing.num_duplicates) == ([], 3)


def test_a_merge_that_fails_leaves_no_file(target, monkeypatch):
    def write_one_then_fail(lake_uri, name, rows, bucket, options):
        if files_of(target):
            raise OSError(28, "No space left on device")
        return write_part(lake_uri, name, rows, bucket, options)

    monkeypatch.setattr(written, "write_part", write_one_then_fail)
    events = some_events(target, ["a", "x"], users=[1, 2])
    with pytest.raises(TableError, match=r"cannot be written \(.*No space left.*\); give the job"):
        merge_pieces({}, target, pack(events))
    assert files_of(target) == []


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
        for _, rows in load_events([task(index, str(file))], target):
            for group in cut_groups(rows, group_edges(4, 2)):
                report = merge_pieces(existing, target, pack(group))
                kept += [one for ids in read_parts(target, report).values() for one in ids]
                for part in report.parts:
                    existing.setdefault(part.bucket, []).append(uri_of(target, part))
    assert sorted(kept) == sorted({f"{name}{user}" for name, user in first + second})
