"""Members on arrays: the positions that the units of a member are counted by."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxprune.core._groups import Groups, Member
from jaxprune.core._types import Array


def _axes(member: Member) -> tuple[int, ...]:
    own = (member.axis,)
    return own if member.layers is None else (member.layers, *own)


def count(member: Member, shape: tuple[int, ...]) -> int:
    """How many positions `Member.index` counts in a leaf of this shape."""
    return math.prod(shape[axis] for axis in _axes(member))


def in_front(leaf: Array, member: Member) -> Any:
    """The leaf with the positions that `Member.index` counts along axis 0.

    Example:
        >>> leaf = np.arange(8).reshape(2, 2, 2)
        >>> in_front(leaf, Member("w", 2, np.arange(4)[:, None], layers=0))
        array([[0, 2],
               [1, 3],
               [4, 6],
               [5, 7]])
    """
    xp: Any = np if isinstance(leaf, np.ndarray) else jnp
    axes = _axes(member)
    moved = xp.moveaxis(leaf, axes, range(len(axes)))
    return moved.reshape(-1, *moved.shape[len(axes) :]) if len(axes) > 1 else moved


def along(line: Array, member: Member, shape: tuple[int, ...]) -> Any:
    """What is known of these positions, as an array that broadcasts to the leaf.

    Example:
        >>> along(np.arange(4), Member("w", 2, np.arange(4)[:, None], layers=0),
        ...       (2, 3, 2)).shape
        (2, 1, 2)
    """
    axes = _axes(member)
    order = np.argsort(axes)
    line = line.reshape([shape[axis] for axis in axes]).transpose(order)
    return line.reshape([n if d in axes else 1 for d, n in enumerate(shape)])


def on_axis(member: Member, shape: tuple[int, ...]) -> np.ndarray:
    """`Member.index` as positions of the axis alone, in whatever layer."""
    return (
        member.index % shape[member.axis]
        if member.layers is not None
        else (member.index)
    )


def refuse_layers(groups: Groups, what: str) -> None:
    """Raises where layers have units of their own, for what knows one set for all.

    Raises:
        ValueError: naming the group.
    """
    for name, group in groups.items():
        if group.layers > 1:
            raise ValueError(
                f"group {name} has units of its own in each of {group.layers} layers, "
                f"which {what} does not know; trace without per_layer="
            )
