"""Whose rows a file of the lake holds: by `user_id`, or by what the text of a bad row mentions."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_lake.schemas import IdType

UNREADABLE = (pa.ArrowInvalid, OSError)
"""What reading a Parquet file raises that is torn, or still being written."""

_IDS_A_PATTERN = 50
_INT64 = range(-(2**63), 2**63)
_SHORT_ESCAPES = {'"': '"', "\\": "\\", "/": "/", "\n": "n", "\r": "r", "\t": "t"}


@dataclass(frozen=True)
class Owners:
    """The column of a file that tells whose its rows are."""

    column: pa.ChunkedArray
    is_text: bool
    """Whether it is the text of rows in quarantine, which holds ids somewhere."""

    def mask(self, user_ids: Sequence[str]) -> NDArray[np.bool_]:
        """Which rows are about one of the users, `[rows]`."""
        if not self.is_text:
            return _as_mask(pc.is_in(self.column, value_set=as_ids(user_ids, self.column.type)))
        mask = np.zeros(len(self.column), bool)
        for start in range(0, len(user_ids), _IDS_A_PATTERN):
            pattern = mention_pattern(user_ids[start : start + _IDS_A_PATTERN])
            mask |= _as_mask(pc.match_substring_regex(self.column, pattern))
        return mask

    def among(self, user_ids: Sequence[str]) -> list[str]:
        """Those of the users that any row is about."""
        few = replace(self, column=self.column.filter(pa.array(self.mask(user_ids))))
        return [user_id for user_id in user_ids if few.mask([user_id]).any()]


def read_owners(stream: Any) -> Owners:
    """Reads no other column; a file that knows no users has no rows here.

    Raises: one of `UNREADABLE`.
    """
    file = pq.ParquetFile(stream)
    wanted = next((name for name in ("user_id", "raw") if name in file.schema_arrow.names), None)
    if wanted is None:
        return Owners(pa.chunked_array([], pa.string()), is_text=False)
    column = file.read([wanted])[wanted]
    plain = column if pa.types.is_integer(column.type) else column.cast(pa.string())
    return Owners(plain, is_text=wanted == "raw")


def check_user_ids(user_ids: Sequence[str], id_type: IdType) -> tuple[str, ...]:
    """Ids as the lake writes them, each once. Raises: ValueError when one is empty or no int64."""
    return tuple(dict.fromkeys(_checked(user_id.strip(), id_type) for user_id in user_ids))


def as_ids(user_ids: Sequence[str], kind: pa.DataType) -> pa.Array:
    """Ids in the type of a column. Raises: ValueError when one does not fit."""
    if pa.types.is_integer(kind):
        return pa.array(map(int, check_user_ids(user_ids, "int64")), pa.int64())
    return pa.array(user_ids, pa.string())


def mention_pattern(user_ids: Sequence[str]) -> str:
    """A regular expression for text that holds one of the ids between anything but letters and
    digits: in JSON or CSV, escaped or not; of 42 also 042 and 42.0.
    """
    ids = "|".join(map(_spell_id, user_ids))
    # What an escape of JSON ends with is no letter of the text.
    before = r"^|[^0-9A-Za-z]|\\[bfnrt]|\\u[0-9A-Fa-f]{4}"
    return f"(?:{before})(?:{ids})(?:[^0-9A-Za-z]|$)"


def _checked(user_id: str, id_type: IdType) -> str:
    if not user_id:
        raise ValueError("An empty text is no user_id; name the users to forget.")
    if id_type == "string":
        return user_id
    if not re.fullmatch(r"[+-]?[0-9]+", user_id) or int(user_id) not in _INT64:
        raise ValueError(f"user_id is int64 in this lake, and {user_id!r} is none; correct it.")
    return str(int(user_id))


def _spell_id(user_id: str) -> str:
    number = re.fullmatch("(-?)0*([0-9]+)", user_id)
    if number:
        return rf"{number[1]}0*{number[2]}(?:\.0*)?"
    return "".join(map(_spell_character, user_id))


def _spell_character(character: str) -> str:
    """As it is, or as JSON and CSV may escape it."""
    if re.fullmatch("[0-9A-Za-z]", character):
        return character
    units = character.encode("utf-16-be").hex()
    code = "".join(rf"\\u{units[at : at + 4]}" for at in range(0, len(units), 4))
    spellings = [_literal(character), f"(?i:{code})"]
    if character in _SHORT_ESCAPES:
        spellings.append(r"\\" + _literal(_SHORT_ESCAPES[character]))
    if character == '"':
        spellings.append('""')
    return f"(?:{'|'.join(spellings)})"


def _literal(character: str) -> str:
    return rf"\x{ord(character):02x}" if character.isascii() else character


def _as_mask(found: pa.ChunkedArray) -> NDArray[np.bool_]:
    return np.asarray(pc.fill_null(found, False), bool)
