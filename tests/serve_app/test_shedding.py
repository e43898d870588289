"""More load than the endpoint takes: what is too much is refused at once, the rest is answered."""

from benchmarks.load import Plan, run_load
from tests.serve_app.http_server import running

BODIES = [{"user_history": [f"i{n % 40}", f"i{n // 40}"]} for n in range(400)]


def url_of(port):
    return f"http://127.0.0.1:{port}/v1/recommend"


def test_every_request_within_the_bound_gets_a_full_list_of_the_model(open_front):
    with running(open_front(max_in_flight=16).app) as port:
        result = run_load(Plan(url_of(port), BODIES, seconds=1, connections=16))

    assert result.non_2xx == 0
    assert (result.short, result.degraded) == (0, 0)
    assert set(result.sources) == {"model"}


def test_overload_is_shed_with_429_and_nothing_else(open_front):
    front = open_front(max_in_flight=4)
    front.ranker.delay_s = 0.05
    with running(front.app) as port:
        result = run_load(Plan(url_of(port), BODIES, seconds=1, connections=16))
        shed = front.recommender.metrics.shed.labels()._value.get()

    assert set(result.statuses) == {"200", "429"}
    assert not result.errors
    assert (result.short, result.degraded) == (0, 0)
    assert shed == result.statuses["429"]
    assert all("too_many_requests" in failure for failure in result.failures)


def test_dead_ranker_costs_no_list(open_front):
    front = open_front(deadline_ms=70)
    front.ranker.die()
    with running(front.app) as port:
        result = run_load(Plan(url_of(port), BODIES, seconds=1, rate=50))

    assert result.statuses == {"200": 50}
    assert (result.short, result.degraded) == (0, 50)
    assert "model" not in result.sources


def test_slow_ranker_costs_no_list(open_front):
    front = open_front(deadline_ms=30)
    front.ranker.delay_s = 0.5
    with running(front.app) as port:
        result = run_load(Plan(url_of(port), BODIES, seconds=1, rate=50))

    assert result.statuses == {"200": 50}
    assert (result.short, result.degraded) == (0, 50)
