"""What is known of items before anything is counted."""

import pyarrow as pa

from ray_jobs.drift.items import add_items

COLUMNS = ("item_id", "first_us", "even", "odd", "reference")


def test_counts_of_several_buckets_add_up():
    one = [("a", 5, 1, 0, 1), ("b", 6, 0, 2, 1)]
    two = [("b", 3, 4, 1, 0)]
    tables = [
        pa.table(dict(zip(COLUMNS, zip(*rows, strict=True), strict=True))) for rows in (one, two)
    ]
    added = add_items(tables).sort_by("item_id").select(COLUMNS).to_pylist()
    assert [tuple(row.values()) for row in added] == [("a", 5, 1, 0, 1), ("b", 3, 4, 3, 1)]
