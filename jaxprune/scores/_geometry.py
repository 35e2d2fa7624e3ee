"""Scores that compare the units of a group with each other."""

from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.core._groups import Groups, Member
from jaxprune.core._leafwise import numbers, power_of_two, widened
from jaxprune.core._members import in_front
from jaxprune.core._placement import on_host, placed_like
from jaxprune.core._types import Array, ArrayNamespace, PyTree
from jaxprune.scores._grouping import Members, scored_leaves, scored_members


def geometric_median(
    groups: Groups, params: PyTree, *, members: Members = "all"
) -> dict[str, jax.Array]:
    """How far every unit is from the others of its group, in weight space.

    A unit is the vector of everything it occupies; it scores the sum of its Euclidean
    distances to all units of the group. The unit nearest to the geometric median
    scores least: the others can stand in for it. Distances are of the weights with
    their signs, so that w and -w are far apart.

    Args:
        groups: what `trace` returned.
        params: tree of arrays like the traced variables, or like their ``params``
            collection.
        members: "all", or "first" for the producing kernel alone, as published; or
            "producers", see `group_scores`.

    Returns:
        Group name -> float32 or wider ``[size]``, larger matters more; 0 for the only
        unit of a group.

    Raises:
        ValueError: if the parameters are for other variables.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprune
        >>> def mlp(params, x):
        ...     return jax.nn.relu(x @ params["w1"]) @ params["w2"]
        >>> params = {"w1": jnp.array([[3.0, -3.0, 0.0]]), "w2": jnp.zeros((3, 1))}
        >>> groups = jaxprune.trace(mlp, params, jnp.ones((1, 1)))
        >>> geometric_median(groups, params)
        {'w1:1': Array([9., 9., 6.], dtype=float32)}

    References:
        He et al., `Filter Pruning via Geometric Median for Deep Convolutional Neural
        Networks Acceleration <https://arxiv.org/abs/1811.00250>`_, 2018
    """
    leaves = scored_leaves(groups, params)
    found = {}
    for name, group in groups.items():
        scored = scored_members(group, leaves, members)
        own = [leaves[member.path] for member in scored]
        if on_host(*own):
            with np.errstate(all="ignore"):  # as in JAX, inf and NaN are no events
                distances = _summed_distances(
                    np, scored, [numbers(leaf) for leaf in own]
                )
            found[name] = placed_like(distances, own[0])
        else:
            found[name] = _summed_distances(
                jnp, scored, [widened(leaf) for leaf in own]
            )
    return found


def _summed_distances(
    xp: ArrayNamespace, members: list[Member], leaves: list[Array]
) -> Array:
    vectors = [_unit_vectors(xp, *pair) for pair in zip(members, leaves, strict=True)]
    # By a power of two, so that no square leaves the range of the numbers.
    largest = xp.stack([xp.max(xp.abs(each), initial=0) for each in vectors]).max()
    scale = power_of_two(xp, largest)
    found = (_squared_distances(xp, each / scale) for each in vectors)
    squares = cast(Array, sum(found))
    # A unit is at distance 0 from itself, whatever rounding says.
    off = ~xp.eye(len(vectors[0]), dtype=bool)
    squares = xp.where(off, squares, xp.zeros_like(squares)).clip(min=0)
    return scale * xp.sqrt(squares).sum(1)


def _unit_vectors(xp: ArrayNamespace, member: Member, leaf: Array) -> Array:
    """What every unit holds of a leaf, ``[size, entries]``."""
    return in_front(leaf, member)[member.index].reshape(len(member.index), -1)


def _squared_distances(xp: ArrayNamespace, vectors: Array) -> Array:
    """``|a|^2 + |b|^2 - 2ab``, centred first: what all units share must not cancel."""
    centred = vectors - vectors.mean(0, keepdims=True)
    exact = {"precision": jax.lax.Precision.HIGHEST} if xp is jnp else {}
    products = xp.real(xp.matmul(centred, centred.conj().T, **exact))
    norms = xp.diagonal(products)
    return norms[:, None] + norms[None, :] - 2 * products
