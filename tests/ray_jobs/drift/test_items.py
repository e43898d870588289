"""What is known of items before anything is counted."""

import pyarrow as pa

from ray_jobs.drift.items import add_items


def test_counts_of_several_buckets_add_up():
    one = pa.table({"item_id": ["a", "b"], "first_us": [5, 6], "even": [1, 0], "odd": [0, 2]})
    two = pa.table({"item_id": ["b"], "first_us": [3], "even": [4], "odd": [1]})
    added = add_items([one, two]).sort_by("item_id").to_pylist()
    assert added == [
        {"item_id": "a", "first_us": 5, "even": 1, "odd": 0},
        {"item_id": "b", "first_us": 3, "even": 4, "odd": 3},
    ]
