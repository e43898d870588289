"""A synthetic shop: its catalogue and the law by which its visitors choose the next item.

The law is a set of plain tables. `synthetic_visits` and `synthetic_events` draw from them,
`synthetic_oracle` reads them as probabilities, so that the best reachable hit rate is known.
"""

from dataclasses import dataclass
from datetime import UTC, date, datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field, model_validator

from data_lake.schemas import TIMESTAMP, items_schema
from data_lake.synthetic_draws import Floats, Ints, Rows, normalise, running_sums, search_from

SEGMENTS = ("bargain", "regular", "premium")
DEVICES = ("mobile", "desktop", "tablet", "app")
NUM_BLOCKS = 4  # night, morning, afternoon, evening
FIRST_ITEM_ID = 5_000_000
FIRST_USER_ID = 1_000_000
NUM_CONTEXTS = len(SEGMENTS) * NUM_BLOCKS * len(DEVICES)
DAY_US = 86_400_000_000
WEEK_US = 7 * DAY_US

# Successors come in three groups: the same category and two complementary ones. Who follows which
# group depends on the segment (rows): item-to-item counts alone blur three kinds of visitor.
_GROUP_SIZE = 4
_GROUP_WEIGHTS = np.array([[0.65, 0.25, 0.10], [0.15, 0.70, 0.15], [0.10, 0.20, 0.70]])
_GROUP_DECAY = 0.6
_PRICE_TASTE = np.array([-0.7, 0.0, 0.7])
_ITEMS_AT_ONCE = 20_000  # successors are drawn for: the tables in between stay in the cache
# fmt: off
_NOUNS = (
    "running-shoes", "coffee", "headphones", "backpacks", "novels", "tea", "kettles",
    "jackets", "phones", "laptops", "garden-tools", "board-games", "toys", "cookware",
    "lamps", "rugs", "bikes", "helmets", "cameras", "lenses", "watches", "perfumes", "shirts",
    "jeans", "skincare", "vitamins", "pet-food", "chairs", "desks", "monitors", "keyboards",
    "speakers",
)
# fmt: on


class ShopConfig(BaseModel):
    """The size, the habits and the dirt of a synthetic shop."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_users: int = Field(default=20_000, ge=1)
    num_items: int = Field(default=3_000, ge=2)
    num_categories: int = Field(default=30, ge=1)
    num_parts: int = Field(default=8, ge=1)
    """Source files, and units of work: one part holds a contiguous range of users."""
    start: date = date(2025, 1, 1)
    days: int = Field(default=90, ge=1)
    mean_events_per_user: float = Field(default=25.0, ge=1)
    mean_events_per_session: float = Field(default=6.0, ge=1)

    popularity_exponent: float = Field(default=1.1, ge=0)
    """Zipf's exponent within a category; 0 makes all items equally popular."""
    new_item_share: float = Field(default=0.15, ge=0, le=1)
    """Share of items that appear while the shop is open."""
    p_follow: float = Field(default=0.3, ge=0, le=1)
    """After a view: the next item is a successor of this one. Higher after a cart or a purchase."""
    p_same: float = Field(default=0.2, ge=0, le=1)
    """After a view: the next item is another one of the same category. Lower after a purchase."""
    p_resume: float = Field(default=0.5, ge=0, le=1)
    """A new session starts with a successor of one of the last four items."""
    p_taste: float = Field(default=0.5, ge=0, le=1)
    """A fresh category is one of the visitor's own three rather than anyone's."""
    context_strength: float = Field(default=1.6, ge=0)
    """How far segment, hour and device tilt the choice of a category (deviation in logits)."""
    taste_drift: float = Field(default=0.0, ge=0)
    """How far the choice of a category moves from one week to the next, for each segment on its own
    (deviation in logits)."""

    duplicate_share: float = Field(default=0.01, ge=0, le=1)
    """Rows that are delivered twice, with the same event_id."""
    late_share: float = Field(default=0.01, ge=0, le=1)
    """Rows that stand hours too late in their file."""
    broken_share: float = Field(default=0.002, ge=0, le=1)
    """Additional rows that cannot be taken; they come on top of the clean events."""

    oracle_users: int = Field(default=5_000, ge=0)
    """Users on whom the best reachable hit rate is computed, some of each part; 0 skips it."""

    @model_validator(mode="after")
    def _fits(self) -> "ShopConfig":
        if self.p_follow + self.p_same > 1:
            raise ValueError(
                f"p_follow + p_same is {self.p_follow + self.p_same}; keep the sum at 1 or below"
            )
        if self.num_categories > self.num_items:
            raise ValueError(
                f"{self.num_categories} categories need at least as many items, "
                f"not {self.num_items}; raise num_items"
            )
        if self.num_parts > self.num_users:
            raise ValueError(
                f"{self.num_parts} parts need at least as many users, not {self.num_users}; "
                "lower num_parts"
            )
        if self.mean_events_per_user < self.mean_events_per_session:
            raise ValueError(
                f"mean_events_per_user is {self.mean_events_per_user}, but everyone has a session "
                f"of {self.mean_events_per_session} on average; lower mean_events_per_session"
            )
        return self

    @property
    def start_us(self) -> int:
        """When the shop opens, in microseconds since 1970."""
        midnight = datetime(self.start.year, self.start.month, self.start.day, tzinfo=UTC)
        return int(midnight.timestamp()) * 1_000_000


@dataclass(frozen=True)
class Catalogue:
    """The items, I rows ordered by category and then by `created_us`; an item is its row."""

    item_ids: Ints
    category: Ints
    category_starts: Ints
    """First row of each category, and I at the end: shape `[C + 1]`."""
    brand: Ints
    price: Floats
    price_level: Floats
    """How dear an item is within its category, in standard deviations."""
    popularity: Floats
    created_us: Ints


@dataclass(frozen=True)
class Shop:
    """The law: everything that the choice of the next item depends on, beside the visitor."""

    config: ShopConfig
    seed: int
    catalogue: Catalogue
    creation_keys: Ints
    """`category * horizon + time since the start`: sorted, so that a search counts what exists."""
    popularity_SI: Floats
    """Weight of each item for each segment; sums to 1 within a category."""
    popularity_sums: Floats
    """Running sums of the weights, segment after segment, from 0: shape `[S * I + 1]`."""
    by_popularity_SI: Rows
    """The items of each category, the most popular for the segment first."""
    successors_IF: Rows
    follow_SF: Floats
    """Probability of each successor's place, by segment."""
    follow_sums_SF: Floats
    categories_XC: Floats
    """P(category | context); the row is `context_row(segment, block, device)` of the first week,
    and `NUM_CONTEXTS` further for each week since where taste drifts."""
    category_sums_XC: Floats
    follow_by_stage: Floats
    same_by_stage: Floats
    advance_by_stage: Floats
    """Chance that a view becomes a cart, a cart a purchase, by stage and segment: `[3, S]`."""

    @property
    def num_items(self) -> int:
        return len(self.catalogue.item_ids)

    @property
    def num_categories(self) -> int:
        return len(self.catalogue.category_starts) - 1

    @property
    def largest_category(self) -> int:
        """Items of the category that has most."""
        return int(np.diff(self.catalogue.category_starts).max())

    def first_unborn(self, category: Ints, time_us: Ints) -> Ints:
        """The row after the last item of the category that exists at that time."""
        since = np.clip(time_us - self.config.start_us, 0, _horizon_us(self.config) - 1)
        keys = category * _horizon_us(self.config) + since
        first = self.catalogue.category_starts[category]
        return search_from(self.creation_keys, first, keys, self.largest_category)


def context_row(segment: Ints, block: Ints, device: Ints) -> Ints:
    """Row of `categories_XC`; all arguments are codes of equal shape."""
    return (segment * NUM_BLOCKS + block) * len(DEVICES) + device


def num_weeks_of(config: ShopConfig) -> int:
    """Weeks that have a taste of their own."""
    return 1 if config.taste_drift == 0 else -(-_horizon_us(config) // WEEK_US)


def build_shop(config: ShopConfig, seed: int) -> Shop:
    """The shop of this configuration and seed; the same arguments give the same shop everywhere."""
    rng = np.random.default_rng([seed, 0])
    catalogue = _build_catalogue(config, rng)
    popularity_SI = _popularity_by_segment(catalogue)
    successors_IF = _draw_successors(catalogue, config, rng)
    categories_XC = _draw_category_tables(config, rng)
    weights = _GROUP_DECAY ** np.arange(_GROUP_SIZE)
    follow_SF = np.kron(_GROUP_WEIGHTS, weights / weights.sum())
    horizon = _horizon_us(config)
    return Shop(
        config=config,
        seed=seed,
        catalogue=catalogue,
        creation_keys=catalogue.category * horizon
        + np.maximum(catalogue.created_us - config.start_us, 0),
        popularity_SI=popularity_SI,
        popularity_sums=np.concatenate([[0.0], np.cumsum(popularity_SI)]),
        by_popularity_SI=_order_by_popularity(catalogue, popularity_SI),
        successors_IF=successors_IF,
        follow_SF=follow_SF,
        follow_sums_SF=running_sums(follow_SF),
        categories_XC=categories_XC,
        category_sums_XC=running_sums(categories_XC),
        follow_by_stage=config.p_follow + (1 - config.p_follow) * np.array([0.0, 0.2, 0.5]),
        same_by_stage=config.p_same * np.array([1.0, 0.7, 0.2]),
        advance_by_stage=np.array([[0.14, 0.18, 0.26], [0.35, 0.45, 0.55], [0.0, 0.0, 0.0]]),
    )


def items_table(shop: Shop) -> pa.Table:
    """The catalogue as the lake's `items` table."""
    items = shop.catalogue
    categories = pa.array(category_names(shop.num_categories))
    brands = pa.array([f"Brand {number + 1}" for number in range(int(items.brand.max()) + 1)])
    category, brand = categories.take(pa.array(items.category)), brands.take(pa.array(items.brand))
    number = pa.array(items.item_ids - FIRST_ITEM_ID).cast(pa.string())
    columns = [
        pa.array(items.item_ids),
        pc.binary_join_element_wise(brand, category, number, " "),
        category,
        brand,
        pa.array(items.price),
        pa.array(np.ones(len(items.item_ids), bool)),
        pa.array(items.created_us).cast(TIMESTAMP),
    ]
    return pa.Table.from_arrays(columns, schema=items_schema("int64"))


def category_names(num_categories: int) -> list[str]:
    """Readable names, numbered once the words run out."""
    rounds = [index // len(_NOUNS) for index in range(num_categories)]
    words = [_NOUNS[index % len(_NOUNS)] for index in range(num_categories)]
    return [
        word if not round_ else f"{word}-{round_ + 1}"
        for word, round_ in zip(words, rounds, strict=True)
    ]


def _horizon_us(config: ShopConfig) -> int:
    # Sessions that were pushed back by their predecessor may end a little after the last day.
    return (config.days + 30) * DAY_US


def _build_catalogue(config: ShopConfig, rng: np.random.Generator) -> Catalogue:
    num_items, num_categories = config.num_items, config.num_categories
    share = rng.dirichlet(np.full(num_categories, 3.0))
    # The first items are the leaders of their categories: always there, never an empty category.
    category = np.concatenate(
        [
            np.arange(num_categories),
            rng.choice(num_categories, num_items - num_categories, p=share),
        ]
    )
    rank = _rank_within(category, num_categories)
    created_us = config.start_us - rng.integers(1, 365, num_items) * DAY_US
    is_new = (rng.random(num_items) < config.new_item_share) & (rank > 0)
    opening = rng.integers(0, max(1, int(config.days * 0.9)) * DAY_US, num_items)
    created_us = np.where(is_new, config.start_us + opening, created_us)

    level = rng.standard_normal(num_items)
    base = np.exp(rng.normal(3.3, 0.8, num_categories))
    price = np.round(base[category] * np.exp(0.4 * level)) + 0.99

    order = np.lexsort((created_us, category))
    return Catalogue(
        item_ids=FIRST_ITEM_ID + rng.permutation(num_items).astype(np.int64),
        category=category[order],
        category_starts=np.searchsorted(category[order], np.arange(num_categories + 1)),
        brand=rng.integers(0, max(2, num_items // 50), num_items),
        price=price[order],
        price_level=level[order],
        popularity=np.power(1.0 + rank[order], -config.popularity_exponent),
        created_us=created_us[order],
    )


def _rank_within(category: Ints, num_categories: int) -> Ints:
    order = np.argsort(category, kind="stable")
    starts = np.searchsorted(category[order], np.arange(num_categories))
    rank = np.empty(len(category), np.int64)
    rank[order] = np.arange(len(category)) - starts[category[order]]
    return rank


def _popularity_by_segment(items: Catalogue) -> Floats:
    weights = items.popularity * np.exp(_PRICE_TASTE[:, None] * items.price_level)
    totals = np.add.reduceat(weights, items.category_starts[:-1], axis=1)
    return weights / totals[:, items.category]


def _order_by_popularity(items: Catalogue, popularity_SI: Floats) -> Rows:
    order = np.empty(popularity_SI.shape, np.int32)
    for segment, popularity in enumerate(popularity_SI):
        order[segment] = np.lexsort((-popularity, items.category))
    return order


def _draw_successors(items: Catalogue, config: ShopConfig, rng: np.random.Generator) -> Rows:
    num_categories = config.num_categories
    complements = rng.integers(0, num_categories, (num_categories, 2))
    groups = np.column_stack([np.arange(num_categories), complements])
    # Less top-heavy than the shop's traffic, or successors would just be bestsellers.
    sums = np.concatenate([[0.0], np.cumsum(np.sqrt(items.popularity))])
    largest = int(np.diff(items.category_starts).max())
    successors_IF = np.empty((config.num_items, groups.shape[1] * _GROUP_SIZE), np.int32)
    for start in range(0, config.num_items, _ITEMS_AT_ONCE):
        rows = np.arange(start, min(start + _ITEMS_AT_ONCE, config.num_items))
        wanted = np.repeat(groups[items.category[rows]], _GROUP_SIZE, axis=1)
        first, last = items.category_starts[wanted], items.category_starts[wanted + 1]
        goal = sums[first] + rng.random(wanted.shape) * (sums[last] - sums[first])
        drawn = np.clip(search_from(sums, first, goal, largest) - 1, first, last - 1)
        itself = drawn == rows[:, None]
        neighbour = np.where(drawn + 1 < last, drawn + 1, first)
        successors_IF[rows] = np.where(itself, neighbour, drawn)
    return successors_IF


def _draw_category_tables(config: ShopConfig, rng: np.random.Generator) -> Floats:
    shape = (len(SEGMENTS), NUM_BLOCKS, len(DEVICES), config.num_categories)
    logits = 0.5 * rng.standard_normal((1, 1, 1, shape[3]))
    for axis in range(3):
        size = [1, 1, 1, shape[3]]
        size[axis] = shape[axis]
        logits = logits + config.context_strength * rng.standard_normal(size)
    drifted = logits + _draw_drift(config, rng)[:, :, None, None]
    return normalise(np.exp(drifted).reshape(-1, shape[3]))


def _draw_drift(config: ShopConfig, rng: np.random.Generator) -> Floats:
    """A walk from week to week, in logits: `[weeks, S, C]`, 0 in the first week; one week without
    drift.
    """
    num_weeks = num_weeks_of(config)
    steps = rng.standard_normal((num_weeks - 1, len(SEGMENTS), config.num_categories))
    first = np.zeros((1, len(SEGMENTS), config.num_categories))
    return np.asarray(config.taste_drift * np.cumsum(np.concatenate([first, steps]), axis=0))
