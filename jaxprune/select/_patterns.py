"""Patterns: masks of single weights that hardware can use, n of m and blocks."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from jaxprune.core._checks import whole_number
from jaxprune.core._limits import Each, selected
from jaxprune.core._masks import PyTree
from jaxprune.core._placement import readable
from jaxprune.select._trees import checked, masks_like, scored
from jaxprune.select._weights import across_leaves, per_leaf

Pool = Literal["mean", "sum", "max"]


def n_of_m(
    scores: PyTree,
    n: int,
    m: int,
    *,
    axis: int = -2,
    only: str | Sequence[str] | None = None,
) -> PyTree:
    """Keeps the n highest-scoring of every m consecutive entries along an axis.

    The last entries of an axis that m does not divide form a shorter run, which keeps
    n of them too, or all if there are no more. Of equal scores the earlier stay. Leaves
    without that axis are left alone.

    Args:
        scores: tree of floats like the parameters, larger matters more; None where a
            leaf has no score. May be traced.
        n: how many of each run stay.
        m: length of a run.
        axis: along which axis runs lie. Sparse tensor cores want the axis that is
            summed over: -2 in ``x @ kernel`` and in convolution kernels HWIO.
        only: paths or patterns (as `fnmatch`) of the leaves to prune; None for all.

    Returns:
        Masks like `scores`, True = kept; the scalar True for leaves left alone.

    Raises:
        ValueError: unless 1 <= n <= m, if a pattern matches nothing, or a concrete
            score is NaN.

    Example:
        >>> import numpy as np
        >>> scores = {"kernel": np.array([[1.0], [4.0], [3.0], [2.0], [7.0]])}
        >>> n_of_m(scores, 2, 4)["kernel"].ravel()
        array([False,  True,  True, False,  True])

    References:
        Mishra et al., `Accelerating Sparse Deep Neural Networks
        <https://arxiv.org/abs/2104.08378>`_, 2021;
        Zhou et al., `Learning N:M Fine-grained Structured Sparse Neural Networks From
        Scratch <https://arxiv.org/abs/2102.04010>`_, 2021
    """
    if not 1 <= n <= m:
        raise ValueError(f"n of m needs 1 <= n <= m, got n={n} and m={m}")
    leaves = scored(scores)
    removed = {}
    for path in selected(leaves, only, "leaves"):
        leaf = checked(path, leaves[path])
        if -leaf.ndim <= axis < leaf.ndim:
            removed[path] = _lowest_of_runs(leaf, axis, m, n)
    return masks_like(scores, removed)


def _lowest_of_runs(leaf: Any, axis: int, m: int, n: int) -> Any:
    """All but the highest n of every run: an entry goes if n others rank above it."""
    xp: Any = np if readable(leaf) else jnp
    last = xp.moveaxis(xp.asarray(leaf), axis, -1)
    short = -last.shape[-1] % m
    # What fills up the last run never outranks an entry.
    padding = [(0, 0)] * (last.ndim - 1) + [(0, short)]
    runs = xp.pad(last, padding, constant_values=-np.inf)
    runs = runs.reshape(*last.shape[:-1], -1, m)
    above = xp.zeros(runs.shape, np.int32)
    for k in range(m):
        other = runs[..., k : k + 1]
        earlier = np.arange(m) > k
        earlier = earlier.reshape((1,) * (runs.ndim - 1) + (m,))
        outranked = (other > runs) | ((other == runs) & earlier)
        above = above + outranked.astype(np.int32)
    gone = (above >= n).reshape(*last.shape[:-1], -1)
    return xp.moveaxis(gone[..., : last.shape[-1]], -1, axis)


def blocks(
    scores: PyTree,
    *,
    shape: tuple[int, int],
    sparsity: Any,
    pool: Pool = "mean",
    across: bool = False,
    min_keep: Each[int] = 1,
    max_sparsity: Each[float] = 1.0,
    only: str | Sequence[str] | None = None,
) -> PyTree:
    """Removes blocks of the last two axes, lowest first.

    Blocks tile the last two axes of every leaf, separately for each index of the axes
    before. At the edges they are smaller. Leaves of fewer axes are left alone.

    Args:
        scores: tree of floats like the parameters, larger matters more; None where a
            leaf has no score. May be traced.
        shape: height and width of a block.
        sparsity: fraction of the blocks to remove, as for `per_leaf`.
        pool: how the scores in a block add up.
        across: rank the blocks of all leaves together (`across_leaves`), else each
            leaf alone (`per_leaf`).
        min_keep: how many blocks every leaf keeps at least.
        max_sparsity: no leaf loses more than this fraction of its blocks.
        only: paths or patterns (as `fnmatch`) of the leaves to prune; None for all.

    Returns:
        Masks like `scores`, True = kept; the scalar True for leaves left alone.

    Raises:
        ValueError: as `per_leaf` and `across_leaves`; or if `shape` or `pool` is not
            one.

    Example:
        >>> import numpy as np
        >>> scores = {"kernel": np.arange(12.0).reshape(2, 6)}
        >>> blocks(scores, shape=(2, 2), sparsity=1 / 3)["kernel"].astype(int)
        array([[0, 0, 1, 1, 1, 1],
               [0, 0, 1, 1, 1, 1]])

    References:
        Narang et al., `Block-Sparse Recurrent Neural Networks
        <https://arxiv.org/abs/1711.02782>`_, 2017
    """
    if len(shape) != 2 or min(whole_number("shape", side, 0) for side in shape) < 1:
        raise ValueError(f"shape must be the height and width of a block, got {shape}")
    if pool not in _POOLS:
        raise ValueError(f"pool must be one of {list(_POOLS)}, got {pool!r}")
    leaves = {p: x for p, x in scored(scores).items() if np.ndim(x) >= 2}
    if only is not None:
        leaves = {path: leaves[path] for path in selected(leaves, only, "leaves")}
    leaves = {path: checked(path, leaf) for path, leaf in leaves.items()}
    pooled = {path: _pooled(leaf, shape, pool) for path, leaf in leaves.items()}
    select = across_leaves if across else per_leaf
    masks = select(
        pooled,
        sparsity=sparsity,
        min_keep=min_keep,
        max_sparsity=max_sparsity,
        only=None if isinstance(sparsity, Mapping) else list(pooled),
    )
    removed = {}
    for path, leaf in leaves.items():
        xp: Any = np if isinstance(masks[path], np.ndarray) else jnp
        if masks[path].ndim:
            tall = xp.repeat(~masks[path], shape[0], axis=-2)[..., : leaf.shape[-2], :]
            removed[path] = xp.repeat(tall, shape[1], axis=-1)[..., : leaf.shape[-1]]
    return masks_like(scores, removed)


_POOLS = {"mean": "sum", "sum": "sum", "max": "max"}


def _pooled(leaf: Any, shape: tuple[int, int], pool: Pool) -> Any:
    """One score for every block."""
    xp: Any = np if readable(leaf) else jnp
    leaf = xp.asarray(leaf)
    rows, columns = (-(-n // b) for n, b in zip(leaf.shape[-2:], shape, strict=True))
    lead = leaf.shape[:-2]

    def total(values: Any, fill: float, how: str) -> Any:
        edge = [(0, -n % b) for n, b in zip(leaf.shape[-2:], shape, strict=True)]
        full = xp.pad(values, [(0, 0)] * len(lead) + edge, constant_values=fill)
        tiles = full.reshape(*lead, rows, shape[0], columns, shape[1])
        return getattr(tiles, how)(axis=(-3, -1))

    if pool == "max":
        return total(leaf, -np.inf, "max")
    found = total(leaf, 0.0, "sum")
    if pool == "sum":
        return found
    return found / total(xp.ones_like(leaf), 0.0, "sum")
