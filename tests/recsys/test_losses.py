"""Losses against values worked out by hand and against autograd."""

import math

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recsys.losses import (
    LossConfig,
    binary_cross_entropy,
    compute_loss,
    full_softmax,
    sampled_softmax,
)
from recsys.negatives import Negatives, NegativesConfig
from recsys.seen_items import SeenItems

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


def _largest_kept(loss_of):
    """Numbers in the largest tensor that a loss over 300 positions and 400 items, in 4 dimensions,
    keeps for its backward pass."""
    hidden_MD, table_ID = torch.randn(300, 4), torch.randn(400, 4, requires_grad=True)
    sizes = []

    def keep(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        targets_M = torch.randint(2, 400, (300,))
        loss_of(hidden_MD.requires_grad_(), table_ID, torch.zeros(400), targets_M).backward()
    return max(sizes)


def test_the_blocked_softmax_keeps_no_matrix_of_positions_and_items():
    def whole(hidden_MD, table_ID, bias_I, targets_M):
        return F.cross_entropy(hidden_MD @ table_ID.T + bias_I, targets_M)

    assert _largest_kept(whole) == 300 * 400
    assert _largest_kept(full_softmax) <= 400 * 4


class _Largest(TorchDispatchMode):
    """Notes the numbers in the largest tensor that an operation gave."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = func(*args, **(kwargs or {}))
        tensors = [one for one in tree_leaves(given) if isinstance(one, torch.Tensor)]
        self.numbers = max([self.numbers, *(tensor.numel() for tensor in tensors)])
        return given


@pytest.mark.parametrize(
    ("num_items", "most"),
    [
        (1_000, 2**20),  # 4 MiB of fp32
        (50_000, 64 * 50_000),  # of a large catalogue 64 positions
    ],
)
def test_by_default_few_logits_exist_at_the_same_time(num_items, most):
    table_ID, targets_M = torch.zeros(num_items + 2, 2), torch.full((2_000,), 2)
    with _Largest() as largest:
        full_softmax(torch.zeros(2_000, 2), table_ID, torch.zeros(num_items + 2), targets_M)
    assert 0.9 * most < largest.numbers <= most


def test_no_scored_position_gives_zero_loss_and_zero_gradient():
    table = torch.randn(5, 2, requires_grad=True)
    empty = torch.zeros(0, 2, requires_grad=True)
    loss = full_softmax(empty, table, torch.zeros(5), torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    assert not table.grad.any()


def drawn(*items, expected=1.0, group_size=4, num_before=0):
    """Negatives of one group or, from lists, of several; all are expected as often as given, or
    each by itself from lists.
    """
    items = torch.atleast_2d(torch.tensor(items))
    log_expected = torch.tensor(expected).log().expand(items.shape)
    return Negatives(items, log_expected, group_size, num_before)


def flat(num_rows=6):
    """One position for which every item scores 0."""
    return torch.zeros(1, 2), torch.zeros(num_rows, 2), torch.zeros(num_rows)


def test_sampled_softmax_lets_a_negative_stand_for_those_that_were_not_drawn():
    # Four items, all scores 0: one negative stands for the three others, so the loss is log(1 + 3).
    loss = sampled_softmax(*flat(), torch.tensor([2]), drawn(4, expected=1 / 3))
    assert loss.item() == pytest.approx(math.log(4))


def test_each_negative_of_each_group_stands_for_as_many_as_were_expected_of_it():
    # The target scores 0 and the negatives log(2) and log(3): each counts e^score / expected.
    table = torch.tensor([[9.0], [9.0], [0.0], [math.log(2)], [math.log(3)]])
    expected = [[1 / 2, 1 / 4], [1 / 3, 1.0]]
    negatives = drawn([3, 4], [3, 4], expected=expected, group_size=1)
    targets = torch.tensor([2, 2])
    loss = sampled_softmax(torch.ones(2, 1), table, torch.zeros(5), targets, negatives)
    by_hand = math.log(1 + 2 * 2 + 3 * 4) + math.log(1 + 2 * 3 + 3 * 1)
    assert loss.item() == pytest.approx(by_hand / 2)


def test_sampled_softmax_ignores_a_negative_that_is_the_target():
    assert sampled_softmax(*flat(), torch.tensor([2]), drawn(2)).item() == 0


def test_sampled_softmax_with_every_item_once_equals_the_full_softmax():
    generator = torch.Generator().manual_seed(1)
    hidden, table = torch.randn(3, 4, generator=generator), torch.randn(8, 4, generator=generator)
    targets, bias = torch.tensor([2, 5, 7]), torch.randn(8, generator=generator)
    sampled = sampled_softmax(hidden, table, bias, targets, drawn(*range(2, 8)))
    full = full_softmax(hidden, table, bias, targets)
    assert sampled.item() == pytest.approx(full.item(), abs=1e-5)


def test_binary_cross_entropy_by_hand():
    # Scores 1 for the target, 0 and 2 for two negatives: a mean over three questions.
    table = torch.tensor([[9.0], [9.0], [1.0], [0.0], [2.0]])
    loss = binary_cross_entropy(
        torch.ones(1, 1), table, torch.zeros(5), torch.tensor([2]), drawn(3, 4)
    )
    by_hand = math.log(1 + math.exp(-1)) + math.log(2) + math.log(1 + math.exp(2))
    assert loss.item() == pytest.approx(by_hand / 3)


def test_gbce_counts_the_target_less_the_fewer_negatives_are_drawn():
    # Five items, one negative: a = 1/4. At t = 1 beta is a, at t = 0 it is 1, half way 0.625.
    for calibration, beta in ((0.0, 1.0), (0.5, 0.625), (1.0, 0.25)):
        loss = binary_cross_entropy(*flat(7), torch.tensor([2]), drawn(4), calibration=calibration)
        assert loss.item() == pytest.approx((beta + 1) * math.log(2) / 2)


def test_a_prior_shifts_scores_by_how_rare_a_target_is():
    # As above with t = 0.5: the target counts 0.625, beside one negative; scores are log(0.625).
    loss = binary_cross_entropy(*flat(7), torch.tensor([2]), drawn(4), calibration=0.5, prior=True)
    by_hand = 0.625 * math.log(1 + 1 / 0.625) + math.log(1 + 0.625)
    assert loss.item() == pytest.approx(by_hand / 2)


@pytest.mark.parametrize(("kind", "own"), [("bce", {}), ("gbce", {"calibration": 0.9})])
def test_with_a_prior_equal_scores_have_nothing_to_gain_from_a_common_shift(kind, own):
    def slope(*, prior):
        hidden, table, bias = flat(12)
        config = LossConfig(kind=kind, prior=prior, **own)
        bias.requires_grad_()
        compute_loss(config, hidden, table, bias, torch.tensor([2]), drawn(*range(3, 9))).backward()
        return bias.grad.sum().item()

    assert slope(prior=True) == pytest.approx(0, abs=1e-6)
    assert slope(prior=False) > 0.2


@pytest.mark.parametrize("kind", ["sampled-softmax", "gbce"])
def test_each_position_is_held_against_the_negatives_of_its_group(kind):
    generator = torch.Generator().manual_seed(3)
    hidden, table = torch.randn(5, 4, generator=generator), torch.randn(12, 4, generator=generator)
    targets, bias = torch.tensor([2, 5, 7, 3, 9]), torch.randn(12, generator=generator)
    config, groups = LossConfig(kind=kind), [[3, 4], [5, 6], [10, 11]]

    def loss_of(rows, *negatives):
        return compute_loss(
            config, hidden[rows], table, bias, targets[rows], drawn(*negatives, group_size=2)
        )

    together = loss_of(slice(0, 5), *groups)
    apart = [loss_of(slice(n, n + 1), groups[n // 2]) for n in range(5)]
    assert together.item() == pytest.approx(torch.stack(apart).mean().item(), abs=1e-6)


def test_a_negative_that_is_the_target_costs_nothing():
    loss = binary_cross_entropy(*flat(), torch.tensor([2]), drawn(2, 3))
    assert loss.item() == pytest.approx(2 * math.log(2) / 3)


@pytest.mark.parametrize("kind", ["sampled-softmax", "bce", "gbce"])
@pytest.mark.parametrize("groups", [[[3, 5, 6]], [[3, 4], [5, 6]], [[3, 4], [5, 6], [7, 8]]])
def test_gradients_agree_with_finite_differences(kind, groups):
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    table = torch.randn(9, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(9, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([2, 5, 8])
    negatives = drawn(*groups)
    config = LossConfig(kind=kind)

    def loss_of(*leaves):
        # Scores are taken in fp32, so differences are taken wide.
        return compute_loss(config, *leaves, targets, negatives).double()

    assert torch.autograd.gradcheck(
        loss_of, (hidden, table, bias), eps=1e-2, atol=2e-3, nondet_tol=1e-6
    )


@pytest.mark.parametrize("kind", ["sampled-softmax", "bce", "gbce"])
def test_no_scored_position_costs_nothing_and_reaches_every_parameter(kind):
    hidden = torch.zeros(0, 2, requires_grad=True)
    table = torch.randn(5, 2, requires_grad=True)
    targets = torch.zeros(0, dtype=torch.int64)
    loss = compute_loss(LossConfig(kind=kind), hidden, table, torch.zeros(5), targets, drawn(2, 3))
    loss.backward()
    assert loss.item() == 0
    assert table.grad is not None
    assert not table.grad.any()


def test_a_weighted_full_softmax_by_hand():
    # The items 2 and 3 score 1 and 0; the first of two targets counts three times.
    table = torch.tensor([[9.0], [9.0], [1.0], [0.0]])
    weights = torch.tensor([3.0, 1.0])
    loss = full_softmax(torch.ones(2, 1), table, _BIAS, torch.tensor([2, 3]), weights)
    by_hand = (3 * math.log(1 + math.exp(-1)) + math.log(1 + math.e)) / 4
    assert loss.item() == pytest.approx(by_hand)


def test_a_weighted_sampled_softmax_by_hand():
    # Targets score 1 and 0 and are held against the other one.
    table = torch.tensor([[9.0], [9.0], [1.0], [0.0]])
    targets, weights = torch.tensor([2, 3]), torch.tensor([3.0, 1.0])
    loss = sampled_softmax(torch.ones(2, 1), table, _BIAS, targets, drawn(2, 3), weights)
    by_hand = (3 * math.log(1 + math.exp(-1)) + math.log(1 + math.e)) / 4
    assert loss.item() == pytest.approx(by_hand)


@pytest.mark.parametrize("calibration", [0.0, 0.5])
def test_a_weighted_binary_cross_entropy_by_hand(calibration):
    # Targets score 1 and 0, the negative 2. Four items: a = 1/3, at t = 0.5 beta is 2/3.
    table = torch.tensor([[9.0], [9.0], [1.0], [0.0], [2.0], [7.0]])
    targets, weights = torch.tensor([2, 3]), torch.tensor([3.0, 1.0])
    loss = binary_cross_entropy(
        torch.ones(2, 1), table, torch.zeros(6), targets, drawn(4), weights, calibration=calibration
    )
    beta = 2 / 3 if calibration else 1
    no = math.log(1 + math.exp(2))
    by_hand = (3 * (beta * math.log(1 + math.exp(-1)) + no) + (beta * math.log(2) + no)) / 4 / 2
    assert loss.item() == pytest.approx(by_hand)


_KINDS = ["full-softmax", "sampled-softmax", "bce", "gbce"]


def _case(num_positions=3):
    """Hidden states, table and biases with gradients, and targets."""
    generator = torch.Generator().manual_seed(4)
    shapes = (num_positions, 4), (9, 4), (9,)
    leaves = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    targets = torch.randint(2, 9, (num_positions,), generator=generator)
    return [leaf.requires_grad_() for leaf in leaves], targets


@pytest.mark.parametrize("kind", _KINDS)
def test_gradients_of_weighted_losses_agree_with_finite_differences(kind):
    leaves, targets = _case()
    weights, config = torch.tensor([3.0, 0.5, 1.0]), LossConfig(kind=kind)

    def loss_of(*leaves):
        return compute_loss(
            config, *leaves, targets, drawn([3, 4], [5, 6], group_size=2), weights
        ).double()

    assert torch.autograd.gradcheck(loss_of, leaves, eps=1e-2, atol=2e-3, nondet_tol=1e-6)


@pytest.mark.parametrize("kind", _KINDS)
def test_a_target_of_weight_two_counts_like_two_targets(kind):
    (hidden, table, bias), targets = _case()
    config, twice = LossConfig(kind=kind), torch.tensor([0, 0, 1, 2])

    def gradients(rows, weights):
        for leaf in (hidden, table, bias):
            leaf.grad = None
        scored = hidden[rows], table, bias, targets[rows]
        loss = compute_loss(config, *scored, drawn(3, 4), weights)
        loss.backward()
        return [loss.detach(), hidden.grad, table.grad, bias.grad]

    weighted = gradients(torch.arange(3), torch.tensor([2.0, 1.0, 1.0]))
    repeated = gradients(twice, None)
    for one, other in zip(weighted, repeated, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", _KINDS)
def test_equal_weights_change_nothing(kind):
    leaves, targets = _case()
    config, weights = LossConfig(kind=kind), torch.full((3,), 7.0)
    plain = compute_loss(config, *leaves, targets, drawn(3, 4))
    weighted = compute_loss(config, *leaves, targets, drawn(3, 4), weights)
    assert weighted.item() == pytest.approx(plain.item(), rel=1e-6)


@pytest.mark.parametrize("kind", _KINDS)
def test_nothing_to_score_costs_nothing_with_weights_too(kind):
    leaves, targets = _case(num_positions=0)
    loss = compute_loss(LossConfig(kind=kind), *leaves, targets, drawn(3, 4), torch.zeros(0))
    loss.backward()
    assert loss.item() == 0
    assert not leaves[1].grad.any()


def test_a_parameter_of_another_loss_is_refused():
    for kind, wrong in (
        ("full-softmax", {"negatives": {"num": 3}}),
        ("bce", {"calibration": 0.5}),
        ("sampled-softmax", {"prior": True}),
        ("sampled-softmax", {"block_size": 9}),
    ):
        with pytest.raises(ValidationError, match=f"{kind} has no {next(iter(wrong))}"):
            LossConfig(kind=kind, **wrong)


@pytest.mark.parametrize("source", ["popularity", "in-batch", "mixed"])
def test_what_is_calibrated_for_uniform_negatives_takes_no_others(source):
    negatives = NegativesConfig(source=source)
    says = f"gbce is calibrated for uniform negatives, not for {source} ones; set negatives.source"
    with pytest.raises(ValidationError, match=says):
        LossConfig(kind="gbce", negatives=negatives)
    # Nothing else counts on how they were drawn, the prior of bce neither.
    assert LossConfig(kind="sampled-softmax", negatives=negatives).negatives.source == source
    assert LossConfig(kind="bce", negatives=negatives, prior=True).negatives.source == source


@pytest.mark.parametrize("kind", ["sampled-softmax", "bce", "gbce"])
def test_groups_may_be_shared_with_positions_that_are_elsewhere(kind):
    leaves, targets = _case(5)
    hidden, table, bias = leaves
    config, groups = LossConfig(kind=kind), ([3, 4], [5, 6])
    whole = compute_loss(config, *leaves, targets, drawn(*groups, group_size=4))
    parts = [
        compute_loss(config, hidden[:3], table, bias, targets[:3], drawn([3, 4])),
        compute_loss(config, hidden[3:], table, bias, targets[3:], drawn(*groups, num_before=3)),
    ]
    assert whole.item() == pytest.approx(((3 * parts[0] + 2 * parts[1]) / 5).item())


def seen_by(*windows):
    """One scored position a window, which sees all of it."""
    items_BL = torch.tensor(windows)
    last_M = torch.arange(1, len(windows) + 1) * items_BL.shape[1] - 1
    return SeenItems.of(items_BL, last_M, is_causal=True)


def test_a_full_softmax_leaves_out_what_was_seen():
    # Of the items 2 to 5, which all score 0, one was seen: the target is one of three.
    loss = full_softmax(*flat(), torch.tensor([2]), seen=seen_by([0, 4, 4]))
    assert loss.item() == pytest.approx(math.log(3))


@pytest.mark.parametrize("seen", [[0, 2, 4], [2, 4, 2], [1, 4, 2]])
def test_a_target_that_was_seen_counts(seen):
    loss = full_softmax(*flat(), torch.tensor([2]), seen=seen_by(seen))
    assert loss.item() == pytest.approx(math.log(3))


@pytest.mark.parametrize("block_size", [1, 3, 64])
def test_gradients_without_seen_items_are_those_of_autograd(block_size):
    leaves, targets = _case(5)
    windows = [[2, 3, 4], [0, 5, 6], [0, 0, 7], [8, 1, 5], [0, 0, 0]]
    is_left_out = torch.zeros(5, 9, dtype=torch.bool)
    for row, window in enumerate(windows):
        is_left_out[row, window] = True
        is_left_out[row, [0, 1]] = True
        is_left_out[row, targets[row]] = False

    def autograd(hidden, table, bias):
        logits = (hidden @ table.T + bias).masked_fill(is_left_out, float("-inf"))
        return F.cross_entropy(logits, targets)

    def ours(*leaves):
        return full_softmax(*leaves, targets, seen=seen_by(*windows), block_size=block_size)

    results = []
    for loss_of in (ours, autograd):
        copies = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        loss = loss_of(*copies)
        loss.backward()
        results.append([loss.detach(), *(leaf.grad for leaf in copies)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine.float(), theirs.float(), rtol=1e-5, atol=1e-6)


def test_a_negative_that_was_seen_costs_nothing():
    # Three negatives at a score of 0, one of them seen: the target is one of three, or two noes
    # and a yes out of four questions.
    negatives, seen = drawn(3, 4, 5), seen_by([0, 4, 4])
    sampled = sampled_softmax(*flat(), torch.tensor([2]), negatives, seen=seen)
    assert sampled.item() == pytest.approx(math.log(3))
    binary = binary_cross_entropy(*flat(), torch.tensor([2]), negatives, seen=seen)
    assert binary.item() == pytest.approx(3 * math.log(2) / 4)


@pytest.mark.parametrize("kind", ["full-softmax", "sampled-softmax", "bce", "gbce"])
def test_every_loss_can_leave_out_what_was_seen(kind):
    leaves, targets = _case(5)
    config = LossConfig(kind=kind, exclude_seen=True)
    seen = seen_by(*[[3, 4]] * 5)
    less = compute_loss(config, *leaves, targets, drawn(3, 4, group_size=5), seen=seen)
    more = compute_loss(config, *leaves, targets, drawn(3, 4, group_size=5))
    assert less.item() < more.item()
