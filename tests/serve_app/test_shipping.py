import asyncio

import pyarrow.parquet as pq
import pytest

from serve_app import shipping
from serve_app.event_log import EventLog, LoggedEvent
from serve_app.shipping import Shipper


def event(number, **more):
    return LoggedEvent(
        f"e{number}", "u1", None, number, "view", 1_770_000_000_000_000 + number, **more
    )


@pytest.fixture
def log(tmp_path):
    log = EventLog(tmp_path / "log.sqlite")
    yield log
    log.close()


@pytest.fixture
def landing(tmp_path):
    return tmp_path / "deep" / "landing"


def append(log, *numbers):
    asyncio.run(log.append([event(number) for number in numbers]))


def landed_ids(landing):
    files = sorted(landing.glob("[!.]*"))
    return [pq.read_table(file)["event_id"].to_pylist() for file in files]


def test_what_waits_is_shipped_once_in_files_of_bounded_size(log, landing):
    append(log, 1, 2, 3)
    shipper = Shipper(log, str(landing), max_rows=2)

    assert (shipper.ship(), shipper.ship()) == (3, 0)
    append(log, 4)
    assert shipper.ship() == 1

    assert landed_ids(landing) == [["e1", "e2"], ["e3"], ["e4"]]
    assert not list(landing.glob(".*"))


def test_files_keep_what_is_known_of_an_event(log, landing):
    asyncio.run(log.append([event(1, device="tv", price=1.5, quantity=2, received_us=5)]))

    Shipper(log, f"file://{landing}").ship()

    (row,) = pq.read_table(next(landing.iterdir())).to_pylist()
    assert (row["item_id"], row["user_id"], row["session_id"]) == ("1", "u1", None)
    assert (row["device"], row["price"], row["quantity"]) == ("tv", 1.5, 2)
    assert row["timestamp"].isoformat() == "2026-02-02T02:40:00.000001+00:00"
    assert row["received_at"].microsecond == 5


def test_death_between_file_and_cursor_repeats_rows_and_loses_none(log, landing, monkeypatch):
    append(log, 1, 2)
    with monkeypatch.context() as patch:
        patch.setattr(log, "advance", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            Shipper(log, str(landing)).ship()
    append(log, 3)

    Shipper(log, str(landing)).ship()

    assert landed_ids(landing) == [["e1", "e2"], ["e1", "e2", "e3"]]


def test_file_that_was_not_finished_is_not_seen(log, landing, monkeypatch):
    append(log, 1)
    with monkeypatch.context() as patch:
        patch.setattr(shipping, "_sync", lambda path: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            Shipper(log, str(landing)).ship()
    assert landed_ids(landing) == []

    Shipper(log, str(landing)).ship()

    assert landed_ids(landing) == [["e1"]]
    assert not list(landing.glob(".*"))


def test_erased_user_does_not_leave(log, landing):
    append(log, 1)
    asyncio.run(log.erase("u1"))

    assert Shipper(log, str(landing)).ship() == 0


def test_one_process_ships_until_it_ends(log, landing):
    first = Shipper(log, str(landing), every_s=0.01)
    second = Shipper(log, str(landing), every_s=0.01)
    append(log, 1)

    assert first._lock.acquire()
    second.start()
    second.close()
    assert landed_ids(landing) == []

    first._lock.release()
    second = Shipper(log, str(landing), every_s=0.01)
    second.start()
    second.close()
    assert landed_ids(landing) == [["e1"]]


def test_many_events_do_not_wait_for_the_clock(log, landing):
    shipper = Shipper(log, str(landing), every_s=3600, max_rows=2)
    append(log, 1)
    assert not shipper._is_due()
    append(log, 2)
    assert shipper._is_due()


def test_landing_that_cannot_be_written_is_tried_again(log, tmp_path, caplog):
    (tmp_path / "landing").write_text("a file, and no folder")
    shipper = Shipper(log, str(tmp_path / "landing"), every_s=0.0)
    append(log, 1)

    assert not shipper._ship_if_due()
    assert "wait" in caplog.text
    (tmp_path / "landing").unlink()
    assert shipper._ship_if_due()

    assert landed_ids(tmp_path / "landing") == [["e1"]]


def test_shipped_events_are_pruned_when_they_are_old(log, landing):
    append(log, 1, 2)

    Shipper(log, str(landing), keep_days=1).ship()

    assert log.rows_after(0, 9) == []
    append(log, 3)
    Shipper(log, str(landing), keep_days=1e6).ship()
    assert len(log.rows_after(0, 9)) == 1


def test_what_waits_is_told_at_every_look_even_where_it_cannot_be_shipped(tmp_path):
    told = []
    log = EventLog(tmp_path / "log.sqlite", clock=lambda: 100.0)
    asyncio.run(log.append([event(1, received_us=40_000_000), event(2, received_us=90_000_000)]))
    (tmp_path / "taken").write_text("a file where the folder should be")
    blocked = Shipper(log, str(tmp_path / "taken"), every_s=0.0, on_backlog=told.append)
    shipper = Shipper(log, str(tmp_path / "landing"), every_s=0.0, on_backlog=told.append)

    assert not blocked._ship_if_due()
    blocked._lock.release()
    assert shipper._ship_if_due()
    assert shipper._ship_if_due()
    log.close()

    assert told == [(2, 60.0), (2, 60.0), (0, 0.0)]
