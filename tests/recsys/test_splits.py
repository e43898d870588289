"""Which events train, validate and test."""

from datetime import UTC, datetime

import numpy as np
import pytest
from pydantic import ValidationError

from recsys.splits import SplitConfig, leave_one_out, split_tokens, temporal_cut, whole_sequences


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
    split = temporal_cut(np.array([0, 3, 5]), times_T, 10, 20)
    assert split.train_end_U.tolist() == [1, 5]
    assert split.test_U.tolist() == [2, -1]


def test_a_store_is_cut_by_the_dates_of_the_configuration(make_store):
    store = make_store([[0, 1, 2]], days=[[0, 5, 9]])
    config = SplitConfig(
        kind="temporal-cut",
        validation_from=datetime(1970, 1, 5, tzinfo=UTC),
        test_from=datetime(1970, 1, 8, tzinfo=UTC),
    )
    split = split_tokens(store, config)
    assert (split.train_end_U[0], split.validation_U[0], split.test_U[0]) == (1, 1, 2)


def test_a_temporal_cut_needs_both_dates():
    with pytest.raises(ValidationError, match="needs validation_from and test_from"):
        SplitConfig(kind="temporal-cut")


def test_validation_comes_before_test():
    moment = datetime(2025, 1, 1, tzinfo=UTC)
    with pytest.raises(ValidationError, match="must lie before test_from"):
        SplitConfig(kind="temporal-cut", validation_from=moment, test_from=moment)
