"""What stays the same for as long as a version serves."""

import pytest

from ray_jobs.drift.reference import (
    Reference,
    describe_settings,
    read_reference,
    write_reference,
)
from ray_jobs.errors import JobError
from ray_jobs.sections.upkeep import MonitorConfig


def test_a_reference_is_read_again_for_the_same_settings(tmp_path):
    reference = Reference({"version": "v1"}, 5, (0.5,))
    write_reference(tmp_path, reference)
    assert read_reference(tmp_path, {"version": "v1"}) == reference
    assert read_reference(tmp_path, {"version": "v2"}) is None
    assert read_reference(tmp_path / "nothing", {"version": "v1"}) is None


@pytest.mark.parametrize("text", ["", "[]", '{"settings": {}}'])
def test_a_damaged_reference_is_one_sentence(tmp_path, text):
    (tmp_path / "reference.json").write_text(text)
    with pytest.raises(JobError, match=r"reference\.json is damaged .*; delete it, and the"):
        read_reference(tmp_path, {})


def test_a_reference_depends_on_the_version_and_on_windows_not_on_how_rare_alarms_are():
    rare = describe_settings(MonitorConfig(false_alarm_rate=0.001), "v1")
    assert rare == describe_settings(MonitorConfig(), "v1")
    assert rare != describe_settings(MonitorConfig(), "v2")
    assert rare != describe_settings(MonitorConfig(days=1), "v1")
