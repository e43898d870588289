import pytest

from recsys.artifact import MANIFEST
from recsys.errors import ArtifactError
from recsys.registry import list_versions, promote, serving_version


@pytest.fixture
def root(tmp_path):
    for version in ("20260102", "20260101", ".20260103-half"):
        (tmp_path / version).mkdir()
        (tmp_path / version / MANIFEST).write_text("{}")
    (tmp_path / "empty").mkdir()
    return tmp_path


def test_versions_are_listed_oldest_first_without_unfinished_ones(root):
    assert list_versions(root) == ["20260101", "20260102"]


def test_promoted_version_serves_and_may_be_replaced(root):
    promote(root, "20260101")
    assert serving_version(root) == "20260101"

    promote(root, "20260102")
    assert serving_version(root) == "20260102"
    assert list(root.glob("SERVING.json*")) == [root / "SERVING.json"]


def test_unknown_version_cannot_serve(root):
    with pytest.raises(ArtifactError, match=r"Version 7 is not in .* 20260101, 20260102"):
        promote(root, "7")


def test_registry_without_promotion_says_what_to_run(tmp_path):
    with pytest.raises(ArtifactError, match=r"serves yet; run ray_jobs\.publish first"):
        serving_version(tmp_path)
