"""What an operator applies fits the schemas of what reads it."""

import re
from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from serve_app.settings import Settings

CLUSTER = Path(__file__).parents[2] / "cluster"


@pytest.mark.parametrize("path", sorted(CLUSTER.glob("*.yaml")), ids=lambda path: path.name)
def test_every_manifest_is_yaml(path):
    assert yaml.safe_load(path.read_text())


def test_the_image_runs_as_somebody_and_holds_what_it_copies():
    text = (CLUSTER / "Dockerfile").read_text()
    *_, cpu, cuda = re.split(r"^FROM ", text, flags=re.MULTILINE)

    for stage in (cpu, cuda):
        assert re.findall(r"^USER (.*)$", stage, re.MULTILINE) == ["shop"]
        assert stage.index("USER shop") > stage.index("RUN pip install")
    copied = [
        name
        for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE)
        for name in line.split()[:-1]
    ]
    allowed = (CLUSTER.parent / ".dockerignore").read_text().splitlines()
    for name in copied:
        assert (CLUSTER.parent / name).exists()
        assert f"!{name}" in allowed


def test_the_serve_configuration_fits_serve_and_our_settings():
    content = yaml.safe_load((CLUSTER / "serve.yaml").read_text())
    (application,) = ServeDeploySchema.model_validate(content).applications
    module, _, name = application.import_path.partition(":")
    assert hasattr(__import__(module, fromlist=[name]), name)
    assert Settings.from_environment({}, application.args).deadline_ms == 70
