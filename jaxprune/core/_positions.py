"""Positions: which places of every axis a mask keeps.

Masks that `expand_masks` makes are outer products: an entry is kept if its position is
kept on every axis. That is known when they are made and needed when they are used, by
`slice_params` and by `narrow`, so it is remembered instead of read back from masks that
may be as large as the model. Such masks cannot be written to.
"""

import math
import weakref
from collections.abc import Mapping, Sequence
from typing import TypeAlias, cast

import numpy as np

from jaxprune.core._types import Array

BoolArray: TypeAlias = Array  # of bool: numpy where concrete, jax inside jit
Kept: TypeAlias = tuple[np.ndarray | None, ...]  # for every axis; None = all positions

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
    left = {axis: _count(kept) for axis, kept in axes.items()}
    empty = {axis: kept for axis, kept in axes.items() if left[axis] == 0}
    some = (empty or axes).items()
    cut = {axis: kept for axis, kept in some if left[axis] != len(kept)}
    mask = np.array(True)
    for axis, kept in cut.items():
        line = kept.reshape([-1 if other == axis else 1 for other in range(ndim)])
        mask = _both(mask, line) if mask.ndim else line
    if cut and isinstance(mask, np.ndarray) and 1 not in map(len, cut.values()):
        lines = tuple(cast(np.ndarray | None, cut.get(d)) for d in range(ndim))
        return _remembered(mask, lines)
    return mask


def axis_keep(mask: BoolArray, shape: tuple[int, ...]) -> Kept:
    """Which positions of every axis survive: those kept anywhere along the others.

    A singleton axis of the mask says nothing about positions: it keeps them all. So a
    mask of shape (1, n) that is False throughout removes n columns, but no row.

    Args:
        mask: concrete bools that broadcast to `shape`, True = kept.
        shape: the shape of the masked leaf.

    Returns:
        For every axis bool ``[shape[axis]]``, or None where all positions are kept.

    Example:
        >>> import numpy as np
        >>> axis_keep(np.array([[True, False, True]]), (2, 3))
        (None, array([ True, False,  True]))
    """
    known = _known(mask)
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
    if _known(mask) is not None:
        return True
    sizes = zip(mask.shape, kept[: mask.ndim], strict=True)
    inside = (n if n == 1 or k is None else np.count_nonzero(k) for n, k in sizes)
    return bool(np.count_nonzero(mask) == math.prod(inside))


def _both(left: BoolArray, right: BoolArray) -> BoolArray:
    if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
        # The same as of bools, which numpy broadcasts many times slower.
        return np.bitwise_and(left.view(np.uint8), right.view(np.uint8)).view(bool)
    return left & right


def _count(kept: BoolArray) -> int | None:
    """How many positions are kept; None if that is not known yet."""
    return int(np.count_nonzero(kept)) if isinstance(kept, np.ndarray) else None


def _remembered(mask: np.ndarray, kept: Kept) -> np.ndarray:
    """A mask of which `kept` will be true for as long as it lives."""
    for array in (mask, *kept):
        while isinstance(array, np.ndarray):  # a view can be unlocked by its owner only
            array.flags.writeable = False
            array = array.base
    key = id(mask)
    forget = _OUTER.pop  # bound now: masks may outlive the names of this module
    _OUTER[key] = weakref.ref(mask, lambda _: forget(key, None)), kept
    return mask


def _known(mask: BoolArray) -> Kept | None:
    found = _OUTER.get(id(mask))
    return found[1] if found is not None and found[0]() is mask else None
