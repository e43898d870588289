"""Which negatives are drawn, and how often each was to be expected."""

import math

import pytest
import torch
from pydantic import ValidationError

from recsys.negatives import BatchTargets, NegativeSampler, NegativesConfig
from recsys.randomness import Draws

COUNTS = torch.tensor([7, 7, 0, 1, 3, 4])  # padding, mask and four items with 8 training events
TARGETS = torch.tensor([4, 4, 5])


def draw(seed=0, targets=TARGETS, first=0, of_batch=None, **settings):
    """Negatives of positions that have `first` others before them in the global batch."""
    sampler = NegativeSampler(NegativesConfig(**settings), COUNTS.clone())
    of_batch = BatchTargets(targets if of_batch is None else of_batch, first)
    return sampler.draw(targets, Draws(seed, 0, torch.zeros(1)), of_batch)


def shares(items):
    return torch.bincount(items.flatten(), minlength=6).double() / items.numel()


def test_uniform_negatives_are_any_item_and_never_padding_or_mask():
    negatives = draw(num=40_000)
    assert shares(negatives.items_GN)[2:].tolist() == pytest.approx([0.25] * 4, abs=0.01)
    assert negatives.log_expected_GN[0, 0].item() == pytest.approx(math.log(40_000 / 4))


def test_popular_items_are_drawn_by_their_training_events():
    negatives = draw(source="popularity", num=40_000)
    expected = [0, 0, 0, 1 / 8, 3 / 8, 4 / 8]
    assert shares(negatives.items_GN).tolist() == pytest.approx(expected, abs=0.01)
    column = int((negatives.items_GN[0] == 4).nonzero()[0])
    assert negatives.log_expected_GN[0, column].item() == pytest.approx(math.log(40_000 * 3 / 8))


def test_the_targets_of_the_batch_are_its_negatives():
    negatives = draw(source="in-batch")
    assert negatives.items_GN.tolist() == [TARGETS.tolist()]
    expected = [3 * 3 / 8, 3 * 3 / 8, 3 * 4 / 8]
    assert negatives.log_expected_GN[0].exp().tolist() == pytest.approx(expected)


def test_mixed_negatives_are_both_and_so_is_what_was_expected_of_them():
    negatives = draw(source="mixed", num=2)
    assert negatives.num == 5
    assert negatives.items_GN[0, 2:].tolist() == TARGETS.tolist()
    assert negatives.log_expected_GN[0, 4].exp().item() == pytest.approx(2 / 4 + 3 * 4 / 8)


def test_positions_share_a_draw_by_groups():
    negatives = draw(num=50, group_size=2)
    assert negatives.items_GN.shape == negatives.log_expected_GN.shape == (2, 50)
    assert not torch.equal(negatives.items_GN[0], negatives.items_GN[1])
    of_positions = negatives.per_position(negatives.items_GN, 3)
    assert torch.equal(of_positions, negatives.items_GN[[0, 0, 1]])
    with pytest.raises(ValidationError, match="in-batch negatives belong to the batch"):
        NegativesConfig(source="in-batch", group_size=1)


@pytest.mark.parametrize("source", ["uniform", "popularity", "in-batch", "mixed"])
def test_a_part_of_a_batch_draws_what_the_whole_one_draws(source):
    group_size = 2 if source in ("uniform", "popularity") else None
    settings = {"source": source, "num": 9, "group_size": group_size}
    targets = torch.tensor([4, 4, 5, 3, 5])
    whole = draw(targets=targets, **settings)
    part = draw(targets=targets[3:], first=3, of_batch=targets, **settings)
    for name in ("items_GN", "log_expected_GN"):
        of_whole = whole.per_position(getattr(whole, name), 5)
        assert torch.equal(part.per_position(getattr(part, name), 2), of_whole[3:])


def test_the_seed_decides():
    assert torch.equal(draw(1, num=9).items_GN, draw(1, num=9).items_GN)
    assert not torch.equal(draw(1, num=9).items_GN, draw(2, num=9).items_GN)


def test_expectations_are_those_of_many_draws():
    """The logQ of each source against how often an item really came."""
    for source in ("uniform", "popularity"):
        sampler = NegativeSampler(NegativesConfig(source=source, num=3), COUNTS.clone())
        draws = [
            sampler.draw(TARGETS, Draws(3, step, torch.zeros(1)), BatchTargets(TARGETS))
            for step in range(4_000)
        ]
        items = torch.stack([one.items_GN for one in draws])
        for item in (3, 4, 5):
            expected = torch.stack([one.log_expected_GN for one in draws])[items == item][0].exp()
            came = (items == item).sum() / len(draws)
            assert came.item() == pytest.approx(expected.item(), rel=0.1)
