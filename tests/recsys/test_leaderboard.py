"""Rows, comparisons and the table that a person reads."""

import json

import numpy as np
import pyarrow as pa
import pytest

from recsys.baselines import Covisitation, Popularity
from recsys.catalogue import Catalogue
from recsys.interactions import training_counts
from recsys.leaderboard import (
    category_codes,
    compare_rows,
    compare_runs,
    comparison_facts,
    hash_targets,
    measure,
    ranks_table,
    render,
)
from recsys.metrics import METRICS

CATALOGUE = Catalogue(pa.table({"item_id": [10, 20, 30, 40], "count": [1] * 4}))


@pytest.fixture
def targets(make_store, hold_out_last):
    """A store in which everybody goes around in a circle, and its targets."""
    store = make_store([[(start + n) % 4 for n in range(3)] for start in range(4)] * 10)
    split = hold_out_last(store)
    return store, split, np.arange(store.num_users), split.test_U


@pytest.fixture
def rows(targets):
    store, split, *where = targets
    counts_I = training_counts(store, split, 6)
    baselines = [one.fit(store, split, 6) for one in (Covisitation(), Popularity())]
    return [measure(one, store, *where, counts_I) for one in baselines]


def test_a_row_has_every_figure_as_json(rows):
    facts = json.loads(json.dumps(rows[0].facts()))
    assert facts["NDCG@10"]["mean"] == 1
    assert facts["coverage@10"] == 1


def test_rows_are_compared_in_pairs(rows):
    found = compare_rows(rows[0], rows[1:])["popularity"]
    facts = comparison_facts(found)
    model, baseline = (row.accuracy["NDCG@10"].mean for row in rows)
    assert facts["difference"] == pytest.approx(model - baseline)
    assert facts["lift"] == pytest.approx(model / baseline - 1)
    assert facts["difference_low"] > 0
    assert facts["is_significant"]


def test_the_table_fits_a_terminal_and_is_markdown(rows):
    lines = render(rows, compare_rows(rows[0], rows[1:])).splitlines()
    assert len(lines) == 2 + len(rows)
    assert {len(line) for line in lines} == {len(lines[0])}
    assert len(lines[0]) <= 100
    assert {line.count("|") for line in lines} == {8}
    assert lines[-1].rstrip(" |").endswith("]*")


def test_the_hash_depends_on_the_targets_and_not_on_their_order(targets):
    store, _, users_N, targets_N = targets
    whole = hash_targets(store, users_N, targets_N, CATALOGUE)
    assert whole == hash_targets(store, users_N[::-1], targets_N[::-1], CATALOGUE)
    assert whole != hash_targets(store, users_N, targets_N - 1, CATALOGUE)


def test_ranks_are_kept_for_a_later_comparison(targets, rows):
    store, _, users_N, targets_N = targets
    table = ranks_table(store, users_N, targets_N, CATALOGUE, rows)
    assert table.column_names == ["user_id", "item_id", "covisitation", "popularity"]
    assert table.slice(0, 1).to_pylist()[0] | {"popularity": 0} == {
        "user_id": "u0",
        "item_id": 30,
        "covisitation": 1,
        "popularity": 0,
    }


def test_runs_are_compared_in_every_metric_user_by_user(targets, rows):
    store, _, *where = targets
    table = ranks_table(store, *where, CATALOGUE, rows)
    theirs = table.rename_columns(["user_id", "item_id", "popularity", "covisitation"])
    found = compare_runs(table, theirs.take(np.arange(len(table))[::-1]), ["covisitation"])
    assert set(found["covisitation"]) == set(METRICS)
    expected = compare_rows(rows[0], rows[1:])["popularity"]
    assert found["covisitation"]["NDCG@10"] == expected


def test_items_without_a_category_have_no_code():
    table = pa.table({"item_id": [1, 2, 3], "count": [1] * 3, "category": ["x", None, "x"]})
    assert category_codes(Catalogue(table)).tolist() == [-1, -1, 0, -1, 0]
    assert category_codes(CATALOGUE) is None
