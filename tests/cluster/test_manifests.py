"""What an operator applies fits the schemas of what reads it."""

from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from serve_app.settings import Settings

CLUSTER = Path(__file__).parents[2] / "cluster"


@pytest.mark.parametrize("path", sorted(CLUSTER.glob("*.yaml")), ids=lambda path: path.name)
def test_every_manifest_is_yaml(path):
    assert yaml.safe_load(path.read_text())


def test_the_serve_configuration_fits_serve_and_our_settings():
    content = yaml.safe_load((CLUSTER / "serve.yaml").read_text())
    (application,) = ServeDeploySchema.model_validate(content).applications
    module, _, name = application.import_path.partition(":")
    assert hasattr(__import__(module, fromlist=[name]), name)
    assert Settings.from_environment({}, application.args).deadline_ms == 70
