"""A checksum of an array that does not depend on how the array is spread.

Every 32-bit word is mixed with its position and the results are added modulo 2^64:

    checksum = sum over i of mix(word[i], i)

`mix` is one-to-one in the word, so one changed word always changes the sum; and because
a sum has no order, every process adds up the shards it holds, and the total is that of
the whole array on one device.
"""

import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.core._types import PyTree

MODULUS = 2**64
_CHUNK = 2**16


def local_checksum(leaf: PyTree) -> int:
    """The part of the checksum that this process can see; the whole of most arrays.

    Args:
        leaf: array of numpy or JAX, typed keys included.

    Returns:
        The sum over the shards at this process, each index of the array once in all.
    """
    if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    total = 0
    for block, starts in _blocks(leaf):
        total += _block_checksum(np.asarray(block, order="C"), starts, leaf.shape)
    return total % MODULUS


def _blocks(leaf: PyTree) -> Iterator[tuple[np.ndarray, tuple[int, ...]]]:
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        yield np.asarray(leaf), (0,) * np.ndim(leaf)
        return
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            yield np.asarray(shard.data), tuple(s.start or 0 for s in shard.index)


def _block_checksum(
    block: np.ndarray, starts: tuple[int, ...], shape: tuple[int, ...]
) -> int:
    if not block.size:
        return 0
    size = block.dtype.itemsize
    width = next(w for w in (4, 2, 1) if size % w == 0)
    per_entry = size // width
    words = block.reshape(-1).view(f"u{width}")
    total = 0
    for begin in range(0, words.size, _CHUNK):
        chunk = words[begin : begin + _CHUNK].astype(np.uint32)
        at = np.arange(begin, begin + chunk.size, dtype=np.int64)
        if block.shape != shape:
            entry, word = np.divmod(at, per_entry)
            at = _global(entry, block.shape, starts, shape) * per_entry + word
        total += int(_mixed(chunk, at).sum(dtype=np.uint64))
    return total


def _global(
    entry: np.ndarray,
    block: tuple[int, ...],
    starts: tuple[int, ...],
    shape: tuple[int, ...],
) -> np.ndarray:
    """Flat positions in a block -> flat positions in the array."""
    places = np.unravel_index(entry, block)
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    moved = [
        (place + start) * stride
        for place, start, stride in zip(places, starts, strides, strict=True)
    ]
    return np.asarray(np.sum(moved, axis=0, dtype=np.int64))


def _mixed(words: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The finaliser of MurmurHash3 over word and position; one-to-one in the word."""
    high = (at >> 32).astype(np.uint32) * np.uint32(0x27D4EB2F)
    words ^= at.astype(np.uint32) * np.uint32(0x9E3779B1) ^ high
    words ^= words >> 16
    words *= np.uint32(0x85EBCA6B)
    words ^= words >> 13
    words *= np.uint32(0xC2B2AE35)
    words ^= words >> 16
    return words
