"""A training that loses the node of some of its workers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ray_jobs import build_sequences, generate, ingest
from ray_jobs.train import read_history
from tests.ray_jobs.conftest import TINY, tiny_config
from tests.ray_jobs.test_faults import QUICK_TO_NOTICE

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
SETTINGS = (
    "train.name=survivor",
    "train.trainer.max_epochs=8",
    "train.trainer.patience=8",
    "train.num_workers=3",
    "train.min_workers=1",
)
NODE_DIES = """
import os, pathlib, signal, sys, threading, time
import ray
from ray.cluster_utils import Cluster
from ray_jobs import train
from ray_jobs.job import load_config

config = load_config("synthetic", sys.argv[1:])
history = pathlib.Path(config.storage.runs_uri) / "survivor" / "history.jsonl"
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
raylet = cluster.add_node(num_cpus=2).all_processes["raylet"][0].process.pid
ray.init(address=cluster.address)

def kill():
    while not history.exists() or len(history.read_text().splitlines()) < 2:
        time.sleep(0.01)
    os.kill(raylet, signal.SIGKILL)

threading.Thread(target=kill, daemon=True).start()
print(train.run(config).json_line(), flush=True)
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.usefixtures("ray_cluster")
def test_a_training_goes_on_with_the_workers_that_are_left(tmp_path):
    config = tiny_config(tmp_path, *SETTINGS)
    for stage in (generate, ingest, build_sequences):
        stage.run(config)
    done = subprocess.run(
        [sys.executable, "-c", NODE_DIES, *TINY, *SETTINGS],
        cwd=ROOT,
        env={
            **os.environ,
            "NEXTITEM_HOME": str(tmp_path),
            "RAY_AUTH_MODE": "disabled",
            **QUICK_TO_NOTICE,
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["epochs"] == 8
    lines = (tmp_path / "synthetic" / "runs" / "survivor" / "history.jsonl").read_text()
    epochs = [json.loads(line)["epoch"] for line in lines.splitlines()]
    # It went on from a checkpoint: what came before the last one was not trained again.
    assert epochs[:2] == [1, 2]
    assert epochs.count(1) == 1
    assert [e["epoch"] for e in read_history(tmp_path / "synthetic/runs/survivor")] == list(
        range(1, 9)
    )
