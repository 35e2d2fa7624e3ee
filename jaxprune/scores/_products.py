"""Scores of weights from what they are multiplied with."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.core._leafwise import widened
from jaxprune.core._leaves import keystr
from jaxprune.core._masks import PyTree
from jaxprune.program._jaxprs import trace_program
from jaxprune.scores._activations import ApplyFn
from jaxprune.statistics._streaming import (
    Batches,
    floating,
    joined,
    summed,
)
from jaxprune.statistics.taps._named import call
from jaxprune.statistics.taps._products import Product, products
from jaxprune.statistics.taps._program import Tap


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
    net. Only needs forward passes; meant to be compared within one output.

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

    def step(variables: PyTree, batch: PyTree, k: Any) -> PyTree:
        program = trace_program(apply_fn, variables, batch)
        found = products(program)
        if not found:
            raise ValueError(
                "no parameter is multiplied with activations as it is, so wanda has "
                "nothing to score"
            )
        scored = {owner for product in found for owner in product.owners}

        def squares(floats: PyTree) -> jax.Array:
            taps = [Tap(p.site, _squared(p), p.site) for p in found]
            _, notes = call(program, taps, joined(floats, variables), batch)
            return sum((note.sum() for note in notes.values()), jnp.zeros(()))

        slopes = jax.grad(squares)(floating(variables))
        return jax.tree_util.tree_map_with_path(
            lambda path, slope: slope if keystr(path) in scored else None, slopes
        )

    options: dict[str, Any] = {"title": "wanda", "progress": progress}
    total, _ = summed(step, variables, batches, **options)
    return jax.tree.map(
        lambda squares, leaf: (
            None
            if squares is None
            else jnp.abs(widened(leaf)) * jnp.sqrt(jnp.real(squares))
        ),
        total,
        variables,
        is_leaf=lambda node: node is None,
    )


def _squared(product: Product) -> Callable[..., tuple[Any, Any]]:
    """Notes ``sum of f(x^2, w)`` for a product f(x, w).

    It is linear in w, and its slope by a weight is the sum of the squares of all that
    the weight is multiplied with: the pull-back knows strides, windows and groups.
    """

    def act(value: Any, eqn: Any, operands: Any) -> tuple[Any, Any]:
        factors = [*operands]
        k = product.site.position
        sizes = jnp.abs(jax.lax.stop_gradient(value)).astype(jnp.float32)
        factors[k] = jnp.square(sizes)
        factors[1 - k] = jnp.real(factors[1 - k]).astype(jnp.float32)
        params = {**eqn.params, "preferred_element_type": np.dtype(np.float32)}
        return value, eqn.primitive.bind(*factors, **params).sum()

    return act
