"""What the visitors of a synthetic shop look at and buy: an item and an event type for each step.

Items depend on what came before, so they are drawn in a loop over steps that is vectorised over
the users of one part.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_lake.synthetic import Shop
from data_lake.synthetic_draws import Floats, Ints, choose, search_from
from data_lake.synthetic_visits import Moments, Visitors, draw_moments, draw_visitors

EVENT_TYPES = ("view", "add_to_cart", "purchase")
RESUME_WEIGHTS = np.array([0.4, 0.3, 0.2, 0.1])
"""A session that resumes looks back at one of the last four items, the newest first."""


@dataclass(frozen=True)
class State:
    """What the law looks at when N users choose their next item; arrays `[N]` save where said."""

    segment: Ints
    favourites: Ints
    """`[N, 3]`, like `taste`."""
    taste: Floats
    recent: Ints
    """The last items, each run of one item once, newest first: `[4, N]`."""
    num_recent: Ints
    stage: Ints
    starts_session: NDArray[np.bool_]
    context: Ints
    time_us: Ints


@dataclass(frozen=True)
class Trajectories:
    """The clean events of one part: `item` is a catalogue row, `stage` an index of EVENT_TYPES."""

    visitors: Visitors
    moments: Moments
    item: Ints
    stage: Ints


def generate_part(shop: Shop, part: int) -> Trajectories:
    """The users and clean events of one part; depends on the shop and the part alone."""
    rng = np.random.default_rng([shop.seed, 1, part])
    visitors = draw_visitors(shop.config, part, rng)
    moments = draw_moments(shop.config, visitors, rng)
    item, stage = _walk(shop, visitors, moments, rng)
    return Trajectories(visitors, moments, item, stage)


def draw_next_items(shop: Shop, state: State, rng: np.random.Generator) -> Ints:
    """One draw of the next item for each row of the state, shape `[N]`."""
    num_rows = len(state.segment)
    branch = rng.random(num_rows)
    starts = state.starts_session
    p_follow = np.where(
        starts, shop.config.p_resume * (state.num_recent > 0), shop.follow_by_stage[state.stage]
    )
    p_same = np.where(starts, 0.0, shop.same_by_stage[state.stage])
    follows = branch < p_follow
    stays = ~follows & (branch < p_follow + p_same)

    category = np.empty(num_rows, np.int64)
    category[stays] = shop.catalogue.category[state.recent[0, stays]]
    fresh = np.flatnonzero(~follows & ~stays)
    category[fresh] = _draw_categories(shop, state, fresh, rng)

    rows = np.flatnonzero(follows)
    successor = _draw_successor(shop, state, rows, rng)
    # A successor that is not on sale yet is replaced by something else of its category.
    category[rows] = shop.catalogue.category[successor]
    exists = shop.catalogue.created_us[successor] <= state.time_us[rows]
    item = np.full(num_rows, -1)
    item[rows[exists]] = successor[exists]
    rest = np.flatnonzero(item < 0)
    uniform = rng.random(len(rest))
    item[rest] = _draw_popular(
        shop, state.segment[rest], category[rest], state.time_us[rest], uniform
    )
    return item


def _draw_successor(shop: Shop, state: State, rows: Ints, rng: np.random.Generator) -> Ints:
    back = np.searchsorted(np.cumsum(RESUME_WEIGHTS)[:-1], rng.random(len(rows)), side="right")
    back = np.where(state.starts_session[rows], np.minimum(back, state.num_recent[rows] - 1), 0)
    place = choose(shop.follow_sums_SF, state.segment[rows], rng.random(len(rows)))
    return shop.successors_IF[state.recent[back, rows], place].astype(np.int64)


def _draw_categories(shop: Shop, state: State, rows: Ints, rng: np.random.Generator) -> Ints:
    context = state.context[rows]
    category = choose(shop.category_sums_XC, context, rng.random(len(rows)))
    own = np.flatnonzero(rng.random(len(rows)) < shop.config.p_taste)
    favourites = state.favourites[rows[own]]
    weights = state.taste[rows[own]] * shop.categories_XC[context[own, None], favourites]
    sums = np.cumsum(weights, axis=1)
    place = (rng.random(len(own)) * sums[:, -1] >= sums[:, :-1].T).sum(axis=0)
    category[own] = favourites[np.arange(len(own)), place]
    return category


def _draw_popular(
    shop: Shop, segment: Ints, category: Ints, time_us: Ints, uniform: Floats
) -> Ints:
    base = segment * shop.num_items
    first = base + shop.catalogue.category_starts[category]
    last = base + shop.first_unborn(category, time_us)
    low, high = shop.popularity_sums[first], shop.popularity_sums[last]
    goal = low + uniform * (high - low)
    drawn = search_from(shop.popularity_sums, first, goal, shop.largest_category + 1) - 1
    return np.asarray(np.clip(drawn, first, last - 1) - base, np.int64)


def _walk(
    shop: Shop, visitors: Visitors, moments: Moments, rng: np.random.Generator
) -> tuple[Ints, Ints]:
    lengths = np.diff(moments.offsets)
    # Longest first: those who still have a step to take are always a prefix, and slices are views.
    longest = np.argsort(-lengths, kind="stable")
    first = moments.offsets[longest]
    segment, favourites, taste = (
        visitors.segment[longest],
        visitors.favourites[longest],
        visitors.taste[longest],
    )
    item = np.empty(len(moments.time_us), np.int64)
    stage = np.empty(len(moments.time_us), np.int64)
    recent = np.zeros((len(RESUME_WEIGHTS), len(longest)), np.int64)
    num_recent = np.zeros(len(longest), np.int64)
    now = np.zeros(len(longest), np.int64)

    for alive, step in zip(
        _alive_by_step(lengths), range(int(lengths.max(initial=0))), strict=True
    ):
        at = first[:alive] + step
        state = State(
            segment[:alive],
            favourites[:alive],
            taste[:alive],
            recent[:, :alive],
            num_recent[:alive],
            now[:alive],
            moments.starts_session[at],
            moments.context[at],
            moments.time_us[at],
        )
        drawn, advances = draw_next_items(shop, state, rng), _draw_advances(shop, state, rng)
        drawn = np.where(advances, recent[0, :alive], drawn)
        now[:alive] = np.where(advances, now[:alive] + 1, 0)
        item[at], stage[at] = drawn, now[:alive]
        _remember(state, drawn)
    return item, stage


def _alive_by_step(lengths: Ints) -> list[int]:
    ended = np.cumsum(np.bincount(lengths))
    return [int(count) for count in len(lengths) - ended[:-1]]


def _draw_advances(shop: Shop, state: State, rng: np.random.Generator) -> NDArray[np.bool_]:
    chance = shop.advance_by_stage[state.stage, state.segment]
    level = shop.catalogue.price_level[state.recent[0]]
    chance = chance * np.clip(1 - 0.25 * level, 0.4, 1.5)
    draws = rng.random(len(chance))
    return np.asarray(~state.starts_session & (draws < chance), bool)


def _remember(state: State, drawn: Ints) -> None:
    changed = (drawn != state.recent[0]) | (state.num_recent == 0)
    for age in range(len(RESUME_WEIGHTS) - 1, 0, -1):
        np.copyto(state.recent[age], state.recent[age - 1], where=changed)
    np.copyto(state.recent[0], drawn)
    np.copyto(
        state.num_recent, np.minimum(state.num_recent + 1, len(RESUME_WEIGHTS)), where=changed
    )
