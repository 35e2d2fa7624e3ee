"""Thresholds: exactly the k largest entries, without sorting and without gathering.

Floats are mapped to unsigned integers of the same order, and the k-th largest of these
is found from its highest bits down: how many entries reach a candidate is a sum, so
sharded scores stay where they are and only counts travel. Two bits are settled per
pass. Ties at the threshold are settled by position in the same way, so the count is met
exactly, whatever the scores.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

PyTree = Any


def keep_largest(scores: PyTree, kept: PyTree, among: PyTree | None = None) -> PyTree:
    """Marks the largest entries of a tree of scores, exactly as many as asked for.

    Of equal scores the earlier one stays: tree order, then row-major order. NaN counts
    as lower than every number. Jit-able; over sharded scores only counts are exchanged.

    Args:
        scores: tree of floats, larger matters more; up to 32 bits, up to ``2**32``
            entries.
        kept: how many to keep: one count for all leaves ranked together, or a tree of
            counts like `scores`, each leaf ranked alone. May be traced.
        among: tree of bools like `scores`, broadcastable; only where it is True may an
            entry be kept. If fewer are True than asked for, they are all kept.

    Returns:
        Tree of bools like `scores`, True = kept.

    Raises:
        ValueError: if `kept` or `among` is another tree, or there are too many entries.
        TypeError: if scores are not floats of 32 bits or less.

    Example:
        >>> import jax.numpy as jnp
        >>> scores = {"a": jnp.array([3.0, 1.0]), "b": jnp.array([2.0, 3.0, 3.0])}
        >>> keep_largest(scores, 2)["b"]
        Array([False,  True, False], dtype=bool)
        >>> keep_largest(scores, {"a": 1, "b": 2})["b"]
        Array([False,  True,  True], dtype=bool)
    """
    leaves, treedef = jax.tree.flatten(scores)
    ranked = _Ranked(_keys(leaves, _like(treedef, "among", among)), _is_one(kept))
    counts = [kept] * len(leaves) if ranked.together else _like(treedef, "kept", kept)
    if not leaves:
        return scores
    wanted = jnp.stack([jnp.asarray(count).astype(jnp.uint32) for count in counts])
    threshold = _kth_largest(ranked, wanted)
    return treedef.unflatten(_settle_ties(ranked, threshold, wanted))


def kth_largest(scores: PyTree, k: Any) -> jax.Array:
    """The k-th largest entry of all leaves, counting from 1, as float32.

    Jit-able; over sharded scores only counts are exchanged.

    Args:
        scores: tree of floats of 32 bits or less, without NaN.
        k: which; in [1, number of entries]. May be traced.

    Returns:
        Scalar: the entry itself, not an interpolation. ``scores >= kth_largest(scores,
        k)`` holds for k entries, and for those equal to the k-th.

    Raises:
        TypeError: if scores are not floats of 32 bits or less.

    Example:
        >>> import jax.numpy as jnp
        >>> float(kth_largest([jnp.array([3.0, 1.0]), jnp.array([2.0])], 2))
        2.0
    """
    leaves = jax.tree.leaves(scores)
    ranked = _Ranked(_keys(leaves, [None] * len(leaves)), together=True)
    wanted = jnp.full(len(leaves), jnp.asarray(k).astype(jnp.uint32))
    key = _kth_largest(ranked, wanted)[0]
    positive = key >> 31 == 1
    bits = jnp.where(positive, key ^ _SIGN, ~key)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def keep_in_groups(scores: jax.Array, kept: Any, size: int, axis: int) -> jax.Array:
    """Marks the largest entries of every group of neighbours along an axis.

    This is N:M sparsity with N = `kept` and M = `size`. Of equal scores the earlier one
    stays; NaN counts as lower than every number. A last group that is short keeps at
    most as many.

    Args:
        scores: floats ``[..., n, ...]``.
        kept: how many of each group stay. May be traced.
        size: entries per group.
        axis: along which they are neighbours.

    Returns:
        Bools like `scores`, True = kept.

    Example:
        >>> import jax.numpy as jnp
        >>> keep_in_groups(jnp.array([4.0, 1.0, 3.0, 2.0]), 2, size=4, axis=0)
        Array([ True, False,  True, False], dtype=bool)
    """
    (keys,) = _keys([scores], [None])
    keys = jnp.moveaxis(keys, axis, -1)
    length = keys.shape[-1]
    short = -length % size
    # What fills up the last group has the lowest key, so it never outranks an entry.
    keys = jnp.pad(keys, [(0, 0)] * (keys.ndim - 1) + [(0, short)])
    groups = keys.reshape(*keys.shape[:-1], -1, size)
    own, other = groups[..., :, None], groups[..., None, :]
    earlier = np.tri(size, k=-1, dtype=bool)
    earlier = earlier.reshape((1,) * (groups.ndim - 1) + earlier.shape)
    outranked = (other > own) | ((other == own) & earlier)
    rank = jnp.sum(outranked, axis=-1, dtype=jnp.int32)
    mask = (rank < kept).reshape(keys.shape)[..., :length]
    return jnp.moveaxis(mask, -1, axis)


def kept_count(size: int, sparsity: Any) -> Any:
    """How many of `size` entries stay: ``round((1 - sparsity) * size)``, at least one.

    Halves go to the even count. A sparsity that is an array or traced is float32, and
    so is the product: above 16 million entries the count may be off by their ratio.

    Example:
        >>> kept_count(10, 0.75), kept_count(10, 1.0), kept_count(0, 0.5)
        (2, 1, 0)
    """
    least = min(size, 1)
    if isinstance(sparsity, jax.Array | Tracer):
        count = jnp.round((1 - sparsity.astype(jnp.float32)) * size)
        return jnp.clip(count, least, size).astype(jnp.uint32)
    return max(least, round((1 - sparsity) * size))


class _Ranked(NamedTuple):
    """Keys of every leaf, and whether the leaves are ranked together.

    Attributes:
        keys: uint32 arrays in the order of their scores; 0 where none may be kept.
        together: counts are compared with those of all leaves.
    """

    keys: list[jax.Array]
    together: bool

    def total(self, counts: jax.Array) -> jax.Array:
        """Counts per leaf ``[leaves, ...]`` -> counts per ranking, same shape."""
        if not self.together:
            return counts
        return jnp.broadcast_to(counts.sum(0, keepdims=True), counts.shape)


_SIGN = np.uint32(1 << 31)


def _keys(leaves: list[Any], among: list[Any]) -> list[jax.Array]:
    if (entries := sum(np.size(leaf) for leaf in leaves)) >= 2**32:
        raise ValueError(
            f"{entries} scores cannot be ranked together, 2**32 at most; rank every "
            "leaf alone"
        )
    return [_key(*pair) for pair in zip(leaves, among, strict=True)]


def _key(scores: Any, among: Any) -> jax.Array:
    scores = jnp.asarray(scores)
    if not jnp.issubdtype(scores.dtype, jnp.floating) or scores.dtype.itemsize > 4:
        raise TypeError(
            f"scores must be floats of 32 bits or less, got {scores.dtype} of shape "
            f"{scores.shape}"
        )
    wide = scores.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(wide, jnp.uint32)
    # -0 equals 0. Arithmetic would lose denormal numbers, which XLA flushes on CPU.
    bits = jnp.where(bits == _SIGN, jnp.uint32(0), bits)
    key = jnp.where(bits >> 31 == 1, ~bits, bits | _SIGN)
    key = jnp.where(jnp.isnan(wide), jnp.uint32(1), key)
    return key if among is None else jnp.where(among, key, jnp.uint32(0))


def _like(treedef: Any, what: str, tree: PyTree | None) -> list[Any]:
    if tree is None:
        return [None] * treedef.num_leaves
    leaves, other = jax.tree.flatten(tree)
    if other != treedef:
        raise ValueError(f"{what} must be a tree like scores {treedef}, got {other}")
    return leaves


def _is_one(kept: PyTree) -> bool:
    return isinstance(kept, int | np.integer | np.ndarray | jax.Array | Tracer)


def _kth_largest(ranked: _Ranked, wanted: jax.Array) -> jax.Array:
    """The largest keys ``[leaves]`` that at least as many entries reach as wanted."""

    def settle(i: jax.Array, threshold: jax.Array) -> jax.Array:
        shift = (30 - 2 * i).astype(jnp.uint32)
        digits = jnp.arange(1, 4, dtype=jnp.uint32)
        candidates = threshold[:, None] | (digits[None] << shift)
        counts = [
            _count([key >= limit for limit in limits])
            for key, limits in zip(ranked.keys, candidates, strict=True)
        ]
        reached = ranked.total(jnp.stack(counts)) >= wanted[:, None]
        digit = jnp.sum(reached, axis=1, dtype=jnp.uint32)
        return threshold | (digit << shift)

    start = jnp.zeros(len(ranked.keys), jnp.uint32)
    return jax.lax.fori_loop(0, 16, settle, start)


def _settle_ties(
    ranked: _Ranked, threshold: jax.Array, wanted: jax.Array
) -> list[jax.Array]:
    """Everything above the threshold stays, and as many of its equals as are wanted."""
    pairs = list(zip(ranked.keys, threshold, strict=True))
    above = [key > limit for key, limit in pairs]
    ties = [(key == limit) & (key > 0) for key, limit in pairs]
    counts = jnp.stack([_count([a, t]) for a, t in zip(above, ties, strict=True)])
    missing = wanted - jnp.minimum(wanted, ranked.total(counts)[:, 0])
    tied = counts[:, 1]
    if ranked.together:
        before = jnp.cumsum(tied) - tied
        missing -= jnp.minimum(missing, before)
    missing = jnp.minimum(missing, tied)
    limits = jax.lax.cond(
        jnp.any((missing > 0) & (missing < tied)),
        lambda: _positions(ties, missing),
        # All or none: up to the end, or up to the start.
        lambda: jnp.where(missing > 0, jnp.uint32(2**32 - 1), jnp.uint32(0)),
    )
    return [
        a | (t & (_index(t.shape) < limit))
        for a, t, limit in zip(above, ties, limits, strict=True)
    ]


def _positions(ties: list[jax.Array], wanted: jax.Array) -> jax.Array:
    """``[leaves]``, position before which as many ties lie as are wanted."""
    bits = max(tie.size for tie in ties).bit_length()

    def settle(i: jax.Array, limit: jax.Array) -> jax.Array:
        candidates = limit | (jnp.uint32(1) << (bits - 1 - i).astype(jnp.uint32))
        counts = [
            _count([tie & (_index(tie.shape) < candidate)])[0]
            for tie, candidate in zip(ties, candidates, strict=True)
        ]
        return jnp.where(jnp.stack(counts) <= wanted, candidates, limit)

    return jax.lax.fori_loop(0, bits, settle, jnp.zeros_like(wanted))


def _index(shape: tuple[int, ...]) -> jax.Array:
    """Row-major positions; never gathered from a sharded leaf."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    index = jnp.zeros(shape, jnp.uint32)
    for axis, stride in enumerate(strides):
        here = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        index += here * np.uint32(stride)
    return index


def _count(flags: list[jax.Array]) -> jax.Array:
    """How many are True in each of several arrays, in one pass over memory: [flags]."""
    ones = tuple(flag.astype(jnp.uint32) for flag in flags)
    zeros = (jnp.uint32(0),) * len(ones)

    def add(left: Any, right: Any) -> Any:
        return tuple(a + b for a, b in zip(left, right, strict=True))

    return jnp.stack(jax.lax.reduce(ones, zeros, add, tuple(range(ones[0].ndim))))
