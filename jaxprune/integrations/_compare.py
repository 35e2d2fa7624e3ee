"""Is a smaller module what `narrow` makes of the larger? Tried on random numbers."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from jaxprune.core._types import PyTree
from jaxprune.program._jaxprs import is_array

TOLERANCE = 2e-5  # of the largest output, in float32; coarser types round coarser


def widened(tree: PyTree) -> PyTree:
    """Arrays of 16-bit floats in float32, where a difference shows as one.

    Rounding in bfloat16 is as large as a wrong scale can be.
    """

    def wide(leaf: PyTree) -> Any:
        narrow = is_array(leaf) and is_half(leaf.dtype)
        return leaf.astype(jnp.float32) if narrow else leaf

    return jax.tree.map(wide, tree)


def is_half(dtype: Any) -> bool:
    """Is it a floating-point type of fewer than 32 bits?"""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32


def tolerance(function: Callable[..., PyTree], *args: PyTree) -> float:
    """What rounding may make of a result, relative to its largest entry."""
    worst = TOLERANCE
    programs = [jax.make_jaxpr(function)(*args).jaxpr]
    while programs:
        for eqn in programs.pop().eqns:
            programs += jax.extend.core.jaxprs_in_params(eqn.params)
            dtypes = [
                var.aval.dtype for var in eqn.outvars if hasattr(var.aval, "dtype")
            ]
            halves = [dtype for dtype in dtypes if is_half(dtype)]
            worst = max([worst, *(8 * float(jnp.finfo(d).eps) for d in halves)])
    return worst


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


def difference(got: PyTree, expected: PyTree) -> float:
    """The largest difference relative to the largest entry of a leaf."""
    pairs = list(zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=False))
    same = jax.tree.structure(got) == jax.tree.structure(expected)
    if not same or any(a.shape != b.shape for a, b in pairs):
        return float("inf")
    worst = 0.0
    for a, b in pairs:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        if b.size:  # np.maximum keeps a nan
            scale = max(np.abs(b).max(), np.finfo(np.float32).tiny)
            worst = np.maximum(worst, np.abs(a - b).max() / scale)
    return float(worst)
