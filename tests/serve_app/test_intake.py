import asyncio
import time

import pytest

from serve_app.event_log import EventLog, LoggedEvent
from serve_app.history_stores.redis_history import RedisHistory
from serve_app.history_stores.sqlite_history import SqliteHistory
from serve_app.intake import Intake
from tests.serve_app.redis_server import running_redis


def event(number, user_id="u1"):
    return LoggedEvent(f"e{number}", user_id, None, number, "view", number, received_us=1)


@pytest.fixture(scope="module")
def server():
    with running_redis() as server:
        yield server


@pytest.fixture
def runner():
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture
def intake(runner, tmp_path, server):
    if server._process is None:
        server.start()
    server.flush()
    history = RedisHistory(server.url, timeout_s=20)
    intake = Intake(EventLog(tmp_path / "log.sqlite"), history, push_timeout_s=20)
    yield intake
    runner.run(intake.close())


def items(runner, intake):
    return [event.item_id for event in runner.run(intake.history.recent("user_id", "u1", 50))]


async def wait_for_items(intake, expected, timeout_s=30.0):
    end = time.monotonic() + timeout_s
    while True:
        found = [event.item_id for event in await intake.history.recent("user_id", "u1", 50)]
        if found == expected:
            return
        assert time.monotonic() < end, found
        await asyncio.sleep(0.05)


def test_event_is_in_the_history_when_it_is_accepted(runner, intake):
    assert runner.run(intake.accept([event(1), event(2), event(1)])) == [True, True, False]

    assert items(runner, intake) == [1, 2]


def test_history_that_is_down_does_not_hold_events_up_and_catches_up(runner, intake, server):
    async def go_through_an_outage():
        intake.start()
        await intake.accept([event(1)])
        server.kill()
        accepted = [await intake.accept([event(n)]) for n in range(2, 6)]
        server.start()  # it has lost what it held
        await wait_for_items(intake, [1, 2, 3, 4, 5])
        return accepted

    assert runner.run(go_through_an_outage()) == [[True]] * 4


def test_replay_goes_on_where_the_history_says(runner, intake):
    runner.run(intake.events.append([event(1), event(2)]))
    runner.run(intake.history.mark_pushed(intake.events.name, 1))

    assert runner.run(intake.replay()) == 1
    assert runner.run(intake.replay()) == 0
    assert items(runner, intake) == [2]


def test_one_process_replays_and_another_takes_over(runner, intake, tmp_path):
    runner.run(intake.events.append([event(1)]))

    async def follow():
        assert intake._lock.acquire()
        other = Intake(EventLog(tmp_path / "log.sqlite"), intake.history, push_timeout_s=20)
        other.start()
        await asyncio.sleep(0.2)
        assert await intake.history.recent("user_id", "u1", 9) == ()
        intake._lock.release()
        await wait_for_items(intake, [1])
        other._follower.cancel()
        other._lock.release()
        other.events.close()

    runner.run(follow())


def test_erased_user_is_gone_from_history_and_log(runner, intake):
    runner.run(intake.accept([event(1), event(2, "u2")]))

    assert runner.run(intake.erase("u1")) == 1

    assert items(runner, intake) == []
    assert [row.event.user_id for row in intake.events.rows_after(0, 9)] == ["u2"]


def test_log_that_is_the_history_needs_no_second_write(runner, tmp_path):
    log = EventLog(tmp_path / "log.sqlite")
    intake = Intake(log, SqliteHistory(log))
    commits = []
    log.file.write(
        lambda connection: connection.set_trace_callback(
            lambda statement: commits.append(statement) if statement == "COMMIT" else None
        )
    ).result()
    commits.clear()

    runner.run(intake.accept([event(1), event(2)]))

    assert len(commits) == 1
    assert items(runner, intake) == [1, 2]
    runner.run(intake.close())
