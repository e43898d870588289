import asyncio
import contextlib
import json

from benchmarks.load import LoadResult, Plan, RunningLoad, _part_of, drive, run_load

FULL = {"source": "model", "degraded": False, "recommendations": [{"item_id": 1}] * 10}


class Shop:
    """An HTTP server that answers what a test says, in turn and then the last for ever."""

    def __init__(self, *answers, delay_s=0.0, stall_s=0.0):
        self.answers = list(answers)
        self.delay_s = delay_s
        self.stall_s = stall_s
        self.bodies = []
        self.connections = 0

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/v1/recommend"
        return self

    async def __aexit__(self, *error):
        self._server.close()

    async def _serve(self, reader, writer):
        self.connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while await self._answer(reader, writer):
                pass
        writer.close()

    async def _answer(self, reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        (length,) = [
            int(line.split(b":")[1])
            for line in head.lower().splitlines()
            if line.startswith(b"content-length")
        ]
        self.bodies.append(json.loads(await reader.readexactly(length)))
        stall_s, self.stall_s = self.stall_s, 0.0
        await asyncio.sleep(self.delay_s + stall_s)
        status, answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if status is None:
            return False
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        writer.write(b"HTTP/1.1 %d -\r\ncontent-length: %d\r\n\r\n" % (status, len(body)) + body)
        return True


def load(shop, **plan):
    async def run():
        async with shop:
            return await drive(Plan(shop.url, [{"n": 1}, {"n": 2}], **plan))

    return asyncio.run(asyncio.wait_for(run(), 20))


def test_every_kind_of_answer_is_counted():
    short = {**FULL, "source": "covisited", "degraded": True, "recommendations": [1]}
    shop = Shop((200, FULL), (429, {}), (200, short), (None, b""), (200, b"no json"), (202, FULL))

    result = load(shop, seconds=0.06, rate=100, connections=1)

    assert result.statuses == {"200": 3, "429": 1, "202": 1}
    assert result.errors == {"ServerDisconnectedError": 1}
    assert result.sources == {"model": 2, "covisited": 1, "none": 1}
    assert (result.sent, result.answered, result.non_2xx) == (6, 5, 2)
    assert (result.degraded, result.short) == (1, 2)
    assert result.degraded_share == 1 / 5
    assert [failure.split()[2] for failure in result.failures] == ["429", "ServerDisconnectedError"]


def test_open_loop_counts_the_wait_that_a_stall_causes():
    shop = Shop((200, FULL), stall_s=0.5)

    result = load(shop, seconds=0.5, rate=20, connections=1)

    # The first answer takes 500 ms; the others, due every 50 ms, wait for it on one connection.
    late = sorted(result.latencies_ms, reverse=True)
    assert len(late) == 10
    assert all(took > 500 - 50 * place - 1 for place, took in enumerate(late))


def test_closed_loop_sends_when_the_answer_is_there():
    shop = Shop((200, FULL), delay_s=0.05)

    result = load(shop, seconds=0.5, connections=3)

    assert shop.connections == 3
    assert result.sent <= 3 * 10
    assert min(result.latencies_ms) >= 49


def test_answer_that_never_comes_is_an_error():
    result = load(Shop((200, FULL), stall_s=5), seconds=0.02, rate=50, timeout_s=0.3)

    assert result.errors == {"TimeoutError": 1}


def test_bodies_are_sent_in_turn():
    shop = Shop((200, FULL))

    load(shop, seconds=0.05, rate=100, connections=1)

    assert [body["n"] for body in shop.bodies] == [1, 2, 1, 2, 1]


def test_processes_share_schedule_connections_and_bodies():
    plan = Plan(
        "http://shop", [{"n": n} for n in range(5)], 1, rate=100, connections=3, processes=2
    )

    first, second = (_part_of(plan, number) for number in range(2))

    assert (first["rate"], second["rate"]) == (50, 50)
    assert (first["connections"], second["connections"]) == (2, 1)
    assert [body["n"] for body in first["bodies"] + second["bodies"]] == [0, 2, 4, 1, 3]


def test_load_of_several_processes_is_one_account():
    async def run():
        async with Shop((200, FULL)) as shop:
            plan = Plan(shop.url, [{"n": 1}], seconds=0.5, rate=40, processes=2)
            return await asyncio.to_thread(run_load, plan)

    result = asyncio.run(asyncio.wait_for(run(), 60))

    assert result.statuses == {"200": 20}
    assert len(result.latencies_ms) == 20
    assert result.client_cpu_s > 0


def test_load_ends_with_its_block():
    async def run():
        async with Shop((200, FULL)) as shop:

            def start_and_leave():
                with RunningLoad(Plan(shop.url, [{"n": 1}], seconds=60)) as running:
                    return running

            return await asyncio.to_thread(start_and_leave)

    running = asyncio.run(asyncio.wait_for(run(), 30))

    assert [process.returncode for process in running._processes] == [-9]


def test_percentiles_are_of_all_answers():
    result = LoadResult(2.0, (1.0, 2.0, 3.0, 4.0, 5.0))

    assert result.percentile_ms(50) == 3
    assert result.percentile_ms(100) == 5
    assert (result + result).latencies_ms == (1.0, 2.0, 3.0, 4.0, 5.0) * 2
