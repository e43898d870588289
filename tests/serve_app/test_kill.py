"""The service is killed again and again: what it acknowledged comes into the lake, once."""

import itertools
import random
import select
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import pyarrow.parquet as pq
import pytest

from data_lake.tables import open_table, read_table
from ray_jobs import ingest
from ray_jobs.config import PipelineConfig

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
NUM_KILLS = 4
NUM_CLIENTS = 3


class Service:
    """The process that serves; one at a time."""

    def __init__(self, registry, folder):
        self._command = [sys.executable, "-m", "tests.serve_app.serving_process", registry, folder]
        self.url = None

    def start(self):
        self._process = subprocess.Popen(self._command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        ready, _, _ = select.select([self._process.stdout], [], [], 120)
        assert ready, "the service did not start"
        self.url = f"http://127.0.0.1:{int(self._process.stdout.readline())}"

    def kill(self):
        self._process.kill()
        self._end()

    def stop(self):
        self._process.terminate()
        self._end()

    def _end(self):
        self._process.wait(60)
        self._process.stdout.close()


class Shopper(threading.Thread):
    """Posts events until it is told to stop; what was not acknowledged is posted again."""

    def __init__(self, name, service):
        super().__init__(name=name)
        self._service = service
        self._is_over = threading.Event()
        self.acknowledged = []

    def run(self):
        for number in itertools.count():
            if self._is_over.is_set():
                return
            batch = [self._event(number, part) for part in range(number % 4 + 1)]
            self._post_until_taken(batch)

    def end(self):
        self._is_over.set()
        self.join()

    def _event(self, number, part):
        return {
            "event_id": f"{self.name}-{number}-{part}",
            "user_id": f"{self.name}-{number % 7}",
            "item_id": number,
            "timestamp": time.time(),
        }

    def _post_until_taken(self, batch):
        while not self._is_over.is_set():
            try:
                answer = httpx.post(f"{self._service.url}/v1/events", json={"events": batch})
            except httpx.TransportError:
                time.sleep(0.05)
                continue
            assert answer.status_code == 202, answer.text
            assert answer.json()["rejected"] == 0
            self.acknowledged += [event["event_id"] for event in batch]
            return


def landed_ids(folder):
    files = (folder / "landing").glob("[!.]*")
    return [i for file in files for i in pq.read_table(file)["event_id"].to_pylist()]


def test_killed_at_any_point_nothing_is_lost_or_doubled(registry, tmp_path, ray_cluster):
    moments = random.Random(7)
    service = Service(registry, tmp_path)
    service.start()
    shoppers = [Shopper(f"shopper{number}", service) for number in range(NUM_CLIENTS)]
    for shopper in shoppers:
        shopper.start()
    for _ in range(NUM_KILLS):
        time.sleep(moments.uniform(0.5, 1.5))
        service.kill()
        service.start()
    time.sleep(0.5)
    for shopper in shoppers:
        shopper.end()
    service.stop()

    acknowledged = {event_id for shopper in shoppers for event_id in shopper.acknowledged}
    landed = landed_ids(tmp_path)
    assert len(acknowledged) > 100
    assert acknowledged <= set(landed)

    # The folder would be found without a word; but a configuration has to name some source.
    source = {
        "path": str(tmp_path / "landing"),
        "format": "parquet",
        "columns": {n: n for n in ("event_id", "user_id", "item_id", "event_type", "timestamp")},
    }
    config = {"storage": {"root": str(tmp_path)}, "ingest": {"events": [source]}}
    ingest.run(PipelineConfig(name="toy", **config))
    in_lake = Counter(
        read_table(open_table(str(tmp_path / "lake"), "events"))["event_id"].to_pylist()
    )
    assert acknowledged <= in_lake.keys()
    assert set(in_lake.values()) == {1}
    assert in_lake.keys() == set(landed)
