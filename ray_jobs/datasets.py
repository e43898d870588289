"""Data sets that the demo can fetch by itself, where there is a network."""

import hashlib
import os
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ray_jobs.errors import JobError
from ray_jobs.sections.storage import expand


@dataclass(frozen=True)
class Download:
    """A zip file on the publisher's site, and the files of it that we read."""

    url: str
    md5: str
    """As the publisher states it."""
    files: tuple[str, ...]
    """Paths inside the archive, which are also those below NEXTITEM_DATA."""


MOVIELENS = Download(
    url="https://files.grouplens.org/datasets/movielens/ml-1m.zip",
    md5="c4d9eecfca2ab87c1945afe126590906",
    files=("ml-1m/ratings.dat", "ml-1m/users.dat", "ml-1m/movies.dat"),
)
_DOWNLOADS = {"ml-1m": MOVIELENS}


def ensure_dataset(name: str) -> None:
    """Finds a data set below NEXTITEM_DATA, or downloads it to `$NEXTITEM_HOME/data`.

    Raises: JobError when it can be neither found nor downloaded.
    """
    download = _DOWNLOADS.get(name)
    if download is None:
        return
    expand("")  # sets the defaults of both variables
    found = os.environ.get("NEXTITEM_DATA")
    if found and all((Path(found) / file).exists() for file in download.files):
        return
    folder = Path(os.environ["NEXTITEM_HOME"]) / "data"
    fetch(download, folder)
    os.environ["NEXTITEM_DATA"] = str(folder)


def fetch(download: Download, folder: Path) -> None:
    """Downloads, verifies and unpacks; does nothing when the files lie there already.

    Raises: JobError when the site cannot be reached or the bytes are not the published ones.
    """
    if all((folder / file).exists() for file in download.files):
        return
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / Path(download.url).name
    try:
        with urllib.request.urlopen(download.url, timeout=60) as response:
            content = response.read()
    except (urllib.error.URLError, TimeoutError) as error:
        raise JobError(
            f"{download.files[0]} is not below NEXTITEM_DATA and {download.url} cannot be reached "
            f"({error}); download it elsewhere and set NEXTITEM_DATA to the folder above ml-1m."
        ) from None
    digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if digest != download.md5:
        raise JobError(
            f"{download.url} has the md5 {digest}, not the published {download.md5}; "
            "try again later."
        )
    archive.write_bytes(content)
    with zipfile.ZipFile(archive) as zipped:
        for file in download.files:
            zipped.extract(file, folder)
    archive.unlink()
