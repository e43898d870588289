import asyncio
from collections.abc import Callable

import httpx
import pytest

from recsys.artifact import load_artifact
from recsys.ranker import Ranker
from serve_app.api import create_app
from serve_app.errors import RankerUnavailableError
from serve_app.intake import open_intake
from serve_app.model import Model
from serve_app.recommender import Recommender
from serve_app.settings import Settings
from serve_app.versions import Versions

NOW_S = 1_770_000_000.0


class FakeRanker:
    """A real ranker in this process, which a test may slow down, kill or spoil."""

    def __init__(self, artifact):
        self._ranker = Ranker(artifact, device="cpu")
        self._ranker.warm_up()
        self.calls = 0
        self.delay_s = 0.0
        self.error = None

    async def rank(self, query, version):
        return (await self._answer(lambda: self._ranker.rank([query])))[0]

    async def similar(self, query, version):
        return (await self._answer(lambda: self._ranker.similar([query])))[0]

    async def describe(self):
        return await self._answer(lambda: self._ranker.info)

    def die(self):
        self.error = RankerUnavailableError("dead")

    async def _answer(self, answer: Callable):
        self.calls += 1
        await asyncio.sleep(self.delay_s)
        if self.error is not None:
            raise self.error
        return answer()


class Client:
    """A synchronous client of an app, on one event loop."""

    def __init__(self, app):
        self.runner = asyncio.Runner()
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://shop")

    def request(self, method, path, **arguments):
        return self.runner.run(self.http.request(method, path, **arguments))

    def get(self, path, **arguments):
        return self.request("GET", path, **arguments)

    def post(self, path, **arguments):
        return self.request("POST", path, **arguments)

    def delete(self, path):
        return self.request("DELETE", path)


class ShopFront:
    """The app with a fake ranker, over a client."""

    def __init__(self, registry, tmp_path, version="v1", **settings):
        self.settings = Settings(
            registry=registry,
            history_path=tmp_path / "history.sqlite",
            **settings,
        )
        artifact = load_artifact(registry / version)
        self.ranker = FakeRanker(artifact)
        self.intake = open_intake(self.settings)
        self.history = self.intake.history
        self.now_s = NOW_S
        self.versions = Versions(registry, Model.load, pinned=version)
        self.recommender = Recommender(
            self.versions, self.history, self.ranker, self.settings, now=lambda: self.now_s
        )
        self.app = create_app(self.recommender, self.intake, self.settings, now=lambda: self.now_s)
        self.client = Client(self.app)

    def recommend(self, **body):
        response = self.client.post("/v1/recommend", json=body)
        assert response.status_code == 200, response.text
        return response.json()

    def post_event(self, number, item_id, **more):
        event = {
            "event_id": f"e{number}",
            "user_id": "u1",
            "item_id": item_id,
            "timestamp": NOW_S - 1000 + number,
            **more,
        }
        return self.client.post("/v1/events", json={"events": [event]}).json()


@pytest.fixture
def open_front(registry, tmp_path):
    """Opens the shop's front with settings of the test's own."""
    opened = []

    def open_with(**settings):
        front = ShopFront(
            registry, tmp_path, **{"deadline_ms": 2000, "history_timeout_ms": 2000, **settings}
        )
        opened.append(front)
        return front

    yield open_with
    for front in opened:
        front.client.runner.run(front.intake.close())
        front.client.runner.close()


@pytest.fixture
def front(open_front):
    return open_front()
