"""What a model is to the judge: a function, its variables and example arguments."""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Model(NamedTuple):
    """A function as its package gives it, at toy size."""

    apply_fn: Callable[..., Any]
    variables: Any
    args: tuple[Any, ...]


def normal(*shape: int) -> jax.Array:
    """Example input: a batch of standard normal numbers."""
    return jnp.asarray(np.random.default_rng(7).standard_normal(shape, "float32"))


def tokens(*shape: int, vocabulary: int = 40) -> jax.Array:
    """Example input: a batch of tokens, no two sequences alike."""
    return jnp.asarray(np.random.default_rng(7).integers(1, vocabulary, shape), "int32")


def randomized(variables: Any) -> Any:
    """Variables as a model in training has them.

    Fresh variables hide errors: biases are 0, so a lost one changes nothing, and scales
    of layers are 1e-6. Here constant leaves below 0.01 become noise and the others are
    multiplied by random numbers around 1, so variances stay positive. Integers, keys
    and scalars stay as they are.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(variables)
    return treedef.unflatten(_random_leaf(path, leaf) for path, leaf in flat)


def _random_leaf(path: Any, leaf: Any) -> Any:
    if not jnp.issubdtype(leaf.dtype, jnp.inexact) or leaf.size < 2:
        return leaf
    rng = np.random.default_rng(zlib.crc32(jax.tree_util.keystr(path).encode()))
    old = np.asarray(leaf)
    if np.ptp(np.abs(old)) == 0 and np.abs(old).max() < 0.01:
        new = 0.1 * rng.standard_normal(old.shape)
    else:
        new = old * rng.uniform(0.7, 1.3, old.shape)
    return jnp.asarray(new.astype(leaf.dtype))
