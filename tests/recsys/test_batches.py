"""Windows, masks and targets."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from recsys.batches import ObjectiveConfig, Windows, make_batch
from recsys.catalogue import MASK, PAD
from recsys.splits import leave_one_out
from recsys.tokens import TokenStore

_KNOWN = torch.tensor([True, False])
_CPU = torch.device("cpu")


def _store(lengths):
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    num_tokens = int(offsets[-1])
    return TokenStore(
        user_ids=pa.array(range(len(lengths))),
        offsets_U=offsets,
        items_T=np.arange(2, 2 + num_tokens, dtype=np.int32),
        context_TF=np.ones((num_tokens, 2), np.uint8),
        timestamps_T=np.arange(num_tokens, dtype=np.int64) * 1_000_000,
    )


def _windows(lengths, max_len):
    store = _store(lengths)
    return Windows(store, leave_one_out(store.offsets_U), max_len, _CPU)


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _batch(objective, items, context):
    """A batch whose events are a second apart, the first at 1."""
    seconds = torch.arange(1, items.shape[1] + 1).expand(items.shape) * (items != PAD)
    return make_batch(objective, items, context, seconds, _KNOWN, _generator())


def test_validation_and_test_items_are_never_gathered():
    windows = _windows([6, 5], max_len=50)
    seen = set()
    for starts, lengths in windows.batches(2, seed=0):
        seen |= set(windows.gather(starts, lengths)[0].flatten().tolist())
    assert seen - {PAD} == {
        2,
        3,
        4,
        5,
        8,
        9,
        10,
    }  # tokens 4, 5 and 9, 10 of the users are held back


def test_windows_are_padded_on_the_left():
    windows = _windows([5, 7], max_len=50)
    items, context, seconds = windows.gather(torch.tensor([0, 5]), torch.tensor([2, 4]))
    assert items.tolist() == [[PAD, PAD, 2, 3], [7, 8, 9, 10]]
    assert context[0, :, 0].tolist() == [0, 0, 1, 1]
    assert seconds.tolist() == [[0, 0, 1, 2], [6, 7, 8, 9]]


def test_a_long_sequence_gives_several_windows_that_cover_its_end():
    windows = _windows([25], max_len=10)  # 23 training events: three windows
    assert len(windows) == 3
    (batch,) = windows.batches(3, seed=1)
    ends = (batch[0] + batch[1]).tolist()
    assert max(ends) == 23
    assert all(start >= 0 for start in batch[0].tolist())


def test_ranks_share_one_permutation_and_overlap_only_to_fill_the_last_batch():
    windows = _windows([5] * 8, max_len=10)
    starts = [
        torch.cat([batch[0] for batch in windows.batches(2, seed=3, rank=rank, world_size=2)])
        for rank in (0, 1)
    ]
    assert sorted(torch.cat(starts).tolist()) == [0, 5, 10, 15, 20, 25, 30, 35]


def test_every_rank_gets_as_many_batches():
    windows = _windows([5] * 7, max_len=10)
    counts = [len(list(windows.batches(2, 0, rank=rank, world_size=2))) for rank in (0, 1)]
    assert counts == [windows.num_batches(2, 2)] * 2 == [2, 2]


def test_the_target_is_hidden_from_its_own_position():
    items = torch.arange(2, 202).view(4, 50)
    batch = _batch(ObjectiveConfig(), items, torch.ones(4, 50, 2).long())
    assert (batch.items_BL.flatten()[batch.scored_M] == MASK).all()
    assert batch.targets_M.tolist() == items.flatten()[batch.scored_M].tolist()


def test_a_scored_position_knows_only_what_a_request_knows():
    objective = ObjectiveConfig(context_dropout=0.0)
    context = torch.ones(4, 50, 2).long()
    batch = _batch(objective, torch.full((4, 50), 7), context)
    scored = batch.context_BLF.flatten(0, 1)[batch.scored_M]
    assert scored[:, 0].all()
    assert not scored[:, 1].any()


def test_context_dropout_hides_the_whole_request():
    objective = ObjectiveConfig(context_dropout=1.0)
    batch = _batch(objective, torch.full((4, 50), 7), torch.ones(4, 50, 2).long())
    assert not batch.context_BLF.flatten(0, 1)[batch.scored_M].any()


def test_every_window_scores_one_position_at_least():
    items = torch.tensor([[PAD, 2, 3]] * 200)
    objective = ObjectiveConfig(mask_prob=0.01, last_prob=0.0)
    batch = _batch(objective, items, torch.ones(200, 3, 2).long())
    assert len(set((batch.scored_M // 3).tolist())) == 200
    assert (batch.targets_M != PAD).all()


def test_last_prob_one_imitates_a_recommendation():
    objective = ObjectiveConfig(last_prob=1.0)
    items = torch.arange(2, 22).view(4, 5)
    batch = _batch(objective, items, torch.ones(4, 5, 2).long())
    assert batch.targets_M.tolist() == [6, 11, 16, 21]


def test_next_item_targets_are_the_following_items_without_padding():
    objective = ObjectiveConfig(kind="next-item", context_dropout=0.0)
    context = torch.tensor([[[0, 0], [1, 1], [2, 2], [3, 3]]])
    batch = _batch(objective, torch.tensor([[PAD, 2, 3, 4]]), context)
    assert batch.items_BL.tolist() == [[PAD, 2, 3]]
    assert batch.targets_M.tolist() == [3, 4]
    # The request carries the known field of the event that follows, and not the other one.
    assert batch.request_BLF[0, 1:].tolist() == [[2, 0], [3, 0]]


def test_a_causal_position_knows_when_the_request_that_follows_it_came():
    objective = ObjectiveConfig(kind="next-item", context_dropout=0.0)
    items = torch.tensor([[PAD, 2, 3, 4]])
    batch = _batch(objective, items, torch.zeros(1, 4, 2).long())
    assert batch.seconds_BL2[0].tolist() == [[0, 2], [2, 3], [3, 4]]


@pytest.mark.parametrize("kind", ["next-item", "masked-item"])
def test_context_dropout_hides_the_time_of_the_request(kind):
    objective = ObjectiveConfig(kind=kind, context_dropout=1.0)
    batch = _batch(objective, torch.full((4, 50), 7), torch.zeros(4, 50, 2).long())
    of_request = 1 if kind == "next-item" else 0
    assert not batch.seconds_BL2.flatten(0, 1)[batch.scored_M, of_request].any()


@pytest.mark.parametrize("seed", [0, 1])
def test_the_same_seed_draws_the_same_epoch(seed):
    windows = _windows([30, 12, 9, 4], max_len=8)
    one, two = ([b[0].tolist() for b in windows.batches(3, seed)] for _ in range(2))
    assert one == two
