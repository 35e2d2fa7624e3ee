"""The lowest entries by bisection on bits: traced, and sharded without gathering.

A float maps to an unsigned integer that sorts alike. The threshold is found bit by bit
from the top, by counting entries below a candidate; a leaf that may not lose more stops
counting at its cap. Of equal entries the first by position go; where that matters, the
position is found in the same way. Nothing but counts is exchanged between devices.

Counts of one leaf are uint32. Their sum over the leaves may be larger, and is a pair
(high, low) to base 2**16.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

_MOST = np.uint32(0xFFFFFFFF)


class Wide(NamedTuple):
    """The number ``high * 2**16 + low``, with ``low < 2**16``."""

    high: Any
    low: Any


def wide(count: int) -> Wide:
    """A static number.

    Example:
        >>> [int(part) for part in wide(2**40 + 3)]
        [16777216, 3]
    """
    return Wide(jnp.uint32(count >> 16), jnp.uint32(count & 0xFFFF))


def wide_share(share: Any, total: int) -> Wide:
    """``round(share * total)`` for a traced share, as exact as float32 is."""
    product = jnp.asarray(share, jnp.float32) * total
    high = jnp.floor(product / 65536)
    low = jnp.round(product - high * 65536).astype(jnp.uint32)
    return Wide(high.astype(jnp.uint32) + (low >> 16), low & 0xFFFF)


def lowest_traced(
    leaves: Sequence[Any], count: int | Wide, caps: Sequence[int]
) -> list[Any]:
    """See `lowest`; the leaves may be tracers or sharded."""
    for leaf in leaves:
        if leaf.size >= 1 << 32:
            raise ValueError(
                f"a leaf of shape {leaf.shape} has {leaf.size} scores, 2**32 or more; "
                "split it along its first axis"
            )
    keys = _keys(leaves)
    limits = [jnp.uint32(cap) for cap in caps]
    wanted = _clipped(wide(count) if isinstance(count, int) else count, sum(caps))

    def enough(bound: Any) -> Any:
        counts = [_count(key <= bound) for key in keys]
        return ~_less(_sum(_smaller(counts, limits)), wanted)

    bound = _smallest(enough, jnp.zeros((), keys[0].dtype))
    return _mark(keys, bound, jnp.stack(_losses(keys, bound, limits, wanted)))


def kth_traced(leaves: Sequence[Any], k: int) -> Any:
    """The entry at place `k` (from 0) of all entries in ascending order."""
    keys = _keys(leaves)

    def enough(bound: Any) -> Any:
        counts = [_count(key <= bound) for key in keys]
        return ~_less(_sum(counts), wide(k + 1))

    return _value(_smallest(enough, jnp.zeros((), keys[0].dtype)))


# --- order-preserving integers -------------------------------------------------------


def _keys(leaves: Sequence[Any]) -> list[Any]:
    """Unsigned integers in the order of the floats; -0 equals 0, NaN comes last."""
    double = any(leaf.dtype == jnp.float64 for leaf in leaves)
    kind = jnp.float64 if double else jnp.float32
    return [_key(leaf.astype(kind)) for leaf in leaves]


def _key(values: Any) -> Any:
    kind, top = _top(values.dtype.itemsize)
    pattern = lax.bitcast_convert_type(values, kind)
    # -0 equals 0; compared as bits, because XLA on CPU flushes denormal numbers to 0.
    pattern = jnp.where(pattern == top, kind(0), pattern)
    ordered = jnp.where(pattern >= top, ~pattern, pattern | top)
    return jnp.where(jnp.isnan(values), ~kind(0), ordered)


def _value(key: Any) -> Any:
    """The float that a key stands for."""
    kind, top = _top(key.dtype.itemsize)
    pattern = jnp.where(key >= top, key ^ top, ~key)
    return lax.bitcast_convert_type(
        pattern, jnp.float64 if kind == jnp.uint64 else jnp.float32
    )


def _top(itemsize: int) -> tuple[Any, Any]:
    kind = jnp.uint64 if itemsize == 8 else jnp.uint32
    return kind, kind(1 << (8 * itemsize - 1))


# --- bisection -----------------------------------------------------------------------


def _smallest(enough: Callable[[Any], Any], zero: Any) -> Any:
    """The smallest unsigned integer for which ``enough``, for every entry of `zero`.

    `enough` is monotone. Invariant: no number below `found` is enough, and the bits of
    the answer above the current one are those of `found`.
    """
    bits = 8 * zero.dtype.itemsize
    one = jnp.ones_like(zero)

    def step(k: Any, found: Any) -> Any:
        middle = found | (one << (bits - 1 - k).astype(zero.dtype))
        return jnp.where(enough(middle - one), found, middle)

    return lax.fori_loop(0, bits, step, zero)


def _losses(
    keys: Sequence[Any], bound: Any, limits: Sequence[Any], wanted: Wide
) -> list[Any]:
    """How many entries every leaf loses: those below the bound, then equal ones."""
    below = _smaller([_count(key < bound) for key in keys], limits)
    upto = _smaller([_count(key <= bound) for key in keys], limits)
    ties = _difference(wanted, _sum(below))
    losses = []
    for under, most in zip(below, upto, strict=True):
        whole = jnp.where(ties.high < 65536, (ties.high << 16) | ties.low, _MOST)
        more = jnp.minimum(most - under, whole)
        ties = _difference(ties, _sum([more]))
        losses.append(under + more)
    return losses


def _mark(keys: Sequence[Any], bound: Any, losses: Any) -> list[Any]:
    """The lowest ``losses[k]`` entries of every leaf.

    A leaf at its cap loses fewer than are below the bound, and needs its own.
    """

    def counts(marks: Callable[[int, Any], Any]) -> Any:
        return jnp.stack([_count(marks(k, key)) for k, key in enumerate(keys)])

    same = jnp.full(len(keys), bound)
    bounds = lax.cond(
        (counts(lambda _, key: key < bound) > losses).any(),
        lambda: _smallest(
            lambda own: counts(lambda k, key: key <= own[k]) >= losses,
            jnp.zeros_like(same),
        ),
        lambda: same,
    )
    ties = losses - counts(lambda k, key: key < bounds[k])
    equal = counts(lambda k, key: key == bounds[k])
    place = [_places(key.shape) for key in keys]
    ends = lax.cond(
        ((ties > 0) & (ties < equal)).any(),
        lambda: _smallest(
            lambda end: (
                counts(lambda k, key: (key == bounds[k]) & (place[k] < end[k])) >= ties
            ),
            jnp.zeros_like(ties),
        ),
        lambda: jnp.where(ties > 0, _MOST, jnp.uint32(0)),
    )
    return [
        (key < bounds[k]) | ((key == bounds[k]) & (place[k] < ends[k]))
        for k, key in enumerate(keys)
    ]


def _places(shape: tuple[int, ...]) -> Any:
    """The row-major position of every entry."""
    places = jnp.zeros(shape, jnp.uint32)
    for d in range(len(shape)):
        stride = math.prod(shape[d + 1 :])
        places += lax.broadcasted_iota(jnp.uint32, shape, d) * jnp.uint32(stride)
    return places


# --- counts --------------------------------------------------------------------------


def _count(marks: Any) -> Any:
    return jnp.sum(marks, dtype=jnp.uint32)


def _smaller(counts: Sequence[Any], limits: Sequence[Any]) -> list[Any]:
    return [jnp.minimum(a, b) for a, b in zip(counts, limits, strict=True)]


def _sum(counts: Sequence[Any]) -> Wide:
    each = jnp.stack(list(counts))
    low = jnp.sum(each & 0xFFFF, dtype=jnp.uint32)
    high = jnp.sum(each >> 16, dtype=jnp.uint32)
    return Wide(high + (low >> 16), low & 0xFFFF)


def _less(a: Wide, b: Wide) -> Any:
    return (a.high < b.high) | ((a.high == b.high) & (a.low < b.low))


def _clipped(a: Wide, most: int) -> Wide:
    over = _less(wide(most), a)
    high, low = wide(most)
    return Wide(jnp.where(over, high, a.high), jnp.where(over, low, a.low))


def _difference(a: Wide, b: Wide) -> Wide:
    """``a - b``, where that is not negative."""
    borrow = (a.low < b.low).astype(jnp.uint32)
    return Wide(a.high - b.high - borrow, a.low + (borrow << 16) - b.low)
