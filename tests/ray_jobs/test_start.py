"""The version that a training starts from: found, checked, and kept by a run that goes on."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from ray.train import Checkpoint

from ray_jobs import build_sequences, evaluate, generate, ingest, start, train, train_worker
from ray_jobs import publish as publish_job
from ray_jobs.errors import ConfigError, JobError
from ray_jobs.job import load_config, main
from ray_jobs.runs import open_run
from ray_jobs.sections.models import StartConfig
from ray_jobs.sequences_reader import (
    Learned,
    Vocabulary,
    collect_tokens,
    load_tokens,
    open_sequences,
)
from ray_jobs.start import open_start
from recsys.artifact import load_artifact, publish, sha256_of
from recsys.checkpoint import save_checkpoint
from recsys.errors import ArtifactError, TrainingError
from recsys.recipe import read_recipe
from recsys.registry import promote, serving_version
from recsys.trainer import TrainerConfig
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
        (["train.start.artifact=v7"], JobError, r"names version 'v7', .* it holds: v1, v2, old"),
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
    weights = found.write(tmp_path, Vocabulary(shop.catalogue, shop.context), seed=0).read()
    published = found.artifact.load_model().state_dict()
    assert weights.keys() == published.keys()
    assert all(torch.equal(weights[name], published[name]) for name in published)


def test_weights_that_were_altered_since_are_not_begun_with(configure, root, shop, tmp_path):
    vocabulary = Vocabulary(shop.catalogue, shop.context)
    found = find(configure(), tmp_path).write(tmp_path, vocabulary, seed=0)
    content = bytearray(found.path.read_bytes())
    content[-1] ^= 1
    found.path.write_bytes(content)
    with pytest.raises(TrainingError, match=r"start.safetensors was cut off or altered since"):
        found.read()


def test_a_run_that_ended_before_its_first_epoch_may_start_anew(configure, root, shop, tmp_path):
    find(configure(), tmp_path).write(tmp_path, Vocabulary(shop.catalogue, shop.context), seed=0)
    assert find(configure("train.start.artifact=v2"), tmp_path).artifact.version == "v2"


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


def test_a_worker_takes_the_start_and_a_later_one_the_checkpoint(
    configure, root, shop, tmp_path, monkeypatch
):
    config, vocabulary = configure(), Vocabulary(shop.catalogue, shop.context)
    recipe = read_recipe(config.train.recipe, config.train.overrides)
    found = find(config, tmp_path)
    weights = found.write(tmp_path, vocabulary, seed=0)
    monkeypatch.setattr(train_worker, "get_device", lambda: torch.device("cpu"))

    # The vectors of the version are kept, wherever those of a new model would begin.
    recipe = recipe.model_copy(update={"item_start": "spectral"})
    plan = train_worker.WorkerPlan(config, recipe, vocabulary, None, weights)
    trainer = train_worker.build_trainer(plan, shop.store)
    published = found.artifact.load_model()
    assert torch.equal(trainer.model.item_bias, published.item_bias)
    assert torch.equal(trainer.model.items.weight, published.items.weight)

    trainer.epoch = config.train.trainer.max_epochs  # nothing is left to do
    with torch.no_grad():
        trainer.model.item_bias.fill_(7)
    save_checkpoint(tmp_path / "checkpoint", trainer)
    checkpoint = Checkpoint.from_directory(tmp_path / "checkpoint")
    later = train_worker.build_trainer(plan, shop.store, is_new=False)
    train_worker.resume_from([checkpoint], later)
    assert later.epoch == trainer.epoch
    assert (later.model.item_bias == 7).all()


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
    assert shown["train"]["recipe"] == "time-aware"
    assert train.preview(load_config("synthetic")) == {}


def test_a_start_names_its_version():
    with pytest.raises(ConfigError, match=r"train.start.artifact: Field required"):
        load_config("synthetic", ["train.start.new_events_only=true"])
    assert load_config("synthetic", ["train.start.artifact=v1"]).train.start == StartConfig(
        artifact="v1"
    )
    assert start.SERVING == "serving"


@pytest.fixture(scope="module")
def road(tmp_path_factory, ray_cluster):
    """A shop that published a version, after which events came in, some of them on new items."""
    home = tmp_path_factory.mktemp("grown")
    config = tiny_config(
        home,
        "generate.new_item_share=0.3",
        "train.recipe=sasrec-ce",
        "train.overrides={model={dim=16, max_len=16, num_layers=1}, batch_size=32}",
        "train.num_workers=1",
        "train.trainer={max_epochs=12}",
        "train.name=first",
        'evaluate.baselines=["popularity"]',
    )
    # Dirty rows come late, and would be the last that the first training has seen.
    clean = config.ingest.model_copy(update={"events": config.ingest.events[:1]})
    config = config.model_copy(update={"ingest": clean})
    generate.run(config)
    events = home / "synthetic" / "raw" / "events"
    later = _hold_back(events)
    for stage in (ingest, build_sequences, train, evaluate, publish_job):
        stage.run(config)
    pq.write_table(later, events / "later.parquet")
    for stage in (ingest, build_sequences):
        stage.run(config)
    return config


def _hold_back(folder):
    """Leaves the first 80 % of the events in the folder and gives back the others."""
    events = pq.read_table(folder)
    times = events["timestamp"].cast(pa.int64()).to_numpy()
    is_later = times > np.quantile(times, 0.8)
    for path in folder.iterdir():
        path.unlink()
    pq.write_table(events.filter(pa.array(~is_later)), folder / "earlier.parquet")
    return events.filter(pa.array(is_later))


def _goes_on(config, **changes):
    """Two epochs on two workers, starting from what serves."""
    trainer, begin = TrainerConfig(max_epochs=2), StartConfig(artifact="serving")
    changes = {"name": "second", "trainer": trainer, "num_workers": 2, "start": begin} | changes
    return config.model_copy(update={"train": config.train.model_copy(update=changes)})


def _cold_ndcg10(config, run):
    """NDCG@10 of two epochs from random weights with the vocabulary of a finished run."""
    recipe = read_recipe(config.train.recipe, config.train.overrides)
    plan = train_worker.WorkerPlan(config, recipe, run.vocabulary)
    tokens = load_tokens(open_sequences(config), config, run.vocabulary)
    store = collect_tokens(tokens, len(run.vocabulary.context.fields))
    trainer = train_worker.build_trainer(plan, store)
    return max(trainer.train_epoch().ndcg10 for _ in range(2))


@pytest.mark.ray
def test_training_goes_on_from_a_version_with_new_events_and_new_items(road, monkeypatch):
    monkeypatch.setattr(train_worker, "get_device", lambda: torch.device("cpu"))  # for the cold one
    config = _goes_on(road)
    train.run(config)
    first, second = open_run(road, "first"), open_run(road, "second")
    artifact = load_artifact(Path(second.facts["started_from"]["path"]))

    began = second.facts["started_from"]
    assert began["version"] == artifact.version == serving_version(artifact.path.parent)
    assert began["weights_sha256"] == sha256_of(first.folder / "model.safetensors")
    assert second.vocabulary.catalogue.num_items > first.vocabulary.catalogue.num_items
    assert second.facts["trained_until_us"] > first.facts["trained_until_us"]
    assert first.facts["started_from"] is None
    assert not list(second.folder.glob("*start*.safetensors"))

    # Two epochs on what is new are not behind two epochs on everything from nothing.
    assert second.facts["history"][0]["loss"] < first.facts["history"][1]["loss"]
    assert second.facts["best"]["ndcg10"] > 0.95 * _cold_ndcg10(config, second)
