"""Scores from the gradient by gates on units: what would the loss be without one?"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxprune.core._groups import Groups
from jaxprune.core._types import PyTree
from jaxprune.scores._published import of_units
from jaxprune.statistics._streaming import (
    Batches,
    LossFn,
    averaged,
    examples_in,
    singles,
)
from jaxprune.statistics.taps._gates import gate, probe


@of_units("loss")
def group_fisher(
    groups: Groups,
    loss_fn: LossFn,
    variables: PyTree,
    batches: Batches,
    *,
    progress: bool | None = None,
) -> dict[str, jax.Array]:
    """Fisher information of a gate on every unit, shared by all that is coupled.

    With a gate m on each unit wherever the network takes it in (see `taps.gate`), the
    loss without the unit is, to second order and at a minimum::

        1 / (2 N)  sum over examples n of (dL_n / dm)^2

    dL_n/dm is the sum over all coupled places; it is squared after that sum and for
    each example alone, then all examples add up. One backward pass through gates of
    ones ``[N, size]`` gives it for a whole batch. Divide by what a unit costs (memory,
    in the paper) to rank units of different groups.

    Args:
        groups: what `trace` returned.
        loss_fn: ``(variables, batch) -> scalar``, the mean loss over the batch; is
            called with batches of one example, so BatchNorm must be in inference mode.
        variables: tree of arrays, those that were traced or their ``params``.
        batches: iterable of batches, examples along axis 0.
        progress: show a progress bar? None for on a terminal.

    Returns:
        Group name -> float32 or wider ``[size]``, not negative, larger matters more.

    Raises:
        ValueError: if there are no batches, or a group is used where taps cannot act.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprune
        >>> def mlp(params, x):
        ...     return jax.nn.relu(x @ params["w1"]) @ params["w2"]
        >>> params = {"w1": jnp.array([[1.0, -1.0]]), "w2": jnp.array([[1.0], [2.0]])}
        >>> groups = jaxprune.trace(mlp, params, jnp.ones((1, 1)))
        >>> batches = [jnp.array([[1.0], [-1.0]]), jnp.array([[3.0], [-2.0]])]
        >>> group_fisher(groups, lambda p, x: mlp(p, x).mean(), params, batches)
        {'w1:1': Array([1.25, 2.5 ], dtype=float32)}

    References:
        Liu et al., `Group Fisher Pruning for Practical Network Compression
        <https://arxiv.org/abs/2108.00708>`_, 2021
    """
    gated = gate(loss_fn, groups)

    def step(variables: PyTree, batch: PyTree, k: jax.Array) -> dict[str, jax.Array]:
        count, examples = examples_in(batch), singles(batch)

        def total(gates: Mapping[str, jax.Array]) -> jax.Array:
            loss = lambda own, example: gated(own, variables, example)  # noqa: E731
            return jax.vmap(loss)(gates, examples).sum()

        ones = {name: jnp.ones((count, group.size)) for name, group in groups.items()}
        slopes = jax.grad(total)(ones)
        return {name: jnp.square(slope).sum(0) / 2 for name, slope in slopes.items()}

    return averaged(step, variables, batches, title="group_fisher", progress=progress)


@of_units("loss")
def contribution(
    groups: Groups,
    loss_fn: LossFn,
    variables: PyTree,
    batches: Batches,
    *,
    progress: bool | None = None,
) -> dict[str, jax.Array]:
    r"""How much the loss feels the activations of every unit.

    .. math:: I_i = \frac{1}{N} \sum_n \left\| \frac{\partial L_n}{\partial A_i(x_n)}
        \right\|_2

    with A everything that a unit holds where products take it in: the feature map of a
    filter. Where several layers read it, the squares of their parts add up.

    Args:
        groups: what `trace` returned.
        loss_fn: ``(variables, batch) -> scalar``, as in `group_fisher`.
        variables: tree of arrays, those that were traced or their ``params``.
        batches: iterable of batches, examples along axis 0.
        progress: show a progress bar? None for on a terminal.

    Returns:
        Group name -> float32 or wider ``[size]``, not negative, larger matters more.

    Raises:
        ValueError: if there are no batches, or a group is in no activation.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprune
        >>> def mlp(params, x):
        ...     return jax.nn.relu(x @ params["w1"]) @ params["w2"]
        >>> params = {"w1": jnp.array([[1.0, -1.0]]), "w2": jnp.array([[1.0], [-2.0]])}
        >>> groups = jaxprune.trace(mlp, params, jnp.ones((1, 1)))
        >>> loss = lambda params, x: mlp(params, x).mean()
        >>> contribution(groups, loss, params, [jnp.ones((3, 1))])
        {'w1:1': Array([1., 2.], dtype=float32)}

    References:
        Qin et al., `Functionality-Oriented Convolutional Filter Pruning
        <https://arxiv.org/abs/1810.07322>`_, 2019
    """
    probed = probe(loss_fn, groups)

    def step(variables: PyTree, batch: PyTree, k: jax.Array) -> dict[str, jax.Array]:
        count, examples = examples_in(batch), singles(batch)

        def total(probes: Mapping[str, jax.Array]) -> jax.Array:
            loss = lambda own, example: probed(own, variables, example)  # noqa: E731
            return jax.vmap(loss)(probes, examples).sum()

        start = {name: jnp.zeros((count, g.size)) for name, g in groups.items()}
        squares = jax.grad(total)(start)
        return {name: jnp.sqrt(own).sum(0) for name, own in squares.items()}

    return averaged(step, variables, batches, title="contribution", progress=progress)
