from serve_app.breaker import CircuitBreaker


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_opens_after_failures_in_a_row_only():
    breaker = CircuitBreaker(2, 1.0, Clock())

    breaker.record_failure()
    breaker.record_success()
    breaker.record_failure()
    assert breaker.allows()

    breaker.record_failure()
    assert breaker.state == "open"
    assert not breaker.allows()


def test_one_probe_decides_after_the_pause():
    clock = Clock()
    breaker = CircuitBreaker(1, 1.0, clock)
    breaker.record_failure()

    clock.now = 1.0
    assert [breaker.allows(), breaker.allows()] == [True, False]
    assert breaker.state == "half-open"

    breaker.record_failure()
    assert not breaker.allows()

    clock.now = 2.0
    assert breaker.allows()
    breaker.record_success()
    assert breaker.state == "closed"
