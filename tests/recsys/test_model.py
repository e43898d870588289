"""The encoder: what a position may see, and what padding must not change."""

import math

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from recsys.blocks import Dropout, attend, bucket_ages
from recsys.catalogue import MASK, PAD
from recsys.model import NextItemModel, Request, append_request
from recsys.model_config import ModelConfig
from recsys.randomness import Draws

_SIZES = (3, 4)


def _model(attention="bidirectional", **changes):
    torch.manual_seed(0)
    config = ModelConfig(
        attention=attention, dim=16, num_layers=2, num_heads=2, max_len=8, dropout=0.0, **changes
    )
    return NextItemModel(config, num_rows=20, context_sizes=_SIZES).eval()


def _inputs(items):
    items_BL = torch.tensor(items)
    context_BLF = torch.ones(*items_BL.shape, len(_SIZES), dtype=torch.int64)
    is_token_BL = items_BL != PAD
    # An hour between two events, and as long until the request.
    own_BL = is_token_BL * 3600 * torch.arange(1, items_BL.shape[1] + 1)
    seconds_BL2 = torch.stack([own_BL, is_token_BL * (own_BL + 3600)], dim=2)
    context_BLF = context_BLF * is_token_BL[..., None]
    return items_BL, context_BLF, torch.zeros_like(context_BLF), seconds_BL2


def _noise(num_rows, length, step=0):
    return Draws(0, step, torch.arange(num_rows)).noise(length)


def _request(codes, seconds=7200):
    return Request(torch.tensor([codes]), torch.tensor([seconds]))


@pytest.mark.parametrize(
    "changes", [{}, {"block": "ligr"}, {"relative_bias": True, "time_bias": True}]
)
@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_padding_changes_nothing(attention, changes):
    model = _model(attention, **changes)
    short = model(*(x[:, 2:] for x in _inputs([[PAD, PAD, 5, 6, 7]])))
    padded = model(*_inputs([[PAD, PAD, 5, 6, 7]]))
    torch.testing.assert_close(short, padded[:, 2:])


def test_a_causal_position_does_not_see_what_follows():
    model = _model("causal")
    one, other = model(*_inputs([[5, 6, 7]])), model(*_inputs([[5, 6, 9]]))
    torch.testing.assert_close(one[:, :2], other[:, :2])
    assert not torch.allclose(one[:, 2], other[:, 2])


def test_a_bidirectional_position_sees_both_sides():
    model = _model()
    one, other = model(*_inputs([[5, MASK, 7]])), model(*_inputs([[5, MASK, 9]]))
    assert not torch.allclose(one[:, 1], other[:, 1])


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_the_context_of_the_request_reaches_the_scored_position(attention):
    model = _model(attention)
    items_BL, context_BLF, _, seconds_BL2 = _inputs([[5, 6]])
    known_F = torch.tensor([True, True])
    history = items_BL, context_BLF, seconds_BL2[..., 0]
    states = [
        model(*append_request(model.config, *history, _request(codes), known_F))[:, -1]
        for codes in ([1, 1], [2, 3])
    ]
    assert not torch.allclose(states[0], states[1])


def test_an_unknown_context_adds_nothing_until_it_is_trained():
    model = _model("causal")
    for embedding in (model.context, model.request):
        # Code 0 of the second field is the row after the three of the first.
        rows = [bool(row.any()) for row in embedding.table.weight]
        assert rows == [False, True, True, False, True, True, True]
        codes = torch.tensor([[[0, 0], [0, 2], [1, 0]]])
        expected = [
            [0.0] * 16,
            embedding.table.weight[5].tolist(),
            embedding.table.weight[1].tolist(),
        ]
        assert embedding(codes)[0].tolist() == expected


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_no_request_carries_what_a_request_does_not_know(attention):
    items_BL, context_BLF, _, seconds_BL2 = _inputs([[5, 6, 7]])
    known_F = torch.tensor([True, False])
    history = items_BL, context_BLF, seconds_BL2[..., 0]
    _, context, request, _ = append_request(
        ModelConfig(attention=attention), *history, _request([2, 3]), known_F
    )
    scored = context[0, -1] if attention == "bidirectional" else request[0, -1]
    assert scored.tolist() == [2, 0]
    assert not request[..., 1].any()


def test_ages_count_in_steps_of_the_logarithm_apart_for_what_lies_ahead():
    asked, happened = torch.tensor([[1000, 0]]), torch.tensor([[1000, 990, 1002, 0]])
    # ln(10) / 0.301 = 7.6 and ln(2) / 0.301 = 2.3; row 0 where either time is unknown.
    assert bucket_ages(asked, happened).tolist() == [[[1, 8, 80 + 3, 0], [0, 0, 0, 0]]]


def test_ages_have_a_row_for_the_longest_time():
    rows = bucket_ages(torch.tensor([[2**31 - 1]]), torch.tensor([[1]]))
    assert rows.item() == int(math.log(2**31 - 2) / 0.301) + 1 < 80


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_a_relative_bias_chooses_whom_a_position_looks_at(attention):
    model = _model(attention, relative_bias=True)
    with torch.no_grad():
        for block in model.blocks:
            block.distances.weight[8] = 1e4  # one behind: seven are furthest ahead, then itself
    last, other, further = (
        model(*_inputs([items]))[:, -1] for items in ([5, 6, 7, 8], [5, 9, 7, 8], [9, 6, 7, 8])
    )
    # Two layers look back at two positions.
    assert not torch.allclose(last, other)
    torch.testing.assert_close(last, further)


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_time_bias_tells_a_late_request_from_an_early_one(attention):
    model = _model(attention, time_bias=True)
    with torch.no_grad():
        for block in model.blocks:
            block.ages.weight.normal_()
    items_BL, context_BLF, _, seconds_BL2 = _inputs([[5, 6, 7]])
    history = items_BL, context_BLF, seconds_BL2[..., 0]
    known_F = torch.tensor([True, True])
    soon, later, unknown = (
        model(*append_request(model.config, *history, _request([0, 0], seconds), known_F))[:, -1]
        for seconds in (10_900, 10**6, 0)
    )
    assert not torch.allclose(soon, later)
    assert not torch.allclose(soon, unknown)


def test_time_bias_does_not_depend_on_the_origin_of_times():
    model = _model("causal", time_bias=True)
    *inputs, seconds_BL2 = _inputs([[PAD, 5, 6]])
    moved_BL2 = torch.where(seconds_BL2 > 0, seconds_BL2 + 5000, 0)
    torch.testing.assert_close(model(*inputs, seconds_BL2), model(*inputs, moved_BL2))


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_a_model_without_time_bias_reads_no_times(attention):
    model = _model(attention)
    *inputs, seconds_BL2 = _inputs([[5, 6, 7]])
    torch.testing.assert_close(model(*inputs, seconds_BL2), model(*inputs, seconds_BL2 * 7))


def test_dropout_keeps_the_mean_and_drops_its_share():
    torch.manual_seed(0)
    dropped = Dropout(0.25)(torch.ones(1000, 10, 101), _noise(1000, 10))
    assert dropped.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=2e-3)


def test_dropout_does_nothing_when_the_model_serves():
    values = torch.randn(3, 3)
    assert Dropout(0.5).eval()(values, None) is values


@pytest.mark.parametrize("num_heads", [1, 2])
def test_attention_agrees_with_the_fused_one(num_heads):
    q, k, v = torch.randn(3, 2, num_heads, 5, 4).unbind()
    bias = torch.randn(2, 1, 5, 5)
    fused = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    torch.testing.assert_close(attend(q, k, v, bias), fused)


def test_padding_and_mask_are_never_recommended():
    model = _model()
    scores = model.scores(torch.randn(2, 16))
    assert torch.isinf(scores[:, [PAD, MASK]]).all()
    assert torch.isfinite(scores[:, 2:]).all()


def test_a_row_of_padding_alone_gives_no_nan():
    states = _model("causal")(*_inputs([[PAD, PAD], [5, 6]]))
    assert torch.isfinite(states).all()


def test_a_causal_state_knows_neither_times_nor_items_that_come_later():
    model = _model("causal", block="ligr", relative_bias=True, time_bias=True)
    with torch.no_grad():
        for block in model.blocks:
            block.ages.weight.normal_()
            block.distances.weight.normal_()
    items_BL, context_BLF, request_BLF, seconds_BL2 = _inputs([[5, 6, 7, 8]])
    before = model(items_BL, context_BLF, request_BLF, seconds_BL2)
    later_BL2 = seconds_BL2.clone()
    later_BL2[:, 2:] += 10**6
    items_BL = torch.tensor([[5, 6, 11, 12]])
    after = model(items_BL, context_BLF, request_BLF, later_BL2)
    assert torch.equal(before[:, :2], after[:, :2])
    assert not torch.allclose(before[:, 2:], after[:, 2:])
    # What the second position is asked, and when, it does know.
    later_BL2[:, 1, 1] += 10**6
    asked_later = model(items_BL, context_BLF, request_BLF, later_BL2)
    assert not torch.allclose(after[:, 1], asked_later[:, 1])


def test_a_gated_block_by_hand():
    """LiGR as in arXiv:2502.03417: gates read what is added to, the net is SwiGLU."""
    block = _model("causal", block="ligr").blocks[0]
    with torch.no_grad():
        for gate in (block.gate_attention, block.gate_mlp):
            gate.weight.normal_()
    x, mixed = torch.randn(3, 16), torch.randn(3, 16)

    def linear(layer, value):
        return value @ layer.weight.T + layer.bias

    gate = 1 / (1 + torch.exp(-linear(block.gate_attention, x)))
    y = x + gate * linear(block.project, mixed)
    mean, variance = y.mean(1, keepdim=True), y.var(1, keepdim=True, unbiased=False)
    wide = linear(block.widen, (y - mean) / torch.sqrt(variance + 1e-5))
    assert wide.shape[1] == 2 * 4 * 16
    swish = wide[:, :64] / (1 + torch.exp(-wide[:, :64])) * wide[:, 64:]
    gate = 1 / (1 + torch.exp(-linear(block.gate_mlp, y)))
    expected = y + gate * linear(block.narrow, swish)
    torch.testing.assert_close(block._add(x, mixed, None), expected)


@pytest.mark.parametrize("layer", ["attention", "mlp"])
@pytest.mark.parametrize("kind", ["transformer", "ligr"])
def test_what_a_layer_adds_does_not_depend_on_the_scale_of_what_it_reads(kind, layer):
    model = _model(block=kind)
    block, (items_BL, _, _, seconds_BL2) = model.blocks[0], _inputs([[5, 6, 7]])
    with torch.no_grad():
        (block.narrow if layer == "attention" else block.project).weight.zero_()
        for gate in (block.gate_attention, block.gate_mlp) if kind == "ligr" else ():
            gate.weight.zero_()
    x = 10 * torch.randn(1, 3, 16)
    added, of_more = (
        block(scaled, model._seen(items_BL, seconds_BL2), None) - scaled for scaled in (x, 7 * x)
    )
    assert added.abs().mean() > 0.01
    torch.testing.assert_close(of_more, added, atol=1e-4, rtol=1e-4)


def test_states_are_normed_before_they_are_compared_with_items():
    states = _model()(*_inputs([[5, 6, 7]]))
    torch.testing.assert_close(states.mean(2), torch.zeros(1, 3))
    torch.testing.assert_close(states.var(2, unbiased=False), torch.ones(1, 3), atol=1e-2, rtol=0)


def test_a_closed_gate_lets_nothing_through():
    model = _model("causal", block="ligr")
    items = _inputs([[5, 6, 7]])
    before = model(*items)
    with torch.no_grad():
        for block in model.blocks:
            for gate in (block.gate_attention, block.gate_mlp):
                gate.weight.zero_()
                gate.bias.fill_(-1e4)
    closed = model(*items)
    assert not torch.allclose(before, closed)
    # What is left is the embedding of each position by itself.
    torch.testing.assert_close(closed[:, :2], model(*_inputs([[5, 6, 9]]))[:, :2])
    alone = model(*_inputs([[PAD, PAD, 7]]))
    torch.testing.assert_close(closed[:, 2], alone[:, 2])


def test_separate_outputs_score_items_by_vectors_of_their_own():
    model = _model("causal", separate_output=True)
    hidden = torch.randn(2, 16)
    expected = hidden @ model.outputs.weight.T + model.item_bias
    torch.testing.assert_close(model.scores(hidden)[:, 2:], expected[:, 2:])
    assert not torch.equal(model.outputs.weight, model.items.weight)
    shared = _model()
    assert shared.output_table_ID is shared.items.weight


def test_a_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(ValidationError, match="dim 10 is not divisible by num_heads 4"):
        ModelConfig(dim=10, num_heads=4)


def test_items_can_be_scaled_by_the_root_of_the_width():
    plain, scaled = _model(), _model(scale_items=True)
    inputs = _inputs([[2, 3, 4]])
    assert not torch.allclose(plain(*inputs), scaled(*inputs))
    with torch.no_grad():
        scaled.items.weight /= 4  # the root of 16
    torch.testing.assert_close(plain(*inputs), scaled(*inputs))


def test_a_width_that_codes_do_not_divide_is_refused():
    with pytest.raises(ValidationError, match=r"dim 12 is not divisible by item_codes.length 8"):
        ModelConfig(dim=12, item_codes={"length": 8})


@pytest.mark.parametrize("block", ["transformer", "ligr"])
@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_states_of_some_positions_are_those_of_all(attention, block):
    torch.manual_seed(0)
    config = ModelConfig(attention=attention, block=block, dim=16, max_len=8, dropout=0.3)
    model = NextItemModel(config, num_rows=20, context_sizes=_SIZES).train()
    inputs, rows = _inputs([[PAD, 2, 3, 4], [5, 6, 7, 8]]), torch.tensor([1, 6, 6, 7])
    every = model(*inputs, _noise(2, 4)).flatten(0, 1)[rows]
    some = model(*inputs, _noise(2, 4), rows)
    torch.testing.assert_close(some, every)
    assert not torch.allclose(some, model(*inputs, _noise(2, 4, step=1), rows))
