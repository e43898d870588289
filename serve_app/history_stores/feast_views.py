"""The feature views of the Feast repository `cluster/feast`: recent events of a visitor as arrays.

A visitor is `user:<id>` or `session:<id>`. Feast's arrays hold no nulls, so "" stands for what is
unknown, and -1 for an unknown time; an item id is JSON, which tells 7 from "7".
"""

from datetime import timedelta

from feast import Entity, FeatureView, Field, FileSource, PushSource, ValueType
from feast.types import Array, Int64, String

visitor = Entity(name="visitor", join_keys=["visitor_id"], value_type=ValueType.STRING)

_TTL = timedelta(days=90)
_EVENTS = [
    Field(name="item_ids", dtype=Array(String)),
    Field(name="event_types", dtype=Array(String)),
    Field(name="timestamps_us", dtype=Array(Int64)),
    Field(name="devices", dtype=Array(String)),
]


def _view(name: str, fields: list[Field], ttl: timedelta = timedelta(0)) -> FeatureView:
    """Views are pushed to; the file stands for a batch source, which Feast asks for.

    Args:
        ttl: after so long without a push it is as if nothing had been pushed; 0 for never.
    """
    file = FileSource(
        name=f"{name}_file", path=f"data/{name}.parquet", timestamp_field="event_timestamp"
    )
    source = PushSource(name=push_source(name), batch_source=file)
    return FeatureView(name=name, entities=[visitor], ttl=ttl, schema=fields, source=source)


def push_source(view: str) -> str:
    """The name under which a view is pushed to."""
    return f"{view}_push"


recent_events = _view(
    "recent_events",
    [
        *_EVENTS,
        Field(name="event_ids", dtype=Array(String)),
        Field(name="positions", dtype=Array(Int64)),
        Field(name="user_ids", dtype=Array(String)),
        Field(name="session_ids", dtype=Array(String)),
    ],
    _TTL,
)
seeded_events = _view("seeded_events", _EVENTS, _TTL)
erasures = _view("erasures", [Field(name="until_us", dtype=Int64)])
progress = _view("progress", [Field(name="position", dtype=Int64)])
"""Of logs that were pushed (`log:<name>`) and of seeds that were loaded (`seed:<version>`)."""
