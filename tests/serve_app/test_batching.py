import asyncio

import pytest

from serve_app.batching import Batcher


class Work:
    """Doubles numbers, a batch when the test lets it."""

    def __init__(self):
        self.batches = []
        self.may_go = asyncio.Event()

    async def __call__(self, numbers):
        self.batches.append(numbers)
        await self.may_go.wait()
        if 13 in numbers:
            raise ValueError("13")
        return [2 * number for number in numbers]


def test_what_comes_meanwhile_is_the_next_batch():
    async def check():
        work = Work()
        batcher = Batcher(work, max_size=3)
        first = asyncio.create_task(batcher.ask(0))
        await asyncio.sleep(0)
        rest = [asyncio.create_task(batcher.ask(number)) for number in range(1, 6)]
        await asyncio.sleep(0)
        assert batcher.num_waiting == 5
        work.may_go.set()

        assert await asyncio.gather(first, *rest) == [0, 2, 4, 6, 8, 10]
        assert work.batches == [[0], [1, 2, 3], [4, 5]]
        assert await batcher.ask(6) == 12

    asyncio.run(check())


def test_error_of_a_batch_reaches_its_callers_alone():
    async def check():
        work = Work()
        work.may_go.set()
        batcher = Batcher(work, max_size=2)
        found = await asyncio.gather(
            *(batcher.ask(number) for number in (1, 13, 2)), return_exceptions=True
        )

        assert [type(one) for one in found] == [ValueError, ValueError, int]

    asyncio.run(check())


def test_caller_who_left_is_not_worked_for():
    async def check():
        work = Work()
        batcher = Batcher(work, max_size=8)
        first = asyncio.create_task(batcher.ask(1))
        await asyncio.sleep(0)
        left, stays = asyncio.create_task(batcher.ask(2)), asyncio.create_task(batcher.ask(3))
        await asyncio.sleep(0)
        left.cancel()
        first.cancel()
        work.may_go.set()

        assert await stays == 6
        assert work.batches == [[1], [3]]
        with pytest.raises(asyncio.CancelledError):
            await left

    asyncio.run(check())
