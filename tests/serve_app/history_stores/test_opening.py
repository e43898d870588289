import sys

import pytest

from serve_app.errors import SettingsError
from serve_app.history_stores.opening import open_store


@pytest.mark.parametrize(
    ("kind", "words"),
    [("redis", "needs redis_url"), ("feast", "needs feast_repo"), ("sqlite", "by the ingress")],
)
def test_store_without_an_address_says_what_it_needs(kind, words):
    with pytest.raises(SettingsError, match=words):
        open_store(kind)


def test_variable_that_is_not_set_is_named():
    with pytest.raises(SettingsError, match="environment variable NOWHERE is not set"):
        open_store("redis", redis_url="$NOWHERE")


def test_feast_that_is_not_installed_is_named(tmp_path, monkeypatch):
    for module in ("feast_history", "feast_online", "feast_views"):
        monkeypatch.delitem(sys.modules, f"serve_app.history_stores.{module}", raising=False)
    monkeypatch.setitem(sys.modules, "feast", None)

    with pytest.raises(SettingsError, match=r"needs the extra .* pip install 'nextitem\[feast\]'"):
        open_store("feast", feast_repo=tmp_path)


def test_feast_repository_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SettingsError, match="nowhere cannot be opened"):
        open_store("feast", feast_repo=tmp_path / "nowhere")
