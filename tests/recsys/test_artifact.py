import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from recsys.artifact import MANIFEST, load_artifact, publish
from recsys.attributes import NO_ATTRIBUTES
from recsys.errors import ArtifactError


@pytest.fixture
def copy(registry, tmp_path):
    """A copy of version v1 that a test may damage."""
    return shutil.copytree(registry / "v1", tmp_path / "v1")


def test_published_version_comes_back_whole(registry, shop):
    artifact = load_artifact(registry / "v1")

    assert artifact.version == "v1"
    assert artifact.manifest["seed"] == 1
    assert artifact.catalogue.table.equals(shop.catalogue.table)
    assert artifact.context == shop.context
    assert artifact.metrics() == {}
    assert not artifact.load_model().training


def test_same_version_gives_the_same_weights(registry):
    first, second = (load_artifact(registry / "v1").load_model() for _ in range(2))

    for name, weights in first.state_dict().items():
        assert torch.equal(weights, second.state_dict()[name])


def test_version_is_never_overwritten(registry):
    with pytest.raises(ArtifactError, match="Version v1 exists already"):
        publish(registry, "v1", lambda folder: None, {})


def test_failed_publication_leaves_nothing(tmp_path):
    def write(folder):
        (folder / "config.json").write_text("{}")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="disk is full"):
        publish(tmp_path, "v1", write, {})

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["model.safetensors", "fallback/popular.parquet"])
def test_altered_file_is_named(copy, name):
    with (copy / name).open("ab") as file:
        file.write(b"!")

    with pytest.raises(ArtifactError, match=rf"{name} was altered after it was published"):
        load_artifact(copy)


def test_missing_file_is_named(copy):
    (copy / "context.json").unlink()

    with pytest.raises(ArtifactError, match=r"lacks context\.json, which its manifest lists"):
        load_artifact(copy)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "is not an artifact: it has no MANIFEST.json"),
        ("{", "is not JSON"),
        ('{"format": 99}', "has format 99; this version reads format 1"),
    ],
)
def test_folder_without_a_fitting_manifest_is_refused(tmp_path, content, words):
    if content is not None:
        (tmp_path / MANIFEST).write_text(content)

    with pytest.raises(ArtifactError, match=words):
        load_artifact(tmp_path)


def test_weights_of_another_size_are_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    config["model"]["dim"] = 32
    (copy / "config.json").write_text(json.dumps(config))
    manifest = json.loads((copy / MANIFEST).read_text())
    del manifest["files"]["config.json"]
    (copy / MANIFEST).write_text(json.dumps(manifest))

    with pytest.raises(ArtifactError, match=r"(?s)cannot be loaded: .*size mismatch"):
        load_artifact(copy).load_model()


def test_attributes_come_back_with_the_model(fashion, fashion_artifact):
    assert fashion_artifact.attributes == fashion.attributes
    assert "attributes.json" in fashion_artifact.manifest["files"]

    model = fashion_artifact.load_model()
    expected = fashion.train()
    torch.testing.assert_close(model.output_table_ID, expected.output_table_ID)
    torch.testing.assert_close(model.output_bias_I, expected.output_bias_I)


def test_artifact_without_attributes_holds_nothing_of_them(registry):
    artifact = load_artifact(registry / "v1")

    assert artifact.attributes is NO_ATTRIBUTES
    assert "attributes.json" not in artifact.manifest["files"]


def test_attributes_that_do_not_belong_to_the_weights_are_refused(fashion_artifact):
    with pytest.raises(ArtifactError, match=r"(?s)cannot be loaded: .*items\.attributes\.weight"):
        replace(fashion_artifact, attributes=NO_ATTRIBUTES).load_model()


def test_codes_come_back_from_the_weights_alone(coded_artifact):
    saved = load_file(coded_artifact.path / "model.safetensors")
    assert saved["items.codes"].dtype == torch.uint8
    assert saved["items.codes"].shape == (coded_artifact.catalogue.num_rows, 4)
    assert "items.weight" not in saved

    first, second = coded_artifact.load_model(), coded_artifact.load_model()
    assert torch.equal(first.items.codes, saved["items.codes"])
    assert torch.equal(first.output_table_ID, second.output_table_ID)
