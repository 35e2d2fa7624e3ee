"""What `rounds` trains: its state, and the step where none is given."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune.core._types import ApplyFn, PyTree
from jaxprune.narrowing._narrow import narrow
from jaxprune.surgery._slicing import slice_opt_state, slice_params


class State(NamedTuple):
    """What a training step reads and returns.

    Attributes:
        variables: of the net as small as it is.
        opt_state: for ``variables["params"]``, or for all if there is no such
            collection.
        step: how many steps were taken, int32.
        key: random key, the same at every step; `jax.random.fold_in` the step.
    """

    variables: PyTree
    opt_state: PyTree
    step: jax.Array
    key: jax.Array


Step = Callable[[Callable[..., Any], State, Any], State]


def first_state(
    variables: PyTree, tx: optax.GradientTransformation, key: jax.Array
) -> State:
    """The state before the first step."""
    return State(variables, tx.init(trained(variables)), jnp.int32(0), key)


def trained(variables: PyTree) -> PyTree:
    """What the optimiser sees: the collection ``params``, or everything."""
    is_nested = isinstance(variables, Mapping) and "params" in variables
    return variables["params"] if is_nested else variables


def with_trained(variables: PyTree, params: PyTree) -> PyTree:
    """The variables with other values for what is trained."""
    is_nested = isinstance(variables, Mapping) and "params" in variables
    return {**variables, "params": params} if is_nested else params


def sliced_state(
    state: State, tx: optax.GradientTransformation, masks: PyTree
) -> State:
    """The state for what masks leave of its variables, momentum kept."""
    return state._replace(
        variables=slice_params(state.variables, masks),
        opt_state=slice_opt_state(tx, state.opt_state, trained(masks)),
    )


def loss_alone(loss_fn: Callable[..., PyTree] | None) -> ApplyFn | None:
    """The loss without the new values of variables that it may return beside it."""
    if loss_fn is None:
        return None

    def loss(variables: PyTree, batch: PyTree) -> Any:
        found = loss_fn(variables, batch)
        return found[0] if isinstance(found, tuple) else found

    return loss


def one_number(loss: PyTree) -> Any:
    """The loss, if it can be differentiated.

    Raises:
        TypeError: if it is no floating-point scalar.
    """
    shape, dtype = np.shape(loss), getattr(loss, "dtype", None)
    if shape == () and (dtype is None or jnp.issubdtype(dtype, jnp.floating)):
        return loss
    raise TypeError(
        f"loss_fn must return one floating-point number, the mean loss over the batch, "
        f"got {dtype}{list(shape)}"
    )


def default_step(
    loss_fn: Callable[..., PyTree], tx: optax.GradientTransformation, masks: PyTree
) -> Any:
    """One step of gradient descent on a loss of the original variables.

    Args:
        loss_fn: ``(variables, batch) -> loss``, or ``(loss, new collections)``.
        tx: the `optax.GradientTransformation`.
        masks: of the original variables, None where nothing is cut.

    Returns:
        ``(state, batch) -> state``.
    """
    narrowed = loss_fn if masks is None else narrow(loss_fn, masks)

    def step(state: State, batch: PyTree) -> State:
        def loss(params: PyTree) -> tuple[jax.Array, Any]:
            found = narrowed(with_trained(state.variables, params), batch)
            value, new = found if isinstance(found, tuple) else (found, {})
            return one_number(value), new

        params = trained(state.variables)
        slopes, new = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(slopes, state.opt_state, params)
        variables = with_trained(state.variables, optax.apply_updates(params, updates))
        if new:
            variables = {**variables, **new}
        return State(variables, opt_state, state.step + 1, state.key)

    return step


def batch_at(data: Sequence[object] | Callable[[int], object], step: int) -> Any:
    """The batch of a step: always the same, so that a run can be resumed anywhere."""
    return data(step) if callable(data) else data[step % len(data)]
