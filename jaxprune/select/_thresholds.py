"""The lowest entries of several arrays, exactly: traced, sharded, without a sort.

A float maps to an unsigned integer that sorts alike. A threshold is found from the
highest bits down, two bits per pass, by counting what lies below three candidates. Of
equal entries the earlier one stays: the later leaf loses first, and in a leaf the later
position, which is found in the same way. Nothing but counts travels between devices.

Counts of one leaf are uint32. Their sum over the leaves may be larger, and is a pair
(high, low) to base 2**16.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from jaxprune.core._types import Array, Scalar

_MOST = np.uint32(0xFFFFFFFF)
_zip = functools.partial(zip, strict=True)


class Wide(NamedTuple):
    """The number ``high * 2**16 + low``, with ``low < 2**16``."""

    high: Array
    low: Array


def wide(count: int | jax.Array) -> Wide:
    """A static number, or a traced one below ``2**32``.

    Example:
        >>> [int(part) for part in wide(2**40 + 3)]
        [16777216, 3]
    """
    return Wide(jnp.uint32(count >> 16), jnp.uint32(count & 0xFFFF))


def wide_share(share: Scalar, total: int) -> Wide:
    """``round(share * total)`` for a traced share, as exact as float32 is."""
    product = jnp.asarray(share, jnp.float32) * total
    # The product may exceed 2^32, which no uint32 holds: the halves are converted
    # apart.
    high = jnp.floor(product / 65536)
    low = jnp.round(product - high * 65536).astype(jnp.uint32)
    return Wide(high.astype(jnp.uint32) + (low >> 16), low & 0xFFFF)


def lowest_together(
    leaves: Sequence[Array], count: int | jax.Array | Wide, caps: Sequence[int]
) -> list[Array]:
    """Marks the lowest `count` entries of all leaves; jit-able.

    Args:
        leaves: arrays of floats; NaN counts as the largest number.
        count: how many entries to mark: an integer, which may be traced, or a `Wide`;
            clipped to the sum of `caps`.
        caps: for every leaf, how many of its entries may be marked at most.

    Returns:
        For every leaf an array of bools, True = among the lowest.

    Raises:
        ValueError: if a leaf has ``2**32`` entries or more.

    Example:
        >>> lowest_together([jnp.array([3.0, 1.0]), jnp.array([1.0, 2.0])], 1, [2, 2])
        [Array([False, False], dtype=bool), Array([ True, False], dtype=bool)]
    """
    keys = _keys(leaves)
    limits = jnp.stack([jnp.uint32(cap) for cap in caps])
    wanted = _clipped(count if isinstance(count, Wide) else wide(count), sum(caps))

    def enough(counts: jax.Array) -> Array:
        capped = jnp.minimum(counts, limits[:, None])
        return jnp.broadcast_to(~_less(_sum(capped), wanted), counts.shape)

    bounds = _smallest(keys, enough, keys[0].dtype)
    return _mark(keys, *_losses(keys, bounds, limits, wanted))


def lowest_each(leaves: Sequence[Array], counts: Sequence[Array]) -> list[Array]:
    """Marks the lowest entries of every leaf, ranked alone; jit-able.

    Args:
        leaves: arrays of floats; NaN counts as the largest number.
        counts: for every leaf, how many of its entries to mark; may be traced.

    Returns:
        For every leaf an array of bools, True = among the lowest.

    Raises:
        ValueError: if a leaf has ``2**32`` entries or more.

    Example:
        >>> lowest_each([jnp.array([3.0, 1.0, 1.0])], [1])
        [Array([False, False,  True], dtype=bool)]
    """
    keys = _keys(leaves)
    losses = jnp.stack([jnp.asarray(count).astype(jnp.uint32) for count in counts])
    bounds = _smallest(keys, lambda counts: counts >= losses[:, None], keys[0].dtype)
    return _mark(keys, bounds, losses)


def kth_lowest(leaves: Sequence[Array], k: int) -> Array:
    """The entry at place `k` (from 0) of all entries in ascending order; jit-able."""
    keys = _keys(leaves)

    def enough(counts: jax.Array) -> Array:
        return jnp.broadcast_to(~_less(_sum(counts), wide(k + 1)), counts.shape)

    return _value(_smallest(keys, enough, keys[0].dtype)[0])


# --- order-preserving integers -------------------------------------------------------


def _keys(leaves: Sequence[Array]) -> list[Array]:
    """Unsigned integers in the order of the floats; -0 equals 0, NaN comes last."""
    for leaf in leaves:
        if leaf.size >= 1 << 32:
            raise ValueError(
                f"a leaf of shape {leaf.shape} has {leaf.size} scores, 2**32 or more; "
                "split it along its first axis"
            )
    double = any(leaf.dtype == jnp.float64 for leaf in leaves)
    kind = jnp.float64 if double else jnp.float32
    return [_key(leaf.astype(kind)) for leaf in leaves]


def _key(values: Array) -> Array:
    kind, top = _top(values.dtype.itemsize)
    pattern = lax.bitcast_convert_type(values, kind)
    # -0 equals 0; compared as bits, because XLA on CPU flushes denormal numbers to 0.
    pattern = jnp.where(pattern == top, kind(0), pattern)
    ordered = jnp.where(pattern >= top, ~pattern, pattern | top)
    return jnp.where(jnp.isnan(values), ~kind(0), ordered)


def _value(key: Array) -> Array:
    """The float that a key stands for."""
    kind, top = _top(key.dtype.itemsize)
    pattern = jnp.where(key >= top, key ^ top, ~key)
    return lax.bitcast_convert_type(
        pattern, jnp.float64 if kind == jnp.uint64 else jnp.float32
    )


def _top(itemsize: int) -> tuple[Any, jax.Array]:
    kind = jnp.uint64 if itemsize == 8 else jnp.uint32
    return kind, kind(1 << (8 * itemsize - 1))


# --- search --------------------------------------------------------------------------


def _smallest(
    keys: Sequence[Array],
    enough: Callable[[Any], Any],
    kind: DTypeLike,
    among: Sequence[Array] | None = None,
) -> Array:
    """The smallest numbers ``[leaves]`` such that enough keys are at most as large.

    Invariant: no smaller number than `found` is enough, and the bits of the answer
    above the current two are those of `found`.

    Args:
        keys: unsigned integers of `kind`, one array for every leaf.
        enough: counts ``[leaves, 3]`` -> bools; monotone.
        kind: dtype of the keys.
        among: marks like the keys: only what is True there counts.
    """
    bits = 8 * np.dtype(kind).itemsize
    digits = jnp.arange(1, 4, dtype=kind)

    def settle(k: jax.Array, found: Array) -> Array:
        # Two bits a turn, the highest first: of the digits 1, 2, 3 those with too few
        # keys below them are passed over, and their number is the digit.
        shift = (bits - 2 - 2 * k).astype(kind)
        candidates = found[:, None] | (digits << shift)[None]
        below = [[key < each for each in row] for key, row in _zip(keys, candidates)]
        if among is not None:
            below = [[a & m for a in marks] for marks, m in _zip(below, among)]
        short = ~enough(jnp.stack([_counts(marks) for marks in below]))
        return found | (jnp.sum(short, axis=1, dtype=kind) << shift)

    return lax.fori_loop(0, bits // 2, settle, jnp.zeros(len(keys), kind))


def _losses(
    keys: Sequence[Array], bounds: Array, limits: Array, wanted: Wide
) -> tuple[Array, Array]:
    """``[leaves]``, bounds of their own, and how many entries every leaf loses.

    What is below the common bound goes, then its equals, those of the last leaf first.
    A leaf at its cap loses fewer than are below the bound, and needs its own.
    """
    below, upto = _below_and_upto(keys, bounds)
    sure, most = jnp.minimum(below, limits), jnp.minimum(upto, limits)
    ties = _difference(wanted, _sum(sure))
    losses = list(sure)
    for k in reversed(range(len(keys))):
        whole = jnp.where(ties.high < 65536, (ties.high << 16) | ties.low, _MOST)
        more = jnp.minimum(most[k] - sure[k], whole)
        ties = _difference(ties, _sum(more[None]))
        losses[k] = sure[k] + more
    losses = jnp.stack(losses)
    own = lax.cond(
        (below > losses).any(),
        lambda: _smallest(keys, lambda c: c >= losses[:, None], keys[0].dtype),
        lambda: bounds,
    )
    return own, losses


def _mark(keys: Sequence[Array], bounds: Array, losses: Array) -> list[Array]:
    """The lowest ``losses[k]`` entries of every leaf; of equal ones the last."""
    below, upto = _below_and_upto(keys, bounds)
    equal = [key == bound for key, bound in _zip(keys, bounds)]
    place = [_places(key.shape) for key in keys]
    stay = upto - losses
    starts = lax.cond(
        ((stay > 0) & (losses > below)).any(),
        lambda: _smallest(place, lambda c: c >= stay[:, None], np.uint32, equal) + 1,
        lambda: jnp.zeros_like(stay),
    )
    # All or none: from the first position on, or from none.
    starts = jnp.where(stay == 0, jnp.uint32(0), starts)
    starts = jnp.where(losses <= below, _MOST, starts)
    return [
        (key < bound) | (same & (where >= start))
        for key, bound, same, where, start in _zip(keys, bounds, equal, place, starts)
    ]


def _below_and_upto(keys: Sequence[Array], bounds: Array) -> tuple[Array, Array]:
    """Counts ``[leaves]`` of the entries below the bounds, and of those up to them."""
    pairs = [[key < bound, key <= bound] for key, bound in _zip(keys, bounds)]
    counts = jnp.stack([_counts(pair) for pair in pairs])
    return counts[:, 0], counts[:, 1]


def _places(shape: tuple[int, ...]) -> Array:
    """The row-major position of every entry."""
    places = jnp.zeros(shape, jnp.uint32)
    for d in range(len(shape)):
        stride = math.prod(shape[d + 1 :])
        places += lax.broadcasted_iota(jnp.uint32, shape, d) * jnp.uint32(stride)
    return places


# --- counts --------------------------------------------------------------------------


_Row: TypeAlias = tuple[jax.Array, ...]


def _counts(marks: Sequence[Array]) -> Array:
    """How many are True in each of several arrays, in one pass over memory."""
    ones = tuple(mark.astype(jnp.uint32) for mark in marks)

    def add(left: _Row, right: _Row) -> _Row:
        return tuple(a + b for a, b in zip(left, right, strict=True))

    zeros = (jnp.uint32(0),) * len(ones)
    return jnp.stack(lax.reduce(ones, zeros, add, tuple(range(ones[0].ndim))))


def _sum(counts: jax.Array) -> Wide:
    """Over the leaves: ``[leaves, ...]``."""
    low = jnp.sum(counts & 0xFFFF, axis=0, dtype=jnp.uint32)
    high = jnp.sum(counts >> 16, axis=0, dtype=jnp.uint32)
    return Wide(high + (low >> 16), low & 0xFFFF)


def _less(a: Wide, b: Wide) -> Array:
    return (a.high < b.high) | ((a.high == b.high) & (a.low < b.low))


def _clipped(a: Wide, most: int) -> Wide:
    over = _less(wide(most), a)
    high, low = wide(most)
    return Wide(jnp.where(over, high, a.high), jnp.where(over, low, a.low))


def _difference(a: Wide, b: Wide) -> Wide:
    """``a - b``, where that is not negative."""
    borrow = (a.low < b.low).astype(jnp.uint32)
    return Wide(a.high - b.high - borrow, a.low + (borrow << 16) - b.low)
