"""The registry on the command line: what is there, what serves, and back again."""

import json

import pytest

from ray_jobs import registry
from recsys.artifact import publish
from recsys.registry import Serving, promote, read_serving
from tests.conftest import write_artifact
from tests.ray_jobs.conftest import tiny_config

MEAN = {"mean": 0.2, "low": 0.1, "high": 0.3}


@pytest.fixture
def root(tmp_path, shop):
    """Two versions, of which the first serves."""
    root = tmp_path / "synthetic" / "registry"

    def write(folder):
        write_artifact(folder, shop=shop)
        metrics = {"rows": {"model": {"NDCG@10": MEAN, "HR@10": MEAN}}, "num_users": 40}
        (folder / "metrics.json").write_text(json.dumps(metrics))

    lineage = {
        "run": "r2",
        "tables": {"sequences": 3, "items": 2},
        "sequences_from": {"events_version": 9, "users_version": 1, "rules": "abc"},
        "started_from": {"version": "v1"},
        "trained_until_us": 1_760_000_000_000_000,
    }
    publish(root, "v1", write, {})
    publish(root, "v2", write, lineage)
    promote(root, "v1")
    return root


@pytest.fixture
def call(tmp_path, root, monkeypatch, capsys):
    """Calls the command line; returns what it printed."""
    monkeypatch.setenv("NEXTITEM_HOME", str(tmp_path))

    def call(*arguments):
        registry.main([*arguments, "--config", "synthetic"])
        return capsys.readouterr().out

    return call


def test_a_list_says_who_serves_whom(call, root):
    promote(root, "v2", 0.05)
    first, second = call("list").splitlines()[1:]
    assert first.split()[:5] == ["v1", "95.0%", "champion", "0.2000", "[0.1000,"]
    assert second.split()[:2] == ["v2", "5.0%"]
    found = json.loads(call("list", "--json"))
    assert [version["share"] for version in found["versions"]] == [0.95, 0.05]


def test_a_version_shows_the_way_back_to_the_tables(call):
    text = call("show", "v2")
    assert "tables           events 9, users 1, items 2, sequences 3" in text
    assert "started from     v1" in text
    assert "trained until    2025-10-09T08:53:20+00:00" in text
    assert "metrics          NDCG@10 0.2000 [0.1000, 0.3000], HR@10 " in text
    assert json.loads(call("show", "v2", "--json"))["tables"]["events"] == 9
    assert "started from     random weights" in call("show", "v1")


def test_a_version_is_given_visitors_and_they_are_taken_back(call, root):
    assert call("promote", "v2", "--share", "0.25") == "serves now: v1: 75.0%, v2: 25.0%\n"
    assert json.loads(call("promote", "v2", "--json")) == {"champion": "v2", "shares": {"v2": 1.0}}
    assert call("rollback") == "serves now: v1: 100.0%\n"
    assert read_serving(root) == Serving("v1")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("promote", "v7"), 1, "registry failed: Version v7 is not in "),
        (("show", "v7"), 1, "it holds: v1, v2."),
        (("promote", "v2", "--share", "2"), 1, "A share of 2 is none"),
        (("rollback",), 1, "before v1; promote a version."),
        (("list", "--set", "nothing=1"), 2, "nothing: Extra inputs are not permitted"),
        (("list", "--set", "storage.root=/nowhere"), 1, "There is no registry in /nowhere/reg"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(call, capsys, arguments, status, message):
    with pytest.raises(SystemExit) as ended:
        call(*arguments)
    assert ended.value.code == status
    assert message in capsys.readouterr().err


def test_a_damaged_file_is_told_and_repaired_while_versions_can_be_looked_at(call, root):
    (root / "SERVING.json").write_text("{")
    assert "is damaged; run python -m ray_jobs.registry repair" in call("list")
    assert "v1 serves, as the copy says" in call("repair")
    assert "damaged" not in call("list")


def test_a_damaged_version_hides_no_other(call, root):
    (root / "v1" / "metrics.json").write_text("{")
    text = call("list")
    assert "v1/metrics.json cannot be read" in text
    assert "\nv2" in text


def test_a_registry_is_found_by_the_configuration(tmp_path, root):
    uri = tiny_config(tmp_path).storage.registry_uri
    assert str(root) == uri
