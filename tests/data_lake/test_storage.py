import pytest

from data_lake.storage import (
    _s3_arguments,
    delete_file,
    is_local,
    list_folder,
    open_file,
    write_file,
)


def test_options_of_an_object_store_reach_its_parts_too():
    options = {"AWS_ENDPOINT_URL": "http://minio:9000", "AWS_ACCESS_KEY_ID": "a", "region": "eu"}
    assert _s3_arguments(options) == {
        "access_key": "a",
        "region": "eu",
        "endpoint_override": "minio:9000",
        "scheme": "http",
    }


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_file_is_written_with_its_folders_listed_read_and_deleted(tmp_path, scheme):
    uri = f"{scheme}{tmp_path}/a/b.txt"
    write_file(uri, b"abc")
    assert [found.base_name for found in list_folder(f"{scheme}{tmp_path}")] == ["b.txt"]
    with open_file(uri) as file:
        assert file.read() == b"abc"
    delete_file(uri)
    delete_file(uri)
    assert list_folder(f"{scheme}{tmp_path}/a") == []


def test_only_paths_and_file_uris_are_local():
    assert is_local("/a")
    assert is_local("file:///a")
    assert not is_local("s3://bucket/a")
