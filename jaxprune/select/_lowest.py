"""The lowest entries of a tree of scores, exactly.

Two ways to one answer. Concrete scores on one CPU are read about once by numpy: a
sample brackets the threshold, one pass counts what lies below the bracket and collects
what lies inside. Traced or sharded scores are decided by bisection on the bits of their
order-preserving integers (`jaxprune.select._thresholds`). Of equal entries the
earlier stays.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.core import Tracer

from jaxprune.core._placement import readable
from jaxprune.core._types import Array
from jaxprune.select._thresholds import Wide, kth_lowest, lowest_each, lowest_together

T = TypeVar("T")
_CHUNK = 1 << 18  # entries that stay in a core's cache with what is made of them
_SMALL = 1 << 18  # so few are partitioned at once


def lowest(
    leaves: Sequence[Array], count: int | Wide, caps: Sequence[int]
) -> list[Array]:
    """Marks the lowest `count` entries of all leaves together.

    Of equal entries the earlier one stays, in the order of the leaves and positions.

    Args:
        leaves: arrays of floats without NaN; traced, sharded or concrete.
        count: how many entries to mark, at most the sum of `caps`; a `Wide` may be
            traced, and is clipped to that sum.
        caps: for every leaf, how many of its entries may be marked at most.

    Returns:
        For every leaf an array of bools, True = among the lowest; numpy where all
        leaves are concrete and on one CPU.
    """
    if not leaves:
        return []
    if isinstance(count, Wide) or any(isinstance(leaf, Tracer) for leaf in leaves):
        return lowest_together(leaves, count, caps)
    if not all(map(readable, leaves)):
        return jax.jit(lambda found: lowest_together(found, count, caps))(list(leaves))
    removed = _lowest_on_host([flat(leaf) for leaf in leaves], count, caps)
    return [
        gone.reshape(np.shape(leaf)) for gone, leaf in zip(removed, leaves, strict=True)
    ]


def lowest_alone(leaves: Sequence[Array], counts: Sequence[Any]) -> list[Array]:
    """Marks the lowest entries of every leaf, each ranked alone; see `lowest`.

    Args:
        leaves: arrays of floats without NaN; traced, sharded or concrete.
        counts: for every leaf, how many of its entries to mark; may be traced.
    """
    if not leaves:
        return []
    if any(isinstance(each, Tracer) for each in (*leaves, *counts)):
        return lowest_each(leaves, counts)
    if not all(map(readable, leaves)):
        return jax.jit(lowest_each)(list(leaves), list(counts))
    pairs = zip(leaves, counts, strict=True)
    return [lowest([leaf], count, [count])[0] for leaf, count in pairs]


def kth(leaves: Sequence[Array], k: int) -> Array:
    """The entry at place `k` (from 0) of all entries in ascending order."""
    if any(isinstance(leaf, Tracer) for leaf in leaves):
        return kth_lowest(leaves, k)
    if not all(map(readable, leaves)):
        return jax.jit(lambda found: kth_lowest(found, k))(list(leaves))
    return kth_smallest([flat(leaf) for leaf in leaves], k)


def flat(leaf: Array) -> np.ndarray:
    """The entries of a concrete leaf, of a type that numpy compares quickly."""
    values = np.asarray(leaf).ravel()
    wide = values.dtype in (np.float32, np.float64)
    return values if wide else values.astype(np.float32)


def kth_smallest(arrays: Sequence[np.ndarray], k: int) -> Array:
    """The entry at place `k` (from 0) of all entries in ascending order.

    Args:
        arrays: flat numpy arrays without NaN.
        k: in ``[0, total)``.
    """
    total = sum(array.size for array in arrays)
    if total <= _SMALL:
        return _place(np.concatenate(arrays), k)
    sample = _sample(arrays, total)
    for spread in (4.0, 40.0, np.inf):  # standard deviations; one in 10 000 misses
        low, high = _bracket(sample, k / total, spread)
        upto, inside = _scan(arrays, low, high)
        if 0 <= k - upto < len(inside):
            return _place(inside, k - upto)
        if k < upto and sum(_count(np.less, array, low) for array in arrays) <= k:
            return low
        if k >= upto and sum(_count(np.less_equal, x, high) for x in arrays) > k:
            return high
    raise AssertionError("between -inf and inf lies everything")


def _place(array: np.ndarray, k: int) -> Array:
    if np.isnan(array).any():
        raise FloatingPointError("scores are NaN")
    return np.partition(array, k)[k]


def count_nan(leaf: Array) -> int:
    """How many entries of a concrete leaf are NaN."""
    array = flat(leaf)
    if not any(_each_chunk(lambda part: bool(np.isnan(part.max())), [array])):
        return 0
    return int(np.isnan(array).sum())


def _sample(arrays: Sequence[np.ndarray], total: int) -> np.ndarray:
    """Every 64th entry or so, in runs: reading one costs as much as its neighbours."""
    rng, run = np.random.default_rng(0), 64
    found = []
    for array in arrays:
        if array.size < run:
            found.append(array)
            continue
        starts = rng.integers(array.size - run + 1, size=array.size // run**2 + 1)
        windows = np.lib.stride_tricks.sliding_window_view(array, run)
        found.append(windows[starts].ravel())
    return np.concatenate(found)


def _bracket(sample: np.ndarray, share: float, spread: float) -> tuple[Any, Any]:
    """Two different numbers between which lies what a share of all is below."""
    n = len(sample)
    # Neighbours are alike: two of them count as one draw.
    error = spread * (math.sqrt(share * (1 - share) * 2 / n) + 1 / n)
    low, high = -np.inf, np.inf
    if share - error > 0:
        low = kth_smallest([sample], math.floor((share - error) * n))
    if share + error < 1:
        high = kth_smallest([sample], math.floor((share + error) * n))
    return low, max(high, np.nextafter(low, sample.dtype.type(np.inf)))


def _scan(
    arrays: Sequence[np.ndarray], low: float, high: float
) -> tuple[int, np.ndarray]:
    """How many entries are at most `low`, and those between the two; NaN among them."""

    def part(array: np.ndarray) -> tuple[int, np.ndarray]:
        upto, above = array <= low, array >= high
        # Never both, as low < high: equal means neither.
        return int(np.count_nonzero(upto)), array[np.equal(upto, above, out=above)]

    found = _each_chunk(part, arrays)
    return sum(n for n, _ in found), np.concatenate([inside for _, inside in found])


def _count(compare: np.ufunc, array: np.ndarray, bound: Array | float) -> int:
    """How many entries compare so with the bound."""
    return sum(
        _each_chunk(lambda part: int(np.count_nonzero(compare(part, bound))), [array])
    )


def _each_chunk(fn: Callable[[np.ndarray], T], arrays: Sequence[np.ndarray]) -> list[T]:
    """`fn` of every chunk, in order; numpy releases the lock, so threads help."""
    chunks = [
        array[start : start + _CHUNK]
        for array in arrays
        for start in range(0, array.size, _CHUNK)
    ]
    if len(chunks) < 16:
        return [fn(chunk) for chunk in chunks]
    spans = [chunks[start : start + 8] for start in range(0, len(chunks), 8)]
    with ThreadPoolExecutor() as pool:
        done = pool.map(lambda span: [fn(chunk) for chunk in span], spans)
        return [found for span in done for found in span]


class _Loss(NamedTuple):
    """What one leaf loses.

    Attributes:
        entries: how many.
        bound: the largest of them, if `below` and `upto` are about it; else None.
        below: how many entries are less than the bound.
        upto: how many are at most the bound.
    """

    entries: int
    bound: Any = None
    below: int = 0
    upto: int = 0


def _lowest_on_host(
    flat: Sequence[np.ndarray], count: int, caps: Sequence[int]
) -> list[np.ndarray]:
    losses = _losses(flat, count, caps)
    return [_mark(array, loss) for array, loss in zip(flat, losses, strict=True)]


def _losses(flat: Sequence[np.ndarray], count: int, caps: Sequence[int]) -> list[_Loss]:
    """What each leaf loses of `count` entries in all.

    The common threshold is the smallest t with ``sum_l min(cap_l, #(leaf_l <= t)) >=
    count``. A leaf with more than its cap at or below a t that is too small has its cap
    at every larger one too: it leaves the search, and the others share what is left.
    """
    losses = [_Loss(0)] * len(flat)
    rest = [k for k, array in enumerate(flat) if array.size and caps[k]]
    while rest and count:
        bound = kth_smallest([flat[k] for k in rest], count - 1)
        upto = {k: _count(np.less_equal, flat[k], bound) for k in rest}
        if sum(min(caps[k], upto[k]) for k in rest) >= count:
            break
        for k in [k for k in rest if upto[k] > caps[k]]:
            losses[k] = _Loss(caps[k])
            count -= caps[k]
            rest.remove(k)
    else:
        return losses
    below = {k: _count(np.less, flat[k], bound) for k in rest}
    ties = count - sum(min(caps[k], below[k]) for k in rest)
    for k in reversed(rest):
        least = min(caps[k], below[k])
        more = min(ties, min(caps[k], upto[k]) - least)
        losses[k] = _Loss(least + more, bound, below[k], upto[k])
        ties -= more
    return losses


def _mark(array: np.ndarray, loss: _Loss) -> np.ndarray:
    """The lowest entries of a leaf; of equal ones the last."""
    count, bound, below, upto = loss
    if not count:
        return np.zeros(array.shape, bool)
    if bound is None or below > count:  # held back by its cap: the bound is its own
        bound = kth_smallest([array], count - 1)
        below, upto = (_count(c, array, bound) for c in (np.less, np.less_equal))
    if upto == count:
        return array <= bound
    removed = array < bound
    removed[np.flatnonzero(array == bound)[upto - count :]] = True
    return removed
