import pyarrow as pa
import pyarrow.parquet as pq

from data_lake.parquet import encode_parquet
from data_lake.schemas import TIMESTAMP

ROWS = pa.table(
    {
        "user_id": pa.array([7, -2, 2**62]),
        "event_id": ["a", "b", "c"],
        "event_type": pa.array(["view", None, "view"]),
        "timestamp": pa.array([3, 1, 2], TIMESTAMP),
        "price": [0.5, None, 1.0],
        "item_ids": pa.array([["x"], [], ["y", "x"]]),
        "timestamps": pa.array([[1], [], [2, 3]], pa.list_(TIMESTAMP)),
    }
)


def read(content):
    return pq.read_table(pa.BufferReader(content))


def test_rows_come_back_as_they_were():
    found = read(encode_parquet(ROWS))
    assert found.schema.types[:5] == ROWS.schema.types[:5]
    assert found.to_pydict() == ROWS.to_pydict()


def test_the_same_rows_give_the_same_bytes():
    assert encode_parquet(ROWS) == encode_parquet(ROWS.slice(0))


def test_codes_are_stored_as_the_text_that_they_mean():
    codes = pa.array(["x", "y", "x"]).dictionary_encode()
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 1, 3], pa.int32()), codes)
    rows = pa.table({"event_type": codes, "item_ids": lists})
    found = read(encode_parquet(rows))
    assert found["event_type"].type == pa.string()
    assert found["item_ids"].type.value_type == pa.string()
    assert found.to_pydict() == {"event_type": ["x", "y", "x"], "item_ids": [["x"], [], ["y", "x"]]}


def test_whole_numbers_are_packed_and_unique_text_has_no_dictionary():
    group = pq.ParquetFile(pa.BufferReader(encode_parquet(ROWS))).metadata.row_group(0)
    columns = {group.column(n).path_in_schema: group.column(n) for n in range(group.num_columns)}
    for name in ("user_id", "timestamp", "timestamps.list.element"):
        assert "DELTA_BINARY_PACKED" in columns[name].encodings
    assert not columns["event_id"].has_dictionary_page
    assert columns["event_type"].has_dictionary_page
