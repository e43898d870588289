import asyncio
from types import SimpleNamespace

import pytest

from recsys.catalogue import Catalogue
from recsys.ranker import RankedList
from recsys.registry import Serving
from serve_app.errors import HistoryUnavailableError, RankerSaturatedError
from serve_app.model import Model
from serve_app.schemas import RecommendRequest
from serve_app.versions import Versions

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
    reasons = [entry["reason"] for entry in answer["recommendations"]]
    assert reasons == [{"source": "popular", "text": "Popular now"}] * 10
    assert front.ranker.calls == 0


def test_segment_without_history_gets_what_is_popular_in_it(front):
    answer = front.recommend(session_id="nobody", context={"segment": "loyal"})

    assert (answer["source"], answer["degraded"]) == ("popular_in_segment", False)
    assert ids(answer) == [
        item_id
        for item_id, _ in front.recommender.models.champion.fallback.popular_in("loyal", limit=10)
    ]


def test_unknown_items_alone_are_like_no_history(front):
    answer = front.recommend(user_history=["x", 7, "y"])

    assert (answer["source"], answer["degraded"], answer["unknown_items"]) == ("popular", False, 3)


def test_reason_names_the_item_that_is_often_followed_by_this_one(front):
    post = front.client.post("/v1/recommend", json={"user_history": ["i1"], "top_k": 39})
    assert "reason" not in post.json()["recommendations"][0]

    events = [{"item_id": "i1", "event_type": "purchase"}, {"item_id": "i7"}]
    answer = front.recommend(recent_events=events, top_k=38, explain=True)

    fallback = front.versions.champion.fallback
    for entry in answer["recommendations"]:
        because = fallback.because(entry["item_id"], ["i1", "i7"])
        assert entry["reason"].get("because") == because
        verb = {"i1": "bought", "i7": "viewed"}.get(because)
        text = f"Because you {verb} {because}" if because else "Chosen for you"
        assert entry["reason"]["text"] == text
    assert {entry["reason"].get("because") for entry in answer["recommendations"]} >= {"i1", "i7"}


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

    reasons = [entry["reason"]["source"] for entry in answer["recommendations"]]
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


def test_fields_of_the_shops_own_reach_the_ranker_as_text(front):
    asked = []

    async def rank(query, version):
        asked.append(query.context.own)
        return RankedList(("i1",), (1.0,), version)

    front.ranker.rank = rank
    context = {"region": "south", "tier": 3, "score": 2.0, "is_new": True, "none": None}
    front.recommend(user_history=HISTORY, context=context | {"device": "mobile"})

    assert asked == [{"region": "south", "tier": "3", "score": "2", "is_new": "true"}]


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
    assert front.recommender.ranker.breaker.state == "open"

    front.ranker.error = None
    front.client.runner.run(asyncio.sleep(0.25))

    assert front.recommend(user_history=["i1"])["source"] == "model"
    assert front.recommender.ranker.breaker.state == "closed"


@pytest.mark.parametrize("cache_size", [0, 100])
def test_ranker_that_hangs_is_left_alone_before_it_is_given_up(open_front, cache_size):
    front = open_front(
        breaker_failures=2,
        breaker_open_s=3600.0,
        deadline_ms=20,
        ranker_timeout_ms=60_000,
        cache_size=cache_size,
    )
    front.ranker.delay_s = 3600.0
    for number in range(4):
        assert front.recommend(user_history=[f"i{number}"])["degraded"] is True
        # The ranker was asked a moment after the request came, and is as much later late.
        front.client.runner.run(asyncio.sleep(0.05))

    assert front.ranker.calls == 2


def test_saturated_ranker_is_not_taken_for_a_sick_one(open_front):
    front = open_front(breaker_failures=1)
    front.ranker.error = RankerSaturatedError("32 wait")

    assert front.recommend(user_history=["i1"])["degraded"] is True
    assert front.recommender.ranker.breaker.state == "closed"


def test_without_a_cache_the_ranker_is_asked_every_time(open_front):
    front = open_front(cache_size=0)
    answers = [front.recommend(user_history=HISTORY) for _ in range(2)]

    assert ids(answers[0]) == ids(answers[1])
    assert front.ranker.calls == 2


@pytest.mark.parametrize("fault", ["down", "slow"])
def test_without_a_history_store_a_visitor_gets_what_is_popular_in_time(open_front, fault):
    front = open_front(deadline_ms=50)

    async def fail(owner, name, limit):
        if fault == "slow":
            await asyncio.sleep(3600)
        raise HistoryUnavailableError("down")

    front.history.recent = fail
    answer = front.recommend(user_id="u1", context={"segment": "loyal"})

    assert (answer["source"], answer["degraded"]) == ("popular_in_segment", True)
    assert len(ids(answer)) == 10
    assert answer["took_ms"] < 1000


def test_visitors_see_the_version_of_their_share_and_keep_it(open_front):
    front = open_front()
    other = Versions(front.settings.registry, Model.load, pinned="v2")
    both = {"v1": front.versions.champion, "v2": other.champion}
    serving = Serving("v1", {"v2": 0.5})
    front.recommender.models = SimpleNamespace(
        serving=serving, champion=both["v1"], choose=lambda visitor: both[serving.choose(visitor)]
    )
    asked = []

    async def rank(query, version):
        asked.append(version)
        return RankedList(("i1",), (1.0,), version)

    front.ranker.rank = rank
    for number in range(20):
        front.post_event(number, "i1", user_id=f"u{number}")
    rounds = [
        [front.recommend(user_id=f"u{number}")["model_version"] for number in range(20)]
        for _ in range(2)
    ]

    assert rounds[0] == rounds[1] == [serving.choose(f"user u{number}") for number in range(20)]
    assert set(asked) == {"v1", "v2"}


def test_clients_with_short_patience_do_not_open_the_breaker(open_front):
    front = open_front(breaker_failures=2)
    front.ranker.delay_s = 0.05

    for number in range(4):
        front.recommend(user_history=[f"i{number}"], timeout_ms=1)
    front.client.runner.run(asyncio.sleep(0.1))

    assert front.recommender.ranker.breaker.state == "closed"


def test_integer_and_string_form_of_a_user_are_one(front):
    front.post_event(1, "i1", user_id=42)

    assert front.recommend(user_id=42)["source"] == "model"
    assert front.recommend(user_id="42")["source"] == "model"


def test_filter_that_the_catalogue_cannot_answer_is_a_clear_error(front):
    table = front.recommender.models.champion.artifact.catalogue.table.drop_columns(["price"])
    front.recommender.models.champion.index._catalogue = Catalogue(table)

    response = front.client.post("/v1/recommend", json={"user_id": "u", "filter": {"min_price": 3}})

    assert response.status_code == 422
    assert response.json()["code"] == "unsupported_filter"
    assert "has no price" in response.json()["detail"]
