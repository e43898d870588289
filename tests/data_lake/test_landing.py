import os
from datetime import UTC, datetime, timedelta

from data_lake.landing import delete_landed, has_landed, landing_source
from data_lake.sources import list_files


def test_files_that_are_still_written_have_not_landed(tmp_path):
    landing = tmp_path / "landing"
    assert not has_landed(str(landing))
    landing.mkdir()
    (landing / ".a.parquet").touch()
    assert not has_landed(str(landing))
    (landing / "a.parquet").touch()
    assert has_landed(str(landing))
    assert list_files(landing_source(str(landing)), str(landing)) == [str(landing / "a.parquet")]


def test_only_old_files_of_those_named_are_deleted(tmp_path):
    for name in ("old", "kept", "new"):
        (tmp_path / name).touch()
    for name in ("old", "kept"):
        os.utime(tmp_path / name, (0, 0))
    paths = [str(tmp_path / "old"), str(tmp_path / "new")]

    yesterday = datetime.now(UTC) - timedelta(days=1)

    assert delete_landed(str(tmp_path), paths, yesterday) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "new"]
