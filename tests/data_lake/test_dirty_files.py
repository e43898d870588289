"""What shops really deliver, through the whole job: an error sentence or quarantine, and never half
a table.
"""

import gzip
import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_lake.errors import SourceError, TableError
from data_lake.ingest import look_at
from data_lake.sources import SourceConfig
from data_lake.tables import open_table, read_table
from ray_jobs import ingest
from ray_jobs.config import PipelineConfig

COLUMNS = {"user_id": "u", "item_id": "i", "event_type": "e", "timestamp": "t"}
HEADER = b"u,i,e,t\n"
GOOD = b"u1,i1,view,1000000000\n"


@pytest.fixture
def shop(tmp_path, monkeypatch, ray_cluster):
    """A lake with one event, ready for a delivery in `new`."""
    monkeypatch.setenv("SHOP", str(tmp_path))
    (tmp_path / "new").mkdir()
    (tmp_path / "first.csv").write_bytes(HEADER + GOOD)
    ingest.run(config("first.csv"))
    return tmp_path


def config(path, kind="csv", **settings):
    source = {"path": f"$SHOP/{path}", "format": kind, "columns": COLUMNS, "timestamp_unit": "s"}
    tables = {"num_buckets": 2, "events": [source | settings]}
    return PipelineConfig(name="toy", storage={"root": "$SHOP"}, ingest=tables)


def snapshot(shop):
    """Versions of the tables, what readers see, and every Parquet file of the lake."""
    tables = {name: open_table(str(shop / "lake"), name) for name in ("events", "quarantine")}
    return (
        {name: (table.version(), read_table(table).num_rows) for name, table in tables.items()},
        sorted((shop / "lake").rglob("*.parquet")),
    )


def parquet_bytes(num_rows=2000):
    rows = {"u": ["u2"] * num_rows, "i": [f"i{n}" for n in range(num_rows)]}
    rows |= {"e": ["view"] * num_rows, "t": list(range(10**9, 10**9 + num_rows))}
    written = pa.BufferOutputStream()
    pq.write_table(pa.table(rows), written, write_page_checksum=True)
    return written.getvalue().to_pybytes()


def damaged(content, place):
    return content[:place] + bytes(20) + content[place + 20 :]


BROKEN = {
    "truncated.parquet": (parquet_bytes()[:-100], "is not a whole Parquet file"),
    "empty.parquet": (b"", "is not a whole Parquet file"),
    "text.parquet": (HEADER + GOOD, "is not a whole Parquet file"),
    "damaged.parquet": (damaged(parquet_bytes(), 500), "cannot be read"),
    "semicolons.csv": (b"u;i;e;t\nu1;i1;view;1000000000\n", "has no column 'u', 'i', 'e', 't'"),
    "utf16.csv": ((HEADER + GOOD).decode().encode("utf-16"), "has no column 'u', 'i', 'e', 't'"),
    "zeros.csv": (bytes(1000), "has no column 'u', 'i', 'e', 't'"),
    "packed.csv": (gzip.compress(HEADER + GOOD), "is compressed; unpack it"),
    "empty.csv": (b"", "has no rows"),
    "other.jsonl": (b'{"user": 1}\n' * 200, "has no column 'u', 'i', 'e', 't'"),
}


@pytest.mark.ray
@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_cannot_be_read_changes_nothing(shop, name):
    content, sentence = BROKEN[name]
    (shop / "new" / name).write_bytes(content)
    before = snapshot(shop)
    with pytest.raises(SourceError, match=sentence) as caught:
        ingest.run(config("new", name.rpartition(".")[2]))
    assert str(shop / "new" / name) in str(caught.value)
    assert snapshot(shop) == before


@pytest.mark.ray
def test_one_broken_file_among_good_ones_stops_all_of_them(shop):
    for number in range(4):
        (shop / "new" / f"{number}.parquet").write_bytes(parquet_bytes(2000 + number))
    (shop / "new" / "5.parquet").write_bytes(damaged(parquet_bytes(), 500))
    before = snapshot(shop)
    with pytest.raises(SourceError, match=r"5\.parquet cannot be read"):
        ingest.run(config("new", "parquet"))
    assert snapshot(shop) == before


DIRTY = {
    "invalid UTF-8": (b"u\xff\xfe,i\x80,view,1000000000\n", None),
    "NUL bytes": (b"u\x002,i2,view,1000000000\n", None),
    "a line of NUL bytes": (bytes(40) + b"\n", "the line has too few or too many fields"),
    "too few fields": (b"u1;i1;view;1000000000\n", "the line has too few or too many fields"),
    "an open quote": (b'u1,"i1,view,1000000000\n', "an open quote"),
    "a time before every shop": (b"u1,i1,view,-99999999999999\n", "timestamp is before 1990"),
    "a time far beyond": (b"u1,i1,view,9223372036854775807\n", "timestamp is in the future"),
    "a time beyond numbers": (b"u1,i1,view,1e308\n", "timestamp is in the future"),
    "not a time": (b"u1,i1,view,yesterday\n", "timestamp is not a time"),
    "no time": (b"u1,i1,view,nan\n", "timestamp is"),
    "milliseconds as seconds": (b"u1,i1,view,1000000000000\n", "timestamp is in the future"),
    "no user": (b" ,i1,view,1000000000\n", "user_id is missing"),
}


@pytest.mark.ray
@pytest.mark.parametrize("dirt", DIRTY)
def test_a_dirty_line_is_taken_or_put_aside_and_the_next_is_read(shop, dirt):
    line, reason = DIRTY[dirt]
    (shop / "new" / "1.csv").write_bytes(HEADER + line + b"u3,i3,view,1000000003\n")
    figures = ingest.run(config("new")).figures
    num_bad = 0 if reason is None else 1
    assert (figures["read"], figures["committed"], figures["quarantined"]) == (
        2,
        2 - num_bad,
        num_bad,
    )
    found = read_table(open_table(str(shop / "lake"), "quarantine")).to_pylist()
    assert [(reason in row["reason"]) for row in found] == [True] * num_bad


@pytest.mark.ray
def test_a_store_that_takes_no_more_files_keeps_what_it_has(shop):
    # Where the folder of the other bucket should be is a file.
    for number in range(2):
        folder = shop / "lake" / "events" / f"user_bucket={number}"
        if not folder.exists():
            folder.write_bytes(b"")
    users = b"".join(b"u%d,i,view,1000000000\n" % number for number in range(50))
    (shop / "new" / "1.csv").write_bytes(HEADER + users)
    before = snapshot(shop)
    with pytest.raises(TableError, match=r"events cannot be written \(.*\); give the job room"):
        ingest.run(config("new"))
    assert snapshot(shop) == before


FULL_DISK = """
import json, resource, sys
from data_lake.errors import TableError
from data_lake.exchange import merge_events
from data_lake.ingest import PartTask, Target, load_events
from data_lake.schemas import events_schema
from data_lake.sources import Part, SourceConfig

folder = sys.argv[1]
source = SourceConfig.model_validate_json(sys.argv[2])
target = Target(f"{folder}/lake", {}, events_schema("string", "string"), 1, 1_760_000_000_000_000)
[(_, events)] = load_events([PartTask(source, Part(source.path, 0, 1), 0)], target)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    merge_events({}, target, events)
except TableError as error:
    print(json.dumps(str(error)))
"""


def test_a_full_disk_is_one_sentence(tmp_path):
    path = tmp_path / "1.parquet"
    path.write_bytes(parquet_bytes())
    source = SourceConfig(path=str(path), format="parquet", columns=COLUMNS, timestamp_unit="s")
    program = [sys.executable, "-c", FULL_DISK, str(tmp_path), source.model_dump_json()]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "events cannot be written" in json.loads(done.stdout)
    assert "File too large" in json.loads(done.stdout)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_the_right_to_read_it_is_named(tmp_path):
    path = tmp_path / "1.csv"
    path.write_bytes(HEADER + GOOD)
    path.chmod(0)
    source = SourceConfig(path=str(path), format="csv", columns=COLUMNS)
    with pytest.raises(SourceError, match=r"1\.csv cannot be read \(.*\); give the job the right"):
        look_at(source, str(path))


def test_a_file_that_vanished_is_named(tmp_path):
    path = str(tmp_path / "1.csv")
    source = SourceConfig(path=path, format="csv", columns=COLUMNS)
    with pytest.raises(SourceError, match=r"1\.csv cannot be read \(.*\); give the job the right"):
        look_at(source, path)
