"""Prefixes: parts of an array at positions that are known, as slices alone.

The positions that a width keeps along an axis are a few runs: one where the axis holds
one group, one per group behind a concatenation, one per position of the image behind a
flatten. Runs of one length at one distance are a slice of a reshaped axis.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Runs(NamedTuple):
    """Kept positions of one axis.

    Attributes:
        axis: of the leaf.
        positions: which, ascending.
    """

    axis: int
    positions: np.ndarray


def take(x: object, cuts: Sequence[Runs]) -> Any:
    """The part of an array at these positions of some of its axes.

    Example:
        >>> x = jnp.arange(6).reshape(2, 3)
        >>> take(x, [Runs(1, np.array([0, 1]))])
        Array([[0, 1],
               [3, 4]], dtype=int32)
    """
    x = jnp.asarray(x)
    whole = [each for each in cuts if _is_run(each.positions)]
    if whole:  # all of them are one slice
        starts, stops = [0] * x.ndim, list(x.shape)
        for axis, positions in whole:
            starts[axis], stops[axis] = int(positions[0]), int(positions[-1]) + 1
        x = lax.slice(x, starts, stops)
    for axis, positions in cuts:
        if not _is_run(positions):
            x = _take_runs(x, axis, positions)
    return x


def put(x: object, cuts: Sequence[Runs], part: object) -> Any:
    """The array with other values where `take` reads."""
    x, part = jnp.asarray(x), jnp.asarray(part)
    if not cuts:
        return part
    at = [np.arange(size) for size in x.shape]
    for axis, positions in cuts:
        at[axis] = positions
    if all(map(_is_run, at)):
        where = tuple(slice(int(p[0]), int(p[-1]) + 1) for p in at)
        return x.at[where].set(part)
    return x.at[np.ix_(*at)].set(part, unique_indices=True)


def _is_run(positions: np.ndarray) -> bool:
    return int(positions[-1]) - int(positions[0]) + 1 == len(positions)


def _take_runs(x: jax.Array, axis: int, positions: np.ndarray) -> jax.Array:
    """Several runs of positions of one axis."""
    breaks = np.flatnonzero(np.diff(positions) != 1) + 1
    runs = np.split(positions, breaks)
    lengths, starts = {len(run) for run in runs}, np.array([run[0] for run in runs])
    steps = set(np.diff(starts).tolist())
    if len(lengths) == 1 and len(steps) == 1:
        found = _take_every(x, axis, starts, lengths.pop(), steps.pop())
        if found is not None:
            return found
    parts = [lax.slice_in_dim(x, int(r[0]), int(r[-1]) + 1, axis=axis) for r in runs]
    return jnp.concatenate(parts, axis)


def _take_every(
    x: jax.Array, axis: int, starts: np.ndarray, length: int, step: int
) -> jax.Array | None:
    """Runs of one length at one distance: a slice of the axis split in two.

    None where the axis ends within the distance of the last run or of the first.
    """
    n, size = len(starts), x.shape[axis]
    begin = int(starts[0])
    offset = max(begin + n * step - size, 0)  # begin earlier, so that the last one fits
    if offset > begin or offset + length > step:
        return None
    x = lax.slice_in_dim(x, begin - offset, begin - offset + n * step, axis=axis)
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    x = x.reshape(*before, n, step, *after)
    x = lax.slice_in_dim(x, offset, offset + length, axis=axis + 1)
    return x.reshape(*before, n * length, *after)
