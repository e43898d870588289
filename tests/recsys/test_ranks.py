"""Training on several ranks, each a process of its own, over gloo."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from recsys import precision
from recsys.attributes import ItemCodes
from recsys.catalogue import NUM_SPECIAL
from recsys.item_table import ItemFeatures
from recsys.ranks import agree_on, gather_lists, gather_rows, sum_over_ranks
from tests.recsys.processes import join_ranks, leave_ranks
from tests.recsys.test_trainer import (
    NUM_ROWS,
    cycles,
    make_trainer,
    weights_that_matter,
    with_purchases,
)


@dataclass(frozen=True)
class Case:
    """A training that is shared, and by how much its weights may differ. Two epochs at a rate of
    5e-3 move a weight by some 0.05, other masks by as much; the order of sums by 1e-5.
    """

    recipe: str
    overrides: dict[str, Any] = field(default_factory=dict)
    weights_atol: float = 1e-4
    losses_rtol: float = 1e-5
    precision: str = "fp32"
    has_attributes: bool = False
    reads_context: bool = False


_TOUCHED = {"learning_rate": 5e-3, "item_rows": "touched"}
_UNSEEN = {"loss": {"exclude_seen": True}}
_MIXED = {"source": "mixed", "num": 5, "group_size": None}
_MASKS = {"objective": {"random_share": 0.1, "kept_share": 0.1}}
_CASES = {
    "bert4rec": Case("bert4rec", _MASKS),
    # Weights are rounded to three digits before they are multiplied.
    "bert4rec in bf16": Case("bert4rec", _MASKS, 2e-2, 2e-3, precision="bf16"),
    "bert4rec with attributes": Case("bert4rec", _MASKS, has_attributes=True),
    "bert4rec with context": Case("bert4rec", _MASKS, reads_context=True),
    "sasrec-ce": Case("sasrec-ce"),
    "sasrec-ce by codes": Case("sasrec-ce", {"model": {"item_codes": {"length": 8}}}),
    "rss": Case("rss"),
    "gsasrec": Case("gsasrec", {"loss": {"negatives": {"num": 5, "group_size": 7}}}),
    "gsasrec, touched rows": Case(
        "gsasrec",
        {"loss": {"negatives": {"num": 5, "group_size": 7}}, "optimiser": _TOUCHED},
    ),
    "sasrec": Case("sasrec", {"optimiser": _TOUCHED}),
    "esasrec": Case("esasrec", {"loss": {"negatives": _MIXED}}),
    "esasrec, touched rows with attributes": Case(
        "esasrec",
        {"loss": {"negatives": _MIXED}, "optimiser": _TOUCHED},
        has_attributes=True,
    ),
    "time-aware": Case("time-aware", weights_atol=2e-3),
    "sasrec-ce without what was seen": Case("sasrec-ce", _UNSEEN),
    "gsasrec without what was seen": Case(
        "gsasrec", {"loss": {"negatives": {"num": 5, "group_size": 7}, "exclude_seen": True}}
    ),
}
_IN_PARTS = ("bert4rec", "sasrec", "esasrec", "gsasrec without what was seen")


def train(name, micro_batches=1):
    case = _CASES[name]
    store = cycles()
    if case.reads_context:
        store = with_purchases(store)
    if case.recipe == "time-aware":
        store = replace(store, timestamps_T=3_600_000_000 * np.arange(1, store.num_tokens + 1))
    # 14 windows a batch: three ranks have parts of different sizes.
    trainer = make_trainer(
        case.recipe,
        store=store,
        max_epochs=2,
        batch_size=14,
        overrides=case.overrides,
        micro_batches=micro_batches,
        precision=case.precision,
        features=make_features() if case.has_attributes else None,
    )
    if "item_codes" in case.overrides.get("model", {}):
        codes_IC = np.random.default_rng(0).integers(0, 256, (NUM_ROWS, 8), np.uint8)
        trainer.model.load_codes(torch.from_numpy(codes_IC))
    losses = [trainer.train_epoch() for _ in range(2)]
    return {
        "losses": [report.loss for report in losses],
        "ndcg10": [report.ndcg10 for report in losses],
        "weights": weights_that_matter(trainer),
    }


def make_features():
    """Every item has one of three values of an attribute."""
    values = 1 + np.arange(NUM_ROWS - NUM_SPECIAL, dtype=np.int32) % 3
    offsets_I = np.maximum(np.arange(NUM_ROWS + 1) - NUM_SPECIAL, 0).astype(np.int32)
    codes = ItemCodes(values, offsets_I, np.zeros(1, np.int64), 4)
    return ItemFeatures(codes, np.ones(NUM_ROWS, np.int64))


def run_rank(rank, world_size, folder):
    join_ranks(folder, rank, world_size)
    own = torch.arange(rank + 1) + 10 * rank
    told = {
        "sums": sum_over_ranks([float(rank), 1.0], torch.device("cpu")),
        "rows": gather_rows(torch.full((2, 2), rank)).tolist(),
        "agreed": agree_on(lambda: own.float() + 5, torch.zeros(1), torch.device("cpu")).tolist(),
        "lists": gather_lists(own, [number + 1 for number in range(world_size)]).tolist(),
    }
    told |= {name: train(name) for name in _CASES}
    with pytest.MonkeyPatch.context() as patch:
        for name, slow in (("some", (1,)), ("none", ())):
            dtype = torch.float32 if rank in slow else torch.bfloat16
            patch.setattr(precision, "choose_dtype", lambda *_, dtype=dtype: dtype)
            trainer = make_trainer(precision="auto")
            told[f"{name} are slow in bf16"] = str(trainer.dtype)
    told |= {f"{name} in parts": train(name, micro_batches=2) for name in _IN_PARTS}
    leave_ranks(told, Path(folder) / f"{rank}.pt")


@pytest.fixture(scope="module")
def three_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(run_rank, args=(3, str(folder)), nprocs=3, join=True)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(3)]


def test_ranks_tell_each_other_sums_rows_and_lists(three_ranks):
    for told in three_ranks:
        assert told["sums"] == [3, 3]
        assert told["rows"] == [[0, 0], [0, 0], [1, 1], [1, 1], [2, 2], [2, 2]]
        assert told["agreed"] == [5]
        assert told["lists"] == [0, 10, 11, 20, 21, 22]


def test_bf16_is_taken_where_all_ranks_gain_by_it(three_ranks):
    for told in three_ranks:
        assert told["some are slow in bf16"] == "torch.float32"
        assert told["none are slow in bf16"] == "torch.bfloat16"


@pytest.mark.parametrize("name", _CASES)
def test_how_many_ranks_train_makes_no_difference(three_ranks, name):
    check_same(_CASES[name], train(name), [told[name] for told in three_ranks])


@pytest.mark.parametrize("name", _IN_PARTS)
def test_ranks_that_train_in_parts_make_no_difference(three_ranks, name):
    check_same(_CASES[name], train(name), [told[f"{name} in parts"] for told in three_ranks])


def check_same(case, alone, ranks):
    for together in ranks:
        assert together["losses"] == pytest.approx(alone["losses"], rel=case.losses_rtol)
        assert together["ndcg10"] == pytest.approx(alone["ndcg10"], abs=0.02)
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(
                together["weights"][name], weight, rtol=0, atol=case.weights_atol
            )
            assert torch.equal(together["weights"][name], ranks[0]["weights"][name])
