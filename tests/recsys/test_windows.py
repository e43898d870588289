"""Where windows lie, and what they gather."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from recsys.catalogue import PAD
from recsys.splits import leave_one_out, whole_sequences
from recsys.tokens import TokenStore
from recsys.windows import Windows

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


def test_validation_and_test_items_are_never_gathered():
    windows = _windows([6, 5], max_len=50)
    seen = set()
    for starts, lengths, _ in windows.batches(2, seed=0):
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
        torch.cat([batch[0] for batch in windows.batches(4, seed=3, rank=rank, world_size=2)])
        for rank in (0, 1)
    ]
    assert sorted(torch.cat(starts).tolist()) == [0, 5, 10, 15, 20, 25, 30, 35]


def test_how_many_ranks_there_are_does_not_change_a_global_batch():
    windows = _windows([30, 12, 9, 4, 17], max_len=8)

    def batches(world_size):
        parts = [
            windows.batches(6, seed=2, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        return [
            torch.cat([torch.stack(p) for p in part], 1).tolist()
            for part in zip(*parts, strict=True)
        ]

    assert batches(1) == batches(2) == batches(4)


def test_an_epoch_can_go_on_in_its_middle():
    windows = _windows([30, 12, 9, 4], max_len=8)
    whole, rest = (
        [batch.starts_B.tolist() for batch in windows.batches(2, 0, first=first)]
        for first in (0, 3)
    )
    assert rest == whole[3:]
    assert rest


def test_every_rank_gets_as_many_batches():
    windows = _windows([5] * 7, max_len=10)
    counts = [len(list(windows.batches(4, 0, rank=rank, world_size=2))) for rank in (0, 1)]
    assert counts == [windows.num_batches(4)] * 2 == [2, 2]


@pytest.mark.parametrize("seed", [0, 1])
def test_the_same_seed_draws_the_same_epoch(seed):
    windows = _windows([30, 12, 9, 4], max_len=8)
    one, two = ([b[0].tolist() for b in windows.batches(3, seed)] for _ in range(2))
    assert one == two


def test_users_without_a_target_have_no_window():
    store = _store([6, 6, 6])
    is_target = np.zeros(18, bool)
    is_target[[3, 6]] = True  # the second user's target has nothing before it
    windows = Windows(store, whole_sequences(store.offsets_U), 10, _CPU, is_target)
    ((starts, _, _),) = windows.batches(1, seed=0)
    assert starts.tolist() == [0]


def test_batches_hold_windows_of_similar_length_in_any_order():
    # 256 windows of 2 to 257 events: 32 batches of 8, which is what is ordered at once.
    windows = _windows(np.random.default_rng(0).permutation(np.arange(4, 260)), max_len=300)
    batches = [batch.lengths_B for batch in windows.batches(8, seed=0)]
    assert [int(lengths.max() - lengths.min()) for lengths in batches] == [7] * 32
    shortest = [int(lengths.min()) for lengths in batches]
    assert sorted(shortest) == list(range(2, 258, 8)) != shortest
