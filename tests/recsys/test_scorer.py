"""A model as a scorer: what it reads, and what it does not."""

import dataclasses

import numpy as np
import pytest
import torch

from recsys.catalogue import NUM_SPECIAL
from recsys.model import NextItemModel
from recsys.model_config import ModelConfig
from recsys.scorer import ModelScorer, gather_histories


def make_scorer(shop, attention="bidirectional", time_bias=False, **options):
    torch.manual_seed(0)
    sizes = {"dim": 16, "num_layers": 1, "num_heads": 2, "max_len": 8}
    config = ModelConfig(attention=attention, time_bias=time_bias, **sizes)
    model = NextItemModel(config, shop.catalogue.num_rows, shop.context.sizes)
    return ModelScorer(model, shop.context.known_at_request_F, **options)


def score_last(scorer, store, users):
    return scorer.score(store, users, store.offsets_U[users + 1] - 1)


def with_changed_last_event(store, *, item=False, context=False, days=0):
    last = store.offsets_U[1:] - 1
    items_T, context_TF = store.items_T.copy(), store.context_TF.copy()
    timestamps_T = store.timestamps_T.copy()
    timestamps_T[last] += days * 86_400_000_000
    if item:
        items_T[last] = NUM_SPECIAL
    if context:
        context_TF[last] = 0
    return dataclasses.replace(
        store, items_T=items_T, context_TF=context_TF, timestamps_T=timestamps_T
    )


USERS = np.array([0, 1, 5])


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_every_item_gets_a_finite_score_and_nothing_else(shop, attention):
    scores_BI = score_last(make_scorer(shop, attention), shop.store, USERS)
    assert scores_BI.shape == (3, shop.catalogue.num_rows)
    assert torch.isneginf(scores_BI[:, :NUM_SPECIAL]).all()
    assert torch.isfinite(scores_BI[:, NUM_SPECIAL:]).all()


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_the_item_of_the_target_is_not_read(shop, attention):
    scorer = make_scorer(shop, attention)
    changed = with_changed_last_event(shop.store, item=True)
    assert torch.equal(score_last(scorer, shop.store, USERS), score_last(scorer, changed, USERS))


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("knows_request", [True, False])
def test_the_time_of_the_target_is_read_only_when_asked(shop, attention, knows_request):
    scorer = make_scorer(shop, attention, knows_request=knows_request)
    changed = with_changed_last_event(shop.store, context=True)
    same = torch.equal(score_last(scorer, shop.store, USERS), score_last(scorer, changed, USERS))
    assert same is not knows_request


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("knows_request", [True, False])
def test_ages_count_to_the_time_of_the_target_only_when_asked(shop, attention, knows_request):
    scorer = make_scorer(shop, attention, time_bias=True, knows_request=knows_request)
    with torch.no_grad():
        for block in scorer._model.blocks:
            block.ages.weight.normal_()
    later = with_changed_last_event(shop.store, days=100)
    same = torch.equal(score_last(scorer, shop.store, USERS), score_last(scorer, later, USERS))
    assert same is not knows_request


def test_scores_are_not_rounded_to_the_precision_of_training(shop):
    scores_BI = score_last(make_scorer(shop, dtype=torch.bfloat16), shop.store, USERS)
    assert not torch.equal(scores_BI, scores_BI.bfloat16().float())


def test_the_event_type_of_the_target_is_never_read(shop):
    field = shop.context.fields.index("event_type")
    context_TF = shop.store.context_TF.copy()
    context_TF[shop.store.offsets_U[1:] - 1, field] = 0
    changed = dataclasses.replace(shop.store, context_TF=context_TF)
    scorer = make_scorer(shop)
    assert torch.equal(score_last(scorer, shop.store, USERS), score_last(scorer, changed, USERS))


def test_the_company_in_a_batch_changes_nothing(shop):
    scorer = make_scorer(shop)
    together = score_last(scorer, shop.store, USERS)
    alone = torch.cat([score_last(scorer, shop.store, USERS[[n]]) for n in range(3)])
    assert torch.allclose(together[:, NUM_SPECIAL:], alone[:, NUM_SPECIAL:], atol=1e-5)


def test_histories_are_the_last_events_left_padded(make_store):
    store = make_store([[0, 1, 2, 3], [4, 5]])
    histories = gather_histories(store, np.array([0, 1]), np.array([3, 5]), 2)
    assert histories.items_BL.tolist() == [[1 + 2, 2 + 2], [0, 4 + 2]]
    assert histories.context_BLF.shape == (2, 2, 0)


def test_times_of_histories_and_requests_have_one_origin(make_store):
    store = make_store([[0, 1, 2, 3], [4, 5]])  # an event a day
    histories = gather_histories(store, np.array([0, 1]), np.array([3, 5]), 2)
    day = 86_400
    assert histories.seconds_BL.tolist() == [[1, day + 1], [0, 3 * day + 1]]
    assert histories.request_seconds_B.tolist() == [2 * day + 1, 4 * day + 1]
