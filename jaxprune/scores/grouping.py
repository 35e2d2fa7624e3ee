"""From scores of single weights to one number per unit of a group."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from jaxprune.coupling.groups import Group, Groups, Member
from jaxprune.masks import PyTree, named_leaves, parameter_paths
from jaxprune.scores.weights import share_of_larger, widened

Reduce = Literal["l1", "l2", "sum", "mean", "max", "abs_of_sum", "square_of_sum"]
Normalize = Literal["sum", "mean", "max", "gaussian", "lamp"]
Members = Literal["all", "first"]


def group_scores(
    groups: Groups,
    scores: PyTree,
    *,
    reduce: Reduce = "l2",
    normalize: Normalize | None = None,
    members: Members = "all",
) -> dict[str, jax.Array]:
    """Adds up the scores of everything a unit occupies.

    With ``s`` running over the scores of the entries that unit ``u`` occupies in all
    members that have a score, ``reduce`` is::

        "l1"  sum |s|     "l2"  sqrt(sum s^2)     "sum"  sum s
        "max" max s       "mean" sum s / number of entries
        "abs_of_sum" |sum s|     "square_of_sum" (sum s)^2

    (the last two for signed scores, such as ``taylor(form="signed")``, that may
    cancel) and ``normalize`` divides the scores of each group by their sum, mean or
    maximum, or ("gaussian") subtracts their mean and divides by their standard
    deviation, or ("lamp", see `lamp`) divides their squares by the sum of all squares
    that are not smaller, so that groups of different scale can be ranked together. A
    group of equal scores keeps finite numbers. Accumulates in float32 or wider;
    jit-able in `scores`.

    An entry that a unit occupies through two members of one leaf (the diagonal of a
    recurrent kernel) counts in each. Only parameters count: BatchNorm statistics are
    cut with their group but never scored.

    Args:
        groups: what `trace` returned.
        scores: tree of floats like the traced variables, or like their ``params``
            collection; None or missing where a leaf has no score.
        reduce: how the scores of one unit add up.
        normalize: how the scores of one group are scaled, None for not at all.
        members: "all", or "first" for the producing kernel alone: the classic filter
            norm is ``magnitude`` with ``reduce="l1"`` and ``members="first"``.

    Returns:
        Group name -> float ``[size]``, larger matters more.

    Raises:
        ValueError: if a group has no member with a score, the scores are for other
            variables, or an option is unknown.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np
        >>> from jaxprune import scores
        >>> from jaxprune.coupling.groups import Group, Groups, Member
        >>> params = {"w": jnp.array([[3.0, 0.0], [4.0, 1.0]])}
        >>> hidden = Group("h", 2, (Member("w", 1, np.arange(2)[:, None]),))
        >>> treedef = jax.tree.structure(params)
        >>> groups = Groups({"h": hidden}, (), {"w": (2, 2)}, treedef)
        >>> group_scores(groups, scores.magnitude(params))
        {'h': Array([5., 1.], dtype=float32)}

    References:
        Li et al., `Pruning Filters for Efficient ConvNets
        <https://arxiv.org/abs/1608.08710>`_, 2016 (filter norm: ``members="first"``);
        Fang et al., `DepGraph <https://arxiv.org/abs/2301.12900>`_, 2023
        (all coupled members)
    """
    _check_choice("reduce", reduce, _TERMS)
    leaves = scored_leaves(groups, scores)
    return normalized(
        {
            name: _unit_scores(scored_members(group, leaves, members), leaves, reduce)
            for name, group in groups.items()
        },
        normalize,
    )


def normalized(
    unit_scores: Mapping[str, jax.Array], normalize: Normalize | None
) -> dict[str, jax.Array]:
    """Scales the scores of every group, as `group_scores` does.

    Args:
        unit_scores: group name -> float ``[size]``.
        normalize: how, see `group_scores`; None for not at all.

    Returns:
        Group name -> float ``[size]``.

    Raises:
        ValueError: if the option is unknown.

    Example:
        >>> import jax.numpy as jnp
        >>> normalized({"h": jnp.array([3.0, 1.0])}, "sum")
        {'h': Array([0.75, 0.25], dtype=float32)}
    """
    _check_choice("normalize", normalize, (None, *get_args(Normalize)))
    return {name: _normalized(each, normalize) for name, each in unit_scores.items()}


_TERMS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "l1": jnp.abs,
    "l2": jnp.square,
    "sum": lambda s: s,
    "mean": lambda s: s,
    "max": lambda s: s,
    "abs_of_sum": lambda s: s,
    "square_of_sum": lambda s: s,
}


def _unit_scores(
    members: list[Member], leaves: Mapping[str, jax.Array], reduce: Reduce
) -> jax.Array:
    scored = [(member, leaves[member.path]) for member in members]
    parts = jnp.stack([_member_scores(member, leaf, reduce) for member, leaf in scored])
    if reduce == "max":
        return parts.max(0)
    total = parts.sum(0)
    if reduce == "l2":
        return _sqrt(total)
    if reduce == "mean":
        entries = [m.repeats * math.prod(s.shape) // s.shape[m.axis] for m, s in scored]
        return total / sum(entries)
    if reduce == "abs_of_sum":
        return jnp.abs(total)
    return jnp.square(total) if reduce == "square_of_sum" else total


def _member_scores(member: Member, scores: jax.Array, reduce: Reduce) -> jax.Array:
    terms = _TERMS[reduce](widened(scores))
    others = tuple(axis for axis in range(scores.ndim) if axis != member.axis)
    # Reduce first, then pick: the gather is over one axis, never over the parameter.
    if reduce == "max":
        return terms.max(others)[member.index].max(1)
    return terms.sum(others)[member.index].sum(1)


def _sqrt(total: jax.Array) -> jax.Array:
    """Square root with gradient 0 at 0, so that a dead unit does not yield NaN."""
    zero = total == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, total)))


def _normalized(scores: jax.Array, normalize: Normalize | None) -> jax.Array:
    if normalize is None:
        return scores
    if normalize == "gaussian":
        # Rounding leaves a tiny deviation on equal scores; it must not be blown up.
        equal = scores.max() == scores.min()
        spread = jnp.where(equal, jnp.inf, scores.std())
        return (scores - scores.mean()) / spread
    if normalize == "lamp":
        return share_of_larger(jnp.square(scores))
    scale = getattr(jnp, normalize)(scores)
    return scores / jnp.where(scale == 0, 1, scale)


def scored_members(
    group: Group, leaves: Mapping[str, jax.Array], members: Members
) -> list[Member]:
    """The members of a group that have a score.

    Raises:
        ValueError: if there is none, or `members` is unknown.
    """
    _check_choice("members", members, get_args(Members))
    chosen = group.members[: 1 if members == "first" else None]
    scored = [member for member in chosen if member.path in leaves]
    if not scored:
        paths = ", ".join(member.path for member in chosen)
        raise ValueError(f"group {group.name} has no score: none of {paths} has one")
    return scored


def scored_leaves(groups: Groups, scores: PyTree) -> dict[str, jax.Array]:
    """Traced path -> score, for parameters only."""
    leaves = named_leaves(scores)
    if not all(path in groups.shapes for path in leaves):
        below = {f"params/{path}": leaf for path, leaf in leaves.items()}
        if not all(path in groups.shapes for path in below):
            unknown = next(path for path in leaves if path not in groups.shapes)
            raise ValueError(
                f"scores have the leaf {unknown}, which the traced variables lack; "
                "they start with " + ", ".join(list(groups.shapes)[:3])
            )
        leaves = below
    for path, leaf in leaves.items():
        if leaf.shape != groups.shapes[path]:
            raise ValueError(
                f"scores[{path}] has shape {leaf.shape}, but the traced leaf has shape "
                f"{groups.shapes[path]}; were they made after slicing?"
            )
    parameters = parameter_paths(groups.shapes)
    return {path: jnp.asarray(s) for path, s in leaves.items() if path in parameters}


def _check_choice(what: str, value: Any, choices: Any) -> None:
    if value not in choices:
        raise ValueError(f"{what} must be one of {tuple(choices)}, got {value!r}")
