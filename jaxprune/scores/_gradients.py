"""Scores from the gradient of a loss: how much would it change without a weight?

They share one protocol: ``score(loss_fn, params, batches)``. ``loss_fn(params, batch)``
is the mean loss over a batch; `batches` is any iterable of trees of arrays with the
examples along axis 0, read once and never held (wrap a single batch in a list). The
sums run in float32 in one compiled step, so parameters and batches may be sharded over
a mesh.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from jaxprune.core._types import PyTree
from jaxprune.scores._published import of_weights
from jaxprune.scores._trees import scaled, times
from jaxprune.statistics._streaming import (
    Batches,
    LossFn,
    averaged,
    examples_in,
    gradient,
)

Form = Literal["abs", "square", "signed"]


@of_weights("sum", "loss")
def taylor(
    loss_fn: LossFn,
    params: PyTree,
    batches: Batches,
    *,
    form: Form = "abs",
    progress: bool | None = None,
) -> PyTree:
    """The change of the loss without a weight, to first order: ``w g``.

    g is the gradient of the mean loss over all batches. With ``form="signed"``, the
    changes of the weights of a unit add up before their size counts:
    ``group_scores(reduce="abs_of_sum")`` is the first-order change of the loss without
    the unit, ``reduce="square_of_sum"`` its square.

    Args:
        loss_fn: ``(params, batch) -> scalar``, the mean loss over the batch.
        params: tree of arrays.
        batches: iterable of batches, examples along axis 0.
        form: "abs" for ``|w g|``, "square" for ``(w g)^2``, "signed" for ``w g``.
        progress: show a progress bar? None for on a terminal.

    Returns:
        Tree like `params` of float32 or wider, None for leaves that are not floating
        point. Larger matters more, once it has no sign.

    Raises:
        ValueError: if there are no batches or `form` is unknown.

    Example:
        >>> import jax.numpy as jnp
        >>> def loss_fn(params, batch):
        ...     return jnp.mean(batch @ params["w"])
        >>> params = {"w": jnp.array([2.0, -1.0])}
        >>> taylor(loss_fn, params, [jnp.array([[1.0, 3.0]]), jnp.array([[3.0, 5.0]])])
        {'w': Array([4., 4.], dtype=float32)}

    References:
        Molchanov et al., `Importance Estimation for Neural Network Pruning
        <https://arxiv.org/abs/1906.10771>`_, 2019 ("square", ``square_of_sum``);
        Molchanov et al., `Pruning Convolutional Neural Networks for Resource Efficient
        Inference <https://arxiv.org/abs/1611.06440>`_, 2016 (``abs_of_sum``)
    """
    if form not in get_args(Form):
        raise ValueError(f"form must be one of {get_args(Form)}, got {form!r}")
    shape = {"abs": jnp.abs, "square": jnp.square, "signed": lambda change: change}
    grads = mean_gradient(loss_fn, params, batches, "taylor", progress)
    return jax.tree.map(shape[form], times(params, grads))


@of_weights("sum", "loss")
def snip(
    loss_fn: LossFn,
    params: PyTree,
    batches: Batches,
    *,
    progress: bool | None = None,
) -> PyTree:
    """Connection sensitivity: ``|w g|`` over the sum of all ``|w g|``.

    `taylor`, as a share of the whole; meant for networks before training.

    Args:
        loss_fn: ``(params, batch) -> scalar``, the mean loss over the batch.
        params: tree of arrays.
        batches: iterable of batches, examples along axis 0; one is what is published.
        progress: show a progress bar? None for on a terminal.

    Returns:
        Tree like `params` of float32 or wider that sums to 1 (to 0 if all gradients
        are 0), None for leaves that are not floating point.

    Raises:
        ValueError: if there are no batches.

    Example:
        >>> import jax.numpy as jnp
        >>> def loss_fn(params, batch):
        ...     return jnp.mean(batch @ params["w"])
        >>> params = {"w": jnp.array([3.0, -1.0])}
        >>> snip(loss_fn, params, [jnp.array([[1.0, 1.0]])])
        {'w': Array([0.75, 0.25], dtype=float32)}

    References:
        Lee et al., `SNIP: Single-shot Network Pruning based on Connection Sensitivity
        <https://arxiv.org/abs/1810.02340>`_, 2018
    """
    grads = mean_gradient(loss_fn, params, batches, "snip", progress)
    sensitivity = jax.tree.map(jnp.abs, times(params, grads))
    total = sum(leaf.sum() for leaf in jax.tree.leaves(sensitivity))
    scale = jnp.where(total == 0, 1, total)
    return jax.tree.map(lambda leaf: leaf / scale.astype(leaf.dtype), sensitivity)


@of_weights("signed_sum")
def movement(params: PyTree, grads: PyTree, previous: PyTree | None = None) -> PyTree:
    """Adds one training step to the movement of every weight: ``S - w g``.

    A weight that gradient descent moves away from 0 gains, one that it moves towards
    0 loses, whatever its size. Call it at every step with what the step sees.

    Args:
        params: tree of arrays, before the step.
        grads: tree like `params`, the gradients of the step; None where a leaf has
            no score.
        previous: what the last call returned; None at the first step.

    Returns:
        Tree like `grads` of float32 or wider. Larger matters more; may be negative.

    Example:
        >>> import jax.numpy as jnp
        >>> grads = {"w": jnp.array([-0.5, -0.5])}
        >>> first = movement({"w": jnp.array([2.0, -1.0])}, grads)
        >>> movement({"w": jnp.array([2.5, -0.5])}, grads, first)
        {'w': Array([ 2.25, -0.75], dtype=float32)}

    References:
        Sanh et al., `Movement Pruning: Adaptive Sparsity by Fine-Tuning
        <https://arxiv.org/abs/2005.07683>`_, 2020
    """
    step = scaled(times(params, grads), -1)
    return step if previous is None else jax.tree.map(jnp.add, previous, step)


def mean_gradient(
    loss_fn: LossFn,
    params: PyTree,
    batches: Batches,
    title: str,
    progress: bool | None,
) -> PyTree:
    """The gradient of the mean loss over all batches."""

    def step(params: PyTree, batch: PyTree, k: jax.Array) -> PyTree:
        return scaled(gradient(loss_fn)(params, batch), examples_in(batch))

    return averaged(step, params, batches, title=title, progress=progress)
