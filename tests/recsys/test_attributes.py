"""Attribute codes, worked out by hand."""

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from recsys import attributes
from recsys.attributes import NO_ATTRIBUTES, AttributeEncoder, AttributesConfig
from recsys.catalogue import Catalogue
from recsys.errors import CatalogueError


def make_catalogue(counts=(1, 1, 1), **attributes):
    item_ids = pa.array(range(len(counts)))
    items = pa.table({"item_id": item_ids, **attributes})
    return Catalogue.build(item_ids, np.array(counts), items)


def codes_by_item(encoder, catalogue):
    codes = encoder.encode(catalogue)
    # Padding and mask have none.
    assert codes.offsets_I[:3].tolist() == [0, 0, 0]
    assert codes.num_codes == sum(encoder.sizes)
    return [part.tolist() for part in np.split(codes.codes, codes.offsets_I[3:-1])]


def learn(catalogue, **config):
    return AttributeEncoder.learn(AttributesConfig(**config), catalogue)


def test_frequent_values_come_first_and_a_missing_one_is_unknown():
    catalogue = make_catalogue((1, 1, 1, 1), category=["b", "a", "b", None])
    encoder = learn(catalogue, categorical=("category",))
    assert encoder.vocabularies == {"category": ("b", "a")}
    assert codes_by_item(encoder, catalogue) == [[1], [2], [1], [0]]


def test_each_field_has_codes_of_its_own():
    catalogue = make_catalogue(category=["a", "b", "a"], year=[1999, None, 2001])
    encoder = learn(catalogue, categorical=("category", "year"))
    assert encoder.sizes == (3, 3)
    assert encoder.encode(catalogue).starts_F.tolist() == [0, 3]
    assert codes_by_item(encoder, catalogue) == [[1, 4], [2, 3], [1, 5]]


@pytest.mark.parametrize("kind", [pa.list_(pa.string()), pa.large_list(pa.string())])
def test_an_item_may_have_many_values_and_has_each_once(kind):
    genres = pa.array([["x", "y", "x"], [], None], kind)
    catalogue = make_catalogue(genres=genres)
    encoder = learn(catalogue, categorical=("genres",))
    assert codes_by_item(encoder, catalogue) == [[1, 2], [0], [0]]


def test_codes_are_those_of_unique_pairs_whatever_the_columns(monkeypatch):
    rng, num_items = np.random.default_rng(0), 2_000
    tags = [rng.integers(0, 30, rng.integers(0, 5)).astype(str).tolist() for _ in range(num_items)]
    catalogue = make_catalogue(
        rng.integers(0, 3, num_items),
        brand=pa.array(rng.integers(0, 300, num_items), mask=rng.random(num_items) < 0.1),
        category=rng.integers(0, 50, num_items).astype(str).tolist(),
        tags=tags,
        price=pa.array(rng.random(num_items), mask=rng.random(num_items) < 0.1),
    )
    encoder = learn(
        catalogue, categorical=("tags", "brand", "category"), bands=("price",), max_values=40
    )
    fast = encoder.encode(catalogue)
    monkeypatch.setattr(attributes, "_sorted_once", np.unique)
    slow = encoder.encode(catalogue)
    assert np.array_equal(fast.codes, slow.codes)
    assert np.array_equal(fast.offsets_I, slow.offsets_I)


def test_values_beyond_the_most_frequent_are_unknown():
    catalogue = make_catalogue((1, 1, 1), tags=[["a", "b"], ["a", "c"], ["c", "a"]])
    encoder = learn(catalogue, categorical=("tags",), max_values=1)
    assert encoder.vocabularies == {"tags": ("a",)}
    assert codes_by_item(encoder, catalogue) == [[0, 1], [0, 1], [0, 1]]


def test_what_only_untrained_items_have_is_unknown():
    catalogue = make_catalogue((5, 0, 1), brand=["a", "new", "b"], price=[1.0, 1e9, 3.0])
    encoder = learn(catalogue, categorical=("brand",), bands=("price",), num_bands=2)
    assert encoder.vocabularies == {"brand": ("a", "b")}
    assert encoder.edges == {"price": (2.0,)}


def test_bands_hold_as_many_items_each():
    catalogue = make_catalogue((1,) * 5, price=[10.0, None, 20.0, 30.0, 40.0])
    encoder = learn(catalogue, bands=("price",), num_bands=2)
    # The median of the four is 25, and what is missing has no band.
    assert encoder.edges == {"price": (25.0,)}
    assert codes_by_item(encoder, catalogue) == [[1], [0], [1], [2], [2]]


def test_equal_numbers_share_a_band():
    catalogue = make_catalogue((1,) * 4, price=[5, 5, 5, 9])
    encoder = learn(catalogue, bands=("price",), num_bands=4)
    codes = codes_by_item(encoder, catalogue)
    assert codes[0] == codes[1] == codes[2] != codes[3]


def test_values_that_come_later_are_unknown_or_in_the_outer_bands():
    encoder = learn(
        make_catalogue(category=["a", "b", "a"], price=[1, 2, 3]),
        categorical=("category",),
        bands=("price",),
        num_bands=3,
    )
    later = make_catalogue(category=["z", "a", None], price=[-9, 99, 2])
    assert encoder.sizes == (3, 4)
    assert codes_by_item(encoder, later) == [[0, 4], [1, 6], [0, 5]]


def test_a_missing_column_is_named_with_those_there_are():
    catalogue = make_catalogue(category=["a", "b", "c"])
    with pytest.raises(CatalogueError, match="no column 'brand'; it has: item_id, count, category"):
        learn(catalogue, categorical=("brand",))


def test_text_has_no_bands():
    catalogue = make_catalogue(category=["a", "b", "c"])
    with pytest.raises(CatalogueError, match=r"'category' holds string .* attributes.categorical"):
        learn(catalogue, bands=("category",))


def test_a_name_that_comes_twice_is_refused():
    with pytest.raises(ValidationError, match="price is named twice"):
        AttributesConfig(categorical=("price",), bands=("price",))


def test_without_a_field_no_item_has_a_code():
    catalogue = make_catalogue()
    assert learn(catalogue) == NO_ATTRIBUTES
    assert len(NO_ATTRIBUTES.encode(catalogue).codes) == 0


def test_a_written_encoder_encodes_the_same(tmp_path):
    catalogue = make_catalogue(category=["a", "b", "a"], price=[1.5, 2.5, 3.5])
    encoder = learn(catalogue, categorical=("category",), bands=("price",))
    encoder.write(tmp_path / "attributes.json")
    assert AttributeEncoder.read(tmp_path / "attributes.json") == encoder
    assert AttributeEncoder.read(tmp_path / "nothing.json") is NO_ATTRIBUTES
