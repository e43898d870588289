"""Four weeks of a shop whose taste drifts and that gets new items: good weeks bring a better
version, poisoned ones are stopped before anything is trained.
"""

import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from data_lake.tables import open_table
from ray_jobs import build_sequences, evaluate, generate, ingest, publish, retrain, train, withdraw
from ray_jobs.config import PipelineConfig
from ray_jobs.errors import JobError
from recsys.artifact import read_manifest
from recsys.lineage import describe_version
from recsys.registry import Serving, promote, read_serving, serving_version
from tests.ray_jobs.conftest import tiny_config

pytestmark = [pytest.mark.ray, pytest.mark.slow]

START = datetime(2025, 1, 1, tzinfo=UTC)
SHOP = (
    "generate.num_users=2500",
    "generate.num_items=200",
    "generate.num_categories=12",
    "generate.mean_events_per_user=30",
    "generate.days=28",
    "generate.new_item_share=0.3",
    "generate.taste_drift=0.8",
    "train.recipe=sasrec-ce",
    "train.overrides={model={dim=32, max_len=20, num_layers=1}, batch_size=64}",
    "train.trainer={max_epochs=8, patience=3}",
    "train.num_workers=1",
    'evaluate.baselines=["popularity"]',
    "evaluate.max_users=3000",
    'export.variants=["fp32"]',
    "retrain.reference_weeks=2",
    # A machine under test is busy now and then; the ratio has tests of its own.
    "retrain.max_latency_ratio=5",
)


class Weeks:
    """The shop's raw events, delivered week by week."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.raw = home / "synthetic" / "raw"
        self.events = pq.read_table(self.raw / "events")
        for path in (self.raw / "events").iterdir():
            path.unlink()
        shutil.rmtree(self.raw / "events-dirty")
        times = self.events["timestamp"].cast(pa.int64()).to_numpy(zero_copy_only=False)
        start_us = START.timestamp() * 1_000_000
        self.week_T = (times - start_us) // (7 * 86_400_000_000)

    def of(self, week: int) -> pa.Table:
        """What came in a week, counted from 1."""
        return self.events.filter(pa.array(self.week_T == week - 1))

    def deliver(self, home: Path, week: int, rows: pa.Table) -> None:
        pq.write_table(rows, home / "synthetic" / "raw" / "events" / f"week-{week}.parquet")


def configure(home: Path, *overrides: str) -> PipelineConfig:
    config = tiny_config(home, *SHOP, *overrides)
    # Dirty rows have a folder of their own, which is not delivered by the week.
    clean = config.ingest.model_copy(update={"events": config.ingest.events[:1]})
    return config.model_copy(update={"ingest": clean})


def configure_week(home: Path, week: int, *overrides: str) -> PipelineConfig:
    """Four epochs from what serves, at the end of a week."""
    as_of = (START + timedelta(weeks=week)).isoformat()
    start = ("train.start.artifact=serving", "train.trainer.max_epochs=4")
    name = (f"retrain.name=week-{week}", f"retrain.as_of={as_of}")
    return configure(home, *start, *name, *overrides)


@pytest.fixture(scope="module")
def weeks(tmp_path_factory, ray_cluster):
    """Two weeks have passed, and the version that they taught serves."""
    home = tmp_path_factory.mktemp("weeks")
    config = configure(home)
    generate.run(config)
    weeks = Weeks(home)
    for week in (1, 2):
        weeks.deliver(home, week, weeks.of(week))
    first = retrain.move_split(config, START + timedelta(weeks=2))
    config = config.model_copy(update={"split": first})
    for stage in (ingest, build_sequences, train, evaluate, publish):
        stage.run(config)
    return weeks


def shuffle(rows: pa.Table) -> pa.Table:
    """The same items as often, on other rows."""
    order = np.random.default_rng(0).permutation(len(rows))
    place = rows.schema.get_field_index("item_id")
    return rows.set_column(place, "item_id", rows["item_id"].take(pa.array(order)))


def halve(rows: pa.Table) -> pa.Table:
    """Every other row has lost its user."""
    is_broken = pa.array(np.arange(len(rows)) % 2 == 0)
    place = rows.schema.get_field_index("user_id")
    users = pc.if_else(is_broken, pa.scalar(None, pa.int64()), rows["user_id"])
    return rows.set_column(place, "user_id", users)


def decimate(rows: pa.Table) -> pa.Table:
    """A tenth of the rows."""
    return rows.take(pa.array(np.arange(0, len(rows), 10)))


def read_report(home, name):
    return json.loads((home / "synthetic" / "retrains" / name / "report.json").read_text())


def deliver_poisoned(weeks, home, poison):
    """A copy of everything, in which the fourth week is poisoned."""
    shutil.copytree(weeks.home, home)
    weeks.deliver(home, 4, poison(weeks.of(4)))
    return configure_week(home, 4)


def files_of(registry):
    return {str(path.relative_to(registry)): path.read_bytes() for path in registry.rglob("*.json")}


def test_good_weeks_bring_better_versions_and_poisoned_ones_are_stopped(
    weeks, tmp_path, monkeypatch
):
    home = weeks.home
    root = home / "synthetic" / "registry"
    first = serving_version(root)

    weeks.deliver(home, 3, weeks.of(3))
    second = retrain.run(configure_week(home, 3)).figures["version"]
    assert read_serving(root) == Serving(first, {second: 0.05})
    assert read_report(home, "week-3")["passed"]
    check_lineage(home, second, first)
    promote(root, second)

    for poison, gate in ((shuffle, "agreement"), (halve, "quarantine"), (decimate, "volume-low")):
        copy = tmp_path / poison.__name__
        config = deliver_poisoned(weeks, copy, poison)
        with pytest.raises(JobError, match=f"stopped at the gate '{gate}'.*{second} serves on"):
            retrain.run(config)
        assert list(read_report(copy, "week-4")["steps"]) == ["ingest", "data"]
        assert files_of(copy / "synthetic" / "registry") == files_of(root)

    # The last of them is put right.
    taken_out = withdraw.run(configure_week(copy, 4, "withdraw.retrain=week-4"))
    came_in = read_report(copy, "week-4")["steps"]["ingest"]["figures"]["committed"]
    assert 0 < taken_out.figures["events_rows_withdrawn"] == came_in
    weeks.deliver(copy, 4, weeks.of(4))
    with monkeypatch.context() as patch:
        patch.setattr(build_sequences, "run", _die)
        with pytest.raises(RuntimeError, match="killed"):
            retrain.run(configure_week(copy, 4, "retrain.name=again"))

    weeks.deliver(home, 4, weeks.of(4))
    run = home / "synthetic" / "runs" / "retrain-week-4" / "run.json"
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "run", _die)
        with pytest.raises(RuntimeError, match="killed"):
            retrain.run(configure_week(home, 4))
    trained = run.read_bytes()
    third = retrain.run(configure_week(home, 4)).figures["version"]
    assert run.read_bytes() == trained
    assert read_serving(root) == Serving(second, {third: 0.05})
    assert read_manifest(root / third)["number"] == 3


def check_lineage(home, version, champion):
    """From the version back to the tables."""
    root = home / "synthetic" / "registry"
    found = describe_version(root, version, read_serving(root))
    assert found.started_from["version"] == found.retrain["champion"] == champion
    assert found.tables["events"] == open_table(f"{home}/synthetic/lake", "events").version()
    assert found.code["train"] == found.code["publish"]
    assert (found.number, found.run, found.recipe) == (2, "retrain-week-3", "sasrec-ce")
    assert all(gate["passed"] for gate in found.retrain["gates"])


def _die(config):
    raise RuntimeError("killed")
