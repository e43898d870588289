"""The road up to sequences with the tables, and the sources, in an object store."""

from pathlib import Path

import pytest

from data_lake.errors import LakeError
from data_lake.storage import write_file
from data_lake.tables import open_table, read_table
from ray_jobs import build_sequences, generate, ingest
from ray_jobs.sequences_reader import learn_vocabulary, load_tokens, open_sequences
from tests.ray_jobs.conftest import tiny_config
from tests.s3_server import BUCKET, running_store

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

LAKE, RAW = f"s3://{BUCKET}/platform/lake", f"s3://{BUCKET}/delivered"


@pytest.fixture(scope="module")
def options():
    with running_store("tests.moto_server") as options:
        yield options


@pytest.fixture(scope="module")
def strict_options():
    with running_store() as options:
        yield options


def deliver(raw, options):
    """Puts what was generated where a shop would put it."""
    for file in Path(raw).rglob("*"):
        if file.is_file():
            write_file(f"{RAW}/{file.relative_to(raw)}", file.read_bytes(), options)


def with_remote_sources(config, raw):
    text = config.ingest.model_dump_json().replace(str(raw), RAW)
    ingest_config = type(config.ingest).model_validate_json(text)
    return config.model_copy(update={"ingest": ingest_config})


def test_a_lake_in_an_object_store_is_filled_once_and_read(tmp_path, options):
    local = tiny_config(tmp_path)
    remote = local.storage.model_copy(update={"lake": LAKE, "options": options})
    config = local.model_copy(update={"storage": remote})
    raw = Path(local.storage.root) / "raw"
    assert config.storage.lake_uri == LAKE
    assert Path(config.storage.runs_uri).is_relative_to(tmp_path)

    generate.run(local)
    deliver(raw, options)
    config = with_remote_sources(config, raw)
    assert config.ingest.events[0].path.startswith(RAW)

    first = ingest.run(config).figures
    assert first["committed"] > 0
    assert first["quarantined"] > 0
    assert ingest.run(config).headline == "every file of events was ingested before"

    built = build_sequences.run(config).figures
    assert built["events_read"] == first["committed"]
    assert "nothing to do" in build_sequences.run(config).headline

    sequences = open_sequences(config)
    learned = learn_vocabulary(sequences, config)
    tokens = load_tokens(sequences, config, learned.vocabulary)
    assert tokens.count() == built["users_kept"] == len(read_table(sequences))
    assert not list(tmp_path.rglob("_delta_log"))


def test_the_lake_in_an_object_store_is_as_the_one_in_a_folder(tmp_path, options):
    """Stands on the test before: the same shop, ingested into a folder."""
    local = tiny_config(tmp_path)
    generate.run(local)
    ingest.run(local)
    lakes = (local.storage.lake_uri, {}), (LAKE, options)
    here, there = (
        read_table(open_table(lake, "events", options), ["event_id", "user_id", "user_bucket"])
        for lake, options in lakes
    )
    assert here.num_rows > 1000
    assert there.sort_by("event_id").equals(here.sort_by("event_id"))


def test_a_job_says_in_one_sentence_that_its_store_is_closed(tmp_path, strict_options):
    local = tiny_config(tmp_path)
    closed = {"lake": LAKE, "options": {**strict_options, "AWS_ACCESS_KEY_ID": "no-such-key"}}
    storage = local.storage.model_copy(update=closed)
    with pytest.raises(LakeError, match=r"events cannot be reached \(403 Forbidden") as caught:
        build_sequences.run(local.model_copy(update={"storage": storage}))
    assert "no-such-key" not in str(caught.value)
