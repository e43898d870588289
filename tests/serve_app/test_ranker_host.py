import asyncio
import shutil

import pytest

from recsys.queries import Event, Query
from recsys.ranker import SimilarQuery
from recsys.registry import promote
from serve_app.errors import RankerSaturatedError, RankerUnavailableError
from serve_app.metrics import Metrics
from serve_app.ranker_host import RankerHost
from serve_app.settings import Settings

QUERIES = [Query((Event(f"i{number}"),), k=number + 1) for number in range(6)]


@pytest.fixture
def open_host(registry, tmp_path):
    opened = []

    def open_with(**settings):
        root = tmp_path / "registry"
        if not root.exists():
            shutil.copytree(registry, root)
        metrics = Metrics("ranker")
        host = RankerHost(Settings(registry=root, registry_poll_s=0.05, **settings), metrics)
        opened.append(host)
        return host, metrics, root

    yield open_with
    for host in opened:
        host.close()


def test_each_question_gets_its_own_list_whatever_batch_it_is_in(open_host):
    host, metrics, _ = open_host(max_batch_size=4)

    async def ask():
        similar = SimilarQuery("i3", k=4)
        return await asyncio.gather(
            *(host.rank(query, "v1") for query in QUERIES), host.similar(similar, "v1")
        )

    *ranked, similar = asyncio.run(ask())
    assert [len(one.item_ids) for one in ranked] == [1, 2, 3, 4, 5, 6]
    assert len(similar.item_ids) == 4
    text = metrics.render().decode()
    assert "nextitem_batch_size_sum 7.0" in text
    assert "nextitem_batch_size_count 2.0" in text


def test_version_that_is_asked_for_answers_where_it_is_loaded(open_host):
    host, _, root = open_host()
    promote(root, "v2", 0.5)
    host._versions.refresh()

    async def ask():
        asked = [(QUERIES[0], version) for version in ("v1", "v2", "v9", "v2")]
        return await asyncio.gather(*(host.rank(query, version) for query, version in asked))

    versions = [one.model_version for one in asyncio.run(ask())]
    assert versions == ["v1", "v2", "v1", "v2"]


def test_too_many_who_wait_are_refused(open_host):
    host, _, _ = open_host(max_batch_size=1)

    async def ask():
        asking = (host.rank(QUERIES[0], "v1") for _ in range(20))
        return await asyncio.gather(*asking, return_exceptions=True)

    found = asyncio.run(ask())
    refused = [one for one in found if isinstance(one, RankerSaturatedError)]
    assert 0 < len(refused) < 20
    assert all(one.item_ids for one in found if one not in refused)


def test_ranker_that_broke_says_so(open_host):
    host, _, _ = open_host()
    host.check_health()

    def fail(queries):
        raise RuntimeError("out of memory")

    host._versions.champion.rank = fail
    with pytest.raises(RankerUnavailableError, match="out of memory"):
        asyncio.run(host.rank(QUERIES[0], "v1"))
    with pytest.raises(RuntimeError, match="out of memory"):
        host.check_health()
