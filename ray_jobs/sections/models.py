"""Sections of the jobs that make a model: training, search, evaluation, export, publishing."""

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from ray_jobs.sections.base import Section
from ray_jobs.tuning.space import Parameter, Space
from recsys.attributes import AttributesConfig
from recsys.context import ContextConfig
from recsys.encoders import Variant
from recsys.recipe import read_recipe
from recsys.targets import FIELD, TargetsConfig
from recsys.trainer import TrainerConfig


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
    tuned: tuple[str, ...] = ("covisitation",)
    """Those of them whose settings are chosen by NDCG@10 on validation targets, see
    `baseline_search.GRIDS`; the others keep their defaults. A published version falls back on the
    co-visitation that was chosen, so that is tuned even where it is not compared."""
    tuning_users: int = Field(50_000, ge=1)
    """Settings are chosen by what the training events of so many users, a seeded sample, say of the
    validation targets."""
    slices: tuple[str, ...] = ("device", "segment")
    """Categorical fields that the report slices by, whether the run reads them or not; those that
    it reads are there anyway."""
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
