"""The version that a training starts from: found, checked, and kept by a run that goes on."""

import json
from functools import partial

import pytest
import torch

from ray_jobs import start, train
from ray_jobs.config import StartConfig
from ray_jobs.errors import ConfigError, JobError
from ray_jobs.job import load_config, main
from ray_jobs.sequences_reader import Learned, Vocabulary
from ray_jobs.start import drop_start, load_start, open_start
from recsys.artifact import publish
from recsys.errors import ArtifactError
from recsys.recipe import read_recipe
from recsys.registry import promote
from tests.conftest import START_US, write_artifact
from tests.ray_jobs.conftest import tiny_config

# 9 October 2025, 08:53:20.
_SIZES = "train.overrides={model={dim=16, num_layers=1, num_heads=2, max_len=10}}"


@pytest.fixture
def configure(tmp_path):
    """The configuration of the shop's registry, with overrides."""

    def make(*overrides):
        artifact = ["train.start.artifact=serving"]
        return tiny_config(tmp_path, "train.recipe=bert4rec", _SIZES, *artifact, *overrides)

    return make


@pytest.fixture
def root(configure, shop, tmp_path):
    """A registry with the versions v1, which serves, v2, and one that does not say when it ends."""
    root = tmp_path / "synthetic" / "registry"
    pipeline = configure().model_dump(mode="json")
    facts = {"trained_until_us": START_US + 999_999, "pipeline": pipeline}
    config = read_recipe("bert4rec", configure().train.overrides).model
    for seed, (version, known) in enumerate({"v1": facts, "v2": facts, "old": {}}.items()):
        write = partial(write_artifact, shop=shop, seed=seed, config=config)
        publish(root, version, write, known)
    promote(root, "v1")
    return root


def find(config, folder):
    recipe = read_recipe(config.train.recipe, config.train.overrides)
    return open_start(config, recipe, folder)


@pytest.mark.parametrize(
    ("artifact", "version"), [("serving", "v1"), ("v2", "v2"), ("{root}/v2", "v2")]
)
def test_a_version_is_found_by_its_name_its_path_or_because_it_serves(
    configure, root, tmp_path, artifact, version
):
    config = configure(f"train.start.artifact={artifact.format(root=root)}")
    found = find(config, tmp_path / "run")
    assert found.artifact.version == version
    assert found.new_since_s == START_US // 1_000_000
    assert found.facts() == {
        "version": version,
        "path": str(root / version),
        "weights_sha256": found.artifact.manifest["files"]["model.safetensors"],
        "trained_until": "2025-10-09T08:53:20+00:00",
        "new_events_only": True,
    }


def test_without_a_start_there_is_nothing_to_find(configure, tmp_path):
    config = configure()
    config = config.model_copy(update={"train": config.train.model_copy(update={"start": None})})
    assert find(config, tmp_path / "run") is None


def test_all_events_may_be_targets(configure, root, tmp_path):
    assert find(configure("train.start.new_events_only=false"), tmp_path).new_since_s is None


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["train.start.artifact=v7"], JobError, r"names version 'v7', .* it holds: old, v1, v2"),
        (["train.start.artifact=/nowhere/v1"], ArtifactError, r"/nowhere/v1 is not an artifact"),
        (["train.start.artifact=old"], JobError, r"old does not say until when it was trained"),
        (["train.overrides.model.dim=32"], ArtifactError, r"model.dim is 16 there and 32 here"),
        (
            ["train.overrides.model.dropout=0.5", "train.context.time=[]"],
            ArtifactError,
            r"model.dropout is .* there and 0.5 here, context.time is \['hour', 'weekday', 'gap'\]",
        ),
        (
            ['train.attributes.categorical=["category"]'],
            ArtifactError,
            r"attributes.categorical is \[\] there and \['category'\] here; configure the same",
        ),
        (
            [
                "split.kind=temporal-cut",
                "split.validation_from=2025-10-09T08:53:20Z",
                "split.test_from=2025-10-10T00:00:00Z",
            ],
            JobError,
            r"until 2025-10-09T08:53:20\+00:00, and split.validation_from is 2025-10-09T08:53:20",
        ),
        (
            ['train.targets.event_types=["purchase"]'],
            JobError,
            r"split.kind 'leave-one-out' and the targets of every type, so it knows events",
        ),
    ],
)
def test_what_does_not_fit_is_refused(configure, root, tmp_path, overrides, error, message):
    with pytest.raises(error, match=message):
        find(configure(*overrides), tmp_path / "run")


def test_a_later_cut_by_the_clock_fits(configure, root, tmp_path):
    cut = "split={kind='temporal-cut', validation_from=2025-10-10T00:00:00Z, "
    config = configure(cut + "test_from=2025-10-11T00:00:00Z}")
    assert find(config, tmp_path / "run").artifact.version == "v1"


def test_a_registry_in_which_nothing_serves_says_so(configure, tmp_path):
    with pytest.raises(ArtifactError, match=r"serves yet; run ray_jobs.publish first"):
        find(configure(), tmp_path / "run")


def test_the_grown_weights_wait_in_the_run_folder(configure, root, shop, tmp_path):
    found = find(configure(), tmp_path)
    vocabulary = Vocabulary(shop.catalogue, shop.context)
    found.write(tmp_path, vocabulary, seed=0)
    published, model = (
        found.artifact.load_model(),
        vocabulary.make_model(found.artifact.load_model().config),
    )
    load_start(tmp_path, model)
    assert torch.equal(model.items.weight, published.items.weight)

    drop_start(tmp_path)
    assert [path.name for path in tmp_path.glob("*start*")] == ["start.json"]
    untouched = vocabulary.make_model(model.config)
    before = untouched.items.weight.clone()
    load_start(tmp_path, untouched)
    assert torch.equal(untouched.items.weight, before)


def test_a_run_that_goes_on_keeps_the_version_that_it_began_with(configure, root, shop, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    find(configure(), run).write(run, Vocabulary(shop.catalogue, shop.context), seed=0)
    (run / "history.jsonl").touch()
    promote(root, "v2")
    assert find(configure(), run).artifact.version == "v1"
    assert find(configure(), tmp_path / "another").artifact.version == "v2"
    with pytest.raises(JobError, match=r"'run' began with train.start = .*serving.* train.name"):
        find(configure("train.start.artifact=v2"), run)


def test_a_run_that_began_with_random_weights_goes_on_with_them(configure, root, tmp_path):
    (tmp_path / "history.jsonl").touch()
    with pytest.raises(JobError, match=r"began with random weights and cannot go on with train.st"):
        find(configure(), tmp_path)


def test_a_shop_without_new_events_is_refused(configure, root, shop, tmp_path):
    found = find(configure(), tmp_path)
    learned = Learned(Vocabulary(shop.catalogue, shop.context), num_trainable=0, num_validated=9)
    with pytest.raises(JobError, match=r"No user has a training event since 2025-10-09T08:53:20"):
        train._refuse_untrainable(learned, found)


def test_a_dry_run_shows_the_version(configure, root, capsys):
    config = configure()
    main(
        train.run,
        job="train",
        argv=["--config", "synthetic", "--dry-run"],
        preview=lambda _: train.preview(config),
    )
    shown = json.loads(capsys.readouterr().out)
    assert shown["started_from"]["version"] == "v1"
    assert shown["train"]["recipe"] == "bert4rec"
    assert train.preview(load_config("synthetic")) == {}


def test_a_start_names_its_version():
    with pytest.raises(ConfigError, match=r"train.start.artifact: Field required"):
        load_config("synthetic", ["train.start.new_events_only=true"])
    assert load_config("synthetic", ["train.start.artifact=v1"]).train.start == StartConfig(
        artifact="v1"
    )
    assert start.SERVING == "serving"
