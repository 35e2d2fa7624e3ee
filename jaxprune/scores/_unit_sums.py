"""What the entries of every unit add up to: in numpy on the host, or in one program."""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxprune.core._leafwise import (
    numbers,
    power_of_two,
    real_dtype,
    wide_dtype,
    widened,
)
from jaxprune.core._placement import all_placed_like, on_all_cores, on_host
from jaxprune.core._types import Array, ArrayNamespace

Reduce = Literal[
    "l1", "l2", "sum", "mean", "max", "abs_of_sum", "square_of_sum", "signed_sum"
]
BY_SIGN = ("sum", "mean", "max")  # a unit of negative scores ranks below a dead one

Leaves: TypeAlias = Mapping[str, Array]
Places: TypeAlias = Sequence[Sequence[tuple[str, int]]]  # members' (path, axis)
Indices: TypeAlias = Sequence[Sequence[np.ndarray]]  # and their positions


def add_up_units(
    leaves: Leaves, indices: Indices, places: Places, reduce: Reduce
) -> list[jax.Array]:
    """The reduced scores of every group.

    Args:
        leaves: path -> scores of entries.
        indices: for every group and member, the positions ``[size, repeats]``.
        places: for every group and member, its path and axis.
        reduce: see `jaxprune.scores.group_scores`.

    Returns:
        float ``[size]`` for every group.

    Raises:
        TypeError: if scores are complex and the reduction needs an order.
        ValueError: if a score is negative and the reduction ranks by sign.
    """
    for path, leaf in leaves.items():
        if reduce not in _SIZES and jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise TypeError(
                f"scores[{path}] are {leaf.dtype}, which reduce={reduce!r} cannot "
                "rank; use reduce='abs_of_sum', or take jnp.abs first"
            )
    compute = _on_host if on_host(*leaves.values()) else _compiled
    found, negative = compute(leaves, indices, places, reduce)
    for path, below in negative.items():
        if not isinstance(below, Tracer) and below:
            raise ValueError(
                f"scores[{path}] are negative for some entries, so reduce={reduce!r} "
                "would rank units that matter below dead ones, which score 0; use "
                "'abs_of_sum' (how much the whole unit changes), 'l1' or 'l2', or "
                "'signed_sum' to rank by sign on purpose"
            )
    return found


_SIZES = ("l1", "l2", "abs_of_sum", "square_of_sum")


def _axes(places: Places) -> dict[str, list[int]]:
    """Path -> the axes that groups are on."""
    axes: dict[str, list[int]] = {}
    for path, d in sorted({place for each in places for place in each}):
        axes.setdefault(path, []).append(d)
    return axes


@functools.partial(jax.jit, static_argnames=("places", "reduce"))
def _compiled(
    leaves: Leaves, indices: Indices, places: Places, reduce: Reduce
) -> tuple[list[jax.Array], Mapping[str, Array | np.bool | bool]]:
    """The scores of every group, and path -> is any score of that leaf negative?"""
    lines = {
        path: _add_up(leaves[path], axes, reduce)
        for path, axes in _axes(places).items()
    }
    negative: dict[str, Array | np.bool | bool] = {}
    if reduce in BY_SIGN:
        negative = {path: (leaves[path] < 0).any() for path in lines}
    return _unit_scores(jnp, leaves, lines, indices, places, reduce), negative


def _on_host(
    leaves: Leaves, indices: Indices, places: Places, reduce: Reduce
) -> tuple[list[jax.Array], Mapping[str, Array | np.bool | bool]]:
    """The same in numpy, leaf by leaf."""
    axes = _axes(places)
    added = on_all_cores(
        lambda path: _add_up_on_host(leaves[path], axes[path], reduce),
        list(axes),
        [leaves[path].size for path in axes],
    )
    lines = {path: line for path, (line, _) in zip(axes, added, strict=True)}
    negative = {path: below for path, (_, below) in zip(axes, added, strict=True)}
    with np.errstate(all="ignore"):  # as in JAX, inf and NaN are no events
        found = _unit_scores(np, leaves, lines, indices, places, reduce)
    own = [[leaves[path] for path, _ in each] for each in places]
    dtypes = [np.result_type(*{real_dtype(x.dtype) for x in each}) for each in own]
    with np.errstate(all="ignore"):
        done = [x.astype(dtype) for x, dtype in zip(found, dtypes, strict=True)]
    return all_placed_like(done, [first for first, *_ in own]), negative


class Line(NamedTuple):
    """What the entries at every position of an axis add up to.

    Attributes:
        total: ``[n]``, of the terms.
        scale: ``[n]`` or a number that the entries were divided by before they were
            squared (`power_of_two`).
    """

    total: Array
    scale: Array | float = 1.0


def _unit_scores(
    xp: ArrayNamespace,
    leaves: Leaves,
    lines: Mapping[str, Mapping[int, Line]],
    indices: Indices,
    places: Places,
    reduce: Reduce,
) -> list[Any]:
    """The scores of every group, from `lines` that hold what axes add up to.

    Reduced first, picked then: the gather is over one axis, never over the parameter.
    """
    found = []
    for each, own in zip(places, indices, strict=True):
        parts = [(lines[p][d], index) for (p, d), index in zip(each, own, strict=True)]
        if reduce == "max":
            found.append(xp.stack([x.total[i].max(1) for x, i in parts]).max(0))
            continue
        if reduce == "l2":
            found.append(_norm(xp, parts))
            continue
        total = xp.stack([_picked(line.total, index) for line, index in parts]).sum(0)
        shapes = [(leaves[path].shape, d) for path, d in each]
        entries = sum(
            index.shape[1] * (math.prod(shape) // shape[d])
            for (shape, d), index in zip(shapes, own, strict=True)
        )
        found.append(_finished(xp, total, reduce, entries))
    return found


def _norm(xp: ArrayNamespace, parts: Sequence[tuple[Line, np.ndarray]]) -> Array:
    """The root of the sum of squares, each divided by the largest scale of a unit."""
    scales = [
        xp.broadcast_to(line.scale, line.total.shape)[index] for line, index in parts
    ]
    largest = xp.stack([scale.max(1) for scale in scales]).max(0)
    squares = [
        (line.total[index] * xp.square(scale / largest[:, None])).sum(1)
        for (line, index), scale in zip(parts, scales, strict=True)
    ]
    return largest * _sqrt(xp, xp.stack(squares).sum(0))


def _picked(line: Any, index: np.ndarray) -> Array:
    """What every unit holds of a line."""
    return line[index[:, 0]] if index.shape[1] == 1 else line[index].sum(1)


def _add_up(scores: Array, axes: Sequence[int], reduce: Reduce) -> dict[int, Line]:
    """Axis -> the terms of all entries at every position of it, reduced."""
    terms = widened(scores)
    if reduce in ("l1", "l2"):
        terms = jnp.abs(terms)
    rest = {d: tuple(k for k in range(scores.ndim) if k != d) for d in axes}
    if reduce == "l2":
        return {d: _squares(terms, others) for d, others in rest.items()}
    add_up = jnp.max if reduce == "max" else jnp.sum
    return {d: Line(add_up(terms, others)) for d, others in rest.items()}


def _squares(sizes: jax.Array, others: tuple[int, ...]) -> Line:
    scale = power_of_two(jnp, sizes.max(others, keepdims=True, initial=0))
    return Line(jnp.square(sizes / scale).sum(others), scale.ravel())


def _add_up_on_host(
    scores: Array, axes: Sequence[int], reduce: Reduce
) -> tuple[dict[int, Line], bool]:
    """`_add_up`, reading memory once; sums of blocks add up in double precision.

    Also says whether a score is negative, where the reduction ranks by sign.
    """
    whole = np.ascontiguousarray(scores).reshape(np.shape(scores))
    scales: dict[int, Any] = dict.fromkeys(axes, 1.0)
    with np.errstate(all="ignore"):  # as in JAX, inf and NaN are no events
        if reduce == "l2" and real_dtype(whole.dtype) == np.float64:
            # Squares of single precision fit into double; those of double do not.
            sizes = _reduced(whole, axes, "largest", scales)
            scales = {d: power_of_two(np, sizes[d]) for d in axes}
        lines = _reduced(whole, axes, reduce, scales)
        below = reduce in BY_SIGN and bool(
            any((whole[block] < 0).any() for block in _blocks(whole.shape))
        )
    return {d: Line(lines[d], scales[d]) for d in axes}, below


def _reduced(
    whole: np.ndarray, axes: Sequence[int], reduce: str, scales: Mapping[int, Any]
) -> dict[int, np.ndarray]:
    """Axis -> what the terms at its positions come to, block by block."""
    dtype = wide_dtype(whole.dtype)
    if reduce in ("l1", "l2", "largest"):
        dtype = real_dtype(whole.dtype)
    wide = np.result_type(dtype, np.float64)
    start = -np.inf if reduce == "max" else 0
    lines = {d: np.full(whole.shape[d], start, wide) for d in axes}
    combine = np.maximum if reduce in ("max", "largest") else np.add
    for block in _blocks(whole.shape):
        part = numbers(whole[block])
        for d, line in lines.items():
            here = block[d] if d < len(block) else slice(None)
            scale = scales[d] if np.ndim(scales[d]) == 0 else scales[d][here]
            combine(line[here], _line(part, d, reduce, scale), out=line[here])
    return lines


_BLOCK = 1 << 18  # entries that stay in a core's cache with their terms


def _blocks(shape: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Pieces of consecutive entries, as slices of the leading axes."""
    inner = math.prod(shape[1:])
    rows = max(1, _BLOCK // max(1, inner))
    for start in range(0, shape[0], rows):
        here = slice(start, start + rows)
        if inner <= _BLOCK:
            yield (here,)
        else:
            yield from ((here, *rest) for rest in _blocks(shape[1:]))


def _line(part: np.ndarray, axis: int, reduce: str, scale: Array | float) -> np.ndarray:
    """The terms of one piece at every position of an axis, reduced."""
    before, size = math.prod(part.shape[:axis]), part.shape[axis]
    grid = part.reshape(before, size, math.prod(part.shape[axis + 1 :]))
    if reduce == "l2":
        return _squares_on_host(grid, scale)
    if reduce == "max":
        return grid.max((0, 2))
    if reduce == "largest":
        return np.abs(grid).max((0, 2), initial=0)
    return (np.abs(grid) if reduce == "l1" else grid).sum((0, 2))


def _squares_on_host(grid: np.ndarray, scale: Array | float) -> np.ndarray:
    """In double precision, so that what is around 1e-25 or 1e20 counts as well."""
    if np.iscomplexobj(grid):
        grid = np.abs(grid)
    grid = grid.astype(np.float64)
    if np.ndim(scale):
        grid = grid / np.asarray(scale)[:, None]
    return np.einsum("abc,abc->b", grid, grid)  # one pass, no squares in memory


def _finished(xp: ArrayNamespace, total: Array, reduce: Reduce, entries: int) -> Array:
    if reduce == "mean":
        return total / entries
    if reduce == "abs_of_sum":
        return xp.abs(total)
    return xp.square(xp.abs(total)) if reduce == "square_of_sum" else total


def _sqrt(xp: ArrayNamespace, total: Array) -> Array:
    """Square root with gradient 0 at 0, so that a dead unit does not yield NaN."""
    zero = total == 0
    zeros, ones = xp.zeros_like(total), xp.ones_like(total)
    return xp.where(zero, zeros, xp.sqrt(xp.where(zero, ones, total)))
