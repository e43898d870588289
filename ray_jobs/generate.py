"""Generates a synthetic shop: raw files under `<storage root>/raw`, as a shop would deliver them.

    python -m ray_jobs.generate --config synthetic

Safe to run again: a shop that is complete is left as it is, and another one is never overwritten.
"""

import json
import time
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from pyarrow.fs import FileType

from data_lake.parquet import encode_parquet
from data_lake.storage import Options, locate, open_file, reaching, write_file
from data_lake.synthetic import Shop, ShopConfig, build_shop, items_table
from data_lake.synthetic_draws import Ints
from data_lake.synthetic_events import Trajectories, generate_part
from data_lake.synthetic_oracle import best_reachable, leave_one_out, oracle_ranks
from data_lake.synthetic_rows import clean_rows, dump_lines, soil_rows
from data_lake.synthetic_visits import users_table
from ray_jobs.config import PipelineConfig
from ray_jobs.errors import JobError
from ray_jobs.job import Report, main
from ray_jobs.sections.storage import expand

_STAMP = "generated.json"
_MIN_POSITIONS = 3  # a training, a validation and a test position


def run(config: PipelineConfig) -> Report:
    """Writes events, events-dirty, users and items, and reports the best reachable hit rate.

    Raises: JobError without a `[generate]` section, or when the folder holds something else.
    """
    if config.generate is None:
        raise JobError(f"{config.name!r} is no synthetic shop: add a [generate] section.")
    uri, options = f"{expand(config.storage.root)}/raw", config.storage.options
    stamp = {"seed": config.seed, "shop": config.generate.model_dump(mode="json")}
    figures = _read_stamp(uri, stamp, options)
    if figures is not None:
        return Report("generate", f"{uri} is already complete, nothing to do", figures)

    start = time.perf_counter()
    _write_text(uri, _STAMP, json.dumps(stamp), options)
    shared = ray.put(build_shop(config.generate, config.seed))
    shop = ray.get(shared)  # the store's copy, which every task maps; not a second one
    _write_table(uri, "items.parquet", items_table(shop), options)
    write_part = ray.remote(_write_part)
    parts = range(config.generate.num_parts)
    figures = _figures(
        shop, ray.get([write_part.remote(uri, shared, part, options) for part in parts])
    )
    _write_text(uri, _STAMP, json.dumps(stamp | {"figures": figures}), options)

    speed = figures["events"] / (time.perf_counter() - start)
    return Report("generate", f"wrote {uri}", figures | {"events_per_s": round(speed)})


def _write_part(uri: str, shop: Shop, part: int, options: Options) -> dict[str, Any]:
    """Generates and writes one part; its events alone are in memory."""
    trajectories = generate_part(shop, part)
    clean = clean_rows(shop, part, trajectories)
    rows, untyped = soil_rows(clean, shop, part)
    _write_table(uri, f"events/part-{part:05d}.parquet", rows, options)
    _write_table(uri, f"users/part-{part:05d}.parquet", users_table(trajectories.visitors), options)
    if untyped:
        _write_text(uri, f"events-dirty/part-{part:05d}.jsonl", dump_lines(untyped), options)
    return {
        "events": clean.num_rows,
        "rows": rows.num_rows + len(untyped),
        "ranks": _sample_ranks(shop, trajectories),
    }


def _sample_ranks(shop: Shop, trajectories: Trajectories) -> Ints:
    max_users = -(-shop.config.oracle_users // shop.config.num_parts)
    task = leave_one_out(trajectories, min_positions=_MIN_POSITIONS, max_users=max_users)
    return oracle_ranks(shop, task)


def _figures(shop: Shop, parts: list[dict[str, Any]]) -> dict[str, Any]:
    best = best_reachable(shop, np.concatenate([part["ranks"] for part in parts]))
    return {
        "users": shop.config.num_users,
        "items": shop.num_items,
        "events": sum(part["events"] for part in parts),
        "rows_with_dirt": sum(part["rows"] for part in parts),
        "best_hit_rate_at_10": best.hit_rate_at_10,
        "best_ndcg_at_10": best.ndcg_at_10,
        "targets_seen_before": best.seen_share,
        "oracle_users": best.num_users,
    }


def _read_stamp(uri: str, wanted: dict[str, Any], options: Options) -> dict[str, Any] | None:
    """The figures of this very shop if it is complete, None if there is nothing or half of it.

    Raises: JobError when the folder holds another shop, or files that nobody generated.
    """
    with reaching(uri, options):
        filesystem, root = locate(uri, options)
        stamp, folder = filesystem.get_file_info([f"{root}/{_STAMP}", root])
    if stamp.type == FileType.NotFound:
        if folder.type != FileType.NotFound:
            raise JobError(f"{uri} exists and was not generated; set storage.root elsewhere.")
        return None
    with open_file(f"{uri}/{_STAMP}", options) as stream:
        found = json.loads(stream.read())
    # A habit that was added since has its default in an older shop.
    found["shop"] = ShopConfig().model_dump(mode="json") | found["shop"]
    if {"seed": found["seed"], "shop": found["shop"]} != wanted:
        raise JobError(
            f"{uri} holds another shop ({_first_difference(found, wanted)}); "
            "remove the folder or set storage.root elsewhere."
        )
    figures: dict[str, Any] | None = found.get("figures")
    return figures


def _first_difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    before = found["shop"] | {"seed": found["seed"]}
    after = wanted["shop"] | {"seed": wanted["seed"]}
    keys = (key for key in before | after if before.get(key) != after.get(key))
    key = next(keys)
    return f"{key} is {before.get(key)} there, {after.get(key)} here"


def _write_table(uri: str, name: str, table: pa.Table, options: Options) -> None:
    write_file(f"{uri}/{name}", encode_parquet(table), options)


def _write_text(uri: str, name: str, text: str, options: Options) -> None:
    write_file(f"{uri}/{name}", text.encode(), options)


if __name__ == "__main__":
    main(run, job="generate")
