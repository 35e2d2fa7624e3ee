"""Force regularisation: filters attract each other, so that fewer span them."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import KeyPath

from jaxprune.core._leafwise import widened
from jaxprune.core._leaves import keystr, named_leaves
from jaxprune.core._types import PyTree
from jaxprune.training._auto_axes import under_auto_axes
from jaxprune.training._hyperparameters import check, current
from jaxprune.training._leaves import MaskOrFn, select_leaves
from jaxprune.training._links import link


class ForceState(NamedTuple):
    """State of `force_regularization`.

    Attributes:
        count: int32 scalar, how many updates are behind; what a schedule is read at.
        strength: float32 scalar, the factor of the force in the next update.
    """

    # Every optax state calls it so, over tuple.count.
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    strength: jax.Array


def force_regularization(
    strength: optax.ScalarOrSchedule,
    norm: Literal["l1", "l2"] = "l2",
    *,
    mask: MaskOrFn = None,
) -> optax.GradientTransformation:
    r"""Attracts the filters of a kernel, so that it needs a lower rank.

    The filters :math:`w_i` (last axis), as directions :math:`u_i = w_i / \|w_i\|`, pull
    at each other with forces :math:`f_{ji}`; a filter feels what of them turns it, and
    keeps its length:

    .. math::
        g_i \leftarrow g_i - strength \, \|w_i\| \sum_j
        \big( f_{ji} - (f_{ji} \cdot u_i) \, u_i \big), \qquad
        f_{ji} = u_j - u_i \;\text{("l2")} \quad \text{or} \quad
        \frac{u_j - u_i}{\|u_j - u_i\|} \;\text{("l1")}

    It stands before the optimiser, as `optax.add_decayed_weights` does. Afterwards
    `jaxprune.factorise` loses less at a rank, or needs less rank for an error.

    Args:
        strength: at least 0, or a schedule of it.
        norm: of the force: "l2" grows with the distance, "l1" does not.
        mask: which leaves feel it, as in `bridgeout`; by default the kernels.

    Returns:
        An `optax.GradientTransformation` with state `ForceState`.

    Raises:
        ValueError: if an argument is out of range, if `mask` does not fit `params` or
            selects nothing, or if ``update`` gets no `params`.
        TypeError: if `mask` holds something other than bools or selects a leaf that is
            not floating.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = force_regularization(0.1)
        >>> params = {"kernel": jnp.array([[1.0, 0.0], [0.0, 2.0]])}
        >>> grads = {"kernel": jnp.zeros((2, 2))}
        >>> tx.update(grads, tx.init(params), params)[0]["kernel"]
        Array([[ 0. , -0.2],
               [-0.1,  0. ]], dtype=float32)

    References:
        Wen et al., `Coordinating Filters for Faster Deep Neural Networks
        <https://arxiv.org/abs/1703.09746>`_, ICCV 2017
    """
    check("strength", strength)
    if norm not in ("l1", "l2"):
        raise ValueError(f'norm must be "l1" or "l2", got {norm!r}')

    def init(params: optax.Params) -> ForceState:
        if jax.tree.leaves(params):  # optax.tree.map_params probes with none
            select_leaves(params, mask, min_ndim=2, gets="a force")  # complains early
        count = jnp.zeros((), jnp.int32)
        return ForceState(count, current("strength", strength, count))

    def pulled(
        updates: optax.Updates, params: optax.Params, factor: jax.Array
    ) -> PyTree:
        chosen = select_leaves(params, mask, min_ndim=2, gets="a force")
        weights = named_leaves(params)

        def pull(path: KeyPath, grad: jax.Array) -> jax.Array:
            if (name := keystr(path)) not in chosen:
                return grad
            force = _forces(widened(weights[name]), norm)
            return grad - (factor.astype(force.dtype) * force).astype(grad.dtype)

        return jax.tree.map_with_path(pull, updates)

    def update(
        updates: optax.Updates, state: ForceState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ForceState]:
        if params is None:
            raise ValueError(
                "forces act between weights; call tx.update(grads, opt_state, params)"
            )
        new = under_auto_axes(pulled, updates, params, state.strength, like=updates)
        count = jnp.asarray(optax.safe_increment(state.count))
        return new, ForceState(count, current("strength", strength, count))

    return link(init, update)


def _forces(kernel: jax.Array, norm: str) -> jax.Array:
    """What turns every filter, times its length; 0 for filters of zeros."""
    filters = kernel.reshape(-1, kernel.shape[-1])
    squares = jnp.square(filters).sum(0, keepdims=True)
    length = jnp.sqrt(jnp.where(squares > 0, squares, 1.0))
    directions = filters / length
    with jax.default_matmul_precision("highest"):
        cosines = directions.T @ directions
        pull = jnp.ones_like(cosines)
        if norm == "l1":
            # |u_j - u_i|^2 = 2 - 2 cos; what is parallel does not turn.
            apart = 2 - 2 * cosines
            far = (apart > 1e-6) & ~np.eye(len(apart), dtype=bool)
            pull = jnp.where(far, 1 / jnp.sqrt(jnp.where(far, apart, 1.0)), 0.0)
        # The part of f_ji along u_i is taken out: u_i itself never turns filter i.
        alive = (squares > 0).astype(filters.dtype)
        pull = pull * alive.T * alive
        sideways = directions @ pull - directions * (pull * cosines).sum(
            0, keepdims=True
        )
    return (sideways * length).reshape(kernel.shape)
