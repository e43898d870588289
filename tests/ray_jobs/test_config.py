"""What sections of a configuration say of one another."""

import pytest
from pydantic import ValidationError

from ray_jobs.config import PipelineConfig

_UNSEEN = {"recipe": "sasrec-ce", "overrides": {"loss": {"exclude_seen": True}}}


def _config(**sections):
    columns = {name: name for name in ("user_id", "item_id", "event_type", "timestamp")}
    events = {"path": "$SHOP/raw", "format": "parquet", "columns": columns}
    tables = {"user_id": "int64", "item_id": "int64", "events": [events]}
    return PipelineConfig(name="toy", storage={"root": "$SHOP"}, ingest=tables, **sections)


@pytest.mark.parametrize("section", ["evaluate", "recommend"])
def test_seen_items_that_nothing_trains_are_not_ranked(section):
    refused = {section: {"filter_seen": False}}
    with pytest.raises(ValidationError, match=f"{section}.filter_seen = false ranks items"):
        _config(train=_UNSEEN, **refused)
    assert not getattr(_config(**refused), section).filter_seen
    assert _config(train=_UNSEEN).evaluate.filter_seen
