import asyncio
import time
from contextlib import contextmanager

import pytest
import redis

from recsys.ranker import RankedList
from serve_app.settings import Settings
from serve_app.shared_cache import SharedCache, open_shared_cache
from tests.serve_app.redis_server import running_redis

KEY = ("v1", b"\x00digest\xff")
RANKED = RankedList(("i1", 2), (0.5, -1.25), "v1", 3)


@pytest.fixture
def server():
    with running_redis("--appendonly", "yes", "--appendfsync", "always") as server:
        yield server


@contextmanager
def cache_on(server, ttl_s=60.0, timeout_s=2.0):
    with asyncio.Runner() as runner:
        cache = SharedCache(server.url, ttl_s, timeout_s)
        yield cache, runner
        runner.run(cache.close())


async def put(cache, key, ranked):
    cache.put_later(key, ranked)
    await asyncio.gather(*cache._writes)


def test_list_of_one_process_is_found_by_another(server):
    with cache_on(server) as (mine, runner):
        assert runner.run(mine.get(KEY)) is None
        runner.run(put(mine, KEY, RANKED))
    with cache_on(server) as (theirs, runner):
        assert runner.run(theirs.get(KEY)) == RANKED
        assert runner.run(theirs.get(("v2", KEY[1]))) is None


def test_list_is_kept_for_its_time_only(server):
    with cache_on(server, ttl_s=0.05) as (cache, runner):
        runner.run(put(cache, KEY, RANKED))
        time.sleep(0.2)
        assert runner.run(cache.get(KEY)) is None


def test_dead_redis_is_a_miss_that_is_soon_not_even_asked(server, caplog):
    with cache_on(server) as (cache, runner):
        runner.run(put(cache, KEY, RANKED))
        server.kill()
        found = [runner.run(cache.get(KEY)) for _ in range(20)]
        runner.run(put(cache, KEY, RANKED))

        assert found == [None] * 20
        assert caplog.text.count("does not answer") == 1
        assert cache._breaker.state == "open"


def test_redis_that_comes_back_is_found_again(server):
    with cache_on(server) as (cache, runner):
        runner.run(put(cache, KEY, RANKED))
        server.kill()
        for _ in range(3):
            runner.run(cache.get(KEY))
        server.start()
        cache._breaker._open_s = 0.0

        assert runner.run(cache.get(KEY)) == RANKED
        assert cache._breaker.state == "closed"


def test_frozen_redis_costs_its_time_limit_and_no_more(server):
    with cache_on(server, timeout_s=0.02) as (cache, runner):
        with redis.Redis.from_url(server.url) as client:
            client.execute_command("CLIENT", "PAUSE", 60_000)
        assert runner.run(cache.get(KEY)) is None
        server.kill()


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff"])
def test_what_is_no_list_is_a_miss(server, content):
    with redis.Redis.from_url(server.url) as client:
        client.set(b"nextitem:list:v1:" + KEY[1], content)
    with cache_on(server) as (cache, runner):
        assert runner.run(cache.get(KEY)) is None


def test_replicas_share_what_one_of_them_asked(open_front, server):
    mine, theirs = open_front(), open_front()
    for front in (mine, theirs):
        cache = SharedCache(server.url, 60.0, 2.0)
        front.recommender.ranker._shared = cache
    first = mine.recommend(user_history=["i1", "i2"], filter={"exclude_items": ["i7", "i5"]})
    mine.client.runner.run(mine.recommender.ranker._shared.close())
    second = theirs.recommend(user_history=["i1", "i2"], filter={"exclude_items": ["i5", "i7"]})
    theirs.client.runner.run(theirs.recommender.ranker._shared.close())

    assert first["recommendations"] == second["recommendations"]
    assert (mine.ranker.calls, theirs.ranker.calls) == (1, 0)
    text = theirs.client.get("/metrics").text
    assert 'nextitem_cache_lookups_total{result="shared"} 1.0' in text


def test_settings_open_it_and_hide_its_password(tmp_path):
    settings = Settings(registry=tmp_path, shared_cache="redis://:secret@127.0.0.1:1/0")

    assert "secret" not in repr(settings)
    assert isinstance(open_shared_cache(settings), SharedCache)
    assert open_shared_cache(Settings(registry=tmp_path)) is None
    assert open_shared_cache(settings.model_copy(update={"cache_size": 0})) is None
