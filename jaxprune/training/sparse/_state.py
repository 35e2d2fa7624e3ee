"""Masks in the state of an optimiser: what they are, and what the network sees."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from jaxprune.core._leaves import keystr, named_leaves
from jaxprune.core._masks import pair_masks
from jaxprune.core._packing import ByPath, PackedMasks, pack_masks, unpack_masks
from jaxprune.core._types import PyTree
from jaxprune.training._auto_axes import beside_leaves, under_auto_axes
from jaxprune.training._keys import StoredKey

# A fraction or a schedule of it, for all leaves or by path; None: the selection knows.
Sparsity: TypeAlias = (
    optax.ScalarOrSchedule | Mapping[str, optax.ScalarOrSchedule] | None
)
Due: TypeAlias = bool | jax.Array  # True where it is known while tracing
Arrays = Mapping[str, jax.Array]  # path -> array, of the leaves that may lose weights


class SparseState(NamedTuple):
    """The state of sparse training around the state of an optimiser.

    Attributes:
        count: int32 scalar, how many steps are behind.
        key: the words of a key, by the name of its implementation; what a rule draws
            depends on it and on `count`.
        masks: `PackedMasks` by path, of the leaves that may lose weights; True = kept.
        memory: `ByPath`, what a rule remembers of these leaves; empty if nothing.
        forward: float32 scalar, what a removed weight counts in the forward pass; None
            for 1.
        inner: state of the optimiser inside.
    """

    # Every optax state calls it so, over tuple.count.
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    key: StoredKey
    masks: PackedMasks
    memory: ByPath
    forward: jax.Array | None
    inner: optax.OptState


class Moment(NamedTuple):
    """What a rule sees when masks are due; arrays by path, of prunable leaves only.

    Attributes:
        params: path -> weights.
        grads: path -> their gradients, as they came in: dense.
        masks: path -> the masks so far, broadcastable.
        memory: path -> what the rule remembers.
        count: number of the step that the new masks are for.
        key: typed key for what the rule draws now.
    """

    params: Arrays
    grads: Arrays
    masks: Arrays
    memory: Arrays
    # As above.
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    key: jax.Array


class Rule(NamedTuple):
    """How masks come about.

    Attributes:
        start: (params, key) -> path -> the first masks, broadcastable; leaves that are
            not named are never pruned.
        renew: `Moment` -> path -> the next masks; None if they stay.
        due: (count, key) -> whether masks are renewed for this step; True for always.
        replaces_step: a refresh takes the place of the optimiser's step.
        remember: path -> weights of prunable leaves -> path -> what `Moment.memory`
            holds first: a number, or an array that is broadcastable to the leaf, so
            that it can be sliced along with it.
        learn: `Moment` of a step, with the weights before it -> path -> what
            `Moment.memory` holds from now on; None if it stays.
    """

    start: Callable[[optax.Params, jax.Array], Arrays]
    renew: Callable[[Moment], Arrays] | None = None
    due: Callable[[jax.Array, jax.Array], Due] = lambda count, key: True
    replaces_step: bool = False
    remember: Callable[[Arrays], Arrays] = lambda params: {}
    learn: Callable[[Moment], Arrays] | None = None


def masked_params(params: optax.Params, opt_state: optax.OptState) -> PyTree:
    """Where the gradient is taken: removed weights count what their method says.

    Pure: the same arguments give the same weights. The gradient is the same number
    inside (with respect to the masked weights) and outside (with respect to `params`):
    it passes straight through, and the optimiser's ``update`` applies the method's
    gradient multiplier.

    Args:
        params: parameters, as given to ``tx.init``.
        opt_state: the optimiser's state; `SparseState` is found in it wherever it lies
            (`optax.chain`, `optax.MultiSteps`, `optax.inject_hyperparams`,
            `optax.partition`, ...). Several are used together.

    Returns:
        Tree like `params`, same dtypes.

    Raises:
        ValueError: if there are no masks in `opt_state`, or they are for other
            parameters.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from jaxprune.training import masked_params, straight_through
        >>> params = {"kernel": jnp.array([[1.0, -3.0], [2.0, 0.5]])}
        >>> opt_state = straight_through(optax.sgd(0.1), 0.5).init(params)
        >>> masked_params(params, opt_state)["kernel"]
        Array([[ 0., -3.],
               [ 2.,  0.]], dtype=float32)
    """
    states = [s for s in _sparse_states(opt_state) if s.forward is not None]
    parts = [(state.masks, jax.tree.leaves(state.forward)[0]) for state in states]

    def masked(
        params: optax.Params, parts: Sequence[tuple[PackedMasks, jax.Array]]
    ) -> PyTree:
        leaves = named_leaves(params)
        for packed, factor in parts:
            for path, mask in unpacked(packed, params).items():
                leaves[path] = _forward(leaves[path], mask, factor)
        return jax.tree.structure(params).unflatten(leaves.values())

    return under_auto_axes(masked, params, parts, like=params)


def current_masks(params: optax.Params, opt_state: optax.OptState) -> PyTree:
    """The masks that an optimiser's state holds.

    Args:
        params: parameters, as given to ``tx.init``; arrays or ShapeDtypeStructs.
        opt_state: the optimiser's state, see `masked_params`.

    Returns:
        Tree of bools like `params`, True = kept, broadcastable to it: what
        `jaxprune.apply_masks`, `slice_params` and `hold_masks` take.

    Raises:
        ValueError: if there are no masks in `opt_state`, or they are for other
            parameters.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from jaxprune.training import current_masks, hold_masks
        >>> params = {"w": jnp.ones(3)}
        >>> tx = hold_masks(optax.sgd(0.1), {"w": jnp.array([True, False, True])})
        >>> current_masks(params, tx.init(params))
        {'w': Array([ True, False,  True], dtype=bool)}
    """
    packed = [state.masks for state in _sparse_states(opt_state)]

    def found(packed: Sequence[PackedMasks]) -> dict[str, jax.Array]:
        masks: dict[str, jax.Array] = {}
        for each in packed:
            for path, mask in unpacked(each, params).items():
                masks[path] = masks[path] & mask if path in masks else mask
        return masks

    masks = beside_leaves(found, packed, leaves=named_leaves(params))
    return like_params(masks, params, True)


def unpacked(packed: PackedMasks, params: optax.Params) -> dict[str, jax.Array]:
    """Path -> mask, of the leaves that may lose weights.

    Raises:
        ValueError: if the masks are for other parameters.
    """
    leaves, bits = named_leaves(params), named_leaves(packed.bits)
    if missing := sorted(bits.keys() - leaves.keys()):
        raise ValueError(
            f"the optimiser's state has a mask for {missing[0]!r}, which params lack "
            f"({len(missing)} such of {len(bits)}); was it made by tx.init for another "
            "tree?"
        )
    return unpack_masks(PackedMasks(bits), {path: leaves[path] for path in bits})


def like_params(found: Arrays, params: optax.Params, other: bool) -> PyTree:
    """Tree like the parameters of what is found by path, and a scalar elsewhere."""
    return jax.tree.map_with_path(
        lambda path, _: jnp.asarray(found.get(keystr(path), other)), params
    )


def given_masks(params: optax.Params, tree: PyTree) -> dict[str, jax.Array]:
    """Path -> mask of the leaves that masks of a user say something about.

    Raises:
        ValueError: if masks and parameters differ.
        TypeError: if a mask is not boolean.
    """
    found = {}
    pairs = zip(named_leaves(params).items(), pair_masks(params, tree), strict=True)
    for (path, w), (_, _, mask) in pairs:
        traced = isinstance(mask, Tracer)
        if mask.ndim == 0 and w.ndim and (traced or not mask):
            mask = jnp.reshape(mask, (1,) * w.ndim)
        elif mask.ndim == 0 and not traced and not mask:
            raise ValueError(f"masks remove {path!r}, which is a single number")
        if mask.ndim:
            found[path] = mask
    return found


def packed_by_path(
    params: optax.Params, masks: Callable[[optax.Params], PyTree]
) -> PackedMasks:
    """The masks of parameters, as states hold them."""
    leaves = named_leaves(params)
    if not leaves:
        # optax.tree.map_params calls init on an empty stand-in for the parameters; a
        # single leaf there matches the masks by path of any real state.
        return PackedMasks(jnp.zeros((), bool))
    found = given_masks(params, masks(params))
    weights = {path: leaves[path] for path in found}
    return beside_leaves(pack_masks, found, weights, leaves=weights)


def _sparse_states(opt_state: optax.OptState) -> list[SparseState]:
    found = optax.tree.get_all_with_path(opt_state, SparseState.__name__)
    states = [state for _, state in found if isinstance(state, SparseState)]
    if not states:
        raise ValueError(
            "opt_state holds no SparseState; was it made by a method of sparse "
            "training such as jaxprune.hold_masks, and are the arguments (params, "
            "opt_state)?"
        )
    return states


def _forward(w: jax.Array, mask: jax.Array, factor: jax.Array) -> jax.Array:
    # Not by multiplication alone: 0 * inf is nan.
    zero = jax.lax.full_like(w, 0, shape=())
    rest = jnp.where(factor == 0, zero, factor.astype(w.dtype) * w)
    return _straight_through(w, jnp.where(mask, w, rest))


@jax.custom_jvp
def _straight_through(w: jax.Array, value: jax.Array) -> jax.Array:
    del w
    return value


@_straight_through.defjvp
def _(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    return primals[1], tangents[0]
