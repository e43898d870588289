"""Of which kind a new item is, worked out by hand."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from recsys.catalogue import NUM_SPECIAL, Catalogue
from recsys.kinds import find_kinds, mean_of_kind


def make_catalogue(first_id=0, **columns):
    item_ids = pa.array(range(first_id, first_id + len(next(iter(columns.values())))))
    items = pa.table({"item_id": item_ids, **columns})
    return Catalogue.build(item_ids, np.ones(len(item_ids), int), items)


def means(known, new, trained=None):
    """Means for all items of `new`, where known item n has the vector [2^n]."""
    table_ID = torch.tensor([[0.0], [0.0], *([2.0**n] for n in range(known.num_items))])
    trained = np.arange(known.num_items) if trained is None else np.array(trained)
    rows = np.arange(new.num_items) + NUM_SPECIAL
    kinds = find_kinds(known, trained + NUM_SPECIAL, new, rows)
    return mean_of_kind(kinds, table_ID).flatten().tolist()


def test_the_finest_kind_that_has_a_trained_item_counts():
    known = make_catalogue(
        category=["a", "a", "b", "a"], brand=["x", "y", "x", "x"], price=[1.0, 1.0, 1.0, 1.0]
    )
    new = make_catalogue(
        first_id=9, category=["a", "b", "b", "c"], brand=["x", "x", "y", "x"], price=[1.0] * 4
    )
    # Items 0 and 3 agree in all; item 2 does; only the category of item 2 is the same; nothing.
    assert means(known, new) == [(1 + 8) / 2, 4, 4, (1 + 2 + 4 + 8) / 4]


def test_prices_are_shared_band_by_band():
    known = make_catalogue(category=["a"] * 4, price=[1.0, 2.0, 100.0, 200.0])
    new = make_catalogue(first_id=9, category=["a", "a"], price=[0.5, 500.0])
    assert means(known, new) == [1, 8]


def test_what_was_never_trained_is_of_no_kind():
    known = make_catalogue(category=["a", "a", "b"])
    new = make_catalogue(first_id=9, category=["a", "b"])
    assert means(known, new, trained=[0, 1]) == [(1 + 2) / 2, (1 + 2) / 2]


def test_two_unknown_values_are_not_shared():
    known = make_catalogue(category=["a", None])
    new = make_catalogue(first_id=9, category=pa.array([None], pa.string()))
    assert means(known, new) == [(1 + 2) / 2]


def test_items_of_several_categories_share_the_same_set():
    known = make_catalogue(category=[["a", "b"], ["b"], ["b", "a"]])
    new = make_catalogue(first_id=9, category=[["b", "a"], ["b"]])
    assert means(known, new) == [(1 + 4) / 2, 2]


@pytest.mark.parametrize("known", [{"title": ["t", "u"]}, {"brand": ["x", "y"]}])
def test_without_attributes_in_common_all_items_are_of_one_kind(known):
    new = make_catalogue(first_id=9, title=["t"], category=["a"])
    assert means(make_catalogue(**known), new) == [(1 + 2) / 2]
