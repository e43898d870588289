import pytest

from data_lake.errors import LakeError
from data_lake.storage import (
    _s3_arguments,
    delete_file,
    delta_options,
    is_local,
    list_folder,
    open_file,
    reaching,
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


def test_patience_with_an_object_store_has_an_end_that_options_may_move():
    assert delta_options("/lake", {"a": "b"}) == {"a": "b"}
    assert delta_options("s3://shop/lake")["retry_timeout"] == "30s"
    assert delta_options("s3://shop/lake", {"retry_timeout": "5s"})["retry_timeout"] == "5s"


def fail(uri, message, options=None):
    with pytest.raises(LakeError) as caught, reaching(uri, options):
        raise OSError(message)
    return str(caught.value)


def test_of_a_tree_of_causes_the_last_ones_are_told():
    told = fail(
        "s3://shop/a",
        "Generic S3 error\n  \x1b[31m\u21b3\x1b[0m GET failed\n"
        "    \x1b[31m\u21b3\x1b[0m 403 Forbidden\n"
        '\x1b[31m\u21b3\x1b[0m <?xml version="1.0"?>\n<Error><Code>AccessDenied</Code></Error>\n',
    )
    assert told == (
        "s3://shop/a cannot be reached (403 Forbidden: AccessDenied); check the bucket, "
        "storage.options and the network."
    )


def test_secrets_are_not_told():
    options = {"AWS_SECRET_ACCESS_KEY": "hush", "session_token": "quiet", "region": "eu"}
    told = fail("s3://me:mine@shop/a", "hush and quiet in eu", options)
    assert told.startswith("s3://***@shop/a cannot be reached (*** and *** in eu)")


def test_errors_of_local_files_and_absent_files_stay_as_they_are():
    with pytest.raises(PermissionError), reaching("/a"):
        raise PermissionError("/a")
    with pytest.raises(FileNotFoundError), reaching("s3://shop/a"):
        raise FileNotFoundError("a")
