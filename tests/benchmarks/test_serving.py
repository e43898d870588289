"""The serving benchmark, made small."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.load import LoadResult
from benchmarks.serving import Findings, Row, parse_arguments, plan_studies, render
from benchmarks.serving_artifact import Shape, draw_bodies, publish_random
from recsys.artifact import load_artifact
from recsys.queries import Event, Query
from recsys.ranker import Ranker
from recsys.registry import serving_version

ROOT = Path(__file__).parents[2]
TINY = Shape(items=50, dim=16, layers=1, heads=2, max_len=8)


def make_findings(degraded=0):
    (study,) = plan_studies(parse_arguments(["--seconds", "3"]))
    slow, fast = (
        LoadResult(3.0, (took_ms,) * 300, Counter({"200": 300}), degraded=count)
        for took_ms, count in ((6.0, degraded), (4.0, 0))
    )
    rows = Row("inside", "open, 100/s", slow, 2.5), Row("bare", "open, 100/s", fast, 0.5)
    return Findings(study, rows, 7.0)


def test_summary_holds_the_stack_against_the_bare_model():
    assert make_findings().summary() == {
        "rate": 100.0,
        "seconds": 3.0,
        "p50_ms": 6.0,
        "p95_ms": 6.0,
        "p99_ms": 6.0,
        "max_ms": 6.0,
        "non_2xx": 0,
        "degraded_share": 0.0,
        "bare_p50_ms": 4.0,
        "overhead": 1.5,
    }


def test_lists_without_the_model_are_not_compared_with_it():
    findings = make_findings(degraded=6)

    assert findings.summary()["overhead"] is None
    assert "too many lists came without the model" in render([findings])


def test_record_has_a_row_a_load():
    text = render([make_findings()])

    assert "| inside | open, 100/s | 100 | 6.0 | 6.0 | 6.0 | 6.0 | 0 | 0.00% | 2.5 |" in text
    assert "takes 1.5 times the 4.0 ms" in text


def test_large_catalogue_is_served_from_both_kinds_of_tables():
    coded, full = plan_studies(parse_arguments(["--items", "2000000"]))

    assert (coded.shape.codes, full.shape.codes) == (8, 0)
    assert (coded.rate, coded.top_k, coded.ways) == (30, 100, ("inside", "haproxy", "bare"))
    assert coded.settings["cache_size"] == 0


def test_random_version_ranks_in_onnx(tmp_path):
    publish_random(tmp_path, TINY)
    (body, *_) = draw_bodies(TINY, 3, top_k=5)

    ranker = Ranker(load_artifact(tmp_path / serving_version(tmp_path)), backend="onnx")
    (ranked,) = ranker.rank([Query(tuple(map(Event, body["user_history"])), k=5)])

    assert len(ranked.item_ids) == 5
    assert not set(ranked.item_ids) & set(body["user_history"])


def test_no_two_requests_are_alike():
    bodies = draw_bodies(Shape(), 500, top_k=10)

    assert len({tuple(body["user_history"]) for body in bodies}) == 500
    assert {len(body["user_history"]) for body in bodies} == set(range(5, 50))


@pytest.mark.long
def test_quick_run_ends_with_one_line_of_json():
    command = [sys.executable, "-m", "benchmarks.serving", "--quick", "--items", "200"]

    printed = subprocess.check_output(command, cwd=ROOT, text=True, timeout=280)

    summary = json.loads(printed.splitlines()[-1])
    assert summary["non_2xx"] == 0
    assert summary["bare_p50_ms"] > 0
    assert not (ROOT / "benchmarks/results/serving-200.md").exists()
