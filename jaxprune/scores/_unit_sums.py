"""What the entries of every unit add up to: in numpy on the host, or in one program."""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.core._leafwise import numbers, wide_dtype, widened
from jaxprune.core._placement import all_placed_like, on_all_cores, on_host

Reduce = Literal["l1", "l2", "sum", "mean", "max", "abs_of_sum", "square_of_sum"]

Leaves: TypeAlias = Mapping[str, Any]
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
    """
    compute = _on_host if on_host(*leaves.values()) else _compiled
    return compute(leaves, indices, places, reduce)


def _axes(places: Places) -> dict[str, list[int]]:
    """Path -> the axes that groups are on."""
    axes: dict[str, list[int]] = {}
    for path, d in sorted({place for each in places for place in each}):
        axes.setdefault(path, []).append(d)
    return axes


@functools.partial(jax.jit, static_argnames=("places", "reduce"))
def _compiled(
    leaves: Leaves, indices: Indices, places: Places, reduce: Reduce
) -> list[jax.Array]:
    lines = {
        path: _add_up(leaves[path], axes, reduce)
        for path, axes in _axes(places).items()
    }
    return _unit_scores(jnp, leaves, lines, indices, places, reduce)


def _on_host(
    leaves: Leaves, indices: Indices, places: Places, reduce: Reduce
) -> list[jax.Array]:
    axes = _axes(places)
    added = on_all_cores(
        lambda path: _add_up_on_host(leaves[path], axes[path], reduce),
        list(axes),
        [leaves[path].size for path in axes],
    )
    lines = dict(zip(axes, added, strict=True))
    with np.errstate(all="ignore"):  # as in JAX, inf and NaN are no events
        found = _unit_scores(np, leaves, lines, indices, places, reduce)
    own = [[leaves[path] for path, _ in each] for each in places]
    dtypes = [np.result_type(*{wide_dtype(x.dtype) for x in each}) for each in own]
    done = [units.astype(dtype) for units, dtype in zip(found, dtypes, strict=True)]
    return all_placed_like(done, [first for first, *_ in own])


def _unit_scores(
    xp: Any,
    leaves: Leaves,
    lines: Mapping[str, Mapping[int, Any]],
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
            found.append(xp.stack([line[i].max(1) for line, i in parts]).max(0))
            continue
        total = xp.stack([_picked(line, index) for line, index in parts]).sum(0)
        shapes = [(leaves[path].shape, d) for path, d in each]
        entries = sum(
            index.shape[1] * (math.prod(shape) // shape[d])
            for (shape, d), index in zip(shapes, own, strict=True)
        )
        found.append(_finished(xp, total, reduce, entries))
    return found


def _picked(line: Any, index: np.ndarray) -> Any:
    """What every unit holds of a line."""
    return line[index[:, 0]] if index.shape[1] == 1 else line[index].sum(1)


def _add_up(
    scores: jax.Array, axes: Sequence[int], reduce: Reduce
) -> dict[int, jax.Array]:
    """Axis -> the terms of all entries at every position of it, reduced."""
    terms = widened(scores)
    if reduce in ("l1", "l2"):
        terms = jnp.abs(terms) if reduce == "l1" else jnp.square(terms)
    add_up = jnp.max if reduce == "max" else jnp.sum
    rest = {d: tuple(k for k in range(scores.ndim) if k != d) for d in axes}
    return {d: add_up(terms, others) for d, others in rest.items()}


def _add_up_on_host(
    scores: Any, axes: Sequence[int], reduce: Reduce
) -> dict[int, np.ndarray]:
    """`_add_up`, reading memory once; sums of blocks add up in double precision."""
    whole = np.ascontiguousarray(scores)
    wide = np.result_type(wide_dtype(whole.dtype), np.float64)
    start = -np.inf if reduce == "max" else 0
    lines = {d: np.full(whole.shape[d], start, wide) for d in axes}
    combine = np.maximum if reduce == "max" else np.add
    with np.errstate(all="ignore"):  # as in JAX, inf and NaN are no events
        for block in _blocks(whole.shape):
            part = numbers(whole[block])
            for d, line in lines.items():
                here = line[block[d]] if d < len(block) else line
                combine(here, _line(part, d, reduce), out=here)
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


def _line(part: np.ndarray, axis: int, reduce: Reduce) -> np.ndarray:
    """The terms of one piece at every position of an axis, reduced."""
    before, size = math.prod(part.shape[:axis]), part.shape[axis]
    grid = part.reshape(before, size, math.prod(part.shape[axis + 1 :]))
    if reduce == "l2":  # one pass, no squares in memory
        return np.einsum("abc,abc->b", grid, grid)
    if reduce == "max":
        return grid.max((0, 2))
    return (np.abs(grid) if reduce == "l1" else grid).sum((0, 2))


def _finished(xp: Any, total: Any, reduce: Reduce, entries: int) -> Any:
    if reduce == "l2":
        return _sqrt(xp, total)
    if reduce == "mean":
        return total / entries
    if reduce == "abs_of_sum":
        return xp.abs(total)
    return xp.square(total) if reduce == "square_of_sum" else total


def _sqrt(xp: Any, total: Any) -> Any:
    """Square root with gradient 0 at 0, so that a dead unit does not yield NaN."""
    zero = total == 0
    zeros, ones = xp.zeros_like(total), xp.ones_like(total)
    return xp.where(zero, zeros, xp.sqrt(xp.where(zero, ones, total)))
