"""Which positions train, validate and test: defined here once, over the offsets of a token store.

A position is an index into the flat tokens; a user without a target has -1. What a model may read
before a target is everything of that user that stands before it.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

import numpy as np
from pydantic import AwareDatetime, BaseModel, ConfigDict, model_validator

from recsys.tokens import TokenStore


class SplitConfig(BaseModel):
    """How sequences are cut."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["leave-one-out", "temporal-cut"] = "leave-one-out"
    """leave-one-out: last event tests, the one before validates. temporal-cut: by the clock, for
    everybody.
    """
    validation_from: AwareDatetime | None = None
    """temporal-cut: events before it train."""
    test_from: AwareDatetime | None = None
    """temporal-cut: a user's first event at or after it tests."""

    @model_validator(mode="after")
    def _has_cuts(self) -> "SplitConfig":
        if self.kind == "temporal-cut":
            if self.validation_from is None or self.test_from is None:
                raise ValueError("a temporal-cut needs validation_from and test_from")
            if self.validation_from >= self.test_from:
                raise ValueError("validation_from must lie before test_from")
        return self


@dataclass(frozen=True)
class Split:
    """All int64 `[U]`: training reads `offsets_U[u]:train_end_U[u]`; the targets are positions or
    -1.
    """

    train_end_U: np.ndarray
    validation_U: np.ndarray
    test_U: np.ndarray


def split_tokens(store: TokenStore, config: SplitConfig) -> Split:
    """Cuts every user of the store as configured."""
    return split_offsets(store.offsets_U, store.timestamps_T, config)


def split_offsets(offsets_U: np.ndarray, timestamps_T: np.ndarray, config: SplitConfig) -> Split:
    """Cuts users given by their offsets `[U + 1]` and the microseconds of their events."""
    if config.kind == "leave-one-out":
        return leave_one_out(offsets_U)
    assert config.validation_from is not None
    assert config.test_from is not None
    cuts = _microseconds(config.validation_from), _microseconds(config.test_from)
    return temporal_cut(offsets_U, timestamps_T, *cuts)


def leave_one_out(offsets_U: np.ndarray) -> Split:
    """Last event tests, the one before validates; users with fewer than three events only train."""
    starts_U, ends_U = offsets_U[:-1], offsets_U[1:]
    has_targets_U = ends_U - starts_U >= 3
    return Split(
        train_end_U=np.where(has_targets_U, ends_U - 2, ends_U),
        validation_U=np.where(has_targets_U, ends_U - 2, -1),
        test_U=np.where(has_targets_U, ends_U - 1, -1),
    )


def whole_sequences(offsets_U: np.ndarray) -> Split:
    """Everything trains and nothing is held back."""
    none_U = np.full(len(offsets_U) - 1, -1)
    return Split(train_end_U=offsets_U[1:], validation_U=none_U, test_U=none_U)


def temporal_cut(
    offsets_U: np.ndarray, timestamps_T: np.ndarray, validation_us: int, test_us: int
) -> Split:
    """Events before `validation_us` train; a user's first event in each later period is its target
    there.

    A target needs at least one event before it.
    """
    starts_U = offsets_U[:-1]
    train_end_U = starts_U + _count_before(offsets_U, timestamps_T, validation_us)
    test_start_U = starts_U + _count_before(offsets_U, timestamps_T, test_us)
    has_validation_U = (train_end_U < test_start_U) & (train_end_U > starts_U)
    has_test_U = (test_start_U < offsets_U[1:]) & (test_start_U > starts_U)
    return Split(
        train_end_U=train_end_U,
        validation_U=np.where(has_validation_U, train_end_U, -1),
        test_U=np.where(has_test_U, test_start_U, -1),
    )


def _count_before(offsets_U: np.ndarray, timestamps_T: np.ndarray, time_us: int) -> np.ndarray:
    before_T = np.concatenate([[0], np.cumsum(timestamps_T < time_us)])
    counts_U: np.ndarray = before_T[offsets_U[1:]] - before_T[offsets_U[:-1]]
    return counts_U


def _microseconds(moment: datetime) -> int:
    return round(moment.timestamp() * 1_000_000)
