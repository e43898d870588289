"""Who visits a synthetic shop and when: users, their tastes, sessions, the time of each event.

All events of a part are drawn at once; nothing in here depends on items.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_lake.schemas import TIMESTAMP, users_schema
from data_lake.synthetic import (
    DAY_US,
    DEVICES,
    FIRST_USER_ID,
    NUM_BLOCKS,
    NUM_CONTEXTS,
    SEGMENTS,
    WEEK_US,
    ShopConfig,
    context_row,
    num_weeks_of,
)
from data_lake.synthetic_draws import Floats, Ints, choose, normalise, running_sums

NUM_FAVOURITES = 3
SESSION_BREAK_S = 31 * 60

_SECOND_US = 1_000_000
_DAY_S = 86_400
_SEGMENT_SHARES = (0.35, 0.45, 0.20)
_WEEKDAYS = np.array([1.0, 0.95, 0.95, 1.0, 1.15, 1.35, 1.3])
# P(device) by block of the day, then tilted by segment: desktops at work, apps for the loyal.
_DEVICES_BY_BLOCK = np.array(
    [[0.6, 0.1, 0.1, 0.2], [0.45, 0.3, 0.05, 0.2], [0.3, 0.5, 0.05, 0.15], [0.4, 0.15, 0.2, 0.25]]
)
_DEVICES_BY_SEGMENT = np.array([[1.4, 0.8, 0.8, 0.8], [1.0, 1.0, 1.0, 1.0], [0.7, 1.0, 1.4, 1.8]])


@dataclass(frozen=True)
class Visitors:
    """The users of one part: N rows, the latent taste included."""

    user_ids: Ints
    segment: Ints
    favourites: Ints
    """Preferred categories, `[N, 3]`."""
    taste: Floats
    """How much each of them is preferred, `[N, 3]`."""
    signup_us: Ints


@dataclass(frozen=True)
class Moments:
    """When events happen, whatever they are; flat, user after user, in order of time."""

    offsets: Ints
    """First event of each user, and the number of events at the end: shape `[N + 1]`."""
    time_us: Ints
    starts_session: NDArray[np.bool_]
    device: Ints
    context: Ints
    """Row of the shop's category table."""
    session: Ints


def users_table(visitors: Visitors) -> pa.Table:
    """The lake's `users` columns, without the bucket."""
    schema = users_schema("int64")
    columns = [
        pa.array(visitors.user_ids),
        pa.array(SEGMENTS).take(pa.array(visitors.segment)),
        pa.array(visitors.signup_us).cast(TIMESTAMP),
    ]
    return pa.Table.from_arrays(columns, schema=pa.schema(list(schema)[:3]))


def draw_visitors(config: ShopConfig, part: int, rng: np.random.Generator) -> Visitors:
    edges = np.linspace(0, config.num_users, config.num_parts + 1).astype(np.int64)
    users = np.arange(edges[part], edges[part + 1])
    num = len(users)
    signup_day = rng.integers(-config.days, max(1, int(config.days * 0.7)), num)
    return Visitors(
        user_ids=FIRST_USER_ID + users,
        segment=rng.choice(len(SEGMENTS), num, p=_SEGMENT_SHARES),
        favourites=rng.integers(0, config.num_categories, (num, NUM_FAVOURITES)),
        taste=rng.gamma(1.0, size=(num, NUM_FAVOURITES)) + 0.1,
        signup_us=config.start_us + signup_day * DAY_US + rng.integers(0, DAY_US, num),
    )


def draw_moments(config: ShopConfig, visitors: Visitors, rng: np.random.Generator) -> Moments:
    num_users = len(visitors.user_ids)
    spare = max(0.0, config.mean_events_per_user / config.mean_events_per_session - 1)
    # Gamma-Poisson: a few visitors come very often, most come a few times.
    num_sessions = 1 + rng.poisson(spare * rng.gamma(1.5, 1 / 1.5, num_users))
    user = np.repeat(np.arange(num_users), num_sessions)
    num_events = rng.geometric(1 / config.mean_events_per_session, len(user))
    planned = _plan_sessions(config, visitors, user, rng)
    session = np.repeat(np.arange(len(user)), num_events)
    starts_session = np.diff(session, prepend=-1) > 0

    gap = 2 * _SECOND_US + rng.exponential(90 * _SECOND_US, len(session)).astype(np.int64)
    gap = np.where(starts_session, 0, np.minimum(gap, 20 * 60 * _SECOND_US))
    elapsed = np.cumsum(gap)
    begin = np.flatnonzero(starts_session)
    within = elapsed - elapsed[begin][session]
    duration_s = within[np.append(begin[1:], len(session)) - 1] // _SECOND_US + 1
    start_s = _push_apart(planned, duration_s, user, num_sessions)
    start = config.start_us + start_s * _SECOND_US

    time_us = start[session] + within
    segment = visitors.segment[user]
    device = choose(_device_sums(), segment * NUM_BLOCKS + _block(start), rng.random(len(user)))
    return Moments(
        offsets=np.searchsorted(user[session], np.arange(num_users + 1)),
        time_us=time_us,
        starts_session=starts_session,
        device=device[session],
        context=context_row(segment[session], _block(time_us), device[session])
        + NUM_CONTEXTS * _week(config, time_us),
        session=session,
    )


def _plan_sessions(
    config: ShopConfig, visitors: Visitors, user: Ints, rng: np.random.Generator
) -> Ints:
    """A start for each session, in seconds since the opening, sorted within its user."""
    days = np.arange(config.days)
    sums = np.cumsum(_WEEKDAYS[(config.start.weekday() + days) % 7])
    first_day = (visitors.signup_us[user] - config.start_us) // DAY_US + 1
    before = np.concatenate([[0.0], sums])[np.clip(first_day, 0, config.days - 1)]
    day = np.searchsorted(sums, before + rng.random(len(user)) * (sums[-1] - before), side="right")

    hours = np.arange(24)
    habit = np.stack([0.08 + np.exp(-(((hours - peak) / 3.5) ** 2)) for peak in (20, 18, 13)])
    hour = choose(running_sums(normalise(habit)), visitors.segment[user], rng.random(len(user)))
    within = rng.integers(0, 3600, len(user))
    planned = np.minimum(day, config.days - 1) * _DAY_S + hour * 3600 + within
    lane = user * config.days * _DAY_S
    return np.sort(lane + planned) - lane


def _push_apart(planned: Ints, duration: Ints, user: Ints, num_sessions: Ints) -> Ints:
    """Delays sessions that would begin less than 31 minutes after the user's last one ended."""
    spent = np.cumsum(duration + SESSION_BREAK_S) - (duration + SESSION_BREAK_S)
    first = np.cumsum(num_sessions) - num_sessions
    spent = spent - spent[first][user]
    slack = planned - spent
    lane = user * (int(slack.max()) - int(slack.min()) + 1)
    return np.asarray(np.maximum.accumulate(slack + lane) - lane + spent, np.int64)


def _block(time_us: Ints) -> Ints:
    return (time_us % DAY_US) // (DAY_US // NUM_BLOCKS)


def _week(config: ShopConfig, time_us: Ints) -> Ints:
    week = (time_us - config.start_us) // WEEK_US
    return np.asarray(np.clip(week, 0, num_weeks_of(config) - 1), np.int64)


def _device_sums() -> Floats:
    table = _DEVICES_BY_SEGMENT[:, None, :] * _DEVICES_BY_BLOCK[None]
    return running_sums(normalise(table.reshape(-1, len(DEVICES))))
