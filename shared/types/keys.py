"""Page keys: what they name, where their stripes are encoded, and where their shards go. Ids travel as int32 bytes."""

import array
import hashlib
import sys
from collections.abc import Iterable, Sequence

PageKey = bytes
"""A page's name: the engine's hash of all tokens up to the page's end, and of the KV cache group where it has several.

PAGE_KEY_BYTES with the embedded engine, up to MAX_KEY_BYTES with others.
"""
PAGE_KEY_BYTES = 16
MAX_KEY_BYTES = 32
OPEN_KEY: PageKey = bytes(PAGE_KEY_BYTES)
"""In place of the key of a page that is not sealed."""
ROUND_BYTES = 8 << 20


def round_pages(page_bytes: int, round_bytes: int = ROUND_BYTES) -> int:
    """Pages that the ranks exchange in one round; memory for what arrives is (k - 1) times that at most."""
    return max(1, round_bytes // page_bytes)


def pack_ids(ids: Iterable[int]) -> bytes:
    """Token or page ids as little-endian int32 bytes."""
    packed = array.array("i", ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def id_array(data: bytes) -> "array.array[int]":
    """The inverse of `pack_ids`, four bytes an id. Raises ValueError if the length is not a multiple of four."""
    unpacked = array.array("i")
    unpacked.frombytes(data)
    if sys.byteorder == "big":
        unpacked.byteswap()
    return unpacked


def unpack_ids(data: bytes) -> list[int]:
    """The inverse of `pack_ids`, as a list. Raises ValueError if the length is not a multiple of four."""
    return id_array(data).tolist()


def is_page_key(value: object) -> bool:
    """Whether this can be a page's name."""
    return type(value) is bytes and PAGE_KEY_BYTES <= len(value) <= MAX_KEY_BYTES


def pack_keys(keys: Iterable[PageKey]) -> bytes:
    """Page keys as bytes, PAGE_KEY_BYTES each."""
    return b"".join(keys)


def unpack_keys(data: bytes) -> list[PageKey]:
    """The inverse of `pack_keys`. Raises ValueError if the length is not a multiple of PAGE_KEY_BYTES."""
    if len(data) % PAGE_KEY_BYTES:
        raise ValueError(f"{len(data)} bytes are not a whole number of page keys")
    return [data[start : start + PAGE_KEY_BYTES] for start in range(0, len(data), PAGE_KEY_BYTES)]


def root_key(model_fingerprint: str, cache_salt: str) -> PageKey:
    """The parent of every sequence's first page key: differs by model and by cache salt."""
    text = f"{len(model_fingerprint)}:{model_fingerprint}{cache_salt}"
    return hashlib.blake2b(text.encode(), digest_size=PAGE_KEY_BYTES).digest()


def next_page_key(parent: PageKey, tokens: Sequence[int]) -> PageKey:
    """The key of the page that holds `tokens` and follows the page named `parent`."""
    return hashlib.blake2b(parent + pack_ids(tokens), digest_size=PAGE_KEY_BYTES).digest()


def encoding_rank(key: PageKey, size: int) -> int:
    """The rank that encodes the stripe `key`: a hash spreads stripes evenly over the group."""
    return int.from_bytes(key[:8], "little") % size


def place_shards(key: PageKey, shards: int, stores: Sequence[str]) -> list[str]:
    """The stores for parity shards 0..shards-1 of a stripe, by rendezvous hashing over the stores alive.

    Different shards go to different stores as far as there are enough; then stores are used again in the same order.
    """
    ranked = sorted(stores, key=lambda store: hashlib.blake2b(key + store.encode(), digest_size=8).digest())
    return [ranked[shard % len(ranked)] for shard in range(shards)]
