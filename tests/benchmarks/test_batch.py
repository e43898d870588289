"""The shop of the benchmark, and what its record says of what was not measured."""

from dataclasses import replace

import numpy as np
import pyarrow.compute as pc

from benchmarks.batch import LONGEST, SHORTEST, Result, draw_sequences, remember, render
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


SMALL = Result(20_000, 2, 512, 50.0, 80.0, 2**30, 3 * 2**30, {"ray workers": 2 * 2**30})


def test_a_smaller_run_says_that_a_million_users_are_open():
    text = render(Shape(), [SMALL])
    row = (
        "| 20,000 | fp32 | 2 actors of one CPU | 50 | 400 | 250 | 3.00 | 1.00 | ray workers 2.00 |"
    )
    assert row in text
    assert "1,000,000 users were not measured: the largest run had 20,000." in text
    assert "not measured" not in render(Shape(), [SMALL, replace(SMALL, users=1_000_000)])


def test_a_run_takes_the_place_of_one_like_it(tmp_path):
    path = tmp_path / "batch.json"
    remember(path, replace(SMALL, users=1_000_000))
    remember(path, SMALL)
    results = remember(path, replace(SMALL, cpu_s=40.0))
    assert [(one.users, one.cpu_s) for one in results] == [(20_000, 40.0), (1_000_000, 80.0)]
    both = remember(path, replace(SMALL, variant="int8"))
    assert [one.variant for one in both] == ["fp32", "int8", "fp32"]
