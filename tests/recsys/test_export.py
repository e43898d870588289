import pytest
import torch

from recsys.errors import ArtifactError
from recsys.export import LastState, OnnxEncoder, export_onnx, parity, sample_inputs
from recsys.model import ModelConfig, NextItemModel


def make_model(attention, context_sizes=(3, 25, 32)):
    torch.manual_seed(0)
    config = ModelConfig(attention=attention, dim=16, num_layers=1, num_heads=2, max_len=8)
    model = NextItemModel(config, 52, context_sizes).eval()
    with torch.no_grad():
        model.items.weight.normal_()
    return model


@pytest.fixture(scope="module", params=["bidirectional", "causal"])
def exported(request, tmp_path_factory):
    model = make_model(request.param)
    path = tmp_path_factory.mktemp("export") / "model.onnx"
    export_onnx(model, path)
    return model, path


def test_export_is_one_file_that_agrees_with_its_model(exported):
    model, path = exported

    result = parity(model, path, num_windows=17)

    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    assert result.overlap == 1.0
    assert result.max_difference < 1e-4


@pytest.mark.parametrize("num_windows", [1, 5])
def test_batch_and_window_may_have_any_size(exported, num_windows):
    model, path = exported
    inputs = [x[:, -3:] for x in sample_inputs(model, num_windows=num_windows, seed=1)]

    hidden_BD = OnnxEncoder(path, max_len=8)(*inputs)

    with torch.no_grad():
        torch.testing.assert_close(hidden_BD, LastState(model)(*inputs), atol=1e-5, rtol=1e-4)


def test_export_of_a_model_without_context(tmp_path):
    model = make_model("bidirectional", context_sizes=())
    export_onnx(model, tmp_path / "model.onnx")

    assert parity(model, tmp_path / "model.onnx").overlap == 1.0


def test_missing_export_says_what_to_do(tmp_path):
    with pytest.raises(ArtifactError, match=r"model.onnx does not exist; publish .* or use torch"):
        OnnxEncoder(tmp_path / "model.onnx", max_len=8)
