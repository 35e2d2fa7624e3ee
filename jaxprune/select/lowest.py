"""The lowest entries of a tree of scores, exactly.

Two ways to one answer. Concrete scores on one CPU are read about once by numpy: a
sample brackets the threshold, one pass counts what lies below the bracket and collects
what lies inside. Traced or sharded scores are decided by bisection on the bits of their
order-preserving integers (`jaxprune.select.bisection`).
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from jaxprune.select.bisection import Wide, kth_traced, lowest_traced

_CHUNK = 1 << 16  # entries that stay in a core's cache with what is made of them
_SAMPLE = 1 << 17


def lowest(leaves: Sequence[Any], count: int | Wide, caps: Sequence[int]) -> list[Any]:
    """Marks the lowest `count` entries of all leaves together.

    Of equal entries the first go, in the order of the leaves and their positions.

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
        return lowest_traced(leaves, count, caps)
    if not on_host(leaves):
        return jax.jit(lambda found: lowest_traced(found, count, caps))(list(leaves))
    removed = _lowest_on_host([flat(leaf) for leaf in leaves], count, caps)
    return [
        gone.reshape(np.shape(leaf)) for gone, leaf in zip(removed, leaves, strict=True)
    ]


def kth(leaves: Sequence[Any], k: int) -> Any:
    """The entry at place `k` (from 0) of all entries in ascending order."""
    if any(isinstance(leaf, Tracer) for leaf in leaves):
        return kth_traced(leaves, k)
    if not on_host(leaves):
        return jax.jit(lambda found: kth_traced(found, k))(list(leaves))
    return kth_smallest([flat(leaf) for leaf in leaves], k)


def on_host(leaves: Sequence[Any]) -> bool:
    """Can numpy read these concrete arrays where they are?"""
    return all(
        not isinstance(leaf, jax.Array)
        or (len(leaf.devices()) == 1 and next(iter(leaf.devices())).platform == "cpu")
        for leaf in leaves
    )


def flat(leaf: Any) -> np.ndarray:
    """The entries of a concrete leaf, of a type that numpy compares quickly."""
    values = np.asarray(leaf).ravel()
    wide = values.dtype in (np.float32, np.float64)
    return values if wide else values.astype(np.float32)


def kth_smallest(arrays: Sequence[np.ndarray], k: int) -> Any:
    """The entry at place `k` (from 0) of all entries in ascending order.

    Args:
        arrays: flat numpy arrays without NaN.
        k: in ``[0, total)``.
    """
    total = sum(array.size for array in arrays)
    if total <= 4 * _SAMPLE:
        every = np.concatenate(arrays)
        _refuse_nan(every)
        return np.partition(every, k)[k]
    low, high = _bracket(arrays, k, total)
    while True:
        upto_low, inside = _scan(arrays, low, high)
        if k < upto_low:
            # A sample misses about once in a million; what it misses is all below.
            if sum(_count(np.less, array, low) for array in arrays) <= k:
                return low
            low, high = -np.inf, low
        elif k < upto_low + len(inside):
            return np.partition(inside, k - upto_low)[k - upto_low]
        else:
            if k < sum(_count(np.less_equal, array, high) for array in arrays):
                return high
            low, high = high, np.inf


def count_nan(leaf: Any) -> int:
    """How many entries of a concrete leaf are NaN."""
    array = flat(leaf)
    if not any(_each_chunk(lambda part: bool(np.isnan(part.max())), [array])):
        return 0
    return int(np.isnan(array).sum())


def _bracket(arrays: Sequence[np.ndarray], k: int, total: int) -> tuple[Any, Any]:
    """Two entries between which entry `k` lies, almost surely."""
    rng = np.random.default_rng(0)
    run = 16  # entries of one cache line cost as much as one
    found = []
    for array in arrays:
        starts = rng.integers(
            max(array.size - run, 1), size=_SAMPLE * array.size // total // run + 1
        )
        found.append(array[(starts[:, None] + np.arange(run)).clip(max=array.size - 1)])
    sample = np.sort(np.concatenate([part.ravel() for part in found]))
    # Runs are correlated: count each as a few independent draws.
    spread = 6 * np.sqrt(k / total * (1 - k / total) * 4 / len(sample)) + 1e-5
    low = math.floor((k / total - spread) * len(sample))
    high = math.ceil((k / total + spread) * len(sample))
    below = sample[low] if low >= 0 else -np.inf
    return below, sample[high] if high < len(sample) else np.inf


def _scan(arrays: Sequence[np.ndarray], low: Any, high: Any) -> tuple[int, np.ndarray]:
    """How many entries are at most `low`, and those strictly between the two."""

    def part(array: np.ndarray) -> tuple[int, np.ndarray]:
        _refuse_nan(array)
        upto = array <= low
        return int(np.count_nonzero(upto)), array[(array < high) > upto]

    found = _each_chunk(part, arrays)
    return sum(n for n, _ in found), np.concatenate([inside for _, inside in found])


def _refuse_nan(array: np.ndarray) -> None:
    if np.isnan(array.max()):  # the maximum is NaN if any entry is, and is fast to find
        raise FloatingPointError("scores are NaN")


def _count(compare: Any, array: np.ndarray, bound: Any) -> int:
    """How many entries compare so with the bound."""
    return sum(
        _each_chunk(lambda part: int(np.count_nonzero(compare(part, bound))), [array])
    )


def _each_chunk(
    fn: Callable[[np.ndarray], Any], arrays: Sequence[np.ndarray]
) -> list[Any]:
    """`fn` of every chunk, in order; numpy releases the lock, so threads help."""
    chunks = [
        array[start : start + _CHUNK]
        for array in arrays
        for start in range(0, array.size, _CHUNK)
    ]
    if len(chunks) < 64:
        return [fn(chunk) for chunk in chunks]
    spans = [chunks[start : start + 32] for start in range(0, len(chunks), 32)]
    with ThreadPoolExecutor() as pool:
        done = pool.map(lambda span: [fn(chunk) for chunk in span], spans)
        return [found for span in done for found in span]


def _lowest_on_host(
    flat: Sequence[np.ndarray], count: int, caps: Sequence[int]
) -> list[np.ndarray]:
    losses, bound = _losses(flat, count, caps)
    return [_mark(array, loss, bound) for array, loss in zip(flat, losses, strict=True)]


def _losses(
    flat: Sequence[np.ndarray], count: int, caps: Sequence[int]
) -> tuple[list[int], Any]:
    """How many entries each leaf loses, and their common threshold.

    The threshold is the smallest t with ``sum_l min(cap_l, #(leaf_l <= t)) >= count``.
    A leaf with more than its cap at or below a t that is too small has its cap at
    every larger one too: it leaves the search, and the others share what is left.
    """
    full = {k for k, array in enumerate(flat) if not array.size or not caps[k]}
    while True:
        rest = [k for k in range(len(flat)) if k not in full]
        left = count - sum(caps[k] for k in full)
        losses = [caps[k] if k in full else 0 for k in range(len(flat))]
        if left <= 0 or not rest:
            return losses, None
        bound = kth_smallest([flat[k] for k in rest], left - 1)
        upto = {k: _count(np.less_equal, flat[k], bound) for k in rest}
        if sum(min(caps[k], upto[k]) for k in rest) >= left:
            break
        full |= {k for k in rest if upto[k] > caps[k]}
    for k in rest:
        losses[k] = min(caps[k], _count(np.less, flat[k], bound))
    for k in rest:
        room = min(caps[k], upto[k]) - losses[k]
        losses[k] += min(room, count - sum(losses))
    return losses, bound


def _mark(array: np.ndarray, loss: int, bound: Any) -> np.ndarray:
    """The lowest `loss` entries; `bound` is where to start looking for the last."""
    if not loss:
        return np.zeros(array.shape, bool)
    upto, below = (
        (0, 0)
        if bound is None
        else (_count(compare, array, bound) for compare in (np.less_equal, np.less))
    )
    if not below <= loss <= upto:
        bound = kth_smallest([array], loss - 1)
    removed = array < bound
    ties = loss - int(np.count_nonzero(removed))
    removed[np.flatnonzero(array == bound)[:ties]] = True
    return removed
