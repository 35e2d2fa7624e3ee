"""A teacher that is the average of the student: parameters followed by a link."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune.core._types import PyTree
from jaxprune.training._hyperparameters import check, current
from jaxprune.training._links import link


class TeacherState(NamedTuple):
    """State of `ema_teacher`.

    Attributes:
        count: int32 scalar, how many updates are behind.
        average: the teacher, a tree like the parameters.
    """

    # Every optax state calls it so, over tuple.count.
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    average: optax.Params


def ema_teacher(
    decay: optax.ScalarOrSchedule = 0.999, *, warm_up: bool = True
) -> optax.GradientTransformation:
    r"""Follows the parameters with an exponential moving average of them.

    .. math::
        \bar w_0 = w_0, \qquad \bar w_{t+1} = d_t \bar w_t + (1 - d_t) w_{t+1}, \qquad
        d_t = \min\Big(decay, \frac{1 + t}{10 + t}\Big)

    It changes no update. Put it last, where updates are what is added to the weights:
    ``optax.chain(optax.sgd(0.1), ema_teacher())``. The average lies in the optimiser's
    state and is sliced with it (`slice_opt_state`).

    Args:
        decay: in [0, 1), or a schedule of it.
        warm_up: begin with a short memory, the second term of the minimum.

    Returns:
        An `optax.GradientTransformation` with state `TeacherState`; read the teacher
        with `teacher_params`.

    Raises:
        ValueError: if `decay` is out of range (where its value is known), or ``update``
            gets no `params`.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> tx = optax.chain(optax.sgd(1.0), ema_teacher(0.5, warm_up=False))
        >>> params = {"w": jnp.array([4.0])}
        >>> _, opt_state = tx.update({"w": jnp.array([2.0])}, tx.init(params), params)
        >>> teacher_params(opt_state)  # half of 4, half of 2
        {'w': Array([3.], dtype=float32)}

    References:
        Tarvainen and Valpola, `Mean Teachers Are Better Role Models
        <https://arxiv.org/abs/1703.01780>`_, NIPS 2017
    """
    check("decay", decay)

    def init(params: optax.Params) -> TeacherState:
        # Copies: donating the parameters must not delete the teacher.
        average = jax.tree.map(jnp.copy, params)
        return TeacherState(jnp.zeros((), jnp.int32), average)

    def update(
        updates: optax.Updates, state: TeacherState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, TeacherState]:
        if params is None:
            raise ValueError(
                "the teacher follows the weights; call "
                "tx.update(grads, opt_state, params)"
            )
        slow = current("decay", decay, state.count)
        if warm_up:
            steps = state.count.astype(jnp.float32)
            slow = jnp.minimum(slow, (1 + steps) / (10 + steps))
        moved = optax.apply_updates(params, updates)
        average = jax.tree.map(
            lambda old, new: _between(old, new, slow), state.average, moved
        )
        count = jnp.asarray(optax.safe_increment(state.count))
        return updates, TeacherState(count, average)

    return link(init, update)


def teacher_params(opt_state: optax.OptState) -> PyTree:
    """The average that `ema_teacher` keeps, without a gradient.

    Args:
        opt_state: the optimiser's state; `TeacherState` is found wherever it lies.

    Returns:
        Tree like the parameters.

    Raises:
        ValueError: if there is none, or more than one.

    Example:
        >>> import jax.numpy as jnp
        >>> teacher_params(ema_teacher().init({"w": jnp.ones(1)}))
        {'w': Array([1.], dtype=float32)}
    """
    found = [
        state
        for _, state in optax.tree.get_all_with_path(opt_state, TeacherState.__name__)
        if isinstance(state, TeacherState)
    ]
    if len(found) != 1:
        raise ValueError(
            f"opt_state holds {len(found)} states of ema_teacher, expected one; is "
            "jaxprune.training.ema_teacher() in the chain whose init made this state?"
        )
    return jax.lax.stop_gradient(found[0].average)


def _between(old: jax.Array, new: jax.Array, slow: jax.Array) -> jax.Array:
    if not jnp.issubdtype(jnp.result_type(old), jnp.inexact):
        return new
    old, new = jnp.asarray(old), jnp.asarray(new)
    wide = jnp.promote_types(old.dtype, jnp.float32)
    slow = slow.astype(jnp.finfo(wide).dtype)
    mixed = slow * old.astype(wide) + (1 - slow) * new.astype(wide)
    return mixed.astype(old.dtype)
