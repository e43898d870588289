import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_lake.owners import Owners, as_ids, check_user_ids, read_owners


def mentions(user_id, text):
    return bool(Owners(pa.chunked_array([[text]]), is_text=True).mask([user_id])[0])


@pytest.mark.parametrize(
    "user_id", ["bob", "o'brien", 'say "hi"', "a\\b/c", "é€😀", "a.b+c(d)*", " "]
)
def test_an_id_is_found_however_json_writes_it(user_id):
    row = {"visitor": user_id, "item": "i1"}
    assert mentions(user_id, json.dumps(row))
    assert mentions(user_id, json.dumps(row, ensure_ascii=False))
    assert mentions(user_id, json.dumps(row).replace("/", "\\/").replace("\\u", "\\U"))


@pytest.mark.parametrize(
    "text",
    [
        "bob",
        "1,bob,x",
        "1::bob::3",
        '"bob"',
        "bob_2",
        "x\nbob",
        '{"u": "\\tbob"}',
        "été=bob",
        "ébob",
    ],
)
def test_an_id_is_found_as_a_word(text):
    assert mentions("bob", text)


@pytest.mark.parametrize("text", ["bobby", "1,kebob,2", "Bob", "", "b ob"])
def test_a_part_of_a_word_is_no_mention(text):
    assert not mentions("bob", text)


@pytest.mark.parametrize("text", ['{"u": 42}', "42,i1", "042", "+42", "42.0,i1", "42.000", '"42"'])
def test_a_number_is_found_however_it_is_written(text):
    assert mentions("42", text)


@pytest.mark.parametrize("text", ["142", "420", "4.2", "x42", "u42"])
def test_another_number_is_no_mention(text):
    assert not mentions("42", text)


def test_a_doubled_quote_of_csv_is_one():
    assert mentions('a"b', '1,"a""b",2')


def test_a_missing_text_mentions_nobody():
    owners = Owners(pa.chunked_array([pa.array(["bob", None])]), is_text=True)
    assert owners.mask(["bob"]).tolist() == [True, False]


def test_hundreds_of_long_ids_are_looked_for_at_once():
    ids = [f"<{n:03d}>" + "ü'" * 30 for n in range(300)]
    owners = Owners(pa.chunked_array([[f"x {ids[299]} y", "z"]]), is_text=True)
    assert owners.mask(ids).tolist() == [True, False]
    assert owners.among(ids) == [ids[299]]


@pytest.mark.parametrize("kind", [pa.string(), pa.string_view(), pa.large_string()])
def test_text_ids_are_compared_as_a_whole(kind):
    ids = pa.array(["bob", "bob ", "Bob", "o'brien"], kind)
    written = io.BytesIO()
    pq.write_table(pa.table({"item_id": [1] * 4, "user_id": ids}), written)
    owners = read_owners(written)
    assert owners.mask(["bob", "nobody"]).tolist() == [True, False, False, False]
    assert owners.among(["nobody", "o'brien", "bob"]) == ["o'brien", "bob"]


def test_a_file_without_users_is_nobodys():
    written = io.BytesIO()
    pq.write_table(pa.table({"item_id": [1, 2]}), written)
    assert read_owners(written).among(["1"]) == []


def test_ids_are_checked_and_come_once():
    assert check_user_ids(["7", " +07 ", "-1"], "int64") == ("7", "-1")
    assert check_user_ids(["07", "7 ", "o'brien"], "string") == ("07", "7", "o'brien")
    assert as_ids(["7"], pa.int64()).to_pylist() == [7]


@pytest.mark.parametrize("user_id", ["bob", "1.0", "1_000", "9223372036854775808"])
def test_what_is_no_int64_is_refused(user_id):
    with pytest.raises(ValueError, match=f"user_id is int64 in this lake, and '{user_id}' is none"):
        check_user_ids([user_id], "int64")


def test_an_empty_id_is_refused():
    with pytest.raises(ValueError, match="An empty text is no user_id; name the users"):
        check_user_ids([" "], "string")
