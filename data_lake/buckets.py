"""Which bucket a user belongs to: a hash that never changes, so that no later job shuffles."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_FNV_OFFSET = np.uint64(0xCBF29CE484222325)
_FNV_PRIME = np.uint64(0x100000001B3)


def hash_ids(ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """64-bit hashes of int64 or string ids, shape `[len(ids)]`, the same on every machine and
    version.

    Integers go through the finaliser of SplitMix64; strings through FNV-1a over their UTF-8 bytes
    and then through the same finaliser. Nulls are an error of the caller.
    """
    if isinstance(ids, pa.ChunkedArray):
        ids = ids.combine_chunks()
    if pa.types.is_integer(ids.type):
        return mix(ids.to_numpy(zero_copy_only=False).astype(np.int64).view(np.uint64))
    return _hash_strings(ids)


def bucket_of(ids: pa.Array | pa.ChunkedArray, num_buckets: int) -> np.ndarray:
    """The bucket of each id, int32 in `0..num_buckets - 1`."""
    return (hash_ids(ids) % np.uint64(num_buckets)).astype(np.int32)


def mix(hashes: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: every bit of the result depends on every bit of the argument."""
    hashes = hashes + np.uint64(0x9E3779B97F4A7C15)
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = hashes ^ (hashes >> np.uint64(31))
    return mixed


def _hash_strings(ids: pa.Array) -> np.ndarray:
    # Each distinct string is hashed once, and all of them together: one pass a byte position.
    encoded = pc.dictionary_encode(ids)
    words = encoded.dictionary.cast(pa.binary())
    offsets = np.frombuffer(words.buffers()[1], np.int32)[
        words.offset : words.offset + len(words) + 1
    ]
    data = words.buffers()[2]
    octets = np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8)
    starts, lengths = offsets[:-1], np.diff(offsets)

    hashes = np.full(len(words), _FNV_OFFSET)
    longest_first = np.argsort(-lengths, kind="stable")
    for position in range(int(lengths.max(initial=0))):
        alive = longest_first[: np.searchsorted(-lengths[longest_first], -position)]
        hashes[alive] = (hashes[alive] ^ octets[starts[alive] + position]) * _FNV_PRIME
    hashed: np.ndarray = mix(hashes)[encoded.indices.to_numpy()]
    return hashed
