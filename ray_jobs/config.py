"""One file describes one data set's whole road; each job reads its own section.

Paths may use environment variables. `NEXTITEM_HOME` (default `~/nextitem`) is where everything is
written, `NEXTITEM_DATA` (default `../shared/data` where that folder exists) is where raw data sets
are found.
"""

from pathlib import Path
from typing import Self

from pydantic import model_validator

from data_lake.sequences import SequencesConfig
from data_lake.sources import IngestConfig
from data_lake.synthetic import ShopConfig
from ray_jobs.sections.base import Section
from ray_jobs.sections.models import (
    EvaluateConfig,
    ExportConfig,
    PublishConfig,
    TrainConfig,
    TuneConfig,
)
from ray_jobs.sections.serving import CanaryConfig, ExperimentConfig, RecommendConfig, ServeConfig
from ray_jobs.sections.storage import StorageConfig
from ray_jobs.sections.upkeep import (
    MaintainConfig,
    MonitorConfig,
    MonitoringConfig,
    RetrainConfig,
    WithdrawConfig,
)
from recsys.recipe import read_recipe
from recsys.splits import SplitConfig

CONFIGS = Path(__file__).parent / "configs"


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

    @model_validator(mode="after")
    def _ranks_what_it_trains(self) -> Self:
        if not read_recipe(self.train.recipe, self.train.overrides).loss.exclude_seen:
            return self
        for section in ("evaluate", "recommend"):
            if not getattr(self, section).filter_seen:
                raise ValueError(
                    f"{section}.filter_seen = false ranks items that a user has seen, whose scores "
                    "train.overrides.loss.exclude_seen leaves untrained; change one of the two"
                )
        return self
