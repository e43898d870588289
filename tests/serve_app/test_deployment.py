import asyncio
import re
import shutil
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

from recsys.registry import promote, roll_back
from serve_app.deployment import Ingress, RankerDeployment, ServeRanker, build
from serve_app.errors import RankerSaturatedError, RankerUnavailableError, SettingsError
from serve_app.schemas import RecommendRequest
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
def own_registry(registry, tmp_path_factory):
    """A registry that a test may change."""
    root = tmp_path_factory.mktemp("own") / "registry"
    shutil.copytree(registry, root)
    return root


@pytest.fixture(scope="module")
def landing(tmp_path_factory):
    return tmp_path_factory.mktemp("serve") / "landing"


@pytest.fixture(scope="module")
def url(ray_cluster, own_registry, landing):
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    folder = landing.parent
    arguments = {
        "registry": str(own_registry),
        "history_path": str(folder / "history.sqlite"),
        "events_landing": str(landing),
        "ship_every_s": 0.2,
        "metrics_dir": str(folder / "metrics"),
        "exposures": str(folder / "exposures"),
        "registry_poll_s": 0.1,
        "ranker_cpus": 0.5,
        "ingress_replicas": 2,
        # What comes late opens the breaker; two cores that do other things are late at times.
        "deadline_ms": 500,
    }
    serve.run(build(arguments), name="nextitem")
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


def test_new_version_takes_over_without_a_failed_or_degraded_request(url, own_registry):
    answers, is_over = [], threading.Event()

    def ask():
        with httpx.Client(timeout=20) as client:
            while not is_over.is_set():
                body = {"user_history": [f"i{len(answers) % 40}"], "timeout_ms": 5000}
                answers.append(client.post(f"{url}/v1/recommend", json=body))

    def serves(version):
        versions = [answer.json()["model_version"] for answer in answers[-20:]]
        return set(versions) == {version} and len(versions) == 20

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for change, version in ((promote, "v2"), (lambda root, _: roll_back(root), "v1")):
            change(own_registry, version)
            wait_until(lambda version=version: serves(version))
    finally:
        is_over.set()
        for thread in threads:
            thread.join()

    assert {answer.status_code for answer in answers} == {200}
    assert not any(answer.json()["degraded"] for answer in answers)
    assert httpx.get(f"{url}/health").json()["shares"] == {"v1": 1.0}


def test_version_that_is_damaged_takes_nothing_over(url, own_registry):
    shutil.copytree(own_registry / "v2", own_registry / "v3")
    (own_registry / "v3" / "model.safetensors").write_bytes(b"damaged")
    promote(own_registry, "v3")

    wait_until(lambda: read_metric(url, 'model_load_failures_total{component="ranker"}'))
    wait_until(lambda: read_metric(url, 'model_load_failures_total{component="ingress"}') >= 2)
    answer = recommend(url, user_history=HISTORY)
    roll_back(own_registry)

    assert (answer["model_version"], answer["degraded"]) == ("v1", False)


def test_metrics_are_the_sum_of_all_replicas(url):
    name = 'recommendations_total{degraded="false",source="popular",version="v1"}'
    before = read_metric(url, name)
    for number in range(30):
        assert recommend(url, user_id=f"stranger {number}")["source"] == "popular"

    assert {read_metric(url, name) for _ in range(10)} == {before + 30}
    assert read_metric(url, "batch_size_count") > 0
    assert read_metric(url, 'model_share{component="ranker",version="v1"}') == 1


def test_agent_of_ray_hears_of_every_replica(url):
    recommend(url, user_history=HISTORY)
    (node,) = ray.nodes()
    address = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"

    def find(name):
        text = httpx.get(address, timeout=20).text
        return re.findall(rf"^ray_nextitem_{name}(?=[ {{])(.*) .*$", text, re.MULTILINE)

    wait_until(lambda: find("batch_size_count") and len(find("requests_in_flight")) == 2)
    assert any('deployment="Ranker"' in labels for labels in find("batch_seconds_bucket"))
    assert find("recommendations_total")


def read_metric(url, name):
    text = httpx.get(f"{url}/metrics", timeout=20).text
    found = re.search(rf"^nextitem_{re.escape(name)} (.*)$", text, re.MULTILINE)
    return 0.0 if found is None else float(found[1])


def kill_ranker():
    (actor,) = [
        actor
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if "Ranker" in actor["name"]
    ]
    ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]))


def test_ranker_that_broke_says_so_and_asks_to_be_replaced(registry):
    ranker = RankerDeployment(Settings(registry=registry, device="cpu"))

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

    ingress = Ingress(settings, None)
    events = asyncio.run(ingress._recommender.history.recent("user_id", "u9", 50))
    asyncio.run(ingress._intake.close())

    assert [event.item_id for event in events] == ["i1", "i2"]
    assert ingress.__serve_build_asgi_app__().title == "nextitem"


def test_ingress_may_rank_by_itself(registry, tmp_path):
    settings = Settings(
        registry=registry, history_path=tmp_path / "history.sqlite", ranker="inside"
    )
    ingress = Ingress(settings, None)
    request = RecommendRequest(user_history=HISTORY, timeout_ms=5000)
    answer = asyncio.run(ingress._recommender.recommend(request))
    asyncio.run(ingress._intake.close())
    assert ingress._recommender.ranker_info is None
    asyncio.run(ingress.check_health())
    ingress._host.close()

    assert (answer.source, answer.degraded) == ("model", False)
    assert ingress._recommender.ranker_info is not None


def test_an_ingress_that_cannot_warm_its_way_to_the_ranker_stays_healthy(
    registry, tmp_path, monkeypatch, caplog
):
    async def fail():
        raise KeyError("a bug")

    settings = Settings(
        registry=registry, history_path=tmp_path / "history.sqlite", ranker="inside"
    )
    ingress = Ingress(settings, None)
    monkeypatch.setattr(ingress._recommender, "is_ready", fail)
    asyncio.run(ingress.check_health())
    asyncio.run(ingress._intake.close())
    ingress._host.close()
    assert caplog.messages == ["The way to the ranker is not warm."]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (BackPressureError(9, 8), RankerSaturatedError),
        (ActorDiedError(), RankerUnavailableError),
        (task_error(RankerUnavailableError("cuda")), RankerUnavailableError),
        (task_error(KeyError("a bug")), KeyError),
    ],
)
def test_only_an_absent_ranker_leads_to_the_next_rung(error, expected):
    async def fail(query, version):
        raise error

    handle = SimpleNamespace(rank=SimpleNamespace(remote=fail))

    with pytest.raises(expected):
        asyncio.run(ServeRanker(handle).rank(None, "v1"))


def test_wrong_arguments_are_named_before_anything_starts():
    with pytest.raises(SettingsError, match=r"deadline \(NEXTITEM_DEADLINE\): Extra"):
        build({"registry": "/nowhere", "deadline": 3})
