"""The best ranking that anyone could give in the synthetic shop: its law, as probabilities.

The task is leave-one-out as the evaluation poses it: runs of one item are one position, the last
position is the target, everything seen before is left out of the ranking. The law knows what a
model can only estimate: latent taste, the successors, and whether a session begins.
"""

from dataclasses import dataclass

import numpy as np

from data_lake.synthetic import Shop
from data_lake.synthetic_draws import Floats, Ints
from data_lake.synthetic_events import RESUME_WEIGHTS, State, Trajectories

_CELLS = 1_000_000  # of a block of densities, users x categories


@dataclass(frozen=True)
class Task:
    """N leave-one-out targets and what the law knows about each at that moment."""

    state: State
    target: Ints
    seen_offsets: Ints
    """Where the items seen by each user begin in `seen`: shape `[N + 1]`."""
    seen: Ints

    def slice(self, start: int, stop: int) -> "Task":
        """Rows `start` to `stop - 1`."""
        state, rows = self.state, slice(start, stop)
        offsets = self.seen_offsets[start : stop + 1]
        return Task(
            State(
                segment=state.segment[rows],
                favourites=state.favourites[rows],
                taste=state.taste[rows],
                recent=state.recent[:, rows],
                num_recent=state.num_recent[rows],
                stage=state.stage[rows],
                starts_session=state.starts_session[rows],
                context=state.context[rows],
                time_us=state.time_us[rows],
            ),
            self.target[rows],
            offsets - offsets[0],
            self.seen[offsets[0] : offsets[-1]],
        )


@dataclass(frozen=True)
class BestReachable:
    """What a perfect model would score; NDCG and hit rate are means over `num_users`."""

    hit_rate_at_10: float
    ndcg_at_10: float
    seen_share: float
    """Targets that the user had seen before: filtered from every ranking, so nobody hits them."""
    num_users: int


@dataclass(frozen=True)
class Law:
    """P(next item) for N users, without an array of users x items."""

    segment: Ints
    time_us: Ints
    density: Floats
    """What an existing item of the category gets for each unit of its popularity, `[N, C]`."""
    successors: Ints
    """Items that get more than that, `[N, 4 F]`; one may be there several times."""
    chance: Floats
    """How much more, `[N, 4 F]`."""

    def scores(self, shop: Shop, row: int, items: Ints, *, by_taste: bool = False) -> Floats:
        """Probability of each item for one user; `by_taste` leaves out that it may follow."""
        catalogue = shop.catalogue
        taste = self.density[row, catalogue.category[items]]
        taste = taste * shop.popularity_SI[self.segment[row], items]
        taste = taste * (catalogue.created_us[items] <= self.time_us[row])
        if by_taste:
            return np.asarray(taste, np.float64)
        chance = self.chance[row] * (self.successors[row] == items[:, None])
        # Summed in turn: the same chances give the same float, wherever they stand.
        return np.asarray(np.cumsum(chance, axis=1)[:, -1] + taste, np.float64)


def leave_one_out(trajectories: Trajectories, *, min_positions: int, max_users: int) -> Task:
    """The last position of the first `max_users` users that have at least `min_positions`."""
    moments, item = trajectories.moments, trajectories.item
    user = np.repeat(np.arange(len(moments.offsets) - 1), np.diff(moments.offsets))
    starts = np.ones(len(item), bool)
    starts[1:] = (user[1:] != user[:-1]) | (item[1:] != item[:-1])
    runs = np.flatnonzero(starts)
    offsets = np.searchsorted(user[runs], np.arange(len(moments.offsets)))

    chosen = np.flatnonzero(np.diff(offsets) >= min_positions)[:max_users]
    first, last = offsets[chosen], offsets[chosen + 1] - 1
    back = last - 1 - np.arange(len(RESUME_WEIGHTS))[:, None]
    at = runs[last]
    visitors = trajectories.visitors
    state = State(
        segment=visitors.segment[chosen],
        favourites=visitors.favourites[chosen],
        taste=visitors.taste[chosen],
        recent=item[runs[np.maximum(back, first)]],
        num_recent=np.minimum(last - first, len(RESUME_WEIGHTS)),
        stage=trajectories.stage[np.maximum(at - 1, 0)],
        starts_session=moments.starts_session[at],
        context=moments.context[at],
        time_us=moments.time_us[at],
    )
    num_seen = last - first
    seen_offsets = np.concatenate([[0], np.cumsum(num_seen)])
    within = np.arange(seen_offsets[-1]) - np.repeat(seen_offsets[:-1], num_seen)
    seen = item[runs[np.repeat(first, num_seen) + within]]
    return Task(state, item[at], seen_offsets, seen)


def oracle_ranks(shop: Shop, task: Task) -> Ints:
    """Rank of each target, from 1, among the items not seen; a seen target ranks last. `[N]`.

    Exact without a score for every item: a search per category, not a pass over the catalogue.
    """
    block = max(1, _CELLS // shop.num_categories)
    edges = range(0, len(task.target), block)
    ranks = [_rank_block(shop, task.slice(start, start + block)) for start in edges]
    return np.concatenate(ranks) if ranks else np.empty(0, np.int64)


def best_reachable(shop: Shop, ranks: Ints) -> BestReachable:
    """The figures for these ranks."""
    hit = ranks <= 10
    gain = np.where(hit, 1 / np.log2(1 + ranks), 0.0)
    size = max(1, len(ranks))
    return BestReachable(
        hit_rate_at_10=float(hit.sum() / size),
        ndcg_at_10=float(gain.sum() / size),
        seen_share=float((ranks == shop.num_items).sum() / size),
        num_users=len(ranks),
    )


def _read_law(shop: Shop, state: State) -> Law:
    """The law of the next item for each row of the state."""
    rows, starts = np.arange(len(state.segment)), state.starts_session
    p_follow = np.where(
        starts, shop.config.p_resume * (state.num_recent > 0), shop.follow_by_stage[state.stage]
    )
    p_same = np.where(starts, 0.0, shop.same_by_stage[state.stage])
    chance = (p_follow * _anchor_weights(state))[:, :, None] * shop.follow_SF[state.segment]
    successors = shop.successors_IF[state.recent].astype(np.int64)
    exists = shop.catalogue.created_us[successors] <= state.time_us[:, None]

    mass = (1 - p_follow - p_same)[:, None] * _fresh_categories(shop, state)
    mass[rows, shop.catalogue.category[state.recent[0]]] += p_same
    # What would have gone to a successor that is not on sale yet goes to its category.
    np.add.at(mass, (rows[:, None], shop.catalogue.category[successors]), chance * ~exists)
    return Law(
        state.segment,
        state.time_us,
        _densities(shop, state, mass),
        np.concatenate(list(successors), axis=1),
        np.concatenate(list(chance * exists), axis=1),
    )


def _rank_block(shop: Shop, task: Task) -> Ints:
    law, offsets = _read_law(shop, task.state), task.seen_offsets
    ranks = [
        _rank(shop, law, row, int(target), np.unique(task.seen[offsets[row] : offsets[row + 1]]))
        for row, target in enumerate(task.target)
    ]
    return np.array(ranks, np.int64)


def _rank(shop: Shop, law: Law, row: int, target: int, seen: Ints) -> int:
    """Ties count against the law, as they do against a model; the target itself is one of them."""
    if target in seen:
        return shop.num_items
    goal = law.scores(shop, row, np.array([target]))[0]
    if goal == 0:
        return shop.num_items - len(seen)  # every item ties

    # Nearly all scores are those of the category's taste alone; the few others are set right.
    followed = np.setdiff1d(law.successors[row], seen)
    num_above = _count_above(shop, law, row, goal)
    num_above -= int((law.scores(shop, row, seen, by_taste=True) >= goal).sum())
    num_above -= int((law.scores(shop, row, followed, by_taste=True) >= goal).sum())
    return num_above + int((law.scores(shop, row, followed) >= goal).sum())


def _count_above(shop: Shop, law: Law, row: int, goal: float) -> int:
    """Existing items whose category's taste alone lifts them to the goal or above."""
    segment, starts = law.segment[row], shop.catalogue.category_starts
    order, popularity = shop.by_popularity_SI[segment], shop.popularity_SI[segment]
    # The most popular item of each category tells which ones reach the goal at all.
    density = law.density[row]
    reaching = np.flatnonzero(density * popularity[order[starts[:-1]]] >= goal)
    first, density = starts[reaching], density[reaching]
    sizes = starts[reaching + 1] - first
    counts = np.zeros(len(reaching), np.int64)
    for power in reversed(range(shop.largest_category.bit_length())):
        more = np.minimum(counts + (1 << power), sizes)
        counts = np.where(density * popularity[order[first + more - 1]] >= goal, more, counts)

    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    above = order[np.repeat(first, counts) + within]
    return int((shop.catalogue.created_us[above] <= law.time_us[row]).sum())


def _anchor_weights(state: State) -> Floats:
    """Probability that each of the recent items is the one that is followed, `[4, N]`."""
    num_ages = len(RESUME_WEIGHTS)
    weights = np.zeros((num_ages, len(state.segment)))
    oldest = np.maximum(state.num_recent - 1, 0)
    for age in range(num_ages):
        back = np.where(state.starts_session, np.minimum(age, oldest), 0)
        weights[back, np.arange(len(back))] += RESUME_WEIGHTS[age]
    return weights


def _fresh_categories(shop: Shop, state: State) -> Floats:
    """P(category) of a fresh choice, `[N, C]`: what anyone wants now, mixed with own taste."""
    anyone = shop.categories_XC[state.context]
    rows = np.arange(len(anyone))[:, None]
    own = state.taste * anyone[rows, state.favourites]
    own = own / own.sum(axis=1, keepdims=True)
    table = (1 - shop.config.p_taste) * anyone
    np.add.at(table, (rows, state.favourites), shop.config.p_taste * own)
    return table


def _densities(shop: Shop, state: State, mass: Floats) -> Floats:
    """The mass of each category by weight of the items that exist, `[N, C]`."""
    starts = shop.catalogue.category_starts[:-1]
    base = state.segment[:, None] * shop.num_items
    categories = np.broadcast_to(np.arange(shop.num_categories), mass.shape)
    last = shop.first_unborn(categories, np.broadcast_to(state.time_us[:, None], mass.shape))
    weight = shop.popularity_sums[base + last] - shop.popularity_sums[base + starts]
    return np.asarray(mass / weight, np.float64)
