"""The shop of the benchmark, and what its record says of what was not measured."""

import numpy as np
import pyarrow.compute as pc

from benchmarks.batch import LONGEST, SHORTEST, Result, draw_sequences, render
from benchmarks.serving_artifact import Shape


def test_histories_are_as_long_as_the_record_says():
    users = np.arange(500)
    table = draw_sequences(users, Shape(items=50))
    lengths = pc.list_value_length(table["item_ids"]).to_numpy()
    assert (lengths.min(), lengths.max()) == (SHORTEST, LONGEST)
    assert table["user_id"].to_pylist() == users.tolist()
    assert table["item_ids"].combine_chunks().flatten().to_numpy().max() < 50
    first = table["timestamps"][0].values.cast("int64").to_numpy()
    assert (np.diff(first) > 0).all()


def test_a_smaller_run_says_that_a_million_users_are_open():
    result = Result(20_000, 2, 512, 50.0, 80.0, 2**30, 3 * 2**30, {"ray workers": 2 * 2**30})
    text = render(Shape(), result)
    assert "| 20,000 | 2 actors of one CPU | 50 | 400 | 250 | 3.00 | 1.00 |" in text
    assert "1,000,000 users were not measured: the run stopped at 20,000." in text
    whole = Result(1_000_000, 1, 512, 50.0, 80.0, 0, 0, {})
    assert "not measured" not in render(Shape(), whole)
