import datetime
import json

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from data_lake.delta_source import look_at_table
from data_lake.errors import SourceError
from data_lake.readers import read_part
from data_lake.sources import SourceConfig

COLUMNS = {"user_id": "who", "item_id": "what"}
DAY = datetime.date(2025, 1, 2)


def source(columns=COLUMNS):
    return SourceConfig(path="x", format="delta", columns=columns)


def read_all(config, uri):
    _, parts = look_at_table(config, uri)
    return [row for part in parts for raw in read_part(config, part) for row in rows_of(raw)]


def rows_of(raw):
    return [tuple(row.values()) for row in raw.columns.to_pylist()]


def test_a_version_is_known_by_its_table_and_number(tmp_path):
    uri = str(tmp_path / "table")
    write_deltalake(uri, pa.table({"who": [1], "what": [2]}))
    first, _ = look_at_table(source(), uri)
    write_deltalake(uri, pa.table({"who": [3], "what": [4]}), mode="append")
    second, _ = look_at_table(source(), uri)
    assert (first, second) == tuple(f"{DeltaTable(uri).metadata().id}@{n}" for n in (0, 1))
    assert read_all(source(), uri) == [(1, 2), (3, 4)]


@pytest.mark.parametrize("uri", ["{folder}/a table", "file://{folder}/a%20table"])
def test_columns_of_the_partition_are_values(tmp_path, uri):
    uri = uri.format(folder=tmp_path)
    rows = pa.table({"who": ["x y", "%z", "é", None], "what": [1, 2, 3, 4], "day": [DAY] * 4})
    write_deltalake(uri, rows, partition_by=["who", "day"])
    config = source(COLUMNS | {"timestamp": "day"})
    assert sorted(read_all(config, uri), key=lambda row: row[1]) == [
        ("x y", 1, DAY),
        ("%z", 2, DAY),
        ("é", 3, DAY),
        (None, 4, DAY),
    ]


def test_rejected_rows_are_shown_with_their_partition(tmp_path):
    uri = str(tmp_path / "table")
    rows = pa.table({"who": [1], "what": [2], "more": ["x"], "day": [DAY]})
    write_deltalake(uri, rows, partition_by=["day"])
    _, [part] = look_at_table(source(), uri)
    [raw] = read_part(source(), part)
    shown = {"who": 1, "what": 2, "more": "x", "day": "2025-01-02"}
    assert [json.loads(text) for text in raw.show([0])] == [shown]


def test_a_column_that_earlier_files_lack_is_null_in_them(tmp_path):
    uri = str(tmp_path / "table")
    write_deltalake(uri, pa.table({"who": [1]}))
    later = pa.table({"who": [3], "what": [4]})
    write_deltalake(uri, later, mode="append", schema_mode="merge")
    assert read_all(source(), uri) == [(1, None), (3, 4)]


def test_rows_that_were_removed_are_not_read(tmp_path):
    uri = str(tmp_path / "table")
    write_deltalake(uri, pa.table({"who": [1, 2], "what": [3, 4]}))
    DeltaTable(uri).delete("who = 1")
    assert read_all(source(), uri) == [(2, 4)]


def test_a_folder_that_is_no_table_is_an_error(tmp_path):
    with pytest.raises(SourceError, match=r"There is no Delta table .*none .*; check the path"):
        look_at_table(source(), str(tmp_path / "none"))


def test_a_missing_column_is_named(tmp_path):
    write_deltalake(str(tmp_path), pa.table({"who": [1], "item": [2]}))
    with pytest.raises(SourceError, match="has no column 'what'; it has: who, item"):
        look_at_table(source(), str(tmp_path))


def test_deletion_vectors_are_refused(tmp_path):
    write_deltalake(str(tmp_path), pa.table({"who": [1], "what": [2]}))
    log = tmp_path / "_delta_log"
    actions = [json.loads(line) for line in (log / f"{0:020}.json").read_text().splitlines()]
    (add,) = (action for action in actions if "add" in action)
    add["add"]["deletionVector"] = {
        "storageType": "i",
        "pathOrInlineDv": "wi5b=000010000siXQKl0rr91000f55c8Xg0@@D72lkbi5=-{L",
        "sizeInBytes": 40,
        "cardinality": 1,
    }
    features = {"readerFeatures": ["deletionVectors"], "writerFeatures": ["deletionVectors"]}
    protocol = {"protocol": {"minReaderVersion": 3, "minWriterVersion": 7, **features}}
    (log / f"{1:020}.json").write_text("\n".join(map(json.dumps, [protocol, add])))
    with pytest.raises(SourceError, match=r"marks deleted rows by deletion vectors, .*PURGE"):
        look_at_table(source(), str(tmp_path))


def test_mapped_column_names_are_refused(tmp_path):
    table = pa.table({"who": [1], "what": [2]})
    write_deltalake(str(tmp_path), table)
    first = tmp_path / "_delta_log" / f"{0:020}.json"
    mode = '"configuration":{"delta.columnMapping.mode":"name"}'
    first.write_text(first.read_text().replace('"configuration":{}', mode))
    with pytest.raises(SourceError, match=r"maps the names of its columns .*; write a copy"):
        look_at_table(source(), str(tmp_path))
