"""A bucket's work, without Ray around it."""

import json

import pyarrow as pa
import pytest

from data_lake.build import Bucket, Build, build_row, count_bucket, digest_of
from data_lake.parquet import read_files
from data_lake.schemas import TIMESTAMP, events_schema, sequences_schema, users_schema
from data_lake.sequences import SequencesConfig
from data_lake.tables import create_table, table_uri, write_part

ROWS = [("ann", "x", 3), ("ann", "y", 1), ("bob", "x", 2), ("eve", "z", 5), ("eve", "x", 6)]


@pytest.fixture
def lake(tmp_path):
    create_table(str(tmp_path), "sequences", sequences_schema("string", "string"), num_buckets=4)
    return str(tmp_path)


def write_rows(lake, table, schema, rows):
    columns = {field.name: pa.nulls(len(rows), field.type) for field in schema}
    for name in rows[0]:
        kind = schema.field(name).type
        values = pa.array([row[name] for row in rows], pa.int64() if kind == TIMESTAMP else kind)
        columns[name] = values.cast(kind)
    return f"{table_uri(lake, table)}/{write_part(lake, table, pa.table(columns), 2).path}"


def make(lake, *, last_digest=None, **settings):
    events = [
        {
            "event_id": f"e{at}",
            "user_id": user,
            "item_id": item,
            "event_type": "view",
            "timestamp": at,
            "ingested_at": 0,
            "arrival": n,
        }
        for n, (user, item, at) in enumerate(ROWS)
    ]
    users = [{"user_id": "eve", "segment": "gold"}]
    bucket = Bucket(
        2,
        [write_rows(lake, "events", events_schema("string", "string"), events)],
        [write_rows(lake, "users", users_schema("string"), users)],
        "abc",
        last_digest,
    )
    rules = SequencesConfig(**{"min_user_events": 1} | settings.pop("rules", {}))
    return bucket, Build(lake, {}, rules, (), ("user_id", "item_id"), **settings)


def built_of(row):
    (content,) = row["built"].to_pylist()
    return json.loads(content)


def test_a_bucket_becomes_a_part_that_nobody_sees_yet(lake):
    built = built_of(build_row(*make(lake)))
    (part,) = built["parts"]
    rows = read_files([f"{table_uri(lake, 'sequences')}/{part['path']}"]).to_pylist()
    assert [(row["user_id"], row["segment"], row["item_ids"]) for row in rows] == [
        ("ann", None, ["y", "x"]),
        ("bob", None, ["x"]),
        ("eve", "gold", ["z", "x"]),
    ]
    assert part["bucket"] == 2
    assert built["lengths"] == {"1": 1, "2": 2}
    assert (built["digest"], built["is_new"], built["counts"]["users_kept"]) == ("abc", True, 3)


def test_a_bucket_whose_digest_is_known_is_not_built(lake):
    assert built_of(build_row(*make(lake, last_digest="abc"))) == {
        "digest": "abc",
        "is_new": False,
    }


def test_rules_that_leave_nobody_write_nothing(lake):
    built = built_of(build_row(*make(lake, rules={"min_user_events": 9})))
    assert (built["parts"], built["is_new"], built["lengths"]) == ([], True, {})


def test_rare_items_change_the_digest_where_they_occur(lake):
    def digest(*rare):
        return built_of(build_row(*make(lake, rare_items=pa.array(rare))))["digest"]

    assert digest("z") == digest("z", "elsewhere")
    assert digest("z") != digest("y")


def test_items_of_a_bucket_are_counted(lake):
    counted = count_bucket(*make(lake)).to_pylist()
    assert {row["item_id"]: row["num_events"] for row in counted} == {"x": 3, "y": 1, "z": 1}


def test_a_digest_depends_on_every_part_and_their_order():
    assert digest_of(["a", "b"]) == digest_of(("a", "b"))
    assert len({digest_of(parts) for parts in (["a", "b"], ["b", "a"], ["ab"])}) == 3
