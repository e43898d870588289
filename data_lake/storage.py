"""Files behind a path or a URI (`file://`, `s3://`), for what deltalake does not read and write.

The options are those of deltalake: `AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, ...; one set serves
both libraries.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
from deltalake.exceptions import DeltaError

from data_lake.errors import LakeError

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
_PATIENCE = {
    "connect_timeout": "5s",
    "timeout": "30s",
    "max_retries": "5",
    "retry_timeout": "30s",
}
"""Of deltalake with an object store, where the options say nothing else: of a request, and of all
its repetitions. By itself it would go on for three minutes; Arrow gives up after ten seconds."""
_SECRETS = ("key", "token", "password")


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


def delta_options(uri: str, options: Options | None = None) -> dict[str, str]:
    """The options for deltalake, which is kept from trying for ever."""
    return dict(options or {}) if is_local(uri) else {**_PATIENCE, **(options or {})}


@contextlib.contextmanager
def reaching(uri: str, options: Options | None = None) -> Iterator[None]:
    """Makes one sentence of whatever goes wrong with an object store, without its secrets.

    Local files keep their errors, and so does a file that is not there. Raises: LakeError.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, DeltaError) as error:
        # deltalake has no class of its own for a store that fails in the middle of a commit.
        if is_local(uri) or (isinstance(error, DeltaError) and "object store" not in str(error)):
            raise
        said = f"{uri} cannot be reached ({_reason(error)}); check"
        raise LakeError(
            f"{_without_secrets(said, options)} the bucket, storage.options and the network."
        ) from error


def open_file(uri: str, options: Options | None = None) -> Any:
    """A file, open for reading bytes anywhere in it."""
    with reaching(uri, options):
        filesystem, path = locate(uri, options)
        return filesystem.open_input_file(path)


def write_file(uri: str, content: bytes | pa.Buffer, options: Options | None = None) -> None:
    """Writes a file whole or not at all, and the folders above it where a store has folders."""
    with reaching(uri, options):
        filesystem, path = locate(uri, options)
        if isinstance(filesystem, pafs.LocalFileSystem):
            filesystem.create_dir(path.rpartition("/")[0], recursive=True)
        try:
            with filesystem.open_output_stream(path) as stream:
                stream.write(content)
        except OSError:
            # A disk that is full keeps what fitted.
            with contextlib.suppress(OSError):
                filesystem.delete_file(path)
            raise


def delete_file(uri: str, options: Options | None = None) -> None:
    """Deletes a file; one that is not there is no error."""
    with reaching(uri, options), contextlib.suppress(FileNotFoundError):
        filesystem, path = locate(uri, options)
        filesystem.delete_file(path)


def list_folder(uri: str, options: Options | None = None) -> list[pafs.FileInfo]:
    """All files below a folder, at any depth; none if it does not exist."""
    with reaching(uri, options):
        filesystem, path = locate(uri, options)
        below = pafs.FileSelector(path, recursive=True, allow_not_found=True)
        return [found for found in filesystem.get_file_info(below) if found.is_file]


def _reason(error: Exception) -> str:
    """The last things that an error says: deltalake tells a tree of causes, line by line."""
    # A store answers in XML, of which the code is enough.
    text = re.sub(r"(<\?xml.*?)?<Error>.*?<Code>(\w+)<.*", r"\2", str(error), flags=re.DOTALL)
    plain = re.sub(r"\x1b\[\d+m|\u21b3", "", text)
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    return ": ".join(lines[-2:])


def _without_secrets(text: str, options: Options | None) -> str:
    text = re.sub(r"://[^/@\s]+@", "://***@", text)
    for name, value in (options or {}).items():
        # What is shorter is no secret, and would be found in any word.
        if len(value) >= 4 and any(word in name.lower() for word in _SECRETS):
            text = text.replace(value, "***")
    return text


def _s3_arguments(options: Options) -> dict[str, Any]:
    """Options as deltalake takes them, as pyarrow takes them."""
    given = {name.lower().removeprefix("aws_"): value for name, value in options.items()}
    arguments = {ours: given[theirs] for theirs, ours in _S3_ARGUMENTS.items() if theirs in given}
    if "endpoint_override" in arguments:
        scheme, _, host = arguments["endpoint_override"].rpartition("://")
        arguments |= {"scheme": scheme or "https", "endpoint_override": host}
    return arguments
