import json
from datetime import UTC, datetime

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_lake.errors import SourceError
from data_lake.normalise import check_mapped, derive_event_ids, normalise
from data_lake.readers import RawRows, show_as_json
from data_lake.schemas import TIMESTAMP, events_schema, items_schema
from data_lake.sources import SourceConfig

NOW_US = 1_760_000_000_000_000
GOOD = {"user_id": 1, "item_id": 2, "event_type": "view", "timestamp": NOW_US}


def source(columns, **settings):
    columns = columns if isinstance(columns, dict) else {name: name for name in columns}
    return SourceConfig(path="x", format="jsonl", columns=columns, **settings)


def raw_rows(table, misfits=()):
    return RawRows(table, list(misfits), lambda rows: show_as_json(table, rows))


def run(columns, *, ids="int64", config=None, schema=None):
    """Normalises columns of values, or of Arrow arrays, under their own names."""
    table = pa.table(columns)
    config = config or source(table.column_names)
    return normalise(raw_rows(table), config, schema or events_schema(ids, ids), now_us=NOW_US)


def read_one(name, values, *, ids="int64", **settings):
    """What becomes of one column beside good ones: its values, and the reasons against the rest."""
    table = {key: [value] * len(values) for key, value in GOOD.items()} | {name: values}
    result = run(table, ids=ids, config=source(list(table), **settings))
    return result.rows[name].to_pylist(), result.rejected["reason"].to_pylist()


def at(*moment):
    return datetime(*moment, tzinfo=UTC)


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ([1, 2**63 - 1], [1, 2**63 - 1]),
        (pa.array([3, 4], pa.uint64()), [3, 4]),
        ([1.0, 2.0], [1, 2]),
        (["7", " 8 ", "9223372036854775807"], [7, 8, 2**63 - 1]),
        (["7.0", "+8", "x"], [7, 8]),
        (pa.array(["7", "7", "8"]).dictionary_encode(), [7, 7, 8]),
        (pa.array([b"7", b"\xff"]), [7]),
    ],
)
def test_ids_that_are_whole_numbers_are_taken(given, taken):
    assert read_one("user_id", given)[0] == taken


@pytest.mark.parametrize("bad", [[1.5], ["1e3"], ["guest"], ["9223372036854775808"]])
def test_other_ids_are_not_whole_numbers(bad):
    assert read_one("user_id", bad) == ([], ["user_id is not a whole number"])


def test_an_unsigned_id_beyond_int64_is_rejected():
    given = pa.array([2**63, 5], pa.uint64())
    assert read_one("user_id", given) == ([5], ["user_id is not a whole number"])


@pytest.mark.parametrize("given", [[5, 6], [5.0, 6.0], ["5", " 6"], pa.array([b"5", b"6"])])
def test_ids_of_every_kind_become_the_same_text(given):
    assert read_one("item_id", given, ids="string")[0] == ["5", "6"]


@pytest.mark.parametrize("name", ["user_id", "item_id", "event_type"])
@pytest.mark.parametrize("nothing", [None, "", "  "])
def test_a_row_without_a_key_is_rejected(name, nothing):
    assert read_one(name, ["1", nothing], ids="string") == (["1"], [f"{name} is missing"])


@pytest.mark.parametrize(("unit", "number"), [("s", 1_000_000_000), ("ms", 10**12), ("us", 10**15)])
@pytest.mark.parametrize("kind", [int, float, str])
def test_times_are_read_in_their_unit(unit, number, kind):
    taken, _ = read_one("timestamp", [kind(number)], timestamp_unit=unit)
    assert taken == [at(2001, 9, 9, 1, 46, 40)]


def test_fractions_of_seconds_are_kept():
    taken, _ = read_one("timestamp", ["1000000000.000001"], timestamp_unit="s")
    assert taken == [at(2001, 9, 9, 1, 46, 40, 1)]


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2025-01-02T03:04:05Z", at(2025, 1, 2, 3, 4, 5)),
        ("2025-01-02 03:04:05.123456789+01:00", at(2025, 1, 2, 2, 4, 5, 123456)),
        ("2025-01-02T03:04:05", at(2025, 1, 2, 2, 4, 5)),  # Berlin in winter
        ("2025-07-02T03:04:05", at(2025, 7, 2, 1, 4, 5)),  # Berlin in summer
        ("2025-01-02", at(2025, 1, 1, 23)),
    ],
)
@pytest.mark.parametrize("beside", [[], ["2025-01-02T03:04:05Z", "2025-01-02T03:04:05", "soon"]])
def test_iso_times_are_read_with_and_without_an_offset(text, moment, beside):
    settings = {"timestamp_unit": "iso", "timezone": "Europe/Berlin"}
    taken, reasons = read_one("timestamp", [text, *beside], **settings)
    assert taken[0] == moment
    assert reasons == ["timestamp is not a time"] * (len(beside) // 3)


def test_an_hour_that_a_clock_skips_or_repeats_is_no_error():
    given = pa.array([datetime(2024, 3, 31, 2, 30), datetime(2024, 10, 27, 2, 30)])
    given = given.cast(pa.timestamp("us"))
    table = {name: [value] * 2 for name, value in GOOD.items()} | {"timestamp": given}
    result = run(table, config=source(list(table), timezone="Europe/Berlin"))
    assert result.rows["timestamp"].to_pylist() == [
        at(2024, 3, 31, 0, 59, 59, 999999),
        at(2024, 10, 27, 0, 30),
    ]


@pytest.mark.parametrize("kind", [pa.date32(), pa.timestamp("ns"), pa.timestamp("s", "Asia/Tokyo")])
def test_dates_and_timestamps_of_arrow_are_times(kind):
    given = pa.array([datetime(2025, 1, 2, tzinfo=UTC)], TIMESTAMP).cast(kind)
    assert read_one("timestamp", given)[0] == [at(2025, 1, 2)]


@pytest.mark.parametrize(
    ("time_us", "reason"),
    [
        (631_151_999_999_999, "timestamp is before 1990"),
        (-1, "timestamp is before 1990"),
        (NOW_US + 86_400_000_001, "timestamp is in the future"),
        (2**62, "timestamp is in the future"),
        (None, "timestamp is missing"),
        (float("nan"), "timestamp is missing"),
        (float("inf"), "timestamp is not a time"),
        ("yesterday", "timestamp is not a time"),
    ],
)
def test_absurd_times_are_rejected(time_us, reason):
    assert read_one("timestamp", [time_us]) == ([], [reason])


def test_the_edges_of_time_are_inside():
    edges = [631_152_000_000_000, NOW_US + 86_400_000_000]
    assert read_one("timestamp", edges)[1] == []


@pytest.mark.parametrize(
    ("name", "given", "taken", "reasons"),
    [
        ("price", [1.5, None, float("nan"), 0], [1.5, None, None, 0], []),
        ("price", ["1.5", "", "2."], [1.5, None, 2.0], []),
        ("price", ["free", "1,5", "1e2"], [100.0], ["price is not a number"] * 2),
        ("price", [-1.0, float("inf")], [], ["price is negative", "price is not a number"]),
        ("quantity", ["2", "3.0"], [2, 3], []),
        ("quantity", [2**31, -1], [], ["quantity is not a whole number", "quantity is negative"]),
    ],
)
def test_prices_and_quantities(name, given, taken, reasons):
    assert read_one(name, given) == (taken, reasons)


def test_booleans_come_in_several_words():
    columns = {"item_id": range(5), "available": ["TRUE", "0", "no", None, "perhaps"]}
    result = run(columns, schema=items_schema("int64"))
    assert result.rows["available"].to_pylist() == [True, False, False, None]
    assert result.rejected["reason"].to_pylist() == ["available is not a bool"]


def test_columns_are_joined_mapped_cut_and_constant():
    table = {"f": ["a|b", "c"], "n": [1, 2], "m": [3, 4], "t": [NOW_US] * 2, "e": [9, 8]}
    config = source(
        {"user_id": ("n", "m"), "item_id": "f", "timestamp": "t", "event_type": "e"},
        constants={"device": "web"},
        first_of={"item_id": "|"},
        values={"event_type": {"9": "view"}},
    )
    rows = run(table, ids="string", config=config).rows
    assert rows["user_id"].to_pylist() == ["1-3", "2-4"]
    assert rows["item_id"].to_pylist() == ["a", "c"]
    assert rows["event_type"].to_pylist() == ["view", "8"]
    assert rows["device"].to_pylist() == ["web", "web"]


def test_a_rejected_row_comes_whole_with_its_first_reason():
    table = pa.table({"user_id": ["x"], "item_id": [None], "more": [[1, 2]], "raw": [b"\xff"]})
    config = source({"user_id": "user_id", "item_id": "item_id"})
    raw = raw_rows(table, ["half a li"])
    rejected = normalise(raw, config, events_schema("int64", "int64"), now_us=NOW_US).rejected
    assert json.loads(rejected["raw"][0].as_py()) == {
        "user_id": "x",
        "item_id": None,
        "more": [1, 2],
        "raw": "\\xff",
    }
    assert rejected["raw"][1].as_py() == "half a li"
    assert rejected["reason"].to_pylist() == [
        "user_id is not a whole number",
        "the line has too few or too many fields, an open quote, or is no JSON object",
    ]


def test_a_column_of_lists_is_no_id():
    with pytest.raises(SourceError, match="no readable user_id in 'user_id'"):
        read_one("user_id", [[1, 2]])


def test_a_map_to_a_column_that_the_table_lacks_is_refused():
    schema = events_schema("int64", "int64")
    with pytest.raises(SourceError, match="maps colour, usr, which the table does not have"):
        check_mapped(source(["usr"], values={"colour": {}}), schema, ())
    with pytest.raises(SourceError, match="gives no item_id; add it to `columns` or `constants`"):
        check_mapped(source(["user_id"]), schema, ("user_id", "item_id"))


def test_derived_ids_are_sixteen_hex_digits_that_depend_on_every_value():
    rows = pa.table({"a": [1, 1, 2, 1], "b": ["x", "x", "x", None], "c": [0.5, 0.5, 0.5, 0.5]})
    ids = derive_event_ids(rows).to_pylist()
    assert ids[0] == ids[1]
    assert len(set(ids)) == 3
    assert all(len(text) == 16 and int(text, 16) >= 0 for text in ids)


def test_derived_ids_do_not_depend_on_neighbours_or_on_the_order_of_columns():
    rows = pa.table({"a": [1, 2, 3], "t": pa.array([5, 6, None], TIMESTAMP)})
    ids = derive_event_ids(rows)
    assert derive_event_ids(rows.slice(1)).to_pylist() == ids.to_pylist()[1:]
    assert derive_event_ids(rows.select(["t", "a"])).equals(ids)


def test_derived_ids_never_change():
    # A change here would take every file that has no ids for new.
    rows = pa.table({"user_id": [1], "item_id": ["a"], "timestamp": pa.array([7], TIMESTAMP)})
    assert derive_event_ids(rows).to_pylist() == ["127ea6568aea9f14"]


cells = st.one_of(st.none(), st.integers(), st.floats(), st.text(max_size=5), st.booleans())


@given(st.lists(st.fixed_dictionaries({name: cells for name in GOOD}), min_size=1, max_size=8))
def test_whatever_comes_is_either_taken_or_rejected(rows):
    columns = {name: [None if r[name] is None else str(r[name]) for r in rows] for name in GOOD}
    table = {name: pa.array(values, pa.string()) for name, values in columns.items()}
    for ids in ("int64", "string"):
        result = run(table, ids=ids)
        assert result.rows.num_rows + result.rejected.num_rows == len(rows)
        assert result.rows.schema == pa.schema(
            [events_schema(ids, ids).field(name) for name in result.rows.column_names]
        )


def test_parquet_text_that_is_no_utf8_does_not_cost_the_rows_beside_it():
    broken = pa.array([b"a", b"\xff"]).view(pa.string())
    assert read_one("device", broken) == (["a", "\ufffd"], [])


def test_a_time_may_end_in_the_letters_utc():
    taken, _ = read_one("timestamp", ["2025-01-02 03:04:05 UTC"], timestamp_unit="iso")
    assert taken == [at(2025, 1, 2, 3, 4, 5)]


@pytest.mark.parametrize("beside", [[], ["2025-01-02T03:04:05Z"]])
def test_an_hour_that_a_clock_skips_is_the_same_whatever_stands_beside_it(beside):
    settings = {"timestamp_unit": "iso", "timezone": "Europe/Berlin"}
    taken, _ = read_one("timestamp", ["2024-03-31T02:30:00", *beside], **settings)
    assert taken[0] == at(2024, 3, 31, 0, 59, 59, 999999)


@pytest.mark.parametrize("unit", ["s", "ms", "us"])
def test_a_timestamp_beyond_every_calendar_is_in_the_future(unit):
    far = pa.array([2**62], pa.timestamp(unit))
    assert read_one("timestamp", far) == ([], ["timestamp is in the future"])


@pytest.mark.parametrize("beside", [[], ["x"]])
def test_a_hexadecimal_is_no_number_whatever_stands_beside_it(beside):
    taken, reasons = read_one("user_id", ["0x10", *beside])
    assert taken == []
    assert set(reasons) == {"user_id is not a whole number"}
