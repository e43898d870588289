"""Sections of the jobs that keep lake and models in order, and of what they tell Prometheus."""

from datetime import datetime
from typing import Literal, Self

from pydantic import AwareDatetime, Field, model_validator

from ray_jobs.sections.base import Section


class MaintainConfig(Section):
    """What is erased from the lake, merged and deleted; each step can be left out."""

    forget: tuple[str, ...] = ()
    """Ids of users whose rows are erased, as text."""
    compact: bool = True
    """Whether small files are merged."""
    target_file_bytes: int = Field(128 * 2**20, ge=1)
    """Files are merged up to this size; a task holds the rows of one such file."""
    vacuum: bool = True
    """Whether files are deleted that no version within the retention needs."""
    retention_hours: int = Field(168, ge=0)
    """For so long a version can be read after the next one came, and a run may take to commit."""
    unsafe_retention: bool = False
    """Allows a retention below 24 hours."""
    checkpoint: bool = True
    """Whether the log is summed up, and its entries deleted that are beyond its own retention."""
    prove: bool = True
    """Whether all files are searched for the users that were to be forgotten."""

    @model_validator(mode="after")
    def _protects_readers(self) -> Self:
        if self.retention_hours < 24 and not self.unsafe_retention:
            raise ValueError(
                f"retention_hours = {self.retention_hours} would break jobs that read older "
                "versions and runs that have yet to commit their files; use 24 or more, or set "
                "unsafe_retention when nothing else runs"
            )
        return self


class MonitoringConfig(Section):
    """Where jobs leave their figures for Prometheus, beside `<root>/metrics`."""

    pushgateway: str | None = None
    """Address of a Pushgateway, e.g. http://pushgateway:9091."""


class MonitorConfig(Section):
    """Which periods are compared, and how rare an alarm without drift has to be."""

    days: int = Field(7, ge=1)
    """Length of the current period, and of the windows that the reference period is cut into; with
    whole weeks each has the same weekdays."""
    current_until: datetime | None = None
    """End of the current period; behind the newest event by default."""
    reference_windows: int = Field(2, ge=2)
    """How many windows before the version the current period is compared with."""
    reference_until: datetime | None = None
    """End of the reference period. By default where the training of the version that serves ended,
    or where the current period begins, whichever is earlier, at the first run for that version."""
    false_alarm_rate: float = Field(0.01, ge=0.0001, lt=1)
    """How often a run without drift may raise an alarm, over all measures together."""
    num_resamples: int = Field(10_000, ge=100)
    """Copies of both periods, shifted within groups of users, that thresholds are quantiles of;
    more where many measures or rare alarms need them."""
    attribution_minutes: float = Field(60, gt=0)
    """Events that follow a list within this time are answers to it."""
    click_types: tuple[str, ...] = ()
    """Event types that count as a click on a list, such as view; all of them by default."""
    history_days: int = Field(28, ge=1)
    """Events of a user so far back count as the length of a history."""


class RetrainConfig(Section):
    """The weekly loop: what is held back, what the data and the challenger must pass, and how many
    visitors the challenger meets. Training starts from the serving version where `[train.start]`
    is there."""

    name: str | None = None
    """A retraining that was killed goes on under its name; the year and week of `as_of` if left
    out."""
    as_of: AwareDatetime | None = None
    """End of the newest week; the moment of the start if left out."""
    week_days: float = Field(7, gt=0)
    """Length of a week, which is how often the job runs."""
    reference_weeks: int = Field(4, ge=1)
    """Weeks before the new ones, with which these are compared."""
    test_days: float | None = Field(2, gt=0)
    """The last days, whose first event of each user both versions are tested on. None: `[split]`
    as it stands; a temporal cut there does not move by itself."""
    validation_days: float = Field(1, gt=0)
    """Days before these that choose the epoch. What is held back trains the next challenger."""
    skip: tuple[Literal["ingest", "data", "export", "latency", "publish", "canary"], ...] = ()
    """Steps that are left out: another job does them, or nobody."""

    max_quarantine_share: float = Field(0.05, ge=0, le=1)
    """Of the rows that came since the champion was published."""
    min_volume_ratio: float = Field(0.5, ge=0)
    """Events of a week relative to the median week before; a feed that broke off has fewer."""
    max_volume_ratio: float = Field(2.0, gt=0)
    """The same; a feed that was delivered twice under new ids has more."""
    max_unknown_share: float = Field(0.2, ge=0, le=1)
    """Of events on items that neither the items table nor the weeks before know. A shop without an
    items table counts its new items here."""
    max_popularity_divergence: float = Field(0.2, ge=0, le=1)
    """Jensen-Shannon divergence of the popularity of items from that of the weeks before, bits."""
    min_agreement_ratio: float = Field(0.5, ge=0)
    """How well items foretell the next one, relative to the week before; ids that were shuffled
    foretell nothing."""
    min_gain: float = 0.0
    """The lower end of the 95 % interval of the relative gain in NDCG@10 over the champion must be
    above; e.g. -0.01 allows a loss of one hundredth."""
    max_latency_ratio: float = Field(1.3, gt=0)
    """Time of a request relative to the champion's on the same machine."""
    canary_share: float = Field(0.05, gt=0, le=1)
    """Of the visitors; 1 makes the challenger the champion at once."""

    @model_validator(mode="after")
    def _skips_what_builds_on_it(self) -> Self:
        needs = {"export": "latency", "publish": "canary"}
        for step, later in needs.items():
            if step in self.skip and later not in self.skip:
                raise ValueError(f"skip names {step!r}, on which {later!r} builds; add it")
        return self


class WithdrawConfig(Section):
    """Whose rows are taken out of the lake again; what is named together narrows the choice."""

    retrain: str | None = None
    """Name of a retraining that its data gates have refused: what its ingest brought."""
    run: AwareDatetime | None = None
    """When an ingest run began, to the microsecond, as its report (`ingested_at`) and a dry run of
    this job say: what that run brought."""
    files: tuple[str, ...] = ()
    """Paths, names or patterns (`*`) of files that were ingested. Served events, which come from
    the landing folder, are only withdrawn where a pattern names that folder."""
