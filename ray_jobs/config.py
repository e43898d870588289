"""One file describes one data set's whole road; each job reads its own section.

Paths may use environment variables. `NEXTITEM_HOME` (default `~/nextitem`) is where everything is written,
`NEXTITEM_DATA` (default `../shared/data` where that folder exists) is where raw data sets are found.
"""

import os
import re
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from data_lake.sequences import SequencesConfig
from data_lake.sources import IngestConfig
from data_lake.synthetic import ShopConfig
from ray_jobs.errors import ConfigError

CONFIGS = Path(__file__).parent / "configs"


class Section(BaseModel):
    """Base of every section: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class StorageConfig(Section):
    """Where everything is written."""

    root: str
    """A local path or a URI; relative paths count from the working directory."""
    options: dict[str, str] = Field(default_factory=dict)
    """Passed to deltalake (credentials, endpoints)."""

    @property
    def lake_uri(self) -> str:
        return f"{expand(self.root)}/lake"

    @property
    def runs_uri(self) -> str:
        return f"{expand(self.root)}/runs"

    @property
    def registry_uri(self) -> str:
        return f"{expand(self.root)}/registry"


class PipelineConfig(Section):
    """The whole road; a job looks at `seed`, `storage` and its own section."""

    name: str
    """Name of the data set; also the name of the model in the registry."""
    seed: int = 0
    storage: StorageConfig
    generate: ShopConfig | None = None
    ingest: IngestConfig
    sequences: SequencesConfig = SequencesConfig()


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
        raise ConfigError(f"{path!r} needs the environment variable {unset[1]}, which is not set; set it to a folder.")
    if "://" in expanded:
        return expanded.rstrip("/")
    return str(Path(expanded).expanduser().resolve())
