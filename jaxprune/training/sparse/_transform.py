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
movement pruning                                 0         0          1
global sparse momentum                           1         0          1
=========================================  =======  ========  =========

Masks lie in the optimiser's state, packed to one bit per weight, and so travel with it
through checkpoints, `jit` and `jaxprune.slice_opt_state`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import KeyPath

from jaxprune.core._leaves import keystr, named_leaves
from jaxprune.core._masks import zero_removed
from jaxprune.core._packing import ByPath, PackedMasks, pack_masks
from jaxprune.core._types import PyTree
from jaxprune.training._auto_axes import beside_leaves, shapes_of, under_auto_axes
from jaxprune.training._keys import stored_key, typed_key
from jaxprune.training._links import link_with_extra
from jaxprune.training.sparse._resets import check_resettable, reset_state
from jaxprune.training.sparse._state import (
    Arrays,
    Due,
    Moment,
    Rule,
    SparseState,
    unpacked,
)

T = TypeVar("T")


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

    If removed weights lose their values (`gradient` and `post_step` below 1), masks are
    renewed from the weights and gradients of a step, and the step obeys them. Otherwise
    masks are renewed from the weights after the step, for the next forward pass, and
    `post_step` acts when they are.

    Guarantees, for any optimiser inside:

    * With ``post_step=0`` removed weights are exactly zero after
      `optax.apply_updates`, whatever decay or momentum says, provided nothing that
      changes updates comes after this transformation: put it outermost. (An infinite
      weight cannot be removed by adding to it; `masked_params` removes it too.)
    * With ``gradient=0`` and ``post_step=0`` a refresh resets the optimiser's
      statistics of weights that leave or come back to those of a fresh start
      (`optax.tree.map_params` finds them). Statistics that mix entries (Adafactor's
      rows and columns) are left alone.
    * With ``gradient=0`` and ``post_step=0`` the optimiser never sees the value of a
      removed weight, so one that keeps copies of the weights (`schedule_free_sgd`,
      `prodigy`) keeps zeros there.
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

    def init(params: optax.Params) -> SparseState:
        own, factor = stored_key(key), jnp.array(forward, jnp.float32)
        masks, memory = _start(rule, params, typed_key(own))
        if method.hard and named_leaves(params):
            params = _without_removed(params, masks)
        inner = tx.init(params)
        if named_leaves(params):
            if method.resets:
                check_resettable(tx, inner, params)
            _check_renewal(method, params, masks, memory)
        return SparseState(
            jnp.zeros((), jnp.int32),
            own,
            masks,
            memory,
            None if forward == 1 else factor,
            inner,
        )

    def update(
        updates: optax.Updates,
        state: SparseState,
        params: optax.Params | None = None,
        **extra: object,
    ) -> tuple[optax.Updates, SparseState]:
        if params is None:
            raise ValueError(
                "sparse training sets weights, not only gradients; call "
                "tx.update(grads, opt_state, params)"
            )
        now = _Now(updates, state, params, extra)
        if rule.renew is None:
            done = _step(method, now, state.masks, state.inner)
        else:
            done = _after(method, now) if method.lasting else _before(method, now)
        count = jnp.asarray(optax.safe_increment(state.count))
        return done.updates, state._replace(
            count=count, masks=done.masks, memory=done.memory, inner=done.inner
        )

    return link_with_extra(init, update)


class _Method(NamedTuple):
    """What does not change: the arguments of `sparse_training`."""

    tx: optax.GradientTransformationExtraArgs
    rule: Rule
    gradient: float
    post_step: float

    @property
    def hard(self) -> bool:
        """Are removed weights zero, and do they learn nothing?"""
        return self.gradient == 0 and self.post_step == 0

    @property
    def resets(self) -> bool:
        """Are statistics reset at a refresh?"""
        return self.hard and self.rule.renew is not None

    @property
    def lasting(self) -> bool:
        """Do removed weights keep their values, or go on learning?"""
        return self.gradient == 1 or self.post_step == 1


class _Now(NamedTuple):
    """The arguments of one update."""

    grads: optax.Updates
    state: SparseState
    params: optax.Params
    extra: dict[str, object]


class _Done(NamedTuple):
    """What comes out of one."""

    updates: optax.Updates
    masks: PackedMasks
    memory: ByPath
    inner: optax.OptState


# --- the first state -----------------------------------------------------------------


def _start(
    rule: Rule, params: optax.Params, key: jax.Array
) -> tuple[PackedMasks, ByPath]:
    leaves = named_leaves(params)
    if not leaves:
        # optax.tree.map_params calls init on an empty stand-in for the parameters. A
        # single leaf matches what is there by path, which is nothing of optax's: it
        # has other shapes than the parameters.
        return PackedMasks(jnp.zeros((), bool)), ByPath(jnp.zeros((), bool))
    found = rule.start(params, key)
    first = {path: found[path] for path in leaves if path in found}
    weights = {path: leaves[path] for path in first}

    def made(first: Arrays, weights: Arrays) -> tuple[PackedMasks, ByPath]:
        memory = {path: jnp.asarray(x) for path, x in rule.remember(weights).items()}
        return pack_masks(first, weights), ByPath(memory)

    return beside_leaves(made, first, weights, leaves=weights)


def _check_renewal(
    method: "_Method", params: optax.Params, masks: PackedMasks, memory: ByPath
) -> None:
    """Complains early if the rule cannot renew these masks."""
    rule = method.rule
    if rule.renew is None:
        return
    shapes = shapes_of((params, params, masks.bits, memory.arrays))

    def renew(
        params: optax.Params, grads: optax.Updates, bits: PyTree, memory: PyTree
    ) -> PyTree:
        moment = _moment(
            params,
            grads,
            PackedMasks(bits),
            ByPath(memory),
            jnp.zeros((), jnp.int32),
            jax.random.key(0),
        )
        assert rule.renew is not None
        return pack_masks(rule.renew(moment), moment.params, PackedMasks(bits))

    jax.eval_shape(renew, *shapes)


def _without_removed(params: optax.Params, masks: PackedMasks) -> PyTree:
    """The parameters, zero where masks remove."""

    def cut(params: optax.Params, masks: PackedMasks) -> PyTree:
        held = unpacked(masks, params)
        return jax.tree.map_with_path(
            lambda path, w: (
                zero_removed(w, held[name]) if (name := keystr(path)) in held else w
            ),
            params,
        )

    return under_auto_axes(cut, params, masks, like=params)


# --- one step ------------------------------------------------------------------------

# A branch of `lax.cond` holds only what a refresh computes: whatever else stood in one
# would be cut off from its neighbours, and on CPU from all cores but one.


def _before(method: _Method, now: _Now) -> _Done:
    """Masks first, then a step under them."""
    state, rule = now.state, method.rule
    due = rule.due(state.count, jax.random.fold_in(typed_key(state.key), state.count))

    def renewed(
        state: SparseState, params: optax.Params, grads: optax.Updates, due: Due
    ) -> tuple[PackedMasks, optax.OptState]:
        return _if(
            due,
            lambda: _renewed(method, state, params, grads, state.count),
            lambda: (state.masks, state.inner),
        )

    masks, inner = _called_with_due(
        renewed, (state, now.params, now.grads), due, like=(state.masks, state.inner)
    )
    return _step(method, now, masks, inner, due if rule.replaces_step else None)


def _after(method: _Method, now: _Now) -> _Done:
    """A step first, then masks from where the weights are."""
    state, params = now.state, now.params
    grads = _scaled(now.grads, state.masks, method.gradient)
    updates, inner = method.tx.update(grads, state.inner, params, **now.extra)
    memory = _learned(method, now)
    # The branches and what is packed need nothing of the optimiser inside.
    state = state._replace(inner=None, memory=memory, count=state.count + 1)
    moved = optax.apply_updates(params, updates)
    due = method.rule.due(
        state.count, jax.random.fold_in(typed_key(state.key), state.count)
    )

    def renewed(
        state: SparseState, moved: optax.Updates, grads: optax.Updates, due: Due
    ) -> PackedMasks:
        return _if(
            due,
            lambda: _renewed(method, state, moved, grads, state.count)[0],
            lambda: state.masks,
        )

    masks = _called_with_due(
        renewed, (state, moved, now.grads), due, like=now.state.masks
    )
    left = _left(updates, params, masks, method.post_step, due)
    return _Done(left, masks, memory, inner)


def _called_with_due(
    fn: Callable[..., T], args: tuple[PyTree, ...], due: Due, *, like: PyTree
) -> T:
    """`fn`, whose last argument is True where that is known while tracing."""
    if due is True:
        return under_auto_axes(lambda *args: fn(*args, True), *args, like=like)
    return under_auto_axes(fn, *args, due, like=like)


def _if(due: Due, then: Callable[[], T], otherwise: Callable[[], T]) -> T:
    # Known while tracing: every step, without a branch.
    return then() if due is True else jax.lax.cond(due, then, otherwise)


def _step(
    method: _Method,
    now: _Now,
    masks: PackedMasks,
    inner: optax.OptState,
    skip: Due | None = None,
) -> _Done:
    """A step of the optimiser under masks, and what it leaves of removed weights.

    Where `skip` is given and true, the optimiser stands still.
    """
    params = _without_removed(now.params, masks) if method.hard else now.params
    grads = _scaled(now.grads, masks, method.gradient)
    updates, moved = method.tx.update(grads, inner, params, **now.extra)
    if skip is not None:
        # lax.select, because a state may hold typed keys.
        keep = functools.partial(jax.lax.select, jnp.asarray(skip))
        updates = jax.tree.map(lambda u: keep(jnp.zeros_like(u), u), updates)
        moved = jax.tree.map(keep, inner, moved)
    left = _left(updates, now.params, masks, method.post_step)
    return _Done(left, masks, _learned(method, now), moved)


def _renewed(
    method: _Method,
    state: SparseState,
    params: optax.Params,
    grads: optax.Updates,
    count: jax.Array,
) -> tuple[PackedMasks, optax.OptState]:
    """The masks for step `count`, and the state of the optimiser under them."""
    renew = method.rule.renew
    assert renew is not None
    key = jax.random.fold_in(typed_key(state.key), count)
    moment = _moment(params, grads, state.masks, state.memory, count, key)
    new = renew(moment)
    masks = pack_masks(
        {path: new[path] for path in moment.params}, moment.params, state.masks
    )
    if not method.resets:
        return masks, state.inner
    lasting = {path: old & new[path] for path, old in moment.masks.items()}
    return masks, reset_state(method.tx, state.inner, params, lasting)


def _learned(method: _Method, now: _Now) -> ByPath:
    """What the rule remembers after a step."""
    state, learn = now.state, method.rule.learn
    if learn is None:
        return state.memory

    def memory(
        params: optax.Params, grads: optax.Updates, state: SparseState
    ) -> ByPath:
        key = jax.random.fold_in(typed_key(state.key), state.count)
        return ByPath(
            learn(_moment(params, grads, state.masks, state.memory, state.count, key))
        )

    state = state._replace(inner=None)
    return under_auto_axes(memory, now.params, now.grads, state, like=state.memory)


def _moment(
    params: optax.Params,
    grads: optax.Updates,
    masks: PackedMasks,
    memory: ByPath,
    count: jax.Array,
    key: jax.Array,
) -> Moment:
    held, weights, slopes = (
        unpacked(masks, params),
        named_leaves(params),
        named_leaves(grads),
    )
    return Moment(
        {path: weights[path] for path in held},
        {path: slopes[path] for path in held},
        held,
        named_leaves(memory.arrays),
        count,
        key,
    )


def _scaled(grads: optax.Updates, masks: PackedMasks, factor: float) -> PyTree:
    """Gradients, multiplied where the masks remove."""
    if factor == 1:
        return grads

    def scaled(grads: optax.Updates, masks: PackedMasks) -> PyTree:
        held = unpacked(masks, grads)

        def scale(path: KeyPath, grad: jax.Array) -> jax.Array:
            mask = held.get(keystr(path))
            if mask is None:
                return grad
            # Not by multiplication alone: 0 * inf is nan.
            rest = (
                jax.lax.full_like(grad, 0, shape=()) if factor == 0 else factor * grad
            )
            return jnp.where(mask, grad, rest)

        return jax.tree.map_with_path(scale, grads)

    return under_auto_axes(scaled, grads, masks, like=grads)


def _left(
    updates: optax.Updates,
    params: optax.Params,
    masks: PackedMasks,
    factor: float,
    due: Due = True,
) -> PyTree:
    """Updates that leave `factor` of a removed weight, and of its step, when due."""
    if factor == 1:
        return updates

    def left(
        updates: optax.Updates, params: optax.Params, masks: PackedMasks, due: Due
    ) -> PyTree:
        held, weights = unpacked(masks, params), named_leaves(params)

        def leave(path: KeyPath, update: jax.Array) -> jax.Array:
            mask = held.get(name := keystr(path))
            if mask is None:
                return update
            mask = mask if due is True else mask | ~due
            # w + (-w) is 0 exactly, but only if the update is no narrower than the
            # weight.
            dtype = np.promote_types(update.dtype, weights[name].dtype)
            update, w = update.astype(dtype), weights[name].astype(dtype)
            rest = -w if factor == 0 else factor * (w + update) - w
            return jnp.where(mask, update, rest)

        return jax.tree.map_with_path(leave, updates)

    return _called_with_due(left, (updates, params, masks), due, like=updates)
