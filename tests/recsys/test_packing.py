"""Batches without padding, with a plain attention in place of the kernel of a GPU."""

from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F

from recsys import model as model_module
from recsys import packing
from recsys.catalogue import PAD
from recsys.model_config import ModelConfig
from recsys.packing import Packed, attend_packed, can_pack, pack
from tests.recsys.test_trainer import make_trainer, weights_that_matter

_ITEMS = torch.tensor([[PAD, PAD, 5, 6], [PAD, PAD, PAD, 7], [2, 3, 4, 5], [PAD] * 4])


def reference_attention(q, k, v, bounds, bounds_k, max_q, max_k, *, window_size):
    """What `varlen_attn` computes, window by window."""
    assert torch.equal(bounds, bounds_k)
    assert bounds.dtype == torch.int32
    assert bounds[-1] == len(q)
    lengths = bounds.diff().tolist()
    assert max(lengths) <= max_q == max_k
    parts = [tensor.transpose(0, 1).split(lengths, dim=1) for tensor in (q, k, v)]
    mixed = [
        F.scaled_dot_product_attention(*part, is_causal=window_size == (-1, 0))
        for part in zip(*parts, strict=True)
        if part[0].shape[1]
    ]
    return torch.cat(mixed, dim=1).transpose(0, 1)


@pytest.fixture
def packs(monkeypatch):
    """Batches are packed on the CPU, too."""
    monkeypatch.setattr(packing, "_find_kernel", lambda: reference_attention)
    monkeypatch.setattr(model_module, "can_pack", lambda *_: True)


def test_tokens_are_those_that_are_no_padding():
    packed, places_M = pack(_ITEMS, torch.tensor([3, 7, 8, 11]), is_causal=True)
    assert packed.rows_T.tolist() == [2, 3, 7, 8, 9, 10, 11]
    # The last window has no token.
    assert packed.bounds_B1.tolist() == [0, 2, 3, 7, 7]
    assert packed.bounds_B1.dtype == torch.int32
    assert (packed.max_len, packed.is_causal) == (4, True)
    # Positions 3, 7, 8 and 11 of the batch.
    assert places_M.tolist() == [1, 2, 3, 6]


def test_scored_positions_of_padding_alone_are_kept():
    packed, places_M = pack(_ITEMS, torch.tensor([3, 15]), is_causal=False)
    assert packed.rows_T.tolist() == [2, 3, 7, 8, 9, 10, 11, 15]
    assert packed.bounds_B1.tolist() == [0, 2, 3, 7, 8]
    assert places_M.tolist() == [1, 7]


def test_a_position_that_is_scored_twice_is_one_token():
    packed, places_M = pack(_ITEMS, torch.tensor([11, 11, 3]), is_causal=False)
    assert len(packed.rows_T) == 7
    assert places_M.tolist() == [6, 6, 1]


def test_packed_states_go_back_to_where_they_were():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (20,), generator=generator)
    items_BL = torch.arange(8) >= 8 - lengths[:, None]
    states_BLD = torch.randn(20, 8, 3, generator=generator) * items_BL[..., None]
    scored_M = items_BL.flatten().nonzero().squeeze(1)[::3]
    packed, places_M = pack(items_BL.long(), scored_M, is_causal=False)
    packed_TD = states_BLD.flatten(0, 1)[packed.rows_T]
    assert len(packed_TD) == lengths.sum() == packed.bounds_B1[-1]
    assert torch.equal(packed_TD[places_M], states_BLD.flatten(0, 1)[scored_M])
    unpacked = torch.zeros(160, 3).index_copy(0, packed.rows_T, packed_TD)
    assert torch.equal(unpacked.view(20, 8, 3), states_BLD)


@pytest.mark.parametrize(("is_causal", "window"), [(True, (-1, 0)), (False, (-1, -1))])
def test_the_kernel_is_told_the_bounds_and_the_direction(monkeypatch, is_causal, window):
    kernel = Mock()
    monkeypatch.setattr(packing, "_find_kernel", lambda: kernel)
    q, k, v = torch.randn(3, 7, 2, 8)
    packed = Packed(torch.arange(7), torch.tensor([0, 3, 7], dtype=torch.int32), 5, is_causal)
    attend_packed(q, k, v, packed)
    bounds = packed.bounds_B1
    kernel.assert_called_once_with(q, k, v, bounds, bounds, 5, 5, window_size=window)


def test_a_cpu_keeps_its_padding():
    x_BLD = torch.zeros(2, 4, 64, dtype=torch.bfloat16)
    assert not can_pack(ModelConfig(), x_BLD)


def _on_a_gpu(monkeypatch, dtype, capability=(9, 0)):
    """States as `can_pack` sees them on a GPU of this capability."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)

    class States:
        is_cuda, device = True, None

    States.dtype = dtype
    return States


@pytest.mark.parametrize(
    ("config", "dtype", "capability", "expected"),
    [
        ({}, torch.bfloat16, (9, 0), True),
        ({}, torch.float16, (8, 0), True),
        ({}, torch.float32, (9, 0), False),
        ({}, torch.bfloat16, (7, 5), False),
        ({"relative_bias": True}, torch.bfloat16, (9, 0), False),
        ({"time_bias": True}, torch.bfloat16, (9, 0), False),
        ({"dim": 24, "num_heads": 2}, torch.bfloat16, (9, 0), False),
        ({"dim": 1024, "num_heads": 2}, torch.bfloat16, (9, 0), False),
    ],
)
def test_what_the_kernel_does_not_take_stays_padded(
    monkeypatch, config, dtype, capability, expected
):
    states = _on_a_gpu(monkeypatch, dtype, capability)
    assert can_pack(ModelConfig(**config), states) is expected


@pytest.mark.parametrize("recipe", ["bert4rec", "sasrec-ce", "gsasrec", "esasrec", "rss"])
def test_a_packed_model_learns_what_a_padded_one_learns(recipe, request):
    # Windows of many lengths: of long histories the older parts are shorter.
    padded = make_trainer(recipe, overrides={"model": {"max_len": 7}}, max_epochs=9)
    expected = [padded.train_epoch().loss for _ in range(2)]
    request.getfixturevalue("packs")
    packed = make_trainer(recipe, overrides={"model": {"max_len": 7}}, max_epochs=9)
    assert [packed.train_epoch().loss for _ in range(2)] == pytest.approx(expected, rel=1e-4)
    weights = weights_that_matter(padded)
    for name, weight in weights_that_matter(packed).items():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=2e-3)
