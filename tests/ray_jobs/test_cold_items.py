"""An item that no event knows, on the road from the items table to a recommendation."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_lake.errors import TableError
from ray_jobs import build_sequences, evaluate, generate, ingest, publish, train
from ray_jobs.errors import ConfigError
from ray_jobs.job import load_config
from ray_jobs.runs import open_run
from ray_jobs.sequences_reader import learn_vocabulary, open_sequences
from recsys.artifact import load_artifact
from recsys.errors import CatalogueError
from recsys.ranker import Ranker, SimilarQuery
from tests.ray_jobs.conftest import tiny_config

NEW_ITEM, SOLD_OUT = 1, 2
WITH_ATTRIBUTES = (
    'train.attributes.categorical=["category", "brand"]',
    'train.attributes.bands=["price"]',
)


@pytest.fixture(scope="module")
def home(tmp_path_factory, ray_cluster):
    """A tiny shop with sequences, whose items table has two items that nobody has touched."""
    home = tmp_path_factory.mktemp("cold")
    config = tiny_config(home)
    generate.run(config)
    path = home / "synthetic" / "raw" / "items.parquet"
    items = pq.read_table(path)
    new = items.slice(0, 1).to_pylist()[0]
    rows = [new | {"item_id": NEW_ITEM}, new | {"item_id": SOLD_OUT, "available": False}]
    pq.write_table(pa.concat_tables([items, pa.Table.from_pylist(rows, items.schema)]), path)
    ingest.run(config)
    build_sequences.run(config)
    return home


def learn(home, *overrides):
    config = tiny_config(home, *overrides)
    return learn_vocabulary(open_sequences(config), config).vocabulary


@pytest.mark.ray
def test_with_attributes_what_is_available_joins_the_catalogue(home):
    before, after = learn(home), learn(home, *WITH_ATTRIBUTES)
    assert not {NEW_ITEM, SOLD_OUT} & set(before.catalogue.item_ids.to_pylist())
    added = set(after.catalogue.item_ids.to_pylist()) - set(before.catalogue.item_ids.to_pylist())
    assert NEW_ITEM in added
    assert SOLD_OUT not in added
    assert after.attributes.config.fields == ("category", "brand", "price")


@pytest.mark.ray
def test_an_attribute_that_items_lack_is_named_with_what_there_is(home):
    with pytest.raises(CatalogueError, match=r"no column 'colour'; it has: item_id, count, title"):
        learn(home, 'train.attributes.categorical=["colour"]')


@pytest.mark.ray
def test_attributes_without_an_items_table_are_refused(home, monkeypatch):
    monkeypatch.setattr("ray_jobs.sequences_reader.table_exists", lambda *arguments: False)
    with pytest.raises(TableError, match=r"train.attributes needs an items table"):
        learn(home, *WITH_ATTRIBUTES)


@pytest.mark.ray
def test_what_is_trained_evaluated_and_published_knows_the_new_item(home):
    config = tiny_config(home, *WITH_ATTRIBUTES)
    train.run(config)
    evaluate.run(config)
    version = publish.run(config).figures["version"]

    assert open_run(config, None).vocabulary.attributes.config == config.train.attributes
    artifact = load_artifact(home / "synthetic" / "registry" / version)
    for backend in ("torch", "onnx"):
        ranker = Ranker(artifact, device="cpu", backend=backend)
        (answer,) = ranker.similar([SimilarQuery(NEW_ITEM, k=5)])
        assert len(answer.item_ids) == 5
    (item,) = artifact.catalogue.encode([NEW_ITEM])
    assert artifact.catalogue.counts_I[item] == 0


def test_id_dropout_without_attributes_is_refused():
    with pytest.raises(ConfigError, match=r"id_dropout does nothing without attributes"):
        load_config("synthetic", ["train.overrides.model.id_dropout=0.1"])
    load_config("synthetic", ["train.overrides.model.id_dropout=0.1", *WITH_ATTRIBUTES])
