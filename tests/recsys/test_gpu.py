"""The same figures on a CUDA device as on the CPU."""

import numpy as np
import pytest
import torch

from recsys import model as model_module
from recsys.blocks import Dropout
from recsys.evaluation import rank_targets
from recsys.losses import LossConfig, compute_loss, full_softmax
from recsys.model import NextItemModel
from recsys.negatives import Negatives
from recsys.packing import can_pack
from recsys.randomness import Draws
from recsys.recipe import read_recipe
from recsys.scorer import ModelScorer
from recsys.seen_items import SeenItems
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


@pytest.mark.parametrize("kind", ["full-softmax", "sampled-softmax", "gbce"])
def test_losses_without_seen_items_are_the_same_on_both_devices(kind):
    generator = torch.Generator().manual_seed(0)
    items = torch.randint(0, 500, (16, 20), generator=generator)
    scored = torch.randperm(16 * 20, generator=generator)[:64].sort().values
    negatives = torch.randint(2, 500, (7, 100), generator=generator)
    leaves = [torch.randn(shape, generator=generator) for shape in ((64, 16), (500, 16), (500,))]
    targets = torch.randint(2, 500, (64,), generator=generator)

    def loss_on(device):
        def there(tensor):
            return tensor.to(device)

        seen = SeenItems.of(there(items), there(scored), is_causal=True)
        drawn = Negatives(there(negatives), torch.zeros(7, 100, device=device), group_size=10)
        config = LossConfig(kind=kind, exclude_seen=True)
        return compute_loss(config, *map(there, leaves), there(targets), drawn, seen=seen).cpu()

    torch.testing.assert_close(loss_on(CUDA), loss_on("cpu"), rtol=1e-4, atol=1e-4)


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


def test_dropout_is_that_of_a_cpu():
    words = Draws(seed=3, step=5, rows_B=torch.arange(4)).noise(8)
    on_gpu = Draws(seed=3, step=5, rows_B=torch.arange(4, device=CUDA)).noise(8)
    dropout, ones = Dropout(0.3).train(), torch.ones(4, 8, 20)
    for _ in range(2):
        expected = dropout(ones, words)
        assert 0 < (expected == 0).float().mean() < 1
        assert torch.equal(dropout(ones.to(CUDA), on_gpu).cpu(), expected)


@pytest.mark.parametrize("recipe", ["bert4rec", "esasrec"])
def test_parts_of_a_batch_make_no_difference(shop, recipe):
    chosen = read_recipe(recipe, {"model": {"dim": 32, "max_len": 16}, "batch_size": 16})
    split, known_F = leave_one_out(shop.store.offsets_U), shop.context.known_at_request_F

    def loss_in(parts):
        torch.manual_seed(0)
        model = NextItemModel(chosen.model, shop.catalogue.num_rows, shop.context.sizes)
        config = TrainerConfig(micro_batches=parts, precision="fp32")
        return Trainer(
            chosen, config, model, shop.store, split, known_F, seed=0, device=CUDA
        ).train_epoch()

    assert loss_in(3).loss == pytest.approx(loss_in(1).loss, rel=1e-5)
