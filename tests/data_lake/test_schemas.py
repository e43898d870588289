import pyarrow as pa
import pytest

from data_lake.schemas import (
    PARTITION,
    TIMESTAMP,
    events_schema,
    id_type_of,
    items_schema,
    quarantine_schema,
    sequences_schema,
    users_schema,
)


@pytest.mark.parametrize("id_type", ["int64", "string"])
def test_the_type_of_an_id_is_found_again(id_type):
    assert id_type_of(events_schema(id_type, "int64"), "user_id") == id_type
    assert id_type_of(items_schema(id_type), "item_id") == id_type


def test_timestamps_are_microseconds_in_utc_everywhere():
    assert pa.timestamp("us", tz="UTC") == TIMESTAMP
    assert events_schema("int64", "int64").field("timestamp").type == TIMESTAMP
    assert sequences_schema("int64", "int64").field("timestamps").type.value_type == TIMESTAMP
    assert quarantine_schema().field("ingested_at").type == TIMESTAMP


def test_tables_of_users_are_partitioned_by_their_last_column():
    schemas = [events_schema("int64", "string"), users_schema("string")]
    assert [schema.names[-1] for schema in schemas] == [PARTITION, PARTITION]
    assert PARTITION not in items_schema("string").names


def test_only_what_a_source_may_leave_out_is_nullable():
    nullable = [field.name for field in events_schema("int64", "int64") if field.nullable]
    assert nullable == ["device", "session_id", "price", "quantity"]
