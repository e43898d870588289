"""Lists and events of a few visitors, joined by hand."""

import pyarrow as pa

from recsys.attribution import CLICK, EVENTS, LISTS, NOTHING, OTHER, PURCHASE, attribute, tally

WINDOW_US = 100


def lists_of(*rows):
    """Rows (visitor, arm, time, items[, degraded])."""
    columns = zip(*((*row, False)[:5] for row in rows), strict=True)
    names = ("visitor", "arm", "timestamp", "item_ids", "degraded")
    return in_order(LISTS, dict(zip(names, columns, strict=True)))


def events_of(*rows):
    """Rows (visitor, item, time, kind)."""
    names = ("visitor", "item_id", "timestamp", "kind")
    columns = zip(*rows, strict=True) if rows else ((), (), (), ())
    return in_order(EVENTS, dict(zip(names, columns, strict=True)))


def in_order(schema, columns):
    arrays = {
        field.name: pa.array(columns[field.name], pa.int64()).cast(field.type)
        if pa.types.is_timestamp(field.type)
        else pa.array(columns[field.name], field.type)
        for field in schema
    }
    return pa.table(arrays, schema=schema)


def attributed(lists, events):
    return attribute(lists, events, WINDOW_US).tolist()


def test_a_click_goes_back_to_the_last_list_that_showed_its_item():
    lists = lists_of(("a", 0, 10, ["x", "y"]), ("a", 0, 20, ["x"]), ("a", 0, 30, ["y", "z"]))
    events = events_of(("a", "x", 25, CLICK), ("a", "y", 29, CLICK), ("a", "z", 30, CLICK))
    assert attributed(lists, events) == [1, 0, 2]


def test_what_came_before_the_list_or_after_its_window_goes_back_to_none():
    lists = lists_of(("a", 0, 50, ["x"]))
    times = (49, 50, 150, 151)
    events = events_of(*(("a", "x", time, CLICK) for time in times))
    assert attributed(lists, events) == [-1, 0, 0, -1]


def test_items_of_other_visitors_and_items_that_were_not_shown_count_for_nothing():
    lists = lists_of(("a", 0, 10, ["x"]), ("b", 1, 10, ["y"]))
    events = events_of(("b", "x", 20, CLICK), ("a", "q", 20, CLICK), ("c", "x", 20, CLICK))
    assert attributed(lists, events) == [-1, -1, -1]


def test_lists_without_items_and_events_without_lists_are_no_error():
    assert attributed(lists_of(("a", 0, 1, [])), events_of()) == []
    assert attributed(lists_of(("a", 0, 1, [])), events_of(("a", "x", 2, CLICK))) == [-1]
    assert tally(LISTS.empty_table(), events_of(), start_us=0, window_us=1) is NOTHING


def test_visitors_are_added_up_in_their_arms():
    lists = lists_of(
        ("a", 0, 10, ["x", "y"]),
        ("a", 0, 500, ["x"], True),
        ("b", 1, 10, ["x"]),
        ("c", 1, 20, ["y"], True),
    )
    events = events_of(
        ("a", "x", 5, OTHER),
        ("a", "x", 20, CLICK),
        ("a", "y", 21, CLICK),
        ("a", "y", 30, PURCHASE),
        ("c", "y", 25, CLICK),
    )
    found = tally(lists, events, start_us=10, window_us=WINDOW_US)
    columns = ("users", "lists", "clicked_lists", "bought_lists", "buyers")
    assert [found.control.total(name) for name in columns] == [1, 2, 1, 1, 1]
    assert [found.treatment.total(name) for name in columns] == [2, 2, 1, 0, 0]
    assert found.control.total("before") > 0 == found.treatment.total("before")
    assert [arm.total("degraded_lists") for arm in (found.control, found.treatment)] == [1, 1]
    assert found.last_us == 500


def test_who_saw_both_versions_is_counted_and_in_neither_arm():
    lists = lists_of(("a", 0, 10, ["x"]), ("a", 1, 20, ["x"], True), ("b", 1, 10, ["x"]))
    found = tally(lists, events_of(("a", "x", 25, CLICK)), start_us=0, window_us=WINDOW_US)
    assert found.num_switched == 1
    assert (found.control.num_users, found.treatment.num_users) == (0, 1)
    assert found.treatment.total("clicked_lists") == 0
    assert found.treatment.total("degraded_lists") == 0


def test_groups_of_visitors_add_up():
    first = tally(lists_of(("a", 0, 10, ["x"], True)), events_of(), start_us=0, window_us=1)
    second = tally(lists_of(("b", 1, 20, ["x"])), events_of(), start_us=0, window_us=1)
    both = first + second + NOTHING
    assert (both.control.num_users, both.treatment.num_users) == (1, 1)
    assert both.control.total("degraded_lists") == 1
    assert both.last_us == 20
