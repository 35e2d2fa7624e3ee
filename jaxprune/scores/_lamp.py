"""LAMP scores of one leaf, also of a leaf spread over devices."""

import functools
import math
from collections.abc import Callable
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding

from jaxprune.core._leafwise import power_of_two, wide
from jaxprune.core._types import Array, ArrayNamespace


def lamp_of_leaf(xp: ArrayNamespace, leaf: Array) -> Array:
    """The LAMP scores of a leaf that lies in one place, see `lamp`."""
    return share_of_larger(_squares(xp, leaf, lambda x: x).ravel(), xp).reshape(
        leaf.shape
    )


def _squares(
    xp: ArrayNamespace, leaf: Array, over_all: Callable[[Any], Array]
) -> Array:
    """The squares, divided by one power of two so that none leaves its range."""
    sizes = xp.abs(wide(leaf))
    return xp.square(sizes / power_of_two(xp, over_all(xp.max(sizes, initial=0))))


def share_of_larger(values: Any, xp: ArrayNamespace = jnp) -> Any:
    """Every value over the sum of those that are not smaller: ``[n]`` to ``[n]``."""
    ordered, tails = _tails(values, xp)
    total = tails[xp.searchsorted(ordered, values)]
    return values / xp.where(total == 0, xp.ones_like(total), total)


def _tails(values: Array, xp: ArrayNamespace) -> tuple[Array, Array]:
    """The values in ascending order, and the sum from each to the largest."""
    ordered = xp.sort(values)
    return ordered, xp.cumsum(ordered[::-1])[::-1]


def spread(leaf: object) -> bool:
    """Do several devices hold parts of this leaf?"""
    if isinstance(leaf, Tracer) or not isinstance(leaf, jax.Array):
        return False
    place = leaf.sharding
    return isinstance(place, NamedSharding) and not place.is_fully_replicated


def sharded_lamp(leaf: jax.Array) -> jax.Array:
    """The LAMP scores of a spread leaf, where it lies; only shards are exchanged."""
    return ranked_in_turns(cast(NamedSharding, leaf.sharding))(leaf)


def ranked_in_turns(place: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    """The compiled function of a leaf that is sharded so."""
    used: list[str] = []
    for entry in place.spec:
        used += [] if entry is None else [entry] if isinstance(entry, str) else entry
    names = [name for name in place.mesh.axis_names if name in used]  # as JAX wants
    turns = math.prod(place.mesh.shape[name] for name in names)
    ranked = functools.partial(_in_turns, tuple(names), turns)
    mapped = jax.shard_map(
        ranked, mesh=place.mesh, in_specs=place.spec, out_specs=place.spec
    )
    return jax.jit(mapped)


_Turn: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]


def _in_turns(names: tuple[str, ...], turns: int, shard: jax.Array) -> jax.Array:
    """The scores of a shard: all shards, sorted, pass by and add their tails."""
    squares = _squares(jnp, shard, lambda x: lax.pmax(x, names)).ravel()
    ring = [(k, (k + 1) % turns) for k in range(turns)]

    def turn(_: jax.Array, carry: _Turn) -> _Turn:
        ordered, tails, total = carry
        padded = jnp.append(tails, jnp.zeros((), tails.dtype))
        total = total + padded[jnp.searchsorted(ordered, squares)]
        ordered, tails = (lax.ppermute(x, names, ring) for x in (ordered, tails))
        return ordered, tails, total

    start = (*_tails(squares, jnp), jnp.zeros_like(squares))
    *_, total = lax.fori_loop(0, turns, turn, start)
    scores = squares / jnp.where(total == 0, jnp.ones_like(total), total)
    return cast(jax.Array, scores).reshape(shard.shape)
