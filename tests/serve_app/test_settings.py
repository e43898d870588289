from pathlib import Path

import pytest

from serve_app.errors import SettingsError
from serve_app.settings import Settings


def test_environment_is_read_and_arguments_win():
    environment = {
        "NEXTITEM_REGISTRY": "/srv/registry",
        "NEXTITEM_DEADLINE_MS": "50",
        "NEXTITEM_CACHE_SIZE": "7",
        "NEXTITEM_API_KEYS": '{"ab12": ["read", "write"]}',
        "NEXTITEM_HOME": "belongs to the jobs",
    }

    settings = Settings.from_environment(environment, {"deadline_ms": 90})

    assert settings.registry == Path("/srv/registry")
    assert (settings.deadline_ms, settings.cache_size) == (90, 7)
    assert settings.api_keys == {"ab12": ("read", "write")}


def test_wrong_settings_are_all_named_without_their_values():
    environment = {"NEXTITEM_DEADLINE_MS": "soon", "NEXTITEM_API_KEYS": "my-secret"}

    with pytest.raises(SettingsError) as caught:
        Settings.from_environment(environment, {"colour": "red"})

    message = str(caught.value)
    for name in ("registry (NEXTITEM_REGISTRY)", "deadline_ms", "api_keys", "colour"):
        assert name in message
    assert "my-secret" not in message
