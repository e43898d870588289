from itertools import groupby

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from data_lake.parquet import encode_parquet
from data_lake.schemas import TIMESTAMP, events_schema, sequences_schema
from data_lake.sequences import (
    EVENT_COLUMNS,
    SequencesConfig,
    build_sequences,
    count_items,
    digest_rare,
    find_rare_items,
)

DAY_US = 86_400_000_000
LENIENT = SequencesConfig(min_user_events=1, drop_repeats=False)


def events_table(rows, *, id_type="int64"):
    """A table from dictionaries; what a row does not say has a default."""
    defaults = {"event_type": "view", "device": None, "ingested_at": 0, "user_bucket": 0}
    schema = events_schema(id_type, id_type)
    schema = pa.schema([schema.field(name) for name in EVENT_COLUMNS])
    full = [defaults | {"timestamp": at, "arrival": at} | row for at, row in enumerate(rows)]
    times = {"timestamp": TIMESTAMP, "ingested_at": TIMESTAMP}
    columns = [
        pa.array([row[name] for row in full], pa.int64() if name in times else type_).cast(type_)
        for name, type_ in zip(schema.names, schema.types, strict=True)
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def event(user, item, **others):
    return {"user_id": user, "item_id": item, **others}


def as_rows(sequences):
    """Plain rows with times as microseconds."""
    whole = sequences.set_column(
        sequences.column_names.index("timestamps"),
        "timestamps",
        sequences["timestamps"].cast(pa.list_(pa.int64())),
    )
    return whole.to_pylist()


def stored(sequences):
    """The same rows as a file of the lake holds them."""
    return pq.read_table(pa.BufferReader(encode_parquet(sequences)))


def test_stored_sequences_have_the_columns_of_the_table():
    for id_type, ids in (("int64", (1, 2)), ("string", ("a", "b"))):
        events = events_table([event(ids[0], ids[1], device="app")], id_type=id_type)
        sequences = stored(build_sequences(events, None, LENIENT)[0])
        schema = sequences_schema(id_type, id_type)
        assert sequences.schema.names == schema.names
        assert [str(kind) for kind in sequences.schema.types] == [
            str(kind).replace("item:", "element:") for kind in schema.types
        ]


def test_one_row_a_user_in_order_of_time():
    events = events_table([event(2, 30, timestamp=5), event(1, 20), event(2, 10, timestamp=1)])
    sequences, _ = build_sequences(events, None, LENIENT)
    assert sequences.schema.names == sequences_schema("int64", "int64").names
    assert sequences["user_id"].to_pylist() == [1, 2]
    assert sequences["item_ids"].to_pylist() == [[20], [10, 30]]


def test_equal_times_are_ordered_by_load_and_then_by_arrival():
    rows = [(30, 2, 0), (20, 1, 9), (10, 1, 1)]
    events = events_table(
        [event(1, item, timestamp=7, ingested_at=load, arrival=at) for item, load, at in rows]
    )
    sequences, _ = build_sequences(events, None, LENIENT)
    assert sequences["item_ids"].to_pylist() == [[10, 20, 30]]


def test_a_run_of_one_item_becomes_its_deepest_step():
    kinds = ["view", "add_to_cart", "purchase", "view"]
    items = [5, 5, 5, 6]
    rows = [event(1, item, event_type=kind) for item, kind in zip(items, kinds, strict=True)]
    row = as_rows(build_sequences(events_table(rows), None, SequencesConfig())[0])[0]
    assert row["item_ids"] == [5, 6]
    assert row["event_types"] == ["purchase", "view"]
    assert row["timestamps"] == [0, 3]


def test_string_ids_stay_strings():
    events = events_table([event("bob", "x"), event("ann", "y")], id_type="string")
    sequences, _ = build_sequences(events, None, LENIENT)
    assert sequences["user_id"].to_pylist() == ["ann", "bob"]
    assert sequences["item_ids"].to_pylist() == [["y"], ["x"]]


def test_strings_as_delta_rewrites_them_are_taken():
    plain = events_table([event("bob", "x"), event("ann", "y")], id_type="string")
    views = [
        pa.field(field.name, pa.string_view()) if field.type == pa.string() else field
        for field in plain.schema
    ]
    users = pa.table({"user_id": ["ann"], "segment": ["gold"]}).cast(
        pa.schema({"user_id": pa.string_view(), "segment": pa.string_view()})
    )
    sequences, _ = build_sequences(plain.cast(pa.schema(views)), users, LENIENT)
    assert sequences["item_ids"].to_pylist() == [["y"], ["x"]]
    assert sequences["segment"].to_pylist() == ["gold", None]


def test_segment_comes_from_users_and_is_null_for_strangers():
    users = pa.table({"user_id": pa.array([3, 1]), "segment": ["gold", "new"]})
    events = events_table([event(1, 5), event(2, 5), event(3, 5)])
    sequences, _ = build_sequences(events, users, LENIENT)
    assert sequences["segment"].to_pylist() == ["new", None, "gold"]


def test_rows_keep_their_bucket_and_stand_bucket_by_bucket():
    buckets = {1: 4, 2: 0, 3: 4}
    events = events_table([event(user, 5, user_bucket=at) for user, at in buckets.items()])
    sequences, _ = build_sequences(events, None, LENIENT)
    assert sequences["user_bucket"].to_pylist() == [0, 4, 4]
    assert sequences["user_id"].to_pylist() == [2, 1, 3]


def test_only_kept_event_types_count():
    rows = [event(1, 5), event(1, 6, event_type="purchase"), event(2, 5)]
    config = SequencesConfig(event_types=("purchase",), min_user_events=1)
    sequences, counts = build_sequences(events_table(rows), None, config)
    assert sequences["item_ids"].to_pylist() == [[6]]
    assert counts["removed_event_type"] == 2


def test_rare_items_are_found_over_all_buckets_together():
    config = SequencesConfig(min_item_events=2, min_user_events=1)
    first, second = events_table([event(1, 5), event(1, 6)]), events_table([event(2, 6)])
    rare = find_rare_items([count_items(first, config), count_items(second, config)], config)
    sequences, counts = build_sequences(first, None, config, rare_items=rare)
    assert rare.to_pylist() == [5]
    assert sequences["item_ids"].to_pylist() == [[6]]
    assert counts["removed_rare_items"] == 1


def test_no_events_give_no_sequences():
    sequences, counts = build_sequences(events_table([]), None, SequencesConfig())
    assert sequences.num_rows == 0
    assert sequences.schema.names == sequences_schema("int64", "int64").names
    assert counts["users_kept"] == 0


def test_digest_changes_with_a_rule():
    assert SequencesConfig().digest() == SequencesConfig(max_length=None).digest()
    assert SequencesConfig().digest() != SequencesConfig(max_length=50).digest()


def test_context_of_the_shop_is_kept_per_position():
    events = events_table([event(1, 5), event(1, 6), event(2, 5)])
    events = events.append_column("region", pa.array(["north", None, "south"]))
    sequences, _ = build_sequences(events, None, LENIENT, context=("region",))
    assert sequences["region"].to_pylist() == [["north", None], ["south"]]
    assert stored(sequences)["region"].to_pylist() == [["north", None], ["south"]]


def test_codes_in_chunks_of_their_own_are_the_values_that_they_mean():
    parts = [events_table([event("u", item, device=item)], id_type="string") for item in "ba"]
    columns = [name for name in EVENT_COLUMNS if parts[0].schema.field(name).type == pa.string()]
    for name in columns:
        parts = [
            part.set_column(part.column_names.index(name), name, part[name].dictionary_encode())
            for part in parts
        ]
    sequences, _ = build_sequences(pa.concat_tables(parts), None, LENIENT)
    assert sequences["item_ids"].to_pylist() == [["b", "a"]]
    assert sequences["devices"].to_pylist() == [["b", "a"]]


def test_with_further_passes_users_who_are_too_short_no_longer_count():
    # Item 5 has two events, but one of them is all that user 2 has left without item 6.
    config = SequencesConfig(min_item_events=2, min_user_events=2)
    events = events_table([event(1, 5), event(1, 7), event(2, 5), event(2, 6), event(3, 7)])
    first = find_rare_items([count_items(events, config)], config)
    second = find_rare_items([count_items(events, config, first)], config)
    assert first.to_pylist() == [6]
    assert sorted(second.to_pylist()) == [5, 7]


def test_the_digest_of_rare_items_looks_at_the_items_that_occur():
    items = pa.chunked_array([[3, 1, 3], [2]])
    digest = digest_rare(items, pa.array([1, 9]))
    assert digest == digest_rare(pa.chunked_array([[1, 3, 2]]), pa.array([1]))
    assert digest != digest_rare(items, pa.array([1, 2]))


def reference(rows, config, rare):
    """The definition in plain Python: one user, one rule, one event at a time."""
    sequences = []
    rows = sorted(rows, key=lambda row: (row["timestamp"], row["ingested_at"], row["arrival"]))
    for user in sorted({row["user_id"] for row in rows}):
        own = [row for row in rows if row["user_id"] == user]
        if config.event_types is not None:
            own = [row for row in own if row["event_type"] in config.event_types]
        if config.max_events_per_user is not None and len(own) > config.max_events_per_user:
            continue
        days = [row["timestamp"] // DAY_US for row in own]
        busiest = max((days.count(day) for day in days), default=0)
        if config.max_events_per_day is not None and busiest > config.max_events_per_day:
            continue
        own = [row for row in own if row["item_id"] not in rare]
        if config.drop_repeats:
            runs = [list(run) for _, run in groupby(own, key=lambda row: row["item_id"])]
            own = [run[0] | {"event_type": run[-1]["event_type"]} for run in runs]
        if len(own) < config.min_user_events:
            continue
        own = own[-config.max_length :] if config.max_length else own
        sequences.append((user, own))
    return sorted(sequences, key=lambda pair: (pair[1][0]["user_bucket"], pair[0]))


rows_strategy = st.lists(
    st.fixed_dictionaries(
        {
            "user_id": st.integers(0, 4),
            "item_id": st.integers(0, 3),
            "event_type": st.sampled_from(["view", "add_to_cart", "purchase"]),
            "timestamp": st.sampled_from([0, 1, 2, DAY_US - 1, DAY_US, 3 * DAY_US]),
            "device": st.sampled_from(["mobile", "app", None]),
            "ingested_at": st.integers(0, 2),
        }
    ),
    max_size=30,
)
limit = st.none() | st.integers(1, 6)
configs = st.builds(
    SequencesConfig,
    event_types=st.none() | st.just(("view", "purchase")) | st.just(()),
    max_events_per_user=limit,
    max_events_per_day=limit,
    min_item_events=st.integers(1, 4),
    drop_repeats=st.booleans(),
    min_user_events=st.integers(1, 4),
    max_length=limit,
)


@settings(max_examples=150, deadline=None)
@given(rows=rows_strategy, config=configs, arrivals=st.randoms(use_true_random=False))
def test_sequences_equal_the_definition_in_plain_python(rows, config, arrivals):
    order = list(range(len(rows)))
    arrivals.shuffle(order)
    rows = [
        row | {"arrival": at, "user_bucket": row["user_id"] % 2}
        for row, at in zip(rows, order, strict=True)
    ]
    events = events_table(rows)
    rare = find_rare_items([count_items(events, config)], config)

    sequences, counts = build_sequences(events, None, config, rare_items=rare)

    expected = reference(rows, config, set(rare.to_pylist()))
    found = as_rows(sequences)
    assert [row["user_id"] for row in found] == [user for user, _ in expected]
    for row, (_, own) in zip(found, expected, strict=True):
        assert row["item_ids"] == [one["item_id"] for one in own]
        assert row["event_types"] == [one["event_type"] for one in own]
        assert row["timestamps"] == [one["timestamp"] for one in own]
        assert row["devices"] == [one["device"] for one in own]
    removed = sum(count for rule, count in counts.items() if rule.startswith("removed"))
    assert removed + sum(len(own) for _, own in expected) == len(rows)


def test_a_kernel_call_is_the_same_whether_buckets_come_together_or_apart():
    rng = np.random.default_rng(0)
    rows = [event(int(u), int(i), user_bucket=int(u) % 3) for u, i in rng.integers(0, 20, (300, 2))]
    events = events_table(rows)
    together, _ = build_sequences(events, None, SequencesConfig())
    bucket = np.asarray(events["user_bucket"])
    apart = [
        build_sequences(events.filter(pa.array(bucket == at)), None, SequencesConfig())[0]
        for at in range(3)
    ]
    assert pa.concat_tables(apart).equals(together)
