"""Errors of our own come to the user as one sentence, whichever worker raised them."""

import logging
import sys

import pyarrow as pa
import pytest
import ray
from ray.exceptions import RayTaskError

from data_lake.errors import TableError
from ray_jobs import build_sequences
from ray_jobs.job import main
from ray_jobs.reasons import _is_unexpected, keep_reasons, reason_of, sentence_of
from recsys.errors import ArtifactError

SENTENCE = "The bucket cannot be written; give the job room."


def fail_as_job(run, capfd):
    """Exit status and what stands on standard error."""
    with pytest.raises(SystemExit) as caught:
        main(run, job="build_sequences", argv=["--config", "synthetic"])
    return caught.value.code, capfd.readouterr().err


@pytest.mark.ray
@pytest.mark.parametrize("kind", [TableError, ArtifactError, OSError])
def test_a_job_tells_what_a_function_of_ray_data_raised_in_one_sentence(
    kind, tmp_path, tiny_lake, monkeypatch, capfd
):
    def refuse(bucket, build):
        raise kind(SENTENCE)

    config = tiny_lake(tmp_path, "sequences.max_events_per_user=7")
    monkeypatch.setattr(build_sequences, "build_row", refuse)
    status, told = fail_as_job(lambda _: build_sequences.run(config), capfd)

    assert status == 1
    assert told.splitlines()[-1] == f"build_sequences failed: {SENTENCE}"
    assert "Traceback" not in told
    assert "github.com/ray-project" not in told


@pytest.mark.ray
def test_a_fault_that_nobody_expected_keeps_its_traceback(tmp_path, tiny_lake, monkeypatch):
    def err(bucket, build):
        return pa.table({"number": [1 // 0]})

    config = tiny_lake(tmp_path, "sequences.max_events_per_user=7")
    monkeypatch.setattr(build_sequences, "build_row", err)
    with pytest.raises(ZeroDivisionError, match="in err"):
        build_sequences.run(config)


@pytest.mark.ray
def test_a_reason_survives_a_dataset_within_a_task(ray_cluster):
    keep_reasons()

    def refuse(batch):
        raise TableError(SENTENCE)

    refused = ray.data.range(1).map_batches(refuse)
    with pytest.raises(RayTaskError) as caught:
        ray.get(ray.remote(lambda dataset: dataset.take_all()).remote(refused))
    assert type(reason_of(caught.value)) is TableError
    assert sentence_of(caught.value) == SENTENCE


def test_an_error_of_this_process_is_its_own_reason():
    error = TableError(SENTENCE)
    assert reason_of(error) is error


def record(error=None):
    exc_info = None if error is None else (type(error), error, None)
    return logging.LogRecord("ray.data", logging.ERROR, "x.py", 1, "text", (), exc_info)


def test_ray_logs_what_nobody_expected_alone():
    keep_reasons()
    keep_reasons()
    assert logging.getLogger("ray.data.exceptions").filters.count(_is_unexpected) == 1
    assert _is_unexpected(record())
    assert _is_unexpected(record(ZeroDivisionError()))
    assert not _is_unexpected(record(TableError(SENTENCE)))
    try:
        raise TableError(SENTENCE)
    except TableError:
        assert sys.exc_info()[0] is TableError
        assert not _is_unexpected(record())
