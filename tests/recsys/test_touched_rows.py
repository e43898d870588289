"""Steps that update the rows they looked at and no other."""

import pytest
import torch
from pydantic import ValidationError

from recsys.catalogue import PAD
from recsys.recipe import read_recipe
from recsys.touched_rows import TouchedRows
from tests.recsys.test_trainer import make_trainer

_TOUCHED = {"learning_rate": 5e-3, "item_rows": "touched"}


def test_gradients_are_those_of_the_whole_table():
    table = torch.randn(9, 4, requires_grad=True)
    items = torch.tensor([[PAD, 3], [7, 3]])
    weights = torch.randn(2, 2, 4)
    (torch.nn.functional.embedding(items, table, padding_idx=PAD) * weights).sum().backward()

    touched = TouchedRows([table])
    touched.open(items)
    (touched.look_up(table, items) * weights).sum().backward()
    rows, (gradient,) = touched.close()
    assert rows.tolist() == [PAD, 3, 7]
    assert torch.equal(gradient, table.grad[rows])
    assert not gradient[0].any()


def test_tables_of_one_number_a_row_are_looked_up_too():
    bias = torch.arange(9.0)
    touched = TouchedRows([bias])
    touched.open(torch.tensor([4, 2]))
    assert touched.look_up(bias, torch.tensor([[2, 2], [4, 2]])).tolist() == [[2, 2], [4, 2]]


@pytest.mark.parametrize("recipe", ["sasrec", "gsasrec"])
def test_the_first_step_is_that_of_all_rows(recipe):
    loss = {"negatives": {"num": 3, "group_size": None}}
    (every, touched) = (
        make_trainer(
            recipe,
            overrides={"loss": loss, "optimiser": {"learning_rate": 5e-3, "item_rows": rows}},
            batch_size=4,
            max_epochs=2,
        )
        for rows in ("all", "touched")
    )
    before = touched.model.items.weight.clone()
    for trainer in (every, touched):
        trainer._train_step(next(iter(trainer._assembler.windows.batches(4, 0))))
    # The two divide by gradient and 1e-8 in another order: it shows where a gradient is tiny.
    for name, weight in every.model.state_dict().items():
        difference = (touched.model.state_dict()[name] - weight).abs()
        assert (difference > 1e-6).float().mean() < 0.05, name
        assert difference.max() < 1e-3, name
    is_changed = (touched.model.items.weight != before).any(1)
    assert is_changed.any()


def test_a_row_that_no_step_looks_at_stays_as_it_is():
    trainer = make_trainer("sasrec", overrides={"optimiser": _TOUCHED}, batch_size=2, max_epochs=9)
    before = [table.detach().clone() for table in trainer.model.item_parameters]
    places = next(iter(trainer._assembler.windows.batches(2, 0)))
    (piece,) = trainer._assembler.assemble(places, 0)
    is_seen = torch.zeros(len(before[0]), dtype=torch.bool)
    is_seen[torch.cat(piece.items)] = True
    trainer._train_step(places)
    assert 0 < is_seen.sum() < len(is_seen)
    for old, table in zip(before, trainer.model.item_parameters, strict=True):
        assert torch.equal(old[~is_seen], table[~is_seen])


def test_it_learns_as_all_rows_do():
    trainer = make_trainer("esasrec", overrides={"optimiser": _TOUCHED}, max_epochs=25)
    reports = [trainer.train_epoch() for _ in range(25)]
    assert reports[-1].ndcg10 > 0.9


def test_a_full_softmax_looks_at_every_item():
    with pytest.raises(ValidationError, match="a full softmax looks at every item"):
        read_recipe("sasrec-ce", {"optimiser": {"item_rows": "touched"}})
