"""Scores from the gradient of a loss: how much would it change without a weight?

They share one protocol: ``score(loss_fn, params, batches)``. ``loss_fn(params, batch)``
is the mean loss over a batch; `batches` is any iterable of trees of arrays with the
examples along axis 0, read once and never held (wrap a single batch in a list). The
sums run in float32 in one compiled step, so parameters and batches may be sharded over
a mesh.
"""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from jaxprune.masks import PyTree
from jaxprune.scores.streaming import (
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
from jaxprune.scores.weights import widened

Form = Literal["abs", "square", "signed"]


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
    grads = _mean_gradient(loss_fn, params, batches, "taylor", progress)
    return jax.tree.map(shape[form], _times(params, grads))


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
    grads = _mean_gradient(loss_fn, params, batches, "snip", progress)
    sensitivity = jax.tree.map(jnp.abs, _times(params, grads))
    total = sum(leaf.sum() for leaf in jax.tree.leaves(sensitivity))
    scale = jnp.where(total == 0, 1, total)
    return jax.tree.map(lambda leaf: leaf / scale.astype(leaf.dtype), sensitivity)


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
    batches = twice(batches, "grasp")
    flow = _mean_gradient(loss_fn, params, batches, "grasp, pass 1", progress)

    def step(params: PyTree, batch: PyTree, k: Any, flow: PyTree) -> PyTree:
        product = _hessian_times(loss_fn, params, batch, flow)
        return _scaled(product, examples_in(batch))

    options: dict[str, Any] = {"title": "grasp, pass 2", "progress": progress}
    return _times(params, averaged(step, params, batches, flow, **options))


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

    def step(params: PyTree, batch: PyTree, k: Any) -> PyTree:
        each = jax.vmap(gradient(loss_fn), in_axes=(None, 0))(params, singles(batch))
        return jax.tree.map(lambda g: jnp.square(widened(g)).sum(0), each)

    return averaged(step, params, batches, title="fisher", progress=progress)


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
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")

    def step(params: PyTree, batch: PyTree, k: Any, key: jax.Array) -> PyTree:
        def sample(total: PyTree, key: jax.Array) -> tuple[PyTree, None]:
            signs = _random_signs(key, params)
            products = _hessian_times(loss_fn, params, batch, signs)
            part = _scaled(_times(signs, products), examples_in(batch) / samples)
            return jax.tree.map(jnp.add, total, part), None

        zero = jax.tree.map(lambda p: jnp.zeros_like(widened(p)), floating(params))
        keys = jax.random.split(jax.random.fold_in(key, k), samples)
        return jax.lax.scan(sample, zero, keys)[0]

    title = "hessian_diagonal"
    return averaged(step, params, batches, key, title=title, progress=progress)


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
    return _scaled(_times(params, _times(params, curvature)), 0.5)


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
    step = _scaled(_times(params, grads), -1)
    return step if previous is None else jax.tree.map(jnp.add, previous, step)


def _mean_gradient(
    loss_fn: LossFn,
    params: PyTree,
    batches: Batches,
    title: str,
    progress: bool | None,
) -> PyTree:
    def step(params: PyTree, batch: PyTree, k: Any) -> PyTree:
        return _scaled(gradient(loss_fn)(params, batch), examples_in(batch))

    return averaged(step, params, batches, title=title, progress=progress)


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


def _times(params: PyTree, other: PyTree) -> PyTree:
    """The product leaf by leaf, widened; None where `other` is None."""

    def product(factor: Any, leaf: Any) -> Any:
        if factor is None:
            return None
        leaf, factor = widened(leaf), widened(factor)
        return leaf.astype(factor.dtype) * factor

    return jax.tree.map(product, other, params, is_leaf=lambda node: node is None)


def _scaled(tree: PyTree, factor: float) -> PyTree:
    return jax.tree.map(lambda leaf: widened(leaf) * factor, tree)
