import numpy as np
import pytest

from data_lake.cleaning import CleaningConfig, FlatEvents, clean, collapse_repeats, is_bot

DAY_US = 86_400_000_000
LENIENT = CleaningConfig(min_user_events=1, drop_repeats=False)


def flat(*rows):
    """Events from (user, item) or (user, item, time, type) rows, already in order."""
    full = [(*row, at, 0)[:4] if len(row) == 2 else row for at, row in enumerate(rows)]
    user, item, time, kind = np.array(full, np.int64).reshape(-1, 4).T
    return FlatEvents(user, item, kind, time, {"device": np.arange(len(full))})


def pairs(events):
    return list(zip(events.user.tolist(), events.item.tolist(), strict=True))


def test_keeps_everything_when_every_rule_is_off():
    events = flat((0, 1), (0, 1), (1, 2))
    kept, counts = clean(events, LENIENT)
    assert pairs(kept) == [(0, 1), (0, 1), (1, 2)]
    assert counts["events_kept"] == 3
    assert sum(count for rule, count in counts.items() if rule.startswith("removed")) == 0


def test_a_run_keeps_the_first_time_and_device_and_the_last_type():
    run = collapse_repeats(flat((0, 5, 10, 0), (0, 5, 20, 1), (0, 5, 30, 2), (0, 6, 40, 0)))
    assert run.item.tolist() == [5, 6]
    assert run.timestamp_us.tolist() == [10, 40]
    assert run.event_type.tolist() == [2, 0]
    assert run.context["device"].tolist() == [0, 3]


def test_a_run_ends_with_its_user():
    assert pairs(collapse_repeats(flat((0, 5), (1, 5), (1, 5)))) == [(0, 5), (1, 5)]


def test_an_item_that_comes_back_later_is_kept():
    assert pairs(collapse_repeats(flat((0, 5), (0, 6), (0, 5)))) == [(0, 5), (0, 6), (0, 5)]


def test_bots_have_more_events_than_allowed_in_all():
    events = flat((0, 1), (0, 2), (0, 3), (1, 1), (1, 2))
    config = CleaningConfig(max_events_per_user=2, min_user_events=1)
    kept, counts = clean(events, config)
    assert pairs(kept) == [(1, 1), (1, 2)]
    assert (counts["removed_bots"], counts["users_bots"]) == (3, 1)


def test_bots_have_more_events_than_allowed_on_one_day():
    late = DAY_US - 1
    events = flat(
        (0, 1, late, 0), (0, 2, DAY_US, 0), (0, 3, DAY_US, 0), (1, 1, late, 0), (1, 2, DAY_US, 0)
    )
    bots = is_bot(events, CleaningConfig(max_events_per_day=1))
    assert bots.tolist() == [True, True, True, False, False]


def test_a_run_continues_across_a_rare_item():
    events = flat((0, 5), (0, 9), (0, 5), (0, 6))
    kept, counts = clean(events, CleaningConfig(), rare_item=events.item == 9)
    assert pairs(kept) == [(0, 5), (0, 6)]
    assert (counts["removed_rare_items"], counts["removed_repeats"]) == (1, 1)


def test_types_that_are_not_kept_do_not_make_a_bot():
    events = flat((0, 1, 0, 7), (0, 2, 1, 7), (0, 3, 2, 0))
    config = CleaningConfig(max_events_per_user=1, min_user_events=1)
    kept, counts = clean(events, config, wrong_type=events.event_type == 7)
    assert pairs(kept) == [(0, 3)]
    assert (counts["removed_event_type"], counts["removed_bots"]) == (2, 0)


def test_short_users_are_counted_after_repeats_are_gone():
    events = flat((0, 1), (0, 1), (1, 1), (1, 2))
    kept, counts = clean(events, CleaningConfig(min_user_events=2))
    assert pairs(kept) == [(1, 1), (1, 2)]
    assert (counts["removed_short_users"], counts["users_short"]) == (1, 1)


def test_the_most_recent_positions_are_kept():
    events = flat((0, 1), (0, 2), (0, 3), (1, 4))
    kept, counts = clean(events, CleaningConfig(max_length=2, min_user_events=1))
    assert pairs(kept) == [(0, 2), (0, 3), (1, 4)]
    assert counts["removed_over_length"] == 1


@pytest.mark.parametrize("events", [flat(), flat((0, 1))])
def test_nothing_left_is_no_error(events):
    kept, counts = clean(events, CleaningConfig(min_user_events=2))
    assert len(kept) == 0
    assert counts["events_read"] == len(events)
    assert counts["users_kept"] == 0


def test_what_is_removed_and_what_is_kept_add_up():
    rng = np.random.default_rng(0)
    user = np.sort(rng.integers(0, 30, 500))
    events = flat(*zip(user, rng.integers(0, 4, 500), strict=True))
    config = CleaningConfig(max_events_per_user=20, min_user_events=5, max_length=8)
    _, counts = clean(events, config, rare_item=events.item == 3)
    removed = sum(count for rule, count in counts.items() if rule.startswith("removed"))
    assert removed + counts["events_kept"] == counts["events_read"] == 500
