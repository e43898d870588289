"""A Redis of a test's own, in a process of its own, over a Unix socket."""

import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
import redis


class RedisServer:
    """Starts, dies and starts again where it was, with what it had on disk."""

    def __init__(self, folder):
        # The path of a Unix socket has at most 107 bytes.
        self._sockets = tempfile.TemporaryDirectory(prefix="redis")
        self._socket = Path(self._sockets.name) / "redis.sock"
        self._folder = folder
        self._process = None
        self.url = f"unix://{self._socket}"
        self.start()

    def start(self):
        program = shutil.which("redis-server")
        if program is None:
            pytest.skip("redis-server is not installed")
        command = [program, "--port", "0", "--unixsocket", str(self._socket)]
        command += ["--dir", str(self._folder), "--appendonly", "yes", "--appendfsync", "always"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        client = redis.Redis.from_url(self.url)
        for _ in range(1000):
            try:
                client.ping()
                break
            except redis.ConnectionError:
                time.sleep(0.01)
        else:
            pytest.fail("redis-server does not answer")
        client.close()

    def kill(self):
        self._process.kill()
        self._process.wait()

    def stop(self):
        self.kill()
        self._sockets.cleanup()
