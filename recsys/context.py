"""Context as small integer codes, one a field and event; training and serving encode it with the
same function.

Code 0 of every field means unknown. A request knows its own time, device and segment but not the
event type that will follow, so `known_at_request` says which fields a scored position may carry.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict

UNKNOWN = 0
NO_TIME = np.iinfo(np.int64).min
"""Stands for a missing timestamp, and for the time before a user's first event."""

TimeField = Literal["hour", "weekday", "gap"]
_TIME_SIZES: dict[str, int] = {"hour": 25, "weekday": 8, "gap": 32}
_MAX_CATEGORIES = 254
_TIMES_AT_ONCE = 2**16  # what is in between stays in the cache
_NOT_KNOWN_AT_REQUEST = frozenset({"event_type"})


class ContextConfig(BaseModel):
    """Which fields accompany an item; order is the order of the codes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    categorical: tuple[str, ...] = ("device", "segment", "event_type")
    """Columns whose values become codes; values are learned from the training events."""
    time: tuple[TimeField, ...] = ("hour", "weekday", "gap")
    """Hour of day, day of week, and the gap to the previous event in powers of two of a second."""
    timezone: str = "UTC"
    """The shop's own clock, an IANA name; a request may bring its own."""

    @property
    def fields(self) -> tuple[str, ...]:
        return self.categorical + self.time


@dataclass(frozen=True)
class ContextEncoder:
    """Turns columns into codes. `vocabularies` holds the known values of each categorical field."""

    config: ContextConfig
    vocabularies: Mapping[str, tuple[str, ...]]

    @classmethod
    def learn(
        cls, config: ContextConfig, counts: Mapping[str, Mapping[str, int]]
    ) -> "ContextEncoder":
        """Keeps the most frequent values of each categorical field (254 at most), from their
        counts.
        """
        vocabularies = {}
        for name in config.categorical:
            seen = counts.get(name, {})
            vocabularies[name] = tuple(
                sorted(seen, key=lambda value: (-seen[value], value))[:_MAX_CATEGORIES]
            )
        return cls(config, vocabularies)

    @property
    def fields(self) -> tuple[str, ...]:
        return self.config.fields

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of codes of each field, the unknown one included."""
        return tuple(len(self.vocabularies[name]) + 1 for name in self.config.categorical) + tuple(
            _TIME_SIZES[name] for name in self.config.time
        )

    @property
    def known_at_request_F(self) -> np.ndarray:
        """Which fields the scored position may carry, bool."""
        return np.array([name not in _NOT_KNOWN_AT_REQUEST for name in self.fields], bool)

    def encode(
        self,
        timestamps_us: np.ndarray,
        previous_us: np.ndarray,
        columns: Mapping[str, pa.Array | np.ndarray],
        *,
        timezone: str | None = None,
    ) -> np.ndarray:
        """Codes of T events, uint8 `[T, F]`.

        Args:
            timestamps_us: int64 `[T]`, microseconds in UTC; NO_TIME where missing.
            previous_us: int64 `[T]`, time of the same user's event before; NO_TIME where there is
                none.
            columns: string arrays `[T]` for the categorical fields, or codes by `look_up`; a
                missing column is unknown throughout.
            timezone: replaces the configured one.
        """
        codes_TF = np.zeros((len(timestamps_us), len(self.fields)), np.uint8)
        for f, name in enumerate(self.config.categorical):
            column = columns.get(name)
            if column is not None:
                is_coded = isinstance(column, np.ndarray)
                codes_TF[:, f] = column if is_coded else self._encode_values(name, column)
        num_categorical = len(self.config.categorical)
        for f, name in enumerate(self.config.time, start=num_categorical):
            codes_TF[:, f] = _encode_time(
                name, timestamps_us, previous_us, timezone or self.config.timezone
            )
        return codes_TF

    def look_up(self, name: str, values: Sequence[str | None]) -> np.ndarray:
        """Codes of a few values of a categorical field, uint8: faster than an array of them."""
        codes = self._codes[name]
        return np.array([codes.get(value, UNKNOWN) for value in values], np.uint8)

    @cached_property
    def _codes(self) -> dict[str, dict[str | None, int]]:
        return {
            name: {value: code for code, value in enumerate(values, start=1)}
            for name, values in self.vocabularies.items()
        }

    def _encode_values(self, name: str, values: pa.Array) -> np.ndarray:
        if pa.types.is_dictionary(values.type):
            known_V = self._encode_values(name, values.dictionary)
            places = pc.fill_null(values.indices, len(known_V))
            places_T = places.to_numpy(zero_copy_only=False)
            codes_T: np.ndarray = np.append(known_V, UNKNOWN).astype(np.uint8)[places_T]
            return codes_T
        found = pc.index_in(values, pa.array(self.vocabularies[name], pa.string()))
        codes: np.ndarray = pc.fill_null(pc.add(found, 1), UNKNOWN).to_numpy(zero_copy_only=False)
        return codes

    def write(self, path: Path) -> None:
        content = {"config": self.config.model_dump(mode="json"), "vocabularies": self.vocabularies}
        path.write_text(json.dumps(content, indent=1))

    @classmethod
    def read(cls, path: Path) -> "ContextEncoder":
        content = json.loads(path.read_text())
        vocabularies = {name: tuple(values) for name, values in content["vocabularies"].items()}
        return cls(ContextConfig.model_validate(content["config"]), vocabularies)


def count_seconds(timestamps_us: np.ndarray) -> np.ndarray:
    """Seconds from the first of the times, which is 1, int32; 0 stands for a missing time, and what
    is later than 68 years counts as that.
    """
    times_T = timestamps_us.reshape(-1)
    is_known_T = times_T != NO_TIME
    first_us = times_T.min(where=is_known_T, initial=np.iinfo(np.int64).max)
    seconds_T = np.zeros(times_T.shape, np.int32)
    for start in range(0, len(times_T), _TIMES_AT_ONCE):
        part = slice(start, start + _TIMES_AT_ONCE)
        after = times_T[part] - first_us
        after //= 1_000_000
        np.minimum(after, 2**31 - 2, out=after)
        seconds_T[part] = (after + 1) * is_known_T[part]
    return seconds_T.reshape(timestamps_us.shape)


def _encode_time(
    name: str, timestamps_us: np.ndarray, previous_us: np.ndarray, timezone: str
) -> np.ndarray:
    is_missing = timestamps_us == NO_TIME
    if name == "gap":
        is_missing = is_missing | (previous_us == NO_TIME)
        gap_s = (
            np.maximum(
                np.where(is_missing, 0, timestamps_us - np.where(is_missing, 0, previous_us)), 0
            )
            // 1_000_000
        )
        codes = np.minimum(1 + np.log2(1 + gap_s).astype(np.int64), _TIME_SIZES["gap"] - 1)
    else:
        local = pa.array(np.where(is_missing, 0, timestamps_us), pa.timestamp("us", tz=timezone))
        codes = 1 + (pc.hour(local) if name == "hour" else pc.day_of_week(local)).to_numpy(
            zero_copy_only=False
        )
    return np.where(is_missing, UNKNOWN, codes).astype(np.uint8)
