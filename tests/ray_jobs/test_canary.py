"""A canary ends by itself: by rules on what was seen, and from the log of lists to the registry."""

import json
import re
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from ray_jobs import canary
from ray_jobs.config import PipelineConfig
from ray_jobs.errors import JobError
from ray_jobs.online.canary_rules import Look, decide, look_at
from ray_jobs.online.canary_state import open_watch, write_watch
from ray_jobs.registry import main as registry_main
from ray_jobs.sections.serving import CanaryConfig
from recsys.artifact import MANIFEST
from recsys.attribution import Tally
from recsys.experiment import Moments
from recsys.metrics import Interval
from recsys.registry import Serving, promote, read_decisions, read_serving
from recsys.sequential import Gap, check_ratio_again
from serve_app.exposures import Exposure, ExposureLog
from serve_app.metrics import Metrics
from tests.conftest import START_US
from tests.ray_jobs.test_experiment import write_events

HOUR_US = 3_600_000_000
START = datetime.fromtimestamp(START_US / 1e6, UTC)
NUM_USERS = 2000
LIMITS = CanaryConfig()


def gap(low, high, mean=None):
    middle = (low + high) / 2 if mean is None else mean
    return Gap(0.1, 0.1 + middle, Interval(middle, low, high))


OPEN = gap(-0.01, 0.02)


def seen(clicks=OPEN, conversion=OPEN, degraded=OPEN, *, days=1.0, users=(950, 50)):
    ratio = check_ratio_again(*users, 0.05)
    return Look(days, ratio, degraded, {"click_through": clicks, "conversion": conversion})


@pytest.mark.parametrize(
    ("look", "decision", "reason"),
    [
        (
            seen(),
            "wait",
            r"click_through is \+5.00 % \[-10.00, \+20.00\] from the bar, which leaves",
        ),
        (seen(None), "wait", "too few visitors yet"),
        (seen(gap(0.001, 0.03)), "promote", "which is over the bar"),
        (seen(gap(-0.03, -0.001)), "roll back", "click_through .* below the bar"),
        (seen(gap(0.001, 0.03), gap(-0.03, -0.001)), "roll back", "conversion .* below the bar"),
        (seen(gap(0.001, 0.03), gap(0.001, 0.03), gap(0.03, 0.2)), "roll back", "a lower rung"),
        (seen(gap(0.001, 0.03), users=(9500, 300)), "roll back", "3.06% of the visitors"),
        (seen(degraded=gap(0.01, 0.2)), "wait", "leaves it open"),
        (seen(gap(-0.01, 0.02), days=6), "promote", "6 days are over, and click_through is"),
        (seen(gap(-0.02, 0.01), days=6), "roll back", "6 days are over, and click_through is"),
        (seen(None, days=6), "roll back", "with too few visitors to say anything"),
    ],
)
def test_what_is_seen_decides(look, decision, reason):
    verdict = decide(look, LIMITS)
    assert verdict.decision == decision
    assert re.search(reason, verdict.reason)


@pytest.mark.parametrize("at_end", ["promote", "roll back"])
def test_at_the_end_the_configured_decision_is_taken(at_end):
    verdict = decide(seen(None, days=6), CanaryConfig(at_end=at_end))
    assert verdict.decision == at_end
    assert verdict.reason == f"6 days are over, which is configured to {at_end}."


def test_a_fault_is_no_end_to_be_promoted_at():
    broken = seen(degraded=gap(0.03, 0.2), days=99)
    assert decide(broken, CanaryConfig(at_end="promote")).decision == "roll back"


def arm(num_users, clicked_share, degraded_share=0.0):
    """Users of two lists each; a share of them clicks on one and buys from it."""
    is_clicked = np.arange(num_users) < clicked_share * num_users
    is_degraded = np.arange(num_users) < degraded_share * num_users
    rows = [
        [1, 2, clicked, clicked, clicked, 0, 2 * degraded]
        for clicked, degraded in zip(is_clicked, is_degraded, strict=True)
    ]
    return Moments.of(np.array(rows, float))


def test_a_look_measures_all_lists_for_faults_and_old_ones_for_clicks():
    shown = Tally(arm(9500, 0), arm(500, 0, degraded_share=1))
    look = look_at(Tally(arm(950, 0.5), arm(50, 0.5)), shown, 0.05, 0.1, LIMITS)
    assert look.degraded.treatment == 1
    assert look.gaps["click_through"].interval.mean == pytest.approx(0)
    assert not look.ratio.is_alarm
    assert decide(look, LIMITS).decision == "roll back"
    json.dumps(look.facts(), allow_nan=False)


def pipeline(root, **chosen):
    return PipelineConfig(
        name="toy",
        storage={"root": str(root)},
        ingest={"events": [{"path": "none", "format": "csv", "columns": {}}]},
        canary=chosen,
    )


@pytest.fixture
def registry(tmp_path):
    """v1 serves, and v2 to half of the visitors."""
    root = tmp_path / "registry"
    for version in ("v0", "v1", "v2"):
        (root / version).mkdir(parents=True)
        (root / version / MANIFEST).write_text('{"format": 1}')
        (root / version / "metrics.json").write_text("{}")
        (root / version / "config.json").write_text("{}")
    promote(root, "v1")
    promote(root, "v2", 0.5)
    return root


@pytest.fixture
def shop(tmp_path, registry):
    """`shop(clickers)`: lists as serving logs them; of ten users of a version so many click."""

    def show(clickers):
        serving = read_serving(registry)
        log = ExposureLog(str(tmp_path / "exposures"), Metrics(), every_s=3600)
        done = []
        for user in range(NUM_USERS):
            version = serving.choose(f"user {user}")
            items = ("1", "2", "3")
            log.add(Exposure("r", str(user), None, START_US, version, "model", False, items))
            if user % 10 < clickers[version]:
                done.append((user, 2, "click", START_US + HOUR_US // 2))
        log.close()
        # So far the lake knows.
        done.append((NUM_USERS + 1, 1, "view", START_US + 48 * HOUR_US))
        write_events(str(tmp_path / "lake"), done)

    return show


@pytest.mark.ray
@pytest.mark.parametrize(
    ("clickers", "decision", "serving"),
    [
        ({"v1": 3, "v2": 5}, "promote", Serving("v2")),
        ({"v1": 5, "v2": 3}, "roll back", Serving("v1")),
    ],
)
def test_a_canary_ends_as_its_visitors_say(
    tmp_path, registry, shop, ray_cluster, clickers, decision, serving
):
    shop(clickers)
    config = pipeline(tmp_path, start=START, max_days=10_000)
    (would,) = canary.preview(config)["canaries"]
    assert would["decision"] == decision
    assert read_serving(registry) == Serving("v1", {"v2": 0.5})
    assert not (tmp_path / "canaries").exists()

    report = canary.run(config)

    assert report.headline == f"{decision}: v2"
    assert read_serving(registry) == serving
    (noted,) = read_decisions(registry, "v2")
    assert (noted["decision"], noted["champion"]) == (decision, "v1")
    told = (tmp_path / "metrics" / "canary.prom").read_text()
    code = {"promote": 1, "roll back": -1}[decision]
    assert f'nextitem_canary_decision{{data="toy",version="v2"}} {code}.0' in told
    assert canary.run(config).headline == "no canary serves"


@pytest.mark.ray
def test_a_canary_of_which_nothing_is_known_yet_is_waited_for(
    tmp_path, registry, shop, ray_cluster
):
    shop({"v1": 3, "v2": 5})
    for _ in range(2):
        assert canary.run(pipeline(tmp_path)).headline == "wait: v2"
    (kept,) = (tmp_path / "canaries").iterdir()
    looks = json.loads(kept.read_text())["looks"]
    assert [look["users_canary"] for look in looks] == [0, 0]
    assert read_serving(registry) == Serving("v1", {"v2": 0.5})
    assert read_decisions(registry, "v2") == []


def test_a_dry_run_without_a_canary_needs_no_ray(tmp_path, registry):
    promote(registry, "v2")
    assert canary.preview(pipeline(tmp_path)) == {"canaries": []}
    refused = canary.preview(pipeline(tmp_path / "nothing"))["refused"]
    assert "run ray_jobs.publish first" in refused


def test_a_watch_goes_on_until_it_is_over_or_its_share_changes(tmp_path):
    config, now = pipeline(tmp_path), START
    serving = Serving("v1", {"v2": 0.1, "v3": 0.4})
    watch = open_watch(config, serving, "v2", now)
    assert watch.share == pytest.approx(0.1 / 0.6)
    assert watch.start_us == START_US + 600_000_000
    write_watch(config, watch.with_look({"decision": "wait"}))

    later = now + timedelta(days=1)
    again = open_watch(config, serving, "v2", later)
    assert again.start_us == watch.start_us
    assert again.days_until(later) == pytest.approx(1 - 1 / 144)
    moved = open_watch(config, Serving("v1", {"v2": 0.2}), "v2", later)
    assert moved.start_us > later.timestamp() * 1e6
    write_watch(config, again.with_look({"decision": "roll back"}))
    assert open_watch(config, serving, "v2", later).looks == ()


def test_a_damaged_watch_says_what_to_do(tmp_path):
    (tmp_path / "canaries").mkdir()
    (tmp_path / "canaries" / "v2-over-v1.json").write_text("{")
    with pytest.raises(JobError, match=r"is damaged .* delete it, and the comparison begins anew"):
        open_watch(pipeline(tmp_path), Serving("v1", {"v2": 0.1}), "v2", START)


def test_looks_need_a_folder():
    config = pipeline("s3://shop")
    with pytest.raises(JobError, match=r"kept in a folder, not in s3://shop; set storage\.root"):
        open_watch(config, Serving("v1", {"v2": 0.1}), "v2", START)


def test_the_registry_shows_what_became_of_a_canary(tmp_path, registry, capsys):
    watch = open_watch(pipeline(tmp_path), read_serving(registry), "v2", START)
    look = seen(gap(-0.03, -0.001))
    judged = canary.Judged(watch, look, decide(look, LIMITS), START)
    canary._carry_out(registry, judged)
    assert read_serving(registry) == Serving("v1")

    path = tmp_path / "toy.toml"
    path.write_text(
        f'name = "toy"\n[storage]\nroot = "{tmp_path}"\n'
        '[[ingest.events]]\npath = "none"\nformat = "csv"\ncolumns = {}\n'
    )
    registry_main(["show", "v2", "--config", str(path)])
    assert "roll back; click_through is -15.50 %" in capsys.readouterr().out
