"""A road of a few hundred users, small enough to be walked in a test."""

import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from ray_jobs import build_sequences, generate, ingest
from ray_jobs.config import PipelineConfig
from ray_jobs.job import load_config

TINY = (
    "generate.num_users=400",
    "generate.num_items=80",
    "generate.num_categories=5",
    "generate.num_parts=2",
    "generate.oracle_users=100",
    "ingest.num_buckets=2",
    "train.overrides.model.dim=16",
    "train.overrides.model.max_len=16",
    "train.overrides.batch_size=64",
    "train.trainer.max_epochs=2",
    "evaluate.max_users=300",
    "publish.must_beat_baselines=false",
    # A tiny machine under test answers late now and then; lateness has tests of its own.
    "serve.deadline_ms=5000",
)


@pytest.fixture(scope="session")
def tiny_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny road writes."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def tiny(tiny_home: Path) -> PipelineConfig:
    """The synthetic configuration, made tiny, on a free port."""
    return tiny_config(tiny_home)


@pytest.fixture(scope="session")
def tiny_lake(
    ray_cluster: None, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., PipelineConfig]:
    """`tiny_lake(home, *overrides)`: a configuration whose sequences are built already; they are a
    copy, and no override of what they were made of counts."""
    original = tmp_path_factory.mktemp("lake")
    config = tiny_config(original)
    for stage in (generate, ingest, build_sequences):
        stage.run(config)

    def copy(home: Path, *overrides: str) -> PipelineConfig:
        shutil.copytree(original, home, dirs_exist_ok=True)
        return tiny_config(home, *overrides)

    return copy


def tiny_config(home: Path, *overrides: str) -> PipelineConfig:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEXTITEM_HOME", str(home))
        config = load_config("synthetic", [*TINY, f"serve.port={free_port()}", *overrides])
    # Paths are fixed here, so that no later change of the environment moves them.
    return PipelineConfig.model_validate_json(
        config.model_dump_json().replace("$NEXTITEM_HOME", str(home))
    )


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
