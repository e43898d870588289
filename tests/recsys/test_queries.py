import pyarrow as pa
import pytest

from recsys.catalogue import Catalogue
from recsys.context import UNKNOWN, ContextConfig, ContextEncoder
from recsys.filters import ItemIndex
from recsys.queries import Event, Query, RequestContext, encode_queries

INDEX = ItemIndex(Catalogue(pa.table({"item_id": ["a", "b", "c"], "count": [3, 2, 1]})))
ENCODER = ContextEncoder(
    ContextConfig(categorical=("device", "region"), time=()),
    {"device": ("mobile", "desktop"), "region": ("north", "south")},
)
HISTORY = (Event("a", 1, "view", "mobile"), Event("c", 2, "view", "desktop"))


def test_fields_of_the_shops_own_stand_at_the_request():
    queries = [
        Query(HISTORY, RequestContext(3, None, "desktop", own={"region": "south", "else": "1"})),
        Query(HISTORY[:1], RequestContext(3, None, "mobile", own={"region": "moon"})),
        Query(HISTORY[:1], RequestContext(3)),
    ]
    encoded = encode_queries(queries, INDEX, ENCODER, history_len=5)

    assert encoded.request_BF.tolist() == [[2, 2], [1, UNKNOWN], [UNKNOWN, UNKNOWN]]
    # What the events before had is not told.
    assert encoded.context_BLF[0].tolist() == [[1, UNKNOWN], [2, UNKNOWN]]


@pytest.mark.parametrize("history_len", [1, 2])
def test_last_events_are_read(history_len):
    encoded = encode_queries([Query(HISTORY)], INDEX, ENCODER, history_len)

    assert encoded.items_BL.tolist() == [[2, 4][-history_len:]]
