import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch

from recsys import export
from recsys.artifact import load_artifact
from recsys.encoders import LastState, OnnxEncoder, variant_file
from recsys.errors import ArtifactError
from recsys.export import export_onnx, export_variant, sample_inputs
from recsys.model import NextItemModel
from recsys.model_config import ModelConfig
from recsys.queries import Event, Query
from recsys.ranker import Ranker

MODEL_FILE = variant_file("fp32")


def parity(model, path, **options):
    return export.parity(model, OnnxEncoder(path, model.config.max_len), **options)


def make_model(attention, context_sizes=(3, 25, 32), **changes):
    torch.manual_seed(0)
    config = ModelConfig(
        attention=attention, dim=16, num_layers=1, num_heads=2, max_len=8, **changes
    )
    model = NextItemModel(config, 52, context_sizes).eval()
    with torch.no_grad():
        model.items.weight.normal_()
    return model


@pytest.fixture(scope="module")
def published(registry, tmp_path_factory):
    """Version v1 with its export."""
    folder = shutil.copytree(registry / "v1", tmp_path_factory.mktemp("export") / "v1")
    artifact = replace(load_artifact(registry / "v1"), path=folder)
    export_onnx(artifact.load_model(), folder / MODEL_FILE)
    return artifact


def test_export_is_one_file_that_agrees_with_its_model(published):
    result = parity(published.load_model(), published.path / MODEL_FILE, num_windows=17)

    assert [path.name for path in published.path.glob("*onnx*")] == [MODEL_FILE]
    assert result.overlap == 1.0
    assert result.max_difference < 1e-4


@pytest.mark.parametrize("num_windows", [1, 5])
def test_batch_and_window_may_have_any_size(published, num_windows):
    model = published.load_model()
    inputs = [x[:, -3:] for x in sample_inputs(model, num_windows=num_windows, seed=1)]

    hidden_BD = OnnxEncoder(published.path / MODEL_FILE, model.config.max_len)(*inputs)

    with torch.no_grad():
        torch.testing.assert_close(hidden_BD, LastState(model)(*inputs), atol=1e-5, rtol=1e-4)


def test_ranker_gives_the_same_lists_with_either_backend(published):
    queries = [Query((Event("i1"), Event("i2"), Event("i3"))), Query((Event("i4"),))]

    expected = Ranker(published, device="cpu").rank(queries)
    exported = Ranker(published, device="cpu", backend="onnx").rank(queries)

    for one, other in zip(expected, exported, strict=True):
        assert one.item_ids == other.item_ids
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-4)


def test_causal_export_agrees_with_its_model(tmp_path):
    model = make_model("causal")
    export_onnx(model, tmp_path / MODEL_FILE)

    assert parity(model, tmp_path / MODEL_FILE).overlap == 1.0


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_export_with_biases_agrees_with_its_model(tmp_path, attention):
    model = make_model(attention, relative_bias=True, time_bias=True)
    with torch.no_grad():
        for block in model.blocks:
            block.ages.weight.normal_()
    export_onnx(model, tmp_path / MODEL_FILE)

    assert parity(model, tmp_path / MODEL_FILE).overlap == 1.0


def test_export_of_vectors_made_of_attributes_is_one_gather(fashion_artifact, tmp_path):
    model = fashion_artifact.load_model()
    export_onnx(model, tmp_path / MODEL_FILE)

    result = parity(model, tmp_path / MODEL_FILE)

    assert result.overlap == 1.0
    assert result.max_difference < 1e-4
    graph = onnx.load(tmp_path / MODEL_FILE).graph
    shape = [model.items.num_embeddings, model.config.dim]
    (table,) = [weight.name for weight in graph.initializer if list(weight.dims) == shape]
    (reader,) = [node.op_type for node in graph.node if table in node.input]
    assert reader == "Gather"


@pytest.fixture(scope="module")
def coded(coded_artifact, tmp_path_factory):
    """The version with item codes and its export."""
    folder = shutil.copytree(coded_artifact.path, tmp_path_factory.mktemp("coded-export") / "v1")
    artifact = replace(coded_artifact, path=folder)
    export_onnx(artifact.load_model(), folder / MODEL_FILE)
    return artifact


def test_export_of_coded_items_holds_codes_instead_of_vectors(coded):
    model = coded.load_model()
    result = parity(model, coded.path / MODEL_FILE)

    assert result.overlap == 1.0
    assert result.max_difference < 1e-4
    weights = onnx.load(coded.path / MODEL_FILE).graph.initializer
    shapes = [list(weight.dims) for weight in weights]
    assert [len(model.item_bias), 4] in shapes
    assert [len(model.item_bias), model.config.dim] not in shapes


def test_ranker_gives_the_same_lists_of_coded_items_with_either_backend(coded):
    query = Query((Event("i1"), Event("i2"), Event("i3")))

    (expected,) = Ranker(coded, device="cpu").rank([query])
    (exported,) = Ranker(coded, device="cpu", backend="onnx").rank([query])

    assert expected.item_ids == exported.item_ids
    np.testing.assert_allclose(expected.scores, exported.scores, atol=1e-4)


@pytest.mark.slow
def test_export_of_a_model_without_context(tmp_path):
    model = make_model("bidirectional", context_sizes=())
    export_onnx(model, tmp_path / MODEL_FILE)

    assert parity(model, tmp_path / MODEL_FILE).overlap == 1.0


@pytest.mark.parametrize(
    ("variant", "overlap", "difference"), [("fp16", 0.98, 0.1), ("int8", 0.7, 2.0)]
)
def test_smaller_numbers_stay_near_the_model(published, tmp_path, variant, overlap, difference):
    model = published.load_model()
    shutil.copy(published.path / MODEL_FILE, tmp_path)
    path = export_variant(model, variant, tmp_path)

    result = parity(model, path)

    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([MODEL_FILE, path.name])
    assert overlap <= result.overlap
    assert 0 < result.max_difference < difference


@pytest.mark.parametrize("variant", ["fp32", "fp16", "int8"])
def test_large_weights_lie_in_a_second_file(tmp_path, monkeypatch, variant):
    monkeypatch.setattr(export, "_MAX_INLINE_BYTES", 0)
    model = make_model("bidirectional")
    for wanted in dict.fromkeys(("fp32", variant)):
        path = export_variant(model, wanted, tmp_path)

    assert (tmp_path / f"{path.name}.data").exists()
    assert parity(model, path).overlap > 0.7


def test_a_graph_does_not_loop_over_tokens(published):
    nodes = onnx.load(published.path / MODEL_FILE).graph.node

    assert "Loop" not in {node.op_type for node in nodes}


def test_other_weights_fail_the_parity(published):
    model = published.load_model()
    with torch.no_grad():
        model.positions.weight.normal_()

    assert parity(model, published.path / MODEL_FILE).overlap < 0.9


def test_missing_export_says_what_to_do(tmp_path):
    with pytest.raises(ArtifactError, match=r"model.onnx does not exist; publish .* or use torch"):
        OnnxEncoder(tmp_path / MODEL_FILE, max_len=8)
