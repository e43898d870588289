"""How often the monitor cries wolf, and how small a drift it finds, on the synthetic shop.

    python -m benchmarks.drift

Each run is a shop of its own: other visitors under the same law, who are shown the successors of
what they look at. Nothing moves by itself: no item is new, and the days that are looked at lie
where visitors neither grow more nor fewer. The current week is then changed: a share of its events
(or lists) is replaced by something else. Thresholds, counts and verdicts are those of
`ray_jobs.monitor`, without Ray. `--first-part` chooses other visitors. Writes
`benchmarks/results/drift.json` and `drift.md`.
"""

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.measure import machine
from data_lake.synthetic import FIRST_ITEM_ID, Shop, ShopConfig, build_shop, items_table
from data_lake.synthetic_events import generate_part
from data_lake.synthetic_rows import clean_rows
from data_lake.synthetic_visits import users_table
from ray_jobs.drift.axes import DAY_US, Periods, group_of
from ray_jobs.drift.counts import count_bucket
from ray_jobs.drift.gather import Gathered
from ray_jobs.drift.items import add_items, count_items, learn_items
from ray_jobs.drift.lists import find_score_edges
from ray_jobs.drift.plan import Counts, Plan
from ray_jobs.drift.verdict import find_gaps, judge
from ray_jobs.sections.upkeep import MonitorConfig
from recsys.context import ContextConfig, ContextEncoder

RESULTS = Path(__file__).parent / "results"
SHOP = ShopConfig(
    num_users=3_000_000,
    num_items=1_000,
    num_parts=1_500,
    days=128,
    mean_events_per_user=40,
    new_item_share=0.0,
)
# Sign-ups end after 70 % of the days: from there on, and a history later, all days are alike.
FIRST_DAY, REFERENCE_UNTIL, CURRENT_UNTIL = 84, 119, 126
UNKNOWN_IDS = np.arange(20) + FIRST_ITEM_ID + SHOP.num_items
MONITOR = MonitorConfig(history_days=14, false_alarm_rate=0.05, num_resamples=2_000)
STRENGTHS = (0.02, 0.05, 0.1, 0.2)
LIST_SHARE, LIST_LENGTH, MINUTE_US = 0.25, 10, 60_000_000
NEVER_US = np.iinfo(np.int64).max

Change = Callable[[Shop, pa.Table, np.ndarray, np.random.Generator], pa.Table]
"""Rows, and which of them are changed."""


@dataclass(frozen=True)
class Week:
    """A shop's events and lists around both periods, and the files of one bucket."""

    events: pa.Table
    lists: pa.Table
    users: str


def draw_week(shop: Shop, part: int, folder: Path) -> Week:
    """One part of the users: all of their events, and lists of successors a minute before some."""
    trajectories = generate_part(shop, part)
    events = clean_rows(shop, part, trajectories)
    times_us, first_us = trajectories.moments.time_us, shop.config.start_us + FIRST_DAY * DAY_US
    users = str(folder / "users.parquet")
    pq.write_table(users_table(trajectories.visitors), users)
    rng = np.random.default_rng([7, part])
    follows = np.flatnonzero(~trajectories.moments.starts_session)
    shown = follows[(rng.random(len(follows)) < LIST_SHARE) & (times_us[follows] >= first_us)]
    items = shop.successors_IF[trajectories.item[shown - 1], :LIST_LENGTH]
    user_ids = events["user_id"].combine_chunks().take(pa.array(shown))
    # Just behind what is being looked at, long before the attribution window ends.
    lists = list_rows(shop, user_ids, times_us[shown - 1] + 1_000, items, rng)
    return Week(events.filter(pa.array(times_us >= first_us)), lists, users)


def list_rows(
    shop: Shop, user_ids: pa.Array, times_us: np.ndarray, items: np.ndarray, rng: Any
) -> pa.Table:
    """Lists as tasks of the monitor get them; scores are noise."""
    texts = pa.array(shop.catalogue.item_ids[items].ravel()).cast(pa.string())
    offsets = np.arange(0, items.size + 1, items.shape[1], dtype=np.int32)
    return pa.table(
        {
            "user_id": user_ids,
            "group": group_of(user_ids),
            "time_us": times_us,
            "item_ids": pa.ListArray.from_arrays(pa.array(offsets), texts),
            "score": rng.normal(size=len(times_us)),
        }
    )


def make_plan(shop: Shop, week: Week, folder: Path) -> Plan:
    """As `ray_jobs.drift.gather` makes it; the version knows every item of earlier events."""
    start_us = shop.config.start_us
    days = MONITOR.days
    periods = Periods(
        start_us + REFERENCE_UNTIL * DAY_US, start_us + CURRENT_UNTIL * DAY_US, 2, days
    )
    counted = count_items([write_events(week.events, folder)], periods, {})
    is_known = counted["first_us"].to_numpy() < periods.reference_until_us
    known = counted["item_id"].combine_chunks().filter(pa.array(is_known))
    # Items that a change may bring, which have no events yet.
    others = np.concatenate([shop.catalogue.item_ids, UNKNOWN_IDS])
    nothing = np.zeros(len(others), np.int64)
    later = {"item_id": others, "first_us": nothing + NEVER_US}
    later |= dict.fromkeys(("even", "odd", "reference"), nothing)
    counted = add_items([counted, pa.table(later)])
    items, labels = learn_items(counted, known, items_table(shop).select(["item_id", "category"]))
    slots = periods.slot_of(week.lists["time_us"].to_numpy())
    is_reference = (slots >= 0) & (slots < periods.num_slots - 1)
    return Plan(
        periods=periods,
        items=items,
        category_labels=labels,
        context=learn_context(week),
        events_until_us=periods.current_until_us,
        attribution_us=round(MONITOR.attribution_minutes * MINUTE_US),
        history_us=MONITOR.history_days * DAY_US,
        click_types=(),
        score_edges=find_score_edges([week.lists["score"].to_numpy()[is_reference]]),
        options={},
    )


def learn_context(week: Week) -> ContextEncoder:
    columns = {
        "device": week.events["device"],
        "segment": pq.read_table(week.users)["segment"],
        "event_type": week.events["event_type"],
    }
    counts = {name: Counter(column.to_pylist()) for name, column in columns.items()}
    return ContextEncoder.learn(ContextConfig(), counts)


def write_events(events: pa.Table, folder: Path) -> str:
    path = str(folder / "events.parquet")
    pq.write_table(events, path, compression="none")
    return path


def count_week(week: Week, plan: Plan, folder: Path) -> Counts:
    events, sessions = [write_events(week.events, folder)], np.empty(0, np.uint64)
    counts, _ = count_bucket(events, [week.users], plan, sessions, week.lists)
    return {name: found.astype(np.int64) for name, found in counts.items()}


def change_devices(shop: Shop, rows: pa.Table, chosen: np.ndarray, rng: Any) -> pa.Table:
    return _with(rows, "device", np.where(chosen, "desktop", rows["device"].to_numpy(False)))


def change_tastes(shop: Shop, rows: pa.Table, chosen: np.ndarray, rng: Any) -> pa.Table:
    """Other items of the same shop take the place of these, always the same one of each."""
    ids = shop.catalogue.item_ids
    others = np.random.default_rng(0).permutation(ids)[np.argsort(np.argsort(ids))]
    now = rows["item_id"].to_numpy()
    places = np.searchsorted(np.sort(ids), now)
    return _with(rows, "item_id", np.where(chosen, others[places], now))


def flatten_popularity(shop: Shop, rows: pa.Table, chosen: np.ndarray, rng: Any) -> pa.Table:
    """Items at random, the rare ones as often as others."""
    items = rng.choice(shop.catalogue.item_ids, len(chosen))
    return _with(rows, "item_id", np.where(chosen, items, rows["item_id"].to_numpy()))


def add_unknown(shop: Shop, rows: pa.Table, chosen: np.ndarray, rng: Any) -> pa.Table:
    items = rng.choice(UNKNOWN_IDS, len(chosen))
    return _with(rows, "item_id", np.where(chosen, items, rows["item_id"].to_numpy()))


def move_hours(shop: Shop, rows: pa.Table, chosen: np.ndarray, rng: Any) -> pa.Table:
    """Six hours later, on the same day."""
    times = rows["timestamp"].cast(pa.int64()).to_numpy()
    moved = times - times % DAY_US + (times + DAY_US // 4) % DAY_US
    moment = pa.array(np.where(chosen, moved, times)).cast(rows["timestamp"].type)
    return _with(rows, "timestamp", moment)


def break_lists(shop: Shop, rows: pa.Table, chosen: np.ndarray, rng: Any) -> pa.Table:
    """Lists of one and the same ten items, as of a ranker that has lost its input."""
    stuck = pa.scalar([str(item) for item in shop.catalogue.item_ids[:LIST_LENGTH]])
    flags = chosen.tolist()
    lists = rows["item_ids"].to_pylist()
    mixed = [stuck.as_py() if flag else one for flag, one in zip(flags, lists, strict=True)]
    return _with(rows, "item_ids", pa.array(mixed, pa.list_(pa.string())))


def shift_scores(shop: Shop, rows: pa.Table, chosen: np.ndarray, rng: Any) -> pa.Table:
    scores = rows["score"].to_numpy()
    return _with(rows, "score", np.where(chosen, scores + 1, scores))


EVENT_CHANGES: Mapping[str, tuple[Change, str]] = {
    "events come from desktops": (change_devices, "context_device"),
    "events are on other items": (change_tastes, "items"),
    "events are on items at random": (flatten_popularity, "popularity"),
    "events are on unknown items": (add_unknown, "unknown_items"),
    "events come six hours later": (move_hours, "context_hour"),
}
LIST_CHANGES: Mapping[str, tuple[Change, str]] = {
    "lists are always the same ten items": (break_lists, "live_hit_rate"),
    "scores are a deviation higher": (shift_scores, "scores"),
}


def _with(rows: pa.Table, name: str, values: Any) -> pa.Table:
    return rows.set_column(rows.column_names.index(name), name, pa.array(values))


def change_week(
    shop: Shop, week: Week, plan: Plan, name: str, strength: float, rng: np.random.Generator
) -> Week:
    """The week with a share of its current rows changed."""
    last = plan.periods.num_slots - 1
    if name in EVENT_CHANGES:
        times = week.events["timestamp"].cast(pa.int64()).to_numpy()
        chosen = (plan.periods.slot_of(times) == last) & (rng.random(len(times)) < strength)
        return replace(week, events=EVENT_CHANGES[name][0](shop, week.events, chosen, rng))
    times = week.lists["time_us"].to_numpy()
    chosen = (plan.periods.slot_of(times) == last) & (rng.random(len(times)) < strength)
    return replace(week, lists=LIST_CHANGES[name][0](shop, week.lists, chosen, rng))


def find_alarms(counts: Counts, plan: Plan) -> dict[str, bool]:
    """Of each measure that is judged, whether it is an alarm."""
    gathered = Gathered(counts, plan, 0)
    judged = judge(MONITOR, gathered, find_gaps(gathered))
    return {name: facts["alarm"] for name, facts in judged.items()}


def run(first_part: int, num_calm: int, num_drifting: int, max_seconds: float) -> dict[str, Any]:
    """Calm runs until they are enough or the time is over; the first ones are changed as well."""
    started = time.perf_counter()
    shop = build_shop(SHOP, 0)
    false_alarms: Counter[str] = Counter()
    num_false, done, measures, num_events = 0, 0, set[str](), []
    found: dict[tuple[str, float], list[set[str]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in range(first_part, first_part + num_calm):
            if time.perf_counter() - started > max_seconds:
                break
            week = draw_week(shop, part, folder)
            plan = make_plan(shop, week, folder)
            counts = count_week(week, plan, folder)
            judged = find_alarms(counts, plan)
            alarms = names_of(judged)
            measures |= judged.keys()
            false_alarms.update(alarms)
            num_false, done = num_false + bool(alarms), done + 1
            num_events.append(int(counts["popularity"][:, -1].sum()))
            if done <= num_drifting:
                for one in drift_once(shop, week, plan, counts, folder, part):
                    found.setdefault(one[:2], []).append(one[2])
    return {
        "machine": machine(),
        "seconds": round(time.perf_counter() - started, 1),
        "users": SHOP.num_users // SHOP.num_parts,
        "events_of_the_current_week": float(np.mean(num_events)),
        "measures": sorted(measures),
        "false_alarm_rate_asked": MONITOR.false_alarm_rate,
        "first_part": first_part,
        "calm_runs": done,
        "runs_with_false_alarm": num_false,
        "false_alarms_by_measure": dict(false_alarms.most_common()),
        "detection": summarise(found),
    }


def add_runs(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """A record with the calm runs of both; what was detected is that of the earlier one."""
    totals = {name: earlier[name] + later[name] for name in ("calm_runs", "runs_with_false_alarm")}
    by_measure = Counter(earlier["false_alarms_by_measure"])
    by_measure.update(later["false_alarms_by_measure"])
    num_events = sum(
        one["events_of_the_current_week"] * one["calm_runs"] for one in (earlier, later)
    )
    return {
        **earlier,
        **totals,
        "seconds": round(earlier["seconds"] + later["seconds"], 1),
        "events_of_the_current_week": num_events / totals["calm_runs"],
        "false_alarms_by_measure": dict(by_measure.most_common()),
    }


def names_of(alarms: Mapping[str, bool]) -> set[str]:
    return {name for name, is_alarm in alarms.items() if is_alarm}


def drift_once(
    shop: Shop, week: Week, plan: Plan, calm: Counts, folder: Path, part: int
) -> Iterator[tuple[str, float, set[str]]]:
    """Every change in every strength: the alarms that it raises."""
    recent = cut(week, plan)
    for number, name in enumerate((*EVENT_CHANGES, *LIST_CHANGES)):
        for strength in STRENGTHS:
            rng = np.random.default_rng([9, part, number, round(1000 * strength)])
            changed = change_week(shop, recent, plan, name, strength, rng)
            counts = count_week(changed, plan, folder)
            for measure, found in counts.items():
                found[:, :-1] = calm[measure][:, :-1]
            yield name, strength, names_of(find_alarms(counts, plan))


def cut(week: Week, plan: Plan) -> Week:
    """What the current period needs, histories included."""
    first_us = plan.periods.current_from_us - plan.history_us
    is_recent = pc.greater_equal(week.events["timestamp"].cast(pa.int64()), first_us)
    return replace(week, events=week.events.filter(is_recent))


def summarise(found: Mapping[tuple[str, float], list[set[str]]]) -> list[dict[str, Any]]:
    expected = {name: one[1] for name, one in {**EVENT_CHANGES, **LIST_CHANGES}.items()}
    return [
        {
            "drift": name,
            "share": strength,
            "runs": len(alarms),
            "found": sum(bool(one) for one in alarms) / len(alarms),
            "measure": expected[name],
            "found_by_measure": sum(expected[name] in one for one in alarms) / len(alarms),
        }
        for (name, strength), alarms in found.items()
    ]


def interval(successes: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z, share = 1.96, successes / total
    middle = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z * sqrt(share * (1 - share) / total + z**2 / (4 * total**2)) / (1 + z**2 / total)
    return max(0.0, middle - half), min(1.0, middle + half)


def render(result: Mapping[str, Any]) -> str:
    """The content of drift.md."""
    total, wrong = result["calm_runs"], result["runs_with_false_alarm"]
    low, high = interval(wrong, total)
    by_measure = ", ".join(f"{name} {n}" for name, n in result["false_alarms_by_measure"].items())
    lines = [
        "# Drift: false alarms and detection",
        "",
        f"`python -m benchmarks.drift` on {result['machine']}, {result['seconds']:.0f} s.",
        f"Shops of {result['users']:,} users; {result['events_of_the_current_week']:,.0f} events "
        f"in the current week on average; {len(result['measures'])} measures; two weeks of "
        "reference.",
        "",
        f"False alarms: {wrong} of {total} runs without drift raised any alarm, "
        f"{wrong / total:.1%} (95 % interval {low:.1%} to {high:.1%}); "
        f"{result['false_alarm_rate_asked']:.0%} was asked for. By measure: "
        f"{by_measure or 'none'}.",
        "",
        "Detection: share of runs with an alarm where a share of the current week's events or "
        "lists was changed: by the measure that the change is about, and in parentheses by any.",
        "",
        "| what changes | measure | runs | "
        + " | ".join(f"{strength:.0%} changed" for strength in STRENGTHS)
        + " |",
        "|---|---|---:" + "|---:" * len(STRENGTHS) + "|",
    ]
    by_change = groupby(result["detection"], key=lambda one: (one["drift"], one["measure"]))
    for (name, measure), group in by_change:
        found = list(group)
        cells = " | ".join(f"{one['found_by_measure']:.0%} ({one['found']:.0%})" for one in found)
        lines.append(f"| {name} | {measure} | {found[0]['runs']} | {cells} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first-part", type=int, default=400, help="of the shop's visitors")
    parser.add_argument("--calm", type=int, default=825, help="runs without drift")
    parser.add_argument("--drifting", type=int, default=8, help="of them changed as well")
    parser.add_argument("--max-seconds", type=float, default=900.0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--add", action="store_true", help="calm runs, to those of the record")
    arguments = parser.parse_args()
    if arguments.add:
        earlier = json.loads((arguments.results / "drift.json").read_text())
        next_part = earlier["first_part"] + earlier["calm_runs"]
        later = run(next_part, arguments.calm, 0, arguments.max_seconds)
        result = add_runs(earlier, later)
    else:
        result = run(
            arguments.first_part, arguments.calm, arguments.drifting, arguments.max_seconds
        )
    (arguments.results / "drift.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.results / "drift.md").write_text(render(result))
    print(render(result))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
