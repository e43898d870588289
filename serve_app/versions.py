"""The versions of a model that a process has in memory. What the registry names is loaded beside
what serves, and takes over once it is ready; no request waits for it or meets half of it.
"""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from recsys.errors import ArtifactError
from recsys.registry import Serving, read_serving

T = TypeVar("T")

log = logging.getLogger(__name__)


class Versions(Generic[T]):
    """Loads the versions that serve, and follows the registry from `watch` on.

    A version that cannot be loaded takes over nothing: its visitors stay with the champion, and a
    champion that cannot be loaded leaves everything as it was. It is tried again after `retry_s`.
    One that serves no more is kept for `keep_s`, for processes that have not yet heard of it.

    Args:
        load: makes a version from its folder; blocks, in a thread of this object.
        pinned: the only version, whatever the registry says.
        on_change: told what serves from now on.
        on_failure: told the version that could not be loaded; the registry's own file is "".

    Raises: ArtifactError when the champion cannot be loaded at the start.
    """

    def __init__(
        self,
        registry: Path,
        load: Callable[[Path], T],
        *,
        pinned: str | None = None,
        keep_s: float = 60.0,
        retry_s: float = 30.0,
        on_change: Callable[[Serving], None] = lambda serving: None,
        on_failure: Callable[[str], None] = lambda version: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._load = load
        self._is_pinned = pinned is not None
        self._keep_s, self._retry_s = keep_s, retry_s
        self._on_change, self._on_failure = on_change, on_failure
        self._clock = clock
        self._failed_at: dict[str, float] = {}
        self._unused_since: dict[str, float] = {}
        self._closing = threading.Event()
        self._watcher: threading.Thread | None = None

        wanted = Serving(pinned) if pinned is not None else read_serving(registry)
        self._loaded = {wanted.champion: load(registry / wanted.champion)}
        self._serving = Serving(wanted.champion)
        on_change(self._serving)
        self.refresh()

    @property
    def serving(self) -> Serving:
        """What serves in this process: the registry's word, as far as it is loaded."""
        return self._serving

    @property
    def champion(self) -> T:
        return self._loaded[self._serving.champion]

    def get(self, version: str | None) -> T:
        """A version; the champion in its place where it is not loaded."""
        loaded = None if version is None else self._loaded.get(version)
        return self.champion if loaded is None else loaded

    def choose(self, visitor: str) -> T:
        """The version of a visitor."""
        return self.get(self._serving.choose(visitor))

    def refresh(self) -> None:
        """Loads what the registry names now; blocks until all of it is ready or has failed."""
        if self._is_pinned:
            return
        try:
            wanted = read_serving(self._registry)
        except (ArtifactError, OSError) as error:
            self._fail("", error)
            return
        for version in wanted.versions:
            self._load_once(version)
        if wanted.champion in self._loaded:
            self._take_over(wanted)
        self._drop_unused()

    def watch(self, every_s: float) -> None:
        """Refreshes in a thread of its own until `close`."""
        self._watcher = threading.Thread(
            target=self._watch, args=(every_s,), name="versions", daemon=True
        )
        self._watcher.start()

    def close(self) -> None:
        """Ends the watching; waits for a load under way."""
        self._closing.set()
        if self._watcher is not None:
            self._watcher.join()

    def _watch(self, every_s: float) -> None:
        while not self._closing.wait(every_s):
            self.refresh()

    def _load_once(self, version: str) -> None:
        if version in self._loaded:
            return
        failed_at = self._failed_at.get(version)
        if failed_at is not None and self._clock() - failed_at < self._retry_s:
            return
        started = time.perf_counter()
        try:
            loaded = self._load(self._registry / version)
        except (ArtifactError, OSError, RuntimeError, MemoryError) as error:
            # Also what the device says when two versions do not fit.
            self._fail(version, error)
            return
        self._failed_at.pop(version, None)
        self._loaded = {**self._loaded, version: loaded}
        log.info("Version %s is loaded, in %.1f s.", version, time.perf_counter() - started)

    def _fail(self, version: str, error: Exception) -> None:
        self._failed_at[version] = self._clock()
        self._on_failure(version)
        log.error("Version %s does not take over: %s", version or "unknown", error)

    def _take_over(self, wanted: Serving) -> None:
        shares = {name: share for name, share in wanted.shares.items() if name in self._loaded}
        serving = Serving(wanted.champion, shares)
        if serving == self._serving:
            return
        self._serving = serving
        self._on_change(serving)
        log.info("Version %s serves; beside it: %s.", serving.champion, dict(shares) or "none")

    def _drop_unused(self) -> None:
        now = self._clock()
        unused = set(self._loaded) - set(self._serving.versions)
        self._unused_since = {version: self._unused_since.get(version, now) for version in unused}
        gone = {name for name, since in self._unused_since.items() if now - since >= self._keep_s}
        if gone:
            self._loaded = {name: one for name, one in self._loaded.items() if name not in gone}
