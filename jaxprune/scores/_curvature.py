"""Scores from second derivatives of a loss: Fisher, Hessian and gradient flow.

Their protocol is that of `jaxprune.scores._gradients`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.core._checks import whole_number
from jaxprune.core._leafwise import widened
from jaxprune.core._types import PyTree
from jaxprune.scores._gradients import mean_gradient
from jaxprune.scores._published import of_weights
from jaxprune.scores._trees import refuse_complex, scaled, times
from jaxprune.statistics._streaming import (
    Batches,
    LossFn,
    averaged,
    examples_in,
    floating,
    gradient,
    joined,
    singles,
    twice,
)


@of_weights("abs_of_sum", "loss")
def grasp(
    loss_fn: LossFn,
    params: PyTree,
    batches: Batches,
    *,
    progress: bool | None = None,
) -> PyTree:
    """How much of the gradient flow hangs on a weight: ``w (H g)``.

    Removing the weight changes the squared norm of the gradient by ``-2 w (H g)`` to
    first order, H the Hessian and g the gradient of the mean loss over all batches.
    The sign is the opposite of the paper's ``S = -w (H g)``, which removes what scores
    highest: here, as everywhere, larger matters more. Scores may be negative: removing
    such a weight makes the gradient larger.

    Args:
        loss_fn: ``(params, batch) -> scalar``, the mean loss over the batch. The paper
            divides the logits by a temperature of 200.
        params: tree of arrays.
        batches: iterable of batches, examples along axis 0; read twice.
        progress: show a progress bar? None for on a terminal.

    Returns:
        Tree like `params` of float32 or wider, None for leaves that are not floating
        point.

    Raises:
        ValueError: if there are no batches, or they can be read only once.

    Example:
        >>> import jax.numpy as jnp
        >>> def loss_fn(params, batch):
        ...     return jnp.mean(batch @ params["w"] ** 2)
        >>> params = {"w": jnp.array([1.0, -2.0])}  # g = 2 w, H = 2 for ones
        >>> grasp(loss_fn, params, [jnp.array([[1.0, 1.0]])])
        {'w': Array([ 4., 16.], dtype=float32)}

    References:
        Wang et al., `Picking Winning Tickets Before Training by Preserving Gradient
        Flow <https://arxiv.org/abs/2002.07376>`_, 2020
    """
    refuse_complex(params, "grasp")
    batches = twice(batches, "grasp")
    flow = mean_gradient(loss_fn, params, batches, "grasp, pass 1", progress)

    def step(params: PyTree, batch: PyTree, k: jax.Array, flow: PyTree) -> PyTree:
        product = _hessian_times(loss_fn, params, batch, flow)
        return scaled(product, examples_in(batch))

    options: dict[str, Any] = {"title": "grasp, pass 2", "progress": progress}
    return times(params, averaged(step, params, batches, flow, **options))


@of_weights("sum")
def fisher(
    loss_fn: LossFn,
    params: PyTree,
    batches: Batches,
    *,
    progress: bool | None = None,
) -> PyTree:
    """The diagonal of the empirical Fisher matrix: the mean of ``g_n^2``.

    g_n is the gradient of the loss of example n alone; all examples count. Sample the
    labels from the model in `loss_fn` for the Fisher matrix proper. As a pruning score
    pass it to `obd`.

    Args:
        loss_fn: ``(params, batch) -> scalar``, the mean loss over the batch; is called
            with batches of one example.
        params: tree of arrays.
        batches: iterable of batches, examples along axis 0. Memory is the parameters
            times the examples of a batch.
        progress: show a progress bar? None for on a terminal.

    Returns:
        Tree like `params` of float32 or wider, not negative, None for leaves that are
        not floating point.

    Raises:
        ValueError: if there are no batches.

    Example:
        >>> import jax.numpy as jnp
        >>> def loss_fn(params, batch):
        ...     return jnp.mean(batch @ params["w"])
        >>> batches = [jnp.array([[1.0, 0.0], [3.0, 0.0]]), jnp.array([[2.0, 3.0]] * 2)]
        >>> fisher(loss_fn, {"w": jnp.zeros(2)}, batches)
        {'w': Array([4.5, 4.5], dtype=float32)}

    References:
        Theis et al., `Faster gaze prediction with dense networks and Fisher pruning
        <https://arxiv.org/abs/1801.05787>`_, 2018
    """
    refuse_complex(params, "fisher")

    def step(params: PyTree, batch: PyTree, k: jax.Array) -> PyTree:
        slopes = gradient(loss_fn)
        each = jax.vmap(lambda example: slopes(params, example))(singles(batch))
        return jax.tree.map(lambda g: jnp.square(widened(g)).sum(0), each)

    return averaged(step, params, batches, title="fisher", progress=progress)


@of_weights("abs_of_sum")
def hessian_diagonal(
    loss_fn: LossFn,
    params: PyTree,
    batches: Batches,
    key: jax.Array,
    *,
    samples: int = 1,
    progress: bool | None = None,
) -> PyTree:
    """The diagonal of the Hessian by Hutchinson's estimator: the mean of ``z (H z)``.

    z holds random signs, new ones for every sample and batch. Exact where the Hessian
    is diagonal, unbiased everywhere; one sample costs about two gradients. As a
    pruning score pass it to `obd`.

    Args:
        loss_fn: ``(params, batch) -> scalar``, the mean loss over the batch.
        params: tree of arrays.
        batches: iterable of batches, examples along axis 0.
        key: random key, consumed.
        samples: how many z to average over for every batch.
        progress: show a progress bar? None for on a terminal.

    Returns:
        Tree like `params` of float32 or wider, None for leaves that are not floating
        point. Entries may be negative.

    Raises:
        ValueError: if there are no batches or samples is below 1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> def loss_fn(params, batch):
        ...     return jnp.mean(batch @ params["w"] ** 2)
        >>> batches = [jnp.array([[1.0, 3.0]]), jnp.array([[2.0, 5.0]])]
        >>> hessian_diagonal(loss_fn, {"w": jnp.ones(2)}, batches, jax.random.key(0))
        {'w': Array([3., 8.], dtype=float32)}

    References:
        Bekas et al., `An estimator for the diagonal of a matrix
        <https://doi.org/10.1016/j.apnum.2007.01.003>`_, 2007
    """
    samples = whole_number("samples", samples)
    refuse_complex(params, "hessian_diagonal")

    def step(params: PyTree, batch: PyTree, k: jax.Array, key: jax.Array) -> PyTree:
        def sample(total: PyTree, key: jax.Array) -> tuple[PyTree, None]:
            signs = _random_signs(key, params)
            products = _hessian_times(loss_fn, params, batch, signs)
            part = scaled(times(signs, products), examples_in(batch) / samples)
            return jax.tree.map(jnp.add, total, part), None

        zero = jax.tree.map(lambda p: jnp.zeros_like(widened(p)), floating(params))
        keys = jax.random.split(jax.random.fold_in(key, k), samples)
        return jax.lax.scan(sample, zero, keys)[0]

    title = "hessian_diagonal"
    return averaged(step, params, batches, key, title=title, progress=progress)


@of_weights("abs_of_sum")
def obd(params: PyTree, curvature: PyTree) -> PyTree:
    """Optimal Brain Damage: ``h w^2 / 2``, the loss a weight saves at a minimum.

    Args:
        params: tree of arrays.
        curvature: tree like `params`: `hessian_diagonal` or `fisher`; None where a
            leaf has no score.

    Returns:
        Tree like `curvature` of float32 or wider.

    Example:
        >>> import jax.numpy as jnp
        >>> obd({"w": jnp.array([2.0, -1.0])}, {"w": jnp.array([1.0, 6.0])})
        {'w': Array([2., 3.], dtype=float32)}

    References:
        LeCun et al., `Optimal Brain Damage
        <https://papers.nips.cc/paper/250-optimal-brain-damage>`_, 1989
    """
    return scaled(times(params, times(params, curvature)), 0.5)


def _hessian_times(
    loss_fn: LossFn, params: PyTree, batch: PyTree, direction: PyTree
) -> PyTree:
    """The Hessian of the loss on a batch, times a tree like the floating leaves."""
    floats = floating(params)
    direction = jax.tree.map(lambda p, z: z.astype(p.dtype), floats, direction)

    def grad(floats: PyTree) -> PyTree:
        return gradient(loss_fn)(joined(floats, params), batch)

    return jax.jvp(grad, (floats,), (direction,))[1]


def _random_signs(key: jax.Array, params: PyTree) -> PyTree:
    leaves, treedef = jax.tree.flatten(floating(params))
    keys = jax.random.split(key, len(leaves))
    return treedef.unflatten(
        jax.random.rademacher(key, leaf.shape, leaf.dtype)
        for key, leaf in zip(keys, leaves, strict=True)
    )
