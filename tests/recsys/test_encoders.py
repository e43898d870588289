import logging
import shutil
from dataclasses import replace

import onnx
import onnxruntime
import pytest
import torch

from recsys.artifact import load_artifact
from recsys.encoders import LastState, OnnxEncoder, make_encoder, variant_file
from recsys.export import export_onnx, sample_inputs
from recsys.queries import Event, Query
from recsys.ranker import Ranker


@pytest.fixture(scope="module")
def published(registry, tmp_path_factory):
    """Version v1 with its export."""
    folder = shutil.copytree(registry / "v1", tmp_path_factory.mktemp("encoders") / "v1")
    artifact = replace(load_artifact(registry / "v1"), path=folder)
    export_onnx(artifact.load_model(), folder / variant_file("fp32"))
    return artifact


def test_the_last_state_is_that_of_the_whole_model(published):
    model = published.load_model()
    inputs = sample_inputs(model, num_windows=5, seed=0)

    with torch.no_grad():
        torch.testing.assert_close(LastState(model)(*inputs), model(*inputs)[:, -1])


@pytest.mark.parametrize("wanted", ["cuda", "tensorrt"])
def test_a_provider_that_is_not_there_gives_way_and_says_why(
    published, caplog, monkeypatch, wanted
):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with caplog.at_level(logging.WARNING):
        encoder = OnnxEncoder(published.path / variant_file("fp32"), 10, wanted)

    assert encoder.provider == "cpu"
    (message,) = caplog.messages
    assert message.startswith("The encoder runs on cpu: this build of ONNX Runtime has no ")


def test_an_older_export_of_one_length_is_padded(published, tmp_path):
    model = published.load_model()
    inputs = sample_inputs(model, num_windows=3, seed=2)
    path = tmp_path / "fixed.onnx"
    graph = onnx.load(published.path / variant_file("fp32"))
    for node in graph.graph.input:
        node.type.tensor_type.shape.dim[1].dim_value = model.config.max_len
    onnx.save(graph, path)
    short = [tensor[:, -4:] for tensor in inputs]

    with torch.no_grad():
        expected = LastState(model)(*short)

    found = OnnxEncoder(path, model.config.max_len)(*short)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_bf16_under_torch_is_near_the_model_which_keeps_its_weights(published):
    model = published.load_model()
    inputs = sample_inputs(model, num_windows=20, seed=1)
    options = {"backend": "torch", "provider": "cpu"}
    with torch.no_grad():
        expected = make_encoder(model, published.path, variant="fp32", **options)(*inputs)
        rounded = make_encoder(model, published.path, variant="bf16", **options)(*inputs)

    assert rounded.dtype == torch.float32
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    difference = (rounded - expected).abs().max()
    assert 0 < difference < 0.2


def test_a_variant_that_the_backend_lacks_names_those_it_has(published):
    with pytest.raises(ValueError, match="torch has no variant 'int8'; choose one of: fp32, bf16"):
        Ranker(published, device="cpu", variant="int8")


def test_a_ranker_says_what_it_is_made_of(published):
    ranker = Ranker(published, device="cpu", backend="onnx", table="bf16")

    assert (ranker.info.variant, ranker.info.provider, ranker.info.table) == ("fp32", "cpu", "bf16")


@pytest.mark.parametrize("backend", ["torch", "onnx"])
@pytest.mark.parametrize("table", ["fp16", "bf16"])
def test_half_a_table_hardly_moves_the_scores(published, backend, table):
    query = Query((Event("i1"), Event("i2")), k=40)
    (expected,) = Ranker(published, device="cpu").rank([query])

    (found,) = Ranker(published, device="cpu", backend=backend, table=table).rank([query])

    scores = dict(zip(found.item_ids, found.scores, strict=True))
    for item_id, score in zip(expected.item_ids, expected.scores, strict=True):
        assert scores[item_id] == pytest.approx(score, abs=0.15)


@pytest.mark.gpu
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_states_stay_on_the_device(published, provider):
    model = published.load_model().cuda()
    inputs = [tensor.cuda() for tensor in sample_inputs(model, num_windows=4, seed=3)]
    encoder = OnnxEncoder(published.path / variant_file("fp32"), model.config.max_len, provider)

    hidden_BD = encoder(*inputs)

    assert hidden_BD.is_cuda
    with torch.no_grad():
        torch.testing.assert_close(hidden_BD, LastState(model)(*inputs), atol=1e-2, rtol=1e-2)
