"""The benchmark of large catalogues, made small."""

import json
import re

from benchmarks.large_catalogues import PARTS, Case, render

_CASE = Case(items=200, dim=16, length=4)


def test_codes_take_a_byte_each_and_a_full_table_four_a_number():
    codes, full = (PARTS[part](_CASE)["table_bytes"] for part in ("codes", "full"))
    assert full == 202 * 16 * 4
    assert codes == 202 * 4 + 256 * 16 * 4


def test_every_part_is_in_the_report():
    found = {part: measure(_CASE) for part, measure in PARTS.items()}
    text = render(_CASE, json.loads(json.dumps(found)))
    assert "| in full | 12,928 |" in text
    assert "| 4 codes an item | 17,192 |" in text
    assert "From 20,000 events of 1,000 users:" in text
    for name in ("learning the codes takes", "a spectral start of width 16"):
        assert re.search(rf"{name} \d+ s, the process holding ", text)
