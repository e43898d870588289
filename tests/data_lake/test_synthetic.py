from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from pydantic import ValidationError

from data_lake.schemas import TIMESTAMP
from data_lake.sequences import SequencesConfig, build_sequences
from data_lake.synthetic import (
    DAY_US,
    DEVICES,
    NUM_CONTEXTS,
    SEGMENTS,
    WEEK_US,
    ShopConfig,
    build_shop,
    items_table,
)
from data_lake.synthetic_draws import choose, running_sums, search_from
from data_lake.synthetic_events import EVENT_TYPES, State, draw_next_items, generate_part
from data_lake.synthetic_oracle import Task, best_reachable, leave_one_out, oracle_ranks
from data_lake.synthetic_rows import clean_rows, soil_rows
from data_lake.synthetic_visits import users_table

SMALL = ShopConfig(num_users=400, num_items=60, num_categories=5, num_parts=2, days=30)


@pytest.fixture(scope="module")
def shop():
    return build_shop(SMALL, seed=3)


@pytest.fixture(scope="module")
def walk(shop):
    return generate_part(shop, 0)


def some_state(shop, num_rows, *, starts_session, stage=0):
    """The same visitor `num_rows` times, in the middle of the month."""
    middle = SMALL.start_us + 15 * DAY_US
    return State(
        segment=np.full(num_rows, 1),
        favourites=np.tile([0, 2, 2], (num_rows, 1)),
        taste=np.tile([1.0, 2.0, 0.5], (num_rows, 1)),
        recent=np.tile([[7], [20], [7], [0]], num_rows),
        num_recent=np.full(num_rows, 3),
        stage=np.full(num_rows, stage),
        starts_session=np.full(num_rows, starts_session),
        context=np.full(num_rows, 6),
        time_us=np.full(num_rows, middle),
    )


def next_item_probabilities(shop, state):
    """P(next item | everything the law looks at), `[N, I]`: a loop over users and over items."""
    return np.array([_probabilities_of(shop, state, row) for row in range(len(state.segment))])


def _probabilities_of(shop, state, row):
    segment, starts = state.segment[row], state.starts_session[row]
    p_follow = shop.follow_by_stage[state.stage[row]]
    p_same = shop.same_by_stage[state.stage[row]]
    if starts:
        p_follow, p_same = shop.config.p_resume * (state.num_recent[row] > 0), 0.0
    category_of = shop.catalogue.category
    exists = shop.catalogue.created_us <= state.time_us[row]

    anyone = shop.categories_XC[state.context[row]]
    own = state.taste[row] * anyone[state.favourites[row]]
    taste = (1 - shop.config.p_taste) * anyone
    np.add.at(taste, state.favourites[row], shop.config.p_taste * own / own.sum())
    mass = (1 - p_follow - p_same) * taste
    mass[category_of[state.recent[0, row]]] += p_same

    weights = np.zeros(4)
    for age, weight in enumerate((0.4, 0.3, 0.2, 0.1)):
        weights[min(age, max(state.num_recent[row] - 1, 0)) if starts else 0] += weight
    follow = np.zeros(shop.num_items)
    for age, weight in enumerate(weights):
        for place, item in enumerate(shop.successors_IF[state.recent[age, row]]):
            chance = p_follow * weight * shop.follow_SF[segment, place]
            if exists[item]:
                follow[item] += chance
            else:
                mass[category_of[item]] += chance

    popularity = shop.popularity_SI[segment] * exists
    return follow + (mass / np.bincount(category_of, popularity))[category_of] * popularity


def rank_all(scores, task):
    """Ranks `[N]` from the score of every item."""
    ranks = []
    for row, target in enumerate(task.target):
        seen = task.seen[task.seen_offsets[row] : task.seen_offsets[row + 1]]
        rivals = np.delete(scores[row], seen)
        above = int((rivals >= scores[row, target]).sum())
        ranks.append(len(scores[row]) if target in seen else above)
    return ranks


def test_a_search_from_a_start_finds_what_a_search_of_everything_finds():
    rng = np.random.default_rng(0)
    values = np.sort(rng.integers(0, 50, 200))
    goal = rng.integers(-1, 51, 500)
    everywhere = np.searchsorted(values, goal, side="right")
    first = np.maximum(everywhere - rng.integers(0, 8, 500), 0)
    assert np.array_equal(search_from(values, first, goal, 7), everywhere)


def test_a_choice_falls_where_the_running_sum_passes_the_uniform_number():
    sums = running_sums(np.array([[1.0, 3.0, 0.0], [0.0, 0.0, 2.0]]))
    drawn = choose(sums, np.array([0, 0, 0, 1, 1]), np.array([0.0, 0.25, 0.99, 0.0, 0.99]))
    assert drawn.tolist() == [0, 1, 1, 2, 2]


def test_same_seed_gives_the_same_part_whatever_was_made_before(shop, walk):
    generate_part(shop, 1)
    again = generate_part(build_shop(SMALL, seed=3), 0)
    assert np.array_equal(again.item, walk.item)
    assert np.array_equal(again.moments.time_us, walk.moments.time_us)


def test_another_seed_gives_another_shop(walk):
    assert not np.array_equal(generate_part(build_shop(SMALL, seed=4), 0).item[:50], walk.item[:50])


def test_parts_divide_the_users_without_overlap(shop):
    users = [generate_part(shop, part).visitors.user_ids for part in range(2)]
    assert np.array_equal(np.concatenate(users), 1_000_000 + np.arange(400))


@pytest.mark.parametrize("days", [1, 30])
def test_each_user_moves_forward_in_time_and_breaks_between_sessions(days):
    # In a single day, sessions would overlap if they were not pushed apart.
    crowded = build_shop(SMALL.model_copy(update={"days": days}), seed=3)
    moments = generate_part(crowded, 0).moments
    same_user = np.ones(len(moments.time_us) - 1, bool)
    same_user[moments.offsets[1:-1] - 1] = False
    gap = np.diff(moments.time_us)
    starts = moments.starts_session[1:]
    assert (gap[same_user] > 0).all()
    assert (gap[same_user & starts] > 30 * 60_000_000).all()
    assert (gap[same_user & ~starts] <= 20 * 60_000_000).all()


def test_the_evening_is_busier_than_the_night_and_has_other_devices():
    shop = build_shop(ShopConfig(num_users=4_000, num_parts=1), seed=0)
    moments = generate_part(shop, 0).moments
    hour = moments.time_us % DAY_US // (DAY_US // 24)
    at_work, at_night = (hour >= 12) & (hour < 18), hour < 6
    assert at_night.sum() < 0.3 * at_work.sum()
    desktop = moments.device == DEVICES.index("desktop")
    assert desktop[at_work].mean() > 2 * desktop[at_night].mean()


def test_nobody_sees_an_item_before_it_exists(shop, walk):
    assert (shop.catalogue.created_us[walk.item] <= walk.moments.time_us).all()
    assert (shop.catalogue.created_us > SMALL.start_us).any()


def test_a_cart_follows_a_view_and_a_purchase_a_cart_of_the_same_item(walk):
    deeper = np.flatnonzero(walk.stage > 0)
    assert len(deeper) > 0
    assert np.array_equal(walk.stage[deeper - 1], walk.stage[deeper] - 1)
    assert np.array_equal(walk.item[deeper - 1], walk.item[deeper])
    assert not walk.moments.starts_session[deeper].any()


@pytest.mark.parametrize(("starts_session", "stage"), [(True, 0), (False, 0), (False, 2)])
def test_draws_follow_the_probabilities_that_the_oracle_reads(shop, starts_session, stage):
    num_draws = 60_000
    state = some_state(shop, num_draws, starts_session=starts_session, stage=stage)
    drawn = draw_next_items(shop, state, np.random.default_rng(0))
    share = np.bincount(drawn, minlength=60) / num_draws
    one = some_state(shop, 1, starts_session=starts_session, stage=stage)
    expected = next_item_probabilities(shop, one)[0]
    assert expected.sum() == pytest.approx(1)
    # Five deviations of a share of 60,000 draws: 5 * sqrt(p (1 - p) / 60,000).
    assert np.all(np.abs(share - expected) <= 5 * np.sqrt(expected / num_draws) + 1e-9)


def test_leave_one_out_collapses_runs_and_takes_the_last_position(shop, walk):
    task = leave_one_out(walk, min_positions=3, max_users=10)
    first_user = next(user for user in range(200) if len(_positions(walk, user)) >= 3)
    *seen, target = _positions(walk, first_user)
    assert task.target[0] == target
    assert list(task.seen[: task.seen_offsets[1]]) == seen
    assert list(task.state.recent[: min(4, len(seen)), 0]) == seen[::-1][:4]


def _positions(walk, user):
    items = walk.item[walk.moments.offsets[user] : walk.moments.offsets[user + 1]].tolist()
    return [item for at, item in enumerate(items) if at == 0 or items[at - 1] != item]


def test_oracle_poses_the_task_that_the_built_sequences_pose(shop, walk):
    events = clean_rows(shop, 0, walk)
    nothing = pa.array(np.zeros(events.num_rows, np.int64))
    events = events.append_column("ingested_at", nothing.cast(TIMESTAMP))
    events = events.append_column("arrival", nothing).append_column("user_bucket", nothing)
    sequences, _ = build_sequences(events, None, SequencesConfig(min_user_events=3))
    task = leave_one_out(walk, min_positions=3, max_users=10_000)
    targets = [items[-1] for items in sequences["item_ids"].to_pylist()]
    assert shop.catalogue.item_ids[task.target].tolist() == targets
    assert len(task.seen) == sum(len(items) - 1 for items in sequences["item_ids"].to_pylist())


def test_oracle_ranks_by_probability_without_seen_items(shop):
    state = some_state(shop, 1, starts_session=False)
    order = np.argsort(-next_item_probabilities(shop, state)[0])
    task = Task(state, order[[3]], np.array([0, 2]), order[[0, 2]])
    assert oracle_ranks(shop, task).tolist() == [2]


def test_oracle_never_hits_a_target_that_was_seen(shop):
    state = some_state(shop, 1, starts_session=False)
    task = Task(state, np.array([7]), np.array([0, 1]), np.array([7]))
    assert oracle_ranks(shop, task).tolist() == [60]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    "habits",
    [
        {},
        {"popularity_exponent": 0.0},  # items that nothing but price tells apart: ties
        {"new_item_share": 0.9, "num_categories": 2},  # most targets have unborn rivals
        {"p_resume": 1.0, "p_follow": 1.0, "p_same": 0.0},  # most items cannot come next
    ],
)
def test_ranks_are_those_of_a_score_for_every_item(habits, seed):
    shop = build_shop(SMALL.model_copy(update=habits), seed)
    task = leave_one_out(generate_part(shop, 0), min_positions=2, max_users=100)
    scores = next_item_probabilities(shop, task.state)
    anything = np.random.default_rng(seed).integers(0, 60, len(task.target))
    for posed in (task, replace(task, target=anything)):
        assert oracle_ranks(shop, posed).tolist() == rank_all(scores, posed)


def test_without_users_there_are_no_ranks(shop, walk):
    nobody = leave_one_out(walk, min_positions=3, max_users=0)
    assert best_reachable(shop, oracle_ranks(shop, nobody)).num_users == 0


def test_best_reachable_is_a_mean_over_users(shop):
    best = best_reachable(shop, np.array([1, 3, 11, 60]))
    assert best.hit_rate_at_10 == 2 / 4
    assert best.ndcg_at_10 == (1 + 1 / np.log2(4)) / 4
    assert best.seen_share == 1 / 4


def test_law_beats_popularity_by_a_wide_margin():
    config = ShopConfig(num_users=2_000, num_items=1_000, num_parts=1)
    shop = build_shop(config, seed=0)
    walk = generate_part(shop, 0)
    task = leave_one_out(walk, min_positions=3, max_users=1_000)
    popular = np.argsort(-np.bincount(walk.item, minlength=1_000))[:10]
    best = best_reachable(shop, oracle_ranks(shop, task))
    assert 0.35 < best.hit_rate_at_10 < 0.55
    assert best.hit_rate_at_10 > 2.5 * np.isin(task.target, popular).mean()


def test_dirt_comes_on_top_of_the_clean_events(shop, walk):
    dirty = build_shop(SMALL.model_copy(update={"duplicate_share": 0.1, "broken_share": 0.1}), 3)
    clean = clean_rows(dirty, 0, walk)
    rows, untyped = soil_rows(clean, dirty, 0)
    is_real = pc.starts_with(rows["event_id"], "e")
    kept = rows.filter(is_real)
    assert pc.count_distinct(kept["event_id"]).as_py() == clean.num_rows
    assert kept.num_rows > 1.05 * clean.num_rows
    assert rows.num_rows + len(untyped) - kept.num_rows > 0.05 * clean.num_rows
    assert {"guest", "yesterday", "free"} <= {value for row in untyped for value in row.values()}


def test_broken_rows_have_one_fault_each(shop, walk):
    dirty = build_shop(SMALL.model_copy(update={"broken_share": 0.1}), 3)
    rows, _ = soil_rows(clean_rows(dirty, 0, walk), dirty, 0)
    broken = rows.filter(pc.starts_with(rows["event_id"], "broken"))
    faults = [
        pc.is_null(broken["user_id"]),
        pc.is_null(broken["item_id"]),
        pc.equal(broken["event_type"], ""),
        pc.greater(broken["timestamp"], pa.scalar(2**52, broken["timestamp"].type)),
        pc.less(broken["price"], 0),
    ]
    per_row = np.sum([np.asarray(fault) for fault in faults], axis=0)
    assert (per_row == 1).all()


def test_without_dirt_rows_come_in_order_of_time(walk):
    shares = {"duplicate_share": 0.0, "late_share": 0.0, "broken_share": 0.0}
    tidy = build_shop(SMALL.model_copy(update=shares), 3)
    rows, untyped = soil_rows(clean_rows(tidy, 0, walk), tidy, 0)
    assert untyped == []
    assert (np.diff(rows["timestamp"].cast(pa.int64()).to_numpy()) >= 0).all()
    assert set(rows["event_type"].to_pylist()) == set(EVENT_TYPES)


def test_items_and_users_are_unique(shop, walk):
    assert pc.count_distinct(items_table(shop)["item_id"]).as_py() == 60
    assert pc.count_distinct(items_table(shop)["category"]).as_py() == 5
    assert users_table(walk.visitors)["segment"].null_count == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"p_follow": 0.8, "p_same": 0.4}, "keep the sum at 1"),
        ({"num_items": 5, "num_categories": 6}, "raise num_items"),
        ({"num_users": 3, "num_parts": 4}, "lower num_parts"),
        ({"mean_events_per_user": 3}, "lower mean_events_per_session"),
        ({"num_user": 3}, "Extra inputs"),
    ],
)
def test_a_shop_that_cannot_be_says_why(wrong, message):
    with pytest.raises(ValidationError, match=message):
        ShopConfig(**wrong)


DRIFTING = SMALL.model_copy(update={"taste_drift": 0.8, "num_users": 2000})


def test_each_week_has_a_taste_of_its_own():
    shop = build_shop(DRIFTING, seed=3)
    moments = generate_part(shop, 0).moments
    week = np.minimum((moments.time_us - shop.config.start_us) // WEEK_US, 8)
    assert np.array_equal(moments.context // NUM_CONTEXTS, week)

    logits = np.log(shop.categories_XC).reshape(9, len(SEGMENTS), -1, shop.num_categories)
    moved = np.diff(logits - logits.mean(axis=-1, keepdims=True), axis=0)
    assert moved.std() == pytest.approx(0.8, rel=0.3)
    # Hours and devices are as they were: a segment moves as a whole.
    assert np.allclose(moved, moved[:, :, :1])


def test_the_first_week_has_the_taste_of_a_shop_without_drift():
    still = build_shop(DRIFTING.model_copy(update={"taste_drift": 0.0}), seed=3)
    drifting = build_shop(DRIFTING, seed=3)
    assert len(drifting.categories_XC) == 9 * len(still.categories_XC)  # 60 days
    assert np.array_equal(drifting.categories_XC[: len(still.categories_XC)], still.categories_XC)


def test_the_oracle_knows_how_taste_drifts():
    drifting = build_shop(DRIFTING, seed=3)
    task = leave_one_out(generate_part(drifting, 0), min_positions=3, max_users=150)
    scores = next_item_probabilities(drifting, task.state)
    assert np.array_equal(oracle_ranks(drifting, task), rank_all(scores, task))
