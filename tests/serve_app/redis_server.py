"""A real Redis for tests: on a Unix socket, without a port, ended by its process id."""

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp

import pytest
import redis

_START_S = 20.0


class RedisServer:
    """May be killed and started again; what it held is gone then, unless it was saved."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.url = f"unix://{folder}/redis.sock"
        self._folder = folder
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = ["redis-server", "--port", "0", "--dir", self._folder, *self._options]
        command += ["--unixsocket", self._folder / "redis.sock", "--save", ""]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        end = time.monotonic() + _START_S
        with redis.Redis.from_url(self.url) as client:
            while True:
                try:
                    client.ping()
                    return
                except redis.ConnectionError:
                    assert time.monotonic() < end, "redis-server did not start"
                    time.sleep(0.02)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def flush(self) -> None:
        with redis.Redis.from_url(self.url) as client:
            client.flushall()


@contextlib.contextmanager
def running_redis(*options: str) -> Iterator[RedisServer]:
    """A server with an empty store. The path of a socket must be short."""
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed")
    folder = Path(mkdtemp(prefix="redis-"))
    server = RedisServer(folder, *options)
    try:
        server.start()
        yield server
    finally:
        server.kill()
        shutil.rmtree(folder)
