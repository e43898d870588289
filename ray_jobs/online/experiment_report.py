"""The report of an experiment: what its report.json says, to be read by a person."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray_jobs.document import Block, Heading, Picture, Table, Text, write_document
from ray_jobs.plots import draw_against, to_svg

Facts = Mapping[str, Any]

_READING = (
    "Intervals are of 95 % and hold for users, the unit that a version is given to, at an end that "
    "was fixed beforehand: who looks every day and stops at the first interval without 0 finds "
    "uplifts that are none. The primary metric decides; of several others one is beyond noise by "
    "chance now and then."
)
_ALARM = (
    "The arms have not their shares of the users. Something keeps users of one version out of the "
    "log or out of the lake, and it need not be the same users; find it before reading any uplift."
)
_SWITCHED = (
    "Some users saw both versions and are left out: a share was changed in the period. The sample "
    "ratio is held against one share, so begin the period after the change."
)


def write_experiment(folder: Path, facts: Facts) -> None:
    """Writes `report.html`, `report.md` and `plots/` into the folder of an experiment."""
    blocks: list[Block] = [
        Heading(f"{facts['treatment']} over {facts['control']}", level=1),
        Text(f"{describe(facts)}."),
        *([Text(_ALARM)] if facts["sample_ratio"]["is_alarm"] else []),
        *([Text(_SWITCHED)] if facts["left_out"]["users_of_both"] else []),
        _summary(facts),
        Heading("Uplift"),
        *_picture(facts),
        _uplifts(facts),
        Text(_READING),
        Heading("How much the traffic can tell"),
        Text(
            "Detectable: the relative uplift that would have been found in four of five "
            "experiments with as many users. Days: until an uplift of "
            f"{_percent(facts['wanted_uplift'])} would be, if users keep coming as they came. "
            "Variance: what is left of it after what users did in the "
            f"{facts['before_days']:g} days before was taken out."
        ),
        _power(facts),
    ]
    write_document(folder, "report", blocks)


def describe(facts: Facts) -> str:
    """The result in a sentence, without its full stop."""
    ratio, name = facts["sample_ratio"], facts["primary"]
    if ratio["is_alarm"]:
        return (
            f"no uplift can be read: {facts['treatment']} has {ratio['share']:.2%} of the users "
            f"instead of {ratio['expected_share']:.2%} (p = {ratio['p_value']:.1g})"
        )
    found = facts["metrics"][name]
    noise = "beyond noise" if found["is_significant"] else "within noise"
    return f"{name} {_relative(found)} of {facts['treatment']} over {facts['control']}, {noise}"


def _summary(facts: Facts) -> Table:
    users, lists, degraded = facts["users"], facts["lists"], facts["degraded_lists"]
    left_out, ratio = facts["left_out"], facts["sample_ratio"]
    verdict = "ALARM" if ratio["is_alarm"] else "as expected"
    both = [("control", facts["control"]), ("treatment", facts["treatment"])]
    rows = [
        ("Period", f"{facts['start']} to {facts['until']}, {facts['days']:.1f} days"),
        ("Window after a list", f"{facts['window_hours']:g} hours"),
        ("Primary metric", facts["primary"]),
        *(
            (
                f"{arm.capitalize()}: {version}",
                f"{users[arm]:,} users, {lists[arm]:,} lists, of these {degraded[arm]:,} degraded",
            )
            for arm, version in both
        ),
        (
            "Share of treatment",
            f"{ratio['share']:.2%} of {ratio['expected_share']:.2%} expected, "
            f"p = {ratio['p_value']:.2g}: {verdict}",
        ),
        *((name.replace("_", " ").capitalize(), f"{num:,}") for name, num in left_out.items()),
    ]
    return Table(("", ""), rows, is_words=True)


def _picture(facts: Facts) -> list[Block]:
    """Relative uplifts; none where a control may be 0."""
    ends = ("", "_low", "_high")
    drawn = {
        name: {f"difference{end}": 100 * found[f"relative{end}"] for end in ends}
        | {"is_significant": found["is_significant"]}
        for name, found in facts["metrics"].items()
        if found["relative"] is not None
    }
    if not drawn:
        return []
    title = f"{facts['control']}, in % of {facts['control']}"
    figure = draw_against(drawn, facts["treatment"], title)
    return [Picture("uplift", "relative uplift of every metric", to_svg(figure))]


def _uplifts(facts: Facts) -> Table:
    rows = [
        (
            f"{name}: {found['meaning']}",
            f"{found['control']:.4f}",
            f"{found['treatment']:.4f}",
            f"{found['difference']:+.4f} [{found['difference_low']:.4f}, "
            f"{found['difference_high']:.4f}]",
            _relative(found),
            f"{found['p_value']:.2g}",
        )
        for name, found in facts["metrics"].items()
    ]
    return Table(("", "control", "treatment", "difference", "uplift", "p"), rows)


def _power(facts: Facts) -> Table:
    rows = [
        (
            name,
            _percent(found["detectable"]),
            "-" if found["days_needed"] is None else f"{found['days_needed']:,.1f}",
            f"{found['variance_kept']:.1%}",
        )
        for name, found in facts["metrics"].items()
    ]
    return Table(("", "detectable", "days", "variance"), rows)


def _relative(found: Facts) -> str:
    """In percent; the difference where control may be 0."""
    if found["relative"] is None:
        return f"{found['difference']:+.4f}"
    low, high = 100 * found["relative_low"], 100 * found["relative_high"]
    return f"{100 * found['relative']:+.1f} % [{low:.1f}, {high:.1f}]"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
