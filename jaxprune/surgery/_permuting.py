"""Permuting: the units of a group in another order, without changing the function."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.core._checks import concrete_array
from jaxprune.core._groups import Group, Groups
from jaxprune.core._names import nearest
from jaxprune.core._types import Array, PyTree


def permute(variables: PyTree, groups: Groups, order: Mapping[str, Array]) -> PyTree:
    """Puts the units of some groups into another order; the function stays the same.

    Every leaf that a group stands on is reordered along with it: kernels that make the
    units and kernels that read them, biases, norms and their statistics. So ``apply_fn(
    permute(variables, groups, order), ...)`` equals ``apply_fn(variables, ...)`` up to
    the order of sums.

    Args:
        variables: tree that `groups` was traced with; arrays or ShapeDtypeStructs.
        groups: what `trace` returned.
        order: group name -> int ``[size]``: which of the old units stands at each
            place. Groups that are not named stay as they are.

    Returns:
        Tree like `variables`. Leaves that no named group stands on are returned as
        they are; numpy leaves stay numpy.

    Raises:
        ValueError: if a name is no group, an order is no permutation of its units, the
            units may not be permuted, or units change blocks of a balanced group.
        TypeError: if an order is traced or not whole numbers.

    Example:
        >>> import jax.numpy as jnp, jaxprune
        >>> def mlp(params, x):
        ...     return jax.nn.relu(x @ params["w1"]) @ params["w2"]
        >>> params = {"w1": jnp.array([[1.0, 2.0]]), "w2": jnp.array([[3.0], [4.0]])}
        >>> groups = jaxprune.trace(mlp, params, jnp.ones((1, 1)))
        >>> turned = jaxprune.permute(params, groups, {"w1:1": [1, 0]})
        >>> turned["w1"], mlp(turned, jnp.ones((1, 1)))
        (Array([[2., 1.]], dtype=float32), Array([[11.]], dtype=float32))

    References:
        Kuratsu and Nakamura, `Slimmable Pruned Neural Networks
        <https://arxiv.org/abs/2212.03415>`_, 2022 (slimmable channel sorting)
    """
    arrays = groups.treedef.flatten_up_to(variables)
    leaves = dict(zip(groups.shapes, arrays, strict=True))
    for (path, axis), source in sources(groups, order).items():
        leaves[path] = _reordered(leaves[path], source, axis)
    return groups.treedef.unflatten(leaves.values())


def sources(
    groups: Groups, order: Mapping[str, object]
) -> dict[tuple[str, int], np.ndarray]:
    """``(path, axis)`` -> the old position at every place, where any are reordered.

    Raises:
        ValueError: as `permute`.
        TypeError: as `permute`.
    """
    found: dict[tuple[str, int], np.ndarray] = {}
    for name, given in order.items():
        group = _group_of(groups, name)
        units = checked_order(group, given)
        if (units == np.arange(group.size)).all():
            continue
        refuse_fixed(group)
        for member in group.members:
            place = member.path, member.axis
            size = groups.shapes[member.path][member.axis]
            before = found.get(place, np.arange(size))
            here = np.arange(size)
            here[member.index.ravel()] = member.index[units].ravel()
            found[place] = before[here]
    return found


def checked_order(group: Group, given: Any) -> np.ndarray:
    """The order as whole numbers, one for every unit.

    Raises:
        ValueError: if it is no permutation, or moves units between blocks.
        TypeError: if it is traced or not whole numbers.
    """
    units = concrete_array(f"order[{group.name}]", given)
    if not np.issubdtype(units.dtype, np.integer):
        raise TypeError(
            f"order[{group.name}] must be whole numbers, the old unit at every place; "
            f"got {units.dtype}"
        )
    if not np.array_equal(np.sort(units), np.arange(group.size)):
        raise ValueError(
            f"order[{group.name}] of shape {units.shape} is not a permutation of the "
            f"{group.size} units of the group"
        )
    blocks = units.reshape(group.blocks, -1) // (group.size // group.blocks)
    if (blocks != np.arange(group.blocks)[:, None]).any():
        raise ValueError(
            f"order[{group.name}] moves units between the {group.blocks} blocks of the "
            "group; units of a balanced group are reordered within their block"
        )
    return units


def can_permute(group: Group) -> bool:
    """Not where units share positions (a Gram matrix) or have a place of their own.

    Nor can a writer be reordered without the stream that it is added to.
    """
    apart = all(len(np.unique(m.index)) == m.index.size for m in group.members)
    return apart and not group.ordered and not group.stream and group.layers == 1


def refuse_fixed(group: Group) -> None:
    """Raises if the units of a group may be cut, but not reordered.

    Raises:
        ValueError: naming the group and why.
    """
    if can_permute(group):
        return
    why = (
        "units may be pruned but not permuted, because an entry of a table belongs to "
        "each or the program takes them apart"
    )
    if group.stream:
        why = f"they are added to a stream, {group.stream}, and follow its order"
    elif group.layers > 1:
        why = "every layer has units of its own, which permute does not know"
    elif not group.ordered:
        why = "two of its units share a position, so they cannot be told apart"
    raise ValueError(f"the units of {group.name} cannot be reordered: {why}")


def _group_of(groups: Groups, name: str) -> Group:
    if name not in groups:
        raise ValueError(
            f"order names the group {name!r}, which does not exist"
            f"{nearest(name, groups)}"
        )
    return groups[name]


def _reordered(leaf: Array, source: np.ndarray, axis: int) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    if isinstance(leaf, np.ndarray):
        return leaf.take(source, axis)
    return jnp.take(leaf, source, axis=axis, mode="clip", unique_indices=True)
