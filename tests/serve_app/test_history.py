import asyncio
import sqlite3
import threading

import pytest

from recsys.queries import Event
from serve_app.history import LoggedEvent, SeedRow, SqliteHistory


def event(number, item_id="i1", user_id="u1", timestamp_us=None, **more):
    at = number if timestamp_us is None else timestamp_us
    return LoggedEvent(f"e{number}", user_id, None, item_id, "view", at, **more)


@pytest.fixture
def open_history(tmp_path):
    opened = []

    def open_it(now_s=1.0):
        history = SqliteHistory(tmp_path / "deep" / "history.sqlite", clock=lambda: now_s)
        opened.append(history)
        return history

    yield open_it
    for history in opened:
        history.close_now()


def recent_items(history, user_id="u1", limit=50):
    events = asyncio.run(history.recent("user_id", user_id, limit))
    return [event.item_id for event in events]


def test_events_survive_a_reopening(open_history):
    history = open_history()
    asyncio.run(history.append([event(1, "i1"), event(2, 7, device="mobile")]))
    history.close_now()

    events = asyncio.run(open_history().recent("user_id", "u1", 50))

    assert events == (Event("i1", 1, "view", None), Event(7, 2, "view", "mobile"))


def test_accepted_events_are_on_disk_before_the_answer(open_history, tmp_path):
    history = open_history()

    asyncio.run(history.append([event(1)]))

    with sqlite3.connect(tmp_path / "deep" / "history.sqlite") as other:
        assert other.execute("SELECT count(*) FROM events").fetchone() == (1,)
        assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    other.close()
    (synchronous,) = history._writer.submit(
        lambda: history._connect().execute("PRAGMA synchronous").fetchone()
    ).result()
    assert synchronous == 2  # FULL


def test_same_event_twice_counts_once(open_history):
    history = open_history()

    first = asyncio.run(history.append([event(1), event(2), event(1, "other")]))
    again = asyncio.run(history.append([event(2), event(3)]))

    assert (first, again) == ([True, True, False], [False, True])
    assert recent_items(history) == ["i1", "i1", "i1"]


def test_recent_events_are_the_last_by_time_then_by_arrival(open_history):
    history = open_history()
    times = [5, 3, 5, 1]
    asyncio.run(
        history.append([event(n, f"i{n}", timestamp_us=time) for n, time in enumerate(times)])
    )

    assert recent_items(history, limit=3) == ["i1", "i0", "i2"]


def test_failed_write_leaves_nothing_behind(open_history):
    history = open_history()
    broken = LoggedEvent("e2", "u1", None, {"not": "an id"}, "view", 2)

    with pytest.raises(sqlite3.Error):
        asyncio.run(history.append([event(1), broken]))

    assert recent_items(history) == []
    assert asyncio.run(history.append([event(1)])) == [True]


def test_several_writers_lose_nothing(open_history):
    histories = [open_history(), open_history()]

    def write(worker):
        for number in range(20):
            asyncio.run(histories[worker].append([event(f"{worker}-{number}", timestamp_us=1)]))

    threads = [threading.Thread(target=write, args=(worker,)) for worker in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(recent_items(histories[0], limit=100)) == 40


def test_log_can_be_read_in_order_of_arrival(open_history):
    history = open_history()
    asyncio.run(history.append([event(1, timestamp_us=9), event(2, price=1.5, quantity=2)]))

    (first, second) = asyncio.run(history.events_after(0, 10))

    assert first[1].event_id == "e1"
    assert second[1] == event(2, price=1.5, quantity=2)
    assert asyncio.run(history.events_after(first[0], 10)) == [second]
    assert asyncio.run(history.events_after(second[0], 10)) == []


def seed(user_id, *items, start=1):
    times = range(start, start + len(items))
    return SeedRow(user_id, items, ["view"] * len(items), list(times), [None] * len(items))


def test_seeded_histories_come_before_events_and_once(open_history):
    history = open_history()
    history.load([seed("u1", "a", "b"), seed(2, "c")])
    asyncio.run(history.append([event(9, "d", timestamp_us=9), event(8, "b", timestamp_us=2)]))

    assert recent_items(history) == ["a", "b", "d"]
    assert recent_items(history, "2") == ["c"]
    assert recent_items(history, limit=2) == ["b", "d"]


def test_each_version_of_a_seed_is_loaded_once(open_history):
    history = open_history()

    counts = [
        history.load_once("one", lambda: [seed("u1", "a")]),
        history.load_once("one", lambda: [seed("u1", "never")]),
        history.load_once("two", lambda: [seed("u1", "b")]),
    ]

    assert counts == [1, 0, 1]
    assert recent_items(history) == ["b"]


def test_load_that_broke_off_is_done_again(open_history):
    history = open_history()

    def broken():
        yield seed("u1", "a")
        raise OSError("the disk went away")

    with pytest.raises(OSError, match="went away"):
        history.load_once("one", broken)

    assert history.load_once("one", lambda: [seed("u1", "a")]) == 1


def test_erased_user_does_not_come_back_with_the_next_seed(open_history):
    history = open_history(now_s=1.0)
    history.load([seed("u1", "a", "b")])
    asyncio.run(history.append([event(1, "c")]))

    assert asyncio.run(history.erase("u1")) == 3
    history.load([seed("u1", "a", "b"), seed("u2", "x")])

    assert recent_items(history) == []
    assert recent_items(history, "u2") == ["x"]
    history.load([seed("u1", "new", start=1_000_001)])
    assert recent_items(history) == ["new"]
