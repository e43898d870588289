"""What is installed: the wheel carries the recipes and configurations, and pins are complete."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def _names(requirements):
    return {re.split(r"[\[<>=~!; ]", line)[0].lower().replace("_", "-") for line in requirements}


def test_every_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = _names(project["dependencies"]) | _names(project["optional-dependencies"]["dev"])
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = _names(line for line in lines if "==" in line)
    assert wanted - pinned == set()


def test_every_make_target_of_the_contract_is_in_help():
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = {line.split()[0] for line in done.stdout.splitlines()}
    targets = {"help", "setup", "demo", "test", "test-slow", "lint", "bench", "serve", "clean"}
    assert targets <= listed


@pytest.mark.slow
def test_a_wheel_contains_the_recipes_and_the_configurations(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(tmp_path), str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("nextitem-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("recsys/recipes", "ray_jobs/configs"):
        files = {f"{folder}/{path.name}" for path in (ROOT / folder).glob("*.toml")}
        assert files
        assert files <= names
    assert "serve_app/deployment.py" in names
    assert not any(name.startswith("tests/") for name in names)
