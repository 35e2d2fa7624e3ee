"""Slicing: drop what masks remove throughout, and put it back.

Shapes change here, so masks must be concrete. Everything else may be traced or
abstract: a ShapeDtypeStruct is sliced to a smaller ShapeDtypeStruct.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxprune.core._layer_masks import kept_of_sliced, parts_of, recalled
from jaxprune.core._leaves import named_leaves
from jaxprune.core._masks import (
    PyTree,
    check_broadcast,
    concrete,
    pair_masks,
    zero_removed,
)
from jaxprune.core._packing import ByPath, PackedMasks, slice_bits
from jaxprune.core._placement import all_placed_like, empty, on_all_cores, on_host
from jaxprune.core._positions import (
    BoolArray,
    axis_keep,
    count_kept,
    cuts,
    keeps_whole_positions,
    layer_rows,
)
from jaxprune.core._types import Array


def slice_params(
    params: PyTree,
    masks: PyTree,
    *,
    mixed: bool = False,
    per_layer: bool = False,
    unroll: bool = False,
) -> PyTree:
    """Drops every index of an axis whose mask is False throughout.

    The result is ``apply_masks(params, masks)`` without its dead rows, columns and
    channels. Masks of single weights keep all shapes: where they happen to empty a row
    that other leaves still have, nothing may be dropped. So masks that remove single
    weights and whole positions in one tree are refused, unless `mixed` says that they
    are meant to. A sharded leaf stays sharded alike; an axis that its mesh axes no
    longer divide is sharded over fewer of them.

    Where every layer of a scan loses units of its own (`per_layer` of `trace`), each
    layer of a stacked leaf is sliced by itself. Masks that `expand_masks` returned are
    known to do so.

    Args:
        params: tree of jax or numpy arrays or ShapeDtypeStructs; also variables.
        masks: tree of bools like `params`, True = kept, broadcastable to it; concrete.
        mixed: masks of units, of which some remove single weights as well: what they
            remove inside of what stays is set to zero.
        per_layer: masks by which layers lose units of their own, but copied or read
            from elsewhere: such masks look like those of single weights.
        unroll: layers keep different numbers of units: a leaf whose layers lose units
            of their own becomes a tuple, with an array for every layer that stays.

    Returns:
        Tree like `params`, smaller; dtypes, weak types and numpy leaves stay what
        they are. Leaves that lose nothing are returned as they are.

    Raises:
        ValueError: if the trees have different leaves, a mask does not broadcast, or
            masks remove single weights and whole positions without `mixed`.
        TypeError: if a mask is traced or not boolean.

    Example:
        >>> import numpy as np
        >>> params = {"w": np.arange(6.0).reshape(2, 3)}
        >>> slice_params(params, {"w": np.array([[True, False, True]])})
        {'w': array([[0., 2.], [3., 5.]])}
    """
    paired = pair_masks(params, masks)
    if per_layer:
        paired = [(path, leaf, recalled(mask)) for path, leaf, mask in paired]
    if unroll:
        return jax.tree.structure(params).unflatten(_slice_unrolled(paired))
    if not mixed:
        _refuse_single_weights(paired)
    return jax.tree.structure(params).unflatten(_slice_leaves(paired))


def _slice_unrolled(paired: Sequence[tuple[str, Any, Any]]) -> list[Any]:
    """Slices every leaf; those whose layers differ become tuples of layers."""
    small = []
    for path, leaf, mask in paired:
        mask = concrete(path, check_broadcast(path, np.shape(leaf), mask))
        parts = parts_of(mask)
        if parts is None:
            small += _slice_leaves([(path, leaf, mask)])
            continue
        [whole] = _slice_leaves([(path, leaf, parts.whole)])
        each = [
            (f"{path}/{layer}", _layer(whole, layer, parts.axis), own)
            for layer, own in enumerate(parts.each)
        ]
        small.append(tuple(_slice_leaves(each)))
    return small


def _layer(leaf: Any, layer: int, axis: int) -> Any:
    """One layer of a stacked leaf."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.update(shape=(*leaf.shape[:axis], *leaf.shape[axis + 1 :]))
    return leaf[(slice(None),) * axis + (layer,)]


def _refuse_single_weights(paired: Sequence[tuple[str, Any, Any]]) -> None:
    """Refuses to cut shapes by masks of single weights."""
    cut = single = None
    for path, leaf, mask in paired:
        mask = concrete(path, check_broadcast(path, np.shape(leaf), mask))
        kept = axis_keep(mask, np.shape(leaf))
        axes = [axis for axis, positions in enumerate(kept) if positions is not None]
        if axes and cut is None:
            cut = path, axes[0]
        if single is None and not keeps_whole_positions(mask, kept):
            single = path
        if cut and single is not None:
            raise ValueError(
                f"masks[{single}] removes single weights, and masks[{cut[0]}] whole "
                f"positions of axis {cut[1]}: slicing by masks of single weights drops "
                "what they happen to empty. apply_masks(params, masks) keeps all "
                "shapes; if whole units are cut on purpose (expand_masks) and single "
                "weights inside them set to zero, pass mixed=True; if the layers of a "
                "scan lose units of their own, pass per_layer=True"
            )


def unslice_params(small: PyTree, masks: PyTree, *, unroll: bool = False) -> PyTree:
    """Puts sliced parameters back where they came from, zeros elsewhere.

    The inverse of `slice_params` on every kept entry:
    ``unslice_params(slice_params(params, masks), masks)`` equals
    ``apply_masks(params, masks)``.

    Args:
        small: what ``slice_params(params, masks)`` returned, perhaps trained further.
        masks: the masks it was sliced with, True = kept; concrete.
        unroll: was it sliced with ``unroll=True``?

    Returns:
        Tree like `small` (like `masks`, with `unroll`) with the shapes before slicing.

    Raises:
        ValueError: if the trees have different leaves, a leaf is not the size its
            mask leaves, or a mask that is all False on a singleton axis hides how
            large that axis was.
        TypeError: if a mask is traced or not boolean.

    Example:
        >>> import numpy as np
        >>> unslice_params({"b": np.ones(2)}, {"b": np.array([True, False, True])})
        {'b': array([1., 0., 1.])}
    """
    if unroll:
        treedef = jax.tree.structure(masks)
        pairs = zip(
            named_leaves(masks).items(), treedef.flatten_up_to(small), strict=True
        )
        return treedef.unflatten(
            _unslice_layers(path, leaf, concrete(path, mask))
            for (path, mask), leaf in pairs
        )
    return jax.tree.structure(small).unflatten(
        _unslice_leaf(path, leaf, mask) for path, leaf, mask in pair_masks(small, masks)
    )


def _unslice_layers(path: str, leaf: Any, mask: np.ndarray) -> Any:
    """One leaf, which is a tuple of layers if the layers of its mask differ."""
    parts = parts_of(mask)
    if parts is None:
        return _unslice_leaf(path, leaf, mask)
    pairs = enumerate(zip(leaf, parts.each, strict=True))
    each = [_unslice_leaf(f"{path}/{k}", x, own) for k, (x, own) in pairs]
    stack = np.stack if all(isinstance(x, np.ndarray) for x in each) else jnp.stack
    return _unslice_leaf(path, stack(each, parts.axis), parts.whole)


def slice_opt_state(
    tx: optax.GradientTransformation,
    opt_state: PyTree,
    masks: PyTree,
    *,
    mixed: bool = False,
    per_layer: bool = False,
    unroll: bool = False,
) -> PyTree:
    """Slices every copy of the parameters inside an optimiser state.

    Momentum survives a round of pruning: one more step of `tx` on sliced parameters
    with the sliced state equals the step of the masked model, sliced. `optax` itself
    says which parts of the state look like the parameters; counters, schedules and
    keys stay. Where `optax.masked` keeps nothing for a leaf, nothing is sliced. The
    packed masks of sparse training are sliced as masks.

    Of optax's whole list (``tests/test_optax_list.py``):

    * Exact, for transformations that treat entries alone or through sums in which a
      zero does not count: all but those below, and every state of this library.
    * Approximate, where a mean, the number of entries or what was removed enters a
      statistic: ``lamb``, ``muon``, ``dog``, ``dowg``, ``momo_adam``, ``centralize``,
      ``clip_by_block_rms``, ``scale_by_param_block_rms``. The first steps after
      slicing differ a little from those of the masked model.
    * Refused, where a statistic has other axes than its weights: ``adafactor``,
      ``sm3``, ``lbfgs``, ``galore``, ``flatten``, ``scale_by_distance_over_gradients``.

    Links that know traced groups (`group_lasso`, `proximal_group_lasso`,
    `centripetal`) keep their counters; make new ones from new groups.

    Args:
        tx: the `optax.GradientTransformation` that made the state.
        opt_state: its state for the parameters before slicing.
        masks: tree of bools like the parameters `tx` was initialised with,
            True = kept; concrete.
        mixed: as for `slice_params`.
        per_layer: likewise.
        unroll: likewise: such states have a tuple of layers where the parameters do.

    Returns:
        The state for ``slice_params(params, masks)``.

    Raises:
        ValueError: if optax cannot tell the parameter-like parts of the state, the
            masks are for another tree, a part does not have its parameter's axes, or
            masks remove single weights and whole positions without `mixed`.
        TypeError: if a mask is traced or not boolean.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> params, tx = {"b": jnp.zeros(3)}, optax.sgd(0.1, momentum=0.9)
        >>> masks = {"b": jnp.array([True, False, True])}
        >>> slice_opt_state(tx, tx.init(params), masks)[0].trace
        {'b': Array([0., 0.], dtype=float32)}
    """
    if per_layer:
        masks = jax.tree.map(recalled, masks)
    by_path = named_leaves(masks)
    if not (mixed or unroll):
        _refuse_single_weights([(path, mask, mask) for path, mask in by_path.items()])
    paths = jax.tree.structure(masks).unflatten(by_path)
    try:
        marked = optax.tree.map_params(
            tx,
            functools.partial(_ParamLike, unroll=unroll),
            opt_state,
            paths,
            masks,
            is_leaf=_is_masked_node,
        )
    except Exception as error:  # tx.init on optax's placeholder may raise anything.
        raise ValueError(
            "optax.tree.map_params cannot match opt_state with masks: either the masks "
            "are for another tree than tx.init got (variables instead of "
            "variables['params']?) or tx keeps parameters in a form optax does not "
            "know; then start again with tx.init(slice_params(params, masks))"
        ) from error
    return jax.tree.map(
        lambda part: _sliced(part, by_path),
        marked,
        is_leaf=lambda part: isinstance(part, _ParamLike | PackedMasks | ByPath),
    )


def _sliced(part: object, masks: Mapping[str, Array]) -> Any:
    if isinstance(part, _ParamLike):
        return part.sliced()
    if isinstance(part, PackedMasks):
        return PackedMasks(_each_by_path(slice_bits, part.bits, masks))
    if isinstance(part, ByPath):
        return ByPath(_each_by_path(_slice_remembered, part.arrays, masks))
    return part


def _each_by_path(
    slice_one: Callable[[str, Any, np.ndarray], object],
    arrays: Any,
    masks: Mapping[str, Array],
) -> dict[str, Array]:
    """Slices what a method keeps by path, which optax does not know."""
    found = {}
    for path, array in arrays.items():
        mask = masks.get(path, masks.get(f"{path}/value"))  # in a Flax box
        if mask is None:
            raise ValueError(
                f"opt_state holds something for {path}, which masks lack; were they "
                "made for another tree than tx.init got?"
            )
        found[path] = slice_one(path, array, concrete(path, mask))
    return found


def _slice_remembered(path: str, array: Array, mask: np.ndarray) -> Any:
    """An array that is broadcastable to its leaf, cut where the leaf is cut."""
    if np.ndim(array) == 0 or mask.ndim == 0:
        return array
    for axis, where in cuts(axis_keep(mask, mask.shape)):
        if np.shape(array)[axis] == 1:
            continue
        if where.ndim > 1:  # of size 1 along the layers, perhaps: now they differ
            sizes = zip(np.shape(array), where.shape, strict=True)
            shape = [n if d == axis else max(n, m) for d, (n, m) in enumerate(sizes)]
            array = jnp.broadcast_to(array, shape)
        array = _take(array, where, axis)
    return array


@dataclasses.dataclass(frozen=True)
class _ParamLike:
    """A part of an optimiser state that belongs to one parameter."""

    state: Any
    path: str
    mask: Array
    unroll: bool = False

    def sliced(self) -> Any:
        # One number per parameter (a norm, a scale) has no axis to cut.
        if _is_masked_node(self.state) or np.ndim(self.state) == 0:
            return self.state
        (_, _, mask), *_ = pair_masks({self.path: self.state}, {self.path: self.mask})
        try:
            slices = _slice_unrolled if self.unroll else _slice_leaves
            return slices([(self.path, self.state, mask)])[0]
        except ValueError as error:
            raise ValueError(
                f"opt_state keeps {np.shape(self.state)} numbers for {self.path}, "
                f"which its mask of shape {mask.shape} cannot slice (a factored or "
                "stacked statistic?); start again with tx.init(slice_params(params, "
                "masks))"
            ) from error


def _is_masked_node(part: object) -> bool:
    return isinstance(part, optax.MaskedNode)


def _slice_leaves(paired: Sequence[tuple[str, PyTree, BoolArray]]) -> list[Any]:
    """Slices every leaf of some ``(path, leaf, mask)``."""
    here = [on_host(leaf) for _, leaf, _ in paired]
    items = [(*each, read) for each, read in zip(paired, here, strict=True)]
    sizes = [np.size(leaf) if read else 0 for _, leaf, _, read in items]
    small = on_all_cores(lambda item: _slice_leaf(*item), items, sizes)
    moved = [
        k
        for k, (_, leaf, _) in enumerate(paired)
        if isinstance(leaf, jax.Array) and isinstance(small[k], np.ndarray)
    ]
    placed = all_placed_like([small[k] for k in moved], [paired[k][1] for k in moved])
    for k, array in zip(moved, placed, strict=True):
        small[k] = array
    return small


def _slice_leaf(path: str, leaf: PyTree, mask: BoolArray, here: bool) -> Any:
    """The sliced leaf; as a numpy array, not yet placed, if it is read on the host."""
    mask = concrete(path, check_broadcast(path, np.shape(leaf), mask))
    kept = axis_keep(mask, np.shape(leaf))
    if isinstance(leaf, jax.ShapeDtypeStruct):
        sizes = zip(leaf.shape, kept, strict=True)
        pairs = enumerate(sizes)
        return leaf.update(
            shape=tuple(n if k is None else count_kept(k, d) for d, (n, k) in pairs)
        )
    cut = cuts(kept)
    if here and cut:
        leaf = np.asarray(leaf)
    take = _take_on_host if here else _take
    for axis, where in cut:
        leaf = take(leaf, where, axis)
    # The mask may also zero single weights among the positions that stay.
    if keeps_whole_positions(mask, kept):
        return leaf
    for axis, where in cut:
        if mask.ndim and mask.shape[axis] > 1:
            mask = np.take(mask, where, axis)
    return zero_removed(leaf, mask)


def _take(whole: Any, where: np.ndarray, axis: int) -> Any:
    place = _place_after(whole, axis, where.shape[axis if where.ndim > 1 else 0])
    if where.ndim > 1:
        take = functools.partial(
            jnp.take_along_axis, indices=where, axis=axis, mode="clip"
        )
    else:
        take = functools.partial(
            jnp.take,
            indices=where,
            axis=axis,
            unique_indices=True,
            indices_are_sorted=True,
            mode="clip",
        )
    if place is None:
        return take(whole)
    if AxisType.Explicit in place.mesh.axis_types:  # types say where arrays lie
        chosen = whole.at[_entries_at(whole.shape, where, axis)]
        return chosen.get(mode="clip", out_sharding=place)
    return jax.jit(take, out_shardings=place)(whole)


def _entries_at(shape: Sequence[int], where: np.ndarray, axis: int) -> tuple[Any, ...]:
    """An index of these positions of an axis, which may differ along others."""
    if where.ndim == 1:
        return (slice(None),) * axis + (where,)
    index: list[Any] = list(np.ogrid[tuple(map(slice, shape))])
    index[axis] = where
    return tuple(index)


def _place_after(whole: Any, axis: int, size: int) -> NamedSharding | None:
    """The sharding of a leaf whose axis has another size; None to leave it to JAX.

    Of the mesh axes that share the axis, as many as divide the new size.
    """
    if isinstance(whole, Tracer) or not isinstance(whole, jax.Array):
        return None
    place = whole.sharding
    if not isinstance(place, NamedSharding) or len(place.device_set) == 1:
        return None
    spec = [*place.spec, *[None] * (whole.ndim - len(place.spec))]
    own = spec[axis]
    names = () if own is None else (own if isinstance(own, tuple) else (own,))
    kept: list[str] = []
    for name in names:
        if size % math.prod(place.mesh.shape[other] for other in (*kept, name)):
            break
        kept.append(name)
    spec[axis] = tuple(kept) if len(kept) > 1 else (kept[0] if kept else None)
    return place.update(spec=PartitionSpec(*spec))


def _take_on_host(whole: np.ndarray, where: np.ndarray, axis: int) -> np.ndarray:
    if where.ndim > 1:
        return np.take_along_axis(whole, where, axis)
    shape = (*whole.shape[:axis], len(where), *whole.shape[axis + 1 :])
    # In range by construction; "clip" spares numpy a copy of what it writes.
    return whole.take(where, axis, empty(shape, whole.dtype), mode="clip")


def _unslice_leaf(path: str, leaf: Array, mask: Array) -> Any:
    mask = concrete(path, mask)
    shape = _shape_before(path, np.shape(leaf), mask)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.update(shape=shape)
    kept = kept_of_sliced(mask, shape, np.shape(leaf))
    for axis, rows in layer_rows(kept):
        leaf = _spread_rows(leaf, rows, axis)
    for axis, positions in enumerate(kept):
        if positions is not None and positions.ndim == 1:
            leaf = _spread(leaf, positions, axis)
    return zero_removed(leaf, mask)


def _spread_rows(leaf: Array, rows: np.ndarray, axis: int) -> Any:
    """Every layer at its own positions; anything where `rows` is False."""
    shape = (*leaf.shape[:axis], rows.shape[axis], *leaf.shape[axis + 1 :])
    if 0 in leaf.shape:
        zeros = np.zeros if isinstance(leaf, np.ndarray) else jnp.zeros
        return zeros(shape, leaf.dtype)
    where = np.maximum(np.cumsum(rows, axis=axis) - 1, 0)
    if isinstance(leaf, np.ndarray):
        return np.take_along_axis(leaf, where, axis)
    return jnp.take_along_axis(leaf, where, axis, mode="clip")


def _shape_before(path: str, shape: tuple[int, ...], mask: np.ndarray) -> tuple:
    if mask.ndim and mask.ndim != len(shape):
        raise ValueError(
            f"masks[{path}] has shape {mask.shape}, but the sliced leaf has shape "
            f"{shape}; they need the same axes"
        )
    if mask.ndim == 0 and len(shape) and not mask:
        raise ValueError(
            f"masks[{path}] of shape {mask.shape} removes the whole leaf; a mask of "
            "the full shape is needed to know how large the leaf was"
        )
    sizes = mask.shape if mask.ndim else (1,) * len(shape)
    before = tuple(
        small if size == 1 else size for small, size in zip(shape, sizes, strict=True)
    )
    for axis, positions in enumerate(kept_of_sliced(mask, before, shape)):
        expected = before[axis] if positions is None else count_kept(positions, axis)
        if shape[axis] != expected:
            raise ValueError(
                f"{path} axis {axis} has size {shape[axis]}, but masks[{path}] keeps "
                f"{expected} of {before[axis]}; was it sliced with other masks?"
            )
    return before


def _spread(leaf: Array, positions: np.ndarray, axis: int) -> Any:
    shape = (*leaf.shape[:axis], positions.size, *leaf.shape[axis + 1 :])
    where = (slice(None),) * axis + (np.flatnonzero(positions),)
    if isinstance(leaf, np.ndarray):
        spread = np.zeros(shape, leaf.dtype)
        spread[where] = leaf
        return spread
    return jax.lax.full_like(leaf, 0, shape=shape).at[where].set(leaf)
