"""Where a road writes: folders and object stores."""

import os
import re
from pathlib import Path

from pydantic import Field, field_serializer, field_validator

from ray_jobs.errors import ConfigError
from ray_jobs.sections.base import Section

_SECRET = re.compile("key|secret|token|password|credential|sas", re.IGNORECASE)


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
