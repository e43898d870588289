"""One file describes one data set's whole road; each job reads its own section.

Paths may use environment variables. `NEXTITEM_HOME` (default `~/nextitem`) is where everything is
written, `NEXTITEM_DATA` (default `../shared/data` where that folder exists) is where raw data sets
are found.
"""

import os
import re
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)

from data_lake.sequences import SequencesConfig
from data_lake.sources import IngestConfig
from data_lake.synthetic import ShopConfig
from ray_jobs.errors import ConfigError
from ray_jobs.tuning.space import Parameter, Space
from recsys.attributes import AttributesConfig
from recsys.context import ContextConfig
from recsys.encoders import Variant
from recsys.recipe import read_recipe
from recsys.splits import SplitConfig
from recsys.targets import FIELD, TargetsConfig
from recsys.trainer import TrainerConfig

CONFIGS = Path(__file__).parent / "configs"
_SECRET = re.compile("key|secret|token|password|credential|sas", re.IGNORECASE)


class Section(BaseModel):
    """Base of every section: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class StorageConfig(Section):
    """Where everything is written."""

    root: str
    """A local path or a URI; relative paths count from the working directory."""
    lake: str | None = None
    """Where the tables lie if not in `<root>/lake`, e.g. s3://bucket/lake: they may be in an object
    store while runs, registry and history stay in folders."""
    checkpoints: str | None = None
    """Where checkpoints of trainings go if not into the run's folder, e.g. s3://bucket/checkpoints:
    then workers need not share a folder with the driver."""
    options: dict[str, str] = Field(default_factory=dict)
    """Credentials and endpoints as deltalake takes them; reading raw files uses them too. For S3
    itself `AWS_REGION` and the keys, where the environment does not give them. For another store
    that speaks S3 also `AWS_ENDPOINT_URL`, and `AWS_ALLOW_HTTP = "true"` if that is plain http.
    Commits are safe by conditional puts, which S3, MinIO, Ceph and R2 know, and deltalake asks for
    by itself (`aws_conditional_put = "etag"`). `timeout` and `retry_timeout` ("30s" each) bound how
    long deltalake waits for a store that does not answer. A value may be the name of an environment
    variable, `"$SHOP_S3_KEY"`; secrets are not shown when the configuration is printed or kept."""

    @field_validator("options")
    @classmethod
    def _from_environment(cls, options: dict[str, str]) -> dict[str, str]:
        names = [value[1:] for value in options.values() if value.startswith("$")]
        unset = [name for name in names if name not in os.environ]
        if unset:
            raise ValueError(f"the environment variable {', '.join(unset)} is not set")
        return {
            key: os.environ[value[1:]] if value.startswith("$") else value
            for key, value in options.items()
        }

    @field_serializer("options", when_used="json")
    def _without_secrets(self, options: dict[str, str]) -> dict[str, str]:
        return {key: "***" if _SECRET.search(key) else value for key, value in options.items()}

    @property
    def lake_uri(self) -> str:
        return expand(self.lake) if self.lake else f"{expand(self.root)}/lake"

    @property
    def exposures_uri(self) -> str:
        """Where the endpoint logs the lists that it gave."""
        return f"{expand(self.root)}/exposures"

    @property
    def landing_uri(self) -> str:
        """Where serving ships its events to."""
        return f"{expand(self.root)}/landing"

    def checkpoints_uri(self, run: str) -> str:
        """Where the checkpoints of a run lie."""
        return f"{expand(self.checkpoints)}/{run}" if self.checkpoints else f"{self.runs_uri}/{run}"

    @property
    def runs_uri(self) -> str:
        return f"{expand(self.root)}/runs"

    @property
    def registry_uri(self) -> str:
        return f"{expand(self.root)}/registry"


class StartConfig(Section):
    """A published version that training goes on from, instead of from random weights."""

    artifact: str
    """"serving" for the version that serves, another version of the registry, or the path of an
    artifact's folder. Recipe sizes, context and attributes must be what it was trained with."""
    new_events_only: bool = True
    """Whether only events since the end of its training are targets; older ones are still read as
    history. A lower `optimiser.learning_rate` and few epochs are enough then."""


class TrainConfig(Section):
    """A recipe, what it reads, and where it runs."""

    recipe: str = "bert4rec"
    """One of the recipes that come with `recsys`."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Single values of the recipe, e.g. `[train.overrides.model] dim = 128`."""
    context: ContextConfig = ContextConfig()
    targets: TargetsConfig = TargetsConfig()
    attributes: AttributesConfig = AttributesConfig()
    """Columns of the items table that item vectors are made of, beside the ids: what is new can
    then be recommended, and every available item of the table is in the catalogue."""
    start: StartConfig | None = None
    """Left out: random weights and every event."""
    trainer: TrainerConfig = TrainerConfig()
    name: str | None = None
    """Name of the run; a run that was killed goes on when it is started with its name again."""
    num_workers: int = Field(2, ge=1)
    min_workers: int | None = Field(None, ge=1)
    """Training goes on with so many, on what is left of the cluster, where there is no room for
    `num_workers`; what is learned does not depend on how many there are."""
    accelerator_type: str | None = None
    """GPUs of one type only, as Ray names it, e.g. "A100"."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """auto: GPUs where the cluster has any, with at most one worker for each; else CPUs."""
    cpus_per_worker: float = Field(1, gt=0)
    max_failures: int = Field(2, ge=0)
    """Times that a lost worker is replaced and training goes on from its last checkpoint."""

    @field_validator("overrides")
    @classmethod
    def _fit_the_recipe(cls, overrides: dict[str, Any], info: Any) -> dict[str, Any]:
        if "recipe" in info.data:
            read_recipe(info.data["recipe"], overrides)
        return overrides

    @model_validator(mode="after")
    def _starts_with_fewer_than_it_asks_for(self) -> Self:
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(
                f"min_workers {self.min_workers} is more than num_workers {self.num_workers}; "
                "lower it"
            )
        return self

    @model_validator(mode="after")
    def _knows_targets(self) -> Self:
        if self.targets.are_needed and FIELD not in self.context.categorical:
            raise ValueError(
                f"targets tell events apart by {FIELD!r}, which context.categorical does not "
                "name; add it there"
            )
        return self

    @model_validator(mode="after")
    def _hides_ids_for_attributes(self) -> Self:
        if "id_dropout" in self.overrides.get("model", {}) and not self.attributes.fields:
            raise ValueError("overrides.model.id_dropout does nothing without attributes")
        return self


class EvaluateConfig(Section):
    """What is ranked, and against which baselines."""

    run: str | None = None
    """Name of a finished run; the newest one by default."""
    filter_seen: bool = True
    """Whether items of the user's history are left out of the ranking, here and in the validations
    of training. False belongs to `train.targets` that come after a view of the same item."""
    max_users: int = Field(20_000, ge=1)
    """At most so many users, a seeded sample, are ranked."""
    against: str | None = None
    """Name of another evaluated run that ranked the same targets: the two are compared user by
    user."""
    baselines: tuple[str, ...] = (
        "popularity",
        "recent-popularity",
        "covisitation",
        "item-knn",
        "als",
        "ease",
    )
    recent_days: float = Field(7, gt=0)
    """recent-popularity: days before the full hour of a target that count; a fraction will do."""


class ExportConfig(Section):
    """Which encoders are exported, and how far from the model they may be."""

    run: str | None = None
    """Name of a finished run; the newest one by default."""
    variants: tuple[Variant, ...] = ("fp32", "int8")
    """fp32 and fp16 for ONNX Runtime, fp16 for GPUs; int8 for ONNX Runtime on CPUs; bf16, which has
    no file, for torch on CPUs that have it."""
    least_overlap: float = Field(0.999, ge=0, le=1)
    """fp32: share of the model's top ten that must be the same."""
    max_ndcg_loss: float = Field(0.002, ge=0)
    """The others: what NDCG@10 may fall by, even at the end of its 95 % interval."""
    max_users: int = Field(5_000, ge=1)
    """Validation users, a seeded sample, on whom the loss is measured."""


class PublishConfig(Section):
    """What must hold before a version serves."""

    run: str | None = None
    """Name of an evaluated run; the newest one by default."""
    must_beat_baselines: bool = True
    """Refuses a model whose NDCG@10 is not above that of every baseline."""
    history_events: int = Field(50, ge=1)
    """Most recent events of each user that are handed to serving with the artifact."""


class ServeConfig(Section):
    """Where the endpoint listens and what it may cost."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    http: Literal["haproxy", "proxy"] = "haproxy"
    """What brings requests to the endpoint: Ray's HAProxy, or its proxy in Python, several times
    slower. It counts where a job starts a Ray of its own, as the demo does; a Ray that runs already
    was started with one or the other, see `cluster/serve.env`."""
    deadline_ms: int = Field(70, ge=1)
    """A request that the model has not answered by then is answered by the next rung."""
    redis_url: str | None = None
    """Of the Redis that holds histories; "$NAME" of an environment variable keeps a password out of
    files and dashboards, and must then be set where the endpoint runs."""
    feast_repo: str | None = None
    """Folder of a Feast repository, e.g. cluster/feast."""
    history: Literal["sqlite", "redis", "feast"] = "sqlite"
    """Where histories are: in a file of one machine, or in a store that several share."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Any other field of `serve_app.settings`, such as ingress_replicas, max_rankers, shared_cache;
    what this section says by itself is not among them."""

    @field_serializer("redis_url", when_used="json")
    def _without_password(self, url: str | None) -> str | None:
        return None if url is None else re.sub("//.*@", "//***@", url)

    @field_validator("history")
    @classmethod
    def _has_its_address(cls, history: str, info: ValidationInfo) -> str:
        needed = {"redis": "redis_url", "feast": "feast_repo"}.get(history)
        if needed is not None and info.data.get(needed, "") is None:
            raise ValueError(f"{history} needs serve.{needed}")
        return history


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


class ExperimentConfig(Section):
    """Which versions are compared, and what counts as a success of a list."""

    name: str | None = Field(None, pattern=r"^\w[\w.-]*$")
    """Folder of the report below `<root>/experiments`; the names of both versions by default."""
    control: str | None = None
    """A version of the registry; by default the champion of the last state that had a canary."""
    treatment: str | None = None
    """By default the canary beside it."""
    treatment_share: float | None = Field(None, gt=0, lt=1)
    """Of the visitors of both; by default what the registry gave it."""
    start: AwareDatetime | None = None
    """Lists from then on count; by default from the first one of the treatment on. A later change
    of the shares moves visitors between the arms: begin after it."""
    end: AwareDatetime | None = None
    """Fixed before the first look, or the intervals say too much; now by default."""
    window_hours: float = Field(24, gt=0)
    """For so long after a list an event on one of its items counts for it."""
    primary: Literal["click_through", "conversion", "bought_lists"] = "click_through"
    """The metric that decides; the others explain."""
    clicks: tuple[str, ...] = Field(("click", "view"), min_length=1)
    """Types of events that are a click-through."""
    purchases: tuple[str, ...] = Field(("purchase",), min_length=1)
    before_days: float = Field(14, ge=0)
    """Days before the start whose events tell how active a user was, which takes some noise out of
    every metric; 0 leaves it in."""
    wanted_uplift: float = Field(0.02, gt=0)
    """Relative; the report says how many days it takes to find it."""

    @model_validator(mode="after")
    def _has_a_period(self) -> Self:
        if self.start is not None and self.end is not None and self.start >= self.end:
            raise ValueError(f"start {self.start} is not before end {self.end}")
        return self

    @model_validator(mode="after")
    def _compares_two(self) -> Self:
        if (self.control is None) != (self.treatment is None):
            raise ValueError("give control and treatment, or neither of them")
        if self.control is not None and self.control == self.treatment:
            raise ValueError(f"{self.control} cannot be compared with itself")
        return self


class RecommendConfig(Section):
    """Which lists are made for whom, and on what."""

    version: str | None = None
    """Of the registry; the champion by default."""
    top_k: int = Field(10, ge=1, le=1000)
    """Items of a list."""
    users: Literal["all", "sequences"] = "all"
    """all: whoever is in events, users or sequences; who has no sequence gets what is popular."""
    filter_seen: bool = True
    """Whether the items of the history are left out, as in serving."""
    batch_size: int = Field(512, ge=1, le=512)
    """Users that are ranked at once."""
    variant: Literal["fp32", "bf16", "int8"] = "fp32"
    """Numbers that the encoder counts in. fp32 and bf16 give the lists of an endpoint that serves
    the same; int8, for CPUs, rounds by what is encoded together, so that items which score alike
    may change places. bf16 and int8 must have passed `ray_jobs.export` before the publication."""
    num_actors: int = Field(2, ge=1)
    """Models in memory at most; as many as there is room for work."""
    cpus_per_actor: float = Field(1, gt=0)
    gpus_per_actor: float = Field(0, ge=0)
    """A part of one lets several share it."""

    @model_validator(mode="after")
    def _int8_is_for_cpus(self) -> Self:
        if self.variant == "int8" and self.gpus_per_actor:
            raise ValueError("variant int8 is for CPUs; set gpus_per_actor to 0, or take bf16")
        return self


class TuneConfig(Section):
    """The search for a better recipe: what may be tried, who proposes it, and what it may cost."""

    name: str | None = None
    """Name of the search; one that was killed goes on when it is started with its name again."""
    space: dict[str, Parameter] = Field(default_factory=dict)
    """Parameters by the path of a value in the recipe, see `ray_jobs/tuning/space.py`."""
    searcher: Literal["tpe", "random", "grid", "llm"] = "tpe"
    """llm: a language model that reads the trials so far, see `ray_jobs/tuning/llm.py`; tpe
    proposes where its answer is bad or late."""
    max_trials: int = Field(30, ge=1)
    """Trials, those that fail included."""
    max_minutes: float | None = Field(None, gt=0)
    """Time of trials, over all starts of the search; what comes after the trials is not counted."""
    max_epochs: int | None = Field(None, ge=1)
    """Epochs of a trial that nobody stops; None: train.trainer.max_epochs. The learning rate falls
    over so many, in a trial as in the final trainings."""
    grace_epochs: int = Field(10, ge=1)
    """No trial is stopped before: long enough for those that start slowly to have turned."""
    reduction: float = Field(3.0, gt=1)
    """Of the trials that come to a rung one in so many goes on to the next."""
    held_out_share: float = Field(0.5, gt=0, lt=1)
    """Share of the validation users that no trial sees; winner and default are compared on them."""
    confirm_seeds: int = Field(3, ge=1)
    """Trainings to the end of winner and default each, with seeds of their own."""
    cpus_per_trial: float = Field(1, gt=0)
    """May be less than 1: so many more trials run at once."""
    gpus_per_trial: float = Field(0, ge=0)
    """May be less than 1: trials then share a GPU and its memory."""
    max_concurrent: int | None = Field(None, ge=1)
    """Trials at once; None: as many as fit."""
    workers_per_trial: int = Field(1, ge=1)
    """More than 1: a group of Ray Train's workers trains a trial and shares its CPUs and GPUs."""
    launcher: Literal["auto", "process", "ray-train"] = "auto"
    """process: a trial trains in its own process; auto: so, unless it has several workers."""
    grid_points: int = Field(3, ge=2)
    """grid: values of each range."""
    random_trials: int = Field(10, ge=1)
    """tpe: random draws before it models anything."""
    llm_timeout_s: float = Field(30.0, gt=0)
    """llm: for a whole answer; no trial starts while it is waited for."""

    @field_validator("space")
    @classmethod
    def _is_of_the_recipe(cls, space: dict[str, Parameter]) -> dict[str, Parameter]:
        Space.of(space)
        return space

    @model_validator(mode="after")
    def _has_a_group_for_several_workers(self) -> Self:
        if self.launcher == "process" and self.workers_per_trial > 1:
            raise ValueError(
                f"launcher 'process' trains with one worker, and workers_per_trial is "
                f"{self.workers_per_trial}; leave one of them out"
            )
        return self

    @property
    def trains_in_trial(self) -> bool:
        """Whether a trial needs no group of workers."""
        return self.launcher == "process" or (
            self.launcher == "auto" and self.workers_per_trial == 1
        )


class CanaryConfig(Section):
    """When a canary is promoted or rolled back by itself; see `ray_jobs.canary`."""

    start: AwareDatetime | None = None
    """Lists from then on count; some minutes after the first look at a canary by default."""
    settle_minutes: float = Field(10, ge=0)
    """So long after the first look every process has loaded the canary."""
    max_days: float = Field(6, gt=0)
    """After so many the decision is taken by `at_end`; fewer than lie between two retrainings, or a
    canary meets the next one."""
    at_end: Literal["better", "promote", "roll back"] = "better"
    """better: promoted if the primary metric is over the bar, however little, else rolled back."""
    primary: Literal["click_through", "conversion"] = "click_through"
    """The metric that promotes; both roll back."""
    least_uplift: float = Field(0.0, gt=-1)
    """The bar, relative to the champion: a canary is promoted when the interval of its primary
    metric lies above, and rolled back when it lies below; e.g. -0.01 allows a loss of one
    hundredth."""
    wanted_uplift: float = Field(0.2, gt=0)
    """Relative; uplifts of about this size are found soonest. Too much of it costs little, too
    little of it much: below what the traffic can show in `max_days` nothing is decided earlier."""
    error_rate: float = Field(0.05, gt=0, lt=1)
    """How often at most any of the intervals misses the truth at any look; no wrong decision comes
    without that before `max_days`."""
    max_degraded: float = Field(0.02, gt=0, lt=1)
    """Share of lists from a lower rung above the champion's that a canary is rolled back for."""
    window_hours: float = Field(6, gt=0)
    """For so long after a list an event on one of its items counts for it; until then nothing is
    known of the list but who gave it."""


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


class PipelineConfig(Section):
    """The whole road; a job looks at `seed`, `storage` and its own section."""

    name: str
    """Name of the data set; also the name of the model in the registry."""
    seed: int = 0
    storage: StorageConfig
    generate: ShopConfig | None = None
    ingest: IngestConfig
    sequences: SequencesConfig = SequencesConfig()
    split: SplitConfig = SplitConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    export: ExportConfig = ExportConfig()
    publish: PublishConfig = PublishConfig()
    serve: ServeConfig = ServeConfig()
    maintain: MaintainConfig = MaintainConfig()
    retrain: RetrainConfig = RetrainConfig()
    experiment: ExperimentConfig = ExperimentConfig()
    recommend: RecommendConfig = RecommendConfig()
    monitoring: MonitoringConfig = MonitoringConfig()
    monitor: MonitorConfig = MonitorConfig()
    tune: TuneConfig = TuneConfig()
    canary: CanaryConfig = CanaryConfig()
    withdraw: WithdrawConfig = WithdrawConfig()


def expand(path: str) -> str:
    """A path with its environment variables and `~` replaced; absolute unless it is a URI.

    Raises: ConfigError when a variable is not set.
    """
    os.environ.setdefault("NEXTITEM_HOME", str(Path.home() / "nextitem"))
    shared = Path("../shared/data")
    if shared.is_dir():
        os.environ.setdefault("NEXTITEM_DATA", str(shared.resolve()))
    expanded = os.path.expandvars(path)
    unset = re.search(r"\$\{?(\w+)", expanded)
    if unset:
        raise ConfigError(
            f"{path!r} needs the environment variable {unset[1]}, which is not set; "
            "set it to a folder."
        )
    if "://" in expanded:
        return expanded.rstrip("/")
    return str(Path(expanded).expanduser().resolve())
