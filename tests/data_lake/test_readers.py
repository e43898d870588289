import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_lake import readers, sources
from data_lake.errors import SourceError
from data_lake.readers import read_part
from data_lake.sources import Part, SourceConfig, cut_file, list_files

COLUMNS = {"user_id": "who", "item_id": "what"}


def source(kind="csv", **settings):
    return SourceConfig(**{"path": "x", "format": kind, "columns": COLUMNS} | settings)


def read_all(config, path):
    """All rows of a file as lists of text or numbers, and its misfits."""
    rows, misfits = [], []
    for part in cut_file(config, str(path)):
        for raw in read_part(config, part):
            assert raw.num_read == raw.columns.num_rows + len(raw.misfits)
            rows += [list(row.values()) for row in raw.columns.to_pylist()]
            misfits += raw.misfits
    return rows, misfits


def test_a_uri_gives_uris_that_can_be_read(tmp_path):
    (tmp_path / "a.csv").write_text("who,what\n1,2\n")
    (found,) = list_files(source(), f"file://{tmp_path}/*.csv")
    assert found == f"file://{tmp_path}/a.csv"
    assert read_all(source(), found) == ([["1", "2"]], [])


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
    [raw] = read_part(source("parquet"), Part(str(tmp_path / "a"), 0, 1))
    assert raw.columns.column_names == ["who", "what"]
    assert [json.loads(text) for text in raw.show([1])] == [{"who": 2, "what": 4, "more": "y"}]


@pytest.mark.parametrize("shown", [[0, 1, 2, 3], [0, 3], [1, 2], [3]])
def test_rows_of_a_large_row_group_are_read_and_shown_batch_by_batch(tmp_path, monkeypatch, shown):
    monkeypatch.setattr(readers, "_BATCH_ROWS", 3)
    table = pa.table({"who": range(10), "what": range(10), "more": range(10)})
    pq.write_table(table, tmp_path / "a", row_group_size=10)
    batches = list(enumerate(read_part(source("parquet"), Part(str(tmp_path / "a"), 0, 1))))
    assert [raw.num_read for _, raw in batches] == [3, 3, 3, 1]
    for number, raw in batches:
        if number in shown:
            assert json.loads(raw.show([0])[0])["more"] == 3 * number


@pytest.mark.parametrize("place", [10, 5000])
def test_a_parquet_file_that_is_damaged_inside_is_an_error(tmp_path, place):
    path = tmp_path / "a"
    table = pa.table({"who": range(9999), "what": range(9999)})
    pq.write_table(table, path, write_page_checksum=True)
    content = bytearray(path.read_bytes())
    content[place : place + 9] = bytes(9)
    path.write_bytes(content)
    with pytest.raises(SourceError, match=r"(?s)a cannot be read \(.*\); deliver it again"):
        list(read_part(source("parquet"), Part(str(path), 0, 1)))


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
    monkeypatch.setattr(readers, "_LONGEST_LINE_BYTES", 64)
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
    [raw] = read_part(config, part)
    assert raw.show([1]) == ['{ "who": 2, "more": [1] }']


def test_a_key_that_no_line_of_json_has_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"who": 1, "item": 2}\n' * 100)
    with pytest.raises(SourceError, match="has no column 'what'; it has: who, item"):
        read_all(source("jsonl"), tmp_path / "a.jsonl")


def test_a_header_alone_has_no_rows(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"who,what\n")
    assert read_all(source(), tmp_path / "a.csv") == ([], [])


@pytest.mark.parametrize(
    ("line", "rows", "misfits"),
    [(b"1,\xff\x00", [["1", "\ufffd\x00"]], []), (b"\xff", [], ["\ufffd"])],
)
def test_bytes_that_are_no_text_do_not_cost_the_rows_beside_them(tmp_path, line, rows, misfits):
    file = tmp_path / "a.csv"
    file.write_bytes(b"who,what\n" + line + b"\n2,b\n")
    assert read_all(source(), file) == ([*rows, ["2", "b"]], misfits)


def test_lines_that_end_in_a_bare_return_are_refused(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"who,what\r1,a\r")
    with pytest.raises(SourceError, match=r"a\.csv is no header of a CSV"):
        read_all(source(), tmp_path / "a.csv")


def test_a_misfit_of_movielens_stays_as_it_came(tmp_path):
    (tmp_path / "a.dat").write_bytes(b"1::a::x\n2::b\n")
    config = source("movielens", column_names=("who", "what", "why"))
    rows, misfits = read_all(config, tmp_path / "a.dat")
    assert (len(rows), misfits) == (1, ["2::b"])


def test_half_a_character_in_json_does_not_crash(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"who": "1", "what": "a\\ud800"}\n')
    assert read_all(source("jsonl"), tmp_path / "a.jsonl") == ([["1", "a?"]], [])


def test_a_whole_number_in_json_is_the_same_text_whatever_stands_beside_it(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"who": 1.0, "what": "a"}\n{"who": "u2", "what": "b"}\n')
    rows, _ = read_all(source("jsonl"), tmp_path / "a.jsonl")
    assert rows == [["1", "a"], ["u2", "b"]]


def test_a_moment_that_python_does_not_know_can_be_shown(tmp_path):
    times = pa.array([10**18, 0], pa.timestamp("us"))
    pq.write_table(pa.table({"who": [1, 2], "what": [3, 4], "at": times}), tmp_path / "a.parquet")
    [part] = cut_file(source("parquet"), str(tmp_path / "a.parquet"))
    [raw] = read_part(source("parquet"), part)
    far, epoch = map(json.loads, raw.show([0, 1]))
    assert far["at"] == "<value out of range: 1000000000000000000>"
    assert epoch["at"] == "1970-01-01 00:00:00.000000"


FIELD = st.text(st.characters(codec="utf-8", exclude_characters='",\r\n\0'), max_size=6)


@settings(deadline=None)
@given(st.lists(FIELD, max_size=8), st.integers(1, 40), st.booleans(), st.booleans())
def test_whatever_lines_say_each_is_read_once(tmp_path_factory, items, size, has_header, ends):
    lines = ["who,what"] * has_header + [f"{n},x{item}" for n, item in enumerate(items)]
    file = tmp_path_factory.getbasetemp() / "lines.csv"
    file.write_bytes(("\n".join(lines) + "\n" * ends).encode())
    config = source() if has_header else source(column_names=("who", "what"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_PART_BYTES", size)
        rows, misfits = read_all(config, file)
    assert rows == [[str(n), f"x{item}"] for n, item in enumerate(items)]
    assert misfits == []
