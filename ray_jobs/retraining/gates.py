"""What a retraining must pass, each gate a figure beside its limit. Pure: no lake, no model.

Data gates look at `data_lake.weeks` before anything is trained; of several new weeks the worst one
counts. A gate that has nothing to compare with passes, and says so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from data_lake.weeks import WeekFigures
from ray_jobs.sections.upkeep import RetrainConfig

_LEAST_AGREEMENT = 0.02
"""Bits: where items foretell each other less than that, no shuffling can be seen."""


@dataclass(frozen=True)
class Verdict:
    """A gate, open or closed."""

    gate: str
    passed: bool
    figure: float | None
    """None: there was nothing to compare with."""
    limit: float
    text: str
    """What was found, in a sentence."""

    def facts(self) -> dict[str, Any]:
        """The same as JSON."""
        return asdict(self)


def check_data(
    figures: WeekFigures, num_new: int, num_quarantined: int, limits: RetrainConfig
) -> list[Verdict]:
    """All data gates.

    Args:
        num_new: events that came into the lake since the serving version was published.
        num_quarantined: rows that went to quarantine since then.
    """
    return [
        check_quarantine(num_new, num_quarantined, limits.max_quarantine_share),
        *check_volume(figures, limits.min_volume_ratio, limits.max_volume_ratio),
        check_unknown_items(figures.unknown_shares, limits.max_unknown_share),
        check_popularity(figures.divergences, limits.max_popularity_divergence),
        check_agreement(
            figures.agreements, figures.reference_agreement, limits.min_agreement_ratio
        ),
    ]


def check_quarantine(num_new: int, num_quarantined: int, limit: float) -> Verdict:
    """Share of the new rows that could not be taken."""
    share = num_quarantined / max(1, num_new + num_quarantined)
    text = f"{num_quarantined:,} of {num_new + num_quarantined:,} new rows went to quarantine."
    return Verdict("quarantine", share <= limit, share, limit, text)


def check_volume(figures: WeekFigures, least: float, most: float) -> list[Verdict]:
    """Events of each new week relative to the median of the weeks before, from both sides."""
    new, before = figures.rows_W[: figures.num_new], _full(figures.rows_W[figures.num_new :])
    usual = float(np.median(before)) if before else 0.0
    if usual == 0:
        text = "There is no week before to compare the number of events with."
        return [
            Verdict("volume-low", True, None, least, text),
            Verdict("volume-high", True, None, most, text),
        ]
    low, high = min(new) / usual, max(new) / usual
    counts = ", ".join(f"{count:,}" for count in new)
    of_weeks = "week" if len(new) == 1 else "weeks"
    text = f"{counts} events in the new {of_weeks}, a median of {usual:,.0f} in those before."
    return [
        Verdict("volume-low", low >= least, low, least, text),
        Verdict("volume-high", high <= most, high, most, text),
    ]


def check_unknown_items(shares: Sequence[float], limit: float) -> Verdict:
    """Share of the events on items that nobody has heard of."""
    text = f"{max(shares):.1%} of the events are on items that neither the shop nor the lake knows."
    return Verdict("unknown-items", max(shares) <= limit, max(shares), limit, text)


def check_popularity(divergences: Sequence[float], limit: float) -> Verdict:
    """How far popularity moved from the weeks before."""
    found = max(divergences)
    text = f"The popularity of items is {found:.3f} bits from that of the weeks before."
    return Verdict("popularity", found <= limit, found, limit, text)


def check_agreement(agreements: Sequence[float], reference: float | None, least: float) -> Verdict:
    """Whether items follow each other as they used to: ids that were shuffled do not, however right
    their counts look.
    """
    if reference is None or reference < _LEAST_AGREEMENT:
        found = "there are not two weeks before" if reference is None else f"only {reference:.3f}"
        text = f"The items of the weeks before do not foretell each other enough ({found})."
        return Verdict("agreement", True, None, least, text)
    ratio = min(agreements) / reference
    text = (
        f"An item foretells the next one by {min(agreements):.3f} bits with the pairs of the weeks "
        f"before, against {reference:.3f} a week ago."
    )
    return Verdict("agreement", ratio >= least, ratio, least, text)


def check_baselines(differences: Mapping[str, float]) -> Verdict:
    """The challenger against each baseline, difference of NDCG@10."""
    if not differences:
        return Verdict("baselines", True, None, 0.0, "No baseline was asked for.")
    nearest = min(differences, key=lambda name: differences[name])
    found = differences[nearest]
    text = f"NDCG@10 is {found:+.4f} from {nearest}, the strongest baseline."
    return Verdict("baselines", found > 0, found, 0.0, text)


def check_gain(comparison: Mapping[str, Any], limit: float) -> Verdict:
    """The challenger against the champion: the lower end of the paired 95 % interval.

    Relative to the champion; where that has an NDCG@10 of 0 in a resample, the difference itself.
    """
    name, written = ("difference", "+.4f") if comparison["lift"] is None else ("lift", "+.1%")
    mean, low, high = (comparison[f"{name}{end}"] for end in ("", "_low", "_high"))
    text = f"NDCG@10 against the champion: {mean:{written}} [{low:{written}}, {high:{written}}]."
    return Verdict("gain", low > limit, low, limit, text)


def check_export(variant: str, figure: float, limit: float, refusal: str | None) -> Verdict:
    """How far an exported encoder is from the model; see `ray_jobs.export`."""
    text = f"{refusal or f'{variant} is close to the model'}."
    return Verdict(f"export-{variant}", refusal is None, figure, limit, text)


def check_latency(ours_s: float, theirs_s: float, limit: float) -> Verdict:
    """Time of one request in the challenger's ranker relative to the champion's, both here."""
    ratio = ours_s / theirs_s
    text = f"A request takes {1000 * ours_s:.2f} ms, the champion's {1000 * theirs_s:.2f} ms."
    return Verdict("latency", ratio <= limit, ratio, limit, text)


def _full(rows_W: Sequence[int]) -> list[int]:
    """The weeks that the lake reaches back to; before its first event there is nothing to count."""
    last = max((week for week, rows in enumerate(rows_W) if rows), default=-1)
    return list(rows_W[: last + 1])
