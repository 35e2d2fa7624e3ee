"""Masks by which the layers of a scan keep positions of their own.

Such a mask is an outer product in every layer, of other positions in each. One that
`expand_masks` has made is known to be; of a copy that is read back here, where the
caller or the shape of what was sliced says that it is one.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from jax.core import Tracer

from jaxprune.core._positions import (
    BoolArray,
    Kept,
    axis_keep,
    keeps_whole_positions,
    known_keep,
    layer_rows,
    line_along,
    merged_layers,
    outer_mask,
    remembered,
    sizes_kept,
)


class Parts(NamedTuple):
    """What a mask cuts whose layers differ.

    Attributes:
        axis: the axis of the layers.
        whole: which layers go.
        each: for every layer that stays the mask of what it loses, without the axis of
            the layers.
    """

    axis: int
    whole: np.ndarray
    each: tuple[np.ndarray, ...]


def parts_of(mask: np.ndarray) -> Parts | None:
    """The parts of a mask whose layers differ, in whatever number; None if of another.

    Example:
        >>> mask = np.array([[[True, False]], [[True, True]]])
        >>> parts_of(mask).each
        (array([[ True, False]]), array(True))
    """
    kept = _differing(mask)
    if kept is None:
        return None
    own, first = next(
        (d, k) for d, k in enumerate(kept) if k is not None and k.ndim > 1
    )
    axis = next(d for d, n in enumerate(first.shape) if n > 1 and d != own)
    rows = dict(layer_rows(kept))
    lines = {
        d: k for d, k in enumerate(kept) if k is not None and k.ndim == 1 and d != axis
    }
    masks = []
    for layer in range(rows[own].shape[axis]):
        each = {d: np.take(k, layer, axis=axis).ravel() for d, k in rows.items()}
        cut = {d - (d > axis): k for d, k in (lines | each).items()}
        masks.append(np.asarray(outer_mask(cut, mask.ndim - 1)))
    live = kept[axis]
    gone = {} if live is None else {axis: live}
    return Parts(axis, np.asarray(outer_mask(gone, mask.ndim)), tuple(masks))


def without_layers(mask: np.ndarray, wholes: Sequence[np.ndarray]) -> Any:
    """A mask in two: which layers go, if any, and what is left to be cut then.

    Args:
        mask: of a leaf whose layers are alike.
        wholes: `Parts.whole` of the leaves whose layers are not: a mask that cuts the
            very same positions of an axis cuts these layers.
    """
    kept = axis_keep(mask, mask.shape)
    if not keeps_whole_positions(mask, kept):
        return np.array(True), mask
    for whole in wholes:
        [line] = [k for k in axis_keep(whole, whole.shape) if k is not None]
        for axis, own in enumerate(kept):
            if own is not None and np.array_equal(own, line):
                rest = {d: k for d, k in enumerate(kept) if d != axis and k is not None}
                cut = outer_mask({axis: own}, mask.ndim), outer_mask(rest, mask.ndim)
                return tuple(map(np.asarray, cut))
    return np.array(True), mask


def kept_of_sliced(mask: np.ndarray, shape: tuple[int, ...], small: tuple) -> Kept:
    """`axis_keep` of a mask by which a leaf of `shape` was sliced to the shape `small`.

    What a mask keeps in every layer is lost where it is copied or saved; the shape of
    what it has sliced says it again.
    """
    kept = axis_keep(mask, shape)
    if (
        mask.ndim < 2
        or known_keep(mask) is not None
        or sizes_kept(kept, shape) == small
    ):
        return kept
    by_layer = _by_layer(mask)
    return by_layer if by_layer and sizes_kept(by_layer, shape) == small else kept


def recalled(mask: BoolArray) -> BoolArray:
    """The mask, known to cut units of layers if it can be read like that.

    A mask of single weights may look the same, as one of blocks does that keeps as many
    in every row: only the caller knows what it is.
    """
    if isinstance(mask, Tracer) or mask.ndim < 2 or known_keep(mask) is not None:
        return mask
    array = np.asarray(mask)
    kept = _by_layer(array)
    return mask if kept is None else remembered(array.copy(), kept)


def _differing(mask: np.ndarray) -> Kept | None:
    """What a mask keeps whose layers differ, in whatever number; None if they do not.

    Like `axis_keep`, with an array of the mask's rank for every axis of which layers
    keep positions of their own.
    """
    kept = known_keep(mask)
    if kept is None and mask.ndim > 1:
        if keeps_whole_positions(mask, axis_keep(mask, mask.shape)):
            return None
        kept = _by_layer(mask, even=False)
    return kept if kept and any(map(_differs, kept)) else None


def _differs(kept: np.ndarray | None) -> bool:
    return kept is not None and kept.ndim > 1


def _by_layer(mask: np.ndarray, *, even: bool = True) -> Kept | None:
    """What a mask keeps, if it is an outer product in every layer, of other positions.

    As many have to be kept in every layer of which any are, if they are to be `even`.
    """
    for layers, size in enumerate(mask.shape):
        counts = np.moveaxis(mask, layers, 0).reshape(size, -1).sum(axis=1)
        live = counts > 0
        if size == 1 or (even and len(np.unique(counts[live])) != 1):
            continue
        kept: dict[int, np.ndarray] = {layers: live}
        left = np.ones(size, int)
        for d in range(mask.ndim):
            others = tuple(k for k in range(mask.ndim) if k not in (d, layers))
            if d == layers or mask.shape[d] == 1:
                continue
            rows = mask.any(axis=others, keepdims=True)
            first = np.take(rows, [int(live.argmax())], axis=layers)
            gone = ~cast(np.ndarray, line_along(live, layers, mask.ndim))
            kept[d] = merged_layers(np.where(gone, first, rows), d)
            counted = np.count_nonzero(kept[d], axis=d if kept[d].ndim > 1 else None)
            if even and len(np.unique(counted)) > 1:
                break
            left *= np.ravel(counted)
        else:
            own = any(rows.ndim > 1 for rows in kept.values())
            if own and (left == counts)[live].all():
                cut = (kept.get(d) for d in range(mask.ndim))
                return tuple(None if k is None or k.all() else k for k in cut)
    return None
