"""What every history store promises; one suite for all of them."""

import asyncio

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recsys.queries import Event
from tests.serve_app.history_stores.conftest import KINDS, event, seed


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def history(open_kind, kind):
    return open_kind(kind)


def test_events_keep_what_is_known_of_them(history):
    history.add(event(1, "i1"), event(2, 7, device="mobile"))

    assert history.recent() == (Event("i1", 1, "view", None), Event(7, 2, "view", "mobile"))
    assert history.recent("nobody") == ()


def test_events_survive_a_reopening(open_kind, kind):
    open_kind(kind).add(event(1, "i1"))

    assert open_kind(kind).items() == ["i1"]


def test_same_event_twice_counts_once(history):
    rows = history.append(event(1, "a"), event(2, "b"), event(1, "other"))

    history.push(rows)
    history.push(rows[1:])
    history.push([])

    assert history.items() == ["a", "b"]


def test_recent_events_are_the_last_by_time_then_by_arrival(history):
    times = [5, 3, 5, 1]
    history.add(*(event(n, f"i{n}", at=time) for n, time in enumerate(times)))

    assert history.items(limit=3) == ["i1", "i0", "i2"]


def test_pushes_at_the_same_time_all_count(history):
    rows = history.append(*(event(n, n, f"u{n % 2}", "s1") for n in range(8)))

    async def push_together():
        await asyncio.gather(*(history.store.push([row]) for row in rows))

    history.runner.run(push_together())

    assert history.items("u1") == [1, 3, 5, 7]
    assert history.items("s1", owner="session_id") == list(range(8))


def test_events_that_come_late_stand_where_they_belong(history):
    first, second, third = history.append(event(1, "a"), event(2, "b"), event(3, "c", at=2))

    history.push([third])
    history.push([first, second])

    assert history.items() == ["a", "b", "c"]


def test_sessions_have_histories_of_their_own(history):
    history.add(
        event(1, "a", None, "s1"), event(2, "b", "u1", "s1"), event(3, "c", "u1"), event(4, "d")
    )

    assert history.items("s1", owner="session_id") == ["a", "b"]
    assert history.items("u1") == ["b", "c", "d"]
    assert history.items("s1") == []


@pytest.mark.parametrize("name", ["shop/7 é", "a:b", '"quoted", [x]', "line\nfeed", "🛒"])
def test_ids_may_hold_any_character(history, name):
    history.add(event(1, name, name, name), event(name, 2**63 - 1, name, name, at=2))
    history.store.load([seed(f"{name}!", name, -1)])

    assert history.items(name) == [name, 2**63 - 1]
    assert history.items(name, owner="session_id") == [name, 2**63 - 1]
    assert history.items(f"{name}!") == [name, -1]
    assert history.erase(name) == 2
    assert history.items(name, owner="session_id") == []


def test_numbers_and_texts_are_different_items(history):
    history.add(event(1, 7), event(2, "7"))

    assert history.items() == [7, "7"]


def test_seeded_histories_come_before_events_and_once(history):
    history.store.load([seed("u1", "a", "b"), seed(2, "c")])
    history.add(event(9, "d", at=9), event(8, "b", at=2))

    assert history.items() == ["a", "b", "d"]
    assert history.items(2) == ["c"]
    assert history.items(limit=2) == ["b", "d"]


def test_seed_may_lack_all_but_the_item(history):
    history.store.load([seed("u1", "a")._replace(event_types=[None], timestamps_us=[None])])

    assert history.recent() == (Event("a", None, None, None),)


def test_each_version_of_a_seed_is_loaded_once(history):
    counts = [
        history.store.load_once("one", lambda: [seed("u1", "a", "b")]),
        history.store.load_once("one", lambda: [seed("u1", "never")]),
        history.store.load_once("two", lambda: [seed("u1", "c")]),
    ]

    assert counts == [1, 0, 1]
    assert history.items() == ["c"]


def test_load_that_broke_off_is_done_again(history):
    def broken():
        yield seed("u1", "a")
        raise KeyError("a bug of the caller")

    with pytest.raises(KeyError, match="a bug"):
        history.store.load_once("one", broken)

    assert history.store.load_once("one", lambda: [seed("u1", "a")]) == 1


def test_erased_user_does_not_come_back_with_the_next_seed(history):
    history.store.load([seed("u1", "a", "b")])
    history.add(event(1, "c"))
    history.now_s = 2.0

    assert history.erase("u1") == 3
    history.store.load([seed("u1", "a", "b"), seed("u2", "x")])

    assert history.items() == []
    assert history.items("u2") == ["x"]
    history.store.load([seed("u1", "new", start=2_000_001)])
    assert history.items() == ["new"]
    assert history.erase("u1") == 1
    assert history.erase("u1") == 0


def test_erased_user_is_gone_from_sessions_that_others_stay_in(history):
    history.add(event(1, "a", "u1", "s1"), event(2, "b", "u2", "s1"), event(3, "c", None, "s1"))

    assert history.erase("u1") == 1

    assert history.items("s1", owner="session_id") == ["b", "c"]
    assert history.items("u2") == ["b"]


def test_erased_user_does_not_come_back_with_an_event_that_was_on_its_way(history):
    rows = history.append(event(1, "a", "u1", "s1"))
    history.now_s = 2.0
    history.erase("u1")

    history.push(rows)

    assert history.items() == []
    assert history.items("s1", owner="session_id") == []
    history.add(event(2, "new", "u1", "s1", received_us=2_000_001))
    assert history.items() == ["new"]


def test_events_of_others_outlive_an_erasure_on_their_way(history):
    history.erase("u1")

    history.add(event(1, "a", "u2"), event(2, "b", None, "s1"))

    assert history.items("u2") == ["a"]
    assert history.items("s1", owner="session_id") == ["b"]


@pytest.mark.parametrize("kind", ["redis", "feast"])
def test_store_knows_how_far_it_was_filled_from_each_log(history):
    history.runner.run(history.store.mark_pushed("one", 7))

    assert history.runner.run(history.store.pushed_until("one")) == 7
    assert history.runner.run(history.store.pushed_until("two")) == 0


@pytest.mark.parametrize("kind", ["redis", "feast"])
def test_only_so_many_events_are_kept_of_a_visitor(open_kind, kind):
    history = open_kind(kind, keep=3)
    rows = history.append(*(event(n, f"i{n}", "u1", "s1") for n in range(5)))

    for _ in range(2):
        history.push(rows)

    assert history.items() == ["i2", "i3", "i4"]
    assert history.items("s1", owner="session_id") == ["i2", "i3", "i4"]


@given(data=st.data())
@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_order_and_repetition_of_pushes_do_not_matter(history, data):
    times = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=8))
    user = f"u{history.log.last_position()}"  # nobody's yet
    rows = history.append(*(event(f"{user}-{n}", n, user, at=time) for n, time in enumerate(times)))
    batches = data.draw(st.lists(st.lists(st.sampled_from(rows), max_size=4), max_size=5))

    for batch in [*batches, rows[::-1]]:
        history.push(batch)

    expected = sorted(range(len(times)), key=lambda n: (times[n], n))
    assert history.items(user) == expected
    assert history.items(user, limit=2) == expected[-2:]
