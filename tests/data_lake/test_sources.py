import gzip
import hashlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from data_lake.errors import SourceError
from data_lake.sources import IngestConfig, SourceConfig, cut_file, digest_file, list_files

COLUMNS = {"user_id": "who", "item_id": "what"}


def source(kind="csv", **settings):
    return SourceConfig(**{"path": "x", "format": kind, "columns": COLUMNS} | settings)


def test_an_unknown_format_names_the_known_ones():
    with pytest.raises(ValidationError, match="'movielens' or 'delta'"):
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


def test_no_file_is_an_error_that_names_the_path(tmp_path):
    with pytest.raises(SourceError, match=r"There is no file .*/none\.csv; check the path"):
        list_files(source(), f"{tmp_path}/none.csv")


def test_a_digest_is_the_sha256_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert digest_file(str(tmp_path / "a")) == hashlib.sha256(b"abc").hexdigest()


def test_movielens_without_column_names_asks_for_them(tmp_path):
    (tmp_path / "a.dat").write_text("1::2\n")
    with pytest.raises(SourceError, match="give its `column_names`"):
        cut_file(source("movielens"), str(tmp_path / "a.dat"))


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_missing_column_is_named_beside_those_that_are_there(tmp_path, kind):
    path = tmp_path / "a"
    if kind == "csv":
        path.write_text("who,item\n1,2\n")
    else:
        pq.write_table(pa.table({"who": [1], "item": [2]}), path)
    with pytest.raises(SourceError, match=r"has no column 'what'; it has: who, item\. Correct"):
        cut_file(source(kind), str(path))


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


@pytest.mark.parametrize(
    ("context", "reason"),
    [
        (["region", "region"], "region is there 2 times"),
        (["Device"], "device is a column of our own"),
        (["devices"], "devices is a column of our own"),
        (["a b"], "'a b' is no column name; use letters, digits and _"),
    ],
)
def test_context_columns_need_names_of_their_own(context, reason):
    with pytest.raises(ValidationError, match=reason):
        IngestConfig(events=[source()], context=context)


def test_parts_say_how_much_they_weigh(tmp_path, monkeypatch):
    monkeypatch.setattr("data_lake.sources._PART_ROWS", 4)
    monkeypatch.setattr("data_lake.sources._PART_BYTES", 8)
    pq.write_table(pa.table({"who": range(9), "what": range(9)}), tmp_path / "a", row_group_size=2)
    (tmp_path / "b").write_text("who,what\n1,2\n")
    assert [part.weight for part in cut_file(source("parquet"), str(tmp_path / "a"))] == [
        1,
        1,
        1 / 4,
    ]
    assert [part.weight for part in cut_file(source(), str(tmp_path / "b"))] == [1, 5 / 8]
