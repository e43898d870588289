"""Reads and writes the views of the Feast repository; for one thread at a time."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from feast import FeatureStore

from serve_app.errors import HistoryUnavailableError, SettingsError
from serve_app.history_stores import feast_views as views

_VIEWS = (views.recent_events, views.seeded_events, views.erasures, views.progress)
_FEATURES = {view.name: [field.name for field in view.schema] for view in _VIEWS}

Features = dict[str, Any]
"""By name; all None where nothing was written."""


class FeastOnline:
    """The online store of a repository. Views that its registry lacks are applied.

    Raises: SettingsError when the repository cannot be opened; HistoryUnavailableError, by the
        methods, when the store behind it fails.
    """

    def __init__(self, repo: Path) -> None:
        try:
            self._store = FeatureStore(repo_path=str(repo))
            known = {view.name for view in self._store.list_feature_views()}
            if not known >= _FEATURES.keys():
                self._store.apply([views.visitor, *_VIEWS])
        except Exception as error:  # Feast lets through whatever its parts raise
            raise SettingsError(
                f"feast_repo {repo} cannot be opened ({error}); see its feature_store.yaml."
            ) from error

    def read(
        self, view_names: Sequence[str], visitors: Sequence[str]
    ) -> dict[str, dict[str, Features]]:
        """Features by visitor and view."""
        if not visitors:
            return {}
        wanted = [f"{view}:{name}" for view in view_names for name in _FEATURES[view]]
        try:
            found = self._store.get_online_features(
                wanted, [{"visitor_id": one} for one in visitors], full_feature_names=True
            ).to_dict()
        except Exception as error:
            raise _unavailable(error) from error
        return {
            visitor: {
                view: {name: found[f"{view}__{name}"][row] for name in _FEATURES[view]}
                for view in view_names
            }
            for row, visitor in enumerate(visitors)
        }

    def write(self, view: str, rows: Mapping[str, Features]) -> None:
        """Replaces all features of a view, by visitor."""
        if not rows:
            return
        now = pd.Timestamp.now(tz="UTC")
        table = pd.DataFrame(
            [{"visitor_id": one, "event_timestamp": now, **row} for one, row in rows.items()]
        )
        try:
            self._store.push(views.push_source(view), table)
        except Exception as error:
            raise _unavailable(error) from error


def _unavailable(error: Exception) -> HistoryUnavailableError:
    return HistoryUnavailableError(
        f"Feast's online store failed ({type(error).__name__}); see whether it runs."
    )
