"""A broken delivery leaves the lake, and its corrected files come in."""

from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest

from data_lake.errors import ConflictError
from data_lake.sequences import SequencesConfig
from data_lake.tables import commit_parts
from data_lake.withdrawal import Delivery
from data_lake.withdrawal import withdraw as withdraw_rows
from ray_jobs import build_sequences, ingest, withdraw
from ray_jobs.errors import JobError
from ray_jobs.retraining.gates import Verdict
from ray_jobs.retraining.state import Done, State, retrains_folder, write_state
from ray_jobs.sections.upkeep import WithdrawConfig
from tests.ray_jobs.test_ingest import counts, pipeline, read, write_csv

GOOD = ("u1,i1,view,1000000000", "u2,i2,view,1000000001")
BROKEN = ("u1,i7,view,1000000002", "u3,i7,view,1000000003", ",i7,view,1000000004")
CORRECTED = ("u1,i7,view,1000000002", "u3,i9,view,1000000003", "u4,i7,view,1000000004")
LATER = ("u2,i4,view,1000000005",)


def chosen(**named):
    return pipeline().model_copy(update={"withdraw": WithdrawConfig(**named)})


def keeping_all():
    """Users of one event have a sequence too."""
    return pipeline().model_copy(update={"sequences": SequencesConfig(min_user_events=1)})


def pairs(home):
    return sorted((row["user_id"], row["item_id"]) for row in read(home, "events"))


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """An empty shop below `$SHOP`."""
    monkeypatch.setenv("SHOP", str(tmp_path))
    (tmp_path / "events").mkdir()
    return tmp_path


@pytest.fixture
def broken(shop, ray_cluster):
    """A lake with a good file, then a broken one."""
    for name, lines in (("1.csv", GOOD), ("2.csv", BROKEN)):
        write_csv(shop / "events" / name, lines)
        ingest.run(pipeline())
    return shop


@pytest.mark.ray
def test_a_broken_file_leaves_and_its_correction_comes_in(broken):
    build_sequences.run(keeping_all())
    config = chosen(files=["2.csv"])
    would = withdraw.preview(config)
    assert (would["files"], would["events_rows"], would["quarantine_rows"]) == (1, 2, 1)
    assert len(read(broken, "events")) == 4

    report = withdraw.run(config)

    assert report.headline == "3 rows of 1 files withdrawn"
    assert pairs(broken) == [("u1", "i1"), ("u2", "i2")]
    assert read(broken, "quarantine") == []
    assert withdraw.run(config).headline.startswith("0 rows")
    build_sequences.run(keeping_all())
    assert {row["user_id"]: row["item_ids"] for row in read(broken, "sequences")} == {
        "u1": ["i1"],
        "u2": ["i2"],
    }

    assert ingest.run(pipeline()).figures["files"] == 0  # its bytes are known
    write_csv(broken / "events" / "2.csv", CORRECTED)
    assert counts(ingest.run(pipeline())) == (3, 3, 0, 0)
    assert pairs(broken)[1:] == [("u1", "i7"), ("u2", "i2"), ("u3", "i9"), ("u4", "i7")]


@pytest.mark.ray
def test_what_another_run_brings_in_between_stays(broken, monkeypatch):
    def withdraw_beside_an_ingest(lake_uri, name, *rest):
        if name == "events":
            write_csv(broken / "events" / "3.csv", LATER)
            ingest.run(pipeline())
        return withdraw_rows(lake_uri, name, *rest)

    monkeypatch.setattr(withdraw, "withdraw", withdraw_beside_an_ingest)
    withdraw.run(chosen(files=["2.csv"]))
    assert pairs(broken) == [("u1", "i1"), ("u2", "i2"), ("u2", "i4")]


@pytest.mark.ray
def test_a_run_that_was_killed_between_the_tables_goes_on(broken, monkeypatch):
    def withdraw_until_killed(lake_uri, name, *rest):
        if name == "events":
            raise KeyboardInterrupt
        return withdraw_rows(lake_uri, name, *rest)

    config = chosen(files=["2.csv"])
    monkeypatch.setattr(withdraw, "withdraw", withdraw_until_killed)
    with pytest.raises(KeyboardInterrupt):
        withdraw.run(config)
    monkeypatch.setattr(withdraw, "withdraw", withdraw_rows)
    assert (len(read(broken, "events")), read(broken, "quarantine")) == (4, [])
    assert withdraw.run(config).figures["events_rows_withdrawn"] == 2
    assert len(read(broken, "events")) == 2


@pytest.mark.ray
def test_an_ingest_that_lost_to_a_withdrawal_is_told_to_run_again(broken, monkeypatch):
    def commit_after_a_withdrawal(table, parts, **rest):
        monkeypatch.setattr(ingest, "commit_parts", commit_parts)
        withdraw.run(chosen(files=["2.csv"]))
        return commit_parts(table, parts, **rest)

    write_csv(broken / "events" / "3.csv", CORRECTED)
    monkeypatch.setattr(ingest, "commit_parts", commit_after_a_withdrawal)
    with pytest.raises(ConflictError, match=r"Rows were withdrawn .* run this job again"):
        ingest.run(pipeline())
    # Of what the broken file had too nothing is missing then.
    assert counts(ingest.run(pipeline())) == (3, 3, 0, 0)


@pytest.mark.ray
def test_what_came_in_is_listed_where_nothing_is_named(broken):
    delivered = withdraw.preview(pipeline())["delivered"]
    assert [one["file"].rpartition("/")[2] for one in delivered] == ["2.csv", "1.csv"]
    run = datetime.fromisoformat(delivered[0]["run"])
    assert [one.path for one in withdraw.choose(chosen(run=run))] == [delivered[0]["file"]] * 2


@pytest.mark.ray
def test_a_refused_retraining_names_what_its_ingest_brought(broken):
    (brought, _) = withdraw.preview(pipeline())["delivered"]
    refuse(figures={"files": 1, "ingested_at": brought["run"]})
    would = withdraw.preview(chosen(retrain="w1"))
    assert (would["files"], would["events_rows"]) == (1, 2)


@pytest.mark.ray
def test_rows_that_a_run_which_was_cut_short_put_into_quarantine_go_too(
    shop, ray_cluster, monkeypatch
):
    def be_killed(*arguments):
        raise KeyboardInterrupt

    write_csv(shop / "events" / "2.csv", BROKEN)
    with monkeypatch.context() as patch:
        patch.setattr(ingest, "_commit_events", be_killed)
        with pytest.raises(KeyboardInterrupt):
            ingest.run(pipeline())
    run = datetime.fromisoformat(ingest.run(pipeline()).figures["ingested_at"])
    assert len(read(shop, "quarantine")) == 1

    assert withdraw.run(chosen(run=run)).figures["quarantine_rows_withdrawn"] == 1
    assert read(shop, "quarantine") == read(shop, "events") == []


def refuse(figures, *, passed=False):
    """Notes a retraining whose data passed a gate, or did not."""
    verdict = Verdict("volume-low", passed, 0.1, 0.5, "few events")
    steps = {"ingest": Done(figures, (), 1.0), "data": Done({}, (verdict,), 1.0)}
    state = State("w1", datetime(2026, 1, 5, tzinfo=UTC), "v1", steps)
    write_state(retrains_folder(pipeline()) / "w1", state)
    return state


def test_a_retraining_that_was_not_refused_gives_nothing_up(shop):
    refuse({"files": 1, "ingested_at": "2026-01-05T00:00:00+00:00"}, passed=True)
    with pytest.raises(JobError, match="w1 was not refused by a gate of its data"):
        withdraw.run(chosen(retrain="w1"))


def test_a_retraining_that_brought_no_files_says_where_to_look(shop):
    refuse({"files": 0, "ingested_at": "2026-01-05T00:00:00+00:00"})
    with pytest.raises(JobError, match=r"w1 brought no files, .* --dry-run lists what came in"):
        withdraw.run(chosen(retrain="w1"))


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({}, "Nothing is named to be withdrawn; set withdraw.retrain"),
        ({"retrain": "w9"}, "There is no retraining 'w9' below"),
        ({"files": ["x.csv"]}, r"No file that was ingested fits withdraw.files = \['x.csv'\]"),
    ],
)
def test_what_cannot_be_found_is_said(shop, named, message):
    with pytest.raises(JobError, match=message):
        withdraw.run(chosen(**named))


def test_served_events_are_named_by_their_folder_alone(shop):
    config = chosen(files=["*.csv"])
    landing = Delivery(config.storage.landing_uri, "", 0, 1, 0)
    file = replace(landing, path="/data/2.csv")

    def is_chosen(one, **named):
        return withdraw._is_named(one, chosen(**named))

    assert is_chosen(file)
    assert not is_chosen(landing)
    assert is_chosen(landing, files=["landing"])
    assert is_chosen(file, files=["/data/*.csv"])
    assert not is_chosen(landing, files=["*.csv"])


def test_files_that_serving_shipped_are_one_delivery():
    def file(folder, name, num_parts):
        source = SimpleNamespace(path=folder)
        return SimpleNamespace(
            source=source, path=f"{folder}/{name}", digest=name, parts=[0] * num_parts
        )

    given = SimpleNamespace(
        files=[file("/d", "a", 2), file("/landing", "1", 1), file("/landing", "2", 3)],
        landing_uri="/landing",
        target=SimpleNamespace(started_us=5),
    )
    assert ingest._deliveries(given) == [
        Delivery("/d/a", "a", 0, 2, 5),
        Delivery("/landing", "", 2, 4, 5),
    ]
