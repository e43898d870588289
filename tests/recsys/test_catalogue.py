"""The shop's ids and their dense indices."""

import numpy as np
import pyarrow as pa
import pytest

from recsys.catalogue import MASK, NUM_SPECIAL, PAD, Catalogue
from recsys.errors import CatalogueError


def make_catalogue(item_ids=(30, 10, 20), items=None):
    return Catalogue.build(pa.array(item_ids), np.arange(1, len(item_ids) + 1), items)


def test_items_follow_padding_and_mask_in_the_order_of_their_ids():
    catalogue = make_catalogue()
    assert (PAD, MASK, NUM_SPECIAL) == (0, 1, 2)
    assert catalogue.encode([10, 20, 30]).tolist() == [2, 3, 4]
    assert (catalogue.num_items, catalogue.num_rows) == (3, 5)


def test_counts_stay_with_their_items():
    assert make_catalogue().counts_I.tolist() == [0, 0, 2, 3, 1]


def test_decoding_reverses_encoding():
    catalogue = make_catalogue(["b", "a"])
    assert catalogue.decode(catalogue.encode(["b", "a"])).to_pylist() == ["b", "a"]


@pytest.mark.parametrize("unknown", [99, "abc", 2**70, ""])
def test_an_unknown_id_becomes_padding(unknown):
    assert make_catalogue().encode([unknown]).tolist() == [PAD]


def test_an_id_is_read_in_the_type_of_the_catalogue():
    assert make_catalogue().encode(["20"]).tolist() == [3]
    assert make_catalogue(["20", "10"]).encode([20]).tolist() == [3]


def test_string_ids_may_be_of_any_arrow_string_type():
    catalogue = Catalogue.build(pa.array(["b", "a"], pa.large_string()), np.array([1, 1]), None)
    assert catalogue.encode(["a", "x"]).tolist() == [2, PAD]


def test_attributes_are_joined_by_id():
    items = pa.table({"item_id": [20, 30], "category": ["x", "y"], "count": [7, 7]})
    catalogue = make_catalogue(items=items)
    assert catalogue.column("category").to_pylist() == [None, "x", "y"]
    assert catalogue.counts_I.tolist() == [0, 0, 2, 3, 1]


def test_items_that_no_sequence_holds_may_join_with_a_count_of_0():
    items = pa.table({"item_id": [40, 20, 15], "category": ["new", "x", "newer"]})
    catalogue = Catalogue.build(pa.array([20, 10]), np.array([5, 6]), items, with_unseen=True)
    assert catalogue.item_ids.to_pylist() == [10, 15, 20, 40]
    assert catalogue.counts_I.tolist() == [0, 0, 6, 0, 5, 0]
    assert catalogue.column("category").to_pylist() == [None, "newer", "x", "new"]


def test_sold_out_items_that_no_sequence_holds_stay_outside():
    items = pa.table({"item_id": [1, 2, 3, 4], "available": [False, True, None, False]})
    catalogue = Catalogue.build(pa.array([4]), np.array([9]), items, with_unseen=True)
    assert catalogue.item_ids.to_pylist() == [2, 3, 4]


def test_a_missing_column_is_named_with_those_there_are():
    with pytest.raises(CatalogueError, match="no column 'colour'; it has: item_id, count"):
        make_catalogue().column("colour")


def test_an_empty_catalogue_is_an_error():
    with pytest.raises(CatalogueError, match="no item"):
        Catalogue.build(pa.array([], pa.int64()), np.array([], np.int64), None)


def test_a_written_catalogue_is_read_back(tmp_path):
    catalogue = make_catalogue()
    catalogue.write(tmp_path / "catalogue.parquet")
    assert Catalogue.read(tmp_path / "catalogue.parquet").table.equals(catalogue.table)
