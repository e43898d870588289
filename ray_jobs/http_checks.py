"""Requests as a shop's page would send them, with a verdict on each answer."""

import time
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import httpx
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from ray_jobs.config import PipelineConfig
from ray_jobs.errors import JobError
from ray_jobs.materialize import history_folder
from ray_jobs.sequences_reader import open_sequences

_NUM_TIMED = 200
_RECOVERY_TIMEOUT_S = 60.0
_OUTAGE_TIMEOUT_MS = 70


@dataclass(frozen=True)
class Check:
    """One thing that must hold, and what was seen."""

    title: str
    passed: bool
    seen: str


@dataclass(frozen=True)
class Example:
    """A user with a history, to try the endpoint with; ids in the shop's own type."""

    user_id: int | str
    item_ids: list[int | str]


def example_user(config: PipelineConfig) -> Example:
    """Some user whose history has five items at least, where there is one."""
    folder = history_folder(config, open_sequences(config).version())
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise JobError(f"{folder} holds no history; run ray_jobs.materialize first.")
    table = pq.read_table(files[0], columns=["user_id", "item_ids"])
    lengths = pc.list_value_length(table["item_ids"]).to_numpy()
    row = int(np.flatnonzero(lengths >= min(5, lengths.max()))[0])
    return Example(table["user_id"][row].as_py(), table["item_ids"][row].as_py()[-5:])


def check_endpoint(config: PipelineConfig) -> list[Check]:
    """Asks for a known user, an unknown one and a raw history; posts an event; kills the ranker."""
    example = example_user(config)
    # A ranker inside the ingress cannot be killed without it.
    has_own_ranker = config.serve.settings.get("ranker") != "inside"
    url = f"http://{config.serve.host}:{config.serve.port}"
    with httpx.Client(base_url=url, timeout=10) as client:
        return [
            _check_known_user(client, example),
            _check_unknown_user(client),
            _check_raw_history(client, example),
            _check_new_event(client, example),
            _check_latency(client, example, config.serve.deadline_ms),
            *(_check_outage(client, example) if has_own_ranker else []),
        ]


def recommend(client: httpx.Client, **body: Any) -> dict[str, Any]:
    """One POST /v1/recommend. Raises: JobError on anything but 200."""
    response = client.post("/v1/recommend", json=body)
    if response.status_code != httpx.codes.OK:
        raise JobError(f"POST /v1/recommend answered {response.status_code}: {response.text[:300]}")
    answer: dict[str, Any] = response.json()
    return answer


def _check_known_user(client: httpx.Client, example: Example) -> Check:
    answer = recommend(client, user_id=example.user_id)
    passed = answer["source"] == "model" and _is_full(answer)
    return Check("a known user gets the model's list", passed, _describe(answer))


def _check_unknown_user(client: httpx.Client) -> Check:
    answer = recommend(client, user_id="nobody-has-this-id")
    passed = answer["source"].startswith("popular") and _is_full(answer) and not answer["degraded"]
    return Check("an unknown user gets what is popular", passed, _describe(answer))


def _check_raw_history(client: httpx.Client, example: Example) -> Check:
    answer = recommend(client, user_history=example.item_ids)
    passed = answer["source"] == "model" and _is_full(answer)
    return Check("a bare history gets the model's list", passed, _describe(answer))


def _check_new_event(client: httpx.Client, example: Example) -> Check:
    before = _items(recommend(client, user_id=example.user_id))
    event = {
        "event_id": uuid.uuid4().hex,
        "user_id": example.user_id,
        "item_id": before[-1],
        "event_type": "view",
        "timestamp": datetime.now(UTC).isoformat(),
    }
    response = client.post("/v1/events", json={"events": [event]})
    after = _items(recommend(client, user_id=example.user_id))
    is_accepted = response.status_code == httpx.codes.ACCEPTED and response.json()["accepted"] == 1
    passed = is_accepted and after != before and before[-1] not in after
    changed = sum(item not in before for item in after)
    seen = f"{response.status_code}, the item viewed is gone and {changed} of 10 items are new"
    return Check("a posted event changes the list", passed, seen if passed else response.text[:200])


def _check_latency(client: httpx.Client, example: Example, deadline_ms: float) -> Check:
    took_ms = []
    for number in range(_NUM_TIMED):
        # Another page each time, so that the cache does not answer.
        excluded = {"exclude_items": [example.item_ids[-1], f"page-{number}"]}
        start = time.perf_counter()
        recommend(client, user_id=example.user_id, filter=excluded)
        took_ms.append(1000 * (time.perf_counter() - start))
    p50, p99 = np.percentile(took_ms, [50, 99])
    seen = f"p50 {p50:.0f} ms, p99 {p99:.0f} ms over {_NUM_TIMED} requests, cache off"
    return Check(f"answers come within {deadline_ms:.0f} ms", bool(p50 <= deadline_ms), seen)


def _check_outage(client: httpx.Client, example: Example) -> list[Check]:
    killed = kill_replicas("Ranker")
    # A page does not wait for a new replica, whatever the deadline of the deployment is.
    answers = [
        recommend(
            client,
            user_id=example.user_id,
            filter={"exclude_items": [f"outage-{number}"]},
            timeout_ms=_OUTAGE_TIMEOUT_MS,
        )
        for number in range(20)
    ]
    full = sum(map(_is_full, answers))
    degraded = sum(answer["degraded"] for answer in answers)
    during = Check(
        "with the ranker killed a full list still comes",
        killed > 0 and full == len(answers) and degraded > 0,
        f"{full} of {len(answers)} full, {degraded} degraded, e.g. {_describe(answers[0])}",
    )
    started = time.monotonic()
    source = answers[-1]["source"]
    while source != "model" and time.monotonic() - started < _RECOVERY_TIMEOUT_S:
        time.sleep(0.5)
        source = recommend(client, user_id=example.user_id)["source"]
    seen = f"source {source} after {time.monotonic() - started:.0f} s"
    return [during, Check("the ranker comes back by itself", source == "model", seen)]


def kill_replicas(deployment: str) -> int:
    """Kills every replica of a deployment, as a crash would; returns how many."""
    replicas = [
        actor
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if actor["name"].startswith("SERVE_REPLICA::") and deployment in actor["name"]
    ]
    for actor in replicas:
        ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]), no_restart=True)
    return len(replicas)


def _is_full(answer: dict[str, Any]) -> bool:
    return len(answer["recommendations"]) == 10


def _items(answer: dict[str, Any]) -> list[Any]:
    return [entry["item_id"] for entry in answer["recommendations"]]


def _describe(answer: dict[str, Any]) -> str:
    degraded = ", degraded" if answer["degraded"] else ""
    return f"source {answer['source']}{degraded}, first items {_items(answer)[:3]}"
