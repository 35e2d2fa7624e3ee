"""Scores of weights from what they are multiplied with."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.core._leafwise import widened
from jaxprune.core._leaves import named_leaves
from jaxprune.core._types import Array, PyTree
from jaxprune.program._jaxprs import trace_program
from jaxprune.scores._activations import ApplyFn
from jaxprune.scores._published import of_weights
from jaxprune.statistics._contractions import contractions
from jaxprune.statistics._moments import inputs, peeked
from jaxprune.statistics._streaming import Batches, summed


@of_weights("l2", "outputs")
def wanda(
    apply_fn: ApplyFn,
    variables: PyTree,
    batches: Batches,
    *,
    progress: bool | None = None,
) -> PyTree:
    """The size of a weight times the norm of what it is multiplied with.

    ``|w| ||x||_2``, the norm over all examples and places that the weight meets: the
    tokens of a dense layer, the patches of a convolution, the steps of a recurrent
    net. These norms are the diagonal of the second moments of
    `jaxprune.statistics.moments`. Only needs forward passes; meant to be compared
    within one output.

    Args:
        apply_fn: ``(variables, batch) -> anything``.
        variables: tree of arrays.
        batches: iterable of batches, examples along axis 0.
        progress: show a progress bar? None for on a terminal.

    Returns:
        Tree like `variables` of float32 or wider for parameters that a product
        multiplies with activations, as they are or moved (transposed, reshaped, cast);
        None for all others.

    Raises:
        ValueError: if there are no batches, or no parameter is in such a product.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> def linear(params, x):
        ...     return x @ params["w"] + params["b"]
        >>> params = {"w": jnp.array([[1.0, -2.0], [3.0, 1.0]]), "b": jnp.ones((1, 2))}
        >>> batches = [jnp.array([[3.0, 0.0]]), jnp.array([[4.0, 1.0]])]
        >>> wanda(linear, params, batches)
        {'b': None, 'w': Array([[ 5., 10.],
               [ 3.,  1.]], dtype=float32)}

    References:
        Sun et al., `A Simple and Effective Pruning Approach for Large Language Models
        <https://arxiv.org/abs/2306.11695>`_, 2023
    """
    first, batches = peeked(batches)
    found = contractions(trace_program(apply_fn, variables, first))
    if not found:
        raise ValueError(
            "no parameter is multiplied with activations as it is, so wanda has "
            "nothing to score"
        )
    names = tuple(found)

    def step(variables: PyTree, batch: PyTree, k: jax.Array) -> list[jax.Array]:
        rows = inputs(apply_fn, names, variables, batch)
        return [jnp.square(jnp.abs(x)).sum(1) for x in rows]

    options: dict[str, Any] = {"title": "wanda", "progress": progress}
    squares, _ = summed(step, variables, batches, **options)
    by_path: dict[str, list[tuple[np.ndarray, jax.Array]]] = {}
    for one, each in zip(found.values(), squares, strict=True):
        by_path.setdefault(one.path, []).append((one.at, each))
    scored = [
        _scored(leaf, by_path[path]) if path in by_path else None
        for path, leaf in named_leaves(variables).items()
    ]
    return jax.tree.structure(variables).unflatten(scored)


def _scored(leaf: Array, met: Sequence[tuple[np.ndarray, jax.Array]]) -> jax.Array:
    """The scores of a leaf from the squares that its entries meet."""
    total = jnp.zeros(np.size(leaf), met[0][1].dtype)
    for at, squares in met:
        total = total.at[at].add(jnp.broadcast_to(squares[:, :, None], at.shape))
    return jnp.abs(widened(leaf)) * jnp.sqrt(total.reshape(np.shape(leaf)))
