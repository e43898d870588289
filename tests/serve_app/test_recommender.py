import asyncio

import pytest

from serve_app.schemas import RecommendRequest

HISTORY = ["i1", "i2", "i3"]


def ids(answer):
    return [entry["item_id"] for entry in answer["recommendations"]]


def ask_together(front, bodies):
    async def ask():
        requests = (RecommendRequest.model_validate(body) for body in bodies)
        return await asyncio.gather(*map(front.recommender.recommend, requests))

    return front.client.runner.run(ask())


def test_visitor_without_history_gets_what_is_popular_and_that_is_no_failure(front):
    answer = front.recommend(user_id="nobody", explain=True)

    assert (answer["source"], answer["degraded"]) == ("popular", False)
    assert len(ids(answer)) == 10
    assert {entry["reason"] for entry in answer["recommendations"]} == {"popular"}
    assert front.ranker.calls == 0


def test_segment_without_history_gets_what_is_popular_in_it(front):
    answer = front.recommend(session_id="nobody", context={"segment": "loyal"})

    assert (answer["source"], answer["degraded"]) == ("popular_in_segment", False)
    assert ids(answer) == [
        item_id for item_id, _ in front.recommender.model.fallback.popular_in("loyal", limit=10)
    ]


def test_unknown_items_alone_are_like_no_history(front):
    answer = front.recommend(user_history=["x", 7, "y"])

    assert (answer["source"], answer["degraded"], answer["unknown_items"]) == ("popular", False, 3)


@pytest.mark.parametrize("fault", ["dead", "slow"])
def test_without_its_ranker_a_visitor_gets_what_is_co_visited(open_front, fault):
    front = open_front(deadline_ms=50)
    if fault == "dead":
        front.ranker.die()
    else:
        front.ranker.delay_s = 5.0

    answer = front.recommend(user_history=HISTORY, top_k=20)

    assert (answer["source"], answer["degraded"]) == ("covisited", True)
    assert len(set(ids(answer))) == 20
    assert not set(ids(answer)) & set(HISTORY)
    assert answer["took_ms"] < 1000


def test_rungs_follow_each_other_until_the_list_is_full(front):
    front.ranker.die()

    answer = front.recommend(
        user_history=["i1"], top_k=39, context={"segment": "new"}, explain=True
    )

    reasons = [entry["reason"] for entry in answer["recommendations"]]
    order = ["covisited", "popular_in_segment", "popular"]
    assert len(set(ids(answer))) == 39
    assert reasons == sorted(reasons, key=order.index)
    assert reasons[0] == "covisited"


@pytest.mark.parametrize("is_dead", [False, True])
def test_filters_hold_on_every_rung_and_lists_stay_full(front, is_dead):
    if is_dead:
        front.ranker.die()
    wanted = {
        "include_categories": ["c1", "c2"],
        "exclude_categories": ["c2"],
        "available_only": True,
        "min_price": 2,
        "max_price": 33,
        "exclude_items": ["i13"],
    }

    answer = front.recommend(user_history=["i9"], filter=wanted)

    assert answer["degraded"] is is_dead
    assert set(ids(answer)) == {"i17", "i21", "i29", "i33"}


def test_seen_items_may_be_asked_for(front):
    everything = front.recommend(user_history=HISTORY, top_k=40, filter={"exclude_seen": False})
    unseen = front.recommend(user_history=HISTORY, top_k=40)

    assert len(ids(everything)) == 40
    assert set(ids(everything)) - set(ids(unseen)) == set(HISTORY)


def test_filter_that_nothing_passes_gives_an_empty_list(front):
    answer = front.recommend(user_history=HISTORY, filter={"min_price": 1e6})

    assert answer["recommendations"] == []


def test_new_event_changes_the_list_though_the_last_one_is_cached(front):
    front.post_event(1, "i1")
    first = front.recommend(user_id="u1")
    again = front.recommend(user_id="u1")
    front.post_event(2, ids(first)[0])
    after = front.recommend(user_id="u1")

    assert ids(again) == ids(first)
    assert front.ranker.calls == 2
    assert ids(first)[0] not in ids(after)


def test_recent_events_count_as_stored_ones_do(front):
    front.post_event(1, "i1", device="mobile")
    moment = front.now_s - 999

    stored = front.recommend(user_id="u1")
    sent = front.recommend(
        recent_events=[
            {"item_id": "i1", "event_type": "view", "timestamp": moment, "device": "mobile"}
        ]
    )

    assert sent["recommendations"] == stored["recommendations"]
    assert front.ranker.calls == 1


def test_sessions_and_users_are_told_apart(front):
    front.post_event(1, "i1", user_id=None, session_id="u1")

    assert front.recommend(session_id="u1")["source"] == "model"
    assert front.recommend(user_id="u1")["source"] == "popular"


@pytest.mark.parametrize(
    "change",
    [
        {"top_k": 11},
        {"context": {"device": "mobile"}},
        {"context": {"timezone": "Asia/Tokyo"}},
        {"filter": {"exclude_items": ["i7"]}},
        {"filter": {"exclude_seen": False}},
        {"filter": {"available_only": True}},
        {"user_history": ["i2", "i1", "i3"]},
        {"user_history": ["i1", "i2", "i4"]},
    ],
)
def test_what_changes_an_answer_changes_its_key(front, change):
    front.recommend(user_history=HISTORY)
    front.recommend(**{"user_history": HISTORY, **change})

    assert front.ranker.calls == 2


def test_same_hour_shares_an_answer_and_the_next_does_not(front):
    front.recommend(user_history=HISTORY)
    front.now_s += 60
    front.recommend(user_history=HISTORY)
    assert front.ranker.calls == 1

    front.now_s += 3600
    front.recommend(user_history=HISTORY)
    assert front.ranker.calls == 2


def test_new_version_answers_from_itself(open_front):
    old, new = open_front(), open_front(version="v2")

    first, second = old.recommend(user_history=HISTORY), new.recommend(user_history=HISTORY)

    assert (first["model_version"], second["model_version"]) == ("v1", "v2")
    assert ids(first) != ids(second)


def test_answer_of_another_version_is_given_but_not_kept(open_front):
    front, other = open_front(), open_front(version="v2")
    front.ranker._ranker = other.ranker._ranker

    answers = [front.recommend(user_history=HISTORY) for _ in range(2)]

    assert [answer["model_version"] for answer in answers] == ["v2", "v2"]
    assert front.ranker.calls == 2


def test_identical_requests_at_once_are_ranked_once(front):
    front.ranker.delay_s = 0.05

    answers = ask_together(front, [{"user_history": HISTORY}] * 8)

    assert front.ranker.calls == 1
    assert len({answer.recommendation_id for answer in answers}) == 8
    assert all(answer.source == "model" for answer in answers)


def test_late_answer_serves_the_next_request(open_front):
    front = open_front(deadline_ms=30)
    front.ranker.delay_s = 0.1

    late = front.recommend(user_history=HISTORY)
    front.client.runner.run(asyncio.sleep(0.2))
    cached = front.recommend(user_history=HISTORY)

    assert (late["source"], cached["source"]) == ("covisited", "model")
    assert front.ranker.calls == 1


def test_request_may_bring_its_own_deadline(front):
    front.ranker.delay_s = 0.3

    assert front.recommend(user_history=HISTORY, timeout_ms=20)["degraded"] is True
    assert front.recommend(user_history=["i4"], timeout_ms=3000)["degraded"] is False


def test_dead_ranker_is_left_alone_and_found_again(open_front):
    front = open_front(breaker_failures=2, breaker_open_s=0.2)
    front.ranker.die()
    for number in range(5):
        assert front.recommend(user_history=[f"i{number}"])["degraded"] is True
    assert front.ranker.calls == 2
    assert front.recommender.breaker.state == "open"

    front.ranker.error = None
    front.client.runner.run(asyncio.sleep(0.25))

    assert front.recommend(user_history=["i1"])["source"] == "model"
    assert front.recommender.breaker.state == "closed"


def test_clients_with_short_patience_do_not_open_the_breaker(open_front):
    front = open_front(breaker_failures=2)
    front.ranker.delay_s = 0.05

    for number in range(4):
        front.recommend(user_history=[f"i{number}"], timeout_ms=1)
    front.client.runner.run(asyncio.sleep(0.1))

    assert front.recommender.breaker.state == "closed"


def test_integer_and_string_form_of_a_user_are_one(front):
    front.post_event(1, "i1", user_id=42)

    assert front.recommend(user_id=42)["source"] == "model"
    assert front.recommend(user_id="42")["source"] == "model"


def test_filter_that_the_catalogue_cannot_answer_is_a_clear_error(front):
    table = front.recommender.model.artifact.catalogue.table.drop_columns(["price"])
    front.recommender.model.index._catalogue = type(front.recommender.model.artifact.catalogue)(
        table
    )

    response = front.client.post("/v1/recommend", json={"user_id": "u", "filter": {"min_price": 3}})

    assert response.status_code == 422
    assert response.json()["code"] == "unsupported_filter"
    assert "has no price" in response.json()["detail"]
