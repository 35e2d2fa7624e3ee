"""Positions: which places of every axis a mask keeps.

Masks that `expand_masks` makes are outer products: an entry is kept if its position is
kept on every axis. That is known when they are made and needed when they are used, by
`slice_params` and by `narrow`, so it is remembered instead of read back from masks that
may be as large as the model. Such masks cannot be written to.

Where the layers of a scan keep positions of their own, as many in each, a mask is an
outer product in every layer. What an axis keeps is then an array of the leaf's rank, of
size 1 on all axes but its own and that of the layers.
"""

import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias, cast

import numpy as np

from jaxprune.core._types import Array

BoolArray: TypeAlias = Array  # of bool: numpy where concrete, jax inside jit
# For every axis bool ``[n]``, or of the leaf's rank where layers differ; None = all.
Kept: TypeAlias = tuple[np.ndarray | None, ...]

# id of a mask -> the mask and what `axis_keep` says of it; gone when the mask is.
_OUTER: dict[int, tuple[weakref.ref, Kept]] = {}


def outer_mask(axes: Mapping[int, BoolArray], ndim: int) -> BoolArray:
    """The mask that keeps an entry if its position is kept on every axis.

    Args:
        axes: axis -> bool ``[size]``, True = kept; other axes are kept whole. Concrete
            arrays are the mask's from now on: nobody can write to them any more.
        ndim: how many axes the leaf has.

    Returns:
        Bools; singleton on every axis that is kept whole, the scalar True if all are.

    Example:
        >>> outer_mask({1: np.array([True, False, True])}, 2)
        array([[ True, False,  True]])
    """
    # An axis that loses everything empties the leaf; what the others lose would be
    # lost in the outer AND, and no longer matters.
    left = {axis: _count(kept, axis) for axis, kept in axes.items()}
    empty = {axis: kept for axis, kept in axes.items() if left[axis] == 0}
    if any(kept.ndim > 1 for kept in empty.values()):
        empty = {}  # in every layer: which of these stay still matters
    some = (empty or axes).items()
    cut = {axis: kept for axis, kept in some if not _is_whole(kept)}
    mask = np.array(True)
    for axis, kept in cut.items():
        line = kept if kept.ndim > 1 else line_along(kept, axis, ndim)
        mask = _both(mask, line) if mask.ndim else line
    lengths = [_length(kept, axis) for axis, kept in cut.items()]
    if cut and isinstance(mask, np.ndarray) and 1 not in lengths:
        lines = tuple(cast(np.ndarray | None, cut.get(d)) for d in range(ndim))
        return remembered(mask, lines)
    return mask


def both_kept(a: BoolArray, b: BoolArray, axis: int) -> BoolArray:
    """What two cuts of an axis keep, each bool ``[n]`` or of the leaf's rank."""
    rank = max(a.ndim, b.ndim)
    return (a if a.ndim == rank else line_along(a, axis, rank)) & (
        b if b.ndim == rank else line_along(b, axis, rank)
    )


def count_kept(kept: np.ndarray, axis: int) -> int:
    """How many positions of an axis stay, in every layer that does."""
    if kept.ndim == 1:
        return int(np.count_nonzero(kept))
    return int(np.count_nonzero(kept, axis=axis).max(initial=0))


def cuts(kept: Kept) -> list[tuple[int, np.ndarray]]:
    """Axis and its kept positions, in an order in which they can be taken.

    Positions are int ``[m]``; or, where layers differ, of the leaf's rank, for
    `take_along_axis` once the other axes are cut.
    """
    lines = [(d, k) for d, k in enumerate(kept) if k is not None and k.ndim == 1]
    whole = [(d, np.flatnonzero(k)) for d, k in lines]
    for axis, rows in layer_rows(kept):
        counts = np.unique(np.count_nonzero(rows, axis=axis))
        if len(counts) > 1:
            raise ValueError(
                f"layers keep {', '.join(map(str, counts))} positions of axis {axis}, "
                "and one scan has one size for all: cut as many from each, or give "
                "unroll=True to slice_params and narrow to write the scan out"
            )
        order = np.argsort(~rows, axis=axis, kind="stable")
        own = np.take(order, np.arange(count_kept(rows, axis)), axis=axis)
        whole.append((axis, own))
    return whole


def first_layer(kept: Kept) -> Kept:
    """What the first layer that stays keeps, for what knows one width for all."""
    first = dict(layer_rows(kept))
    lines = [
        np.moveaxis(first[d], d, -1).reshape(-1, first[d].shape[d])[0]
        if d in first
        else k
        for d, k in enumerate(kept)
    ]
    return tuple(lines)


def layer_rows(kept: Kept) -> Iterator[tuple[int, np.ndarray]]:
    """Every axis of which layers keep positions of their own, in the layers that stay.

    Returns:
        Axis and bool of the leaf's rank.
    """
    for axis, rows in enumerate(kept):
        if rows is None or rows.ndim == 1:
            continue
        for d, line in enumerate(kept):
            if line is not None and line.ndim == 1 and rows.shape[d] == len(line):
                rows = np.compress(line, rows, axis=d)
        yield axis, rows


def axis_keep(mask: BoolArray, shape: tuple[int, ...]) -> Kept:
    """Which positions of every axis survive: those kept anywhere along the others.

    A singleton axis of the mask says nothing about positions: it keeps them all. So a
    mask of shape (1, n) that is False throughout removes n columns, but no row.

    Args:
        mask: concrete bools that broadcast to `shape`, True = kept.
        shape: the shape of the masked leaf.

    Returns:
        For every axis bool ``[shape[axis]]``, or None where all positions are kept; of
        the rank of `shape` where the mask is known to keep other positions in every
        layer (see `recalled`).

    Example:
        >>> import numpy as np
        >>> axis_keep(np.array([[True, False, True]]), (2, 3))
        (None, array([ True, False,  True]))
    """
    known = known_keep(mask)
    if known is not None:
        return known
    if mask.ndim == 0:
        return tuple(None if mask else np.zeros(size, bool) for size in shape)
    kept = []
    for axis, size in enumerate(mask.shape):
        if size == 1:
            kept.append(None)
            continue
        others = tuple(other for other in range(mask.ndim) if other != axis)
        positions = mask.any(axis=others)
        kept.append(None if positions.all() else positions)
    return tuple(kept)


def keeps_whole_positions(mask: np.ndarray, kept: Sequence[np.ndarray | None]) -> bool:
    """Does the mask remove nothing inside of what it keeps, as `axis_keep` tells?

    Example:
        >>> mask = np.array([[True, False], [False, True]])
        >>> keeps_whole_positions(mask, axis_keep(mask, (2, 2)))
        False
    """
    if known_keep(mask) is not None:
        return True
    sizes = zip(mask.shape, kept[: mask.ndim], strict=True)
    inside = (n if n == 1 or k is None else np.count_nonzero(k) for n, k in sizes)
    return bool(np.count_nonzero(mask) == math.prod(inside))


def sizes_kept(kept: Kept, shape: tuple[int, ...]) -> tuple[int, ...]:
    pairs = enumerate(zip(kept, shape, strict=True))
    return tuple(n if k is None else count_kept(k, d) for d, (k, n) in pairs)


def merged_layers(kept: np.ndarray, axis: int) -> np.ndarray:
    """Bool ``[n]`` instead of an array of the leaf's rank whose layers are alike."""
    if kept.ndim == 1:
        return kept
    lines = np.moveaxis(kept, axis, -1).reshape(-1, kept.shape[axis])
    return lines[0] if (lines == lines[:1]).all() else kept


def line_along(line: BoolArray, axis: int, ndim: int) -> BoolArray:
    return line.reshape([-1 if other == axis else 1 for other in range(ndim)])


def _is_whole(kept: BoolArray) -> bool:
    """Is every position kept, as far as that is known?"""
    return isinstance(kept, np.ndarray) and bool(kept.all())


def _length(kept: BoolArray, axis: int) -> int:
    return kept.shape[axis if kept.ndim > 1 else 0]


def _both(left: BoolArray, right: BoolArray) -> BoolArray:
    if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
        # The same as of bools, which numpy broadcasts many times slower.
        return np.bitwise_and(left.view(np.uint8), right.view(np.uint8)).view(bool)
    return left & right


def _count(kept: BoolArray, axis: int) -> int | None:
    """How many positions are kept; None if that is not known yet."""
    return count_kept(kept, axis) if isinstance(kept, np.ndarray) else None


def remembered(mask: np.ndarray, kept: Kept) -> np.ndarray:
    """A mask of which `kept` will be true for as long as it lives."""
    for array in (mask, *kept):
        while isinstance(array, np.ndarray):  # a view can be unlocked by its owner only
            array.flags.writeable = False
            array = array.base
    key = id(mask)
    forget = _OUTER.pop  # bound now: masks may outlive the names of this module
    _OUTER[key] = weakref.ref(mask, lambda _: forget(key, None)), kept
    return mask


def known_keep(mask: BoolArray) -> Kept | None:
    found = _OUTER.get(id(mask))
    return found[1] if found is not None and found[0]() is mask else None
