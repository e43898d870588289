"""Fetching a data set: from a server on the loopback that plays the publisher."""

import functools
import hashlib
import http.server
import threading
import zipfile

import pytest

from ray_jobs.datasets import MOVIELENS, Download, ensure_dataset, fetch
from ray_jobs.errors import JobError


@pytest.fixture
def site(tmp_path):
    """A folder that is served, and its address."""
    folder = tmp_path / "site"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def _publish(folder, text="1::2::3::4\n"):
    with zipfile.ZipFile(folder / "set.zip", "w") as archive:
        archive.writestr("set/ratings.dat", text)
    return hashlib.md5((folder / "set.zip").read_bytes(), usedforsecurity=False).hexdigest()


def test_a_data_set_is_downloaded_verified_and_unpacked_once(site, tmp_path):
    folder, address = site
    download = Download(f"{address}/set.zip", _publish(folder), ("set/ratings.dat",))
    fetch(download, tmp_path / "data")
    assert (tmp_path / "data" / "set" / "ratings.dat").read_text() == "1::2::3::4\n"
    (folder / "set.zip").unlink()
    fetch(download, tmp_path / "data")  # it is there already


def test_other_bytes_than_the_published_ones_are_refused(site, tmp_path):
    folder, address = site
    _publish(folder)
    download = Download(f"{address}/set.zip", "0" * 32, ("set/ratings.dat",))
    with pytest.raises(JobError, match="not the published 00000000"):
        fetch(download, tmp_path / "data")
    assert not list((tmp_path / "data").glob("**/*.dat"))


def test_a_site_that_cannot_be_reached_says_what_to_do(site, tmp_path):
    _, address = site
    download = Download(f"{address}/nothing.zip", "0" * 32, ("set/ratings.dat",))
    with pytest.raises(JobError, match=r"cannot be reached .*set NEXTITEM_DATA"):
        fetch(download, tmp_path / "data")


def test_files_below_nextitem_data_are_taken_as_they_are(tmp_path, monkeypatch):
    for file in MOVIELENS.files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    monkeypatch.setenv("NEXTITEM_DATA", str(tmp_path))
    ensure_dataset("ml-1m")


def test_a_data_set_without_a_publisher_is_left_to_ingest(monkeypatch, tmp_path):
    monkeypatch.setenv("NEXTITEM_DATA", str(tmp_path))
    ensure_dataset("globo")
    assert not list(tmp_path.iterdir())
