"""Losses against values worked out by hand and against autograd."""

import math

import pytest
import torch
import torch.nn.functional as F

from recsys.losses import LossConfig, compute_loss, full_softmax, sampled_softmax

_BIAS = torch.zeros(4)


def test_full_softmax_of_equal_scores_is_the_log_of_the_number_of_items():
    loss = full_softmax(
        torch.zeros(3, 2), torch.zeros(5, 2), torch.zeros(5), torch.tensor([2, 3, 4])
    )
    assert loss.item() == pytest.approx(math.log(3))  # five rows, two of them padding and mask


def test_full_softmax_by_hand():
    # The items 2 and 3 score 1 and 0: the loss of item 2 is log(1 + e^-1).
    table = torch.tensor([[9.0], [9.0], [1.0], [0.0]])
    loss = full_softmax(torch.ones(1, 1), table, _BIAS, torch.tensor([2]))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)))


@pytest.mark.parametrize("block_size", [1, 3, 64])
def test_blocks_change_neither_the_loss_nor_its_gradients(block_size):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    table = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    bias = torch.randn(9, generator=generator, dtype=torch.float64)
    targets = torch.tensor([2, 3, 8, 8, 5, 2, 7])

    def gradients(loss_of):
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, table, bias)]
        loss = loss_of(*leaves)
        loss.backward()
        return [loss.detach(), *(leaf.grad for leaf in leaves)]

    ours = gradients(lambda h, t, b: full_softmax(h, t, b, targets, block_size=block_size))
    theirs = gradients(lambda h, t, b: F.cross_entropy((h @ t.T + b)[:, 2:], targets - 2))
    for mine, autograd in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.double(), autograd, rtol=1e-5, atol=1e-6)


def test_no_scored_position_gives_zero_loss_and_zero_gradient():
    table = torch.randn(5, 2, requires_grad=True)
    empty = torch.zeros(0, 2, requires_grad=True)
    loss = full_softmax(empty, table, torch.zeros(5), torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    assert not table.grad.any()


def test_sampled_softmax_corrects_for_the_items_that_were_not_drawn():
    # Four items, all scores 0: one negative stands for the three others, so the loss is log(1 + 3).
    loss = sampled_softmax(
        torch.zeros(1, 2), torch.zeros(6, 2), torch.zeros(6), torch.tensor([2]), torch.tensor([4])
    )
    assert loss.item() == pytest.approx(math.log(4))


def test_sampled_softmax_ignores_a_negative_that_is_the_target():
    loss = sampled_softmax(
        torch.zeros(1, 2), torch.zeros(6, 2), torch.zeros(6), torch.tensor([2]), torch.tensor([2])
    )
    assert loss.item() == 0


def test_sampled_softmax_with_every_item_once_equals_the_full_softmax():
    generator = torch.Generator().manual_seed(1)
    hidden, table = torch.randn(3, 4, generator=generator), torch.randn(8, 4, generator=generator)
    targets, bias = torch.tensor([2, 5, 7]), torch.zeros(8)
    # Drawn are all six items; for each target its own is masked, five remain and stand for five.
    sampled = sampled_softmax(hidden, table, bias, targets, torch.arange(2, 8))
    full = full_softmax(hidden, table, bias, targets)
    corrected = math.log(5 / 6)
    assert sampled.item() == pytest.approx(
        F.cross_entropy(
            _shifted((hidden @ table.T)[:, 2:], targets - 2, corrected), targets - 2
        ).item(),
        abs=1e-5,
    )
    assert abs(sampled.item() - full.item()) < 0.2


def test_the_generator_decides_the_negatives():
    hidden, table, bias = torch.ones(2, 3), torch.randn(50, 3), torch.zeros(50)
    config = LossConfig(kind="sampled-softmax", num_negatives=5)
    targets = torch.tensor([2, 3])
    losses = [
        compute_loss(config, hidden, table, bias, targets, torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def _shifted(logits, targets, amount):
    shifted = logits + amount
    return shifted.scatter_add(1, targets[:, None], torch.full((len(targets), 1), -amount))
