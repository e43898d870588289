"""The training job: what it refuses, and that a run goes on where it was."""

import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from ray.train import Checkpoint, ControllerError, WorkerGroupError

from data_lake.errors import TableError
from data_lake.storage import list_folder
from ray_jobs import build_sequences, evaluate, train
from ray_jobs.errors import ConfigError, JobError
from ray_jobs.runs import open_run
from ray_jobs.sequences_reader import Learned, Vocabulary
from ray_jobs.train import read_history
from recsys.catalogue import NUM_SPECIAL, Catalogue
from recsys.checkpoint import save_checkpoint
from recsys.context import ContextConfig, ContextEncoder
from recsys.errors import CatalogueError, TrainingError
from recsys.item_codes import ItemCodesConfig
from recsys.recipe import read_recipe
from recsys.targets import TargetsConfig
from recsys.trainer import Trainer
from tests.ray_jobs.conftest import TINY, tiny_config
from tests.recsys.test_trainer import make_trainer
from tests.s3_server import BUCKET, running_store

ROOT = Path(__file__).parents[2]


def _with_train(config, **changes):
    return config.model_copy(update={"train": config.train.model_copy(update=changes)})


def test_of_a_repeated_epoch_the_last_try_counts(tmp_path):
    lines = [{"epoch": 1, "loss": 3.0}, {"epoch": 2, "loss": 9.0}, {"epoch": 2, "loss": 2.0}]
    (tmp_path / "history.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [entry["loss"] for entry in read_history(tmp_path)] == [3.0, 2.0]


def _learned(num_items=5, num_trainable=9, num_validated=9):
    catalogue = Catalogue.build(pa.array(range(num_items)), np.ones(num_items, int), None)
    vocabulary = Vocabulary(catalogue, ContextEncoder.learn(ContextConfig(), {}))
    return Learned(vocabulary, num_trainable, num_validated)


@pytest.mark.parametrize(
    ("learned", "message"),
    [
        (_learned(num_items=1), "The catalogue holds 1 item, so there is nothing to choose from"),
        (_learned(num_trainable=0), "Of all users 0 have two training events"),
        (_learned(num_validated=0), "and 0 a validation event; both are needed"),
    ],
)
def test_what_nobody_can_learn_from_is_refused_before_workers_start(learned, message):
    with pytest.raises(JobError, match=message):
        train._refuse_untrainable(learned)
    train._refuse_untrainable(_learned())


def test_what_fails_beside_the_workers_is_not_tried_again():
    of_worker = WorkerGroupError("", {0: OSError("No space left on device")})
    assert train._say_how_often(of_worker, 1) == " after 1 retry"
    assert train._say_how_often(of_worker, 2) == " after 2 retries"
    assert train._say_how_often(of_worker, 0) == ""
    assert train._say_how_often(ControllerError(OSError("No space left on device")), 2) == ""


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        ({"CPU": 4.0}, (2, False)),
        ({"CPU": 4.0, "GPU": 1.0}, (1, True)),
        ({"CPU": 16.0, "GPU": 8.0}, (2, True)),
    ],
)
def test_auto_takes_the_gpus_that_there_are(tmp_path, monkeypatch, resources, expected):
    monkeypatch.setattr("ray.cluster_resources", lambda: resources)
    scaling = train._scaling(tiny_config(tmp_path))
    assert (scaling.num_workers, scaling.use_gpu) == expected


def test_workers_may_be_fewer_and_of_one_type_of_gpu(tmp_path, monkeypatch):
    resources = {"CPU": 64.0, "GPU": 8.0, "accelerator_type:A100": 1.0}
    monkeypatch.setattr("ray.cluster_resources", lambda: resources)
    config = tiny_config(tmp_path)
    changes = {"num_workers": 8, "min_workers": 2, "accelerator_type": "A100"}
    scaling = train._scaling(_with_train(config, **changes))
    assert (scaling.num_workers, scaling.accelerator_type) == ((2, 8), "A100")
    with pytest.raises(JobError, match=r"'A100', and training would run on CPUs"):
        train._scaling(_with_train(config, **changes, device="cpu"))
    with pytest.raises(JobError, match=r"'H100', and the cluster's types are A100; name one"):
        train._scaling(_with_train(config, **{**changes, "accelerator_type": "H100"}))
    # There is room for three: a run that may have two begins.
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 3.0})
    scaling = train._scaling(_with_train(config, num_workers=8, min_workers=2))
    assert (scaling.num_workers, scaling.max_workers) == ((2, 8), 8)
    with pytest.raises(ConfigError, match="min_workers 9 is more than num_workers 2"):
        tiny_config(tmp_path, "train.min_workers=9")


def test_training_waits_for_machines_that_come_when_they_are_asked_for(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0})
    monkeypatch.setenv("NEXTITEM_CLUSTER_CPUS", "128")
    monkeypatch.setenv("NEXTITEM_CLUSTER_GPUS", "16")
    config = tiny_config(tmp_path)
    changes = {"num_workers": 24, "min_workers": 4, "accelerator_type": "A100"}
    scaling = train._scaling(_with_train(config, **changes))
    assert (scaling.num_workers, scaling.use_gpu) == ((4, 16), True)
    assert "it has 0 GPUs, 4 workers need 4" in caplog.text
    assert "CPUs, " not in caplog.text
    with pytest.raises(JobError, match="16 GPUs for 17 workers"):
        train._scaling(_with_train(config, num_workers=17, device="gpu"))


def test_weights_are_those_of_the_best_epoch_that_is_whole(tmp_path, caplog):
    checkpoints = []
    for number, ndcg10 in ((1, 0.1), (2, 0.3), (3, 0.2)):
        trainer = make_trainer(max_epochs=9)
        trainer.epoch = number
        with torch.no_grad():
            trainer.model.item_bias.fill_(number)
        save_checkpoint(tmp_path / str(number), trainer)
        checkpoint = Checkpoint.from_directory(tmp_path / str(number))
        checkpoints.append((checkpoint, {"ndcg10": ndcg10, "epoch": number}))
    checkpoints.append((Checkpoint.from_directory(tmp_path), {"epoch": 3, "step": 7}))
    assert train._read_best(checkpoints)[1]["epoch"] == 2

    (damaged,) = (tmp_path / "2").glob("training-*.pt")
    damaged.write_bytes(damaged.read_bytes()[:-100])
    weights, metrics = train._read_best(checkpoints)
    assert metrics["epoch"] == 3
    assert (weights["item_bias"] == 3).all()
    assert "Taking the next best epoch" in caplog.text
    with pytest.raises(TrainingError, match="No checkpoint of the run is whole"):
        train._read_best([checkpoints[1]])
    gone = Checkpoint.from_directory(tmp_path / "of-a-disk-that-is-not-there")
    with pytest.raises(JobError, match="best checkpoint cannot be reached"):
        train._read_best([*checkpoints, (gone, {"ndcg10": 0.9, "epoch": 4})])


def test_item_codes_of_a_column_that_is_not_there_are_refused_before_workers_start(shop):
    codes = ItemCodesConfig(source="attributes", attributes={"categorical": ["category", "brand"]})
    recipe = read_recipe("sasrec-ce", {"model": {"item_codes": codes.model_dump()}})
    with pytest.raises(CatalogueError, match="The catalogue has no column 'brand'"):
        train._refuse_unknown_columns(recipe, Vocabulary(shop.catalogue, shop.context))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_workers_that_do_not_fit_are_refused_with_the_settings_to_change(tiny):
    with pytest.raises(JobError, match=r"99 workers of 1 CPUs do not fit.*lower train.num_workers"):
        train.run(_with_train(tiny, num_workers=99))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_gpu_that_is_not_there_is_refused(tiny):
    with pytest.raises(JobError, match=r"train.device is 'gpu' but the cluster has 0 GPUs"):
        train.run(_with_train(tiny, device="gpu"))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_finished_run_is_not_overwritten(tiny):
    folder = train._run_folder(_with_train(tiny, name="done"))
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    with pytest.raises(
        JobError, match=r"'done' is finished already; give train.name another value"
    ):
        train.run(_with_train(tiny, name="done"))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_run_goes_on_with_the_sequences_that_it_began_with(tmp_path, tiny_lake, monkeypatch):
    config = tiny_lake(tmp_path, "train.name=phoenix")
    read = []

    def cut_off(plan, folder, tokens, scaling):
        read.append((tokens.count(), plan.vocabulary.catalogue.num_items))
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "_fit", cut_off)
    with pytest.raises(KeyboardInterrupt):
        train.run(config)
    longer = config.sequences.model_copy(update={"min_user_events": 15})
    build_sequences.run(config.model_copy(update={"sequences": longer}))
    with pytest.raises(KeyboardInterrupt):
        train.run(config)
    with pytest.raises(KeyboardInterrupt):
        train.run(_with_train(config, name="later"))
    began, resumed, later = read
    assert resumed == began
    assert later[0] < began[0]

    run = tmp_path / "synthetic" / "runs" / "phoenix"
    (run / "versions.json").write_text('{"sequences_version": 77, "items_version": null}')
    with pytest.raises(TableError, match="Version 77 of the table 'sequences' can no longer be"):
        train.run(config)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_run_for_purchases_is_trained_and_evaluated_on_purchases(tmp_path, tiny_lake):
    config = tiny_lake(
        tmp_path,
        "train.recipe=rss",
        "train.overrides={model={dim=16, max_len=16}, batch_size=64}",
        'train.targets={event_types=["purchase"]}',
        "train.trainer.max_epochs=1",
        "evaluate.filter_seen=false",
        'evaluate.baselines=["popularity"]',
    )
    with pytest.raises(TrainingError, match=r"train.targets names sale, which no training event"):
        train.run(_with_train(config, targets=TargetsConfig(event_types=["sale"])))
    train.run(config)
    evaluate.run(config)
    evaluation = open_run(config, None).evaluation()
    assert evaluation["target_event_types"] == ["purchase"]
    assert 0 < evaluation["num_test_users"] < 400


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_run_with_item_codes_has_them_in_its_weights(tmp_path, tiny_lake):
    codes = '{length=4, num_values=16, source="attributes", attributes={categorical=["category"]}}'
    start = 'train.overrides.item_start="random"'
    config = tiny_lake(tmp_path, start, f"train.overrides.model.item_codes={codes}")
    train.run(config)
    evaluate.run(config)

    run = open_run(config, None)
    model, categories = run.load_model(), run.vocabulary.catalogue.column("category").to_pylist()
    codes_IC = model.items.codes[NUM_SPECIAL:]
    assert codes_IC.shape == (len(categories), 4)
    # The first code is the category, whichever rank looks at it.
    pairs = set(zip(categories, codes_IC[:, 0].tolist(), strict=True))
    assert len(pairs) == len(set(categories)) == len(codes_IC[:, 0].unique())


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_run_whose_driver_was_killed_goes_on_when_started_with_its_name(tmp_path, tiny_lake):
    overrides = ("train.trainer.max_epochs=12", "train.name=phoenix")
    config = tiny_lake(tmp_path, *overrides)
    settings = [word for override in (*TINY, *overrides) for word in ("--set", override)]
    address = ray.get_runtime_context().gcs_address
    driver = subprocess.Popen(
        [sys.executable, "-m", "ray_jobs.train", "--config", "synthetic", *settings],
        cwd=ROOT,
        env={**os.environ, "NEXTITEM_HOME": str(tmp_path), "RAY_ADDRESS": address},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    history = tmp_path / "synthetic" / "runs" / "phoenix" / "history.jsonl"
    _wait_for_epochs(history, 4, driver)
    driver.kill()
    driver.wait()
    trained_before = len(history.read_text().splitlines())

    report = train.run(config)
    epochs = [json.loads(line)["epoch"] for line in history.read_text().splitlines()]
    assert report.figures["epochs"] == 12
    assert sorted(set(epochs)) == list(range(1, 13))
    assert epochs[trained_before] > 1  # it did not start again


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_run_whose_latest_checkpoint_was_cut_off_goes_on_from_the_one_before(
    tmp_path, tiny_lake, monkeypatch, capfd
):
    config = tiny_lake(
        tmp_path,
        "train.trainer.max_epochs=2",
        "train.trainer.checkpoint_every_steps=2",
        "train.trainer.validate_every=1",
        "train.max_failures=0",
        "train.name=phoenix",
    )
    marker = tmp_path / "resumed-at"
    original = Trainer.train_epoch

    def stop_in_the_second(trainer, after_step):
        if trainer.rank == 0 and marker.exists() and not marker.read_text():
            marker.write_text(f"{trainer.epoch} {trainer.step}")

        def after():
            after_step()
            if trainer.epoch == 1 and trainer.step == 5 and not marker.exists():
                time.sleep(3)  # a checkpoint that was reported is committed a little later
                raise RuntimeError("the power is gone")

        return original(trainer, after)

    monkeypatch.setattr(train, "train_worker", _worker_with(stop_in_the_second))
    with pytest.raises(JobError, match="the power is gone"):
        train.run(config)
    marker.touch()
    kept = list((tmp_path / "synthetic" / "runs" / "phoenix").glob("ray/*/training-*.pt"))
    assert sorted(path.name for path in kept) == [
        f"training-{place}.pt" for place in ("1-0", "1-2", "1-4")
    ]
    (latest,) = (path for path in kept if path.name == "training-1-4.pt")
    latest.write_bytes(latest.read_bytes()[:-100])
    train.run(config)
    assert marker.read_text() == "1 2"
    assert "Result dict has no key" not in "".join(capfd.readouterr())


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_run_that_cannot_go_on_says_why_at_once(tmp_path, tiny_lake):
    config = tiny_lake(
        tmp_path, "train.overrides.optimiser.learning_rate=1e30", "train.trainer.max_epochs=3"
    )
    with pytest.raises(TrainingError, match=r"The loss of epoch \d is .*lower optimiser.learning"):
        train.run(config)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_ray_exports_how_a_training_goes(tmp_path, tiny_lake):
    config = tiny_lake(tmp_path, "train.name=watched", "train.trainer.max_epochs=20")
    config = _with_train(config, trainer=config.train.trainer.model_copy(update={"patience": 20}))
    driver = threading.Thread(target=train.run, args=(config,))
    (node,) = ray.nodes()
    address = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"
    told, until = {}, time.monotonic() + 120
    driver.start()
    while len(told) < 4 and time.monotonic() < until:
        text = urllib.request.urlopen(address, timeout=10).read().decode()
        found = re.findall(r'^ray_nextitem_train_(\w+)\{.*run="watched".*\} (\S+)$', text, re.M)
        told |= {name: float(value) for name, value in found}
        time.sleep(0.2)
    driver.join()
    assert set(told) == {"loss", "ndcg10", "tokens_per_s", "epoch"}
    assert told["loss"] > 0
    assert told["tokens_per_s"] > 0
    assert 0 <= told["ndcg10"] <= 1
    assert 1 <= told["epoch"] <= 20


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_run_goes_on_from_checkpoints_in_an_object_store(tmp_path, tiny_lake, monkeypatch):
    from recsys.trainer import Trainer

    original, marker = Trainer.train_epoch, tmp_path / "tried"

    def stop_after_the_first(trainer, after_step=None):
        if trainer.epoch == 1 and not marker.exists():
            time.sleep(3)  # a checkpoint that was reported is committed a little later
            raise OSError("the power is gone")
        if marker.exists():
            with marker.open("a") as file:
                file.write(str(trainer.epoch))
        return original(trainer, after_step)

    monkeypatch.setattr(train, "train_worker", _worker_with(stop_after_the_first))
    with running_store("tests.moto_server") as options:
        folder = f"storage.checkpoints=s3://{BUCKET}/checkpoints"
        config = tiny_lake(tmp_path, folder, "train.trainer.validate_every=1")
        storage = config.storage.model_copy(update={"options": options})
        config = config.model_copy(update={"storage": storage})
        config = _with_train(config, name="far", max_failures=0)
        with pytest.raises(JobError, match="the power is gone"):
            train.run(config)
        marker.touch()
        train.run(config)
        kept = list_folder(f"s3://{BUCKET}/checkpoints/far/ray", options)
    run = open_run(config, "far")
    assert set(marker.read_text()) == {"1"}  # told by each of the workers
    assert [epoch["epoch"] for epoch in train.read_history(run.folder)] == [1, 2]
    assert any("checkpoint" in file.base_name for file in kept)
    assert not (run.folder / "ray").exists()
    assert (run.folder / "tensorboard").is_dir()


def _wait_for_epochs(history, number, driver):
    deadline = time.monotonic() + 120
    while not history.exists() or len(history.read_text().splitlines()) < number:
        assert driver.poll() is None, "the driver ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _worker_with(train_epoch):
    original = train.train_worker

    def worker(plan_parts):
        from recsys.trainer import Trainer

        Trainer.train_epoch = train_epoch
        return original(plan_parts)

    return worker
