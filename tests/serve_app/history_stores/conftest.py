"""Each store over a log of its own, as the contract's tests use it."""

import asyncio
import shutil
from pathlib import Path

import pytest

from serve_app.event_log import EventLog, LoggedEvent, LogRow
from serve_app.history_stores.opening import open_store
from serve_app.history_stores.store import SeedRow
from tests.serve_app.redis_server import running_redis

REPOSITORY = Path(__file__).parents[3] / "cluster" / "feast"
KINDS = ("sqlite", "redis", "feast")


@pytest.fixture(scope="session")
def redis_server():
    with running_redis() as server:
        yield server


@pytest.fixture
def feast_repo(tmp_path, monkeypatch):
    """The repository as it comes, writing below the test's own folder."""
    monkeypatch.setenv("NEXTITEM_HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "feast").mkdir(parents=True)
    return Path(shutil.copytree(REPOSITORY, tmp_path / "feast"))


@pytest.fixture
def address(request, tmp_path):
    """Where the store of a kind is, fetched only for the kind that needs it."""

    def of(kind):
        if kind == "redis":
            server = request.getfixturevalue("redis_server")
            server.flush()
            return {"redis_url": server.url}
        if kind == "feast":
            return {"feast_repo": request.getfixturevalue("feast_repo")}
        return {}

    return of


class Opened:
    """A store and its log on one event loop, synchronous; the clock stands still."""

    def __init__(self, kind, path, address, **options):
        self.now_s = 1.0
        self.runner = asyncio.Runner()
        self.log = EventLog(path, clock=lambda: self.now_s)
        self.store = open_store(kind, log=self.log, timeout_s=30, **address, **options)
        self.store._clock = lambda: self.now_s

    def append(self, *events):
        """Rows of the events that are new."""
        positions = self.runner.run(self.log.append(events))
        pairs = zip(positions, events, strict=True)
        return [LogRow(position, event) for position, event in pairs if position is not None]

    def push(self, rows):
        self.runner.run(self.store.push(rows))

    def add(self, *events):
        self.push(self.append(*events))

    def recent(self, name="u1", limit=50, owner="user_id"):
        return self.runner.run(self.store.recent(owner, name, limit))

    def items(self, *arguments, **named):
        return [event.item_id for event in self.recent(*arguments, **named)]

    def erase(self, user_id):
        return self.runner.run(self.store.erase(user_id))

    def close(self):
        self.runner.run(self.store.close())
        self.log.close()
        self.runner.close()


@pytest.fixture
def open_kind(tmp_path, address):
    """Opens a store of a kind; the second of a kind finds what the first has left."""
    opened = []
    addresses = {}

    def open_it(kind, **options):
        known = addresses.setdefault(kind, address(kind) if kind not in addresses else None)
        store = Opened(kind, tmp_path / f"{kind}.sqlite", known, **options)
        opened.append(store)
        return store

    yield open_it
    for store in opened:
        store.close()


def event(number, item_id="i1", user_id="u1", session_id=None, at=None, **more):
    """An event that came when the clock of `Opened` began."""
    timestamp_us = number if at is None else at
    more = {"received_us": 1_000_000, **more}
    return LoggedEvent(f"e{number}", user_id, session_id, item_id, "view", timestamp_us, **more)


def seed(user_id, *items, start=1):
    times = range(start, start + len(items))
    return SeedRow(user_id, items, ["view"] * len(items), list(times), [None] * len(items))
