"""What the scored positions of a batch see: worked out by hand, and one by one."""

import pytest
import torch

from recsys.catalogue import MASK, NUM_SPECIAL, PAD
from recsys.negatives import Negatives
from recsys.seen_items import SeenItems

_WINDOWS = torch.tensor([[PAD, 5, 6, 5], [7, MASK, 8, 9]])
_ALL = slice(None)


def _mark(seen, groups, group_size, num_before=0):
    items_GN = torch.tensor(groups)
    return seen.mark(Negatives(items_GN, torch.zeros(items_GN.shape), group_size, num_before))


def test_a_causal_position_sees_its_own_place_and_those_before_it():
    seen = SeenItems.of(_WINDOWS, torch.tensor([1, 3, 4]), is_causal=True)
    assert seen.of_positions(_ALL).tolist() == [[0, 5, 0, 0], [0, 5, 6, 5], [7, 0, 0, 0]]


def test_a_mask_sees_its_whole_window():
    seen = SeenItems.of(_WINDOWS, torch.tensor([5]), is_causal=False)
    assert seen.of_positions(_ALL).tolist() == [[7, MASK, 8, 9]]


def test_positions_are_asked_for_in_parts():
    seen = SeenItems.of(_WINDOWS, torch.tensor([1, 3, 4]), is_causal=True)
    assert seen.of_positions(slice(1, 2)).tolist() == [[0, 5, 6, 5]]


def test_negatives_are_marked_from_the_place_where_they_first_stand():
    seen = SeenItems.of(_WINDOWS, torch.tensor([1, 2, 4]), is_causal=True)
    # All positions share a draw: the first sees 5, the second 5 and 6, that of the other window 7.
    marked = [[True, False, False], [True, True, False], [False, False, True]]
    assert _mark(seen, [[5, 6, 7]], group_size=3).tolist() == marked


def test_windows_of_padding_alone_see_nothing():
    seen = SeenItems.of(torch.full((1, 3), PAD), torch.tensor([2]), is_causal=True)
    assert _mark(seen, [[2, 3]], group_size=1).tolist() == [[False, False]]


def test_no_scored_position_sees_nothing():
    seen = SeenItems.of(_WINDOWS, torch.zeros(0, dtype=torch.int64), is_causal=True)
    assert _mark(seen, [[2, 3]], group_size=1).shape == (0, 2)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(("group_size", "num_before"), [(1, 0), (3, 2), (7, 0), (100, 4)])
def test_marks_agree_with_looking_at_each_position(is_causal, group_size, num_before):
    generator = torch.Generator().manual_seed(group_size)
    B, L, num_rows = 6, 5, 12
    items_BL = torch.randint(PAD, num_rows, (B, L), generator=generator)
    scored_M = torch.randperm(B * L, generator=generator)[:17].sort().values
    groups_M = (torch.arange(17) + num_before) // group_size
    items_GN = torch.randint(NUM_SPECIAL, num_rows, (int(groups_M[-1]) + 1, 9), generator=generator)

    def sees(position, item):
        window, place = divmod(int(scored_M[position]), L)
        visible = items_BL[window, : place + 1] if is_causal else items_BL[window]
        return bool((visible == item).any())

    one_by_one = [
        [sees(position, item) for item in items_GN[group].tolist()]
        for position, group in enumerate(groups_M.tolist())
    ]
    seen = SeenItems.of(items_BL, scored_M, is_causal=is_causal)
    assert _mark(seen, items_GN.tolist(), group_size, num_before).tolist() == one_by_one
    assert any(any(row) for row in one_by_one)
