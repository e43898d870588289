"""An object store for tests: as much of S3 as deltalake and Arrow use, in memory, on loopback.

    python -m tests.s3_server

prints its endpoint; `running_store` runs it in a process of its own. It looks at the access key,
not at signatures.
"""

import contextlib
import hashlib
import io
import re
import select
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO
from urllib.parse import parse_qsl, quote, unquote, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

ACCESS_KEY, SECRET_KEY = "tester", "not-a-real-secret"
BUCKET = "shop"
_START_S = 20.0


@contextlib.contextmanager
def running_store(module: str = "tests.s3_server") -> Iterator[dict[str, str]]:
    """A store with one empty bucket; yields the options under which the lake reaches it."""
    command = [sys.executable, "-m", module]
    root = Path(__file__).parents[1]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
        try:
            ready, _, _ = select.select([process.stdout], [], [], _START_S)
            assert ready, f"the object store did not start within {_START_S} s"
            yield options_for(process.stdout.readline().strip())
        finally:
            process.terminate()


def options_for(endpoint: str) -> dict[str, str]:
    """What `[storage.options]` says of a store on this machine."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
    }


class Stored:
    """An object: its bytes, their digest, and when they came."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.etag = f'"{hashlib.md5(content).hexdigest()}"'
        self.modified = datetime.now(UTC)


class RefusedError(Exception):
    """An answer that is an error, as S3 words it."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(status, code)
        self.status, self.code = status, code


class Store:
    """The objects of one bucket by key; each method is one request of S3."""

    def __init__(self) -> None:
        self._objects: dict[str, Stored] = {}
        self._uploads: dict[str, dict[int, bytes]] = {}
        self._lock = threading.Lock()

    def get(self, key: str) -> Stored:
        if key not in self._objects:
            raise RefusedError(404, "NoSuchKey")
        return self._objects[key]

    def put(self, key: str, content: bytes, if_match: str | None, if_none: str | None) -> Stored:
        """Stores an object; what the two conditions say is checked and done in one step."""
        with self._lock:
            there = self._objects.get(key)
            if if_none == "*" and there is not None:
                raise RefusedError(412, "PreconditionFailed")
            if if_match is not None and (there is None or there.etag != if_match):
                raise RefusedError(412, "PreconditionFailed")
            self._objects[key] = Stored(content)
            return self._objects[key]

    def delete(self, *keys: str) -> None:
        for key in keys:
            self._objects.pop(key, None)

    def list(self, query: dict[str, str]) -> str:
        """A page of keys and of common prefixes, in order; the token is the last name seen."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        after = query.get("continuation-token") or query.get("start-after", "")
        size = int(query.get("max-keys", 1000))
        names: dict[str, Stored | None] = {}
        for key, stored in sorted(self._objects.copy().items()):
            if key.startswith(prefix):
                head, cut, _ = key[len(prefix) :].partition(delimiter or "\0")
                is_folder = bool(delimiter and cut)
                names[prefix + head + cut if is_folder else key] = None if is_folder else stored
        page = [name for name in names if name > after][: size + 1]
        return _listing(
            {name: names[name] for name in page[:size]},
            token=page[size - 1] if len(page) > size else None,
            is_quoted=query.get("encoding-type") == "url",
        )

    def begin_upload(self) -> str:
        upload = uuid.uuid4().hex
        self._uploads[upload] = {}
        return upload

    def put_part(self, upload: str, number: int, content: bytes) -> Stored:
        self._uploads[upload][number] = content
        return Stored(content)

    def end_upload(self, upload: str) -> bytes:
        parts = self._uploads.pop(upload)
        return b"".join(parts[number] for number in sorted(parts))


class Handler(BaseHTTPRequestHandler):
    """Requests to objects of the one bucket, in path style."""

    protocol_version = "HTTP/1.1"
    wbufsize = 2**16  # head and body leave together
    store = Store()

    def handle_any(self) -> None:
        try:
            self._handle()
        except RefusedError as error:
            text = f"<Error><Code>{error.code}</Code><Message>{error.code}</Message></Error>"
            self._send(error.status, text)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any

    def log_message(self, *_: object) -> None:
        """Says nothing: nobody reads it."""

    def _handle(self) -> None:
        content = self._read_body()
        path, _, query = self.path.partition("?")
        bucket, _, key = unquote(urlsplit(path).path)[1:].partition("/")
        given = dict(parse_qsl(query, keep_blank_values=True))
        if f"Credential={ACCESS_KEY}/" not in self.headers.get("Authorization", ""):
            raise RefusedError(403, "InvalidAccessKeyId")
        if bucket != BUCKET:
            raise RefusedError(404, "NoSuchBucket")
        getattr(self, f"_{self.command.lower()}")(key, given, content)

    def _get(self, key: str, query: dict[str, str], _: bytes) -> None:
        if not key:
            return self._send(200, self.store.list(query))
        return self._send_object(self.store.get(key))

    def _head(self, key: str, _query: dict[str, str], _: bytes) -> None:
        if not key:
            return self._send(200, "")
        return self._send_object(self.store.get(key))

    def _put(self, key: str, query: dict[str, str], content: bytes) -> None:
        if "uploadId" in query:
            part = self.store.put_part(query["uploadId"], int(query["partNumber"]), content)
            return self._send(200, "", ETag=part.etag)
        source = self.headers.get("x-amz-copy-source")
        if source is not None:
            content = self.store.get(unquote(source).lstrip("/").partition("/")[2]).content
        stored = self._put_checked(key, content)
        text = f"<CopyObjectResult><ETag>{stored.etag}</ETag></CopyObjectResult>" if source else ""
        return self._send(200, text, ETag=stored.etag)

    def _post(self, key: str, query: dict[str, str], content: bytes) -> None:
        if "delete" in query:
            keys = _texts(content, "Key")
            self.store.delete(*(unquote(key) for key in keys))
            deleted = (f"<Deleted><Key>{escape(key)}</Key></Deleted>" for key in keys)
            return self._send(200, f"<DeleteResult>{''.join(deleted)}</DeleteResult>")
        if "uploads" in query:
            inner = f"<UploadId>{self.store.begin_upload()}</UploadId>"
            tag = "InitiateMultipartUploadResult"
        else:
            stored = self._put_checked(key, self.store.end_upload(query["uploadId"]))
            inner, tag = f"<ETag>{stored.etag}</ETag>", "CompleteMultipartUploadResult"
        names = f"<Bucket>{BUCKET}</Bucket><Key>{escape(key)}</Key>"
        return self._send(200, f"<{tag}>{names}{inner}</{tag}>")

    def _delete(self, key: str, query: dict[str, str], _: bytes) -> None:
        if "uploadId" in query:
            self.store.end_upload(query["uploadId"])
        else:
            self.store.delete(key)
        self._send(204, "")

    def _put_checked(self, key: str, content: bytes) -> Stored:
        conditions = self.headers.get("If-Match"), self.headers.get("If-None-Match")
        return self.store.put(key, content, *conditions)

    def _read_body(self) -> bytes:
        """The content of a request; chunks of HTTP, and S3's own ones within, are put together."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = _join_chunks(self.rfile)
        else:
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        is_stream = self.headers.get("x-amz-content-sha256", "").startswith("STREAMING")
        return _join_chunks(io.BytesIO(content)) if is_stream else content

    def _send_object(self, stored: Stored) -> None:
        size = len(stored.content)
        headers = {
            "ETag": stored.etag,
            "Last-Modified": format_datetime(stored.modified, usegmt=True),
        }
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return self._send(200, stored.content, **headers)
        first, last = wanted.groups()
        start = int(first) if first else max(size - int(last), 0)
        stop = min(int(last) + 1, size) if first and last else size
        if start >= size:
            raise RefusedError(416, "InvalidRange")
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        return self._send(206, stored.content[start:stop], **headers)

    def _send(self, status: int, body: str | bytes, **headers: str) -> None:
        body = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.wfile.flush()


def _join_chunks(stream: BinaryIO) -> bytes:
    """Chunks up to the empty one; the line before each is its size in hex. Trailers are skipped."""
    chunks = []
    while size := int(stream.readline().partition(b";")[0], 16):
        chunks.append(stream.read(size))
        stream.readline()
    while stream.readline().strip():
        continue
    return b"".join(chunks)


def _listing(names: dict[str, Stored | None], token: str | None, is_quoted: bool) -> str:
    def shown(name: str) -> str:
        return quote(name) if is_quoted else escape(name)

    entries = [
        f"<CommonPrefixes><Prefix>{shown(name)}</Prefix></CommonPrefixes>"
        if stored is None
        else f"<Contents><Key>{shown(name)}</Key><ETag>{escape(stored.etag)}</ETag>"
        f"<Size>{len(stored.content)}</Size>"
        f"<LastModified>{stored.modified:%Y-%m-%dT%H:%M:%S.000Z}</LastModified></Contents>"
        for name, stored in names.items()
    ]
    more = f"<NextContinuationToken>{escape(token)}</NextContinuationToken>" if token else ""
    return (
        f"<ListBucketResult><IsTruncated>{str(bool(token)).lower()}</IsTruncated>{more}"
        f"<KeyCount>{len(names)}</KeyCount>{''.join(entries)}</ListBucketResult>"
    )


def _texts(document: bytes, tag: str) -> list[str]:
    nodes = ElementTree.fromstring(document).iter()
    return [node.text or "" for node in nodes if node.tag.rpartition("}")[2] == tag]


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
