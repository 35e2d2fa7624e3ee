"""The state of an optimiser where weights leave or come back."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune.core._masks import zero_removed
from jaxprune.core._types import PyTree
from jaxprune.training.sparse._state import Arrays, like_params


class _Part(NamedTuple):
    """A part of the state of an optimiser that belongs to one parameter."""

    value: PyTree
    mask: jax.Array


def reset_state(
    tx: optax.GradientTransformation,
    state: optax.OptState,
    params: optax.Params,
    lasting: Arrays,
) -> optax.OptState:
    """The state of an optimiser, as after a fresh start where weights do not last.

    Args:
        tx: the optimiser.
        state: its state.
        params: the weights.
        lasting: path -> mask of the weights that stay as they are.

    Returns:
        Like `state`. Parts that do not have the shape of a parameter are left alone.
    """

    def part(value: PyTree, mask: jax.Array, w: jax.Array) -> PyTree:
        whole = not _is_masked_node(value) and np.shape(value) == np.shape(w)
        return _Part(value, mask) if whole and mask.ndim else value

    masks = like_params(lasting, params, True)
    marked = optax.tree.map_params(
        tx, part, state, masks, params, is_leaf=_is_masked_node
    )
    # The weights that leave are zero by now, should a state hold copies of them.
    fresh = tx.init(jax.tree.map(zero_removed, params, masks))
    return jax.tree.map(
        lambda old, new: (
            jnp.where(old.mask, old.value, new.astype(old.value.dtype))
            if isinstance(old, _Part)
            else old
        ),
        marked,
        fresh,
        is_leaf=lambda x: isinstance(x, _Part),
    )


def check_resettable(
    tx: optax.GradientTransformation, state: optax.OptState, params: optax.Params
) -> None:
    """Complains if optax cannot tell what in a state belongs to which parameter.

    Raises:
        ValueError: saying so.
    """
    try:
        optax.tree.map_params(
            tx, lambda value, _: value, state, params, is_leaf=_is_masked_node
        )
    except Exception as error:  # tx.init on optax's placeholder may raise anything.
        raise ValueError(
            "optax.tree.map_params cannot tell which parts of the optimiser's state "
            "belong to the parameters, so those of removed weights cannot be reset; "
            "does tx.init do something unusual with its parameters?"
        ) from error


def _is_masked_node(part: object) -> bool:
    return isinstance(part, optax.MaskedNode)
