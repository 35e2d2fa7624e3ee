"""Weights: scores of single weights decide masks, in each leaf or in all together."""

from collections.abc import Mapping, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxprune.core._leafwise import power_of_two
from jaxprune.core._limits import Each, fraction, fractions, selected
from jaxprune.core._placement import readable
from jaxprune.core._types import Array, ArrayNamespace, PyTree, Scalar
from jaxprune.select._lowest import kth, lowest, lowest_alone
from jaxprune.select._thresholds import Wide, wide_share
from jaxprune.select._trees import (
    caps,
    checked,
    default_leaves,
    masks_like,
    scored,
)


def per_leaf(
    scores: PyTree,
    *,
    sparsity: Scalar | Mapping[str, Scalar],
    min_keep: Each[int] = 1,
    max_sparsity: Each[float] = 1.0,
    only: str | Sequence[str] | None = None,
) -> PyTree:
    """Removes a fraction of every leaf, lowest scores first.

    A leaf of n entries loses exactly ``round(sparsity * n)`` of them, or as many as
    `min_keep` and `max_sparsity` allow; of equal scores the earlier stay.

    Args:
        scores: tree of floats like the parameters, larger matters more; None where a
            leaf has no score.
        sparsity: fraction to remove, in [0, 1]; or path -> fraction (`erk`, `lamp`),
            where leaves that are not named are left alone. May be traced.
        min_keep: how many entries every leaf keeps at least; 1 or more. One value, or
            path or pattern -> value.
        max_sparsity: no leaf loses more than this fraction; likewise.
        only: paths or patterns (as `fnmatch`) of the leaves to prune, such as
            ``"*/kernel"``, or ``"*"`` for all with a score. None for those `sparsity`
            names, else for kernels: leaves of two axes or more that are not called
            bias, b, scale or offset (all leaves, if there is no kernel).

    Returns:
        Masks like `scores`, True = kept; the scalar True for leaves left alone. numpy
        where the scores are concrete and on one CPU.

    Raises:
        ValueError: if an option is out of range, a pattern matches nothing, or a
            concrete score is NaN (a traced one counts as the largest number).

    Example:
        >>> import numpy as np
        >>> scores = {"kernel": np.array([[3.0, 1.0], [2.0, 4.0]]), "bias": None}
        >>> per_leaf(scores, sparsity=0.5)
        {'bias': array(True), 'kernel': array([[ True, False], [False,  True]])}
    """
    leaves = scored(scores)
    most = caps(leaves, min_keep, max_sparsity)
    if not isinstance(sparsity, Mapping):
        only = default_leaves(leaves, only)
    shares = fractions(leaves, sparsity, only, "leaves")
    chosen = [checked(path, leaves[path]) for path in shares]
    counts = [
        _count(path, share, leaf.size, most[path])
        for (path, share), leaf in zip(shares.items(), chosen, strict=True)
    ]
    removed = lowest_alone(chosen, counts)
    return masks_like(scores, dict(zip(shares, removed, strict=True)))


def across_leaves(
    scores: PyTree,
    *,
    sparsity: Scalar,
    min_keep: Each[int] = 1,
    max_sparsity: Each[float] = 1.0,
    only: str | Sequence[str] | None = None,
    normalize: bool = False,
) -> PyTree:
    """Removes a fraction of all entries, ranked together, lowest scores first.

    Of N entries in the selected leaves exactly ``round(sparsity * N)`` go. What
    `min_keep` or `max_sparsity` protects stays, and the next lowest of any other leaf
    goes instead. Of equal scores the earlier stay, in the order of the leaves.

    Under jit the count of all weights is the only thing that devices exchange: no leaf
    is gathered, and more than ``2**31`` weights are counted right.

    Args:
        scores: tree of floats like the parameters, larger matters more; None where a
            leaf has no score.
        sparsity: fraction to remove, in [0, 1]. May be traced: then it is as exact as
            float32 is, and clipped to what the limits allow.
        min_keep: how many entries every leaf keeps at least; 1 or more. One value, or
            path or pattern -> value.
        max_sparsity: no leaf loses more than this fraction; likewise.
        only: as for `per_leaf`: None for kernels, ``"*"`` for all leaves.
        normalize: divide the scores of a leaf by their L2 norm before they compete, so
            that leaves of small weights are not the first to go.

    Returns:
        Masks like `scores`, True = kept; the scalar True for leaves left alone.

    Raises:
        ValueError: if the limits leave fewer entries to remove than the budget asks
            for, an option is out of range, a pattern matches nothing, or a concrete
            score is NaN (a traced one counts as the largest number).

    Example:
        >>> import numpy as np
        >>> scores = {"a": np.array([1.0, 2.0, 6.0]), "b": np.array([5.0, 3.0, 4.0])}
        >>> across_leaves(scores, sparsity=0.5)
        {'a': array([False, False,  True]), 'b': array([ True, False,  True])}

    References:
        Han et al., `Learning both Weights and Connections for Efficient Neural
        Networks <https://arxiv.org/abs/1506.02626>`_, 2015
    """
    leaves = scored(scores)
    paths = selected(leaves, default_leaves(leaves, only), "leaves")
    every = caps(leaves, min_keep, max_sparsity)
    most = [every[path] for path in paths]
    chosen = [checked(path, leaves[path]) for path in paths]
    if normalize:
        chosen = [_unit_norm(leaf) for leaf in chosen]
    total = sum(leaf.size for leaf in chosen)
    if isinstance(sparsity, Tracer):
        count: int | Wide = wide_share(sparsity, total)
    else:
        count = round(fraction("sparsity", sparsity) * total)
        if count > sum(most):
            raise ValueError(
                f"sparsity={sparsity} asks for {count} of {total} entries, but "
                f"min_keep={min_keep}, max_sparsity={max_sparsity} leave only "
                f"{sum(most)} to remove in {len(paths)} leaves"
            )
    removed = lowest(chosen, count, most)
    return masks_like(scores, dict(zip(paths, removed, strict=True)))


def threshold(
    scores: PyTree, *, sparsity: float, only: str | Sequence[str] | None = None
) -> Array:
    """The lowest score that stays when a fraction of all entries goes.

    Exact: an entry of `scores`, the one at place ``round(sparsity * N)`` of all N in
    ascending order. `across_leaves` decides ties and limits as well.

    Args:
        scores: tree of floats, without NaN; None where a leaf has no score. Concrete
            scores on one CPU are read about once.
        sparsity: fraction to remove, in [0, 1); static.
        only: as for `across_leaves`: None for kernels, ``"*"`` for all leaves.

    Returns:
        A scalar.

    Raises:
        ValueError: if nothing would stay, or a concrete score is NaN.

    Example:
        >>> import numpy as np
        >>> scores = {"a": np.array([1.0, 2.0, 6.0]), "b": np.array([5.0, 3.0, 4.0])}
        >>> float(threshold(scores, sparsity=0.5))
        4.0
    """
    found = scored(scores)
    paths = selected(found, default_leaves(found, only), "leaves")
    leaves = {path: checked(path, found[path], nan=False) for path in paths}
    total = sum(leaf.size for leaf in leaves.values())
    count = round(fraction("sparsity", sparsity) * total)
    if count >= total:
        raise ValueError(f"sparsity={sparsity} of {total} entries leaves nothing")
    try:
        return kth([leaf for leaf in leaves.values() if leaf.size], count)
    except FloatingPointError:
        for path, leaf in leaves.items():
            checked(path, leaf)
        raise


def _count(path: str, share: Scalar, size: int, cap: int) -> int | jax.Array:
    """How many of the entries of a leaf go."""
    if not isinstance(share, Tracer):
        return min(round(fraction(f"sparsity of {path}", share) * size), cap)
    high, low = wide_share(share, size)
    return jnp.minimum((high << 16) | low, jnp.uint32(cap))


def _unit_norm(leaf: Array) -> Array:
    """The leaf, in single precision or wider, divided by its L2 norm."""
    xp = cast(ArrayNamespace, np if readable(leaf) else jnp)
    wide = leaf.astype(np.promote_types(leaf.dtype, np.float32))
    # By the largest first, so that no square leaves the range of the numbers.
    wide = wide / power_of_two(xp, xp.max(xp.abs(wide), initial=0))
    norm = xp.sqrt(xp.sum(wide * wide))
    return wide / xp.where(norm == 0, xp.ones_like(norm), norm)
