"""What is counted of the newest weeks, without Ray."""

import numpy as np
import pyarrow as pa

from data_lake.schemas import quarantine_schema
from data_lake.tables import commit_parts, create_table, write_part
from ray_jobs.new_weeks import count_lake_rows, find_leaders
from recsys.catalogue import Catalogue
from tests.ray_jobs.conftest import tiny_config


def test_the_items_with_the_most_training_events_lead():
    ids = pa.array(np.arange(600))
    leaders = find_leaders(Catalogue.build(ids, np.arange(600), None)).to_pylist()
    assert leaders == list(range(599, 99, -1))


def test_rows_are_counted_by_the_log(tmp_path):
    config = tiny_config(tmp_path)
    lake_uri = config.storage.lake_uri
    assert count_lake_rows(config) == {}
    table = create_table(lake_uri, "quarantine", quarantine_schema())
    assert count_lake_rows(config) == {"quarantine": 0}
    time = pa.array([0, 0, 0]).cast(pa.timestamp("us", tz="UTC"))
    rows = pa.table([["{}"] * 3, ["odd"] * 3, ["a"] * 3, time], schema=quarantine_schema())
    commit_parts(table, [write_part(lake_uri, "quarantine", rows) for _ in range(2)])
    assert count_lake_rows(config) == {"quarantine": 6}
