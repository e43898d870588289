"""A canary's uplift, from the log of lists and the lake to the report."""

import json
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from data_lake.buckets import bucket_of
from data_lake.schemas import TIMESTAMP, events_schema
from data_lake.tables import commit_parts, create_table, open_table, write_part
from ray_jobs import experiment
from ray_jobs.config import PipelineConfig
from ray_jobs.errors import JobError
from ray_jobs.experiment import Arms, find_arms, judge, list_log, newest_event_us
from ray_jobs.online.experiment_report import describe, write_experiment
from ray_jobs.online.visitors import Period
from ray_jobs.sections.serving import ExperimentConfig
from recsys.artifact import MANIFEST
from recsys.attribution import Tally
from recsys.experiment import Moments
from recsys.registry import promote, read_serving
from serve_app.exposures import Exposure, ExposureLog
from serve_app.metrics import Metrics
from tests.conftest import START_US

HOUR_US = 3_600_000_000
NUM_USERS = 400
LISTS = 3
CLICKERS = {"v1": 3, "v2": 5}
"""Of ten users of a version so many click, each on the first of three lists."""
START = datetime.fromtimestamp(START_US / 1e6, UTC)


def pipeline(root, **chosen):
    return PipelineConfig(
        name="toy",
        storage={"root": str(root)},
        ingest={"events": [{"path": "none", "format": "csv", "columns": {}}]},
        experiment=chosen,
    )


@pytest.fixture
def registry(tmp_path):
    """v1 serves, and v2 to half of the visitors."""
    root = tmp_path / "registry"
    for version in ("v0", "v1", "v2"):
        (root / version).mkdir(parents=True)
        (root / version / MANIFEST).write_text("{}")
    promote(root, "v1")
    promote(root, "v2", 0.5)
    return root


def write_events(lake, rows):
    """Rows (user, item, type, time)."""
    schema = events_schema("int64", "int64")
    table = create_table(lake, "events", schema, num_buckets=2)
    users, items, types, times = (list(column) for column in zip(*rows, strict=True))
    count = len(rows)
    moments = pa.array(times, pa.int64()).cast(TIMESTAMP)
    columns = {
        "event_id": [f"e{n}" for n in range(count)],
        "user_id": users,
        "item_id": items,
        "event_type": types,
        "timestamp": moments,
        "ingested_at": moments,
        "arrival": list(range(count)),
    }
    fields = [field for field in schema if field.name in columns]
    table_rows = pa.table(columns, schema=pa.schema(fields))
    buckets = bucket_of(table_rows["user_id"], 2)
    parts = [
        write_part(lake, "events", table_rows.filter(pa.array(buckets == bucket)), bucket)
        for bucket in range(2)
    ]
    commit_parts(table, parts)


@pytest.fixture
def shop(tmp_path, registry):
    """Lists as serving logs them, and the events that followed."""
    serving = read_serving(registry)
    versions = {user: serving.choose(f"user {user}") for user in range(NUM_USERS)}
    log = ExposureLog(str(tmp_path / "exposures"), Metrics(), every_s=3600)

    def show(user, version, at_us, *, degraded=False):
        name = None if user is None else str(user)
        items = ("1", "2", "3")
        log.add(Exposure("r", name, None, at_us, version, "model", degraded, items))

    done = []
    for user, version in versions.items():
        for number in range(LISTS):
            show(user, version, START_US + number * HOUR_US)
        if user % 10 < CLICKERS[version]:
            done.append((user, 2, "click", START_US + HOUR_US // 2))
        if user % 20 == 0:
            done.append((user, 3, "purchase", START_US + HOUR_US // 2))
        done.append((user, 9, "click", START_US + HOUR_US // 2))
    switched = next(user for user, version in versions.items() if version == "v1")
    show(switched, "v2", START_US + 5 * HOUR_US, degraded=True)
    show(None, "v1", START_US)
    show(1, "v0", START_US)
    # So far the lake knows; the window of the last list goes beyond.
    done.append((NUM_USERS + 1, 1, "view", START_US + 48 * HOUR_US))
    show(2, versions[2], START_US + 47 * HOUR_US, degraded=True)
    log.close()
    write_events(str(tmp_path / "lake"), done)
    return {
        version: [user for user, other in versions.items() if other == version and user != switched]
        for version in CLICKERS
    }


@pytest.mark.ray
def test_a_planted_uplift_is_found_and_told(tmp_path, shop, ray_cluster):
    report = experiment.run(pipeline(tmp_path, start=START, wanted_uplift=0.1))

    folder = tmp_path / "experiments" / "v2-over-v1"
    facts = json.loads((folder / "report.json").read_text())
    assert facts["users"] == {"control": len(shop["v1"]), "treatment": len(shop["v2"])}
    assert facts["lists"]["treatment"] == LISTS * len(shop["v2"])
    assert facts["left_out"] == {
        "users_of_both": 1,
        "lists_without_visitor": 1,
        "lists_too_young": 1,
        "lists_of_other_versions": 1,
    }
    assert facts["degraded_lists"] == {"control": 0, "treatment": 0}
    assert facts["treatment_share"] == 0.5
    assert not facts["sample_ratio"]["is_alarm"]

    shares = {
        version: np.mean([user % 10 < CLICKERS[version] for user in users])
        for version, users in shop.items()
    }
    clicks = facts["metrics"]["click_through"]
    assert clicks["control"] == pytest.approx(shares["v1"] / LISTS)
    assert clicks["relative"] == pytest.approx(shares["v2"] / shares["v1"] - 1)
    assert clicks["relative_low"] > 0
    assert facts["metrics"]["lists_per_user"]["difference"] == pytest.approx(0)
    buyers = np.mean([user % 20 == 0 for user in shop["v2"]])
    assert facts["metrics"]["conversion"]["treatment"] == pytest.approx(buyers)

    assert "beyond noise" in report.headline
    page = (folder / "report.html").read_text()
    assert "v2 over v1" in page
    assert page.count("<img") == 1
    told = (tmp_path / "metrics" / "experiment.prom").read_text()
    uplift = 'nextitem_experiment_uplift_ratio{data="toy",metric="click_through"} '
    assert float(told.partition(uplift)[2].split()[0]) == pytest.approx(clicks["relative"])
    assert 'nextitem_experiment_sample_ratio_alarm{data="toy"} 0.0' in told


def test_the_canary_of_the_registry_is_compared_with_its_champion(tmp_path, registry):
    assert find_arms(pipeline(tmp_path)) == Arms("v1", "v2", 0.5)
    promote(registry, "v0", 0.2)
    assert find_arms(pipeline(tmp_path, control="v0", treatment="v1")) == Arms(
        "v0", "v1", pytest.approx(0.3 / 0.5)
    )
    with pytest.raises(JobError, match="the canaries v2, v0; name experiment"):
        find_arms(pipeline(tmp_path))


def test_a_canary_that_became_champion_is_still_compared(tmp_path, registry):
    promote(registry, "v2")
    assert find_arms(pipeline(tmp_path)) == Arms("v1", "v2", 0.5)


def test_versions_that_never_served_together_need_a_share(tmp_path, registry):
    wanted = {"control": "v1", "treatment": "v0"}
    with pytest.raises(JobError, match="v1 and v0 served side by side; set"):
        find_arms(pipeline(tmp_path, **wanted))
    assert find_arms(pipeline(tmp_path, **wanted, treatment_share=0.3)) == Arms("v1", "v0", 0.3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"control": "v1"}, "give control and treatment, or neither"),
        ({"control": "v1", "treatment": "v1"}, "v1 cannot be compared with itself"),
        ({"start": START, "end": START}, "is not before end"),
        ({"name": "../up"}, "String should match pattern"),
    ],
)
def test_a_configuration_that_compares_nothing_is_refused(wrong, message):
    with pytest.raises(ValidationError, match=message):
        ExperimentConfig(**wrong)


def test_a_log_without_lists_says_how_to_get_some(tmp_path):
    (tmp_path / ".hidden.parquet").touch()
    with pytest.raises(JobError, match="serve with the setting `exposures` pointing there"):
        list_log(str(tmp_path), {})


def test_the_lake_is_asked_for_its_newest_event(tmp_path):
    lake = str(tmp_path / "lake")
    write_events(lake, [(1, 1, "view", START_US), (2, 1, "view", START_US + 5)])
    assert newest_event_us(open_table(lake, "events")) == START_US + 5
    empty = create_table(str(tmp_path), "events", events_schema("int64", "int64"), num_buckets=2)
    with pytest.raises(JobError, match="The lake has no events"):
        newest_event_us(empty)


PERIOD = Period("v1", "v2", START_US, START_US, START_US, HOUR_US, 0, ("click",), ("purchase",))


def test_only_files_written_since_the_start_may_hold_lists_of_the_period():
    hour = timedelta(hours=1)
    may_hold = [
        experiment._may_hold(SimpleNamespace(mtime=START + shift * hour), PERIOD)
        for shift in (-2, 0, 2)
    ]
    assert may_hold == [False, True, True]


def test_a_task_reads_a_bounded_part_of_the_log():
    files = {f"f{n}": SimpleNamespace(size=25 * 2**20) for n in range(5)}
    assert list(experiment._share_out(files)) == [["f0", "f1"], ["f2", "f3"], ["f4"]]
    small = {f"f{n}": SimpleNamespace(size=1) for n in range(1_001)}
    assert list(map(len, experiment._share_out(small))) == [1_000, 1]


def judged(control, treatment, share=0.5):
    """Facts on users of one list each, given as (users, of these clicked)."""

    def arm(num, clicked):
        rows = [[1, 1, n < clicked, 0, 0, n % 3, 0] for n in range(num)]
        return Moments.of(np.array(rows, float).reshape(-1, 7))

    found = Tally(arm(*control), arm(*treatment), last_us=START_US + 24 * HOUR_US)
    counts = {"too_young": 4, "without_visitor": 0, "of_other_versions": 0}
    return judge(ExperimentConfig(), Arms("v1", "v2", share), PERIOD, found, counts)


def test_no_uplift_is_told_where_users_are_missing(tmp_path):
    facts = judged((500, 100), (400, 160))
    assert facts["sample_ratio"]["is_alarm"]
    assert describe(facts) == (
        "no uplift can be read: v2 has 44.44% of the users instead of 50.00% (p = 0.0009)"
    )
    write_experiment(tmp_path, facts)
    assert "The arms have not their shares of the users." in (tmp_path / "report.md").read_text()


def test_metrics_without_any_success_are_reported_too(tmp_path):
    facts = judged((300, 0), (300, 0))
    assert facts["metrics"]["click_through"]["relative"] is None
    assert facts["metrics"]["click_through"]["days_needed"] is None
    json.dumps(facts, allow_nan=False)
    assert describe(facts) == "click_through +0.0000 of v2 over v1, within noise"
    assert experiment._report(facts, tmp_path).figures["detectable"] is None
    write_experiment(tmp_path, facts)


def test_an_arm_without_users_says_what_to_do():
    with pytest.raises(JobError, match="300 users saw only v1 and 1 only v2, 4 lists are too yo"):
        judged((300, 10), (1, 0))
