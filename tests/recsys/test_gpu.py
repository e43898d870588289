"""The same figures on a CUDA device as on the CPU."""

import numpy as np
import pytest
import torch

from recsys import model as model_module
from recsys.evaluation import rank_targets
from recsys.losses import full_softmax
from recsys.model import NextItemModel
from recsys.packing import can_pack
from recsys.recipe import read_recipe
from recsys.scorer import ModelScorer
from recsys.splits import leave_one_out
from recsys.trainer import Trainer, TrainerConfig

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def test_the_blocked_softmax_is_the_same_on_both_devices():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 16, generator=generator)
    table, bias = torch.randn(500, 16, generator=generator), torch.zeros(500)
    targets = torch.randint(2, 500, (64,), generator=generator)
    tensors = (hidden, table, bias, targets)
    on_gpu = full_softmax(*(tensor.to(CUDA) for tensor in tensors), block_size=10)
    torch.testing.assert_close(on_gpu.cpu(), full_softmax(*tensors), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recipe", ["bert4rec", "sasrec-ce", "esasrec"])
def test_packed_states_and_gradients_are_those_of_padded_ones(recipe, monkeypatch):
    chosen = read_recipe(recipe, {"model": {"dim": 64, "num_heads": 4, "dropout": 0.0}})
    torch.manual_seed(0)
    model = NextItemModel(chosen.model, 200, ()).to(CUDA).train()
    L, lengths_B = 50, torch.randint(1, 51, (32,))
    items_BL = torch.randint(2, 200, (32, L)) * (torch.arange(L) >= L - lengths_B[:, None])
    scored_M = (items_BL != 0).flatten().nonzero().squeeze(1)[::3]
    nothing = torch.zeros(32, L, 0, dtype=torch.int64), torch.zeros(32, L, 2, dtype=torch.int32)
    context, seconds = (tensor.to(CUDA) for tensor in nothing)
    batch = items_BL.to(CUDA), context, context, seconds, None, scored_M.to(CUDA)
    found = {}
    for name, dtype, packs in (
        ("exact", torch.float32, False),
        ("padded", torch.bfloat16, False),
        ("packed", torch.bfloat16, True),
    ):
        monkeypatch.setattr(model_module, "can_pack", can_pack if packs else lambda *_: False)
        model.zero_grad()
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            assert model_module.can_pack(model.config, model.positions.weight) is packs
            hidden_MD = model(*batch).float()
        (hidden_MD * torch.linspace(-1, 1, 64, device=CUDA)).sum().backward()
        grads = [parameter.grad for parameter in model.blocks.parameters()]
        found[name] = [hidden_MD.detach(), *grads]
    for exact, padded, packed in zip(*found.values(), strict=True):
        # Rounding to bf16 moves both away from fp32 by about as much.
        error = (padded - exact).abs().max() + 1e-3 * exact.abs().max()
        assert (packed - exact).abs().max() <= 3 * error


@pytest.mark.parametrize(
    "recipe", ["bert4rec", "sasrec-ce", "gsasrec", "esasrec", "rss", "time-aware"]
)
def test_a_model_trains_and_ranks_alike_on_both_devices(shop, recipe):
    chosen = read_recipe(recipe, {"model": {"dim": 32, "max_len": 16}, "batch_size": 16})
    known_F = shop.context.known_at_request_F
    model = NextItemModel(chosen.model, shop.catalogue.num_rows, shop.context.sizes)
    split = leave_one_out(shop.store.offsets_U)
    trainer = Trainer(
        chosen, TrainerConfig(max_epochs=3), model, shop.store, split, known_F, seed=0, device=CUDA
    )
    losses = [trainer.train_epoch().loss for _ in range(3)]
    assert losses[-1] < losses[0]

    users = np.flatnonzero(split.test_U >= 0)
    arguments = (shop.store, users, split.test_U[users])
    on_gpu = rank_targets(ModelScorer(trainer.model, known_F), *arguments).ranks_N
    on_cpu = rank_targets(ModelScorer(trainer.model.cpu(), known_F), *arguments).ranks_N
    assert np.abs(on_gpu - on_cpu).max() <= 1


def test_dropout_is_drawn_by_the_seed_of_the_training(shop, monkeypatch):
    chosen = read_recipe("bert4rec", {"model": {"dim": 32, "max_len": 16}, "batch_size": 16})
    split = leave_one_out(shop.store.offsets_U)

    def seeds_of_an_epoch(seed):
        model = NextItemModel(chosen.model, shop.catalogue.num_rows, shop.context.sizes)
        known_F = shop.context.known_at_request_F
        trainer = Trainer(
            chosen, TrainerConfig(), model, shop.store, split, known_F, seed=seed, device=CUDA
        )
        drawn = []
        with monkeypatch.context() as patch:
            patch.setattr(torch, "manual_seed", drawn.append)
            trainer.train_epoch()
        return drawn

    first = seeds_of_an_epoch(0)
    assert len(set(first)) == len(first) > 0
    assert first == seeds_of_an_epoch(0)
    assert not set(first) & set(seeds_of_an_epoch(1))
