"""Opens the history store that the settings, or a job's configuration, name."""

from pathlib import Path

from serve_app.errors import SettingsError
from serve_app.event_log import EventLog
from serve_app.history_stores.redis_history import RedisHistory
from serve_app.history_stores.sqlite_history import SqliteHistory
from serve_app.history_stores.store import HistoryStore
from serve_app.settings import HistoryKind, Settings, from_variable

_KEPT_EVENTS = 200
"""Of a visitor, in Redis and Feast; more where requests look at more."""


def open_history(settings: Settings, log: EventLog) -> HistoryStore:
    """The store of the ingress. Raises: SettingsError."""
    url = settings.redis_url
    return open_store(
        settings.history,
        log=log,
        redis_url=None if url is None else url.get_secret_value(),
        feast_repo=settings.feast_repo,
        timeout_s=settings.history_timeout_s,
        keep=max(_KEPT_EVENTS, settings.history_limit),
        ttl_s=settings.history_keep_days * 86_400,
    )


def open_store(
    kind: HistoryKind,
    *,
    log: EventLog | None = None,
    redis_url: str | None = None,
    feast_repo: Path | None = None,
    timeout_s: float = 1.0,
    keep: int = _KEPT_EVENTS,
    ttl_s: float = 90 * 86_400.0,
) -> HistoryStore:
    """The store of a kind.

    Args:
        log: of this machine; SQLite is nothing but it, and who only loads has none.
        timeout_s: bound on a `recent`.
        keep: events that Redis and Feast keep of a visitor.
        redis_url: or "$NAME" of an environment variable.
        ttl_s: how long Redis keeps them after the last one.

    Raises: SettingsError when the kind needs what was not given, or Feast is not installed.
    """
    if kind == "redis":
        if redis_url is None:
            raise SettingsError("history = redis needs redis_url, e.g. redis://127.0.0.1:6379.")
        return RedisHistory(_resolved(redis_url), timeout_s=timeout_s, keep=keep, ttl_s=ttl_s)
    if kind == "feast":
        return _open_feast(feast_repo, log, timeout_s=timeout_s, keep=keep)
    if log is None:
        raise SettingsError("history = sqlite is filled by the ingress itself, from its seed.")
    return SqliteHistory(log, timeout_s=timeout_s)


def _resolved(url: str) -> str:
    try:
        return from_variable(url)
    except ValueError as error:
        raise SettingsError(f"redis_url does not fit: {error}.") from None


def _open_feast(
    repo: Path | None, log: EventLog | None, *, timeout_s: float, keep: int
) -> HistoryStore:
    if repo is None:
        raise SettingsError("history = feast needs feast_repo, e.g. cluster/feast.")
    try:
        # Seconds of imports, and an extra that most do without.
        from serve_app.history_stores.feast_history import FeastHistory
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"history = feast needs the extra ({error}); run: pip install 'nextitem[feast]'."
        ) from error
    return FeastHistory(repo, log, timeout_s=timeout_s, keep=keep)
