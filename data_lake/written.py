"""Part files that no commit knows yet; they are deleted when the work that wrote them fails."""

import logging
from collections.abc import Iterable, Mapping
from types import TracebackType

import pyarrow as pa

from data_lake.errors import TableError
from data_lake.storage import delete_file
from data_lake.tables import Part, table_uri, write_part

log = logging.getLogger(__name__)


class Written:
    """A context that deletes the parts it was told of, should it end with an exception.

    As best it can: what cannot be deleted is logged, for no reader sees it anyway.
    """

    def __init__(self, lake_uri: str, options: Mapping[str, str]) -> None:
        self.lake_uri = lake_uri
        self.options = options
        self._uris: set[str] = set()

    def add(self, name: str, *parts: Part | None) -> None:
        """Parts of the table `name`; None is none."""
        self._uris.update(self._uris_of(name, parts))

    def forget(self, name: str, parts: Iterable[Part]) -> None:
        """Parts that were committed stay, whatever comes."""
        self._uris.difference_update(self._uris_of(name, parts))

    def delete(self, name: str, parts: Iterable[Part]) -> None:
        """Parts that are of no use any more."""
        uris = self._uris_of(name, parts)
        self._uris -= uris
        self._delete(uris)

    def __enter__(self) -> "Written":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._delete(self._uris)

    def _uris_of(self, name: str, parts: Iterable[Part | None]) -> set[str]:
        root = table_uri(self.lake_uri, name)
        return {f"{root}/{part.path}" for part in parts if part is not None}

    def _delete(self, uris: Iterable[str]) -> None:
        for uri in uris:
            try:
                delete_file(uri, self.options)
            except OSError as error:
                log.warning("%s is of no use, but cannot be deleted: %s", uri, error)


def write_rows(
    lake_uri: str,
    name: str,
    rows: pa.Table,
    bucket: int | None = None,
    options: Mapping[str, str] | None = None,
) -> Part:
    """`write_part`. Raises: TableError when the store does not take the file."""
    try:
        return write_part(lake_uri, name, rows, bucket, options)
    except OSError as error:
        raise TableError(
            f"{table_uri(lake_uri, name)} cannot be written ({error}); give the job room and the "
            "right to write there, and run it again."
        ) from error
