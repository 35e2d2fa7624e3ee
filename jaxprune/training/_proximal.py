"""The proximal step of the group lasso: groups of weights become exactly zero."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import KeyPath

from jaxprune.core._groups import Groups
from jaxprune.core._leafwise import widened
from jaxprune.core._leaves import keystr, named_leaves
from jaxprune.core._members import along, count
from jaxprune.core._types import PyTree
from jaxprune.training._auto_axes import shapes_of, under_auto_axes
from jaxprune.training._hyperparameters import check, current
from jaxprune.training._leaves import MaskOrFn, select_leaves
from jaxprune.training._links import link
from jaxprune.training._penalties import traced_leaves, unit_squares


class ProximalState(NamedTuple):
    """State of `proximal_group_lasso`.

    Attributes:
        count: int32 scalar, how many updates are behind; what schedules are read at.
        threshold: float32 scalar, learning rate times strength of the next update.
    """

    # Every optax state calls it so, over tuple.count.
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    threshold: jax.Array


def proximal_group_lasso(
    learning_rate: optax.ScalarOrSchedule,
    strength: optax.ScalarOrSchedule,
    groups: Groups | None = None,
    *,
    mask: MaskOrFn = None,
) -> optax.GradientTransformation:
    r"""Shrinks groups of weights after the step, down to exactly zero.

    The proximal map of :math:`strength \sum_g \sqrt{n_g} \, \|w_g\|_2`, applied to what
    the optimiser's step makes of the weights (proximal gradient descent):

    .. math::
        w_g \leftarrow \max\Big(0,
        1 - \frac{learning\_rate \cdot strength \cdot \sqrt{n_g}}{\|w_g\|_2}\Big) \, w_g

    `group_lasso` adds the gradient of the same penalty, under which groups come close
    to zero and never reach it.

    Put it last: ``optax.chain(optax.sgd(0.1, momentum=0.9), proximal_group_lasso(0.1,
    1e-3))``. Whatever comes after it would move the zeros.

    Args:
        learning_rate: that of the step, or its schedule; at least 0.
        strength: at least 0, or a schedule of it.
        groups: what `jaxprune.trace` returned, as for `group_lasso`; None for output
            filters (last axis). A kernel between two groups is shrunk for both: its
            factors multiply, each from the norms after the step.
        mask: which leaves are shrunk, as in `bridgeout`; by default the kernels.

    Returns:
        An `optax.GradientTransformation` with state `ProximalState`.

    Raises:
        ValueError: if a number is negative or not finite (where its value is known), if
            `mask` does not fit `params` or selects nothing, if a leaf does not have the
            shape that was traced, or if ``update`` gets no `params`.
        TypeError: if `mask` holds something other than bools or selects a leaf that is
            not floating.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> tx = optax.chain(optax.sgd(1.0), proximal_group_lasso(1.0, 1.0))
        >>> params = {"kernel": jnp.array([[3.0, 0.3], [4.0, 0.4]])}  # norms 5, 0.5
        >>> grads = {"kernel": jnp.zeros((2, 2))}
        >>> updates, _ = tx.update(grads, tx.init(params), params)
        >>> optax.apply_updates(params, updates)["kernel"]  # times 1 - sqrt(2) / 5
        Array([[2.1514..., 0.        ],
               [2.8686..., 0.        ]], dtype=float32)

    References:
        Parikh and Boyd, `Proximal Algorithms
        <https://web.stanford.edu/~boyd/papers/prox_algs.html>`_, 2014, Sec. 6.5.1;
        Yuan and Lin, `Model Selection and Estimation in Regression with Grouped
        Variables <https://doi.org/10.1111/j.1467-9868.2005.00532.x>`_, JRSS B, 2006
    """
    check("learning_rate", learning_rate)
    check("strength", strength)

    def threshold(count: jax.Array) -> jax.Array:
        rate = current("learning_rate", learning_rate, count)
        return rate * current("strength", strength, count)

    def factors(moved: optax.Updates, limit: jax.Array) -> dict[str, jax.Array]:
        chosen = select_leaves(moved, mask, min_ndim=1, gets="shrunk")
        leaves = {n: w for n, w in named_leaves(moved).items() if n in chosen}
        if groups is None:
            return {name: _of_filters(w, limit) for name, w in leaves.items()}
        return _of_units(groups, leaves, limit)

    def init(params: optax.Params) -> ProximalState:
        count = jnp.zeros((), jnp.int32)
        now = threshold(count)
        if jax.tree.leaves(params):  # optax.tree.map_params probes with none
            jax.eval_shape(factors, *shapes_of((params, now)))  # complains early
        return ProximalState(count, now)

    def shrunk(
        updates: optax.Updates, params: optax.Params, limit: jax.Array
    ) -> PyTree:
        found = factors(optax.apply_updates(params, updates), limit)
        weights = named_leaves(params)

        def shrink(path: KeyPath, update: jax.Array) -> jax.Array:
            factor = found.get(name := keystr(path))
            if factor is None:
                return update
            # w + (-w) is 0 exactly, but only if the update is no narrower than w.
            dtype = np.promote_types(update.dtype, weights[name].dtype)
            w, update = widened(weights[name].astype(dtype)), update.astype(dtype)
            less = factor * (w + widened(update)) - w
            less = jnp.where(factor == 0, -w, less).astype(dtype)
            return jnp.where(factor == 1, update, less)

        return jax.tree.map_with_path(shrink, updates)

    def update(
        updates: optax.Updates, state: ProximalState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ProximalState]:
        if params is None:
            raise ValueError(
                "a proximal step sets weights; call tx.update(grads, opt_state, params)"
            )
        new = under_auto_axes(shrunk, updates, params, state.threshold, like=updates)
        count = jnp.asarray(optax.safe_increment(state.count))
        return new, ProximalState(count, threshold(count))

    return link(init, update)


def _factor(squares: jax.Array, weights: int, limit: jax.Array) -> jax.Array:
    """``max(0, 1 - limit * sqrt(weights) / norm)``; 0 for a group of zeros."""
    some = squares > 0
    norm = jnp.sqrt(jnp.where(some, squares, 1.0))
    limit = limit.astype(norm.dtype) * math.sqrt(weights)
    return jnp.where(some, jnp.maximum(0.0, 1 - limit / norm), 0.0)


def _of_filters(w: jax.Array, limit: jax.Array) -> jax.Array:
    squares = jnp.square(widened(w)).sum(tuple(range(w.ndim - 1)), keepdims=True)
    return _factor(squares, w.size // w.shape[-1], limit)


def _of_units(
    groups: Groups, leaves: Mapping[str, jax.Array], limit: jax.Array
) -> dict[str, jax.Array]:
    """Leaf by leaf, the product of the factors of all units that have a part in it."""
    traced = traced_leaves(groups, dict(leaves))
    found = {
        name: jnp.ones((1,) * leaf.ndim, widened(leaf).dtype)
        for name, leaf in traced.items()
    }
    for group in groups.values():
        members = [member for member in group.members if member.path in traced]
        if not members:
            continue
        squares, weights = unit_squares(group, traced)
        factor = _factor(squares, weights, limit)
        for member in members:
            leaf = traced[member.path]
            line = jnp.ones(count(member, leaf.shape), widened(leaf).dtype)
            each = jnp.repeat(factor.astype(line.dtype), member.repeats)
            line = line.at[member.index.ravel()].multiply(each)
            every = along(line, member, leaf.shape)
            found[member.path] = found[member.path] * every
    return dict(zip(leaves, found.values(), strict=True))
