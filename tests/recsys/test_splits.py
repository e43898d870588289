"""Which events train, validate and test."""

from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest
from pydantic import ValidationError

from recsys.errors import TrainingError
from recsys.splits import (
    SplitConfig,
    can_train,
    hold_out,
    leave_one_out,
    split_tokens,
    temporal_cut,
    whole_sequences,
)
from recsys.targets import TargetEvents


def test_the_last_event_tests_and_the_one_before_validates():
    split = leave_one_out(np.array([0, 4, 7]))
    assert split.train_end_U.tolist() == [2, 5]
    assert split.validation_U.tolist() == [2, 5]
    assert split.test_U.tolist() == [3, 6]


def test_users_with_two_events_only_train():
    split = leave_one_out(np.array([0, 2]))
    assert (split.train_end_U[0], split.validation_U[0], split.test_U[0]) == (2, -1, -1)


def test_nothing_is_held_back_from_whole_sequences():
    split = whole_sequences(np.array([0, 2, 5]))
    assert split.train_end_U.tolist() == [2, 5]
    assert split.test_U.tolist() == [-1, -1]


# One user an entry: times, end of training, validation and test position. Cuts at 10 and 20.
TEMPORAL = {
    "events in all periods": ([1, 2, 10, 11, 20, 21], 2, 2, 4),
    "no validation event": ([1, 20], 1, -1, 1),
    "training alone": ([1, 9], 2, -1, -1),
    "nothing before validation": ([12, 20], 0, -1, 1),
    "nothing before test": ([20, 21], 0, -1, -1),
    "events at the cut belong after it": ([9, 10], 1, 1, -1),
}


@pytest.mark.parametrize("name", TEMPORAL)
def test_the_first_event_of_a_later_period_is_its_target(name):
    times, train_end, validation, test = TEMPORAL[name]
    split = temporal_cut(np.array([0, len(times)]), np.array(times), 10, 20)
    assert split.train_end_U.tolist() == [train_end]
    assert split.validation_U.tolist() == [validation]
    assert split.test_U.tolist() == [test]


def test_users_are_cut_one_by_one():
    times_T = np.array([1, 15, 25, 2, 3])
    for which in ("first", "last"):
        split = temporal_cut(np.array([0, 3, 5]), times_T, 10, 20, cut_target=which)
        assert split.train_end_U.tolist() == [1, 5]
        assert split.test_U.tolist() == [2, -1]


# The same users; validation and test position.
LAST_OF_PERIODS = {
    "events in all periods": (3, 5),
    "no validation event": (-1, 1),
    "training alone": (-1, -1),
    "nothing before validation": (-1, 1),
    "nothing before test": (-1, 1),
    "events at the cut belong after it": (1, -1),
}


@pytest.mark.parametrize("name", TEMPORAL)
def test_the_last_event_of_a_later_period_is_its_target_where_that_is_asked(name):
    times, train_end, _, _ = TEMPORAL[name]
    offsets_U = np.array([0, len(times)])
    split = temporal_cut(offsets_U, np.array(times), 10, 20, cut_target="last")
    found = split.train_end_U.tolist(), split.validation_U.tolist(), split.test_U.tolist()
    validation, test = LAST_OF_PERIODS[name]
    assert found == ([train_end], [validation], [test])


def test_a_store_is_cut_by_the_dates_of_the_configuration(make_store):
    store = make_store([[0, 1, 2]], days=[[0, 5, 9]])
    config = SplitConfig(
        kind="temporal-cut",
        validation_from=datetime(1970, 1, 5, tzinfo=UTC),
        test_from=datetime(1970, 1, 8, tzinfo=UTC),
    )
    split = split_tokens(store, config)
    assert (split.train_end_U[0], split.validation_U[0], split.test_U[0]) == (1, 1, 2)

    store = make_store([[0, 1, 2, 3]], days=[[0, 5, 6, 9]])
    split = split_tokens(store, config.model_copy(update={"cut_target": "last"}))
    assert (split.train_end_U[0], split.validation_U[0], split.test_U[0]) == (1, 2, 3)


def test_a_temporal_cut_needs_both_dates():
    with pytest.raises(ValidationError, match="needs validation_from and test_from"):
        SplitConfig(kind="temporal-cut")


def test_validation_comes_before_test():
    moment = datetime(2025, 1, 1, tzinfo=UTC)
    with pytest.raises(ValidationError, match="must lie before test_from"):
        SplitConfig(kind="temporal-cut", validation_from=moment, test_from=moment)


# One user an entry, `p` being targets: end of training, validation and test position.
LAST_TARGETS = {
    "the last two targets, whatever stands around them": ("vpvvpvpv", 4, 4, 6),
    "targets side by side": ("vvpp", 2, 2, 3),
    "one target alone only trains": ("vvpv", 4, -1, -1),
    "none at all": ("vvv", 3, -1, -1),
    "nothing before the first of two": ("pvpv", 4, -1, -1),
    "an event before the first of two": ("vppv", 1, 1, 2),
}


@pytest.mark.parametrize("name", LAST_TARGETS)
def test_the_last_target_tests_and_the_target_before_validates(name):
    events, train_end, validation, test = LAST_TARGETS[name]
    split = leave_one_out(np.array([0, len(events)]), _is_target(events))
    assert split.train_end_U.tolist() == [train_end]
    assert split.validation_U.tolist() == [validation]
    assert split.test_U.tolist() == [test]


def test_targets_of_one_user_are_not_taken_for_those_of_another():
    # Users: two targets, none, one; then two again.
    split = leave_one_out(np.array([0, 4, 6, 8, 11]), _is_target("vvppvvvpvpp"))
    assert split.train_end_U.tolist() == [2, 6, 8, 9]
    assert split.test_U.tolist() == [3, -1, -1, 10]


def test_when_every_event_is_a_target_nothing_changes():
    offsets_U = np.array([0, 1, 3, 6, 10, 10, 17])
    times_T = np.random.default_rng(0).integers(0, 30, 17)
    everything_T = np.ones(17, bool)
    for cut in (
        leave_one_out,
        lambda U, marks=None: temporal_cut(U, times_T, 10, 20, marks),
        lambda U, marks=None: temporal_cut(U, times_T, 10, 20, marks, "last"),
    ):
        plain, marked = cut(offsets_U), cut(offsets_U, everything_T)
        assert plain.train_end_U.tolist() == marked.train_end_U.tolist()
        assert plain.validation_U.tolist() == marked.validation_U.tolist()
        assert plain.test_U.tolist() == marked.test_U.tolist()
        users = can_train(offsets_U, plain), can_train(offsets_U, marked, everything_T)
        assert users[0].tolist() == users[1].tolist()


# Times, events, then as above; cuts at 10 and 20.
TEMPORAL_TARGETS = {
    "first target of each period": ([1, 10, 11, 20, 21], "vvpvp", 1, 2, 4),
    "history of the period alone": ([10, 11, 20, 21], "vpvp", 0, 1, 3),
    "no target in validation": ([1, 10, 20], "pvp", 1, -1, 2),
    "nothing before the target": ([12, 20, 21], "pvp", 0, -1, 2),
    "no target in test": ([1, 10, 20], "vpv", 1, 1, -1),
}


@pytest.mark.parametrize("name", TEMPORAL_TARGETS)
def test_the_first_target_of_a_later_period_is_looked_for_among_its_events(name):
    times, events, train_end, validation, test = TEMPORAL_TARGETS[name]
    offsets_U = np.array([0, len(times)])
    split = temporal_cut(offsets_U, np.array(times), 10, 20, _is_target(events))
    assert split.train_end_U.tolist() == [train_end]
    assert split.validation_U.tolist() == [validation]
    assert split.test_U.tolist() == [test]


# The same users; the last target of each period.
LAST_TEMPORAL_TARGETS = {
    "first target of each period": ([2], [4]),
    "history of the period alone": ([1], [3]),
    "no target in validation": ([-1], [2]),
    "nothing before the target": ([-1], [2]),
    "no target in test": ([1], [-1]),
}


@pytest.mark.parametrize("name", TEMPORAL_TARGETS)
def test_the_last_target_of_a_later_period_is_looked_for_among_its_events(name):
    times, events, _, _, _ = TEMPORAL_TARGETS[name]
    offsets_U = np.array([0, len(times)])
    split = temporal_cut(offsets_U, np.array(times), 10, 20, _is_target(events), "last")
    found = split.validation_U.tolist(), split.test_U.tolist()
    assert found == LAST_TEMPORAL_TARGETS[name]


def test_the_last_target_of_one_user_is_not_taken_for_that_of_the_next():
    # The second user has no target in either period.
    times_T = np.array([1, 10, 11, 20, 21, 1, 10, 20])
    split = temporal_cut(np.array([0, 5, 8]), times_T, 10, 20, _is_target("vppppvvv"), "last")
    assert split.validation_U.tolist() == [2, -1]
    assert split.test_U.tolist() == [4, -1]


def test_a_user_trains_with_a_target_that_has_an_event_before_it():
    offsets_U = np.array([0, 2, 4, 5, 8])
    is_target_T = _is_target("vppvpvvp")
    split = whole_sequences(offsets_U)
    assert can_train(offsets_U, split, is_target_T).tolist() == [True, False, False, True]
    # The last user's only target is held back.
    split.train_end_U[-1] = 7
    assert can_train(offsets_U, split, is_target_T).tolist() == [True, False, False, False]


def test_a_store_is_cut_at_the_targets_of_its_context(make_store):
    store = replace(make_store([[0, 1, 2, 3]]), context_TF=np.array([[1], [2], [2], [1]], np.uint8))
    purchases = TargetEvents(0, np.array([0, 0, 1], np.float32), is_weighted=False)
    split = split_tokens(store, SplitConfig(), purchases)
    assert (split.train_end_U[0], split.validation_U[0], split.test_U[0]) == (1, 1, 2)


def _is_target(events):
    return np.array([event == "p" for event in events])


def test_users_held_out_do_not_validate_and_nobody_tests():
    # Of ten users the last one has no validation event.
    split = leave_one_out(np.array([*range(0, 40, 4), 38]))
    kept, held = hold_out(split, 1 / 3, seed=1)
    assert (len(held), held.max() < 9) == (3, True)
    assert np.flatnonzero(kept.validation_U >= 0).tolist() == sorted(set(range(9)) - set(held))
    assert (kept.test_U == -1).all()
    assert kept.train_end_U.tolist() == split.train_end_U.tolist()
    assert (split.validation_U[held] >= 0).all()
    assert hold_out(split, 1 / 3, seed=1)[1].tolist() == held.tolist()


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_holding_out_leaves_users_on_both_sides(share):
    with pytest.raises(TrainingError, match="of 3 validation users cannot be held out so that"):
        hold_out(leave_one_out(np.array([0, 4, 8, 12])), share)
