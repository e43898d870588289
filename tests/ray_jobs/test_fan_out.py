"""Rows that are tasks of their own."""

import pyarrow as pa
import pytest
import ray.data

from ray_jobs.fan_out import one_block_each

pytestmark = pytest.mark.ray


def double(rows: pa.Table) -> pa.Table:
    (number,) = rows["number"].to_pylist()
    return pa.table({"number": [2 * number]})


@pytest.mark.usefixtures("ray_cluster")
def test_each_row_is_a_task_and_no_task_waits_for_ray_data():
    # More tasks than CPUs.
    rows = one_block_each([{"number": number} for number in range(9)])
    doubled = rows.map_batches(double, batch_size=1, batch_format="pyarrow")
    assert rows.num_blocks() == 9
    assert sorted(row["number"] for row in doubled.take_all()) == list(range(0, 18, 2))
    assert not doubled.context.op_resource_reservation_enabled


@pytest.mark.usefixtures("ray_cluster")
def test_other_data_sets_keep_their_settings():
    one_block_each([{"number": 1}])
    assert ray.data.range(1).context.op_resource_reservation_enabled
