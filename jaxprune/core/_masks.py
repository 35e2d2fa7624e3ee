"""Masks: one boolean leaf per variable, True = kept.

A mask is broadcastable: a leaf is the scalar True where nothing is removed, has the
leaf's rank with singleton axes where it cuts whole units, and has the leaf's full shape
where single weights are removed. Masks are the one currency between what decides
(`select`), what trains (`apply_masks`) and what cuts (`slice_params`).
"""

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxprune.core._groups import Groups
from jaxprune.core._leaves import named_leaves
from jaxprune.core._members import along, count
from jaxprune.core._positions import BoolArray, both_kept, outer_mask
from jaxprune.core._types import Array, PyTree


def expand_masks(
    groups: Groups, keep: Mapping[str, BoolArray], *, unroll: bool = False
) -> PyTree:
    """Turns a decision per unit into masks like the traced variables.

    A position of a parameter axis is kept if every unit that lives on it is kept, and
    an entry of a parameter is kept if its position is kept on every axis.

    Args:
        groups: what `trace` returned.
        keep: group name -> bool ``[size]``, True = kept. Groups that are not named
            are kept whole. May be traced: then the masks are traced too.
        unroll: may the layers of a group that was traced with ``per_layer`` keep
            different numbers of units? Such masks need ``unroll=True`` in
            `slice_params` and `narrow` as well.

    Returns:
        Tree of bools like the traced variables: the scalar True where nothing is
        removed, otherwise singleton on every axis that is not cut. Concrete masks are
        read-only numpy arrays (copy one to change it): what they cut is remembered.

    Raises:
        ValueError: if a name is no group, a length is not the group's size, or the
            blocks of a balanced group keep different numbers of units.
        TypeError: if an array is not boolean.

    Example:
        >>> import jax, numpy as np
        >>> from jaxprune.core._groups import Group, Groups, Member
        >>> variables = {"bias": np.zeros(3), "kernel": np.zeros((2, 3))}
        >>> index = np.arange(3)[:, None]
        >>> members = Member("kernel", 1, index), Member("bias", 0, index)
        >>> shapes = {"bias": (3,), "kernel": (2, 3)}
        >>> groups = Groups({"h": Group("h", 3, members)}, (), shapes,
        ...                 jax.tree.structure(variables))
        >>> expand_masks(groups, {"h": np.array([True, False, True])})
        {'bias': array([ True, False,  True]), 'kernel': array([[ True, False,  True]])}
    """
    cuts: dict[str, dict[int, BoolArray]] = {}
    for name, units in keep.items():
        units = _checked_units(groups, name, units, unroll)
        known: dict[int, BoolArray] = {}  # many members share one index
        for member in groups[name].members:
            axes = cuts.setdefault(member.path, {})
            shape = groups.shapes[member.path]
            size = count(member, shape)
            kept = known.get(id(member.index))
            if kept is None or len(kept) != size:
                kept = _kept_positions(member.index, units, size)
                known[id(member.index)] = kept
            if member.layers is not None:
                kept = along(kept, member, shape)
            d, before = member.axis, axes.get(member.axis)
            axes[d] = kept if before is None else both_kept(before, kept, d)
    return groups.treedef.unflatten(
        outer_mask(cuts.get(path, {}), len(shape))
        for path, shape in groups.shapes.items()
    )


def apply_masks(params: PyTree, masks: PyTree) -> PyTree:
    """Sets what the masks remove to zero.

    Selects instead of multiplying, so that an infinite or NaN entry is removed too;
    the gradient of a removed entry is zero. Keeps dtypes; jit-able.

    Args:
        params: tree of arrays.
        masks: tree of bools like `params`, True = kept, broadcastable to it.

    Returns:
        Tree like `params`. Leaves whose mask is the scalar True are returned as
        they are.

    Raises:
        ValueError: if the trees have different leaves or a mask does not broadcast.
        TypeError: if a mask is not boolean.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"w": jnp.array([1.0, jnp.inf])}
        >>> apply_masks(params, {"w": jnp.array([True, False])})
        {'w': Array([1., 0.], dtype=float32)}
    """
    return jax.tree.structure(params).unflatten(
        zero_removed(leaf, check_broadcast(path, np.shape(leaf), mask))
        for path, leaf, mask in pair_masks(params, masks)
    )


def sparsity(masks: PyTree, params: PyTree | None = None) -> float:
    """The fraction of entries that the masks remove, counted exactly.

    Args:
        masks: tree of bools, True = kept; concrete.
        params: tree of arrays or ShapeDtypeStructs that the masks broadcast to. May
            be left out if every mask has its leaf's full shape.

    Returns:
        Removed entries divided by all entries, in [0, 1].

    Raises:
        ValueError: if `params` is left out and a mask has a singleton axis, so that
            the number of entries it stands for is unknown.

    Example:
        >>> import numpy as np
        >>> masks = {"w": np.array([[True, False, True, True]]), "b": np.array(True)}
        >>> sparsity(masks, {"w": np.zeros((3, 4)), "b": np.zeros(3)})
        0.2
    """
    if params is None:
        for path, mask in named_leaves(masks).items():
            if np.ndim(mask) == 0 or 1 in np.shape(mask):
                raise ValueError(
                    f"masks[{path}] has shape {np.shape(mask)}, which may stand for "
                    "any number of entries; pass params to sparsity(masks, params)"
                )
        params = masks
    removed = total = 0
    for path, leaf, mask in pair_masks(params, masks):
        size = math.prod(np.shape(leaf))
        check_broadcast(path, np.shape(leaf), mask)
        total += size
        removed += size and _count_removed(path, mask) * (size // mask.size)
    return removed / total if total else 0.0


def pair_masks(tree: PyTree, masks: PyTree) -> list[tuple[str, PyTree, BoolArray]]:
    """``(path, leaf, mask)`` for every leaf of the tree, in tree order.

    Raises:
        ValueError: if the two trees do not have the same leaves.
        TypeError: if a mask is not boolean.
    """
    leaves, (every, known) = named_leaves(tree), jax.tree.flatten(masks)
    if known != jax.tree.structure(tree):  # perhaps other containers of the same leaves
        mask_leaves = named_leaves(masks)
        if list(leaves) != list(mask_leaves):
            raise ValueError(_different_leaves(leaves, mask_leaves))
    return [
        (path, leaf, _as_bool(path, mask))
        for (path, leaf), mask in zip(leaves.items(), every, strict=True)
    ]


def check_broadcast(path: str, shape: tuple[int, ...], mask: BoolArray) -> BoolArray:
    """The mask itself, if a scalar or of the leaf's axes, each of size 1 or full.

    Raises:
        ValueError: naming the path and both shapes.
    """
    fits = len(mask.shape) == len(shape) and all(
        size in (1, full) for size, full in zip(mask.shape, shape, strict=True)
    )
    if mask.ndim and not fits:
        raise ValueError(
            f"masks[{path}] has shape {mask.shape}, which does not broadcast to the "
            f"leaf's shape {shape}; were the masks made before slicing?"
        )
    return mask


def concrete(path: str, mask: BoolArray) -> np.ndarray:
    """The mask as a numpy array.

    Raises:
        TypeError: if it is traced, because its values decide shapes.
    """
    if isinstance(mask, Tracer):
        raise TypeError(
            f"masks[{path}] is traced, but its values decide shapes: make the masks "
            "outside jit, grad and vmap, or close over them"
        )
    return np.asarray(mask)


def zero_removed(leaf: Array, mask: BoolArray) -> Any:
    """The leaf with zeros where the mask is False; numpy stays numpy."""
    if isinstance(mask, np.ndarray) and mask.all():
        return leaf
    if isinstance(leaf, np.ndarray) and isinstance(mask, np.ndarray):
        return np.where(mask, leaf, np.zeros((), leaf.dtype))
    return jnp.where(mask, leaf, jax.lax.full_like(leaf, 0, shape=()))


def _checked_units(
    groups: Groups, name: str, units: BoolArray, unroll: bool
) -> BoolArray:
    if name not in groups:
        close = difflib.get_close_matches(name, groups, n=3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"keep names the group {name!r}, which does not exist{hint}")
    units = _as_bool(name, units, "keep")
    if units.shape != (groups[name].size,):
        raise ValueError(
            f"keep[{name}] has shape {units.shape}, but the group has "
            f"{groups[name].size} units; was it made for other groups?"
        )
    if groups[name].blocks > 1 and not isinstance(units, Tracer):
        # Blocks of one layer keep as many, whatever those of another do.
        layers = groups[name].layers if unroll else 1
        kept = np.asarray(units).reshape(groups[name].blocks, -1).sum(axis=1)
        grid = kept.reshape(layers, -1)
        kept = kept if (grid != grid[:, :1]).any() else grid[0]
        other = int((kept != kept[0]).argmax())
        if other and groups[name].layers > 1:
            each = groups[name].blocks // groups[name].layers
            raise ValueError(
                f"keep[{name}] keeps {kept[0]} units in layer 0 but {kept[other]} in "
                f"layer {other // each}; every layer of a scan keeps as many of its "
                f"{len(units) // len(kept)}, unless unroll=True writes the scan out"
            )
        if other:
            raise ValueError(
                f"keep[{name}] keeps {', '.join(map(str, kept[:8]))} units of the "
                f"{len(kept)} blocks of {len(units) // len(kept)}; a balanced group "
                "loses the same number from every block"
            )
    return units


def _as_bool(name: str, values: Array, where: str = "masks") -> BoolArray:
    values = values if isinstance(values, jax.Array) else np.asarray(values)
    if values.dtype != np.bool_:
        raise TypeError(
            f"{where}[{name}] must be boolean (True = kept), got {values.dtype}"
        )
    return values


def _kept_positions(index: np.ndarray, units: BoolArray, size: int) -> BoolArray:
    if isinstance(units, Tracer):
        return jnp.ones(size, bool).at[index].min(units[:, None])
    kept = np.ones(size, bool)
    kept[index[~np.asarray(units)]] = False
    return kept


def _count_removed(path: str, mask: BoolArray) -> int:
    if isinstance(mask, np.ndarray | Tracer):
        return mask.size - int(np.count_nonzero(concrete(path, mask)))
    # Counted where the mask lives: it may be sharded over several hosts.
    return int(jnp.sum(~mask, dtype=jnp.uint32))


def _different_leaves(leaves: Iterable[str], mask_leaves: Iterable[str]) -> str:
    unmasked = [path for path in leaves if path not in set(mask_leaves)]
    unknown = [path for path in mask_leaves if path not in set(leaves)]
    if not unmasked and not unknown:
        return "params and masks have the same leaves in a different order"
    some = ", ".join((unmasked or unknown)[:3])
    side = "leaves without a mask" if unmasked else "masks without a leaf"
    return (
        f"params and masks differ: {side}: {some}; masks for variables go with "
        "variables, masks['params'] with variables['params']"
    )
