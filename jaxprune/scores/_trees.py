"""Products and multiples of trees of scores; None where a leaf has no score."""

import jax
import jax.numpy as jnp

from jaxprune.core._leafwise import widened
from jaxprune.core._leaves import named_leaves
from jaxprune.core._types import Array, PyTree


def times(params: PyTree, other: PyTree) -> PyTree:
    """The product leaf by leaf, widened; None where `other` is None.

    Its real part where a leaf is complex: `jax.grad` gives the conjugate of the
    steepest ascent, so that the loss changes by ``Re(g dw)``.
    """

    def product(factor: Array | None, leaf: Array) -> jax.Array | None:
        if factor is None:
            return None
        leaf, factor = widened(leaf), widened(factor)
        if jnp.iscomplexobj(leaf):
            return (leaf * factor.astype(leaf.dtype)).real
        return leaf.astype(factor.dtype) * factor

    return jax.tree.map(product, other, params, is_leaf=lambda node: node is None)


def refuse_complex(params: PyTree, score: str) -> None:
    """Refuses complex leaves, whose second derivatives are no single number.

    Raises:
        TypeError: naming the path.
    """
    for path, leaf in named_leaves(params).items():
        dtype = getattr(leaf, "dtype", None)
        if dtype is not None and jnp.issubdtype(dtype, jnp.complexfloating):
            raise TypeError(
                f"{path} is {dtype}, but {score} is defined for real parameters; use "
                "taylor, or keep real and imaginary parts as leaves of their own"
            )


def scaled(tree: PyTree, factor: float) -> PyTree:
    """Every leaf, widened, times a number."""
    return jax.tree.map(lambda leaf: widened(leaf) * factor, tree)
