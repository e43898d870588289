"""The runbook speaks of what is there: every alert, and commands, files and figures that exist."""

import importlib.util
import re

import pytest

from tests.cluster.manifests import CLUSTER
from tests.cluster.monitoring import alerts

ROOT = CLUSTER.parent
TEXT = (CLUSTER / "RUNBOOK.md").read_text()


def section(title):
    """What stands between a heading and the next one of its level."""
    (found,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    return found


def test_every_alert_has_a_heading_and_every_heading_an_alert():
    assert re.findall(r"^### (\w+)$", section("Alerts"), re.MULTILINE) == list(alerts())


def test_of_every_alert_it_says_what_it_means_what_to_look_at_and_what_to_do():
    for part in re.split(r"^### ", section("Alerts"), flags=re.MULTILINE)[1:]:
        assert re.findall(r"^\*\*(.*?)\*\*: \S", part, re.MULTILINE) == ["Means", "Look at", "Do"]


@pytest.mark.parametrize("module", sorted(set(re.findall(r"python -m ([\w.]+\w)", TEXT))))
def test_a_command_that_it_names_exists(module):
    assert importlib.util.find_spec(module) is not None


def test_files_that_it_names_exist():
    links = [CLUSTER / target for target in re.findall(r"\]\(([\w./-]+)\)", TEXT)]
    named = re.findall(r"\b((?:cluster|benchmarks|tests)/[\w./-]*\w)", TEXT)
    assert len(links) > 3
    for path in [*links, *(ROOT / name for name in named)]:
        assert path.exists(), path


def test_figures_of_capacity_stand_in_the_record_that_is_named():
    rows = re.findall(
        r"^\| (.*) \| (.*) \| (benchmarks/\S+) \|$", section("Capacity"), re.MULTILINE
    )
    assert len(rows) == 9
    for what, figure, source in rows:
        record = (ROOT / source).read_text()
        for number in re.findall(r"\d+\.\d+", figure + what):
            assert number in record, (number, source)
