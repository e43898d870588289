"""Training on several ranks, each a process of its own, over gloo."""

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from recsys.ranks import gather_lists, gather_rows, sum_over_ranks
from tests.recsys.processes import join_ranks, leave_ranks
from tests.recsys.test_trainer import make_trainer, weights_that_matter

_CASES = {
    "bert4rec": {"objective": {"random_share": 0.1, "kept_share": 0.1}},
    "sasrec-ce": {},
    "rss": {},
    "gsasrec": {"loss": {"negatives": {"num": 5, "group_size": 7}}},
    "sasrec": {"optimiser": {"learning_rate": 5e-3, "item_rows": "touched"}},
    "esasrec": {"loss": {"negatives": {"source": "mixed", "num": 5, "group_size": None}}},
}
_IN_PARTS = ("bert4rec", "sasrec", "esasrec")


def train(recipe, micro_batches=1):
    # 14 windows a batch: three ranks have parts of different sizes.
    trainer = make_trainer(
        recipe,
        max_epochs=2,
        batch_size=14,
        overrides=_CASES[recipe],
        micro_batches=micro_batches,
    )
    losses = [trainer.train_epoch() for _ in range(2)]
    return {
        "losses": [report.loss for report in losses],
        "ndcg10": [report.ndcg10 for report in losses],
        "weights": weights_that_matter(trainer),
    }


def run_rank(rank, world_size, folder):
    join_ranks(folder, rank, world_size)
    own = torch.arange(rank + 1) + 10 * rank
    told = {
        "sums": sum_over_ranks([float(rank), 1.0], torch.device("cpu")),
        "rows": gather_rows(torch.full((2, 2), rank)).tolist(),
        "lists": gather_lists(own, [number + 1 for number in range(world_size)]).tolist(),
    }
    told |= {recipe: train(recipe) for recipe in _CASES}
    told |= {f"{recipe} in parts": train(recipe, micro_batches=2) for recipe in _IN_PARTS}
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
        assert told["lists"] == [0, 10, 11, 20, 21, 22]


@pytest.mark.parametrize("recipe", _CASES)
def test_how_many_ranks_train_makes_no_difference(three_ranks, recipe):
    check_same(train(recipe), [told[recipe] for told in three_ranks])


@pytest.mark.parametrize("recipe", _IN_PARTS)
def test_ranks_that_train_in_parts_make_no_difference(three_ranks, recipe):
    check_same(train(recipe), [told[f"{recipe} in parts"] for told in three_ranks])


def check_same(alone, ranks):
    for together in ranks:
        assert together["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert together["ndcg10"] == pytest.approx(alone["ndcg10"], abs=0.02)
        for name, weight in alone["weights"].items():
            # Two epochs at a rate of 5e-3 move a weight by some 0.05, other masks by as much; the
            # order of sums by 1e-5.
            torch.testing.assert_close(together["weights"][name], weight, rtol=0, atol=1e-4)
            assert torch.equal(together["weights"][name], ranks[0]["weights"][name])
