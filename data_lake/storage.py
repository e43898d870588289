"""Files behind a path or a URI (`file://`, `s3://`), for what deltalake does not read and write.

The options are those of deltalake: `AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, ...; one set serves
both libraries.
"""

import contextlib
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

Options = Mapping[str, str]

_S3_SCHEMES = ("s3://", "s3a://")
_S3_ARGUMENTS = {
    "access_key_id": "access_key",
    "secret_access_key": "secret_key",
    "session_token": "session_token",
    "region": "region",
    "endpoint_url": "endpoint_override",
    "endpoint": "endpoint_override",
}


def locate(uri: str, options: Options | None = None) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a path or URI, and the path within it."""
    if "://" not in uri:
        return pafs.LocalFileSystem(), uri
    if uri.startswith(_S3_SCHEMES) and options:
        return pafs.S3FileSystem(**_s3_arguments(options)), uri.partition("://")[2]
    filesystem, path = pafs.FileSystem.from_uri(uri)
    return filesystem, path


def is_local(uri: str) -> bool:
    """Whether a path or URI lies on this machine's own filesystem."""
    return "://" not in uri or uri.startswith("file://")


def open_file(uri: str, options: Options | None = None) -> Any:
    """A file, open for reading bytes anywhere in it."""
    filesystem, path = locate(uri, options)
    return filesystem.open_input_file(path)


def write_file(uri: str, content: bytes | pa.Buffer, options: Options | None = None) -> None:
    """Writes a file whole; the folders above it are made where the store has folders."""
    filesystem, path = locate(uri, options)
    if isinstance(filesystem, pafs.LocalFileSystem):
        filesystem.create_dir(path.rpartition("/")[0], recursive=True)
    with filesystem.open_output_stream(path) as stream:
        stream.write(content)


def delete_file(uri: str, options: Options | None = None) -> None:
    """Deletes a file; one that is not there is no error."""
    filesystem, path = locate(uri, options)
    with contextlib.suppress(FileNotFoundError):
        filesystem.delete_file(path)


def list_folder(uri: str, options: Options | None = None) -> list[pafs.FileInfo]:
    """All files below a folder, at any depth; none if it does not exist."""
    filesystem, path = locate(uri, options)
    below = pafs.FileSelector(path, recursive=True, allow_not_found=True)
    return [found for found in filesystem.get_file_info(below) if found.is_file]


def _s3_arguments(options: Options) -> dict[str, Any]:
    """Options as deltalake takes them, as pyarrow takes them."""
    given = {name.lower().removeprefix("aws_"): value for name, value in options.items()}
    arguments = {ours: given[theirs] for theirs, ours in _S3_ARGUMENTS.items() if theirs in given}
    if "endpoint_override" in arguments:
        scheme, _, host = arguments["endpoint_override"].rpartition("://")
        arguments |= {"scheme": scheme or "https", "endpoint_override": host}
    return arguments
