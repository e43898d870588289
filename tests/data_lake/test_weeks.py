"""Figures of the newest weeks, by which a broken feed is told from a good one."""

from datetime import UTC, datetime
from math import log2

import numpy as np
import pyarrow as pa
import pytest

from data_lake.weeks import (
    Weeks,
    add_counts,
    agreement,
    count_bucket,
    describe_weeks,
    divergence,
)

DAY_US = 86_400_000_000
END = datetime(2026, 1, 29, tzinfo=UTC)
LEADERS = pa.array([1, 2, 3])
TWO = Weeks.ending(END, 7, 1, 2)


def events(*rows):
    """user, item, days before the end; later rows came later."""
    users, items, days = zip(*rows, strict=True)
    times = [TWO.until_us - round(day * DAY_US) for day in days]
    return pa.table(
        {
            "user_id": pa.array(users, pa.string()),
            "item_id": pa.array(items, pa.int64()),
            "timestamp": pa.array(times).cast(pa.timestamp("us", tz="UTC")),
            "ingested_at": pa.array([0] * len(rows)).cast(pa.timestamp("us", tz="UTC")),
            "arrival": pa.array(range(len(rows))),
        }
    )


def describe(weeks, *buckets, known=(1, 2, 3)):
    counts = add_counts([count_bucket(bucket, weeks, LEADERS) for bucket in buckets])
    return describe_weeks(counts, weeks, LEADERS, pa.array(known))


def test_weeks_are_numbered_from_the_newest_and_end_before_their_end():
    days = np.array([-0.1, 0, 1e-9, 6.99, 7, 20.99, 21.01]) * DAY_US
    numbers = TWO.number(TWO.until_us - np.round(days).astype(np.int64))
    assert numbers.tolist() == [-1, -1, 0, 0, 0, 2, -1]


def test_rows_are_counted_over_all_buckets():
    found = describe(
        TWO, events(("a", 1, 1), ("a", 2, 8)), events(("b", 1, 2), ("b", 1, 9), ("b", 1, 30))
    )
    assert found.rows_W == (2, 2, 0)


def test_items_are_unknown_that_neither_the_shop_nor_the_weeks_before_know():
    week = events(("a", 1, 1), ("a", 7, 1), ("a", 8, 1), ("a", 9, 1), ("a", 8, 8))
    assert describe(TWO, week, known=(1, 9)).unknown_shares == (1 / 4,)


def test_one_item_follows_another_of_the_same_user_in_the_order_of_time():
    week = events(("a", 2, 1), ("a", 1, 2), ("b", 3, 1.5), ("a", 2, 0.5), ("a", 5, 3))
    followers = count_bucket(week, TWO, LEADERS).followers
    # 1 then 2; the same item again, items that do not lead and other users are no pairs.
    assert followers.to_pylist() == [{"cell": 1, "count": 1}]


def test_a_pair_counts_in_the_week_of_its_second_event():
    followers = count_bucket(events(("a", 1, 8), ("a", 3, 6)), TWO, LEADERS).followers
    assert followers.to_pylist() == [{"cell": 2, "count": 1}]


def test_events_of_one_moment_stand_as_they_arrived():
    followers = count_bucket(events(("a", 3, 1), ("a", 1, 1)), TWO, LEADERS).followers
    assert followers.to_pylist() == [{"cell": 6, "count": 1}]


def test_divergence_is_nothing_for_the_same_and_a_bit_for_what_has_nothing_in_common():
    assert divergence(np.array([1, 2]), np.array([10, 20])) == pytest.approx(0)
    assert divergence(np.array([1, 0]), np.array([0, 5])) == pytest.approx(1)
    assert divergence(np.array([0, 0]), np.array([0, 5])) == 0
    half = (log2(4 / 3) + (log2(2 / 3) + log2(2)) / 2) / 2
    assert divergence(np.array([1, 0]), np.array([1, 1])) == pytest.approx(half)


def test_agreement_is_the_gain_over_popularity():
    # 90 times 1 -> 2 and 90 times 2 -> 1, and each is as popular as the other.
    reference = np.array([[0, 90], [90, 0]])
    assert agreement(reference, reference) == pytest.approx(log2((90 + 25) / 140 / 0.5))
    assert agreement(np.eye(2, dtype=int), reference) == pytest.approx(log2(25 / 140 / 0.5))
    assert agreement(0 * reference, reference) == agreement(reference, 0 * reference) == 0


def make_walk(rng, num_users=400, length=8, weeks=3):
    """Users walk 1 -> 2 -> 3 -> 1 most of the time."""
    rows = []
    for user in range(num_users):
        item = rng.integers(3)
        for step in range(length * weeks):
            item = (item + 1) % 3 if rng.random() < 0.7 else rng.integers(3)
            rows.append((f"u{user}", int(item) + 1, 7 * weeks - 0.01 - step * 7 / length))
    return rows


def test_ids_that_were_shuffled_lose_their_order_and_keep_their_counts():
    rng = np.random.default_rng(0)
    rows = make_walk(rng)
    good = describe(TWO, events(*rows))
    new = [place for place, row in enumerate(rows) if row[2] < 7]
    items = rng.permutation([rows[place][1] for place in new])
    for place, item in zip(new, items, strict=True):
        rows[place] = (rows[place][0], int(item), rows[place][2])
    shuffled = describe(TWO, events(*rows))

    assert good.agreements[0] > 0.9 * good.reference_agreement > 0.2
    assert shuffled.agreements[0] < 0.1 * good.reference_agreement
    assert shuffled.rows_W == good.rows_W
    assert shuffled.divergences == good.divergences


def test_one_week_before_is_not_enough_to_know_how_items_agree():
    found = describe(Weeks.ending(END, 7, 1, 1), events(("a", 1, 8), ("a", 2, 1), ("a", 1, 0.5)))
    assert found.reference_agreement is None
