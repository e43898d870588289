"""What is refused before anything is counted."""

import pyarrow as pa
import pytest

from ray_jobs.drift.axes import DAY_US, Periods
from ray_jobs.drift.gather import _refuse_empty_reference
from ray_jobs.errors import JobError

START_US = 20_367 * DAY_US
"""2025-10-06."""


def test_a_reference_period_without_events_is_one_sentence():
    found = {"item_id": ["i1"], "first_us": [0], "even": [4], "odd": [0], "reference": [0]}
    counted = pa.table(found)
    periods = Periods(START_US, START_US + 7 * DAY_US, 2, 7)
    with pytest.raises(JobError, match=r"reference period, 2025-09-22.* to 2025-10-06.*; set"):
        _refuse_empty_reference(counted, periods)
