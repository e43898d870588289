"""Requests as the model's inputs: a request is the event that comes next, so its context is encoded
as training encodes a target's.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import numpy as np

from recsys.catalogue import PAD
from recsys.context import NO_TIME, ContextEncoder, count_seconds
from recsys.filters import AttributeFilter, ItemId, ItemIndex
from recsys.tokens import previous_times


class Event(NamedTuple):
    """One event of a history; everything but the item may be unknown."""

    item_id: ItemId
    timestamp_us: int | None = None
    """Microseconds in UTC."""
    event_type: str | None = None
    device: str | None = None


@dataclass(frozen=True)
class RequestContext:
    """What is known when the shop asks."""

    timestamp_us: int | None = None
    """Microseconds in UTC."""
    timezone: str | None = None
    """IANA name; None for the shop's own."""
    device: str | None = None
    segment: str | None = None
    own: Mapping[str, str] = field(default_factory=dict)
    """Fields of the shop's own, by the names that training knows them by."""


@dataclass(frozen=True)
class Query:
    """One list to rank: a history, oldest first, the context of the request, and what the list may
    hold.
    """

    history: tuple[Event, ...]
    context: RequestContext = RequestContext()
    k: int = 10
    exclude_seen: bool = True
    exclude_items: tuple[ItemId, ...] = ()
    attributes: AttributeFilter = field(default_factory=AttributeFilter)


@dataclass(frozen=True)
class EncodedQueries:
    """Inputs for `append_request`, left-padded, int64; the seconds int32, 0 where unknown."""

    items_BL: np.ndarray
    context_BLF: np.ndarray
    seconds_BL: np.ndarray
    request_BF: np.ndarray
    request_seconds_B: np.ndarray


def encode_queries(
    queries: Sequence[Query], index: ItemIndex, encoder: ContextEncoder, history_len: int
) -> EncodedQueries:
    """Encodes the last `history_len` known events of each query, and its request.

    Events that the catalogue does not know are left out before gaps are measured, as in training; a
    query without any known event is all padding.
    """
    lanes = [_lane(query, index, history_len) for query in queries]
    lengths_B = np.array([len(lane.items) for lane in lanes])
    offsets_B = np.concatenate([[0], np.cumsum(lengths_B)])
    timestamps_T = np.fromiter(
        chain.from_iterable(lane.timestamps_us for lane in lanes), np.int64, offsets_B[-1]
    )
    codes_TF = _encode_context(queries, lanes, timestamps_T, offsets_B, encoder)
    seconds_T = count_seconds(timestamps_T)

    # The last token of a lane is its request; the first may only lend its time to the one after.
    L = int(np.clip(lengths_B.max(initial=2) - 1, 1, history_len))
    items_BL = np.full((len(queries), L), PAD, np.int64)
    context_BLF = np.zeros((len(queries), L, codes_TF.shape[1]), np.int64)
    seconds_BL = np.zeros((len(queries), L), np.int32)
    for b, (lane, end) in enumerate(zip(lanes, offsets_B[1:] - 1, strict=True)):
        length = min(len(lane.items) - 1, L)
        items_BL[b, L - length :] = lane.items[-1 - length : -1]
        context_BLF[b, L - length :] = codes_TF[end - length : end]
        seconds_BL[b, L - length :] = seconds_T[end - length : end]
    requests_B = offsets_B[1:] - 1
    request_BF = (codes_TF[requests_B] * encoder.known_at_request_F).astype(np.int64)
    return EncodedQueries(items_BL, context_BLF, seconds_BL, request_BF, seconds_T[requests_B])


class _Lane(NamedTuple):
    """Known events of one query and, as the last token, its request."""

    items: np.ndarray
    timestamps_us: list[int]
    event_types: list[str | None]
    devices: list[str | None]


def _lane(query: Query, index: ItemIndex, history_len: int) -> _Lane:
    items = index.encode([event.item_id for event in query.history])
    known = np.flatnonzero(items != PAD)[-history_len - 1 :]
    events = [query.history[place] for place in known]
    times = [event.timestamp_us for event in events] + [query.context.timestamp_us]
    return _Lane(
        np.append(items[known], PAD),
        [NO_TIME if time is None else time for time in times],
        [*(event.event_type for event in events), None],
        [*(event.device for event in events), query.context.device],
    )


def _own_values(
    queries: Sequence[Query], lanes: Sequence[_Lane], name: str
) -> Iterator[str | None]:
    """A field of the shop's own: only the request tells it, the events before are not asked."""
    for query, lane in zip(queries, lanes, strict=True):
        yield from [None] * (len(lane.items) - 1)
        yield query.context.own.get(name)


def _encode_context(
    queries: Sequence[Query],
    lanes: Sequence[_Lane],
    timestamps_T: np.ndarray,
    offsets_B: np.ndarray,
    encoder: ContextEncoder,
) -> np.ndarray:
    previous_T = previous_times(timestamps_T, offsets_B)
    values = {
        "device": chain.from_iterable(lane.devices for lane in lanes),
        "event_type": chain.from_iterable(lane.event_types for lane in lanes),
        "segment": chain.from_iterable(
            [query.context.segment] * len(lane.items)
            for query, lane in zip(queries, lanes, strict=True)
        ),
    }
    columns = {
        name: encoder.look_up(name, list(values.get(name) or _own_values(queries, lanes, name)))
        for name in encoder.config.categorical
    }
    # The clock of a query is its own; nearly always they share one.
    zones = [query.context.timezone for query in queries]
    if len(set(zones)) == 1:
        return encoder.encode(timestamps_T, previous_T, columns, timezone=zones[0])
    codes_TF = np.zeros((len(timestamps_T), len(encoder.fields)), np.uint8)
    for zone in set(zones):
        is_here_T = np.repeat([name == zone for name in zones], np.diff(offsets_B))
        codes_TF[is_here_T] = encoder.encode(timestamps_T, previous_T, columns, timezone=zone)[
            is_here_T
        ]
    return codes_TF
