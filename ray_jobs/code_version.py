"""Which code a run or a version was made with, as a digest: it needs no repository."""

from pathlib import Path

from recsys.lineage import digest_code

_PACKAGES = ("data_lake", "ray_jobs", "recsys")


def code_version() -> str:
    """sha256 over the sources that are imported here."""
    return digest_code(Path(__file__).parents[1], _PACKAGES)
