"""Settings of the service, from environment variables `NEXTITEM_<FIELD>` and from the `args` of a
Serve configuration, which win.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Json, ValidationError

from serve_app.errors import SettingsError

PREFIX = "NEXTITEM_"
Scope = Literal["read", "write", "admin"]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
ApiKeys = dict[Sha256, tuple[Scope, ...]]
"""Scopes by the SHA-256 of a key, in hex."""
AbsolutePath = Annotated[Path, AfterValidator(lambda path: path.expanduser().resolve())]
"""Replicas of Serve have working directories of their own."""


class Settings(BaseModel):
    """Everything that an operator may set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    registry: AbsolutePath
    """Folder of published versions."""
    version: str | None = None
    """Version to serve; the promoted one unless set."""

    history_path: AbsolutePath = Field(Path("~/nextitem/history.sqlite"), validate_default=True)
    """SQLite file of events; it grows by one row an event."""
    history_seed: AbsolutePath | None = None
    """Parquet file or folder of histories that the lake knows; `history_seed` in the artifact
    unless set.
    """
    history_limit: int = Field(64, ge=1, le=1000)
    """Latest events of a user that a request looks at."""

    deadline_ms: int = Field(70, ge=1, le=60_000)
    """After this time a request is answered without the ranker, unless it brings its own."""
    ranker_timeout_ms: int = Field(2000, ge=1)
    """After this time nobody waits for an answer of the ranker any more, not even the cache."""
    breaker_failures: int = Field(5, ge=1)
    """Failures in a row after which the ranker is left alone."""
    breaker_open_s: float = Field(1.0, gt=0)
    """How long it is left alone before one request tries again."""
    cache_size: int = Field(20_000, ge=1)
    """Ranked lists in memory, per ingress replica."""
    cache_ttl_s: float = Field(60.0, gt=0)

    api_keys: ApiKeys | Json[ApiKeys] = Field(default_factory=dict)
    """Scopes by the SHA-256 of each key in hex; JSON in the environment. Empty: no key needed."""
    max_body_bytes: int = Field(1_000_000, ge=1)
    max_in_flight: int = Field(256, ge=1)
    """Requests that one ingress replica works on; more are shed with 429."""

    device: str = "auto"
    """Of the ranker: auto, cpu, cuda."""
    backend: Literal["torch", "onnx"] = "torch"
    variant: Literal["fp32", "fp16", "bf16", "int8"] = "fp32"
    """Numbers that the encoder counts in: int8 or fp16 (on a GPU) where the version was exported
    so, for onnx; bf16 for torch.
    """
    provider: Literal["auto", "cpu", "cuda", "tensorrt"] = "auto"
    """Of ONNX Runtime; where it cannot be had, the next simpler one runs. auto: the device's."""
    table: Literal["fp32", "fp16", "bf16"] = "fp32"
    """How item vectors are kept: fp16 and bf16 in half the memory, rounded."""
    max_batch_size: int = Field(32, ge=1)
    """Requests that one ranker answers at once."""
    ingress_replicas: int = Field(1, ge=1)
    min_rankers: int = Field(1, ge=1)
    max_rankers: int = Field(1, ge=1)
    ranker_cpus: float = Field(1.0, ge=0)
    ranker_gpus: float = Field(0.0, ge=0)

    @property
    def ranker_options(self) -> dict[str, Any]:
        """What a ranker is told beside its device and backend."""
        return self.model_dump(include={"variant", "provider", "table"})

    @classmethod
    def from_environment(
        cls, environment: Mapping[str, str], overrides: Mapping[str, Any] | None = None
    ) -> "Settings":
        """Reads the variables that belong to a field; others with the prefix are left to other
        programs.

        Raises: SettingsError that names every wrong setting.
        """
        found = {
            name: environment[PREFIX + name.upper()]
            for name in cls.model_fields
            if PREFIX + name.upper() in environment
        }
        try:
            return cls.model_validate({**found, **(overrides or {})})
        except ValidationError as error:
            # Neither input nor the path below a field is told: they may hold a key.
            wrong = {
                f"{fault['loc'][0]} ({PREFIX}{str(fault['loc'][0]).upper()}): {fault['msg']}"
                for fault in error.errors(include_input=False)
            }
            raise SettingsError(f"These settings do not fit: {'; '.join(sorted(wrong))}.") from None
