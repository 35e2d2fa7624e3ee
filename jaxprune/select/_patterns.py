"""Patterns: masks of single weights that hardware can use, n of m and blocks."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias, cast

import jax.numpy as jnp
import numpy as np

from jaxprune.core._checks import whole_number
from jaxprune.core._leaves import kernel_paths
from jaxprune.core._limits import Each, fraction, selected
from jaxprune.core._placement import readable
from jaxprune.core._types import Array, ArrayNamespace, PyTree, Scalar
from jaxprune.select._trees import checked, masks_like, scored
from jaxprune.select._weights import across_leaves, per_leaf

Pool = Literal["mean", "sum", "max"]
# One axis for all leaves, or path or pattern -> axis or axes.
Along: TypeAlias = int | Mapping[str, int | Sequence[int]]


def n_of_m(
    scores: PyTree,
    n: int,
    m: int,
    *,
    axis: Along | None = None,
    only: str | Sequence[str] | None = None,
) -> PyTree:
    """Keeps the n highest-scoring of every m consecutive entries along an axis.

    Sparse tensor cores want runs along the axis that a layer sums over, and only the
    program knows which that is: ``axis=taps.contracted_axes(apply_fn, variables,
    *args)`` asks it. Several axes count as one, the last of them innermost.

    The last entries of an axis that m does not divide form a shorter run, which keeps
    n of them too, or all if there are no more. Of equal scores the earlier stay. Leaves
    without that axis are left alone.

    Args:
        scores: tree of floats like the parameters, larger matters more; None where a
            leaf has no score. May be traced.
        n: how many of each run stay.
        m: length of a run.
        axis: along which axis runs lie: what `taps.contracted_axes` returns; or one
            axis for all leaves (-2 for kernels ``x @ kernel`` and HWIO, -1 for weights
            ``[out, in]``); or path or pattern -> axis or axes, () to leave a leaf
            alone. A mapping must name every kernel (an embedding and a tied weight
            too, which `taps.contracted_axes` cannot), unless `only` selects others;
            what else it does not name is left alone.
        only: paths or patterns (as `fnmatch`) of the leaves to prune; None for all.

    Returns:
        Masks like `scores`, True = kept; the scalar True for leaves left alone.

    Raises:
        ValueError: if no axis is given or a mapping lacks a kernel, unless
            1 <= n <= m, if a pattern matches nothing, or a concrete score is NaN.

    Example:
        >>> import numpy as np
        >>> scores = {"kernel": np.array([[1.0], [4.0], [3.0], [2.0], [7.0]])}
        >>> n_of_m(scores, 2, 4, axis=-2)["kernel"].ravel()
        array([False,  True,  True, False,  True])

    References:
        Mishra et al., `Accelerating Sparse Deep Neural Networks
        <https://arxiv.org/abs/2104.08378>`_, 2021;
        Zhou et al., `Learning N:M Fine-grained Structured Sparse Neural Networks From
        Scratch <https://arxiv.org/abs/2102.04010>`_, 2021
    """
    n, m = whole_number("n", n), whole_number("m", m)
    if n > m:
        raise ValueError(f"n of m needs 1 <= n <= m, got n={n} and m={m}")
    leaves = scored(scores)
    removed = {}
    for path, axes in _along(leaves, axis, only).items():
        leaf = checked(path, leaves[path])
        removed[path] = _in_lines(leaf, axes, partial(_lowest_of_runs, m=m, n=n))
    return masks_like(scores, removed)


def per_output(
    scores: PyTree,
    *,
    sparsity: float,
    axis: Along | None = None,
    only: str | Sequence[str] | None = None,
) -> PyTree:
    """Removes the same fraction of the weights into every output, lowest first.

    Weights are compared within one output, never between outputs: Wanda's rule, for
    which the scores of different outputs mean different things. In a convolution an
    output has height x width x input channels weights.

    Args:
        scores: tree of floats like the parameters, larger matters more; None where a
            leaf has no score. May be traced.
        sparsity: fraction to remove, in [0, 1]; of k weights into an output
            ``round(sparsity * k)`` go, but never all.
        axis: the axes that are summed over, as for `n_of_m`.
        only: paths or patterns (as `fnmatch`) of the leaves to prune; None for all.

    Returns:
        Masks like `scores`, True = kept; the scalar True for leaves left alone.

    Raises:
        ValueError: as `n_of_m`.

    Example:
        >>> import numpy as np
        >>> scores = {"kernel": np.array([[1.0, 30.0], [4.0, 20.0], [3.0, 10.0]])}
        >>> per_output(scores, sparsity=1 / 3, axis=0)["kernel"].astype(int)
        array([[0, 1],
               [1, 1],
               [1, 0]])

    References:
        Sun et al., `A Simple and Effective Pruning Approach for Large Language Models
        <https://arxiv.org/abs/2306.11695>`_, 2023
    """
    share = fraction("sparsity", sparsity)
    leaves = scored(scores)
    removed = {}
    for path, axes in _along(leaves, axis, only).items():
        leaf = checked(path, leaves[path])
        removed[path] = _in_lines(leaf, axes, partial(_lowest_of_lines, share=share))
    return masks_like(scores, removed)


def _along(
    leaves: Mapping[str, Array], axis: Along | None, only: str | Sequence[str] | None
) -> dict[str, tuple[int, ...]]:
    """Path -> the axes that make up a line, for the leaves that have them."""
    if axis is None:
        raise ValueError(
            "axis is missing: along which axis a layer sums cannot be seen from its "
            "scores; pass axis=taps.contracted_axes(apply_fn, variables, *args), or -2 "
            "for kernels of x @ kernel and HWIO, -1 for weights [out, in]"
        )
    chosen = selected(leaves, only, "leaves")
    if isinstance(axis, int):
        known = dict.fromkeys(chosen, (axis,))
        return {
            p: a
            for p, a in known.items()
            if -np.ndim(leaves[p]) <= axis < np.ndim(leaves[p])
        }
    known = {}
    for pattern, axes in axis.items():
        # Scores of the parameters alone go with axes of the variables.
        here = pattern.removeprefix("params/")
        pattern = here if pattern not in leaves and here in leaves else pattern
        own = (axes,) if isinstance(axes, int) else tuple(axes)
        known |= dict.fromkeys(selected(leaves, pattern, "leaves"), own)
    unknown = [path for path in chosen if path not in known]
    if only is not None and unknown:
        raise ValueError(f"axis names no axis of {unknown[0]}, which only= selects")
    if missing := kernel_paths({path: leaves[path] for path in unknown}):
        raise ValueError(
            f"axis names no axis of the kernel {missing[0]} ({len(missing)} in all), "
            "which would stay whole: products sum over none or several of its axes, "
            "as of an embedding or a tied weight; give its axis, () to leave it alone "
            f"(axis={{**axes, {missing[0]!r}: ()}}), or only= for the leaves to prune"
        )
    return {path: known[path] for path in chosen if known.get(path)}


def _in_lines(
    leaf: Array, axes: tuple[int, ...], lowest: Callable[[Any, Any], Any]
) -> Array:
    """What goes of a leaf whose axes, moved to the end, are one line: bool like it."""
    xp = cast(ArrayNamespace, np if readable(leaf) else jnp)
    ends = tuple(range(-len(axes), 0))
    last = xp.moveaxis(xp.asarray(leaf), axes, ends)
    lines = last.reshape(*last.shape[: last.ndim - len(axes)], -1)
    return xp.moveaxis(lowest(xp, lines).reshape(last.shape), ends, axes)


def _lowest_of_lines(xp: ArrayNamespace, lines: Array, share: float) -> Array:
    """The lowest of every line; of equal ones the later go."""
    size = lines.shape[-1]
    count = min(round(share * size), max(size - 1, 0))
    backwards = xp.flip(lines, -1)
    order = xp.argsort(backwards, axis=-1, stable=True)
    places = xp.argsort(order, axis=-1, stable=True)
    return xp.flip(places < count, -1)


def _lowest_of_runs(xp: ArrayNamespace, last: Array, m: int, n: int) -> Array:
    """All but the highest n of every run: an entry goes if n others rank above it."""
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
    return gone[..., : last.shape[-1]]


def blocks(
    scores: PyTree,
    *,
    shape: tuple[int, int],
    sparsity: Scalar | Mapping[str, Scalar],
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
    select: Callable[..., PyTree] = across_leaves if across else per_leaf
    masks = select(
        pooled,
        sparsity=sparsity,
        min_keep=min_keep,
        max_sparsity=max_sparsity,
        only=None if isinstance(sparsity, Mapping) else list(pooled),
    )
    removed = {}
    for path, leaf in leaves.items():
        xp = cast(ArrayNamespace, np if isinstance(masks[path], np.ndarray) else jnp)
        if masks[path].ndim:
            tall = xp.repeat(~masks[path], shape[0], axis=-2)[..., : leaf.shape[-2], :]
            removed[path] = xp.repeat(tall, shape[1], axis=-1)[..., : leaf.shape[-1]]
    return masks_like(scores, removed)


_POOLS = {"mean": "sum", "sum": "sum", "max": "max"}


def _pooled(leaf: Array, shape: tuple[int, int], pool: Pool) -> Array:
    """One score for every block."""
    xp = cast(ArrayNamespace, np if readable(leaf) else jnp)
    leaf = xp.asarray(leaf)
    rows, columns = (-(-n // b) for n, b in zip(leaf.shape[-2:], shape, strict=True))
    lead = leaf.shape[:-2]

    def total(values: Array, fill: float, how: str) -> Array:
        # Blocks at the edge are filled up with what does not change their score; for a
        # mean the ones below count how many entries are real.
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
