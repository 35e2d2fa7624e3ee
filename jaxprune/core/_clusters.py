"""Clusters as data: group -> the number of every unit's cluster."""

from typing import cast

import jax.numpy as jnp
import numpy as np

from jaxprune.core._checks import concrete_array
from jaxprune.core._groups import Group, Groups, Member
from jaxprune.core._masks import expand_masks
from jaxprune.core._members import in_front
from jaxprune.core._types import Array, ArrayNamespace


def units_first(leaf: Array, member: Member) -> Array:
    """The slices of every unit as rows: ``[size, ...]``.

    Example:
        >>> import numpy as np
        >>> from jaxprune.core._groups import Member
        >>> rows = units_first(np.arange(6).reshape(3, 2), Member("w", 1, np.array(
        ...     [[0], [1]])))
        >>> rows
        array([[0, 2, 4],
               [1, 3, 5]])
    """
    xp = cast(ArrayNamespace, np if isinstance(leaf, np.ndarray) else jnp)
    size = len(member.index)
    line = in_front(leaf, member)
    flat = member.index.ravel()
    if not np.array_equal(flat, np.arange(line.shape[0])):
        line = xp.take(line, flat, axis=0)
    return line.reshape(size, -1)


def first_units(ids: np.ndarray) -> np.ndarray:
    """The first unit of its cluster, for every unit.

    Example:
        >>> first_units(np.array([7, 3, 7, 3, 5]))
        array([0, 1, 0, 1, 4])
    """
    _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    return first[inverse]


def check_mergeable(groups: Groups, name: str) -> Group:
    """The group, if its units can be merged.

    Raises:
        ValueError: naming the place in the program that speaks against it.
    """
    if name not in groups:
        expand_masks(groups, {name: np.ones(0, bool)})  # says what there is instead
    if obstacle := groups[name].obstacle:
        raise ValueError(f"units of {name} cannot be merged: {obstacle}")
    return groups[name]


def checked_clusters(groups: Groups, name: str, ids: Array) -> np.ndarray:
    """For every unit the first of its cluster, if the units may be merged so.

    Raises:
        ValueError: as `check_mergeable`, or if there are not as many as units.
        TypeError: if the clusters are not integers.
    """
    group = check_mergeable(groups, name)
    ids = concrete_array(f"clusters[{name}]", ids)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"clusters[{name}] must be integers, got {ids.dtype}")
    if ids.shape != (group.size,):
        raise ValueError(
            f"clusters[{name}] has shape {ids.shape}, but the group has {group.size} "
            "units; were the clusters made for other groups?"
        )
    return first_units(ids)
