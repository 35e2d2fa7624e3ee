"""Masks of masks: what two cuts, one after the other, leave of the original."""

from typing import Any, cast

import jax
import numpy as np

from jaxprune.core._groups import Groups, Member
from jaxprune.core._layer_masks import recalled
from jaxprune.core._leaves import named_leaves
from jaxprune.core._masks import concrete, pair_masks
from jaxprune.core._members import in_front
from jaxprune.core._positions import (
    axis_keep,
    count_kept,
    keeps_whole_positions,
    outer_mask,
)
from jaxprune.core._types import PyTree
from jaxprune.surgery._slicing import unslice_params


def compose_masks(masks: PyTree, further: PyTree) -> PyTree:
    """The masks of two cuts in a row, as masks of the original.

    ``slice_params(slice_params(params, masks), further)`` equals
    ``slice_params(params, compose_masks(masks, further))`` for masks of whole units;
    of masks of single entries the same entries stay.

    Args:
        masks: tree of bools, True = kept; concrete; of the first cut.
        further: tree of bools like `masks`, for what the first cut has left.

    Returns:
        Tree of bools like `masks`.

    Raises:
        ValueError: if the trees have different leaves, or `further` does not fit what
            `masks` leave.

    Example:
        >>> first = {"w": np.array([[True, False, True, True]])}
        >>> compose_masks(first, {"w": np.array([[False, True, True]])})
        {'w': array([[False, False,  True,  True]])}
    """
    return jax.tree.structure(masks).unflatten(
        _composed(path, concrete(path, first), concrete(path, second))
        for path, first, second in pair_masks(masks, further)
    )


def _composed(path: str, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    if first.ndim == 0:
        return second if first else first
    if second.ndim == 0:
        return first if second else second
    before = tuple(max(a, b) if a == 1 else a for a, b in _axes(path, first, second))
    kept = axis_keep(first, before)
    sizes = enumerate(zip(before, kept, strict=True))
    left = tuple(n if k is None else count_kept(k, d) for d, (n, k) in sizes)
    again = axis_keep(second, left)
    if any(k is not None and k.ndim > 1 for k in (*kept, *again)):
        entries = _entries(first, np.broadcast_to(second, left), before)
        return cast(np.ndarray, recalled(entries))
    if not (
        keeps_whole_positions(first, kept) and keeps_whole_positions(second, again)
    ):
        return _entries(first, np.broadcast_to(second, left), before)
    cuts = {}
    for axis, (outer, inner) in enumerate(zip(kept, again, strict=True)):
        if outer is None and inner is None:
            continue
        both = np.ones(before[axis], bool) if outer is None else outer.copy()
        if inner is not None:
            both[np.flatnonzero(both)] = inner
        cuts[axis] = both
    return cast(np.ndarray, outer_mask(cuts, len(before)))


def _axes(path: str, first: np.ndarray, second: np.ndarray) -> list[tuple[int, int]]:
    kept = axis_keep(first, first.shape)
    for axis, n in enumerate(second.shape if first.ndim == second.ndim else ()):
        own = kept[axis]
        left = first.shape[axis] if own is None else count_kept(own, axis)
        if n not in (1, left) and first.shape[axis] != 1:
            raise ValueError(
                f"the second mask of {path} has size {n} on axis {axis}, but the first "
                f"leaves {left}; was it made for other variables?"
            )
    if first.ndim != second.ndim:
        raise ValueError(
            f"the masks of {path} have the shapes {first.shape} and {second.shape}; "
            "they need the same axes"
        )
    return list(zip(first.shape, second.shape, strict=True))


def _entries(first: np.ndarray, second: np.ndarray, shape: tuple) -> np.ndarray:
    """Masks of single entries: back where they came from."""
    whole = first if first.shape == shape else np.broadcast_to(first, shape)
    return np.asarray(unslice_params({"": second}, {"": whole})[""]) & whole


def units_kept(groups: Groups, masks: PyTree) -> dict[str, np.ndarray]:
    """The decision per unit that masks of whole units were made from.

    Args:
        groups: what `trace` returned.
        masks: tree of bools like the traced variables, True = kept; concrete.

    Returns:
        Group name -> bool ``[size]``, True = kept, for every group.

    Example:
        >>> import jax.numpy as jnp, jaxprune
        >>> params = {"w1": jnp.ones((3, 4)), "w2": jnp.ones((4, 2))}
        >>> groups = jaxprune.trace(lambda p, x: x @ p["w1"] @ p["w2"], params,
        ...                         jnp.ones((1, 3)))
        >>> keep = {"w1:1": np.array([True, False, True, True])}
        >>> units_kept(groups, jaxprune.expand_masks(groups, keep))
        {'w1:1': array([ True, False,  True,  True])}
    """
    leaves = named_leaves(masks)
    lines: dict[tuple[str, int], Any] = {}
    found = {}
    for name, group in groups.items():
        kept = np.ones(group.size, bool)
        for member in group.members:
            place = (member.path, member.axis)
            if place not in lines:
                mask = concrete(member.path, leaves[member.path])
                lines[place] = axis_keep(mask, groups.shapes[member.path])[member.axis]
            line = lines[place]
            if line is not None:
                line = _counted(line, member, groups.shapes[member.path])
                # A position that several units share goes with any of them.
                kept &= line[member.index].any(axis=1)
        found[name] = kept
    return found


def _counted(line: np.ndarray, member: Member, shape: tuple[int, ...]) -> np.ndarray:
    """What an axis keeps, by the positions that `Member.index` counts."""
    if member.layers is None:
        others = tuple(d for d in range(line.ndim) if d != member.axis)
        return np.asarray(line.any(axis=others)) if line.ndim > 1 else line
    if line.ndim == 1:
        line = line.reshape([-1 if d == member.axis else 1 for d in range(len(shape))])
    own = member.axis, member.layers
    full = [n if d in own else 1 for d, n in enumerate(shape)]
    return in_front(np.broadcast_to(line, full), member).ravel()
