"""Scores that compare the units of a group with each other."""

import jax
import jax.numpy as jnp

from jaxprune.coupling.groups import Groups, Member
from jaxprune.masks import PyTree
from jaxprune.scores.grouping import Members, scored_leaves, scored_members
from jaxprune.scores.weights import widened


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
        members: "all", or "first" for the producing kernel alone, as published.

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
    return {
        name: _summed_distances(
            [
                _unit_vectors(member, leaves[member.path])
                for member in scored_members(group, leaves, members)
            ]
        )
        for name, group in groups.items()
    }


def _unit_vectors(member: Member, leaf: jax.Array) -> jax.Array:
    """What every unit holds of a leaf, ``[size, entries]``."""
    first = jnp.moveaxis(widened(leaf), member.axis, 0)
    return first[member.index].reshape(len(member.index), -1)


def _summed_distances(vectors: list[jax.Array]) -> jax.Array:
    squares = sum(_squared_distances(each) for each in vectors)
    # A unit is at distance 0 from itself, whatever rounding says.
    off = ~jnp.eye(len(vectors[0]), dtype=bool)
    return jnp.sqrt(jnp.where(off, squares, 0).clip(min=0)).sum(1)


def _squared_distances(vectors: jax.Array) -> jax.Array:
    """``|a|^2 + |b|^2 - 2ab``, centred first: what all units share must not cancel."""
    centred = vectors - vectors.mean(0, keepdims=True)
    exact = jax.lax.Precision.HIGHEST
    products = jnp.real(jnp.matmul(centred, centred.conj().T, precision=exact))
    norms = jnp.diagonal(products)
    return norms[:, None] + norms[None, :] - 2 * products
