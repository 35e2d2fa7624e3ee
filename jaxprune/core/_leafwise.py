"""Scores leaf by leaf: in numpy on the host, else all leaves in one program."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxprune.core._checks import check_leaves
from jaxprune.core._placement import all_placed_like, on_host
from jaxprune.core._types import Array, ArrayNamespace, PyTree

AnyArray = TypeVar("AnyArray", jax.Array, np.ndarray, Array)


def each_leaf(
    score: Callable[..., Any],
    params: PyTree,
    has_score: Callable[[Any], bool],
    *options: Any,
) -> PyTree:
    """``score(numpy or jax.numpy, leaf, *options)`` of every leaf that has a score.

    What lies on the host is counted by numpy, the rest in one program for all leaves
    that share their devices.
    """
    check_leaves(params)
    leaves, treedef = jax.tree.flatten(params)
    found: list[Array | None] = [None] * len(leaves)
    here: dict[int, np.ndarray] = {}
    remote: dict[Any, list[int]] = {}
    for k, leaf in enumerate(leaves):
        if not has_score(leaf):
            continue
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(
                f"params hold shapes without values ({leaf}), which have no score; "
                "give arrays"
            )
        if on_host(leaf):
            with np.errstate(all="ignore"):  # as in JAX, inf and NaN are no events
                here[k] = score(np, np.asarray(leaf), *options)
        elif isinstance(leaf, Tracer):
            found[k] = score(jnp, leaf, *options)
        else:
            remote.setdefault(frozenset(leaf.sharding.device_set), []).append(k)
    placed = all_placed_like(list(here.values()), [leaves[k] for k in here])
    for k, value in zip(here, placed, strict=True):
        found[k] = value
    for places in remote.values():
        values = _compiled(score, [leaves[k] for k in places], options)
        for k, value in zip(places, values, strict=True):
            found[k] = value
    return treedef.unflatten(found)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _compiled(
    score: Callable[..., Any], leaves: Sequence[Array], options: tuple[object, ...]
) -> list[Array]:
    return [score(jnp, leaf, *options) for leaf in leaves]


def is_float(leaf: object) -> bool:
    """Can this leaf have a score? Integers, bools, keys and functions have none."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


def widened(leaf: ArrayLike) -> jax.Array:
    """The leaf in at least single precision."""
    return wide(jnp.asarray(leaf))


def numbers(leaf: ArrayLike) -> np.ndarray:
    """A leaf of the host in at least single precision."""
    return wide(np.asarray(leaf))


def wide(leaf: AnyArray) -> AnyArray:
    """The leaf in at least single precision, of numpy or jax.numpy as it is."""
    dtype = wide_dtype(leaf.dtype)
    return leaf if leaf.dtype == dtype else leaf.astype(dtype)


@functools.cache
def wide_dtype(dtype: np.dtype) -> np.dtype:
    """A type of floats in at least single precision."""
    return dtype if jnp.finfo(dtype).bits >= 32 else np.dtype(np.float32)


@functools.cache
def real_dtype(dtype: np.dtype) -> np.dtype:
    """`wide_dtype`, of the absolute values where numbers are complex."""
    return np.dtype(jnp.finfo(wide_dtype(dtype)).dtype)


def power_of_two(xp: ArrayNamespace, largest: Array) -> Array:
    """The power of two below some non-negative numbers, to divide by before squaring.

    Squares of numbers around 1e-25 or 1e20 leave single precision, their quotients by
    the largest of them do not, and a power of two rounds nothing. 1 for 0, infinity
    and NaN. A constant to differentiation.
    """
    if xp is jnp:
        largest = jax.lax.stop_gradient(largest)
    limits = jnp.finfo(largest.dtype)
    _, exponent = xp.frexp(largest)
    exponent = xp.clip(exponent - 1, limits.minexp, limits.maxexp - 1)
    usable = (largest > 0) & xp.isfinite(largest)
    exponent = xp.where(usable, exponent, xp.zeros_like(exponent))
    return xp.ldexp(xp.ones_like(largest), exponent)
