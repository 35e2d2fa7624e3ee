"""Sparse training: one transformation around any optimiser.

A method is three multipliers on the weights that its masks remove, and a rule that
renews the masks:

* *forward*: what a removed weight counts in the forward pass (`masked_params`);
* *gradient*: what its gradient counts;
* *post_step*: what is left of it after the optimiser's step.

=========================================  =======  ========  =========
method                                     forward  gradient  post_step
=========================================  =======  ========  =========
held masks, pruning, SET, RigL, GaP              0         0          0
straight-through, dynamic network surgery        0         1          1
iterative soft shrinkage                         1         1       0.95
iterative hard thresholding                      1         1          0
global sparse momentum                           1         0          1
=========================================  =======  ========  =========

Masks lie in the optimiser's state, packed to one bit per weight, and so travel with it
through checkpoints, `jit` and `jaxprune.slice_opt_state`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune.core._packing import PackedMasks, pack_masks
from jaxprune.training._hyperparameters import typed_key
from jaxprune.training._leaves import name_of, named_leaves
from jaxprune.training.sparse._resets import check_resettable, reset_state
from jaxprune.training.sparse._state import (
    Arrays,
    Moment,
    Rule,
    SparseState,
    like_params,
    unpacked,
)


def sparse_training(
    tx: optax.GradientTransformation,
    rule: Rule,
    *,
    forward: float = 0.0,
    gradient: float = 0.0,
    post_step: float = 0.0,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimiser so that it trains under masks.

    The named methods of this package are calls of this function. Gradients are taken at
    ``masked_params(params, opt_state)``. With multipliers (0, 0, 0) that is `params`
    themselves, once ``params = masked_params(params, opt_state)`` after ``init``; with
    ``forward=1`` it always is.

    If `gradient` is below 1, masks are renewed from the weights and gradients of a
    step, and the step obeys them. If it is 1, all weights are trained: masks are
    renewed from the weights after the step, for the next forward pass, and `post_step`
    acts when they are.

    Guarantees, for any optimiser inside:

    * With ``post_step=0`` removed weights are exactly zero after
      `optax.apply_updates`, whatever decay or momentum says, provided nothing that
      changes updates comes after this transformation: put it outermost. (An infinite
      weight cannot be removed by adding to it; `masked_params` removes it too.)
    * With ``gradient=0`` a refresh resets the optimiser's statistics of weights that
      leave or come back to those of a fresh start (`optax.tree.map_params` finds them).
      Statistics that mix entries (Adafactor's rows and columns) are left alone.
    * Kept weights get the optimiser's updates, bit for bit.

    Args:
        tx: any optimiser; chains, schedules, wrappers included.
        rule: how masks come about.
        forward: multiplier of removed weights in the forward pass.
        gradient: multiplier of their gradients.
        post_step: multiplier of their values after the step.
        key: seed, or one typed key, copied into the state and never split.

    Returns:
        An optimiser with state `SparseState`; its ``update`` needs `params`.

    Raises:
        ValueError: if optax cannot tell which parts of the state of `tx` belong to the
            parameters while they have to be reset, or ``update`` gets no `params`.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from jaxprune.training import Rule, sparse_training
        >>> def all_stay(params, key):
        ...     return {"w": jnp.ones_like(params["w"], bool)}
        >>> def small_go(moment):  # below 1
        ...     return {path: jnp.abs(w) >= 1 for path, w in moment.params.items()}
        >>> rule = Rule(all_stay, small_go, due=lambda count, key: count == 1)
        >>> tx = sparse_training(optax.sgd(0.5), rule)
        >>> params, grads = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([1.0, 1.0])}
        >>> opt_state = tx.init(params)
        >>> for _ in range(2):
        ...     updates, opt_state = tx.update(grads, opt_state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> params
        {'w': Array([0., 1.], dtype=float32)}
    """
    method = _Method(optax.with_extra_args_support(tx), rule, gradient, post_step)

    def init(params: Any) -> Any:
        own, inner = typed_key(key), tx.init(params)
        factor = None if forward == 1 else jnp.array(forward, jnp.float32)
        # optax.tree.map_params calls init on an empty stand-in for the parameters.
        masks, memory = PackedMasks(params), {}
        if leaves := named_leaves(params):
            first = rule.start(params, own)
            masks = pack_masks(like_params(first, params, True), params)
            memory = rule.remember({path: leaves[path] for path in first})
            if method.resets:
                check_resettable(tx, inner, masks)
        return SparseState(jnp.zeros((), jnp.int32), own, masks, memory, factor, inner)

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, Any]:
        if params is None:
            raise ValueError(
                "sparse training sets weights, not only gradients; call "
                "tx.update(grads, opt_state, params)"
            )
        now = _Now(updates, state, params, extra)
        if rule.renew is None:
            done = _step(method, now, state.masks, state.inner)
        else:
            done = _after(method, now) if gradient == 1 else _before(method, now)
        updates, masks, inner = done
        count = jnp.asarray(optax.safe_increment(state.count))
        return updates, state._replace(count=count, masks=masks, inner=inner)

    return optax.GradientTransformationExtraArgs(init, update)


class _Method(NamedTuple):
    """What does not change: the arguments of `sparse_training`."""

    tx: optax.GradientTransformationExtraArgs
    rule: Rule
    gradient: float
    post_step: float

    @property
    def resets(self) -> bool:
        """Are statistics reset at a refresh?"""
        return self.gradient == 0 and self.rule.renew is not None


class _Now(NamedTuple):
    """The arguments of one update."""

    grads: Any
    state: SparseState
    params: Any
    extra: dict[str, Any]


_Done = tuple[Any, PackedMasks, Any]  # updates, masks, state of the optimiser inside


# A branch of `lax.cond` holds only what a refresh computes: whatever else stood in one
# would be cut off from its neighbours, and on CPU from all cores but one.


def _before(method: _Method, now: _Now) -> _Done:
    """Masks first, then a step under them."""
    state, rule = now.state, method.rule
    due = rule.due(state.count, jax.random.fold_in(state.key, state.count))
    masks, inner = _if(
        due,
        lambda: _renewed(method, now, now.params, state.count),
        lambda: (state.masks, state.inner),
    )
    return _step(method, now, masks, inner, due if rule.replaces_step else None)


def _after(method: _Method, now: _Now) -> _Done:
    """A step of all weights first, then masks from where they are."""
    state, params, count = now.state, now.params, now.state.count + 1
    updates, inner = method.tx.update(now.grads, state.inner, params, **now.extra)
    moved = optax.apply_updates(params, updates)
    due = method.rule.due(count, jax.random.fold_in(state.key, count))
    masks = _if(
        due, lambda: _renewed(method, now, moved, count)[0], lambda: state.masks
    )
    held = unpacked(masks, params)
    if due is not True:
        held = {path: mask | ~due for path, mask in held.items()}
    return _left(updates, params, held, method.post_step), masks, inner


def _if(due: Any, then: Any, otherwise: Any) -> Any:
    # Known while tracing: every step, without a branch.
    return then() if due is True else jax.lax.cond(due, then, otherwise)


def _step(
    method: _Method, now: _Now, masks: PackedMasks, inner: Any, skip: Any = None
) -> _Done:
    """A step of the optimiser under masks, and what it leaves of removed weights.

    Where `skip` is given and true, the optimiser stands still.
    """
    held = unpacked(masks, now.params)
    grads = _scaled(now.grads, held, method.gradient)
    updates, moved = method.tx.update(grads, inner, now.params, **now.extra)
    if skip is not None:
        # lax.select, because a state may hold typed keys.
        keep = functools.partial(jax.lax.select, jnp.asarray(skip))
        updates = jax.tree.map(lambda u: keep(jnp.zeros_like(u), u), updates)
        moved = jax.tree.map(keep, inner, moved)
    return _left(updates, now.params, held, method.post_step), masks, moved


def _renewed(
    method: _Method, now: _Now, params: Any, count: jax.Array
) -> tuple[PackedMasks, Any]:
    """The masks for step `count`, and the state of the optimiser under them."""
    state, renew = now.state, method.rule.renew
    assert renew is not None
    old, weights = unpacked(state.masks, params), named_leaves(params)
    grads, key = named_leaves(now.grads), jax.random.fold_in(state.key, count)
    new = renew(
        Moment(
            {path: weights[path] for path in old},
            {path: grads[path] for path in old},
            old,
            state.memory,
            count,
            key,
        )
    )
    masks = pack_masks(like_params(new, params, True), params, like=state.masks)
    if not method.resets:
        return masks, state.inner
    lasting = {path: old[path] & new[path] for path in old}
    return masks, reset_state(method.tx, state.inner, params, lasting)


def _scaled(grads: Any, masks: Arrays, factor: float) -> Any:
    """Gradients, multiplied where the masks remove."""
    if factor == 1:
        return grads

    def scale(path: Any, grad: jax.Array) -> jax.Array:
        mask = masks.get(name_of(path))
        if mask is None:
            return grad
        # Not by multiplication alone: 0 * inf is nan.
        rest = jax.lax.full_like(grad, 0, shape=()) if factor == 0 else factor * grad
        return jnp.where(mask, grad, rest)

    return jax.tree.map_with_path(scale, grads)


def _left(updates: Any, params: Any, masks: Arrays, factor: float) -> Any:
    """Updates that leave `factor` of a removed weight, and of its step."""
    if factor == 1:
        return updates
    weights = named_leaves(params)

    def leave(path: Any, update: jax.Array) -> jax.Array:
        mask = masks.get(name := name_of(path))
        if mask is None:
            return update
        # w + (-w) is 0 exactly, but only if the update is no narrower than the weight.
        dtype = np.promote_types(update.dtype, weights[name].dtype)
        update, w = update.astype(dtype), weights[name].astype(dtype)
        rest = -w if factor == 0 else factor * (w + update) - w
        return jnp.where(mask, update, rest)

    return jax.tree.map_with_path(leave, updates)
