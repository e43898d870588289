import asyncio
import socket
import threading
import time
from types import SimpleNamespace

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from ray import serve
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError

from serve_app.deployment import Ingress, RankerDeployment, ServeRanker, build
from serve_app.errors import RankerUnavailableError, SettingsError
from serve_app.settings import Settings

pytestmark = pytest.mark.ray

HISTORY = ["i1", "i2", "i3"]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def task_error(cause):
    """As Ray hands over what was raised in a replica."""
    return RayTaskError("rank", "trace", cause).as_instanceof_cause()


@pytest.fixture(scope="module")
def landing(tmp_path_factory):
    return tmp_path_factory.mktemp("serve") / "landing"


@pytest.fixture(scope="module")
def url(ray_cluster, registry, landing):
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(
        build(
            {
                "registry": str(registry),
                "history_path": str(landing.parent / "history.sqlite"),
                "events_landing": str(landing),
                "ship_every_s": 0.2,
                "ranker_cpus": 0.5,
            }
        ),
        name="nextitem",
    )
    url = f"http://127.0.0.1:{port}"
    wait_until(lambda: httpx.get(f"{url}/health/ready").status_code == 200)
    yield url
    serve.shutdown()


def wait_until(is_so, timeout_s=60.0):
    end = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


def recommend(url, **body):
    response = httpx.post(f"{url}/v1/recommend", json={"timeout_ms": 2000, **body}, timeout=20)
    assert response.status_code == 200, response.text
    return response.json()


def ids(answer):
    return [entry["item_id"] for entry in answer["recommendations"]]


def test_event_changes_the_next_list(url):
    def post(number, item_id):
        event = {
            "event_id": f"e{number}",
            "user_id": "u1",
            "item_id": item_id,
            "timestamp": time.time(),
        }
        assert httpx.post(f"{url}/v1/events", json={"events": [event]}).status_code == 202

    assert recommend(url, user_id="u1")["source"] == "popular"
    post(1, "i1")
    first = recommend(url, user_id="u1")
    post(2, ids(first)[0])
    second = recommend(url, user_id="u1")

    assert (first["source"], second["source"]) == ("model", "model")
    assert ids(first)[0] not in ids(second)


def test_events_leave_for_the_lake_by_themselves(url, landing):
    event = {"event_id": "shipped", "user_id": "u2", "item_id": "i1", "timestamp": time.time()}
    assert httpx.post(f"{url}/v1/events", json={"events": [event]}).status_code == 202

    def landed():
        files = landing.glob("[!.]*")
        return [i for file in files for i in pq.read_table(file)["event_id"].to_pylist()]

    wait_until(lambda: "shipped" in landed())


def test_one_request_id_comes_back(url):
    response = httpx.get(f"{url}/health/live", headers={"X-Request-ID": "page-7"})

    assert response.headers.get_list("X-Request-ID") == ["page-7"]


def test_many_requests_at_once_are_each_answered(url):
    answers = []

    def ask(number):
        with httpx.Client() as client:
            body = {"user_history": [f"i{number}"], "timeout_ms": 5000, "top_k": number + 1}
            answers.append(client.post(f"{url}/v1/recommend", json=body, timeout=20).json())

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(len(ids(answer)) for answer in answers) == list(range(1, 21))
    assert {answer["source"] for answer in answers} == {"model"}


def test_no_page_is_empty_while_the_ranker_is_dead_and_it_comes_back(url):
    kill_ranker()
    answers = []
    end = time.monotonic() + 60
    while time.monotonic() < end:
        # A history of its own each time, so that the cache does not answer.
        history = [f"i{len(answers) % 40}", f"i{len(answers) // 40}"]
        answers.append(recommend(url, user_history=history, timeout_ms=100))
        recovered = len(answers) > 5 and not any(a["degraded"] for a in answers[-5:])
        if recovered and any(a["degraded"] for a in answers):
            break

    outage = [answer for answer in answers if answer["degraded"]]
    assert all(len(ids(answer)) == 10 for answer in answers)
    assert outage
    assert {answer["source"] for answer in outage} == {"covisited"}
    assert answers[-1]["source"] == "model"
    assert httpx.get(f"{url}/health/ready").status_code == 200


def kill_ranker():
    (actor,) = [
        actor
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if "Ranker" in actor["name"]
    ]
    ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]))


def test_ranker_that_broke_says_so_and_asks_to_be_replaced(registry):
    ranker = RankerDeployment(registry / "v1", "cpu", "torch", 8)

    def fail(queries):
        raise RuntimeError("out of memory")

    ranker.check_health()
    with pytest.raises(RankerUnavailableError, match="out of memory"):
        asyncio.run(ranker._run(fail, []))
    with pytest.raises(RuntimeError, match="out of memory"):
        ranker.check_health()


def test_ingress_knows_seeded_users_from_its_first_request(registry, tmp_path):
    seed = {
        "user_id": ["u9"],
        "item_ids": [["i1", "i2"]],
        "event_types": [["view", "view"]],
        "timestamps": [[1, 2]],
        "devices": [["mobile", None]],
    }
    pq.write_table(pa.table(seed), tmp_path / "seed.parquet")
    settings = Settings(
        registry=registry,
        history_path=tmp_path / "history.sqlite",
        history_seed=tmp_path / "seed.parquet",
    )

    ingress = Ingress(registry / "v1", settings, None)
    events = asyncio.run(ingress._recommender.history.recent("user_id", "u9", 50))
    asyncio.run(ingress._intake.close())

    assert [event.item_id for event in events] == ["i1", "i2"]
    assert ingress.__serve_build_asgi_app__().title == "nextitem"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (BackPressureError(9, 8), RankerUnavailableError),
        (ActorDiedError(), RankerUnavailableError),
        (task_error(RankerUnavailableError("cuda")), RankerUnavailableError),
        (task_error(KeyError("a bug")), KeyError),
    ],
)
def test_only_an_absent_ranker_leads_to_the_next_rung(error, expected):
    async def fail(query):
        raise error

    handle = SimpleNamespace(rank=SimpleNamespace(remote=fail))

    with pytest.raises(expected):
        asyncio.run(ServeRanker(handle).rank(None))


def test_wrong_arguments_are_named_before_anything_starts():
    with pytest.raises(SettingsError, match=r"deadline \(NEXTITEM_DEADLINE\): Extra"):
        build({"registry": "/nowhere", "deadline": 3})
