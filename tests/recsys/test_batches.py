"""Scored positions, masks and targets."""

import pytest
import torch
from pydantic import ValidationError

from recsys.batches import BatchMaker, ObjectiveConfig, TargetWeights
from recsys.catalogue import MASK, PAD
from recsys.losses import full_softmax
from recsys.model import NextItemModel, Request, append_request
from recsys.model_config import ModelConfig
from recsys.randomness import Draws
from recsys.splits import whole_sequences
from recsys.windows import Windows

_NUM_ROWS = 100_002
_KNOWN = torch.tensor([True, False])
_CPU = torch.device("cpu")


def _purchases(*, view=0.0, purchase=1.0):
    """Weights of targets by the code in the second context field: 1 is a view, 2 a purchase."""
    return TargetWeights(1, torch.tensor([0.0, view, purchase]), is_weighted=view > 0)


def _typed(*windows):
    """Windows of items 2, 3, ... written as types: `v` view, `p` purchase, `.` padding."""
    types_BL = torch.tensor([[".vp".index(letter) for letter in window] for window in windows])
    items_BL = torch.arange(2, 2 + types_BL.numel()).view(types_BL.shape)
    return items_BL.masked_fill(types_BL == 0, PAD), types_BL[..., None].expand(-1, -1, 2)


def _draws(items, seed=0):
    return Draws(seed, 0, torch.arange(len(items)))


def _batch(objective, items, context, targets=None, *, seed=0, **options):
    """A batch whose events are a second apart, the first column at 1."""
    seconds = torch.arange(1, items.shape[1] + 1).expand(items.shape) * (items != PAD)
    maker = BatchMaker(objective, _KNOWN, _NUM_ROWS, targets, **options)
    return maker.make(items, context, seconds, _draws(items, seed))


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


@pytest.mark.parametrize("kind", ["next-item", "masked-item", "recency-sampling"])
def test_each_position_forgets_its_request_by_itself(kind):
    objective = ObjectiveConfig(kind=kind, context_dropout=0.3)
    batch = _batch(objective, torch.full((400, 50), 7), torch.ones(400, 50, 2).long())
    if kind == "masked-item":
        is_asked_BL = batch.items_BL == MASK
        told_BL, seconds_BL = batch.context_BLF[..., 0] > 0, batch.seconds_BL2[..., 0]
    else:
        is_asked_BL = batch.items_BL != PAD
        told_BL, seconds_BL = batch.request_BLF[..., 0] > 0, batch.seconds_BL2[..., 1]
    if kind == "recency-sampling":
        is_asked_BL[:, -1] = False  # of several targets it is told only what they share
    assert torch.equal(told_BL[is_asked_BL], seconds_BL[is_asked_BL] > 0)
    assert told_BL[is_asked_BL].float().mean().item() == pytest.approx(0.7, abs=0.02)
    some_B = (told_BL & is_asked_BL).any(1) & (~told_BL & is_asked_BL).any(1)
    several_B = is_asked_BL.sum(1) > 5
    assert some_B[several_B].float().mean() > 0.8


def test_a_request_that_tells_nothing_is_an_input_that_training_makes():
    config = ModelConfig(attention="causal", dim=8, num_layers=1, num_heads=1, max_len=9)
    objective = ObjectiveConfig(kind="next-item", context_dropout=0.5)
    items, context = torch.arange(2, 6)[None], torch.ones(1, 4, 2).long()
    seconds = torch.arange(1, 5)[None]
    nothing = Request(torch.zeros(1, 2).long(), torch.zeros(1).long())
    asked = append_request(config, items[:, :3], context[:, :3], seconds[:, :3], nothing, _KNOWN)
    made = [_batch(objective, items, context, seed=seed) for seed in range(64)]
    inputs = [(one.items_BL, one.context_BLF, one.request_BLF, one.seconds_BL2) for one in made]
    assert any(all(map(torch.equal, asked, one)) for one in inputs)


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


def test_hidden_positions_show_the_mask_another_item_or_their_own():
    items = torch.arange(2, 100_002).view(1000, 100)
    shares = {"random_share": 0.1, "kept_share": 0.2}
    objective = ObjectiveConfig(mask_prob=0.5, last_prob=0.0, **shares)
    batch = _batch(objective, items, torch.ones(1000, 100, 2).long())
    shown_M = batch.items_BL.flatten()[batch.scored_M]
    is_masked, is_own = shown_M == MASK, shown_M == batch.targets_M
    assert is_masked.float().mean().item() == pytest.approx(0.7, abs=0.01)
    assert is_own.float().mean().item() == pytest.approx(0.2, abs=0.01)
    others = shown_M[~is_masked & ~is_own]
    # 5,000 of 100,000 items: any of them, and hardly one of them twice.
    assert others.min() >= 2
    assert others.max() < _NUM_ROWS
    assert others.float().mean().item() == pytest.approx(_NUM_ROWS / 2, rel=0.02)
    assert len(others.unique()) > 0.95 * len(others)
    is_scored = torch.zeros(100_000, dtype=torch.bool).scatter(0, batch.scored_M, True)
    assert torch.equal(batch.items_BL.flatten()[~is_scored], items.flatten()[~is_scored])


def test_a_window_that_imitates_a_recommendation_always_shows_the_mask():
    objective = ObjectiveConfig(last_prob=1.0, random_share=0.5, kept_share=0.4)
    batch = _batch(objective, torch.arange(2, 402).view(100, 4), torch.ones(100, 4, 2).long())
    assert (batch.items_BL.flatten()[batch.scored_M] == MASK).all()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"kind": "next-item", "mask_prob": 0.2}, "next-item has no mask_prob; leave it out"),
        ({"kind": "recency-sampling", "kept_share": 0.1}, "recency-sampling has no kept_share"),
        ({"recency": 0.5}, "masked-item has no recency"),
        ({"random_share": 0.5, "kept_share": 0.5}, "0.5 and kept_share 0.5 leave no mask"),
    ],
)
def test_a_setting_without_effect_is_refused(settings, reason):
    with pytest.raises(ValidationError, match=reason):
        ObjectiveConfig(**settings)


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


def test_event_types_are_inputs_but_a_request_never_tells_its_own(shop):
    windows = Windows(shop.store, whole_sequences(shop.store.offsets_U), 10, _CPU)
    starts, lengths, rows = next(iter(windows.batches(4, seed=0)))
    known = torch.from_numpy(shop.context.known_at_request_F)
    maker = BatchMaker(ObjectiveConfig(kind="next-item"), known, shop.catalogue.num_rows)
    batch = maker.make(*windows.gather(starts, lengths), Draws(0, 0, rows))
    field = shop.context.fields.index("event_type")
    assert set(batch.context_BLF[batch.items_BL != PAD][:, field].tolist()) == {1, 2}
    assert not batch.request_BLF[..., field].any()

    sizes = ModelConfig(attention="causal", dim=8, num_layers=1, num_heads=1, max_len=9, dropout=0)
    model = NextItemModel(sizes, shop.catalogue.num_rows, shop.context.sizes)
    other = batch.context_BLF.clone()
    other[:, -1, field] = 3 - other[:, -1, field]  # the last view is a purchase, and the reverse
    states = [
        model(batch.items_BL, context, batch.request_BLF, batch.seconds_BL2)
        for context in (batch.context_BLF, other)
    ]
    assert (states[0][:, -1] - states[1][:, -1]).abs().amax(1).min() > 0


def _sampled(items, *, context=None, seed=0, targets=None, **objective):
    if context is None:
        context = torch.ones(*items.shape, 2, dtype=torch.int64)
    objective = ObjectiveConfig(kind="recency-sampling", **{"context_dropout": 0.0} | objective)
    return _batch(objective, items, context, targets, seed=seed)


def _rows_of(batch):
    return batch.scored_M // batch.items_BL.shape[1]


def test_recency_sampling_prefers_the_latest_events_by_powers_of_its_rate():
    num_windows = 40_000
    items = torch.arange(2, 8).expand(num_windows, 6)  # six events: one is drawn
    batch = _sampled(items, recency=0.8)
    shares = torch.bincount(batch.targets_M - 2, minlength=6) / num_windows
    weights = 0.8 ** torch.arange(5.0, -1.0, -1.0)
    expected = weights / weights.sum()  # 0.089, 0.111, ..., 0.271
    # Four standard deviations of a share of 0.27 are 0.009.
    torch.testing.assert_close(shares, expected, rtol=0, atol=0.009)


def test_recency_of_one_draws_every_event_alike():
    batch = _sampled(torch.arange(2, 6).expand(20_000, 4), recency=1.0)
    shares = torch.bincount(batch.targets_M - 2) / 20_000
    torch.testing.assert_close(shares, torch.full((4,), 0.25), rtol=0, atol=0.013)


def test_at_most_the_share_of_a_window_is_drawn_and_one_at_least():
    items = torch.arange(2, 52).expand(500, 50).clone()
    items[250:, :41] = PAD  # half of the windows have nine events: int(0.2 * 9) is 1
    counts = torch.bincount(_rows_of(_sampled(items)), minlength=500)
    assert counts[:250].max() <= 10
    assert counts[:250].min() >= 2
    assert counts[250:].tolist() == [1] * 250


@pytest.mark.parametrize("target_share", [0.2, 0.9])
def test_inputs_are_what_was_not_drawn_in_its_order_and_padded_on_the_left(target_share):
    lengths = [2, 3, 5, 12]
    items = torch.full((4, 12), PAD)
    for row, length in enumerate(lengths):
        items[row, 12 - length :] = torch.arange(2, 2 + length)
    batch = _sampled(items, target_share=target_share)
    for row, length in enumerate(lengths):
        drawn = set(batch.targets_M[_rows_of(batch) == row].tolist())
        kept = [item for item in range(2, 2 + length) if item not in drawn]
        assert drawn
        assert kept
        assert batch.items_BL[row].tolist() == [PAD] * (11 - len(kept)) + kept


def test_all_drawn_targets_are_scored_at_the_last_position():
    batch = _sampled(torch.arange(2, 62).view(2, 30))
    assert set((batch.scored_M % 29).tolist()) == {28}
    assert batch.scored_M.tolist() == sorted(batch.scored_M.tolist())
    assert len(batch.scored_M) > 2


def test_kept_events_keep_their_own_context():
    items = torch.arange(2, 62).view(2, 30)
    batch = _sampled(items, context=items[..., None].expand(2, 30, 2))
    assert torch.equal(batch.context_BLF[..., 0], batch.items_BL)


def test_the_request_tells_what_all_targets_of_a_window_have_in_common():
    # The known field takes two values, so that targets agree in some windows and not in others.
    items = torch.arange(2, 14).expand(200, 12)
    context = ((items - 2) // 6 + 1)[..., None].expand(200, 12, 2)
    batch = _sampled(items, context=context, recency=1.0)  # two draws a window
    told = set()
    for row in range(200):
        codes = {(item - 2) // 6 + 1 for item in batch.targets_M[_rows_of(batch) == row].tolist()}
        expected = codes.pop() if len(codes) == 1 else 0
        assert batch.request_BLF[row, -1].tolist() == [expected, 0]
        told.add(expected)
    assert told == {0, 1, 2}


def test_earlier_positions_are_told_of_the_input_that_follows_as_in_serving():
    items = torch.arange(2, 62).view(2, 30)
    batch = _sampled(items, context=items[..., None].expand(2, 30, 2))
    assert torch.equal(batch.request_BLF[:, :-1, 0], batch.items_BL[:, 1:])
    assert not batch.request_BLF[..., 1].any()
    forgetful = _sampled(items, context=items[..., None].expand(2, 30, 2), context_dropout=1.0)
    assert not forgetful.request_BLF.any()


def test_the_request_has_a_time_where_one_target_was_drawn():
    items = torch.arange(2, 6).view(1, 4).repeat(50, 1)
    batch = _sampled(items, target_share=0.25)
    # Items 2, 3, 4 and 5 happened in the seconds 1, 2, 3 and 4; one of them is asked for.
    assert (batch.seconds_BL2[:, -1, 1] == batch.targets_M - 1).all()
    assert torch.equal(batch.seconds_BL2[..., 0], batch.items_BL - 1)
    several = _sampled(torch.arange(2, 32).view(1, 30))
    assert several.seconds_BL2[0, -1, 1] == 0


def test_the_same_seed_draws_the_same_targets():
    items = torch.arange(2, 62).view(2, 30)
    one, two = (_sampled(items, seed=5) for _ in range(2))
    assert one.targets_M.tolist() == two.targets_M.tolist()


def test_a_position_scored_twice_gathers_both_gradients():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 4, generator=generator, requires_grad=True)
    table, bias = torch.randn(9, 4, generator=generator), torch.zeros(9)

    def gradient(rows, targets):
        states.grad = None
        full_softmax(states[torch.tensor(rows)], table, bias, torch.tensor(targets)).backward()
        return states.grad

    together = gradient([0, 0, 1], [3, 5, 7])
    apart = [gradient([row], [target]) for row, target in ((0, 3), (0, 5), (1, 7))]
    torch.testing.assert_close(together, sum(apart) / 3)


def test_recency_sampling_counts_places_among_targets_alone():
    # Three purchases among views: one is drawn, the last with probability 1 / (1 + 0.5 + 0.25).
    items, context = _typed("vpvvvpvvpv")
    batch = _sampled(
        items.expand(20_000, 10),
        context=context.expand(20_000, 10, 2),
        recency=0.5,
        targets=_purchases(),
    )
    drawn, counts = batch.targets_M.unique(return_counts=True)
    assert drawn.tolist() == [3, 7, 10]
    expected = torch.tensor([1.0, 2.0, 4.0]) / 7
    torch.testing.assert_close(counts / 20_000, expected, rtol=0, atol=0.015)


_OBJECTIVES = [ObjectiveConfig(kind=k) for k in ("masked-item", "next-item", "recency-sampling")]


@pytest.mark.parametrize("objective", _OBJECTIVES, ids=lambda objective: objective.kind)
def test_only_targets_are_scored(objective):
    items, context = _typed(*["vpvvpvppvv", "..vvvvvvvp", "vvvvpvvvvv"] * 50)
    batch = _batch(objective, items, context, _purchases())
    purchased = set(items[context[..., 1] == 2].tolist())
    assert set(batch.targets_M.tolist()) <= purchased
    assert len(set((batch.scored_M // batch.items_BL.shape[1]).tolist())) == 150
    assert batch.weights_M is None


@pytest.mark.parametrize("objective", _OBJECTIVES, ids=lambda objective: objective.kind)
def test_a_window_without_a_target_scores_nothing(objective):
    items, context = _typed("vvvv", ".vvp", "..vv")
    batch = _batch(objective, items, context, _purchases())
    assert set((batch.scored_M // batch.items_BL.shape[1]).tolist()) == {1}
    assert MASK not in batch.items_BL[0].tolist()
    views = [torch.tensor(part[::2]) for part in (items.tolist(), context.tolist())]
    empty = _batch(objective, *views, _purchases())
    assert len(empty.scored_M) == len(empty.targets_M) == empty.weight == 0


@pytest.mark.parametrize("objective", _OBJECTIVES, ids=lambda objective: objective.kind)
def test_every_target_carries_the_weight_of_its_type(objective):
    items, context = _typed(*["vpvvpvppvv", "..vvvvvvvp"] * 20)
    targets = _purchases(view=0.5, purchase=3.0)
    batch = _batch(objective, items, context, targets)
    purchased = set(items[context[..., 1] == 2].tolist())
    expected = [3.0 if item in purchased else 0.5 for item in batch.targets_M.tolist()]
    assert batch.weights_M.tolist() == expected
    assert batch.weight.item() == sum(expected)
    assert len(set(expected)) == 2


def test_next_item_reads_all_events_and_scores_those_before_a_target():
    items, context = _typed(".vpvvp")
    objective = ObjectiveConfig(kind="next-item")
    batch = _batch(objective, items, context, _purchases())
    assert batch.items_BL.tolist() == [[PAD, 3, 4, 5, 6]]
    assert batch.scored_M.tolist() == [1, 4]
    assert batch.targets_M.tolist() == [4, 7]


def test_an_imitated_recommendation_ends_at_the_last_target():
    objective = ObjectiveConfig(last_prob=1.0, context_dropout=0.0)
    items, context = _typed("vvpv", ".pvv", "vvvp")
    batch = _batch(objective, items, context, _purchases())
    assert batch.items_BL.tolist() == [
        [PAD, 2, 3, MASK],
        [PAD, PAD, PAD, MASK],
        [10, 11, 12, MASK],
    ]
    assert batch.targets_M.tolist() == [4, 7, 13]
    assert batch.context_BLF[0].tolist() == [[0, 0], [1, 1], [1, 1], [2, 0]]
