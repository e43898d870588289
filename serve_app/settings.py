"""Settings of the service, from environment variables `NEXTITEM_<FIELD>` and from the `args` of a
Serve configuration, which win.
"""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    Json,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from serve_app.errors import SettingsError

PREFIX = "NEXTITEM_"
Scope = Literal["read", "write", "admin"]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
ApiKeys = dict[Sha256, tuple[Scope, ...]]
"""Scopes by the SHA-256 of a key, in hex."""
AbsolutePath = Annotated[Path, AfterValidator(lambda path: path.expanduser().resolve())]
"""Replicas of Serve have working directories of their own."""
HistoryKind = Literal["sqlite", "redis", "feast"]


class Settings(BaseModel):
    """Everything that an operator may set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    registry: AbsolutePath
    """Folder of published versions."""
    version: str | None = None
    """The only version to serve; what the registry says unless set, also when that changes."""
    registry_poll_s: float = Field(2.0, gt=0)
    """How often each process looks whether the registry has changed."""

    history_path: AbsolutePath = Field(Path("~/nextitem/history.sqlite"), validate_default=True)
    """SQLite file of the event log, on a disk of this machine; it grows by one row an event."""
    events_timeout_ms: int = Field(2000, ge=1)
    """After this time without a durable write `POST /v1/events` answers 503."""
    events_landing: str | None = None
    """Folder or `s3://` URI from which `ray_jobs.ingest` takes served events; None: they stay."""
    ship_every_s: float = Field(30.0, gt=0)
    ship_rows: int = Field(50_000, ge=1)
    """Events that wait are shipped earlier when there are so many; also the most in one file."""
    log_keep_days: float = Field(30.0, gt=0)
    """Shipped events stay in the log for so long. With SQLite histories a visit is forgotten then,
    unless it has come back with a seed."""

    redis_url: SecretStr | None = None
    """`redis://`, `rediss://` or `unix://`, or "$NAME" of an environment variable that holds it."""
    feast_repo: AbsolutePath | None = None
    """Folder of `feature_store.yaml`."""
    history: HistoryKind = "sqlite"
    """Where histories are read; redis and feast serve several machines."""
    history_timeout_ms: int | None = Field(None, ge=1)
    """After this time a request is answered without the visitor's history; half of `deadline_ms`
    unless set."""
    history_keep_days: float = Field(90.0, gt=0)
    """Redis forgets a visitor so long after the last event."""
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
    cache_size: int = Field(20_000, ge=0)
    """Ranked lists in memory, per ingress replica; 0 asks the ranker every time."""
    cache_ttl_s: float = Field(60.0, gt=0)
    shared_cache: SecretStr | None = None
    """Redis that the replicas share lists through, as `redis_url`."""
    shared_cache_timeout_ms: int = Field(5, ge=1)
    """A Redis that takes longer has no list."""
    exposures: str | None = None
    """Folder or address (s3://...) for the log of lists that were given; none unless set."""
    metrics_dir: AbsolutePath = Field(
        Path(tempfile.gettempdir(), f"nextitem-metrics-{os.getuid()}"), validate_default=True
    )
    """On each node, where its processes add up what `/metrics` shows."""

    api_keys: ApiKeys | Json[ApiKeys] = Field(default_factory=dict)
    """Scopes by the SHA-256 of each key in hex; JSON in the environment. Empty: no key needed."""
    max_body_bytes: int = Field(1_000_000, ge=1)
    body_timeout_s: float = Field(10.0, gt=0)
    """A request whose body has not come by then is refused with 408."""
    max_in_flight: int = Field(256, ge=1)
    """Requests that one ingress replica works on; more are shed with 429."""

    ranker: Literal["deployment", "inside"] = "deployment"
    """deployment: rankers are replicas of their own, on GPUs or other machines, and as many as the
    load asks for. inside: each ingress replica ranks by itself, without the way to another process;
    for models that a CPU ranks within milliseconds. There are ingress_replicas of them then."""
    device: str = "auto"
    """Of the ranker: auto, cpu, cuda."""
    backend: Literal["auto", "torch", "onnx"] = "auto"
    """Runs the encoder. auto: ONNX Runtime where the version was exported so, else torch."""
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
    ranker_target_ongoing: float = Field(16.0, gt=0)
    """Requests that one ranker should have at hand; more of them ask for another ranker."""
    ranker_upscale_delay_s: float = Field(5.0, ge=0)
    """How long there must be more before one is started."""
    ranker_downscale_delay_s: float = Field(300.0, ge=0)
    """How long there must be fewer before one is stopped."""
    ranker_cpus: float = Field(1.0, ge=0)
    ranker_gpus: float = Field(0.0, ge=0)

    @property
    def history_timeout_s(self) -> float:
        """Of one call to the history store."""
        return (self.history_timeout_ms or self.deadline_ms / 2) / 1000

    @field_validator("redis_url", "shared_cache")
    @classmethod
    def _from_variable(cls, url: SecretStr | None) -> SecretStr | None:
        return None if url is None else SecretStr(from_variable(url.get_secret_value()))

    @field_validator("min_rankers", "max_rankers")
    @classmethod
    def _has_rankers_of_their_own(cls, count: int, info: ValidationInfo) -> int:
        if count > 1 and info.data.get("ranker") == "inside":
            raise ValueError("rankers inside are as many as ingress_replicas; leave it out")
        return count

    @field_validator("history")
    @classmethod
    def _has_its_address(cls, history: HistoryKind, info: ValidationInfo) -> HistoryKind:
        needed = {"redis": "redis_url", "feast": "feast_repo"}.get(history)
        # A value that does not fit is missing here, and is told for itself.
        if needed is not None and info.data.get(needed, "") is None:
            raise ValueError(f"{history} needs {needed}")
        return history

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


def from_variable(value: str) -> str:
    """The value, or, of "$NAME", that of an environment variable. Raises: ValueError."""
    if not value.startswith("$"):
        return value
    if value[1:] not in os.environ:
        raise ValueError(f"the environment variable {value[1:]} is not set")
    return os.environ[value[1:]]
