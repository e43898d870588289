import json
import time

import pytest

from recsys.artifact import MANIFEST
from recsys.errors import ArtifactError
from recsys.registry import Serving, promote, repair
from serve_app.versions import Versions


class Loader:
    """Loads a version's name, and what a test has broken not at all."""

    def __init__(self):
        self.loaded = []
        self.broken = set()

    def __call__(self, path):
        if path.name in self.broken:
            raise ArtifactError(f"{path.name} is broken.")
        self.loaded.append(path.name)
        return path.name.upper()


class Watched:
    def __init__(self, root, **options):
        self.load = Loader()
        self.now = 0.0
        self.changes, self.failures = [], []
        self.root = root
        self.options = options

    def open(self, **options):
        return Versions(
            self.root,
            self.load,
            clock=lambda: self.now,
            on_change=self.changes.append,
            on_failure=self.failures.append,
            **options,
        )


@pytest.fixture
def watched(tmp_path):
    for version in "abc":
        (tmp_path / version).mkdir()
        (tmp_path / version / MANIFEST).write_text("{}")
    promote(tmp_path, "a")
    return Watched(tmp_path)


def test_promoted_version_takes_over_and_the_old_one_stays_for_a_while(watched):
    versions = watched.open(keep_s=60)
    assert versions.champion == "A"

    promote(watched.root, "b")
    versions.refresh()
    assert versions.champion == versions.get("b") == versions.get(None) == "B"
    assert versions.get("a") == "A"

    watched.now = 61.0
    versions.refresh()
    assert versions.get("a") == "B"
    assert watched.load.loaded == ["a", "b"]
    assert watched.changes == [Serving("a"), Serving("b")]


def test_canary_serves_its_share_beside_the_champion(watched):
    versions = watched.open()
    promote(watched.root, "b", 0.5)
    versions.refresh()

    chosen = {versions.choose(f"u{number}") for number in range(50)}

    assert chosen == {"A", "B"}
    assert versions.serving == Serving("a", {"b": 0.5})


def test_version_that_comes_back_is_loaded_once(watched):
    versions = watched.open(keep_s=60)
    for number, version in enumerate("bab"):
        watched.now = 30.0 * number
        promote(watched.root, version)
        versions.refresh()

    assert watched.load.loaded == ["a", "b"]


def test_broken_version_takes_over_nothing_and_is_tried_again_later(watched):
    versions = watched.open(retry_s=30)
    watched.load.broken = {"b"}
    promote(watched.root, "b")

    versions.refresh()
    versions.refresh()
    assert versions.champion == "A"
    assert watched.failures == ["b"]

    watched.load.broken = set()
    watched.now = 31.0
    versions.refresh()
    assert versions.champion == "B"


def test_visitors_of_a_broken_canary_stay_with_the_champion(watched):
    watched.load.broken = {"b"}
    versions = watched.open()
    promote(watched.root, "b", 0.9)
    versions.refresh()

    assert {versions.choose(f"u{number}") for number in range(50)} == {"A"}
    assert versions.serving == Serving("a")


@pytest.mark.parametrize("error", [OSError("disk"), RuntimeError("CUDA out of memory")])
def test_failures_of_disk_and_device_leave_what_serves(watched, error):
    versions = watched.open()

    def fail(path):
        raise error

    versions._load = fail
    promote(watched.root, "b")
    versions.refresh()

    assert (versions.champion, watched.failures) == ("A", ["b"])


def test_damaged_registry_leaves_what_serves_until_it_is_repaired(watched):
    versions = watched.open()
    promote(watched.root, "b", 0.5)
    (watched.root / "SERVING.json").write_text("{")
    versions.refresh()
    assert (versions.champion, watched.failures) == ("A", [""])

    repair(watched.root)
    versions.refresh()
    assert versions.serving == Serving("a", {"b": 0.5})


def test_start_without_a_loadable_champion_fails(watched):
    watched.load.broken = {"a"}
    with pytest.raises(ArtifactError, match="a is broken"):
        watched.open()


def test_pinned_version_ignores_the_registry(watched):
    versions = watched.open(pinned="c")
    promote(watched.root, "b")
    versions.refresh()

    assert (versions.champion, versions.serving) == ("C", Serving("c"))
    assert json.loads((watched.root / "SERVING.json").read_text())["serving"]["champion"] == "b"


def test_registry_is_watched_until_the_end(watched):
    versions = watched.open()
    versions.watch(every_s=0.01)
    promote(watched.root, "b")
    end = time.monotonic() + 20
    while versions.champion != "B":
        assert time.monotonic() < end, "the promotion was not seen"
        time.sleep(0.01)
    versions.close()

    promote(watched.root, "c")
    time.sleep(0.05)
    assert versions.champion == "B"
