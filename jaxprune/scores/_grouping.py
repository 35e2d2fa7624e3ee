"""From scores of single weights to one number per unit of a group."""

import functools
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.core._checks import check_leaves
from jaxprune.core._groups import Group, Groups, Member
from jaxprune.core._leafwise import is_float, power_of_two
from jaxprune.core._leaves import named_leaves, parameter_paths
from jaxprune.core._members import in_front
from jaxprune.core._placement import all_placed_like, on_host
from jaxprune.core._types import Array, ArrayNamespace, PyTree
from jaxprune.scores._lamp import share_of_larger
from jaxprune.scores._unit_sums import Reduce, add_up_units

Normalize = Literal["sum", "mean", "max", "gaussian", "lamp"]
Members = Literal["all", "first", "producers"]


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
        "abs_of_sum" |sum s|     "square_of_sum" (sum s)^2     "signed_sum" sum s

    (the last three for signed scores, such as ``taylor(form="signed")``, that may
    cancel; "sum", "mean" and "max" refuse negative scores, which would rank live units
    below dead ones) and ``normalize`` divides the scores of each group by their sum,
    mean or maximum, or ("gaussian") subtracts their mean and divides by their standard
    deviation, or ("lamp", see `lamp`) divides their squares by the sum of all squares
    that are not smaller, so that groups of different scale can be ranked together. A
    group of equal scores keeps finite numbers. Accumulates in float32 or wider;
    jit-able in `scores` (whose signs are not checked then, and where XLA takes
    subnormal numbers, in single precision those below 1.2e-38, for 0). `REDUCTIONS`
    names the reduction that each criterion is published with.

    A norm of the weights themselves needs no score before: give the parameters, as in
    ``group_scores(groups, params, reduce="l1")``.

    An entry that a unit occupies through two members of one leaf (the diagonal of a
    recurrent kernel) counts in each. Only parameters count: BatchNorm statistics are
    cut with their group but never scored.

    Args:
        groups: what `trace` returned.
        scores: tree of floats like the traced variables, or like their ``params``
            collection; None or missing where a leaf has no score.
        reduce: how the scores of one unit add up.
        normalize: how the scores of one group are scaled, None for not at all.
        members: "all"; "first" for the kernel that writes the units first alone: the
            classic filter norm is ``magnitude`` with ``reduce="l1"`` and
            ``members="first"``; or "producers" for all that write them (on a residual
            stream every layer that adds to it), where `trace` was asked for roles.

    Returns:
        Group name -> float ``[size]``, larger matters more.

    Raises:
        ValueError: if a group has no member with a score, the scores are for other
            variables, negative where the reduction ranks by sign, or an option is
            unknown.
        TypeError: if a leaf is a number or text instead of an array, or complex where
            the reduction needs an order.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np
        >>> from jaxprune import scores
        >>> from jaxprune.core._groups import Group, Groups, Member
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
    _check_choice("reduce", reduce, get_args(Reduce))
    leaves = scored_leaves(groups, scores)
    chosen = [scored_members(group, leaves, members) for group in groups.values()]
    stacked = {_place(m): m for each in chosen for m in each if m.layers is not None}
    leaves = {m.path: leaves[m.path] for each in chosen for m in each} | {
        place: in_front(leaves[m.path], m) for (place, _), m in stacked.items()
    }
    places = tuple(tuple(map(_place, each)) for each in chosen)
    indices = [[member.index for member in each] for each in chosen]
    found = add_up_units(leaves, indices, places, reduce)
    return normalized(dict(zip(groups, found, strict=True)), normalize)


def _place(member: Member) -> tuple[str, int]:
    """The leaf and axis to add up; of layers with units of their own a leaf in turn."""
    if member.layers is None:
        return member.path, member.axis
    return f"{member.path}:{member.axis} by layer {member.layers}", 0


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
    if normalize is None:
        return dict(unit_scores)
    each = list(unit_scores.values())
    if on_host(*each):
        with np.errstate(all="ignore"):  # as in JAX, inf and NaN are no events
            done = [_normalized(np, np.asarray(one), normalize) for one in each]
        done = all_placed_like(done, each)
    else:
        done = _compiled_normalized(each, normalize)
    return dict(zip(unit_scores, done, strict=True))


def _normalized(xp: ArrayNamespace, scores: Array, normalize: Normalize) -> Array:
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        scores = scores.astype(np.float32)
    # By a power of two, so that no square or sum leaves the range of the numbers.
    scores = scores / power_of_two(xp, xp.max(xp.abs(scores), initial=0))
    if normalize == "gaussian":
        # Rounding leaves a tiny deviation on equal scores; it must not be blown up.
        equal = scores.max() == scores.min()
        spread = scores.std()
        spread = xp.where(equal, xp.full_like(spread, xp.inf), spread)
        return (scores - scores.mean()) / spread
    if normalize == "lamp":
        return share_of_larger(xp.square(scores), xp)
    scale = getattr(xp, normalize)(scores)
    return scores / xp.where(scale == 0, xp.ones_like(scale), scale)


@functools.partial(jax.jit, static_argnames="normalize")
def _compiled_normalized(unit_scores: list[Array], normalize: Normalize) -> list[Array]:
    return [_normalized(jnp, each, normalize) for each in unit_scores]


def scored_members(
    group: Group, leaves: Mapping[str, Array], members: Members
) -> list[Member]:
    """The members of a group that have a score.

    Raises:
        ValueError: if there is none, or `members` is unknown.
    """
    _check_choice("members", members, get_args(Members))
    chosen = group.members[: 1 if members == "first" else None]
    if members == "producers":
        if not any(member.role for member in chosen):
            raise ValueError(
                f"members='producers' needs to know what the members of {group.name} "
                "do; trace with roles=True"
            )
        chosen = tuple(member for member in chosen if member.role == "producer")
    scored = [member for member in chosen if member.path in leaves]
    if not scored:
        paths = ", ".join(member.path for member in chosen)
        raise ValueError(
            f"group {group.name} has no score: none of {paths} has one (only leaves of "
            "floating point do); select other groups with only=, or give its scores"
        )
    return scored


def scored_leaves(groups: Groups, scores: PyTree) -> dict[str, Array]:
    """Traced path -> score, for parameters only."""
    check_leaves(scores, "scores")
    leaves = {p: x for p, x in named_leaves(scores).items() if hasattr(x, "dtype")}
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
    return {p: s for p, s in leaves.items() if p in parameters and is_float(s)}


def _check_choice(what: str, value: str | None, choices: Sequence[str | None]) -> None:
    if value not in choices:
        raise ValueError(f"{what} must be one of {tuple(choices)}, got {value!r}")
