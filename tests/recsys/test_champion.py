"""A published version on the targets of another one."""

from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow as pa
import pytest
import torch

from recsys.artifact import load_artifact, publish
from recsys.catalogue import NUM_SPECIAL, Catalogue
from recsys.champion import find_known_targets, make_request, rank_as_served, time_in_turn
from recsys.encoders import LastState
from recsys.evaluation import rank_targets
from recsys.model_config import ModelConfig
from recsys.scorer import ModelScorer
from recsys.splits import leave_one_out
from recsys.tokens import TokenStore
from tests.conftest import write_artifact

CPU = torch.device("cpu")


def catalogue(*item_ids):
    counts = np.arange(len(item_ids), 0, -1)
    return Catalogue.build(pa.array(list(item_ids)), counts, None)


def store(items, offsets):
    """Items are rows of the catalogue from 0."""
    T = len(items)
    return TokenStore(
        pa.array([f"u{number}" for number in range(len(offsets) - 1)]),
        np.array(offsets),
        np.array(items, np.int32) + NUM_SPECIAL,
        np.zeros((T, 0), np.uint8),
        np.arange(T) * 1_000_000,
    )


def test_targets_move_by_what_stands_before_them_and_is_not_known():
    # b is new: u0 has a b c, u1 has b b a, u2 has a b.
    found = find_known_targets(
        store([0, 1, 2, 1, 1, 0, 0, 1], [0, 3, 6, 8]),
        catalogue("a", "b", "c"),
        np.array([2, 5, 7]),
        catalogue("a", "c"),
    )
    assert found.tolist() == [1, 2, -1]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, shop):
    root = tmp_path_factory.mktemp("versions")
    config = ModelConfig(dim=16, num_layers=1, num_heads=2, max_len=10, attention="causal")
    publish(root, "v1", partial(write_artifact, shop=shop, config=config), {})
    return load_artifact(root / "v1")


def as_served(artifact, shop, users_N, targets_N):
    return rank_as_served(
        artifact, shop.store, users_N, targets_N, num_rows=99, filter_seen=False, device=CPU
    )


def test_a_version_that_knows_everything_ranks_as_in_its_own_evaluation(artifact, shop):
    users_N = np.arange(shop.store.num_users)
    targets_N = leave_one_out(shop.store.offsets_U).test_U
    scorer = ModelScorer(artifact.load_model(), artifact.context.known_at_request_F)
    expected = rank_targets(scorer, shop.store, users_N, targets_N, filter_seen=False).ranks_N
    assert (as_served(artifact, shop, users_N, targets_N) == expected).all()


def test_an_unknown_target_stands_last_and_a_user_without_history_gets_the_popular(artifact, shop):
    first = shop.store.offsets_U[3]
    ranks_N = as_served(artifact, shop, np.array([2, 3]), np.array([-1, first]))
    # Counts fall with the index of an item, so its rank is its place.
    place = (
        artifact.catalogue.counts_I[NUM_SPECIAL:]
        >= (artifact.catalogue.counts_I[shop.store.items_T[first]])
    )
    assert ranks_N.tolist() == [99, place.sum()]


def test_two_calls_take_turns_and_their_quartiles_are_told():
    times = iter(np.cumsum([0, 1, 0, 2] * 8).tolist())
    calls = []
    found = time_in_turn(
        [lambda: calls.append("a"), lambda: calls.append("b")],
        num_rounds=8,
        num_warm=1,
        clock=lambda: next(times),
    )
    assert found == [1, 2]
    assert calls == ["a", "b"] * 9


def test_a_request_gives_the_best_items(artifact):
    model = artifact.load_model()
    with torch.inference_mode():
        assert make_request(model, LastState(model), num_windows=3)().shape == (3, 10)
    assert replace(artifact).version == "v1"
