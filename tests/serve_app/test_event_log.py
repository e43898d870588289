import asyncio
import sqlite3
import threading
from contextlib import closing, contextmanager

import pytest

from serve_app.errors import EventsUnavailableError
from serve_app.event_log import EventLog, LoggedEvent


def event(number, user_id="u1", **more):
    return LoggedEvent(f"e{number}", user_id, None, "i1", "view", 1, **more)


@pytest.fixture
def open_log(tmp_path):
    opened = []

    def open_it(**options):
        log = EventLog(tmp_path / "deep" / "log.sqlite", **options)
        opened.append(log)
        return log

    yield open_it
    for log in opened:
        log.close()


def append(log, *events):
    return asyncio.run(log.append(events))


def event_ids(log, position=0, limit=100):
    return [row.event.event_id for row in log.rows_after(position, limit)]


@contextmanager
def locked(log):
    """Another program writes, and does not end."""
    with closing(sqlite3.connect(log.file.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


def test_accepted_events_are_on_disk_before_the_answer(open_log):
    log = open_log()

    append(log, event(1))

    with closing(sqlite3.connect(log.file.path)) as other:
        assert other.execute("SELECT count(*) FROM events").fetchone() == (1,)
        assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    full = 2
    read = log.file.write(lambda connection: connection.execute("PRAGMA synchronous").fetchone())
    assert read.result() == (full,)


def test_same_event_twice_has_one_position(open_log):
    log = open_log()

    assert append(log, event(1), event(2), event(1)) == [1, 2, None]
    known, new = append(log, event(2), event(3))
    assert known is None
    assert new > 2
    assert event_ids(log) == ["e1", "e2", "e3"]


def test_log_is_read_in_order_of_arrival(open_log):
    log = open_log()
    first, second = append(log, event(1), event(2, price=1.5, quantity=2))

    assert [row.event for row in log.rows_after(first, 9)] == [event(2, price=1.5, quantity=2)]
    assert log.rows_after(second, 9) == []
    assert (log.last_position(), event_ids(log, limit=1)) == (second, ["e1"])


def test_requests_that_wait_together_share_one_commit(open_log):
    log = open_log(timeout_s=30)
    commits = []
    log.file.write(
        lambda connection: connection.set_trace_callback(
            lambda statement: commits.append(statement) if statement == "COMMIT" else None
        )
    ).result()
    commits.clear()

    async def append_together():
        with locked(log):
            waiting = [asyncio.ensure_future(log.append([event(n)])) for n in range(50)]
            await asyncio.sleep(0.2)
            assert not any(task.done() for task in waiting)
        return await asyncio.gather(*waiting)

    positions = asyncio.run(append_together())

    assert sorted(positions) == [[n] for n in range(1, 51)]
    # The first one may have gone ahead of the others.
    assert len(commits) <= 2


def test_broken_request_takes_no_other_with_it(open_log):
    log = open_log(timeout_s=30)
    broken = LoggedEvent("e2", "u1", None, {"not": "an id"}, "view", 2)

    async def append_together():
        with locked(log):
            requests = ([event(1)], [event(3), broken], [event(4)])
            waiting = [asyncio.ensure_future(log.append(events)) for events in requests]
            await asyncio.sleep(0.1)
        return await asyncio.gather(*waiting, return_exceptions=True)

    one, two, three = asyncio.run(append_together())

    assert (one, three) == ([1], [2])
    assert isinstance(two, sqlite3.Error)
    assert event_ids(log) == ["e1", "e4"]


def test_locked_file_is_told_after_the_bound_and_takes_events_again(open_log):
    log = open_log(timeout_s=0.2)

    with locked(log), pytest.raises(EventsUnavailableError, match=r"log.sqlite cannot be used"):
        append(log, event(1))

    assert append(log, event(1)) == [1]


def test_full_disk_is_told_and_leaves_nothing_behind(open_log):
    log = open_log()

    def bound(connection, pages):
        return connection.execute(f"PRAGMA max_page_count={pages}").fetchone()

    (pages,) = log.file.write(lambda connection: bound(connection, 1)).result()
    long = LoggedEvent("big", "u1", None, "i" * 100_000, "view", 1)

    with pytest.raises(EventsUnavailableError, match="full"):
        append(log, event(1), long)

    log.file.write(lambda connection: bound(connection, pages + 1000)).result()
    assert append(log, event(1), long) == [1, 2]


def test_broken_file_is_told(tmp_path):
    (tmp_path / "log.sqlite").write_bytes(b"no database" * 1000)

    with pytest.raises(EventsUnavailableError, match="not a database"):
        EventLog(tmp_path / "log.sqlite")


def test_several_processes_would_lose_nothing(open_log):
    logs = [open_log(timeout_s=60), open_log(timeout_s=60)]

    def write(worker):
        for number in range(20):
            append(logs[worker], event(f"{worker}-{number}"))

    threads = [threading.Thread(target=write, args=(worker,)) for worker in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(event_ids(logs[0])) == 40
    assert logs[0].name == logs[1].name


def test_closed_log_says_so(open_log):
    log = open_log()
    log.close()

    with pytest.raises(EventsUnavailableError, match="was closed"):
        append(log, event(1))


def test_erased_user_is_gone_from_the_log(open_log):
    log = open_log()
    append(log, event(1), event(2, "u2"), event(3))

    assert asyncio.run(log.erase("u1")) == 2
    assert event_ids(log) == ["e2"]


def test_cursors_never_go_back(open_log):
    log = open_log()

    log.advance("lake", 7)
    log.advance("lake", 3)

    assert (log.cursor("lake"), log.cursor("other")) == (7, 0)


def test_only_old_events_that_were_carried_on_are_pruned(open_log):
    log = open_log()
    append(log, *(event(n, received_us=n) for n in range(1, 6)))

    assert log.prune(before_us=9) == 0
    log.advance("lake", 4)
    assert log.prune(before_us=3) == 2
    assert event_ids(log) == ["e3", "e4", "e5"]
    assert log.prune(before_us=9) == 2
    assert append(log, event(6)) == [6]
