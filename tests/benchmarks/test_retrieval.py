import json

import pytest

from benchmarks import retrieval
from benchmarks.retrieval import BATCHES, Case, is_full, measure_table, render, write_record

SMALL = Case(items=500, dim=16, length=4, threads=1, repeats=2)


@pytest.mark.parametrize("table", ["codes", "bf16"])
def test_a_table_is_measured_in_every_batch(table):
    found = measure_table(SMALL, table)

    assert set(found["batches"]) == set(BATCHES)
    assert all(times["p50_ms"] <= times["p99_ms"] for times in found["batches"].values())
    assert (found["batches"][1]["torch_p50_ms"] is None) == (table == "bf16")


def test_only_the_full_sizes_are_kept():
    assert is_full(Case(threads=8, device="cuda"))
    assert not is_full(SMALL)


def test_the_record_shows_every_table(tmp_path, monkeypatch):
    times = {"p50_ms": 4.04, "p99_ms": 5.0, "torch_p50_ms": 40.4, "torch_over_ours": 10.0}
    found = {
        "table_bytes": 16 * 2**20,
        "peak_bytes": 2**29,
        "batches": {str(batch): times for batch in BATCHES},
    }
    record = {"machine": "2 cores", "tables": {"codes": found}}
    monkeypatch.setattr(retrieval, "RESULTS", tmp_path)

    write_record(Case(), record)

    line = render(Case(), record).splitlines()[-1]
    cells = " | ".join(["4.0 / 5.0 (10.0 x)"] * 3)
    assert line == f"| 8 codes an item | 16 | 0.50 | {cells} |"
    assert json.loads((tmp_path / "retrieval.json").read_text()) == record
