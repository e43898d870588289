"""How far the lake's events reach, read from the log alone."""

from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable


def newest_event(events: DeltaTable) -> datetime | None:
    """Time of the newest event of a table, by the statistics of its files; None where no file has
    any.
    """
    files = pa.table(events.get_add_actions(flatten=True))
    if "max.timestamp" not in files.column_names:
        return None
    newest: datetime | None = pc.max(files["max.timestamp"]).as_py()
    return newest if newest is None or newest.tzinfo else newest.replace(tzinfo=UTC)
