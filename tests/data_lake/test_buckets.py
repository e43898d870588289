import numpy as np
import pyarrow as pa
import pytest

from data_lake.buckets import bucket_of, hash_ids, mix

MASK = 2**64 - 1


def splitmix(number):
    """The finaliser of SplitMix64 in plain integers."""
    number = (number + 0x9E3779B97F4A7C15) & MASK
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & MASK
    return number ^ (number >> 31)


def fnv(text):
    """FNV-1a in plain integers."""
    hashed = 0xCBF29CE484222325
    for octet in text.encode():
        hashed = ((hashed ^ octet) * 0x100000001B3) & MASK
    return hashed


@pytest.mark.parametrize("number", [0, 1, 42, -1, 2**63 - 1, -(2**63)])
def test_integers_hash_like_splitmix64(number):
    assert int(hash_ids(pa.array([number]))[0]) == splitmix(number & MASK)


@pytest.mark.parametrize("text", ["", "a", "user-17", "käse", "x" * 300])
def test_strings_hash_like_fnv_1a_and_splitmix64(text):
    assert int(hash_ids(pa.array([text]))[0]) == splitmix(fnv(text))


def test_splitmix64_gives_its_published_first_number():
    # The generator with seed 0 begins with this one (Vigna's reference code).
    assert int(mix(np.zeros(1, np.uint64))[0]) == 0xE220A8397B1DCDAF


def test_a_slice_and_chunks_hash_like_the_whole():
    ids = pa.array(["a", "bb", "a", "", "ccc"])
    whole = hash_ids(ids)
    assert np.array_equal(hash_ids(ids.slice(1, 3)), whole[1:4])
    assert np.array_equal(hash_ids(pa.chunked_array([ids[:2], ids[2:]])), whole)


def test_strings_of_equal_text_share_a_bucket():
    buckets = bucket_of(pa.array(["a", "b", "a"]), 1000)
    assert buckets[0] == buckets[2] != buckets[1]


def test_users_spread_evenly_over_buckets():
    counts = np.bincount(bucket_of(pa.array(np.arange(160_000)), 16), minlength=16)
    # 10,000 each, give or take five standard deviations of a binomial (97).
    assert counts.min() > 9_500
    assert counts.max() < 10_500


def test_no_ids_have_no_buckets():
    assert len(bucket_of(pa.array([], pa.int64()), 4)) == 0
    assert len(bucket_of(pa.array([], pa.string()), 4)) == 0
