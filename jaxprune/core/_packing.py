"""Packed masks: one bit per weight at rest.

Bits are packed along one axis of the mask, so the others can still be sliced and
sharded, and so can the packed one at multiples of eight. That axis is one that eight
divides (or that wastes least): if possible not the last, because neighbours in memory
then lie in neighbouring bytes and unpacking costs nothing beside the reading. The rank
says which it was: every axis behind it leaves a singleton at the end of the shape. With
the number of axes of the leaf, which any mask for it has, the packed array explains
itself.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.core._leaves import named_leaves
from jaxprune.core._masks import check_broadcast, concrete, pair_masks
from jaxprune.core._positions import axis_keep
from jaxprune.core._types import Array, PyTree


class PackedMasks(NamedTuple):
    """Masks at rest, as they lie in an optimiser's state.

    Attributes:
        bits: tree like the parameters. A leaf is bool as it was, where its mask is
            broadcast; otherwise uint8, eight entries in a byte.
    """

    bits: object


class ByPath(NamedTuple):
    """Arrays that a method remembers of leaves of the parameters.

    Attributes:
        arrays: path -> number, or array of the leaf's axes that is broadcastable to
            it. They are sliced as the leaves are.
    """

    arrays: object


def pack_masks(
    masks: PyTree, params: PyTree, like: PackedMasks | None = None
) -> PackedMasks:
    """Packs masks to one bit per weight.

    Args:
        masks: tree of bools like `params`, True = kept, broadcastable to it. May be
            traced.
        params: tree of arrays or ShapeDtypeStructs.
        like: packed masks whose layout to take over, so that a state keeps its shapes;
            by default the layout follows from the shape of each leaf.

    Returns:
        `PackedMasks`. Masks that are smaller than their parameters stay as they are:
        the scalar True of an untouched leaf, one entry per unit.

    Raises:
        ValueError: if the trees have different leaves or a mask does not broadcast.
        TypeError: if a mask is not boolean.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"w": jnp.zeros((3, 16)), "b": jnp.zeros(16)}
        >>> masks = {"w": params["w"] == 0, "b": jnp.array(True)}
        >>> packed = pack_masks(masks, params)
        >>> packed.bits["w"].dtype, packed.bits["w"].shape, packed.bits["b"].shape
        (dtype('uint8'), (3, 2), ())
    """
    treedef = jax.tree.structure(params)
    layouts = [None] * treedef.num_leaves if like is None else jax.tree.leaves(like)
    return PackedMasks(
        treedef.unflatten(
            _pack(check_broadcast(path, np.shape(leaf), mask), np.shape(leaf), layout)
            for (path, leaf, mask), layout in zip(
                pair_masks(params, masks), layouts, strict=True
            )
        )
    )


def unpack_masks(packed: PackedMasks, params: PyTree) -> PyTree:
    """The masks that were packed; jit-able.

    Args:
        packed: what `pack_masks` returned.
        params: tree of arrays or ShapeDtypeStructs of the same shapes.

    Returns:
        Tree of bools like `params`, True = kept, broadcastable to it.

    Raises:
        ValueError: if the masks are for other leaves, or for a leaf of another shape.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"w": jnp.array([[3.0, 0.0, 2.0]])}
        >>> unpack_masks(pack_masks({"w": params["w"] > 0}, params), params)
        {'w': Array([[ True, False,  True]], dtype=bool)}
    """
    leaves, bits = named_leaves(params), named_leaves(packed.bits)
    if list(leaves) != list(bits):
        different = sorted(leaves.keys() ^ bits.keys())[:3]
        raise ValueError(
            f"params and packed masks differ in {', '.join(different)}; was the "
            "optimiser's state made by tx.init for another tree?"
        )
    return jax.tree.structure(params).unflatten(
        _unpack(path, bits[path], np.shape(leaf)) for path, leaf in leaves.items()
    )


def slice_packed(packed: PackedMasks, masks: PyTree) -> PackedMasks:
    """Packed masks for ``slice_params(params, masks)``.

    Args:
        packed: what `pack_masks` returned for `params`.
        masks: tree of bools like `params`, True = kept; concrete.

    Returns:
        `PackedMasks` without the positions that `masks` remove throughout. Every leaf
        stays packed along the axis it was packed along.

    Raises:
        ValueError: if the trees have different leaves or sizes do not fit.
        TypeError: if a mask is traced or not boolean.

    Example:
        >>> import numpy as np
        >>> params = {"w": np.zeros((2, 3))}
        >>> packed = pack_masks({"w": np.array([[True, False, True]] * 2)}, params)
        >>> small = slice_packed(packed, {"w": np.array([[True, False, False]])})
        >>> unpack_masks(small, {"w": np.zeros((2, 1))})
        {'w': Array([[ True],
               [ True]], dtype=bool)}
    """
    return PackedMasks(
        jax.tree.structure(packed.bits).unflatten(
            slice_bits(path, bits, concrete(path, mask))
            for path, bits, mask in pair_masks(packed.bits, masks)
        )
    )


def _pack(mask: Array, shape: tuple[int, ...], layout: Any) -> jax.Array:
    mask = jnp.asarray(mask)
    if layout is None and mask.shape == shape != ():
        return _pack_along(mask, _best_axis(shape))
    if layout is not None and layout.dtype == jnp.uint8:
        whole = jnp.broadcast_to(mask, shape)
        return _pack_along(whole, _packed_axis(layout.ndim, len(shape)))
    return mask


def _best_axis(shape: tuple[int, ...]) -> int:
    """The axis that wastes least on padding to bytes; of several the last but one."""
    last = len(shape) - 1
    waste = [
        (-(-size // 8) * 8 / max(size, 1), axis == last, -axis)
        for axis, size in enumerate(shape)
    ]
    return -min(waste)[2]


def _packed_axis(packed_ndim: int, ndim: int) -> int:
    """One singleton was appended per axis behind the packed one."""
    return 2 * ndim - 1 - packed_ndim


def _pack_along(mask: jax.Array, axis: int) -> jax.Array:
    behind = mask.ndim - 1 - axis
    padding = [(0, -n % 8 if a == axis else 0) for a, n in enumerate(mask.shape)]
    shape = mask.shape
    rows = jnp.pad(mask, padding).reshape(*shape[:axis], -1, 8, *shape[axis + 1 :])
    weights = _powers(axis + 1, behind)
    bits = jnp.sum(jnp.where(rows, weights, np.uint8(0)), axis + 1, dtype=jnp.uint8)
    return bits.reshape(*bits.shape, *(1,) * behind)


def _unpack(path: str, bits: Any, shape: tuple[int, ...]) -> Any:
    if bits.dtype != jnp.uint8:
        return check_broadcast(path, shape, bits)
    axis = _packed_axis(bits.ndim, len(shape))
    behind = len(shape) - 1 - axis
    before, after = shape[:axis], shape[axis + 1 :]
    packed = (*before, -(-shape[axis] // 8), *after, *(1,) * behind)
    if bits.shape != packed:
        raise ValueError(
            f"the packed mask of {path} has shape {bits.shape}, but a leaf of shape "
            f"{shape} needs {packed}; were the parameters sliced without the "
            "optimiser's state (slice_opt_state)?"
        )
    rows = bits.reshape(*before, packed[axis], 1, *after)
    mask = (rows & _powers(axis + 1, behind) != 0).reshape(*before, -1, *after)
    return jax.lax.slice_in_dim(mask, 0, shape[axis], axis=axis)


def _powers(before: int, behind: int) -> np.ndarray:
    """Powers of two, highest first as in `numpy.packbits`, on an axis of their own."""
    powers = np.array([128, 64, 32, 16, 8, 4, 2, 1], np.uint8)
    return powers.reshape((1,) * before + (8,) + (1,) * behind)


def slice_bits(path: str, bits: Any, mask: np.ndarray) -> Any:
    """One leaf of `slice_packed`."""
    if bits.ndim == 0 or (mask.ndim == 0 and mask):
        return bits
    if mask.ndim == 0:
        raise ValueError(f"masks[{path}] removes the whole leaf, with its packed mask")
    whole, along, kept = bits, None, axis_keep(mask, mask.shape)
    if any(positions is not None and positions.ndim > 1 for positions in kept):
        raise ValueError(
            f"masks[{path}] keeps positions of its own in every layer, by which packed "
            "masks cannot be sliced; unpack them first"
        )
    if bits.dtype == jnp.uint8:
        along = _packed_axis(bits.ndim, mask.ndim)
        shape, cut = list(bits.shape[: mask.ndim]), kept[along]
        # Where it is not cut, the padding of its last byte may come along.
        shape[along] = 8 * shape[along] if cut is None else cut.size
        whole = _unpack(path, bits, tuple(shape))
    for axis, positions in enumerate(kept):
        if positions is not None and whole.shape[axis] > 1:
            whole = _compress(path, whole, positions, axis)
    return whole if along is None else _pack_along(whole, along)


def _compress(path: str, mask: Any, positions: np.ndarray, axis: int) -> Any:
    if mask.shape[axis] != positions.size:
        raise ValueError(
            f"the optimiser's mask of {path} has {mask.shape[axis]} entries on axis "
            f"{axis}, but masks[{path}] has {positions.size}; was the state sliced "
            "already?"
        )
    return jnp.take(mask, np.flatnonzero(positions), axis=axis, mode="clip")
