"""The tasks of the benchmark: what is cold trains nothing and is asked for."""

import numpy as np
import pytest
import torch

from benchmarks.cold_items import (
    Among,
    AttributePopularity,
    _with_cold_at_the_end_alone,
    make_shop,
)
from recsys.interactions import training_positions


@pytest.mark.parametrize(
    ("item_ids", "kept"),
    [
        ([1, 90, 2, 3], [1, 2, 3]),
        ([1, 90, 2, 91], [1, 2, 91]),
        # Two warm events and the test: with fewer the cold one would train.
        ([1, 90, 91], [1]),
        ([90], []),
    ],
)
def test_cold_items_stay_only_where_they_test(item_ids, kept):
    assert _with_cold_at_the_end_alone(np.array(item_ids), np.array([90, 91])).tolist() == kept


@pytest.fixture(scope="module")
def shop():
    return make_shop(develop=False)


def test_what_is_cold_never_trains_and_is_asked_for_after_something_else(shop):
    assert not np.isin(
        shop.store.items_T[training_positions(shop.store, shop.split)], shop.cold
    ).any()
    targets = shop.cold_targets
    assert np.isin(shop.store.items_T[targets.targets_N], shop.cold).all()
    assert (targets.targets_N > shop.store.offsets_U[targets.users_N]).all()
    assert (targets.targets_N < shop.store.offsets_U[targets.users_N + 1]).all()
    warm = shop.store.items_T[shop.warm_targets.targets_N]
    assert (shop.catalogue.counts_I[warm] > 0).all()


def test_the_popularity_of_attributes_ranks_cold_items_apart(shop):
    scorer = Among(AttributePopularity(shop, "sum"), shop.cold)
    (scores_I,) = scorer.score(shop.store, np.array([0]), np.array([1]))
    assert torch.isfinite(scores_I).nonzero().flatten().tolist() == sorted(shop.cold.tolist())
    assert len(scores_I[shop.cold].unique()) > 10
