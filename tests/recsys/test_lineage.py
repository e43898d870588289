"""What a registry tells of its versions."""

import json
from functools import partial

import pytest

from recsys.artifact import MANIFEST, publish, read_manifest
from recsys.errors import ArtifactError
from recsys.lineage import describe_version, digest_code, find_version_of
from recsys.registry import Serving, list_versions
from tests.conftest import write_artifact

MEAN = {"mean": 0.2, "low": 0.1, "high": 0.3}
FACTS = {
    "run": "r1",
    "seed": 5,
    "trained_until_us": 7,
    "tables": {"sequences": 3, "items": 2},
    "sequences_from": {"events_version": 9, "users_version": None, "rules": "abc"},
    "code": {"train": "12", "publish": "34"},
    "published_at": "2026-01-01T00:00:00+00:00",
}


@pytest.fixture
def root(tmp_path, shop):
    def write(folder):
        write_artifact(folder, shop=shop)
        rows = {"model": {"NDCG@10": MEAN, "HR@10": MEAN}}
        (folder / "metrics.json").write_text(json.dumps({"rows": rows, "num_users": 40}))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "recipe": {"name": "sasrec"}}))

    publish(tmp_path, "v2", write, FACTS)
    # Published later, under a name that comes before.
    publish(tmp_path, "v1", partial(write_artifact, shop=shop), {})
    return tmp_path


def test_a_version_names_what_it_came_from(root):
    found = describe_version(root, "v2", Serving("v2", {"v1": 0.25}))
    assert (found.number, found.is_champion, found.share) == (1, True, 0.75)
    assert found.tables == {"events": 9, "users": None, "items": 2, "sequences": 3}
    assert (found.run, found.recipe, found.seed, found.rules) == ("r1", "sasrec", 5, "abc")
    assert found.code == {"train": "12", "publish": "34"}
    assert found.metrics == {"NDCG@10": MEAN, "HR@10": MEAN}
    assert found.num_test_users == 40
    assert found.weights_sha256 == read_manifest(root / "v2")["files"]["model.safetensors"]
    assert json.loads(json.dumps(found.facts()))["trained_until_us"] == 7


def test_a_version_that_recorded_nothing_is_described_all_the_same(root):
    found = describe_version(root, "v1", None)
    assert (found.number, found.is_champion, found.share) == (2, False, 0.0)
    assert (found.run, found.recipe, found.metrics, found.code) == (None, None, {}, {})
    assert set(found.tables.values()) == {None}


def test_versions_are_counted_as_they_are_published(root):
    assert list_versions(root) == ["v2", "v1"]


def test_a_run_finds_the_version_that_it_was_published_as(root):
    assert find_version_of(root, "r1") == "v2"
    assert find_version_of(root, "r7") is None
    (root / "v1" / MANIFEST).write_text("{")
    assert find_version_of(root, "r1") == "v2"


def test_a_version_that_is_not_there_or_damaged_is_one_sentence(root):
    with pytest.raises(ArtifactError, match=r"Version v7 is not in .*; it holds: v2, v1\."):
        describe_version(root, "v7", None)
    (root / "v2" / "metrics.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"metrics.json cannot be read .*publish the run again"):
        describe_version(root, "v2", None)


def test_the_digest_of_code_changes_with_its_sources_alone(tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "a.py").write_text("1")
    before = digest_code(tmp_path, ("package",))
    (tmp_path / "package" / "a.pyc").write_text("2")
    assert digest_code(tmp_path, ("package",)) == before
    (tmp_path / "package" / "recipe.toml").write_text("3")
    assert digest_code(tmp_path, ("package",)) != before
