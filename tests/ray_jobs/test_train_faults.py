"""A training that loses the node of some of its workers, or in which one runs out of memory."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ray_jobs import train
from ray_jobs.errors import JobError
from ray_jobs.train import read_history
from tests.ray_jobs.conftest import TINY
from tests.ray_jobs.test_faults import QUICK_TO_NOTICE

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
SETTINGS = (
    "train.name=survivor",
    "train.trainer.max_epochs=5",
    "train.trainer.patience=5",
    "train.num_workers=3",
    "train.min_workers=1",
)
FULL = ("train.name=full", "train.num_workers=2", "train.trainer.validate_every=1")
NODE_DIES = """
import os, pathlib, signal, sys, threading, time
import ray
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2
from ray_jobs import train
from ray_jobs.job import load_config

how, *overrides = sys.argv[1:]
config = load_config("synthetic", overrides)
history = pathlib.Path(config.storage.runs_uri) / "survivor" / "history.jsonl"
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
second = cluster.add_node(num_cpus=2)
raylet = second.all_processes["raylet"][0].process.pid
ray.init(address=cluster.address)

def drain():
    # What `ray drain-node` asks for.
    reason = autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
    deadline_ms = time.time_ns() // 1_000_000 + 1000
    accepted, why_not = GcsClient(address=cluster.address).drain_node(
        second.node_id, reason, "maintenance", deadline_ms
    )
    assert accepted, why_not
    time.sleep(1)

def kill():
    while not history.exists() or len(history.read_text().splitlines()) < 2:
        time.sleep(0.01)
    if how == "drained":
        drain()
    os.kill(raylet, signal.SIGKILL)

threading.Thread(target=kill, daemon=True).start()
print(train.run(config).json_line(), flush=True)
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("how", ["lost", pytest.param("drained", marks=pytest.mark.long)])
def test_a_training_goes_on_with_the_workers_that_are_left(how, tmp_path, tiny_lake):
    tiny_lake(tmp_path, *SETTINGS)
    done = subprocess.run(
        [sys.executable, "-c", NODE_DIES, how, *TINY, *SETTINGS],
        cwd=ROOT,
        env={
            **os.environ,
            "NEXTITEM_HOME": str(tmp_path),
            "RAY_AUTH_MODE": "disabled",
            **QUICK_TO_NOTICE,
            # A group that was asked for before the loss was known is given up after so long.
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "25",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["epochs"] == 5
    lines = (tmp_path / "synthetic" / "runs" / "survivor" / "history.jsonl").read_text()
    epochs = [json.loads(line)["epoch"] for line in lines.splitlines()]
    # It went on from a checkpoint: what came before the last one was not trained again.
    assert epochs[:2] == [1, 2]
    assert epochs.count(1) == 1
    assert [e["epoch"] for e in read_history(tmp_path / "synthetic/runs/survivor")] == list(
        range(1, 6)
    )


@pytest.mark.usefixtures("ray_cluster")
def test_a_training_that_lost_a_rank_within_an_epoch_ends_as_an_undisturbed_one(
    tmp_path, tiny_lake, monkeypatch
):
    config = tiny_lake(
        tmp_path,
        "train.num_workers=2",
        "train.trainer.checkpoint_every_steps=2",
        "train.trainer.validate_every=1",
    )
    marker = tmp_path / "went-on-at"
    runs = tmp_path / "synthetic" / "runs"

    def run(name, report_every_seconds):
        changes = {"report_every_seconds": report_every_seconds}
        trainer = config.train.trainer.model_copy(update=changes)
        named = config.train.model_copy(update={"name": name, "trainer": trainer})
        train.run(config.model_copy(update={"train": named}))
        return load_file(runs / name / "model.safetensors")

    undisturbed = run("undisturbed", 3600)
    monkeypatch.setattr(train, "train_worker", _worker_that_is_killed(marker))
    # Progress is told after every step.
    disturbed = run("disturbed", 1e-9)
    assert marker.read_text() == "1 4"
    histories = [read_history(runs / name) for name in ("undisturbed", "disturbed")]
    losses = [[entry["loss"] for entry in history] for history in histories]
    assert losses[0] == losses[1]
    assert undisturbed.keys() == disturbed.keys()
    assert all(torch.equal(weight, disturbed[name]) for name, weight in undisturbed.items())


@pytest.mark.usefixtures("ray_cluster")
def test_a_worker_without_memory_goes_on_from_the_last_checkpoint(tmp_path, tiny_lake, monkeypatch):
    config = tiny_lake(
        tmp_path, "train.name=lean", "train.num_workers=2", "train.trainer.checkpoint_every_steps=2"
    )
    marker = tmp_path / "went-on-at"

    def is_short(trainer):
        if trainer.rank != 1 or marker.exists():
            return False
        if (trainer.epoch, trainer.step) != (1, 3):
            return False
        time.sleep(3)  # a checkpoint that was reported is committed a little later
        marker.touch()
        return True

    monkeypatch.setattr(train, "train_worker", _worker_without_memory(is_short, marker))
    train.run(config)
    assert marker.read_text() == "1 2"
    history = read_history(tmp_path / "synthetic" / "runs" / "lean")
    assert [entry["epoch"] for entry in history] == [1, 2]


@pytest.mark.usefixtures("ray_cluster")
def test_a_worker_that_never_has_the_memory_stops_the_run_with_what_would_fit(
    tmp_path, tiny_lake, monkeypatch
):
    config = tiny_lake(tmp_path, "train.name=lean", "train.num_workers=2", "train.max_failures=1")

    def is_short(trainer):
        return trainer.rank == 1 and trainer.step == 1

    monkeypatch.setattr(train, "train_worker", _worker_without_memory(is_short))
    with pytest.raises(JobError) as stopped:
        train.run(config)
    assert str(stopped.value) == (
        "Training stopped after 1 retry: Worker 1 ran out of memory in step 2 of epoch 1 "
        "(Tried to allocate 2.00 GiB); raise trainer.micro_batches to 2 (now 1), which changes no "
        "result, or lower batch_size to 32 (now 64) in a new run. Start it again with "
        "train.name=lean to go on from its last checkpoint."
    )


@pytest.mark.usefixtures("ray_cluster")
def test_a_disk_that_was_full_for_a_while_costs_no_more_than_the_last_steps(
    tmp_path, tiny_lake, monkeypatch
):
    config = tiny_lake(tmp_path, *FULL)
    runs = tmp_path / "synthetic" / "runs"
    monkeypatch.setattr(train, "train_worker", _worker_on_a_full_disk(tmp_path / "was-full"))
    train.run(config)
    assert (tmp_path / "was-full").exists()
    # The second epoch was trained twice and counts once; the first one was not lost.
    assert [entry["epoch"] for entry in read_history(runs / "full")] == [1, 2]
    assert len((runs / "full" / "history.jsonl").read_text().splitlines()) == 2


@pytest.mark.usefixtures("ray_cluster")
def test_a_history_that_cannot_be_written_stops_the_run_at_once(tmp_path, tiny_lake, monkeypatch):
    config = tiny_lake(tmp_path, *FULL)

    class FullDisk(train.RunLog):
        def after_report(self, run_context, metrics, checkpoint):
            raise OSError(errno.ENOSPC, "No space left on device", "history.jsonl")

    monkeypatch.setattr(train, "RunLog", FullDisk)
    with pytest.raises(JobError) as stopped:
        train.run(config)
    assert str(stopped.value) == (
        "Training stopped: [Errno 28] No space left on device: 'history.jsonl'. "
        "Start it again with train.name=full to go on from its last checkpoint."
    )


def _worker_on_a_full_disk(marker):
    """A worker that once cannot write the checkpoint of the second epoch, and leaves `marker`."""
    original = train.train_worker

    def worker(plan_parts):
        from recsys import checkpoint

        save = checkpoint.os.fsync

        def fail(number):
            name = os.readlink(f"/proc/self/fd/{number}")
            if "training-2-0" in name and not marker.exists():
                time.sleep(3)  # a checkpoint that was reported is committed a little later
                marker.touch()
                raise OSError(errno.ENOSPC, "No space left on device")
            save(number)

        checkpoint.os.fsync = fail
        try:
            return original(plan_parts)
        finally:
            checkpoint.os.fsync = save

    return worker


def _worker_that_is_killed(marker):
    """A worker whose second rank dies once, after five steps of the second epoch; the step that the
    next try begins with is written into `marker`."""
    original = train.train_worker

    def worker(plan_parts):
        from recsys.trainer import Trainer

        train_epoch = Trainer.train_epoch

        def die(trainer, after_step):
            if trainer.rank == 0 and marker.exists():
                marker.write_text(marker.read_text() or f"{trainer.epoch} {trainer.step}")

            def after():
                after_step()
                is_there = (trainer.rank, trainer.epoch, trainer.step) == (1, 1, 5)
                if is_there and not marker.exists():
                    time.sleep(3)  # a checkpoint that was reported is committed a little later
                    marker.touch()
                    os.kill(os.getpid(), signal.SIGKILL)

            return train_epoch(trainer, after)

        Trainer.train_epoch = die
        return original(plan_parts)

    return worker


def _worker_without_memory(is_short, marker=None):
    """A worker whose trainer has no memory for a step of which `is_short` says so; the step that
    the next try begins with is written into `marker`."""
    original = train.train_worker

    def worker(plan_parts):
        from recsys.trainer import Trainer

        loss, train_epoch = Trainer._loss, Trainer.train_epoch

        def fail(trainer, piece):
            if is_short(trainer):
                raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB.")
            return loss(trainer, piece)

        def note(trainer, after_step):
            if trainer.rank == 0 and marker is not None and marker.exists():
                marker.write_text(marker.read_text() or f"{trainer.epoch} {trainer.step}")
            return train_epoch(trainer, after_step)

        Trainer._loss, Trainer.train_epoch = fail, note
        return original(plan_parts)

    return worker
