"""The search: what it refuses, what it leaves behind, and that it outlives its driver."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from benchmarks.training_ray import Size, write_sequences
from benchmarks.tune import open_data
from ray_jobs import train, tune
from ray_jobs.config import PipelineConfig
from ray_jobs.errors import ConfigError, JobError
from ray_jobs.job import load_config
from ray_jobs.locks import held
from ray_jobs.tuning.search import search
from ray_jobs.tuning.searchers import GridSearch
from ray_jobs.tuning.trials import TrialLog

ROOT = Path(__file__).parents[2]
SPACE = {
    "optimiser.learning_rate": {"kind": "log-uniform", "low": 1e-4, "high": 1e-2},
    "loss.kind": {"kind": "choice", "values": ["full-softmax", "sampled-softmax"]},
    "loss.negatives.num": {
        "kind": "integer",
        "low": 8,
        "high": 32,
        "when": {"loss.kind": ["sampled-softmax"]},
    },
}

DIMS = {"kind": "choice", "values": [8, 16]}


def make_config(root, *, max_epochs=3, train=(), **tune):
    trainer = {"max_epochs": max_epochs, "patience": 9, "validation_users": 100}
    sizes = {"dim": 16, "max_len": 16, "num_layers": 1}
    return PipelineConfig.model_validate(
        {
            "name": "tiny",
            "storage": {"root": str(root)},
            "ingest": {"events": [{"path": "-", "format": "parquet", "columns": {}}]},
            "train": {
                "context": {"categorical": ["device"], "time": []},
                "overrides": {"batch_size": 64, "model": sizes},
                "trainer": trainer,
                "num_workers": 1,
                "device": "cpu",
                **dict(train),
            },
            "tune": {
                "name": "first",
                "space": SPACE,
                "max_trials": 3,
                "grace_epochs": 1,
                "random_trials": 2,
                "confirm_seeds": 2,
                **tune,
            },
        }
    )


@pytest.fixture(scope="module")
def lake(tmp_path_factory):
    root = tmp_path_factory.mktemp("shop")
    write_sequences(root, Size(users=300, items=60, events=10))
    return root


@pytest.fixture
def root(lake, tmp_path):
    """A root of its own on the lake that all share."""
    (tmp_path / "lake").symlink_to(lake / "lake")
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {}}, "tune.space is empty"),
        (
            {"space": {"loss.calibration": {"kind": "uniform", "low": 0, "high": 1}}},
            "which is no recipe: full-softmax has no calibration; leave it out; take it out of the",
        ),
        (
            {"space": {"model.dim": {"kind": "choice", "values": [16, 17]}}},
            "which is no recipe: dim 17 is not divisible by num_heads 2",
        ),
        ({"searcher": "llm"}, "NEXTITEM_LLM_URL and NEXTITEM_LLM_MODEL is not set"),
    ],
)
def test_a_dry_run_refuses_what_no_trial_could_train(tmp_path, monkeypatch, changes, message):
    monkeypatch.delenv("NEXTITEM_LLM_URL", raising=False)
    monkeypatch.delenv("NEXTITEM_LLM_MODEL", raising=False)
    with pytest.raises(ConfigError, match=message):
        tune.preview(make_config(tmp_path, **changes))


def test_a_dry_run_tells_the_space(tmp_path):
    found = tune.preview(make_config(tmp_path))
    assert found == {"space": list(SPACE), "max_epochs": 3}


def test_a_path_that_no_recipe_has_is_refused_when_the_file_is_read(tmp_path):
    text = (ROOT / "ray_jobs/configs/synthetic.toml").read_text()
    space = '\n[tune.space."optimiser.rate"]\nkind = "uniform"\nlow = 0\nhigh = 1\n'
    (tmp_path / "shop.toml").write_text(text + space)
    message = r"tune.space: Value error, there is no 'optimiser.rate' in a recipe; optimiser has: "
    with pytest.raises(ConfigError, match=message):
        load_config(str(tmp_path / "shop.toml"))


def test_several_workers_need_a_group(tmp_path):
    assert make_config(tmp_path).tune.trains_in_trial
    assert not make_config(tmp_path, workers_per_trial=2).tune.trains_in_trial
    assert not make_config(tmp_path, launcher="ray-train").tune.trains_in_trial
    with pytest.raises(ValueError, match="launcher 'process' trains with one worker, and"):
        make_config(tmp_path, launcher="process", workers_per_trial=2)


def test_the_default_is_tried_where_the_space_holds_it(tmp_path):
    config = make_config(tmp_path)
    space = tune.read_space(config)
    default = {"optimiser.learning_rate": 2e-3, "loss.kind": "full-softmax"}
    assert tune.default_values(config, space) == default
    elsewhere = make_config(
        tmp_path, space={"optimiser.learning_rate": {"kind": "uniform", "low": 0.1, "high": 0.2}}
    )
    assert tune.default_values(elsewhere, tune.read_space(elsewhere)) is None
    assert tune.default_values(make_config(tmp_path, searcher="grid"), space) is None


def test_a_second_driver_of_the_same_search_is_refused(tmp_path):
    config = make_config(tmp_path, name="first")
    with (
        held(tmp_path / "tunes" / "first" / ".lock", "search of this name", "first"),
        pytest.raises(JobError, match=r"Another search of this name is under way: first, process"),
    ):
        tune.run(config)


def test_a_search_goes_on_with_what_it_began_with_alone(tmp_path):
    before = tune._what_must_stay(make_config(tmp_path))
    tune._keep_record(tmp_path, {}, before)
    again = tune._read_record(tmp_path)
    tune._keep_record(tmp_path, again, tune._what_must_stay(make_config(tmp_path, max_trials=99)))
    other = tune._what_must_stay(make_config(tmp_path, max_epochs=4, held_out_share=0.2))
    with pytest.raises(JobError, match=r"began with another max_epochs, tune.held_out_share; conf"):
        tune._keep_record(tmp_path, again, other)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_search_leaves_a_configuration_that_trains_its_winner(root):
    # At a rate of 1e30 the loss is not finite: that trial fails, and the others go on.
    rates = {"kind": "choice", "values": [2e-3, 1e30]}
    space = {"optimiser.learning_rate": rates, "model.dim": DIMS}
    config = make_config(
        root, max_epochs=2, space=space, searcher="grid", max_trials=4, confirm_seeds=1
    )
    report = tune.run(config)
    folder = root / "tunes" / "first"
    trials = TrialLog(folder / "trials.jsonl").read()
    assert [trial.ending for trial in trials].count("failed") == 2
    assert all("lower optimiser.learning_rate" in one.reason for one in trials if one.reason)
    assert report.figures["failed"] == 2
    counting = [trial for trial in trials if trial.counts]
    assert all(0 < trial.best.error < 0.1 for trial in counting)

    table = pq.read_table(folder / "trials.parquet")
    assert table["value.model.dim"].to_pylist() == [trial.values["model.dim"] for trial in trials]
    assert "<svg" not in (folder / "report.html").read_text()
    assert "Winner and default, trained to the end" in (folder / "report.html").read_text()
    assert len(list(folder.glob("ray/*/trial-*/events.out.tfevents*"))) == 4

    best = load_config(str(folder / "best.toml"))
    winner = max(counting, key=lambda trial: trial.objective)
    assert best.train.overrides["model"]["dim"] == winner.values["model.dim"]
    assert best.train.overrides["batch_size"] == 64
    assert train.preview(best) == {}


SEARCH = """
import sys
import ray
from ray_jobs import tune
from tests.ray_jobs.test_tune import make_config

ray.init(num_cpus=2, include_dashboard=True, object_store_memory=256 * 2**20)
config = make_config(
    sys.argv[1], max_epochs=6, max_trials=4, grace_epochs=6, searcher="random", confirm_seeds=1
)
print(tune.run(config).json_line())
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_search_whose_driver_was_killed_goes_on_and_loses_no_trial(root):
    log = TrialLog(root / "tunes" / "first" / "trials.jsonl")
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SEARCH, str(root)]
    nowhere = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    killed = subprocess.Popen(command, cwd=ROOT, env=environment, **nowhere)
    give_up_at = time.monotonic() + 60
    while all(trial.ending is None for trial in log.read()):
        assert killed.poll() is None, "the search ended before it could be killed"
        assert time.monotonic() < give_up_at
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    before = log.read()
    assert sum(trial.ending is not None for trial in before) < 4

    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    after = log.read()
    assert [trial.number for trial in after] == list(range(4))
    # What had ended stands as it was; what had not was tried again with the same values.
    for earlier, later in zip(before, after, strict=False):
        assert later.values == earlier.values
        assert later.ending is not None
        if earlier.ending is not None:
            assert later == earlier
    assert json.loads(done.stdout.splitlines()[-1])["trials"] == 4


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_group_that_falls_behind_is_stopped(root):
    rates = {"kind": "choice", "values": [4e-3, 1e-7]}
    config = make_config(
        root,
        space={"optimiser.learning_rate": rates},
        max_epochs=3,
        grace_epochs=2,
        reduction=2,
        max_concurrent=1,
        workers_per_trial=2,
        cpus_per_trial=2,
        confirm_seeds=1,
    )
    task, data = open_data(config)
    log = TrialLog(task.folder / "trials.jsonl")
    trials = search(task, data, GridSearch(tune.read_space(config), 2), log)
    assert [trial.ending for trial in trials] == ["finished", "stopped"]
    assert [epoch.epoch for epoch in trials[1].epochs] == [1, 2]
    assert all(trial.best.error > 0 for trial in trials)
