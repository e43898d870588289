"""The tables that answer without a model."""

import dataclasses
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.catalogue import Catalogue
from recsys.context import ContextConfig, ContextEncoder
from recsys.covisitation import DECAY, find_neighbours
from recsys.errors import ArtifactError
from recsys.fallback import COVISITED, POPULAR, SEGMENTS, Fallback, write_fallback
from recsys.splits import whole_sequences

A, B, C, D = range(4)
CATALOGUE = Catalogue(pa.table({"item_id": ["a", "b", "c", "d", "e"], "count": [1] * 5}))
CONTEXT = ContextEncoder.learn(
    ContextConfig(categorical=("segment",), time=()), {"segment": {"new": 2, "loyal": 1}}
)


@pytest.fixture
def store(make_store):
    """Two new users and a loyal one; a is old, the rest is recent. Nobody has e."""
    store = make_store([[A, B, C], [A, B], [D, B]], days=[[0, 20, 20], [0, 20], [20, 20]])
    context_TF = np.array([1, 1, 1, 1, 1, 2, 2], np.uint8)[:, None]
    return dataclasses.replace(store, context_TF=context_TF)


def write(folder, store, catalogue=CATALOGUE, context=CONTEXT, **options):
    split = whole_sequences(store.offsets_U)
    write_fallback(folder, store, split, catalogue, context, **options)
    return Fallback.read(folder)


@pytest.fixture
def fallback(tmp_path, store):
    return write(tmp_path, store)


def test_popular_is_the_mean_of_the_whole_and_the_recent_share(fallback):
    # Of 7 events a has 2, b 3, c and d 1; of the 5 recent ones b 3, c and d 1.
    scores = {"b": (3 / 7 + 3 / 5) / 2, "c": (1 / 7 + 1 / 5) / 2, "a": (2 / 7) / 2}
    found = dict(fallback.popular())
    assert list(found) == ["b", "c", "d", "a"]
    assert {item_id: found[item_id] for item_id in scores} == pytest.approx(scores)


def test_what_nobody_had_is_not_popular(fallback):
    assert "e" not in dict(fallback.popular(limit=100))


def test_limit_and_exclude_are_respected_together(fallback):
    assert [item_id for item_id, _ in fallback.popular(limit=2, exclude={"b"})] == ["c", "d"]
    assert fallback.popular(limit=0) == []


def test_each_segment_has_its_own_list(fallback):
    assert [item_id for item_id, _ in fallback.popular_in("new")] == ["b", "c", "a"]
    assert {item_id for item_id, _ in fallback.popular_in("loyal")} == {"b", "d"}


def test_an_unknown_segment_is_an_empty_list(fallback):
    assert fallback.popular_in("gold") == []


def test_covisited_merges_neighbours_with_decay(fallback):
    # a leads to b in each of its two events, and to c at distance two in one of them.
    alone = dict(fallback.covisited(["a"]))
    assert alone == pytest.approx({"b": 1, "c": (1 / 2) / 2})
    merged = dict(fallback.covisited(["a", "d"], exclude={"a"}))
    assert merged["b"] == pytest.approx(1 + DECAY * 1)
    assert merged["c"] == pytest.approx(DECAY * alone["c"])


def test_covisited_reads_the_last_ten_events_only(fallback):
    assert fallback.covisited(["a", *["unknown"] * 9]) != []
    assert fallback.covisited(["a", *["unknown"] * 10]) == []


def test_an_unknown_history_is_an_empty_list(fallback):
    assert fallback.covisited(["nothing"]) == []
    assert fallback.covisited([]) == []


def test_covisited_is_best_first(fallback):
    scores = [score for _, score in fallback.covisited(["a", "b", "d"], limit=3)]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)


def test_ids_keep_the_type_of_the_shop(tmp_path, store):
    catalogue = Catalogue(pa.table({"item_id": [10, 20, 30, 40, 50], "count": [1] * 5}))
    found = write(tmp_path, store, catalogue)
    assert found.popular(limit=1)[0][0] == 20
    assert [item_id for item_id, _ in found.covisited([10])] == [20, 30]


def test_tables_are_bounded(tmp_path, store):
    write(tmp_path, store, num_popular=2, num_in_segment=1, num_covisited=1)
    assert pq.read_table(tmp_path / POPULAR)["rank"].to_pylist() == [1, 2]
    assert pq.read_table(tmp_path / SEGMENTS)["segment"].to_pylist() == ["new", "loyal"]
    item_ids = pq.read_table(tmp_path / COVISITED)["item_id"].to_pylist()
    assert len(item_ids) == len(set(item_ids))


def test_only_training_events_count(tmp_path, store, hold_out_last):
    write_fallback(tmp_path, store, hold_out_last(store), CATALOGUE, CONTEXT)
    assert {item_id for item_id, _ in Fallback.read(tmp_path).popular()} == {"a", "b", "d"}


def test_neighbours_are_counted_as_is_asked(tmp_path, store):
    tables = []
    for name, settings in (("usual", None), ("ahead", {"window": 1, "backward": 0.0})):
        write(tmp_path / name, store, covisitation=settings)
        tables.append(pq.read_table(tmp_path / name / COVISITED))
    usual, ahead = tables
    split = whole_sequences(store.offsets_U)
    expected = find_neighbours(store, split, CATALOGUE.num_rows, limit=50, window=1, backward=0)
    assert ahead["score"].to_pylist() == pytest.approx(expected.data.tolist())
    assert not ahead.equals(usual)


def test_without_a_segment_field_there_are_no_segments(tmp_path, store):
    context = ContextEncoder(ContextConfig(categorical=(), time=()), {})
    assert write(tmp_path, store, context=context).popular_in("new") == []


def test_a_missing_table_is_named(tmp_path, store):
    write(tmp_path, store)
    (tmp_path / SEGMENTS).unlink()
    with pytest.raises(ArtifactError, match=r"segments\.parquet cannot be read"):
        Fallback.read(tmp_path)


def test_the_ingress_needs_no_torch_to_read_it():
    script = "import sys, recsys.fallback; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
