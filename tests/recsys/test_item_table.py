"""Vectors of items: what ids and attributes add up to, whose ids are hidden, and what codes put
together.
"""

import numpy as np
import pytest
import torch

from recsys import item_table
from recsys.attributes import ItemCodes
from recsys.catalogue import MASK, NUM_SPECIAL, PAD
from recsys.item_codes import ItemCodesConfig
from recsys.item_table import (
    AttributeBias,
    AttributedCodedTable,
    AttributedTable,
    CodedTable,
    ItemFeatures,
    ItemTable,
)
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


def test_each_training_step_hides_the_ids_of_others(fashion, monkeypatch):
    steps, look_up = [], AttributedTable.forward

    def note(table, items):
        if table.training:
            steps.append(table.features.is_hidden_I)
        return look_up(table, items)

    monkeypatch.setattr(AttributedTable, "forward", note)
    fashion.train(id_dropout=0.2)

    trained = torch.arange(36) + NUM_SPECIAL
    hidden = torch.stack(steps)[:, trained]
    assert hidden.float().mean().item() == pytest.approx(0.2, abs=0.04)
    assert hidden.any(0).all()


def make_coded_table(num_rows=5, dim=2, length=2, num_values=2):
    torch.manual_seed(0)
    table = CodedTable(num_rows, dim, ItemCodesConfig(length=length, num_values=num_values))
    torch.nn.init.normal_(table.centroids)
    return table


def make_coded_model(features=None, separate_output=False):
    torch.manual_seed(0)
    config = ModelConfig(
        attention="causal",
        dim=8,
        num_layers=1,
        num_heads=1,
        max_len=4,
        dropout=0.0,
        separate_output=separate_output,
        item_codes=ItemCodesConfig(length=4, num_values=3),
    )
    model = NextItemModel(config, 5, (), features)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def put_together(table):
    """The whole table item by item and code by code, `[I, D]`, as a leaf with a gradient."""
    rows = [
        torch.cat([table.centroids[place, code] for place, code in enumerate(codes.tolist())])
        for codes in table.codes
    ]
    rows[PAD] = torch.zeros_like(rows[PAD])
    return torch.stack(rows).detach().requires_grad_()


def gradient_of_centroids(table, gradient_ID):
    """What the gradient of a whole table means for the centroids, added up item by item."""
    gradient_CVE = torch.zeros_like(table.centroids)
    width = table.centroids.shape[2]
    for item, codes in enumerate(table.codes.tolist()):
        for place, code in enumerate(codes):
            part = gradient_ID[item, place * width : (place + 1) * width]
            gradient_CVE[place, code] += part if item != PAD else 0
    return gradient_CVE


def test_a_coded_vector_is_the_chosen_centroids_side_by_side():
    table = make_coded_table(num_rows=4)
    table.codes.copy_(torch.tensor([[1, 1], [0, 0], [0, 1], [1, 0]]))
    with torch.no_grad():
        table.centroids.copy_(torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]))
    expected = [[0.0, 0.0], [1.0, 3.0], [1.0, 4.0], [2.0, 3.0]]  # padding is nothing
    assert table.all().tolist() == expected
    assert table(torch.arange(4)).tolist() == expected
    assert table(torch.tensor([[3, PAD]])).tolist() == [[[2.0, 3.0], [0.0, 0.0]]]


@pytest.mark.parametrize("shape", [(3, 4), (2, 1, 5), (0,)])
def test_looking_up_any_shape_by_codes_agrees_with_the_whole_table(shape):
    table = make_coded_table(dim=6)
    items = torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(table(items), put_together(table)[items])


@pytest.mark.parametrize("num_states", [0, 1, 3, 33, 70])
def test_products_by_codes_are_those_of_the_whole_table(num_states, monkeypatch):
    monkeypatch.setattr(item_table, "_ROWS_PER_BLOCK", 7)
    table = make_coded_table(num_rows=30, dim=12, length=3, num_values=5)
    hidden = torch.randn(num_states, 12)
    torch.testing.assert_close(table.products(hidden), hidden @ put_together(table).T)


def test_products_of_rounded_states_are_added_up_in_full():
    table = make_coded_table(num_rows=30, dim=12, length=3, num_values=5)
    hidden = torch.randn(2, 12).bfloat16()
    products = table.products(hidden)
    assert products.dtype == torch.float32
    torch.testing.assert_close(products, hidden.float() @ put_together(table).T)


@pytest.mark.parametrize("kind", ["full-softmax", "sampled-softmax", "gbce"])
def test_gradients_reach_the_centroids_as_a_whole_table_would_pass_them_on(kind):
    table, bias = make_coded_table(num_rows=9, dim=4, num_values=3), torch.zeros(9)
    negatives = Negatives(torch.tensor([[3, 8, 8]]), torch.zeros(1, 3), group_size=4)
    hidden, targets = torch.randn(2, 4), torch.tensor([2, 5])
    whole = put_together(table)

    compute_loss(LossConfig(kind=kind), hidden, whole, bias, targets, negatives).backward()
    rows = item_table.Rows(lambda items: table.all() if items is None else table(items), 9)
    compute_loss(LossConfig(kind=kind), hidden, rows, bias, targets, negatives).backward()

    torch.testing.assert_close(table.centroids.grad, gradient_of_centroids(table, whole.grad))
    assert [name for name, _ in table.named_parameters()] == ["centroids"]


def test_products_pass_on_the_gradient_of_a_whole_table():
    table = make_coded_table(num_rows=9, dim=4, num_values=3)
    hidden, whole = torch.randn(3, 4), put_together(table)
    weights = torch.randn(3, 9)
    (table.products(hidden) * weights).sum().backward()
    (hidden @ whole.T * weights).sum().backward()
    torch.testing.assert_close(table.centroids.grad, gradient_of_centroids(table, whole.grad))


def test_sampled_losses_never_put_the_whole_coded_table_together(monkeypatch):
    model = make_coded_model().train()
    monkeypatch.setattr(CodedTable, "all", lambda table: pytest.fail("all rows put together"))
    vectors, bias = model.output_rows()
    assert vectors[torch.tensor([[2, 3]])].shape == (1, 2, 8)
    assert (len(vectors), bias) == (5, model.item_bias)


def test_a_full_softmax_puts_the_coded_table_together_once(monkeypatch):
    model, calls = make_coded_model().train(), []
    whole = CodedTable.all
    monkeypatch.setattr(CodedTable, "all", lambda table: calls.append(1) or whole(table))
    hidden = torch.randn(6, 8)
    config = LossConfig(block_size=2)
    compute_loss(config, hidden, *model.output_rows(), torch.tensor([2, 3, 4, 2, 3, 4]), None)
    assert len(calls) == 1


@pytest.mark.parametrize("separate_output", [False, True])
def test_a_coded_model_scores_as_one_with_the_whole_table(separate_output):
    model = make_coded_model(separate_output=separate_output).eval()
    hidden = torch.randn(3, 8)
    expected = hidden @ put_together(model.output_table).T + model.item_bias
    torch.testing.assert_close(model.scores(hidden)[:, NUM_SPECIAL:], expected[:, NUM_SPECIAL:])
    assert model.scores(hidden)[:, :NUM_SPECIAL].isneginf().all()
    assert model.materialised() is model


def test_separate_outputs_share_codes_and_have_centroids_of_their_own():
    model = make_coded_model(separate_output=True)
    assert torch.equal(model.items.codes, model.outputs.codes)
    assert not torch.equal(model.items.centroids, model.outputs.centroids)
    model.load_codes(torch.full((5, 4), 2, dtype=torch.uint8))
    assert model.items.codes.unique() == model.outputs.codes.unique() == 2


def test_codes_are_part_of_the_weights_and_bring_the_table_back():
    model, other = make_coded_model(), make_coded_model()
    other.load_codes(torch.zeros(5, 4, dtype=torch.uint8))
    assert not torch.equal(other.output_table_ID, model.output_table_ID)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.output_table_ID, model.output_table_ID)


def test_codes_mean_something_once_they_were_loaded():
    model, weights = make_coded_model(), make_coded_model().state_dict()
    assert model.lacks_codes
    del weights["items.codes"]
    model.load_state_dict(weights, strict=False)
    assert model.lacks_codes
    with pytest.raises(RuntimeError, match=r"items\.codes"):
        model.load_state_dict(weights)
    model.load_state_dict(make_coded_model().state_dict())
    assert not model.lacks_codes


def test_a_coded_table_is_as_small_as_its_centroids_and_a_byte_a_code():
    table = CodedTable(100_000, 64, ItemCodesConfig())
    assert sum(parameter.numel() for parameter in table.parameters()) == 256 * 64
    size_bytes = sum(tensor.nbytes for tensor in table.state_dict().values())
    assert size_bytes == 256 * 64 * 4 + 100_000 * 8  # a table in full: 25,600,000


def test_codes_and_attributes_add_up():
    model = make_coded_model(make_features()).eval()
    table = model.items
    assert type(table) is AttributedCodedTable
    ids = CodedTable.forward(table, torch.arange(5)).detach()
    ids[_COLD] = 0  # nobody has learned what its id means
    attributes = model.items.attributes.weight
    added = torch.zeros(5, 8)
    added[2], added[_COLD] = attributes[1] + attributes[3], attributes[1] + attributes[2]
    torch.testing.assert_close(table.all(), ids + added)
    torch.testing.assert_close(table(torch.tensor([4, 2])), (ids + added)[[4, 2]])


@pytest.mark.parametrize("separate_output", [False, True])
def test_the_materialised_model_of_codes_and_attributes_scores_the_same(separate_output):
    model = make_coded_model(make_features(), separate_output).eval()
    plain = model.materialised()
    assert type(plain.items) is ItemTable
    torch.testing.assert_close(forward(plain, [[2, _COLD]]), forward(model, [[2, _COLD]]))
    hidden = torch.randn(3, 8)
    torch.testing.assert_close(plain.scores(hidden), model.scores(hidden))


def test_no_centroid_decays():
    model = make_coded_model()
    (part,) = Optimiser(model, read_recipe("sasrec-ce").optimiser).parts
    _, kept = part.param_groups
    assert any(parameter is model.items.centroids for parameter in kept["params"])


def test_centroids_begin_as_vectors_of_their_own_do():
    config = ModelConfig(dim=64, item_codes=ItemCodesConfig())
    torch.manual_seed(0)
    model = NextItemModel(config, 5000, ())
    assert model.items.centroids.std().item() == pytest.approx(0.02, rel=0.03)
