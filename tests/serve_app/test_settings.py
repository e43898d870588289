from pathlib import Path

import pytest

from serve_app.errors import SettingsError
from serve_app.settings import Settings


def test_environment_is_read_and_arguments_win():
    environment = {
        "NEXTITEM_REGISTRY": "/srv/registry",
        "NEXTITEM_DEADLINE_MS": "50",
        "NEXTITEM_CACHE_SIZE": "7",
        "NEXTITEM_API_KEYS": '{"%s": ["read", "write"]}' % ("ab" * 32),
        "NEXTITEM_HOME": "belongs to the jobs",
    }

    settings = Settings.from_environment(environment, {"deadline_ms": 90})

    assert settings.registry == Path("/srv/registry")
    assert (settings.deadline_ms, settings.cache_size) == (90, 7)
    assert settings.api_keys == {"ab" * 32: ("read", "write")}


def test_wrong_settings_are_all_named_without_their_values():
    environment = {"NEXTITEM_DEADLINE_MS": "soon", "NEXTITEM_API_KEYS": "my-secret"}

    with pytest.raises(SettingsError) as caught:
        Settings.from_environment(environment, {"colour": "red"})

    message = str(caught.value)
    for name in ("registry (NEXTITEM_REGISTRY)", "deadline_ms", "api_keys", "colour"):
        assert name in message
    assert "my-secret" not in message


def test_keys_must_be_digests_and_are_never_told():
    with pytest.raises(SettingsError) as caught:
        Settings.from_environment({}, {"registry": "r", "api_keys": {"my-secret": ["read"]}})

    assert "api_keys" in str(caught.value)
    assert "my-secret" not in str(caught.value)


def test_paths_do_not_depend_on_the_working_directory_of_a_replica(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/shop")

    settings = Settings(registry="registry")

    assert settings.registry == tmp_path / "registry"
    assert settings.history_path == Path("/home/shop/nextitem/history.sqlite")


def test_store_of_histories_needs_its_address():
    with pytest.raises(SettingsError, match=r"history \(NEXTITEM_HISTORY\).*redis needs redis_url"):
        Settings.from_environment({}, {"registry": "r", "history": "redis"})
    with pytest.raises(SettingsError, match="feast needs feast_repo"):
        Settings.from_environment({}, {"registry": "r", "history": "feast"})


def test_url_of_redis_may_come_from_the_environment_and_is_not_shown(monkeypatch):
    monkeypatch.setenv("SHOP_REDIS", "redis://:my-secret@cache:6379")

    settings = Settings(registry="r", redis_url="$SHOP_REDIS")

    assert settings.redis_url.get_secret_value() == "redis://:my-secret@cache:6379"
    assert "my-secret" not in f"{settings} {settings!r} {settings.model_dump_json()}"
    with pytest.raises(SettingsError, match="the environment variable NOWHERE is not set"):
        Settings.from_environment({}, {"registry": "r", "redis_url": "$NOWHERE"})


def test_history_has_half_of_the_deadline_unless_it_is_told():
    assert Settings(registry="r", deadline_ms=50).history_timeout_s == 0.025
    assert Settings(registry="r", history_timeout_ms=7).history_timeout_s == 0.007


@pytest.mark.parametrize("name", ["min_rankers", "max_rankers"])
def test_rankers_inside_ingresses_have_no_number_of_their_own(name):
    with pytest.raises(SettingsError, match=f"{name} .* as many as ingress_replicas"):
        Settings.from_environment({}, {"registry": "/r", "ranker": "inside", name: 2})
