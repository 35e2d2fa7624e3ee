"""Where arrays lie: what numpy can read in place needs no compiler.

Most of pruning runs once, on arrays of many shapes. On the host, compiling an operation
for every shape takes far longer than the operations; numpy starts at once.
"""

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxprune.core._types import Array, PyTree

T = TypeVar("T")
R = TypeVar("R")

_ALIGNMENT = 64  # bytes; from such an address JAX reads an array without copying it


def on_host(*leaves: object) -> bool:
    """Can numpy compute with all of these where they are, and JAX go on with it?

    True for numpy arrays and for concrete jax arrays on one processor of this host,
    the same for all. Weakly typed arrays are left to JAX: numpy has none.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> on_host(np.ones(2)), bool(jax.jit(lambda x: on_host(x))(jnp.ones(2)))
        (True, False)
    """
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
    return (
        all(map(readable, leaves))
        and not any(array.weak_type for array in arrays)
        and len({d for array in arrays for d in array.sharding.device_set}) <= 1
    )


def readable(leaf: object) -> bool:
    """Is it an array of plain numbers that numpy can read where it is?"""
    if isinstance(leaf, np.ndarray | np.generic):
        return True
    if not isinstance(leaf, jax.Array) or isinstance(leaf, Tracer):
        return False
    if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        return False
    first, *others = leaf.sharding.device_set
    is_here = first.process_index == jax.process_index()
    return not others and first.platform == "cpu" and is_here


_LARGE = 1 << 18  # entries; fewer are computed sooner than handed to a thread


def on_all_cores(
    fn: Callable[[T], R], items: Sequence[T], sizes: Sequence[int]
) -> list[R]:
    """``fn(item)`` for every item; numpy computes the large ones side by side.

    Example:
        >>> on_all_cores(np.sum, [np.ones(3), np.ones(2)], [3, 2])
        [np.float64(3.0), np.float64(2.0)]
    """
    large = [k for k, size in enumerate(sizes) if size >= _LARGE]
    if len(large) < 2:
        return list(map(fn, items))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = {k: pool.submit(fn, items[k]) for k in large}
        return [
            found[k].result() if k in found else fn(item)
            for k, item in enumerate(items)
        ]


def empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An array without numbers yet, in memory that JAX takes over without copying."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def placed_like(array: Array, leaf: Array) -> jax.Array:
    """A jax array of these numbers, where `leaf` lies; nobody else may hold `array`."""
    return all_placed_like([array], [leaf])[0]


def all_placed_like(
    arrays: Sequence[Array], leaves: Sequence[PyTree]
) -> list[jax.Array]:
    """`placed_like` for many, in one call for each place: calls are what takes time."""
    places: dict[jax.sharding.Sharding | None, list[int]] = {}
    for k, leaf in enumerate(leaves):
        committed = isinstance(leaf, jax.Array) and leaf.committed
        places.setdefault(leaf.sharding if committed else None, []).append(k)
    placed: dict[int, jax.Array] = {}
    for place, there in places.items():
        found = jax.device_put([arrays[k] for k in there], place)
        placed.update(zip(there, found, strict=True))
    return [placed[k] for k in range(len(arrays))]
