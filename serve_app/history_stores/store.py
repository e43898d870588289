"""What every history store promises, and how histories of the lake and events that came since are
joined.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

from recsys.queries import Event
from serve_app.event_log import LogRow, Owner


class SeedRow(NamedTuple):
    """The history of one user as the lake knows it, oldest first; the lists are of equal length."""

    user_id: int | str
    item_ids: Sequence[int | str]
    event_types: Sequence[str | None]
    timestamps_us: Sequence[int | None]
    devices: Sequence[str | None]


class HistoryStore(Protocol):
    """Where histories are read. Every method raises HistoryUnavailableError when the store does not
    answer in time.
    """

    needs_push: ClassVar[bool]
    """False where the event log itself is read."""

    async def push(self, rows: Sequence[LogRow]) -> None:
        """Takes events in, each once by its event_id, and none from before its user was erased."""
        ...

    async def recent(self, owner: Owner, name: int | str, limit: int) -> tuple[Event, ...]:
        """The latest events of a user or session by time, then position; oldest first.

        A user's events from the lake come first among those of the same time, and one that came
        back from the lake counts once.
        """
        ...

    async def pushed_until(self, log: str) -> int:
        """Position up to which the events of a log are here for sure. Kept in the store itself, so
        that a store which lost what came last also forgets that it came.
        """
        ...

    async def mark_pushed(self, log: str, position: int) -> None:
        """Sets what `pushed_until` returns."""
        ...

    async def erase(self, user_id: int | str) -> int:
        """Forgets a user; returns the number of events that are gone. Seeds that come later bring
        nothing from before this moment back.
        """
        ...

    def load(self, rows: Iterable[SeedRow]) -> int:
        """Takes histories over from the lake, in place of those taken over before; returns their
        number. Blocks.
        """
        ...

    def load_once(self, version: str, rows: Callable[[], Iterable[SeedRow]]) -> int:
        """`load`, unless this version was loaded before; then 0. A load that broke off is done
        again.
        """
        ...

    async def close(self) -> None: ...


def pack_seed(row: SeedRow) -> str:
    """A seed's events as JSON."""
    events: list[tuple[Any, ...]] = list(
        zip(row.item_ids, row.timestamps_us, row.event_types, row.devices, strict=True)
    )
    return json.dumps(events, separators=(",", ":"))


def unpack_seed(packed: str | bytes | None, erased_until_us: int | None) -> list[Event]:
    """Events of `pack_seed` that came after the user was last erased; none without a seed."""
    if packed is None:
        return []
    events = map(Event._make, json.loads(packed))
    return [event for event in events if is_after(event.timestamp_us, erased_until_us)]


def is_after(moment_us: int | None, erased_until_us: int | None) -> bool:
    """Whether something outlives an erasure."""
    return erased_until_us is None or (moment_us or 0) > erased_until_us


def join_history(seeded: Sequence[Event], logged: Sequence[Event], limit: int) -> tuple[Event, ...]:
    """The last `limit` of both, oldest first; each comes oldest first itself."""
    if not seeded:
        return tuple(logged[-limit:])
    # An event may come back from the lake with the next seed.
    known = {(str(event.item_id), event.timestamp_us) for event in logged}
    new = [event for event in seeded if (str(event.item_id), event.timestamp_us) not in known]
    merged = sorted([*new, *logged], key=lambda event: event.timestamp_us or 0)
    return tuple(merged[-limit:])
