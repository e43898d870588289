"""The house: which package may import which, and that importing does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"recsys", "data_lake", "ray_jobs", "serve_app"}
FORBIDDEN = {
    "recsys": {"data_lake", "ray_jobs", "serve_app", "ray", "fastapi", "deltalake"},
    "data_lake": {"recsys", "ray_jobs", "serve_app", "ray", "torch", "fastapi"},
    "ray_jobs": {"serve_app", "fastapi"},
    "serve_app": {"ray_jobs", "data_lake", "deltalake"},
}
SHARED = {"ray_jobs": "serve_app.history_stores"}
"""The one thing beside the artifact that the shells share: the job that fills an online store and
the ingress that reads it must agree on its keys, to the letter."""


def _imported(path, shared=""):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            if not (shared and f"{node.module}.".startswith(f"{shared}.")):
                yield node.module.split(".")[0]


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_imports_go_one_way(package):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    wrong = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in set(_imported(path, SHARED.get(package))) & FORBIDDEN[package]
    }
    assert not wrong


def test_only_the_pictures_of_the_report_need_matplotlib():
    files = [path for package in OURS for path in (ROOT / package).rglob("*.py")]
    users = [path.name for path in files if "matplotlib" in _imported(path)]
    assert users == ["plots.py"]


def test_cluster_holds_no_python_but_what_feast_looks_for():
    files = (ROOT / "cluster").rglob("*.py")
    assert [str(path.relative_to(ROOT)) for path in files] == ["cluster/feast/views.py"]


@pytest.mark.parametrize("package", sorted(OURS))
def test_importing_a_module_prints_nothing_and_starts_no_ray(package):
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted((ROOT / package).rglob("*.py"))
        if path.name != "__init__.py"
    ]
    program = "\n".join(
        [
            *(f"import {module}" for module in modules),
            "import sys",
            "ray = sys.modules.get('ray')",
            "assert ray is None or not ray.is_initialized()",
        ]
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
