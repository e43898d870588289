"""Which positions train, validate and test: defined here once, over the offsets of a token store.

A position is an index into the flat tokens; a user without a target has -1. What a model may read
before a target is everything of that user that stands before it.

Where only some events are targets (`recsys.targets`), only these are counted when a target is
looked for; what stands between them is history. `is_target_T` of None means that every event is
one.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

import numpy as np
from pydantic import AwareDatetime, BaseModel, ConfigDict, model_validator

from recsys.errors import TrainingError
from recsys.targets import TargetEvents
from recsys.tokens import TokenStore

CutTarget = Literal["first", "last"]


class SplitConfig(BaseModel):
    """How sequences are cut."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["leave-one-out", "temporal-cut"] = "leave-one-out"
    """leave-one-out: last target event tests, the one before validates. temporal-cut: by the clock,
    for everybody.
    """
    validation_from: AwareDatetime | None = None
    """temporal-cut: events before it train."""
    test_from: AwareDatetime | None = None
    """temporal-cut: target events at or after it test, one of a user."""
    cut_target: CutTarget = "first"
    """temporal-cut: which target event of each later period. The first follows what was trained;
    before the last one stands all that its user did in the period, as a shop sees it between two
    trainings.
    """

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


def split_tokens(
    store: TokenStore, config: SplitConfig, targets: TargetEvents | None = None
) -> Split:
    """Cuts every user of the store as configured."""
    is_target_T = None if targets is None else targets.mark(store.context_TF)
    return split_offsets(store.offsets_U, store.timestamps_T, config, is_target_T)


def hold_out(split: Split, share: float, seed: int = 0) -> tuple[Split, np.ndarray]:
    """A split that validates fewer users and tests none, and the users held out, int64, sorted.

    What is chosen among many by the validation users that stay is compared without flattery on
    those held out, and no test target is looked at. The same users are held out for a seed.

    Raises: TrainingError when one of the two parts would be empty.
    """
    users = np.flatnonzero(split.validation_U >= 0)
    num_held = round(share * len(users))
    if not 0 < num_held < len(users):
        raise TrainingError(
            f"{share:.0%} of {len(users)} validation users cannot be held out so that some are on "
            "both sides; ingest more users or choose another share."
        )
    held = np.sort(np.random.default_rng([seed, 29]).choice(users, num_held, replace=False))
    validation_U = split.validation_U.copy()
    validation_U[held] = -1
    return Split(split.train_end_U, validation_U, np.full_like(split.test_U, -1)), held


def split_offsets(
    offsets_U: np.ndarray,
    timestamps_T: np.ndarray,
    config: SplitConfig,
    is_target_T: np.ndarray | None = None,
) -> Split:
    """Cuts users given by their offsets `[U + 1]` and the microseconds of their events."""
    if config.kind == "leave-one-out":
        return leave_one_out(offsets_U, is_target_T)
    assert config.validation_from is not None
    assert config.test_from is not None
    cuts = _microseconds(config.validation_from), _microseconds(config.test_from)
    return temporal_cut(offsets_U, timestamps_T, *cuts, is_target_T, config.cut_target)


def leave_one_out(offsets_U: np.ndarray, is_target_T: np.ndarray | None = None) -> Split:
    """The last target tests, the one before validates and ends training; users without two targets
    that have an event before them (three events, where all are targets) only train.
    """
    starts_U, ends_U = offsets_U[:-1], offsets_U[1:]
    last_U, second_last_U = _last_two(ends_U, is_target_T)
    # Of a user with fewer targets these are somebody else's, who stands before.
    has_targets_U = second_last_U > starts_U
    return Split(
        train_end_U=np.where(has_targets_U, second_last_U, ends_U),
        validation_U=np.where(has_targets_U, second_last_U, -1),
        test_U=np.where(has_targets_U, last_U, -1),
    )


def whole_sequences(offsets_U: np.ndarray) -> Split:
    """Everything trains and nothing is held back."""
    none_U = np.full(len(offsets_U) - 1, -1)
    return Split(train_end_U=offsets_U[1:], validation_U=none_U, test_U=none_U)


def temporal_cut(
    offsets_U: np.ndarray,
    timestamps_T: np.ndarray,
    validation_us: int,
    test_us: int,
    is_target_T: np.ndarray | None = None,
    cut_target: CutTarget = "first",
) -> Split:
    """Events before `validation_us` train; the first or last target event of a user in each later
    period is its target there.

    A target needs at least one event before it, of whatever period.
    """
    starts_U, ends_U = offsets_U[:-1], offsets_U[1:]
    train_end_U = starts_U + _count_before(offsets_U, timestamps_T, validation_us)
    test_start_U = starts_U + _count_before(offsets_U, timestamps_T, test_us)
    later_U = []
    for from_U, until_U in ((train_end_U, test_start_U), (test_start_U, ends_U)):
        if cut_target == "first":
            targets_U = _first_from(from_U, is_target_T)
        else:
            targets_U, _ = _last_two(until_U, is_target_T)
        is_there_U = (targets_U >= from_U) & (targets_U < until_U) & (targets_U > starts_U)
        later_U.append(np.where(is_there_U, targets_U, -1))
    return Split(train_end_U, *later_U)


def can_train(
    offsets_U: np.ndarray, split: Split, is_target_T: np.ndarray | None = None
) -> np.ndarray:
    """Users with something to learn from, bool `[U]`: a training event that is a target and has
    another one before it.
    """
    seconds_U = np.minimum(offsets_U[:-1] + 1, split.train_end_U)
    if is_target_T is None:
        before_U, until_U = seconds_U, split.train_end_U
    else:
        counts_T = _cumulate(is_target_T)
        before_U, until_U = counts_T[seconds_U], counts_T[split.train_end_U]
    is_trainable_U: np.ndarray = before_U < until_U
    return is_trainable_U


def _last_two(ends_U: np.ndarray, is_target_T: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the last and the second last target before each end; -1 where there is none."""
    if is_target_T is None:
        return ends_U - 1, ends_U - 2
    positions = np.concatenate([[-1, -1], np.flatnonzero(is_target_T)])
    counts_U = _cumulate(is_target_T)[ends_U]
    return positions[counts_U + 1], positions[counts_U]


def _first_from(starts_U: np.ndarray, is_target_T: np.ndarray | None) -> np.ndarray:
    """Position of the first target at or after each start; the number of tokens without one."""
    if is_target_T is None:
        return starts_U
    positions = np.append(np.flatnonzero(is_target_T), len(is_target_T))
    first_U: np.ndarray = positions[_cumulate(is_target_T)[starts_U]]
    return first_U


def _count_before(offsets_U: np.ndarray, timestamps_T: np.ndarray, time_us: int) -> np.ndarray:
    before_T = _cumulate(timestamps_T < time_us)
    counts_U: np.ndarray = before_T[offsets_U[1:]] - before_T[offsets_U[:-1]]
    return counts_U


def _cumulate(is_so_T: np.ndarray) -> np.ndarray:
    """How many of the tokens before each position are so, `[T + 1]`."""
    counts_T: np.ndarray = np.concatenate([[0], np.cumsum(is_so_T)])
    return counts_T


def _microseconds(moment: datetime) -> int:
    return round(moment.timestamp() * 1_000_000)
