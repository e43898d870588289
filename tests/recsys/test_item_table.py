"""Vectors of items: what ids and attributes add up to, and whose ids are hidden."""

import numpy as np
import pytest
import torch

from recsys.attributes import ItemCodes
from recsys.catalogue import MASK, NUM_SPECIAL, PAD
from recsys.item_table import AttributeBias, AttributedTable, ItemFeatures, ItemTable
from recsys.losses import LossConfig, compute_loss
from recsys.model import NextItemModel
from recsys.model_config import ModelConfig
from recsys.negatives import Negatives, NegativesConfig
from recsys.optimiser import Optimiser
from recsys.recipe import read_recipe

_COLD = 4


def make_features():
    """Items 2 (codes 1, 3), 3 (no code) and the cold 4 (codes 1, 2)."""
    codes = ItemCodes(
        np.array([1, 3, 1, 2], np.int32),
        np.array([0, 0, 0, 2, 2, 4], np.int32),
        np.array([0, 2], np.int64),
        num_codes=4,
    )
    return ItemFeatures(codes, np.array([0, 0, 7, 1, 0]))


def make_table():
    table = AttributedTable(5, 1, make_features())
    with torch.no_grad():
        table.weight.copy_(torch.tensor([[0.0], [5.0], [10.0], [20.0], [999.0]]))
        table.attributes.weight.copy_(torch.tensor([[0.5], [0.25], [2.0], [4.0]]))
    return table.eval()


def hide(features, share, seed=0):
    features.draw_hidden(share, torch.Generator().manual_seed(seed))


def make_model(separate_output=False, **changes):
    torch.manual_seed(0)
    config = ModelConfig(
        attention="causal",
        dim=8,
        num_layers=1,
        num_heads=1,
        max_len=4,
        dropout=0.0,
        separate_output=separate_output,
        **changes,
    )
    model = NextItemModel(config, 5, (), make_features())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def forward(model, items):
    items_BL = torch.as_tensor(items)
    empty = torch.zeros(*items_BL.shape, 0, dtype=torch.int64)
    return model(items_BL, empty, empty, torch.zeros(*items_BL.shape, 2, dtype=torch.int32))


def test_a_vector_is_that_of_the_id_plus_those_of_the_attributes():
    # Item 2: 10 + 0.25 + 4; item 3 has no attribute; the cold one: 0.25 + 2 without its 999.
    expected = [0.0, 5.0, 14.25, 20.0, 2.25]
    table = make_table()
    assert table.all().flatten().tolist() == expected
    assert table(torch.arange(5)).flatten().tolist() == expected


@pytest.mark.parametrize("shape", [(3, 4), (2, 1, 5), (0,)])
def test_looking_up_any_shape_agrees_with_the_whole_table(shape):
    table = AttributedTable(5, 3, make_features())
    items = torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(table(items), table.all()[items])


def test_lookups_and_the_whole_table_have_the_same_gradients():
    table = make_table()
    items = torch.tensor([2, 4, 4, 3])

    def gradients(vectors):
        table.zero_grad()
        (vectors * torch.arange(1.0, 5.0)[:, None]).sum().backward()
        return [parameter.grad.clone() for parameter in table.parameters()]

    for one, other in zip(gradients(table(items)), gradients(table.all()[items]), strict=True):
        torch.testing.assert_close(one, other)
    # The cold item passes its gradient, 2 + 3, on to its attributes alone.
    assert table.weight.grad[_COLD].item() == 0
    assert table.attributes.weight.grad.flatten().tolist() == [0, 6, 5, 1]


def test_id_dropout_hides_ids_of_items_but_never_padding_and_mask():
    features = make_features().train()
    hide(features, 0.999999)
    assert features.is_hidden_I.tolist() == [False, False, True, True, True]
    hide(features, 0.0)
    assert features.is_hidden_I.tolist() == [False, False, False, False, True]


def test_id_dropout_hides_the_configured_share_anew_each_step():
    codes = ItemCodes(np.zeros(0, np.int32), np.zeros(10_003, np.int32), np.zeros(0, np.int64), 1)
    features = ItemFeatures(codes, np.ones(10_002)).train()
    hide(features, 0.3, seed=1)
    first = features.is_hidden_I
    hide(features, 0.3, seed=2)
    assert 0.27 < first.float().mean() < 0.33
    assert not torch.equal(first, features.is_hidden_I)


def test_evaluation_hides_the_cold_alone():
    features = make_features().train()
    hide(features, 0.999999)
    assert features.eval().is_hidden_I.tolist() == [False] * 4 + [True]


def test_a_cold_item_is_no_worse_for_its_bias():
    bias = AttributeBias(make_features()).eval()
    item_bias_I = torch.tensor([0.0, 0.0, 3.0, 1.0, -50.0])
    with torch.no_grad():
        bias.attributes.copy_(torch.tensor([[0.0], [0.5], [0.25], [0.0]]))
    assert bias(item_bias_I).tolist() == [0.0, 0.0, 3.5, 1.0, 0.75]
    items = torch.tensor([[4, 2]])
    assert bias(item_bias_I[items], items).tolist() == [[0.75, 3.5]]


def test_cold_items_take_no_part_in_training():
    model = make_model().train()
    model.hide_ids(torch.Generator().manual_seed(0))
    hidden = torch.randn(2, 8, requires_grad=True)
    loss = compute_loss(LossConfig(), hidden, *model.output_rows(), torch.tensor([2, 3]), None)
    loss.backward()

    assert model.attribute_bias.attributes.grad.flatten()[2] == 0  # the cold item's own attribute
    scores = hidden.detach() @ model.items.all().T + model.output_bias_I
    expected = torch.nn.functional.cross_entropy(scores[:, [2, 3]], torch.tensor([0, 1]))
    torch.testing.assert_close(loss.detach(), expected.detach())


@pytest.mark.parametrize("kind", ["sampled-softmax", "bce", "gbce"])
def test_losses_that_gather_rows_agree_with_the_whole_table(kind):
    model = make_model(separate_output=True).train()
    config = LossConfig(kind=kind, negatives=NegativesConfig(num=2))
    negatives = Negatives(torch.tensor([[3, 4]]), torch.zeros(1, 2), group_size=2)
    hidden, targets = torch.randn(2, 8), torch.tensor([2, 3])
    whole = model.output_table_ID, model.output_bias_I

    gathered = compute_loss(config, hidden, *model.output_rows(), targets, negatives)

    torch.testing.assert_close(gathered, compute_loss(config, hidden, *whole, targets, negatives))


def test_gathering_never_computes_the_whole_table(monkeypatch):
    model = make_model().train()
    monkeypatch.setattr(AttributedTable, "all", lambda table: pytest.fail("all rows computed"))
    table_ID, bias_I = model.output_rows()
    assert table_ID[torch.tensor([2, 3])].shape == (2, 8)
    assert (len(table_ID), len(bias_I)) == (5, 5)


@pytest.mark.parametrize("kind", ["full-softmax", "sampled-softmax"])
def test_a_batch_without_a_scored_position_gives_zero_and_every_table_a_gradient(kind):
    model = make_model().train()
    negatives = Negatives(torch.tensor([[3]]), torch.zeros(1, 1), group_size=1)
    nothing = torch.zeros(0, dtype=torch.int64)
    hidden = torch.zeros(0, 8, requires_grad=True)
    rows = model.output_rows()
    loss = compute_loss(LossConfig(kind=kind), hidden, *rows, nothing, negatives)
    loss.backward()
    assert loss.item() == 0
    for parameter in model.items.parameters():
        assert not parameter.grad.any()


def test_what_is_cold_is_seen_in_histories_by_its_attributes():
    model = make_model().eval()
    before = forward(model, [[2, _COLD]])
    with torch.no_grad():
        model.items.weight[_COLD].normal_()
    torch.testing.assert_close(forward(model, [[2, _COLD]]), before)
    with torch.no_grad():
        model.items.attributes.weight[2].normal_()
    assert not torch.allclose(forward(model, [[2, _COLD]]), before)


@pytest.mark.parametrize("separate_output", [False, True])
def test_the_materialised_model_scores_the_same_from_plain_tables(separate_output):
    model = make_model(separate_output).train()
    plain = model.materialised()

    assert type(plain.items) is ItemTable
    assert set(plain.state_dict()) == set(plain_names(separate_output))
    torch.testing.assert_close(forward(plain, [[2, _COLD]]), forward(model, [[2, _COLD]]))
    hidden = torch.randn(3, 8)
    torch.testing.assert_close(plain.scores(hidden), model.scores(hidden))
    assert plain.materialised() is plain


def plain_names(separate_output):
    config = ModelConfig(
        attention="causal", dim=8, num_layers=1, max_len=4, separate_output=separate_output
    )
    return NextItemModel(config, 5, ()).state_dict()


def test_the_materialised_model_shares_nothing_with_its_origin():
    model = make_model()
    plain = model.materialised()
    expected = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_without_attributes_a_model_is_what_it_always_was():
    model = NextItemModel(ModelConfig(dim=8), 5, ())
    names = set(model.state_dict())
    assert {"items.weight", "item_bias"} <= names
    assert not [name for name in names if "attribute" in name or "unknown" in name]
    assert model.output_rows() == (model.items.weight, model.item_bias)
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    model.hide_ids(generator)
    assert torch.equal(generator.get_state(), state)


def test_codes_nobody_has_learned_mean_nothing():
    model = NextItemModel(ModelConfig(dim=8), 5, (), make_features())
    norms = model.items.attributes.weight.norm(dim=1)
    assert [bool(norm > 0) for norm in norms] == [False, True, False, True]
    assert not model.items.weight[PAD].any()
    assert model.items.weight[MASK].any()


def test_no_vector_of_an_item_or_attribute_decays():
    model = make_model()
    (part,) = Optimiser(model, read_recipe("sasrec-ce").optimiser).parts
    _, kept = part.param_groups
    kept_ids = {id(parameter) for parameter in kept["params"]}
    for module in (model.items, model.attribute_bias):
        assert {id(parameter) for parameter in module.parameters()} <= kept_ids


@pytest.mark.parametrize(
    ("recipe_name", "changes"),
    [("sasrec-ce", {}), ("esasrec", {}), ("sasrec-ce", {"separate_output": True})],
)
def test_training_ranks_a_cold_item_of_the_wanted_category_high(fashion, recipe_name, changes):
    model = fashion.train(recipe_name, **changes)

    cold = torch.arange(36, 40) + NUM_SPECIAL
    for category in range(4):
        history = torch.tensor([[category, category + 8, category + 16]]) + NUM_SPECIAL
        scores = model.scores(forward(model, history)[:, -1])[0]
        assert scores[cold].argmax() == category
        # Not held back either: it stands among the ten of its category.
        assert (scores > scores[cold[category]]).sum() < 10
