import gzip
import hashlib
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from data_lake import sources
from data_lake.errors import SourceError
from data_lake.sources import (
    IngestConfig,
    Part,
    SourceConfig,
    cut_file,
    digest_file,
    list_files,
    read_part,
)

COLUMNS = {"user_id": "who", "item_id": "what"}


def source(kind="csv", **settings):
    return SourceConfig(**{"path": "x", "format": kind, "columns": COLUMNS} | settings)


def read_all(config, path):
    """All rows of a file as lists of text or numbers, and its misfits."""
    rows, misfits = [], []
    for part in cut_file(config, str(path)):
        raw = read_part(config, part)
        assert raw.num_read == raw.columns.num_rows + len(raw.misfits)
        rows += [list(row.values()) for row in raw.columns.to_pylist()]
        misfits += raw.misfits
    return rows, misfits


def test_an_unknown_format_names_the_known_ones():
    with pytest.raises(ValidationError, match="'parquet', 'csv', 'jsonl' or 'movielens'"):
        source("orc")


def test_an_unknown_key_and_an_unknown_time_zone_are_errors():
    with pytest.raises(ValidationError, match="Extra inputs"):
        source(colums={})
    with pytest.raises(ValidationError, match=r"no time zone 'Mars/Olympus'"):
        source(timezone="Mars/Olympus")


def test_an_ingest_needs_events():
    with pytest.raises(ValidationError, match="at least 1 item"):
        IngestConfig(events=())


def test_files_of_a_folder_come_by_name_without_hidden_ones(tmp_path):
    for name in ("b.csv", "a.csv", "sub/c.csv", "_SUCCESS", ".a.csv.crc", "_tmp/d.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = [file.removeprefix(f"{tmp_path}/") for file in list_files(source(), str(tmp_path))]
    assert found == ["a.csv", "b.csv", "sub/c.csv"]


def test_a_pattern_matches_within_one_folder(tmp_path):
    for name in ("2025/a.csv", "2025/a.json", "2024/b.csv", "2025/deep/c.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert list_files(source(), f"{tmp_path}/*/*.csv") == [
        f"{tmp_path}/2024/b.csv",
        f"{tmp_path}/2025/a.csv",
    ]


def test_a_uri_gives_uris_that_can_be_read(tmp_path):
    (tmp_path / "a.csv").write_text("who,what\n1,2\n")
    (found,) = list_files(source(), f"file://{tmp_path}/*.csv")
    assert found == f"file://{tmp_path}/a.csv"
    assert read_all(source(), found) == ([["1", "2"]], [])


def test_no_file_is_an_error_that_names_the_path(tmp_path):
    with pytest.raises(SourceError, match=r"There is no file .*/none\.csv; check the path"):
        list_files(source(), f"{tmp_path}/none.csv")


def test_a_digest_is_the_sha256_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert digest_file(str(tmp_path / "a")) == hashlib.sha256(b"abc").hexdigest()


@pytest.mark.parametrize("part_bytes", range(1, 30))
def test_every_line_is_read_once_wherever_a_text_is_cut(tmp_path, monkeypatch, part_bytes):
    monkeypatch.setattr(sources, "_PART_BYTES", part_bytes)
    (tmp_path / "a.csv").write_text("who,what\n1,10\n2,20\n\n333,30\n4,4")
    rows, misfits = read_all(source(), tmp_path / "a.csv")
    assert rows == [["1", "10"], ["2", "20"], ["333", "30"], ["4", "4"]]
    assert misfits == []


@pytest.mark.parametrize("part_rows", [1, 3, 4, 100])
def test_every_row_is_read_once_wherever_a_parquet_file_is_cut(tmp_path, monkeypatch, part_rows):
    monkeypatch.setattr(sources, "_PART_ROWS", part_rows)
    table = pa.table({"who": range(10), "what": range(10), "more": range(10)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    parts = cut_file(source("parquet"), str(tmp_path / "a.parquet"))
    assert len(parts) == {1: 5, 3: 3, 4: 3, 100: 1}[part_rows]
    rows, _ = read_all(source("parquet"), tmp_path / "a.parquet")
    assert rows == [[n, n] for n in range(10)]


def test_rejected_rows_of_parquet_are_shown_with_columns_that_nobody_maps(tmp_path):
    pq.write_table(pa.table({"who": [1, 2], "what": [3, 4], "more": ["x", "y"]}), tmp_path / "a")
    raw = read_part(source("parquet"), Part(str(tmp_path / "a"), 0, 1))
    assert raw.columns.column_names == ["who", "what"]
    assert [json.loads(text) for text in raw.show([1])] == [{"who": 2, "what": 4, "more": "y"}]


def test_csv_takes_quotes_crlf_a_byte_order_mark_and_other_delimiters(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbf"who"; what \r\n"a;b";2\r\n;""\r\n')
    rows, misfits = read_all(source(delimiter=";"), tmp_path / "a.csv")
    assert rows == [["a;b", "2"], [None, None]]
    assert misfits == []


def test_a_line_with_another_number_of_fields_is_a_misfit(tmp_path):
    (tmp_path / "a.csv").write_text("who,what\n1,2\n1,2,3\n7\n3,4\n")
    rows, misfits = read_all(source(), tmp_path / "a.csv")
    assert rows == [["1", "2"], ["3", "4"]]
    assert misfits == ["1,2,3", "7"]


def test_an_open_quote_costs_its_own_line_only(tmp_path):
    (tmp_path / "a.csv").write_text('who,what\n1,"x\n2,y\n3,5" disk\n4,"z"\n5,"a\n6,""""\n')
    rows, misfits = read_all(source(), tmp_path / "a.csv")
    assert rows == [["2", "y"], ["4", "z"], ["6", '"']]
    assert misfits == ['1,"x', '3,5" disk', '5,"a']


def test_an_open_quote_in_a_long_text_does_not_stop_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_LONGEST_LINE_BYTES", 64)
    (tmp_path / "a.csv").write_text('who,what\n0,"x\n' + "1,2\n" * 100)
    rows, misfits = read_all(source(), tmp_path / "a.csv")
    assert (len(rows), misfits) == (100, ['0,"x'])


def test_a_quote_amid_a_field_is_a_character(tmp_path):
    (tmp_path / "a.csv").write_text('who,what\n1,5" disk\n')
    assert read_all(source(), tmp_path / "a.csv") == ([["1", '5" disk']], [])


def test_a_misfit_need_not_be_utf_8(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"who,what\n1,\xff,3\n1,2\n")
    rows, misfits = read_all(source(), tmp_path / "a.csv")
    assert (rows, misfits) == ([["1", "2"]], ["1,\ufffd,3"])


def test_movielens_is_apart_by_two_colons_in_latin_1(tmp_path):
    (tmp_path / "a.dat").write_bytes('1::Léon: The "Pro" (1994)::Drama\n'.encode("latin-1"))
    config = source("movielens", column_names=("who", "what", "genre"))
    assert read_all(config, tmp_path / "a.dat")[0] == [["1", 'Léon: The "Pro" (1994)', "Drama"]]


def test_a_misfit_of_movielens_is_shown_as_it_came(tmp_path):
    (tmp_path / "a.dat").write_text("1::2::3\n4::5\n")
    config = source("movielens", column_names=("who", "what"))
    assert read_all(config, tmp_path / "a.dat") == ([["4", "5"]], ["1::2::3"])


def test_movielens_without_column_names_asks_for_them(tmp_path):
    (tmp_path / "a.dat").write_text("1::2\n")
    with pytest.raises(SourceError, match="give its `column_names`"):
        cut_file(source("movielens"), str(tmp_path / "a.dat"))


def test_lines_of_json_keep_numbers_and_put_misfits_aside(tmp_path):
    lines = ['{"who": 1, "what": "a\u2028b", "x": 1}', "[1]", "{", '{"who": 2}', "", "[" * 99_999]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    rows, misfits = read_all(source("jsonl"), tmp_path / "a.jsonl")
    assert rows == [[1, "a\u2028b"], [2, None]]
    assert misfits == ["[1]", "{", "[" * 99_999]


def test_cells_of_several_types_become_text(tmp_path):
    lines = [{"who": 1, "what": {"id": 2}}, {"who": "guest", "what": {"id": 3}}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows, _ = read_all(source("jsonl"), tmp_path / "a.jsonl")
    assert rows == [["1", '{"id": 2}'], ["guest", '{"id": 3}']]


def test_rejected_lines_of_json_are_shown_as_they_came(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"who":1}\n{ "who": 2, "more": [1] }\n')
    config = source("jsonl")
    (part,) = cut_file(config, str(tmp_path / "a.jsonl"))
    assert read_part(config, part).show([1]) == ['{ "who": 2, "more": [1] }']


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_missing_column_is_named_beside_those_that_are_there(tmp_path, kind):
    path = tmp_path / "a"
    if kind == "csv":
        path.write_text("who,item\n1,2\n")
    else:
        pq.write_table(pa.table({"who": [1], "item": [2]}), path)
    with pytest.raises(SourceError, match=r"has no column 'what'; it has: who, item\. Correct"):
        cut_file(source(kind), str(path))


def test_a_key_that_no_line_of_json_has_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"who": 1, "item": 2}\n' * 100)
    with pytest.raises(SourceError, match="has no column 'what'; it has: who, item"):
        read_all(source("jsonl"), tmp_path / "a.jsonl")


def test_half_a_parquet_file_is_an_error(tmp_path):
    pq.write_table(pa.table({"who": range(99), "what": range(99)}), tmp_path / "a")
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-40])
    with pytest.raises(SourceError, match="is not a whole Parquet file"):
        cut_file(source("parquet"), str(tmp_path / "a"))


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_compressed_text_is_refused(tmp_path, kind):
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"who,what\n1,2\n"))
    with pytest.raises(SourceError, match=r"a\.gz is compressed; unpack it"):
        cut_file(source(kind), str(tmp_path / "a.gz"))


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("who,what,who\n1,2,3\n")
    with pytest.raises(SourceError, match="has the column 'who' more than once"):
        cut_file(source(), str(tmp_path / "a.csv"))


def test_an_empty_file_has_no_parts(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"")
    assert cut_file(source(), str(tmp_path / "a.csv")) == []


def test_a_header_alone_has_no_rows(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"who,what\n")
    assert read_all(source(), tmp_path / "a.csv") == ([], [])
