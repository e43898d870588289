"""The best ranking that anyone could give in the synthetic shop: its law, as probabilities.

The task is leave-one-out as the evaluation poses it: runs of one item are one position, the last
position is the target, everything seen before is left out of the ranking. The law knows what a
model can only estimate: latent taste, the successors, and whether a session begins.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_lake.synthetic import Floats, Ints, Shop
from data_lake.synthetic_events import RESUME_WEIGHTS, State, Trajectories

_CELLS = 4_000_000  # of a block of probabilities, users x items


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
    """Rank of each target, from 1, among the items not seen; a seen target ranks last. `[N]`."""
    block = max(1, _CELLS // shop.num_items)
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


def next_item_probabilities(shop: Shop, state: State) -> Floats:
    """P(next item | everything the law looks at), `[N, I]`: what `draw_next_items` draws from."""
    num_rows, rows = len(state.segment), np.arange(len(state.segment))
    starts = state.starts_session
    p_follow = np.where(
        starts, shop.config.p_resume * (state.num_recent > 0), shop.follow_by_stage[state.stage]
    )
    p_same = np.where(starts, 0.0, shop.same_by_stage[state.stage])

    mass = (1 - p_follow - p_same)[:, None] * _fresh_categories(shop, state)
    mass[rows, shop.catalogue.category[state.recent[0]]] += p_same
    follow = np.zeros((num_rows, shop.num_items))
    for age, weight in enumerate(_anchor_weights(state)):
        successors = shop.successors_IF[state.recent[age]]
        chance = (p_follow * weight)[:, None] * shop.follow_SF[state.segment]
        exists = shop.catalogue.created_us[successors] <= state.time_us[:, None]
        np.add.at(follow, (rows[:, None], successors), chance * exists)
        np.add.at(mass, (rows[:, None], shop.catalogue.category[successors]), chance * ~exists)
    return follow + _spread(shop, state, mass)


def _rank_block(shop: Shop, task: Task) -> Ints:
    rows = np.arange(len(task.target))
    scores = next_item_probabilities(shop, task.state)
    whose = np.repeat(rows, np.diff(task.seen_offsets))
    scores[whose, task.seen] = -1.0
    goal = scores[rows, task.target]
    # Ties count against the law, as they do against a model; the target itself is one of them.
    ranks = (scores >= goal[:, None]).sum(axis=1)
    return np.where(goal < 0, shop.num_items, ranks)


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


def _spread(shop: Shop, state: State, mass: Floats) -> Floats:
    """Spreads the mass of each category over its existing items by their popularity, `[N, I]`."""
    items = shop.catalogue
    base = state.segment[:, None] * shop.num_items
    categories = np.broadcast_to(np.arange(shop.num_categories), mass.shape)
    last = shop.first_unborn(categories, np.broadcast_to(state.time_us[:, None], mass.shape))
    low = shop.popularity_sums[base + items.category_starts[:-1]]
    density = mass / (shop.popularity_sums[base + last] - low)
    exists: NDArray[np.bool_] = items.created_us <= state.time_us[:, None]
    return np.asarray(density[:, items.category] * shop.popularity_SI[state.segment] * exists)
