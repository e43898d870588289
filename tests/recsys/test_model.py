"""The encoder: what a position may see, and what padding must not change."""

import pytest
import torch
from pydantic import ValidationError

from recsys.catalogue import MASK, PAD
from recsys.model import ModelConfig, NextItemModel, append_request

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
    return items_BL, context_BLF * (items_BL != PAD)[..., None], torch.zeros_like(context_BLF)


@pytest.mark.parametrize("block", ["transformer", "ligr"])
@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_padding_changes_nothing(attention, block):
    model = _model(attention, block=block)
    short = model(*_inputs([[5, 6, 7]]))
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
    items_BL, context_BLF, _ = _inputs([[5, 6]])
    known_F = torch.tensor([True, True])
    states = [
        model(*append_request(model.config, items_BL, context_BLF, request_BF, known_F))[:, -1]
        for request_BF in (torch.tensor([[1, 1]]), torch.tensor([[2, 3]]))
    ]
    assert not torch.allclose(states[0], states[1])


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_no_request_carries_what_a_request_does_not_know(attention):
    items_BL, context_BLF, _ = _inputs([[5, 6, 7]])
    known_F = torch.tensor([True, False])
    _, context, request = append_request(
        ModelConfig(attention=attention), items_BL, context_BLF, torch.tensor([[2, 3]]), known_F
    )
    scored = context[0, -1] if attention == "bidirectional" else request[0, -1]
    assert scored.tolist() == [2, 0]
    assert not request[..., 1].any()


def test_padding_and_mask_are_never_recommended():
    model = _model()
    scores = model.scores(torch.randn(2, 16))
    assert torch.isinf(scores[:, [PAD, MASK]]).all()
    assert torch.isfinite(scores[:, 2:]).all()


def test_a_row_of_padding_alone_gives_no_nan():
    states = _model("causal")(*_inputs([[PAD, PAD], [5, 6]]))
    assert torch.isfinite(states).all()


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
