"""Events and lists of a shop of four items, small enough to be counted by hand."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ray_jobs.drift.axes import DAY_US, Periods
from ray_jobs.drift.items import learn_items
from ray_jobs.drift.lists import ListsPlan
from ray_jobs.drift.plan import Plan
from serve_app.exposures import SCHEMA
from tests.conftest import make_shop

HOUR = 1 / 24
NO_SESSIONS = np.empty(0, np.uint64)


def plan_of(events, *, periods, **changes):
    """A plan for items `a` to `d`, of which the catalogue lacks `d`."""
    facts, labels = learn_items(
        events,
        pa.array(["a", "b", "c"]),
        pa.table({"item_id": ["a", "b"], "category": ["x", None]}),
    )
    plan = Plan(
        periods=periods,
        items=facts,
        category_labels=labels,
        context=make_shop().context,
        events_until_us=periods.current_until_us,
        attribution_us=3600 * 1_000_000,
        history_us=2 * DAY_US,
        click_types=(),
        score_edges=(),
        options={},
    )
    return replace(plan, **changes)


def counts_of(counts, plan, name):
    """What is not 0, as {slot: {label: count}}; groups added up."""
    labels = plan.measures[name].labels
    return {
        slot: {labels[k]: int(found[k]) for k in np.flatnonzero(found)}
        for slot, found in enumerate(counts[name].sum(axis=0))
        if found.any()
    }


def shown(*lists, known_by="user_id"):
    """Lists as tasks get them: day, visitor and items."""
    days, visitors, items = zip(*lists, strict=True)
    nobody = dict.fromkeys(("user_id", "session_id"), pa.nulls(len(lists), pa.string()))
    return pa.table(
        {
            **(nobody | {known_by: pa.array(visitors, pa.string())}),
            "group": np.zeros(len(lists), np.int64),
            "time_us": np.array([round(day * DAY_US) for day in days]),
            "item_ids": pa.array(items, pa.list_(pa.string())),
            "score": np.full(len(lists), np.nan),
        }
    )


def exposure(user_id, at, item_ids, **others):
    row = dict.fromkeys(SCHEMA.names) | {"model_version": "v1", "source": "model"}
    return row | {"user_id": user_id, "timestamp": at, "item_ids": item_ids, **others}


def lists_plan(kind=None):
    periods = Periods(2 * DAY_US, 4 * DAY_US, 2, 1)
    return ListsPlan(periods, "v1", kind or pa.int64(), 3, {})


def write_log(folder, name, rows, schema=SCHEMA):
    folder.mkdir(exist_ok=True)
    names = set(schema.names)
    kept = [{key: value for key, value in row.items() if key in names} for row in rows]
    pq.write_table(pa.Table.from_pylist(kept, schema=schema), folder / name)
    return str(folder / name)
