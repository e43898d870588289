"""The way of an event through this process: into the log, which makes it durable, into the history,
where the next request finds it, and later to the lake.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from functools import partial

from serve_app.breaker import CircuitBreaker
from serve_app.errors import EventsUnavailableError, HistoryUnavailableError
from serve_app.event_log import Backlog, EventLog, LoggedEvent, LogRow, rows_after
from serve_app.file_lock import FileLock
from serve_app.history_stores.opening import open_history
from serve_app.history_stores.store import HistoryStore
from serve_app.settings import Settings
from serve_app.shipping import Shipper

log = logging.getLogger(__name__)

_FOLLOWS_EVERY_S = 1.0
_LONGEST_PAUSE_S = 5.0
_REPLAYED_AT_ONCE = 200
_LEFT_ALONE_S = 1.0
"""A history that failed is not pushed to by requests for so long."""


class Intake:
    """What the event routes work with; one per process.

    A history that is down does not hold an event up: its log is replayed, in order, when the
    history is back. Of the processes that share a log one replays, and it replays all of it: what
    requests have pushed already changes nothing.

    Args:
        push_timeout_s: so long an event waits for the history, at most.
    """

    def __init__(
        self,
        events: EventLog,
        history: HistoryStore,
        shipper: Shipper | None = None,
        *,
        push_timeout_s: float = 0.03,
    ) -> None:
        self.history = history
        self.events = events
        self._shipper = shipper
        self._push_timeout_s = push_timeout_s
        self._breaker = CircuitBreaker(1, _LEFT_ALONE_S)
        path = events.file.path
        self._lock = FileLock(path.with_name(f"{path.name}.replay-lock"))
        self._follower: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Carries events on in the background, on the running loop."""
        if self._shipper is not None:
            self._shipper.start()
        if self.history.needs_push and self._follower is None:
            self._follower = asyncio.get_running_loop().create_task(self._follow())
            self._follower.add_done_callback(_report_death)

    async def accept(self, events: Sequence[LoggedEvent]) -> list[bool]:
        """Whether each event is new; returns when all are on disk.

        Raises: EventsUnavailableError.
        """
        positions = await self.events.append(events)
        new = [
            LogRow(position, event)
            for position, event in zip(positions, events, strict=True)
            if position is not None
        ]
        if new and self.history.needs_push:
            await self._push(new)
        return [position is not None for position in positions]

    async def erase(self, user_id: int | str) -> int:
        """Forgets a user here, shipped or not; returns the number of events that are gone from the
        history. What was shipped is erased by `ray_jobs.maintain`.

        Raises: HistoryUnavailableError or EventsUnavailableError; then it is to be asked for again.
        """
        # First the history, which refuses from then on what is still on its way.
        gone = await self.history.erase(user_id)
        await self.events.erase(user_id)
        return gone

    async def replay(self) -> int:
        """Pushes what the history may lack; returns the number of events.

        Raises: HistoryUnavailableError or EventsUnavailableError.
        """
        total = 0
        position = await self.history.pushed_until(self.events.name)
        while rows := await self.events.read(
            partial(rows_after, position=position, limit=_REPLAYED_AT_ONCE)
        ):
            await self.history.push(rows)
            position = rows[-1].position
            await self.history.mark_pushed(self.events.name, position)
            total += len(rows)
        return total

    async def close(self) -> None:
        """Ships what waits, and closes the history and the log."""
        if self._follower is not None:
            self._follower.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._follower
        if self._shipper is not None:
            await asyncio.to_thread(self._shipper.close)
        await self.history.close()
        await asyncio.to_thread(self.events.close)
        self._lock.release()

    async def _push(self, rows: Sequence[LogRow]) -> None:
        if not self._breaker.allows():
            return
        try:
            async with asyncio.timeout(self._push_timeout_s):
                await self.history.push(rows)
        except (TimeoutError, HistoryUnavailableError) as error:
            log.warning("An event is not in the history yet (%s).", error or "it took too long")
            self._breaker.record_failure()
        except asyncio.CancelledError:
            self._breaker.record_failure()
            raise
        else:
            self._breaker.record_success()

    async def _follow(self) -> None:
        pause_s = _FOLLOWS_EVERY_S
        while True:
            try:
                if self._lock.acquire():
                    await self.replay()
                pause_s = _FOLLOWS_EVERY_S
            except (HistoryUnavailableError, EventsUnavailableError) as error:
                log.warning("The history is behind the log (%s).", error)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            await asyncio.sleep(pause_s)


def _report_death(follower: asyncio.Task[None]) -> None:
    if not follower.cancelled():
        log.error("Nobody replays the log any more.", exc_info=follower.exception())


def open_intake(
    settings: Settings, on_backlog: Callable[[Backlog], None] = lambda backlog: None
) -> Intake:
    """The log, the history and the way to the lake that the settings name, not started yet.

    Args:
        on_backlog: is told what waits on the way to the lake, again and again.

    Raises: SettingsError; EventsUnavailableError when the log cannot be opened.
    """
    events = EventLog(settings.history_path, timeout_s=settings.events_timeout_ms / 1000)
    history = open_history(settings, events)
    shipper = None
    if settings.events_landing is not None:
        shipper = Shipper(
            events,
            settings.events_landing,
            every_s=settings.ship_every_s,
            max_rows=settings.ship_rows,
            keep_days=settings.log_keep_days,
            on_backlog=on_backlog,
        )
    return Intake(events, history, shipper, push_timeout_s=settings.history_timeout_s)
