"""moto's imitation of S3 on a free port of the loopback, for tests; `python -m tests.moto_server`
prints its endpoint and serves until it is ended.

It knows what clients send and get in detail, but lets every key in; `tests.s3_server` refuses.
"""

import signal
import urllib.request

from moto.server import ThreadedMotoServer

from tests.s3_server import BUCKET


def main() -> None:
    """Serves one empty bucket."""
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    make_bucket = urllib.request.Request(f"http://{host}:{port}/{BUCKET}", method="PUT")
    urllib.request.urlopen(make_bucket, timeout=10).close()
    print(f"http://{host}:{port}", flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
