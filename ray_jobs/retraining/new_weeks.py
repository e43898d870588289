"""The newest weeks of the lake's events, counted one task a bucket, for the gates of
`ray_jobs.retrain`."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import ray

from data_lake.parquet import read_files
from data_lake.tables import count_rows, files_by_bucket, open_table, read_table, table_exists
from data_lake.weeks import (
    COLUMNS,
    Counts,
    WeekFigures,
    Weeks,
    add_counts,
    count_bucket,
    describe_weeks,
)
from ray_jobs.config import PipelineConfig
from ray_jobs.exchange import finish_in_order, get
from recsys.catalogue import Catalogue

_NUM_LEADERS = 500
"""Items whose neighbours are counted: those with the most training events."""
_TABLES = ("events", "quarantine")


def measure_weeks(config: PipelineConfig, weeks: Weeks, catalogue: Catalogue) -> WeekFigures:
    """Counts the events table as it is now.

    Args:
        catalogue: what the serving version knows.
    """
    lake_uri, options = config.storage.lake_uri, config.storage.options
    leaders = find_leaders(catalogue)
    count = ray.remote(_count_files)
    buckets = files_by_bucket(open_table(lake_uri, "events", options)).values()
    counting = (count.remote(files, options, weeks, leaders) for files in buckets)
    counts = add_counts(finish_in_order(counting, get))
    return describe_weeks(counts, weeks, leaders, _known_items(config, catalogue))


def count_lake_rows(config: PipelineConfig) -> dict[str, int]:
    """Rows of the events table and of quarantine, by the log alone."""
    lake_uri, options = config.storage.lake_uri, config.storage.options
    return {
        name: count_rows(open_table(lake_uri, name, options))
        for name in _TABLES
        if table_exists(lake_uri, name, options)
    }


def find_leaders(catalogue: Catalogue) -> pa.Array:
    """Ids of the items with the most training events, at most so many that pairs fit into
    memory.
    """
    order = catalogue.table["count"].to_numpy().argsort(kind="stable")[::-1]
    return catalogue.table["item_id"].combine_chunks().take(pa.array(order[:_NUM_LEADERS]))


def _count_files(
    files: Sequence[str], options: Mapping[str, str], weeks: Weeks, leaders: pa.Array
) -> Counts:
    return count_bucket(read_files(files, COLUMNS, options), weeks, leaders)


def _known_items(config: PipelineConfig, catalogue: Catalogue) -> pa.Array:
    lake_uri, options = config.storage.lake_uri, config.storage.options
    known: Any = catalogue.item_ids
    if not table_exists(lake_uri, "items", options):
        return known
    items = read_table(open_table(lake_uri, "items", options), ["item_id"])
    return pa.concat_arrays([known, items["item_id"].combine_chunks().cast(known.type)])
