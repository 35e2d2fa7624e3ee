"""Penalties that noise amounts to, without the noise: gradients added to gradients.

`bridge_penalty` is the deterministic counterpart of `bridgeout`, `group_lasso` that of
`group_bridgeout`. Both are optax links in the manner of `optax.add_decayed_weights`:
they stand before the optimiser's own scaling, so that the penalty is part of the loss.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import KeyPath

from jaxprune.core._groups import Group, Groups, Member
from jaxprune.core._leafwise import widened
from jaxprune.core._leaves import keystr, named_leaves
from jaxprune.core._members import count, in_front
from jaxprune.core._types import PyTree
from jaxprune.training._auto_axes import shapes_of, under_auto_axes
from jaxprune.training._hyperparameters import check, current
from jaxprune.training._leaves import MaskOrFn, select_leaves
from jaxprune.training._links import link


class PenaltyState(NamedTuple):
    """State of a penalty.

    Attributes:
        count: int32 scalar, how many updates are behind; what a schedule is read at.
        strength: float32 scalar, the factor of the penalty in the next update.
    """

    # Every optax state calls it so, over tuple.count.
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    strength: jax.Array


def bridge_penalty(
    strength: optax.ScalarOrSchedule,
    q: float = 1.0,
    *,
    mask: MaskOrFn = None,
    eps: float = 1e-12,
) -> optax.GradientTransformation:
    r"""Adds the gradient of :math:`strength \sum_j (|w_j| + eps)^q`.

    Lasso at q = 1, ridge at q = 2, closer to counting weights the smaller q is. It is
    what `bridgeout` at ``strength = rate / (1 - rate)`` does on average in a linear
    model whose features have unit energy, but the same for every weight: it does not
    know how strongly a weight's input fires.

    A zero weight gets the gradient 0. For q < 1 the gradient at tiny weights grows to
    ``q * eps ** (q - 1)``: raise `eps`, or clip.

    Args:
        strength: at least 0, or a schedule of it.
        q: norm of the penalty, above 0.
        mask: which leaves are penalised, as in `bridgeout`; by default the kernels.
        eps: added to ``|w|``; above 0.

    Returns:
        An `optax.GradientTransformation` with state `PenaltyState`.

    Raises:
        ValueError: if an argument is out of range (where its value is known), if
            `mask` does not fit `params` or selects nothing, or if ``update`` gets no
            `params`.
        TypeError: if `mask` holds something other than bools or selects a leaf that is
            not floating.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = bridge_penalty(0.1, q=1.0)  # the lasso
        >>> params = {"kernel": jnp.array([[2.0, -3.0, 0.0]])}
        >>> grads = {"kernel": jnp.zeros((1, 3))}
        >>> tx.update(grads, tx.init(params), params)[0]["kernel"]
        Array([[ 0.1, -0.1,  0. ]], dtype=float32)

    References:
        Frank and Friedman, `A Statistical View of Some Chemometrics Regression Tools
        <https://doi.org/10.2307/1269656>`_, Technometrics, 1993
    """
    check("q", q)
    check("eps", eps)

    def penalty(params: optax.Params) -> jax.Array:
        chosen = select_leaves(params, mask, gets="a penalty")
        return _sum(
            _power(w, q, eps)
            for name, w in named_leaves(params).items()
            if name in chosen
        )

    return _link(strength, penalty)


def group_lasso(
    strength: optax.ScalarOrSchedule,
    groups: Groups | None = None,
    *,
    mask: MaskOrFn = None,
) -> optax.GradientTransformation:
    r"""Adds the gradient of :math:`strength \sum_g \sqrt{n_g} \, \|w_g\|_2`.

    A group is one output filter of one kernel, with its :math:`n_g` weights; or, given
    the `Groups` of a traced function, one unit with all weights that it occupies in
    any kernel, so that what is cut together is pushed to zero together. A group of
    zeros gets the gradient 0.

    Args:
        strength: at least 0, or a schedule of it.
        groups: what `jaxprune.trace` returned, for the parameters or for variables
            with a collection ``params``; None for output filters (last axis).
        mask: which leaves are penalised, as in `bridgeout`; by default the kernels.

    Returns:
        An `optax.GradientTransformation` with state `PenaltyState`.

    Raises:
        ValueError: if `strength` is negative (where its value is known), if `mask`
            does not fit `params` or selects nothing, if a leaf does not have the shape
            that was traced, or if ``update`` gets no `params`.
        TypeError: if `mask` holds something other than bools or selects a leaf that is
            not floating.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = group_lasso(1.0)
        >>> params = {"kernel": jnp.array([[3.0, 0.0], [4.0, 0.0]])}
        >>> grads = {"kernel": jnp.zeros((2, 2))}
        >>> tx.update(grads, tx.init(params), params)[0]["kernel"]  # sqrt(2) * w / |w|
        Array([[0.848..., 0.       ],
               [1.131..., 0.       ]], dtype=float32)

    References:
        Yuan and Lin, `Model Selection and Estimation in Regression with Grouped
        Variables <https://doi.org/10.1111/j.1467-9868.2005.00532.x>`_, JRSS B, 2006

        Wen et al., `Learning Structured Sparsity in Deep Neural Networks
        <https://arxiv.org/abs/1608.03665>`_, 2016
    """

    def penalty(params: optax.Params) -> jax.Array:
        chosen = select_leaves(params, mask, min_ndim=1, gets="a penalty")
        leaves = {n: w for n, w in named_leaves(params).items() if n in chosen}
        if groups is None:
            return _sum(_filter_norms(w) for w in leaves.values())
        leaves = traced_leaves(groups, leaves)
        return _sum(_unit_norms(group, leaves) for group in groups.values())

    return _link(strength, penalty)


def _link(
    strength: optax.ScalarOrSchedule, penalty: Callable[[optax.Params], jax.Array]
) -> optax.GradientTransformation:
    """Adds ``strength * grad(penalty)``; `penalty` sums float32 or wider."""
    check("strength", strength)

    def init(params: optax.Params) -> PenaltyState:
        if jax.tree.leaves(params):  # optax.tree.map_params probes with none
            jax.eval_shape(penalty, shapes_of(params))  # complains early
        count = jnp.zeros((), jnp.int32)
        return PenaltyState(count, current("strength", strength, count))

    def update(
        updates: optax.Updates, state: PenaltyState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, PenaltyState]:
        if params is None:
            raise ValueError(
                "a penalty is a function of the weights; call "
                "tx.update(grads, opt_state, params)"
            )

        def added(
            updates: optax.Updates, params: optax.Params, strength: jax.Array
        ) -> PyTree:
            slopes = named_leaves(jax.grad(penalty)(params))

            def add(path: KeyPath, grad: jax.Array) -> jax.Array:
                slope = slopes[keystr(path)].astype(jnp.float32)
                return grad + (strength * slope).astype(grad.dtype)

            return jax.tree.map_with_path(add, updates)

        updates = under_auto_axes(added, updates, params, state.strength, like=updates)
        count = jnp.asarray(optax.safe_increment(state.count))
        now = current("strength", strength, count)
        return updates, PenaltyState(count, now)

    return link(init, update)


def _power(w: jax.Array, q: float, eps: float) -> jax.Array:
    wide = widened(w)
    alive = wide != 0
    # The inner `where` keeps the infinite slope at 0 out of the gradient.
    power = (jnp.abs(jnp.where(alive, wide, 1.0)) + eps) ** q
    return jnp.where(alive, power, 0.0).sum()


def _filter_norms(w: jax.Array) -> jax.Array:
    squares = jnp.square(widened(w)).sum(tuple(range(w.ndim - 1)))
    return math.sqrt(w.size // w.shape[-1]) * _sqrt(squares).sum()


def _unit_norms(group: Group, leaves: dict[str, jax.Array]) -> jax.Array:
    if not any(member.path in leaves for member in group.members):
        return jnp.zeros(())
    squares, weights = unit_squares(group, leaves)
    return math.sqrt(weights) * _sqrt(squares).sum()


def unit_squares(group: Group, leaves: dict[str, jax.Array]) -> tuple[jax.Array, int]:
    """Sums of squares ``[size]``, and how many weights of the leaves a unit has."""
    members = [member for member in group.members if member.path in leaves]
    squares = _sum(_member_squares(member, leaves[member.path]) for member in members)
    weights = sum(
        member.repeats * (leaf.size // count(member, leaf.shape))
        for member in members
        for leaf in [leaves[member.path]]
    )
    return squares, weights


def _member_squares(member: Member, leaf: jax.Array) -> jax.Array:
    rows = jnp.square(in_front(widened(leaf), member))
    return rows.sum(tuple(range(1, rows.ndim)))[member.index].sum(1)


def traced_leaves(groups: Groups, leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The leaves by their traced path, which may start with the collection."""
    traced = {
        name if name in groups.shapes else f"params/{name}": leaf
        for name, leaf in leaves.items()
    }
    for name, leaf in traced.items():
        if groups.shapes.get(name) != leaf.shape:
            raise ValueError(
                f"{name} has shape {leaf.shape}, but the traced leaf has "
                f"{groups.shapes.get(name)}; were the groups traced from these "
                "parameters, and before slicing?"
            )
    return traced


def _sqrt(squares: jax.Array) -> jax.Array:
    """Square root with slope 0 at 0."""
    some = squares > 0
    return jnp.where(some, jnp.sqrt(jnp.where(some, squares, 1.0)), 0.0)


def _sum(terms: Iterable[jax.Array]) -> jax.Array:
    return sum(terms, jnp.zeros(()))
