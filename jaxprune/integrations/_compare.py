"""Is a smaller module what `narrow` makes of the larger? Tried on random numbers."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.core._types import PyTree
from jaxprune.program._jaxprs import is_array

TOLERANCE = 2e-5  # of the largest output, in float32; coarser types round coarser


def random_variable(leaf: PyTree, rng: np.random.Generator) -> Any:
    """Keeps activations near 1; vectors are positive: a variance must be."""
    if not is_array(leaf) or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    if leaf.ndim < 2:
        return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
    fan_in = max(1, math.prod(leaf.shape[:-1]))
    return jnp.asarray(rng.normal(size=leaf.shape) / np.sqrt(fan_in), leaf.dtype)


def random_input(leaf: PyTree, rng: np.random.Generator) -> Any:
    """Random floats; other numbers as they are, 0 for a shape."""
    if not is_array(leaf):
        return leaf
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)
    abstract = isinstance(leaf, jax.ShapeDtypeStruct)
    return jnp.zeros(leaf.shape, leaf.dtype) if abstract else leaf


def difference(got: PyTree, expected: PyTree) -> tuple[float, float]:
    """Largest difference relative to the largest entry of a leaf, and the allowed."""
    pairs = list(zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=False))
    same = jax.tree.structure(got) == jax.tree.structure(expected)
    if not same or any(a.shape != b.shape for a, b in pairs):
        return float("inf"), TOLERANCE
    worst, allowed = 0.0, TOLERANCE
    for a, b in pairs:
        if jnp.issubdtype(b.dtype, jnp.inexact):
            allowed = max(allowed, 8 * float(jnp.finfo(b.dtype).eps))
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        if b.size:  # np.maximum keeps a nan
            scale = max(np.abs(b).max(), np.finfo(np.float32).tiny)
            worst = np.maximum(worst, np.abs(a - b).max() / scale)
    return float(worst), allowed
