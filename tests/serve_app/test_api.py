import hashlib
import sqlite3
from contextlib import closing

import pytest

HISTORY = ["i1", "i2", "i3"]


def ids(answer):
    return [entry["item_id"] for entry in answer["recommendations"]]


async def in_chunks(*chunks):
    for chunk in chunks:
        yield chunk


def problem_of(response, status, code):
    problem = response.json()
    assert response.status_code == status, problem
    assert response.headers["content-type"] == "application/problem+json"
    assert problem["status"] == status
    assert problem["code"] == code
    assert problem["request_id"] == response.headers["X-Request-ID"]
    return problem


def test_answer_has_every_part_of_the_contract(front):
    answer = front.recommend(user_history=[*HISTORY, "nothing"], top_k=5)

    assert set(answer) == {
        "recommendations",
        "recommendation_id",
        "model_version",
        "source",
        "degraded",
        "num_input_items",
        "unknown_items",
        "took_ms",
    }
    assert answer["source"] == "model"
    assert answer["degraded"] is False
    assert answer["model_version"] == "v1"
    assert (answer["num_input_items"], answer["unknown_items"]) == (4, 1)
    assert [entry["rank"] for entry in answer["recommendations"]] == [1, 2, 3, 4, 5]
    assert set(answer["recommendations"][0]) == {"item_id", "score", "rank"}


def test_short_path_answers_as_the_long_one(front):
    body = {"user_history": HISTORY}

    short = front.client.post("/recommend", json=body).json()

    assert short["recommendations"] == front.recommend(**body)["recommendations"]


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        ({}, "", "exactly one of user_id, session_id, user_history, recent_events; got none"),
        ({"user_id": 1, "session_id": 2}, "", "got user_id and session_id"),
        ({"user_id": "u", "top_k": 0}, "top_k", "greater than or equal to 1"),
        ({"user_id": "u", "top_k": 101}, "top_k", "less than or equal to 100"),
        ({"user_id": "u", "top_k": "10"}, "top_k", "valid integer"),
        ({"user_id": "u", "topk": 3}, "topk", "Extra inputs are not permitted"),
        ({"user_id": True}, "user_id", "valid"),
        ({"user_id": ""}, "user_id", "at least 1 character"),
        ({"user_id": "x" * 129}, "user_id", "at most 128 characters"),
        ({"user_id": 2**63}, "user_id", "less than"),
        ({"user_history": ["a"] * 1001}, "user_history", "at most 1000 items"),
        ({"user_history": [1.5]}, "user_history.0", "valid"),
        ({"user_id": "u", "context": {"timezone": "Mars/Base"}}, "context.timezone", "IANA"),
        ({"user_id": "u", "context": {"timezone": "Factory"}}, "context.timezone", "IANA"),
        ({"user_id": "u", "context": {"timezone": "../etc"}}, "context.timezone", "IANA"),
        ({"user_id": "u", "context": {"timestamp": "2026-01-01"}}, "context.timestamp", "timezone"),
        ({"user_id": "u", "context": {"timestamp": True}}, "context.timestamp", "true or false"),
        ({"user_id": "u", "context": {"timestamp": -1e9}}, "context.timestamp", "1990 and 2200"),
        ({"user_id": "u", "context": {f"x{n}": 1 for n in range(17)}}, "context", "at most 16"),
        ({"user_id": "u", "context": {"x": "y" * 129}}, "context.x", "at most 128"),
        ({"user_id": "u", "filter": {"min_price": 2, "max_price": 1}}, "filter", "not exceed"),
        ({"user_id": "u", "timeout_ms": 0}, "timeout_ms", "greater than or equal to 1"),
        ({"user_id": "u", "explain": 1}, "explain", "valid boolean"),
        ({"user_id": "u", "filter": {"exclude_seen": "no"}}, "filter.exclude_seen", "boolean"),
    ],
)
def test_wrong_fields_are_named(front, body, field, words):
    problem = problem_of(front.client.post("/v1/recommend", json=body), 422, "invalid_request")

    assert any(f["name"] == field and words in f["message"] for f in problem["fields"]), problem


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b'{"user_id": "u", "filter": {"min_price": NaN}}', 422, "invalid_request"),
        (b'{"user_id": "u", "context": {"x": Infinity}}', 422, "invalid_request"),
        (b'{"user_id": "\\ud800"}', 422, "invalid_request"),
        (b"[1, 2]", 422, "invalid_request"),
        (b"", 422, "invalid_request"),
        (b"{", 400, "malformed_body"),
        (b"\xff\xfe\xfd", 400, "malformed_body"),
        (b"[" * 100_000, 400, "malformed_body"),
        (b'{"user_id": ' + b"9" * 5000 + b"}", 400, "malformed_body"),
    ],
)
def test_broken_bodies_are_clear_client_errors(front, content, status, code):
    headers = {"Content-Type": "application/json"}

    response = front.client.post("/v1/recommend", content=content, headers=headers)

    problem_of(response, status, code)


def test_large_bodies_are_refused_however_they_come(open_front):
    front = open_front(max_body_bytes=1000)

    declared = front.client.post("/v1/recommend", content=b"x" * 1001)
    chunked = front.client.post("/v1/recommend", content=in_chunks(b"x" * 600, b"x" * 600))

    problem_of(declared, 413, "body_too_large")
    problem_of(chunked, 413, "body_too_large")


def test_unknown_paths_and_methods_are_problems(front):
    problem_of(front.client.get("/nothing"), 404, "not_found")
    problem_of(front.client.get("/v1/recommend"), 405, "method_not_allowed")


def test_unexpected_errors_are_problems_without_details(front):
    front.ranker.error = KeyError("secret")

    response = front.client.post("/v1/recommend", json={"user_history": HISTORY})

    problem = problem_of(response, 500, "internal_error")
    assert "secret" not in response.text
    assert problem["detail"].startswith("The service failed")


def test_request_id_comes_back_unless_it_is_unfit(front):
    def sent(request_id):
        headers = {"X-Request-ID": request_id}
        return front.client.get("/health/live", headers=headers).headers["X-Request-ID"]

    assert sent("page-7:a.b") == "page-7:a.b"
    assert len(sent("no spaces")) == 32
    assert len(sent("x" * 129)) == 32


def test_too_many_requests_at_once_are_shed_but_health_answers(open_front):
    front = open_front()
    gate = front.app.build_middleware_stack()
    while not hasattr(gate, "_in_flight"):
        gate = gate.app
    front.app.middleware_stack = gate
    gate._in_flight = front.settings.max_in_flight

    response = front.client.post("/v1/recommend", json={"user_history": HISTORY})

    problem_of(response, 429, "too_many_requests")
    assert response.headers["Retry-After"] == "1"
    assert front.client.get("/health/live").status_code == 200


def test_batch_gives_each_request_its_own_status(front):
    requests = [{"user_history": HISTORY}, {"top_k": 3}, {"user_id": "nobody", "top_k": 2}]

    response = front.client.post("/v1/recommend:batch", json={"requests": requests})

    results = response.json()["results"]
    assert [result["status"] for result in results] == [200, 422, 200]
    assert results[0]["response"]["source"] == "model"
    assert results[1]["problem"]["code"] == "invalid_request"
    assert results[2]["response"]["source"] == "popular"


def test_similar_items_follow_filters(front):
    body = {"item_id": "i1", "top_k": 40, "filter": {"include_categories": ["c1"]}}

    answer = front.client.post("/v1/similar", json=body).json()

    assert set(ids(answer)) == {f"i{n}" for n in range(5, 40, 4)}
    assert answer["source"] == "model"


def test_similar_to_an_unknown_item_is_popular(front):
    answer = front.client.post("/v1/similar", json={"item_id": "nothing"}).json()

    assert (answer["source"], answer["degraded"], answer["unknown_items"]) == ("popular", False, 1)


def test_events_are_accepted_once_and_rejected_one_by_one(front):
    good = {"event_id": "a", "user_id": 7, "item_id": "i1", "timestamp": "2026-01-05T10:00:00Z"}
    bad = {**good, "event_id": "b", "timestamp": "yesterday"}
    ownerless = {**good, "event_id": "c", "user_id": None}
    tomorrow = {**good, "event_id": "d", "timestamp": front.now_s + 90_000}

    response = front.client.post(
        "/v1/events", json={"events": [good, bad, good, ownerless, tomorrow]}
    )

    answer = response.json()
    assert response.status_code == 202
    assert (answer["accepted"], answer["duplicates"], answer["rejected"]) == (1, 1, 3)
    assert [result["status"] for result in answer["results"]] == [
        "accepted",
        "rejected",
        "duplicate",
        "rejected",
        "rejected",
    ]
    assert answer["results"][1]["fields"][0]["name"] == "timestamp"
    assert "user_id, session_id or both" in answer["results"][3]["fields"][0]["message"]


def test_more_than_a_thousand_events_are_refused(front):
    problem_of(
        front.client.post("/v1/events", json={"events": [{}] * 1001}), 422, "invalid_request"
    )


def test_history_can_be_read_and_erased(front):
    front.post_event(1, "i1")
    front.post_event(2, "i2", device="mobile")

    events = front.client.get("/v1/users/u1/history").json()["events"]
    erased = front.client.delete("/v1/users/u1/history").json()

    assert [event["item_id"] for event in events] == ["i1", "i2"]
    assert events[1]["device"] == "mobile"
    assert erased == {"user_id": "u1", "erased_events": 2}
    assert front.client.get("/v1/users/u1/history").json()["events"] == []


def test_locked_log_is_a_503_within_a_bound_and_loses_nothing(open_front):
    front = open_front(events_timeout_ms=200)
    event = {"event_id": "a", "user_id": "u1", "item_id": "i1", "timestamp": front.now_s}
    with closing(sqlite3.connect(front.settings.history_path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        refused = front.client.post("/v1/events", json={"events": [event]})
        history = front.client.get("/v1/users/u1/history")
        erasing = front.client.delete("/v1/users/u1/history")
        other.execute("ROLLBACK")

    problem_of(refused, 503, "unavailable")
    problem_of(erasing, 503, "unavailable")
    assert refused.headers["Retry-After"] == "1"
    assert str(front.settings.history_path) not in refused.text
    assert history.json()["events"] == []
    again = front.client.post("/v1/events", json={"events": [event]})
    assert again.json()["accepted"] == 1


def test_history_that_does_not_answer_is_a_503(open_front, tmp_path):
    front = open_front(history="redis", redis_url=f"unix://{tmp_path}/nobody.sock")

    problem_of(front.client.get("/v1/users/u1/history"), 503, "unavailable")
    assert front.post_event(1, "i1")["accepted"] == 1


def test_user_ids_may_hold_any_character(front):
    front.post_event(1, "i1", user_id="shop/7\n é")

    response = front.client.get("/v1/users/shop%2F7%0A%20%C3%A9/history")

    assert response.json()["user_id"] == "shop/7\n é"
    assert len(response.json()["events"]) == 1


def test_keys_open_what_their_scopes_say(open_front):
    digest = hashlib.sha256(b"letmein").hexdigest()
    front = open_front(api_keys={digest: ["read"]})
    body = {"user_id": "u"}

    def post(path, **headers):
        return front.client.post(path, json=body, headers=headers)

    problem_of(post("/v1/recommend"), 401, "unauthorized")
    problem_of(post("/v1/recommend", **{"X-API-Key": "wrong"}), 401, "unauthorized")
    assert post("/v1/recommend", **{"X-API-Key": "letmein"}).status_code == 200
    assert post("/v1/recommend", Authorization="Bearer letmein").status_code == 200
    problem_of(post("/v1/events", **{"X-API-Key": "letmein"}), 403, "forbidden")
    assert front.client.get("/health/live").status_code == 200


def test_ready_comes_with_the_first_warm_ranker_and_stays(front):
    front.ranker.die()
    problem_of(front.client.get("/health/ready"), 503, "not_ready")
    assert front.client.get("/health").json()["status"] == "starting"

    front.ranker.error = None
    assert front.client.get("/health/ready").status_code == 200

    front.ranker.die()
    assert front.client.get("/health/ready").status_code == 200
    assert front.client.get("/health").json() == {
        "status": "ok",
        "model_version": "v1",
        "shares": {"v1": 1.0},
        "vocab_size": 40,
        "device": "cpu",
        "ranker": "closed",
    }


def test_metrics_count_without_naming_anybody(front):
    front.recommend(user_history=HISTORY)
    front.recommend(user_history=HISTORY)
    front.recommend(user_id="somebody")
    front.client.get("/nothing")

    text = front.client.get("/metrics").text

    for line in (
        'recommendations_total{degraded="false",source="model",version="v1"} 2.0',
        'recommendations_total{degraded="false",source="popular",version="v1"} 1.0',
        'cache_lookups_total{result="hit"} 1.0',
        'request_seconds_count{route="/v1/recommend",source="model",status="200"} 2.0',
        'request_seconds_count{route="/v1/recommend",source="popular",status="200"} 1.0',
        'request_seconds_count{route="unknown",source="none",status="404"} 1.0',
        'history_seconds_count{operation="recent",outcome="answered"} 1.0',
    ):
        assert f"nextitem_{line}" in text
    assert "somebody" not in text


def test_ids_are_trimmed_as_the_lake_trims_them(front):
    front.post_event(1, "i1")
    again = front.post_event(1, " i1 ", event_id=" e1 ")
    blank = front.post_event(2, "i1", event_id="  ")

    assert (again["duplicates"], blank["rejected"]) == (1, 1)


def test_documentation_lists_the_contract(front):
    paths = front.client.get("/openapi.json").json()["paths"]

    assert front.client.get("/docs").status_code == 200
    assert set(paths) == {
        "/v1/recommend",
        "/v1/recommend:batch",
        "/v1/similar",
        "/v1/events",
        "/v1/users/{user_id}/history",
        "/health",
        "/health/live",
        "/health/ready",
    }


def test_documentation_describes_bodies_that_are_checked_one_by_one(front):
    openapi = front.client.get("/openapi.json").json()
    schemas = openapi["components"]["schemas"]

    events = schemas["EventsRequest"]["properties"]["events"]["items"]
    requests = schemas["BatchRequest"]["properties"]["requests"]["items"]
    problem = openapi["paths"]["/v1/recommend"]["post"]["responses"]["422"]["content"]

    assert events["required"] == ["event_id", "item_id", "timestamp"]
    assert requests == {"$ref": "#/components/schemas/RecommendRequest"}
    assert problem == {
        "application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}
    }
    assert {"RecommendRequest", "Problem"} <= set(schemas)
