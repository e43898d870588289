import numpy as np
import pytest

from data_lake.ordering import chronological_order, radix_order, run_starts


def reference(user, timestamp, ingested, arrival):
    return np.lexsort((arrival, ingested, timestamp, user))


def draw(seed, *, num_rows=5_000, num_users=300, times=2**40, loads=3):
    rng = np.random.default_rng(seed)
    user = rng.integers(0, num_users, num_rows).astype(np.int32)
    timestamp = rng.integers(-times, times, num_rows)
    return user, timestamp, rng.integers(0, loads, num_rows), rng.permutation(num_rows)


@pytest.mark.parametrize("times", [1, 50, 2**40, 2**61])
@pytest.mark.parametrize("num_users", [1, 300, 100_000])
def test_order_equals_a_sort_by_all_four_keys(times, num_users):
    keys = draw(1, times=times, num_users=num_users)
    assert np.array_equal(chronological_order(*keys), reference(*keys))


def test_rows_in_random_order_beyond_the_sample_are_sorted():
    keys = draw(2, num_rows=60_000, times=10**6)
    assert np.array_equal(chronological_order(*keys), reference(*keys))


@pytest.mark.parametrize("num_swapped", [0, 1, 40])
def test_almost_ordered_rows_are_mended(num_swapped):
    rng = np.random.default_rng(3)
    keys = draw(3, num_rows=40_000)
    keys = tuple(key[reference(*keys)] for key in keys)
    rows = np.arange(40_000)
    chosen = rng.choice(40_000, 2 * num_swapped, replace=False)
    rows[chosen] = rows[chosen[::-1]]
    keys = tuple(key[rows] for key in keys)
    assert np.array_equal(chronological_order(*keys), reference(*keys))


def test_ties_in_time_are_settled_by_load_and_then_by_arrival():
    user, timestamp = np.zeros(4, np.int32), np.array([7, 7, 7, 7])
    order = chronological_order(user, timestamp, np.array([1, 1, 0, 0]), np.array([3, 2, 9, 8]))
    assert order.tolist() == [3, 2, 1, 0]


def test_no_rows_have_an_order():
    empty = np.empty(0, np.int64)
    assert chronological_order(empty.astype(np.int32), empty, empty, empty).tolist() == []


@pytest.mark.parametrize("top", [0, 1, 2**16, 2**40])
def test_radix_order_is_a_stable_sort(top):
    keys = np.random.default_rng(4).integers(0, top + 1, 3_000)
    assert np.array_equal(radix_order(keys), np.argsort(keys, kind="stable"))


def test_runs_start_where_any_key_changes():
    assert run_starts(np.array([1, 1, 2, 2]), np.array([5, 5, 5, 6])).tolist() == [0, 2, 3]
