"""Every path against a plain sort of all scores. Vectors of small integers make sums exact in any
order, so that ties are ties on every path.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys import retrieval, scan
from recsys.catalogue import NUM_SPECIAL
from recsys.item_codes import ItemCodesConfig
from recsys.item_table import RoundedTable
from recsys.model import NextItemModel
from recsys.model_config import ModelConfig
from recsys.retrieval import BlockRetriever, Wish, make_retriever, round_tables
from recsys.scan import ScanRetriever

NONE = np.empty(0, np.int64)
DIM = 8
ON_DEVICE = pytest.param("cuda", marks=pytest.mark.gpu)


def make_model(kind, num_items, seed=0, device="cpu"):
    """Vectors, or centroids, and biases of integers from -2 to 2."""
    torch.manual_seed(seed)
    codes = ItemCodesConfig(length=4, num_values=5) if kind == "codes" else None
    config = ModelConfig(dim=DIM, num_layers=1, num_heads=2, item_codes=codes)
    model = NextItemModel(config, num_items + NUM_SPECIAL, ()).eval()
    with torch.no_grad():
        values = model.items.centroids if codes else model.items.weight
        values.copy_(torch.randint(-2, 3, values.shape))
        model.item_bias.copy_(torch.randint(-2, 3, model.item_bias.shape))
    if not codes:
        round_tables(model, kind)
    return model.to(device)


def retrievers(model):
    """One that scans in ranges by two threads, and one that goes block by block."""
    return ScanRetriever(model, 2), BlockRetriever(model, max_scores=64)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Ranges, blocks and chunks so small that a few hundred items have several."""
    monkeypatch.setattr(scan, "_LEAST_RANGE", 16)
    monkeypatch.setattr(retrieval, "_LEAST_ROWS", 48)
    monkeypatch.setattr(retrieval, "_CHUNK", 4)


def expected_best(scores_I, wish):
    """Items and scores, by a sort of everything."""
    scores_I = scores_I.copy()
    scores_I[wish.hidden] = -np.inf
    if wish.blocked_I is not None:
        scores_I[wish.blocked_I.cpu().numpy()] = -np.inf
    order = np.argsort(-scores_I, kind="stable")[: wish.k]
    order = order[scores_I[order] > -np.inf]
    return order.tolist(), scores_I[order].tolist()


@st.composite
def wishes_of(draw, num_items):
    items = st.integers(0, num_items + NUM_SPECIAL - 1)
    share = draw(st.sampled_from([None, 0.0, 0.5, 0.97, 1.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    blocked = None if share is None else torch.rand(num_items + 2, generator=generator) < share
    hidden = np.array(draw(st.lists(items, max_size=30)), np.int64)
    return Wish(draw(st.sampled_from([1, 3, 10, 100, 1000])), hidden, blocked)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), kind=st.sampled_from(["fp32", "fp16", "bf16", "codes"]))
def test_lists_are_those_of_a_plain_sort(data, kind):
    num_items = data.draw(st.sampled_from([1, 7, 60, 333]))
    wishes = data.draw(st.lists(wishes_of(num_items), min_size=1, max_size=4))
    seed = data.draw(st.integers(0, 99))
    model = make_model(kind, num_items, seed)
    states = torch.randint(-3, 4, (len(wishes), DIM)).float()
    with torch.no_grad():
        scores_BI = model.scores(states).numpy()
    expected = [expected_best(row, wish) for row, wish in zip(scores_BI, wishes, strict=True)]

    for retriever in retrievers(model):
        found = retriever.by_product(states, wishes)

        assert [(best.items.tolist(), best.scores.tolist()) for best in found] == expected


@pytest.mark.parametrize("device", ["cpu", ON_DEVICE])
@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16", "codes"])
def test_cosines_are_those_of_the_vectors(kind, device):
    model = make_model(kind, 200, device=device)
    with torch.no_grad():
        # An item whose vector is zero has a cosine of zero with everything.
        vectors = model.output_table(torch.arange(202, device=device)).cpu()
        cosines = torch.nn.functional.cosine_similarity(vectors[[7, 9], None], vectors, dim=2)
    wishes = [Wish(5, np.array([7])), Wish(200, np.array([9]))]

    retriever = make_retriever(model, num_threads=2)
    for best, row, wish in zip(
        retriever.by_cosine(torch.tensor([7, 9], device=device), wishes),
        cosines,
        wishes,
        strict=True,
    ):
        _, expected = expected_best(np.r_[[-np.inf] * 2, row[2:]].astype(np.float32), wish)
        np.testing.assert_allclose(best.scores, expected, atol=1e-5)
        np.testing.assert_allclose(best.scores, row[best.items], atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16", "codes"])
def test_lists_of_a_gpu_are_those_of_a_cpu(kind):
    blocked = torch.arange(335) % 3 == 0
    wishes = [Wish(10, NONE), Wish(300, np.arange(50), blocked)]
    states = torch.randint(-3, 4, (2, DIM)).float()
    expected = ScanRetriever(make_model(kind, 333), 1).by_product(states, wishes)

    on_device = [Wish(10, NONE), Wish(300, np.arange(50), blocked.cuda())]
    model = make_model(kind, 333, device="cuda")
    found = make_retriever(model, 1).by_product(states.cuda(), on_device)

    for one, other in zip(found, expected, strict=True):
        assert one.items.tolist() == other.items.tolist()
        assert one.scores.tolist() == other.scores.tolist()


@pytest.mark.parametrize("kind", ["fp32", "codes"])
def test_minus_infinity_is_never_in_a_list(kind):
    model = make_model(kind, 20)
    with torch.no_grad():
        model.item_bias[5:] = float("-inf")

    for retriever in retrievers(model):
        (best,) = retriever.by_product(torch.ones(1, DIM), [Wish(10, NONE)])

        assert sorted(best.items.tolist()) == [2, 3, 4]


@pytest.mark.parametrize("kind", ["fp32", "codes"])
@pytest.mark.parametrize("nan", [float("nan"), -float("nan")])
def test_a_score_that_is_not_a_number_stands_first_unless_it_is_hidden(kind, nan):
    model = make_model(kind, 100)
    with torch.no_grad():
        model.item_bias[70] = nan

    for retriever in retrievers(model):
        broken, hidden = retriever.by_product(
            torch.ones(2, DIM), [Wish(3, NONE), Wish(3, np.array([70]))]
        )

        assert broken.items[0] == 70
        assert np.isnan(broken.scores[0])
        assert np.isfinite(hidden.scores).all()


def test_zero_and_minus_zero_are_a_tie():
    keys = retrieval._make_keys(torch.tensor([[-0.0, 0.0, -1.0]]), torch.arange(3))

    assert retrieval._read_keys(keys.topk(3).values)[1].tolist() == [[0, 1, 2]]


def test_the_number_of_threads_changes_nothing():
    model = make_model("fp32", 500)
    states, wish = torch.randn(1, DIM), Wish(20, NONE)

    (one,), (three,) = (ScanRetriever(model, n).by_product(states, [wish]) for n in (1, 3))

    assert one.items.tolist() == three.items.tolist()
    assert one.scores.tolist() == three.scores.tolist()


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_halves_are_read_as_what_they_are(kind):
    """Every finite value of the type, its smallest too, times one."""
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[kind]
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    values = values[values.isfinite()]
    model = make_model("fp32", len(values))
    with torch.no_grad():
        model.items.weight.zero_()
        model.item_bias.zero_()
        model.items.weight[2:, 0] = values.float()
    round_tables(model, kind)
    states = torch.eye(DIM)[:1]

    (best,) = ScanRetriever(model, 1).by_product(states, [Wish(len(values), NONE)])

    np.testing.assert_array_equal(best.scores, values.float().sort(descending=True).values.numpy())


def test_half_a_table_is_half_the_memory_and_still_read_in_fp32():
    model = make_model("fp32", 50)
    before = model.items.weight.nbytes

    round_tables(model, "bf16")

    assert isinstance(model.items, RoundedTable)
    assert model.items.weight.nbytes == before / 2
    assert model.items(torch.tensor([3])).dtype == torch.float32


def test_vectors_beyond_the_range_of_fp16_are_refused():
    model = make_model("fp32", 5)
    with torch.no_grad():
        model.items.weight[3, 0] = 1e6

    with pytest.raises(ValueError, match=r"reach 1e\+06, beyond the range of torch.float16"):
        round_tables(model, "fp16")
