"""Whatever the events are, `build_sequences` gives what plain loops over plain lists give.

The loops below are written from what `CleaningConfig` promises and know nothing of how the
vectorised code goes about it.
"""

from collections import Counter
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_lake.cleaning import CleaningConfig
from data_lake.schemas import TIMESTAMP, events_schema, sequences_schema
from data_lake.sequences import EVENT_COLUMNS, build_sequences, count_items, find_rare_items

HOUR_US = 3_600_000_000
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
TYPES = ("view", "add_to_cart", "purchase", "")
DEVICES = ("mobile", "desktop", "", None)
REGIONS = ("north", "south", None)
TEXT_TYPES = {
    "as text": pa.string(),
    "as Delta itself rewrites it": pa.string_view(),
    "as codes": pa.dictionary(pa.int32(), pa.string()),
}
IDS = {
    "int64": (-(2**63), -7, -1, 0, 1, 2**53 + 1, 2**63 - 1),
    "string": ("", " ", "0", "a", "B", "ä", "a\u0308", "日本", "🛒", "\ue000"),
}


@dataclass(frozen=True)
class Log:
    """Events as plain rows in any order, and where each user belongs."""

    user_type: str
    item_type: str
    rows: list[dict]
    segments: dict
    """Of the users whom the users table knows."""
    has_users: bool
    """Whether there is a users table."""


@st.composite
def logs(draw):
    user_type, item_type = draw(st.sampled_from(list(IDS))), draw(st.sampled_from(list(IDS)))
    users = draw(st.lists(st.sampled_from(IDS[user_type]), min_size=1, max_size=5, unique=True))
    items = draw(st.lists(st.sampled_from(IDS[item_type]), min_size=1, max_size=4, unique=True))
    bucket_of = {user: draw(st.integers(0, 3)) for user in users}
    # Few moments, two hours apart and around midnights before and after 1970: many ties, two days.
    event = st.fixed_dictionaries(
        {
            "user_id": st.sampled_from(users),
            "item_id": st.sampled_from(items),
            "event_type": st.sampled_from(TYPES),
            "timestamp": st.integers(-14, 14).map(lambda step: step * 2 * HOUR_US),
            "device": st.sampled_from(DEVICES),
            "region": st.sampled_from(REGIONS),
            "ingested_at": st.integers(0, 2),
        }
    )
    rows = draw(st.lists(event, max_size=40))
    arrivals = draw(st.permutations(range(len(rows))))
    for row, arrival in zip(rows, arrivals, strict=True):
        row |= {"arrival": arrival, "user_bucket": bucket_of[row["user_id"]]}
    if draw(st.booleans()):
        rows.sort(key=lambda row: (row["ingested_at"], row["arrival"]))
    known = draw(st.lists(st.sampled_from(IDS[user_type]), unique=True))
    segments = {user: draw(st.sampled_from(["new", "loyal", None])) for user in known}
    return Log(user_type, item_type, rows, segments, draw(st.booleans()))


limits = st.one_of(st.none(), st.integers(1, 6))
rules = st.builds(
    CleaningConfig,
    event_types=st.one_of(
        st.none(), st.lists(st.sampled_from([*TYPES, "unheard"]), unique=True).map(tuple)
    ),
    max_events_per_user=st.one_of(st.none(), st.integers(3, 12)),
    max_events_per_day=limits,
    min_item_events=st.integers(1, 4),
    drop_repeats=st.booleans(),
    min_user_events=st.integers(1, 3),
    max_length=limits,
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    log=logs(),
    config=rules,
    num_files=st.integers(1, 3),
    text=st.sampled_from(list(TEXT_TYPES)),
    context=st.sampled_from([(), ("region",)]),
)
def test_any_events_become_what_plain_loops_make_of_them(log, config, num_files, text, context):
    files = split(events_table(log), num_files)
    rare = find_rare_items([count_items(file, config) for file in files], config)
    events = with_text(pa.concat_tables(files), text)
    users = with_text(users_table(log), text) if log.has_users else None
    sequences, counts = build_sequences(events, users, config, rare_items=rare, context=context)

    schema = sequences_schema(log.user_type, log.item_type, context)
    assert sequences.column_names == schema.names
    expected_rare = rare_items(log.rows, config)
    assert set(rare.to_pylist()) == expected_rare
    expected, expected_counts = reference(log, config, expected_rare, context)
    assert sequences.to_pylist() == expected
    assert counts == expected_counts


@pytest.mark.parametrize("text", TEXT_TYPES)
def test_rare_items_are_found_however_the_text_is_stored(text):
    config = CleaningConfig(event_types=("view",), min_item_events=2)
    columns = {"user_id": ["u", "u", "u"], "item_id": ["a", "b", "a"], "event_type": ["view"] * 3}
    counts = count_items(with_text(pa.table(columns), text), config)
    assert find_rare_items([counts], config).to_pylist() == ["b"]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(log=logs(), config=rules)
def test_without_rare_items_none_is_left_out(log, config):
    sequences, counts = build_sequences(events_table(log), None, config)
    expected, expected_counts = reference(replace(log, has_users=False), config, set())
    assert sequences.to_pylist() == expected
    assert counts == expected_counts


def rare_items(rows, config):
    """Items that the rows speak of, but with too few events of a kept type."""
    kept = Counter(row["item_id"] for row in rows if is_kept(row, config))
    return {item for item, num in kept.items() if num < config.min_item_events}


def reference(log, config, rare, context=()):
    """Rows of the sequences table, and what was removed; a rule after another, user by user."""
    counts = Counter()
    by_user = {}
    for row in log.rows:
        by_user.setdefault(row["user_id"], []).append(row)
    sequences = []
    for user_id, rows in by_user.items():
        rows.sort(key=lambda row: (row["timestamp"], row["ingested_at"], row["arrival"]))
        counts["events_read"] += len(rows)
        counts["users_read"] += 1
        positions = clean_user(rows, config, rare, counts)
        if positions:
            counts["events_kept"] += len(positions)
            counts["users_kept"] += 1
            sequences.append(sequence(user_id, positions, log, context))
    # Text in the order of its bytes, as Parquet and everybody else has it.
    sequences.sort(
        key=lambda row: (
            row["user_bucket"],
            row["user_id"].encode() if log.user_type == "string" else row["user_id"],
        )
    )
    return sequences, counts


def clean_user(rows, config, rare, counts):
    """What is left of the events of one user, in order."""
    kept = [row for row in rows if is_kept(row, config)]
    counts["removed_event_type"] += len(rows) - len(kept)

    if is_a_bot(kept, config):
        counts["removed_bots"] += len(kept)
        counts["users_bots"] += 1
        return []

    common = [row for row in kept if row["item_id"] not in rare]
    counts["removed_rare_items"] += len(kept) - len(common)

    positions = []
    for row in common:
        if config.drop_repeats and positions and positions[-1]["item_id"] == row["item_id"]:
            positions[-1] = positions[-1] | {"event_type": row["event_type"]}
            counts["removed_repeats"] += 1
        else:
            positions.append(row)

    if positions and len(positions) < config.min_user_events:
        counts["removed_short_users"] += len(positions)
        counts["users_short"] += 1
        return []

    while config.max_length is not None and len(positions) > config.max_length:
        positions.pop(0)
        counts["removed_over_length"] += 1
    return positions


def is_kept(row, config):
    return config.event_types is None or row["event_type"] in config.event_types


def is_a_bot(rows, config):
    if config.max_events_per_user is not None and len(rows) > config.max_events_per_user:
        return True
    days = Counter((EPOCH + timedelta(microseconds=row["timestamp"])).date() for row in rows)
    limit = config.max_events_per_day
    return limit is not None and any(num > limit for num in days.values())


def sequence(user_id, positions, log, context):
    return {
        "user_id": user_id,
        "segment": log.segments.get(user_id) if log.has_users else None,
        "item_ids": [row["item_id"] for row in positions],
        "event_types": [row["event_type"] for row in positions],
        "timestamps": [EPOCH + timedelta(microseconds=row["timestamp"]) for row in positions],
        "devices": [row["device"] for row in positions],
        "user_bucket": positions[0]["user_bucket"],
        **{name: [row[name] for row in positions] for name in context},
    }


def events_table(log):
    schema = events_schema(log.user_type, log.item_type, ["region"])
    schema = pa.schema([schema.field(name) for name in (*EVENT_COLUMNS, "region")])
    columns = [column([row[field.name] for row in log.rows], field.type) for field in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def users_table(log):
    ids = column(list(log.segments), pa.int64() if log.user_type == "int64" else pa.string())
    return pa.table({"user_id": ids, "segment": pa.array(log.segments.values(), pa.string())})


def column(values, type_):
    plain = pa.int64() if type_ == TIMESTAMP else type_
    return pa.array(values, plain).cast(type_)


def split(table, num_files):
    size = -(-max(1, table.num_rows) // num_files)
    return [table.slice(file * size, size) for file in range(num_files)]


def with_text(table, text):
    """The same table with its text columns as one of TEXT_TYPES."""
    fields = [
        field.with_type(TEXT_TYPES[text]) if field.type == pa.string() else field
        for field in table.schema
    ]
    return table.cast(pa.schema(fields))
