import asyncio

import pytest

from serve_app.cache import AnswerCache


class Counter:
    def __init__(self, error=None):
        self.calls = 0
        self.error = error

    async def __call__(self):
        self.calls += 1
        await asyncio.sleep(0.01)
        if self.error:
            raise self.error
        return self.calls


def test_identical_computations_fly_once():
    async def scenario():
        cache, compute = AnswerCache(10, 60), Counter()
        answers = await asyncio.gather(*(cache.compute("key", compute) for _ in range(5)))
        return answers, cache.get("key")

    assert asyncio.run(scenario()) == ([1] * 5, 1)


def test_failure_reaches_every_waiter_and_is_not_kept():
    async def scenario():
        cache, compute = AnswerCache(10, 60), Counter(KeyError("no"))
        calls = (cache.compute("key", compute) for _ in range(3))
        errors = await asyncio.gather(*calls, return_exceptions=True)
        compute.error = None
        return errors, await cache.compute("key", compute)

    errors, answer = asyncio.run(scenario())
    assert [type(error) for error in errors] == [KeyError] * 3
    assert answer == 2


def test_waiter_that_leaves_does_not_stop_the_flight():
    async def scenario():
        cache, compute = AnswerCache(10, 60), Counter()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(cache.compute("key", compute), 0.001)
        await asyncio.sleep(0.03)
        return cache.get("key")

    assert asyncio.run(scenario()) == 1


def test_answers_end_with_time_and_with_room():
    now = 0.0

    async def scenario():
        nonlocal now
        cache, compute = AnswerCache(2, 60, clock=lambda: now), Counter()
        for key in "abc":
            await cache.compute(key, compute)
        in_room = [cache.get(key) for key in "abc"]
        now = 61.0
        return in_room, [cache.get(key) for key in "abc"]

    assert asyncio.run(scenario()) == ([None, 2, 3], [None] * 3)


def test_answer_is_kept_only_if_wanted():
    async def scenario():
        cache = AnswerCache(2, 60)
        await cache.compute("key", Counter(), keep=lambda answer: answer > 1)
        return cache.get("key")

    assert asyncio.run(scenario()) is None
