"""Growing regularisation: weight decay that rises on what is about to be removed."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import KeyPath

from jaxprune.core._leaves import keystr, named_leaves
from jaxprune.core._packing import PackedMasks
from jaxprune.core._types import PyTree
from jaxprune.training._auto_axes import under_auto_axes
from jaxprune.training._hyperparameters import check, is_whole
from jaxprune.training._leaves import MaskOrFn, select_leaves
from jaxprune.training._links import link
from jaxprune.training.sparse._state import packed_by_path, unpacked


class GrowingState(NamedTuple):
    """State of `growing_regularization`.

    Attributes:
        count: int32 scalar, how many updates are behind.
        strength: float32 scalar, the decay of the next update.
        masks: `PackedMasks` by path, True = kept, so without decay; of all leaves that
            are decayed.
    """

    # Every optax state calls it so, over tuple.count.
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    strength: jax.Array
    masks: PackedMasks


def growing_regularization(
    masks: PyTree | Callable[[optax.Params], PyTree] | None = None,
    *,
    growth: float = 1e-4,
    every: int = 10,
    ceiling: float = 1.0,
    mask: MaskOrFn = None,
) -> optax.GradientTransformation:
    r"""Pushes weights to zero by an L2 penalty that grows while training (GReg).

    .. math::
        g \leftarrow g + \lambda_t w \quad \text{where removed}, \qquad
        \lambda_t = \min(ceiling, growth \, (1 + \lfloor t / every \rfloor))

    With `masks` (GReg-1) what they remove is pushed out gradually, so that the network
    can adapt, and cut when the ceiling has been reached for a while. Without (GReg-2)
    all kernels are decayed alike: weights drift apart by the curvature of the loss
    along them, after which their magnitude is a better score. The authors stop that at
    a ceiling of 0.01, select by L1, and go on with GReg-1.

    It stands before the optimiser, as `optax.add_decayed_weights` does, beside which it
    is used: ``optax.chain(growing_regularization(masks), optax.add_decayed_weights(
    5e-4), optax.sgd(1e-3, momentum=0.9))``.

    Args:
        masks: tree of bools like the parameters, True = kept, broadcastable to them
            (`jaxprune.expand_masks`), or a function from the parameters to one; None
            to decay all that `mask` chooses.
        growth: what the decay grows by; the authors use 1e-4.
        every: steps between two changes; the authors use 5 or 10.
        ceiling: the decay at which it stops; 1 in the authors' settings.
        mask: which leaves are decayed where `masks` is None, as in `bridgeout`; by
            default the kernels.

    Returns:
        An `optax.GradientTransformation` with state `GrowingState`.

    Raises:
        ValueError: if a number is out of range, if masks and parameters differ, or if
            ``update`` gets no `params`.
        TypeError: if a mask is not boolean.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = growing_regularization(
        ...     {"w": jnp.array([True, False])}, growth=0.1, every=1
        ... )
        >>> params, grads = {"w": jnp.array([2.0, 3.0])}, {"w": jnp.zeros(2)}
        >>> state = tx.init(params)
        >>> for _ in range(2):
        ...     updates, state = tx.update(grads, state, params)
        >>> updates["w"]  # the second step: 0.2 * 3
        Array([0. , 0.6], dtype=float32)

    References:
        Wang, Qin, Zhang, Fu, `Neural Pruning via Growing Regularization
        <https://arxiv.org/abs/2012.09243>`_, ICLR 2021
    """
    check("growth", growth)
    check("ceiling", ceiling)
    if not is_whole(every) or every < 1:
        raise ValueError(f"every must be a whole number of at least 1, got {every!r}")
    if masks is not None and mask is not None:
        raise ValueError("masks and mask both select what decays; give only one")

    def strength(count: jax.Array) -> jax.Array:
        steps = (1 + count // every).astype(jnp.float32)
        return jnp.minimum(jnp.float32(ceiling), jnp.float32(growth) * steps)

    def removed(params: optax.Params) -> PyTree:
        if masks is not None:
            return masks(params) if callable(masks) else masks
        chosen = select_leaves(params, mask, gets="decayed")
        return jax.tree.map_with_path(
            lambda path, _: jnp.asarray(keystr(path) not in chosen), params
        )

    def init(params: optax.Params) -> GrowingState:
        count = jnp.zeros((), jnp.int32)
        return GrowingState(count, strength(count), packed_by_path(params, removed))

    def decayed(
        updates: optax.Updates, params: optax.Params, state: GrowingState
    ) -> PyTree:
        weights, held = named_leaves(params), unpacked(state.masks, params)

        def decay(path: KeyPath, grad: jax.Array) -> jax.Array:
            kept = held.get(name := keystr(path))
            if kept is None:
                return grad
            w = weights[name].astype(grad.dtype)
            return jnp.where(kept, grad, grad + state.strength.astype(grad.dtype) * w)

        return jax.tree.map_with_path(decay, updates)

    def update(
        updates: optax.Updates, state: GrowingState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, GrowingState]:
        if params is None:
            raise ValueError(
                "weight decay needs the weights; call "
                "tx.update(grads, opt_state, params)"
            )
        new = under_auto_axes(decayed, updates, params, state, like=updates)
        count = jnp.asarray(optax.safe_increment(state.count))
        return new, state._replace(count=count, strength=strength(count))

    return link(init, update)
