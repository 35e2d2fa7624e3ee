"""Products and multiples of trees of scores; None where a leaf has no score."""

from typing import Any

import jax

from jaxprune.core._leafwise import widened
from jaxprune.core._masks import PyTree


def times(params: PyTree, other: PyTree) -> PyTree:
    """The product leaf by leaf, widened; None where `other` is None."""

    def product(factor: Any, leaf: Any) -> Any:
        if factor is None:
            return None
        leaf, factor = widened(leaf), widened(factor)
        return leaf.astype(factor.dtype) * factor

    return jax.tree.map(product, other, params, is_leaf=lambda node: node is None)


def scaled(tree: PyTree, factor: float) -> PyTree:
    """Every leaf, widened, times a number."""
    return jax.tree.map(lambda leaf: widened(leaf) * factor, tree)
