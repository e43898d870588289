"""A circuit breaker: a ranker that failed several times in a row is left alone for a while, so that
its death does not cost every request its deadline.
"""

import time
from collections.abc import Callable
from typing import Literal

State = Literal["closed", "open", "half-open"]


class CircuitBreaker:
    """Closed lets everything pass. After `failures` in a row it opens; `open_s` later it lets one
    request try, whose outcome closes or opens it again.
    """

    def __init__(
        self, failures: int, open_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limit = failures
        self._open_s = open_s
        self._clock = clock
        self._failures = 0
        self._opened_at: float | None = None
        self._is_probing = False

    @property
    def state(self) -> State:
        if self._opened_at is None:
            return "closed"
        is_over = self._clock() - self._opened_at >= self._open_s
        return "half-open" if is_over or self._is_probing else "open"

    def allows(self) -> bool:
        """Whether a request may pass; who is let pass must record the outcome."""
        if self.state == "closed":
            return True
        if self.state == "open" or self._is_probing:
            return False
        self._is_probing = True
        return True

    def record_success(self) -> None:
        self._failures, self._opened_at, self._is_probing = 0, None, False

    def record_failure(self) -> None:
        self._failures += 1
        if self._is_probing or self._failures >= self._limit:
            self._opened_at = self._clock()
        self._is_probing = False
