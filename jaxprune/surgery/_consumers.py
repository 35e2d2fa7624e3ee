"""Rewrites what reads a group: by a matrix over its units, and a shift of the bias.

If units x are to be given as ``x = A x' + s``, whoever read them through W reads x'
through ``Aᵀ W``, and its bias grows by ``Wᵀ s``. Merging is a matrix of 0 and 1,
removing what others explain one with their coefficients, a rotation is orthogonal.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.core._groups import Groups, Member
from jaxprune.core._leafwise import wide_dtype
from jaxprune.core._leaves import named_leaves
from jaxprune.core._placement import all_placed_like
from jaxprune.core._types import Array, PyTree
from jaxprune.statistics._contractions import Contraction


def rewrite_consumers(
    variables: PyTree,
    groups: Groups,
    name: str,
    matrix: object,
    shift: object = None,
    contractions: Iterable[Contraction] = (),
) -> PyTree:
    """Reads the units x of a group as ``matrix @ x' + shift`` of others.

    Args:
        variables: tree that `groups` was traced with.
        groups: what ``trace(..., roles=True)`` returned.
        name: of the group.
        matrix: ``[size, size]``; column v holds what unit v stands for.
        shift: ``[size]`` or None.
        contractions: of the program; needed for a shift, to find biases.

    Returns:
        The variables, consumers rewritten; producers are left to the caller.

    Raises:
        TypeError: if a consumer is not floating.
        ValueError: if there is a shift and a consumer is no contraction, or has no bias
            of its own.

    Example:
        >>> import jaxprune
        >>> def mlp(params, x):
        ...     return jax.nn.relu(x @ params["w1"]) @ params["w2"]
        >>> params = {"w1": jnp.ones((1, 2)), "w2": jnp.array([[2.0], [5.0]])}
        >>> groups = jaxprune.trace(mlp, params, jnp.ones((1, 1)), roles=True)
        >>> both = np.array([[1.0, 0.0], [1.0, 0.0]])  # unit 0 stands for both
        >>> rewrite_consumers(params, groups, "w1:1", both)["w2"]
        Array([[7.],
               [0.]], dtype=float32)
    """
    leaves = named_leaves(variables)
    changed = dict(leaves)
    if shift is not None and np.any(np.asarray(shift)):
        changed |= _shifted(leaves, groups, name, np.asarray(shift), contractions)
    for member in groups[name].members:
        if member.role == "consumer":
            changed[member.path] = _mixed(changed[member.path], member, matrix)
    return jax.tree.structure(variables).unflatten(changed.values())


def scale_units(
    variables: PyTree, groups: Groups, factors: Mapping[str, object]
) -> PyTree:
    """Multiplies what reads a unit with a factor.

    Args:
        variables: tree that `groups` was traced with.
        groups: what ``trace(..., roles=True)`` returned.
        factors: group name -> float ``[size]``; groups that are not named are left
            alone.

    Returns:
        The variables, consumers scaled.

    Raises:
        ValueError: if no parameter reads a group, or factors have another length.
        TypeError: if a consumer is not floating.

    Example:
        >>> import jaxprune
        >>> def mlp(params, x):
        ...     return jax.nn.relu(x @ params["w1"]) @ params["w2"]
        >>> params = {"w1": jnp.ones((1, 2)), "w2": jnp.array([[2.0], [5.0]])}
        >>> groups = jaxprune.trace(mlp, params, jnp.ones((1, 1)), roles=True)
        >>> scale_units(params, groups, {"w1:1": np.array([0.0, 2.0])})["w2"]
        Array([[ 0.],
               [10.]], dtype=float32)
    """
    leaves = dict(named_leaves(variables))
    for name, own in factors.items():
        size, own = groups[name].size, np.asarray(own, np.float64)
        if own.shape != (size,):
            raise ValueError(
                f"factors[{name}] has shape {own.shape}, but the group has {size} units"
            )
        readers = [m for m in groups[name].members if m.role == "consumer"]
        if not readers:
            raise ValueError(
                f"no parameter is known to read the units of {name}; trace with "
                "roles=True, and leave out groups that meet no parameter"
            )
        for member in readers:
            leaves[member.path] = _scaled(leaves[member.path], member, own)
    return jax.tree.structure(variables).unflatten(leaves.values())


def _scaled(leaf: Any, member: Member, factors: np.ndarray) -> Any:
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        raise TypeError(
            f"{member.path} has dtype {leaf.dtype} and cannot be scaled; do so before "
            "quantising"
        )
    line = np.ones(leaf.shape[member.axis])
    line[member.index] = factors[:, None]
    shape = [1] * leaf.ndim
    shape[member.axis] = -1
    wide = wide_dtype(leaf.dtype)
    return (leaf.astype(wide) * line.reshape(shape).astype(wide)).astype(leaf.dtype)


def _mixed(leaf: Array, member: Member, matrix: object) -> Any:
    """The leaf, read through ``matrixᵀ``."""
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        raise TypeError(
            f"{member.path} has dtype {leaf.dtype}; its slices cannot be summed "
            "without leaving its range, so merge before quantising"
        )
    xp: Any = np if isinstance(leaf, np.ndarray) else jnp
    # Summed in the wider type, rounded once at the end.
    wide = wide_dtype(leaf.dtype)
    where = (slice(None),) * member.axis + (member.index,)
    rows = xp.moveaxis(leaf[where], member.axis, 0).astype(wide)
    size = len(member.index)
    options = {} if xp is np else {"precision": jax.lax.Precision.HIGHEST}
    flat = xp.matmul(
        xp.asarray(matrix).astype(wide).T, rows.reshape(size, -1), **options
    )
    new = xp.moveaxis(flat.reshape(rows.shape), 0, member.axis).astype(leaf.dtype)
    if isinstance(leaf, np.ndarray):
        copy = leaf.copy()
        copy[where] = new
        return copy
    return leaf.at[where].set(new)


def _shifted(
    leaves: Mapping[str, Array],
    groups: Groups,
    name: str,
    shift: np.ndarray,
    contractions: Iterable[Contraction],
) -> dict[str, Array]:
    """Path -> the biases of consumers, grown by what a shift of the units adds."""
    reading = {one.path: one for one in contractions if name in one.units(groups)}
    changed: dict[str, Array] = {}
    for member in groups[name].members:
        if member.role != "consumer":
            continue
        one = reading.get(member.path)
        if one is None or one.bias is None:
            what = "is not a contraction" if one is None else "has no bias of its own"
            raise ValueError(
                f"{member.path} axis {member.axis} reads {name}, but {what}, so a "
                "shift of the units has nowhere to go"
            )
        units = one.units(groups)[name]
        each = np.where(units >= 0, shift[units], 0.0)
        kernel = one.kernel(np.asarray(leaves[member.path], np.float64))
        amount = np.einsum("kd,kdn->kn", each, kernel)
        before = changed.get(one.bias.path, leaves[one.bias.path])
        changed[one.bias.path] = put(before, one.bias.at, one.bias.sign * amount, True)
    return changed


def put(leaf: Array, at: np.ndarray, values: np.ndarray, add: bool = False) -> Any:
    """The leaf with values at positions of it flattened; of its type and place."""
    flat = np.array(leaf).reshape(-1)
    wide = flat[at].astype(np.float64) + values if add else values
    flat[at] = wide.astype(flat.dtype)
    new = flat.reshape(np.shape(leaf))
    return new if isinstance(leaf, np.ndarray) else all_placed_like([new], [leaf])[0]
