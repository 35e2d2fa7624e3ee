"""Positions of arrays, followed through equations that only move entries.

A parameter that a program transposes, reshapes or casts before it is used is followed
as the int array of its own positions: what the equation would do to the values it does
to their numbers. The views cost nothing.
"""

from typing import Any, cast

import numpy as np
from jax.extend.core import Literal

from jaxprune.program._types import Equation
from jaxprune.program.primitives import declaration

# Entries may change their type, not their place.
_SAME = frozenset(
    "convert_element_type copy copy_p name sharding_constraint reduce_precision "
    "pvary pcast".split()
)


def moved(eqn: Equation, at: np.ndarray) -> list[np.ndarray] | None:
    """The results of an equation on positions; None if it does more than move them.

    Args:
        eqn: an equation whose first operand holds the entries.
        at: their positions, of the shape of that operand.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> [eqn] = jax.make_jaxpr(lambda w: w.T)(jnp.ones((2, 3))).eqns
        >>> moved(eqn, np.arange(6).reshape(2, 3))[0]
        array([[0, 3],
               [1, 4],
               [2, 5]])
    """
    name, p = eqn.primitive.name, eqn.params
    if name in _SAME:
        return [at]
    if name == "dynamic_slice":
        return _dynamic_slice(eqn, at)
    known = declaration(eqn)
    if known is None or not known.moves or len(eqn.invars) != 1:
        return None
    if name == "split":
        ends = np.cumsum(p["sizes"])[:-1]
        return np.split(at, ends, axis=p["axis"])
    move = _MOVES.get(name)
    return None if move is None else [move(at, p)]


def _broadcast(at: np.ndarray, p: Any) -> np.ndarray:
    sizes = [1] * len(p["shape"])
    for axis, size in zip(p["broadcast_dimensions"], at.shape, strict=True):
        sizes[axis] = size
    return np.broadcast_to(at.reshape(sizes), p["shape"])


def _slice(at: np.ndarray, p: Any) -> np.ndarray:
    steps = p["strides"] or (1,) * at.ndim
    triples = zip(p["start_indices"], p["limit_indices"], steps, strict=True)
    return at[tuple([slice(*triple) for triple in triples])]


def _reshape(at: np.ndarray, p: Any) -> np.ndarray:
    order = p["dimensions"] or range(at.ndim)
    return at.transpose(tuple(order)).reshape(p["new_sizes"])


_MOVES = {
    "transpose": lambda at, p: at.transpose(p["permutation"]),
    "reshape": _reshape,
    "squeeze": lambda at, p: at.squeeze(tuple(p["dimensions"])),
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "rev": lambda at, p: np.flip(at, p["dimensions"]),
    "optimization_barrier": lambda at, p: at,
    "device_put": lambda at, p: at,
}


def _dynamic_slice(eqn: Equation, at: np.ndarray) -> list[np.ndarray] | None:
    """A slice whose start is written in the program."""
    starts = eqn.invars[1:]
    if not all(isinstance(var, Literal) for var in starts):
        return None
    sizes = eqn.params["slice_sizes"]
    found = []
    for start, size, whole in zip(starts, sizes, at.shape, strict=True):
        first = int(np.clip(int(cast(Literal, start).val), 0, whole - size))
        found.append(slice(first, first + size))
    return [at[tuple(found)]]
