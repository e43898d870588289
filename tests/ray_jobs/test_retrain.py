"""The weekly loop without its jobs: steps, gates, resuming, the lock, and the report."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ray_jobs import retrain
from ray_jobs.errors import JobError
from ray_jobs.locks import held
from ray_jobs.retrain import Found, Step, configure, find_state, find_weeks, preview
from ray_jobs.retraining.gates import Verdict
from ray_jobs.retraining.state import Done, State, read_state, write_state
from ray_jobs.sections.models import StartConfig
from recsys.artifact import publish
from recsys.errors import ArtifactError
from recsys.registry import promote
from tests.conftest import write_artifact
from tests.ray_jobs.conftest import tiny_config

AS_OF = datetime(2026, 1, 29, tzinfo=UTC)
LIFT = {"lift": 0.1, "lift_low": 0.05, "lift_high": 0.15, "is_significant": True}
COMPARED = {
    "champion": "v1",
    "num_users": 1000,
    "num_targets_unknown_to_champion": 30,
    "metrics": {
        "NDCG@10": {"difference": 0.01, "difference_low": 0.0, "difference_high": 0.02, **LIFT}
    },
}


@pytest.fixture
def configure_home(tmp_path, shop):
    """A configuration with a registry in which v1 serves."""

    def write(folder):
        write_artifact(folder, shop=shop)

    root = tmp_path / "synthetic" / "registry"
    publish(root, "v1", write, {"trained_until_us": 0})
    publish(root, "v2", write, {})
    promote(root, "v1")
    return lambda *overrides: tiny_config(
        tmp_path, "retrain.as_of=2026-01-29T00:00:00Z", *overrides
    )


@pytest.fixture
def config(configure_home):
    return configure_home("retrain.name=w5")


@pytest.fixture
def taken(monkeypatch):
    """Steps that note that they were taken, instead of the real ones; `fails` and `closes` name one
    that raises and one whose gate is closed.
    """
    taken = {"steps": [], "fails": None, "closes": None}

    def make(name):
        def run(config, state):
            if taken["fails"] == name:
                raise OSError("no more disk")
            taken["steps"].append(name)
            passed = taken["closes"] != name
            verdict = Verdict(f"gate-{name}", passed, 0.25, 0.5, "A quarter was found.")
            return Found(COMPARED if name == "compare" else {"of": name}, (verdict,))

        return Step(name, f"what {name} does", run, (f"gate-{name}",))

    steps = tuple(make(name) for name in ("ingest", "data", "compare", "latency"))
    monkeypatch.setattr(retrain, "STEPS", steps)
    return taken


def metrics_of(tmp_path):
    text = (tmp_path / "synthetic" / "metrics" / "retrain.prom").read_text()
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    return {(s.name, s.labels.get("gate")): s.value for s in samples}


def test_all_steps_are_taken_once_and_all_gates_told(config, taken, tmp_path):
    report = retrain.run(config)
    assert taken["steps"] == ["ingest", "data", "compare", "latency"]
    assert report.figures["gain_ndcg10"] == 0.1
    assert report.figures["gate-data"] == 0.25
    found = metrics_of(tmp_path)
    assert found["nextitem_retrain_passed", None] == 1
    assert found["nextitem_retrain_gate_passed", "gate-latency"] == 1
    assert found["nextitem_challenger_ndcg10_gain_ratio", None] == 0.1
    own = {name for name, _ in found if name.startswith("nextitem_") and "job" not in name}
    assert own == {
        "nextitem_retrain_passed",
        "nextitem_retrain_gate_passed",
        "nextitem_challenger_ndcg10_gain_ratio",
    }


def test_a_finished_one_is_not_begun_again(config, taken):
    retrain.run(config)
    report = retrain.run(config)
    assert len(taken["steps"]) == 4
    assert "before; give retrain.name another value" in report.headline


def test_a_closed_gate_stops_it_for_good_with_a_report(config, taken, tmp_path):
    taken["closes"] = "data"
    for _ in range(2):
        with pytest.raises(JobError, match=r"'gate-data': A quarter was found. .* 0.5; v1 serves"):
            retrain.run(config)
    assert taken["steps"] == ["ingest", "data"]

    folder = tmp_path / "synthetic" / "retrains" / "w5"
    report = json.loads((folder / "report.json").read_text())
    assert (report["passed"], report["stopped_at"]) == (False, "gate-data")
    assert "CLOSED" in (folder / "report.html").read_text()
    assert "ray_jobs.withdraw with withdraw.retrain = w5 takes out" in report["outcome"]
    found = metrics_of(tmp_path)
    assert found["nextitem_retrain_passed", None] == 0
    assert found["nextitem_retrain_gate_passed", "gate-ingest"] == 1
    assert found["nextitem_retrain_gate_passed", "gate-data"] == 0
    assert ("nextitem_challenger_ndcg10_gain_ratio", None) not in found


def test_one_that_was_killed_goes_on_after_its_last_step(config, taken):
    taken["fails"] = "compare"
    with pytest.raises(OSError, match="no more disk"):
        retrain.run(config)
    taken["fails"] = None
    retrain.run(config)
    assert taken["steps"] == ["ingest", "data", "compare", "latency"]


def test_what_it_began_with_stays_when_another_version_serves(config, configure_home, taken):
    taken["fails"] = "data"
    with pytest.raises(OSError, match="no more disk"):
        retrain.run(config)
    promote(retrain._champion(config, State("", AS_OF, ".")).resolve(), "v2")
    later = configure_home("retrain.name=w5", "retrain.as_of=2026-02-02T00:00:00Z")
    assert (find_state(later).champion, find_state(later).as_of) == ("v1", AS_OF)
    assert find_state(configure_home("retrain.name=w6")).champion == "v2"


def test_a_second_one_at_the_same_time_is_refused_by_the_name_of_the_first(config, taken, tmp_path):
    with (
        held(tmp_path / "synthetic" / "retrains" / ".lock", "retraining", "first"),
        pytest.raises(JobError, match=r"under way: first, process \d+ on .*, since 20"),
    ):
        retrain.run(config)
    assert taken["steps"] == []
    retrain.run(config)


@pytest.mark.parametrize("share", [0.05, 1.0])
def test_a_promotion_that_was_not_noted_is_not_made_twice(configure_home, share):
    config = configure_home(f"retrain.canary_share={share}")
    state = State("w5", AS_OF, "v1").with_step("publish", Done({"version": "v2"}, (), 1.0))
    first = retrain._promote(config, state)
    assert first == retrain._promote(config, state)
    assert first.figures["champion"] == ("v2" if share == 1 else "v1")


def test_a_champion_that_took_over_meanwhile_is_compared_with_first(configure_home, tmp_path):
    state = State("w5", AS_OF, "v2").with_step("publish", Done({"version": "v2"}, (), 1.0))
    with pytest.raises(ArtifactError, match="v2 was compared with v2, and v1 serves by now"):
        retrain._promote(configure_home(), state)


def test_its_name_is_the_week_unless_it_is_given(configure_home):
    assert find_state(configure_home()).name == "2026-W05"


def test_a_dry_run_shows_the_plan(configure_home):
    config = configure_home('retrain.skip=["ingest"]')
    plan = preview(config)["plan"]
    assert (plan["name"], plan["champion"]) == ("2026-W05", "v1")
    assert plan["split"]["test_from"] == "2026-01-27T00:00:00Z"
    assert [step["step"] for step in plan["steps"]][:2] == ["data", "sequences"]
    assert "agreement" in plan["steps"][0]["gates"]
    assert {step["status"] for step in plan["steps"]} == {"to do"}


def test_every_step_reads_the_run_and_the_dates_of_this_retraining(configure_home):
    config = configure_home("train.start.artifact=serving", "train.start.new_events_only=false")
    found = configure(config, State("w5", AS_OF, "v1"))
    assert found.train.name == found.evaluate.run == found.export.run == found.publish.run
    assert found.train.start == StartConfig(artifact="v1", new_events_only=False)
    assert found.split.validation_from == AS_OF - timedelta(days=3)
    assert configure(configure_home(), State("w5", AS_OF, "v1")).train.start is None


def test_the_split_stays_as_it_is_when_asked(configure_home):
    config = configure_home()
    still = config.retrain.model_copy(update={"test_days": None})
    found = configure(config.model_copy(update={"retrain": still}), State("w5", AS_OF, "v1"))
    assert found.split == config.split


@pytest.mark.parametrize(
    ("champion", "num_new"),
    [
        ({"trained_until_us": (AS_OF - timedelta(days=9.9)).timestamp() * 1e6}, 1),
        ({"retrain": {"as_of": (AS_OF - timedelta(days=7)).isoformat()}}, 1),
        # The week between was refused, so it is new still.
        ({"retrain": {"as_of": (AS_OF - timedelta(days=14)).isoformat()}}, 2),
        ({"retrain": {"as_of": (AS_OF - timedelta(days=900)).isoformat()}}, 8),
        # A clock that was ahead.
        ({"retrain": {"as_of": (AS_OF + timedelta(days=2)).isoformat()}}, 1),
        ({}, 1),
    ],
)
def test_weeks_are_new_until_a_champion_has_learned_from_them(config, champion, num_new):
    weeks = find_weeks(config, AS_OF, champion)
    assert (weeks.num_new, weeks.num_reference) == (num_new, 4)
    assert weeks.until_us == AS_OF.timestamp() * 1e6


def test_a_state_is_read_as_it_was_written(tmp_path):
    done = Done({"a": 1}, (Verdict("g", True, None, 0.5, "Found."),), 1.5)
    state = State("w5", AS_OF, "v1").with_step("data", done)
    assert read_state(tmp_path) is None
    write_state(tmp_path, state)
    assert read_state(tmp_path) == state
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(JobError, match=r"state.json is damaged .* retrain.name another value"):
        read_state(tmp_path)


def test_a_report_has_the_weeks_the_comparison_and_what_to_do_next(tmp_path):
    weeks = {
        "rows_W": [90, 100, 110],
        "num_new": 1,
        "unknown_shares": [0.01],
        "divergences": [0.02],
        "agreements": [0.3],
        "reference_agreement": 0.4,
    }
    figures = {
        "data": {"weeks": weeks},
        "compare": COMPARED,
        "publish": {"version": "v2"},
        "canary": {"champion": "v1", "shares": {"v2": 0.05}},
    }
    state = State("w5", AS_OF, "v1")
    for name, found in figures.items():
        state = state.with_step(name, Done(found, (), 2.0))
    retrain.write_retrain_report(tmp_path, state, {"data": "the weeks"})
    text = (tmp_path / "report.md").read_text()
    assert "v2 meets 5% of the visitors beside v1; python -m ray_jobs.canary promotes it" in text
    assert "| newest, new | 90 | 0.010 | 0.020 | 0.300 |" in text
    assert "30 of them are on items that the champion does not know" in text
    assert "| NDCG@10 | +0.0100 [+0.0000, +0.0200] |" in text
    assert "| data: the weeks | 2.0 |" in text


def test_a_plan_without_a_champion_says_what_is_missing(tmp_path):
    planned = preview(tiny_config(tmp_path))
    assert planned["plan"] is None
    assert "serves yet; run ray_jobs.publish first" in planned["refused"]
