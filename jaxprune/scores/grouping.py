"""From scores of single weights to one number per unit of a group."""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.coupling.groups import Group, Groups, Member
from jaxprune.masks import PyTree, named_leaves, parameter_paths
from jaxprune.placement import all_placed_like, on_host
from jaxprune.scores.leafwise import numbers, widened
from jaxprune.scores.weights import share_of_larger

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
    _check_choice("reduce", reduce, get_args(Reduce))
    leaves = scored_leaves(groups, scores)
    chosen = [scored_members(group, leaves, members) for group in groups.values()]
    leaves = {member.path: leaves[member.path] for each in chosen for member in each}
    places = tuple(tuple((m.path, m.axis) for m in each) for each in chosen)
    indices = [[member.index for member in each] for each in chosen]
    compute = _scores_on_host if on_host(*leaves.values()) else _compiled_scores
    found = compute(leaves, indices, places, reduce)
    return normalized(dict(zip(groups, found, strict=True)), normalize)


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


# --- the scores of all groups, in numpy on the host, else in one program -------------


Leaves: TypeAlias = Mapping[str, Any]
Places: TypeAlias = Sequence[Sequence[tuple[str, int]]]  # members' (path, axis)
Indices: TypeAlias = Sequence[Sequence[np.ndarray]]  # and their positions


def _unit_scores(
    xp: Any, leaves: Leaves, indices: Indices, places: Places, reduce: Reduce
) -> list[Any]:
    """The scores of every group."""
    every: dict[str, set[int]] = {}
    for path, d in (place for each in places for place in each):
        every.setdefault(path, set()).add(d)
    # Reduce first, then pick: the gather is over one axis, never over the parameter.
    add_up = _add_up if xp is jnp else _add_up_on_host
    lines = {
        (path, d): line
        for path, axes in every.items()
        for d, line in add_up(leaves[path], sorted(axes), reduce).items()
    }
    found = []
    for each, own in zip(places, indices, strict=True):
        parts = [(lines[at], index) for at, index in zip(each, own, strict=True)]
        if reduce == "max":
            found.append(xp.stack([line[i].max(1) for line, i in parts]).max(0))
            continue
        total = xp.stack([line[index].sum(1) for line, index in parts]).sum(0)
        shapes = [(leaves[path].shape, d) for path, d in each]
        entries = sum(
            index.shape[1] * (math.prod(shape) // shape[d])
            for (shape, d), index in zip(shapes, own, strict=True)
        )
        found.append(_finished(xp, total, reduce, entries))
    return found


_compiled_scores = jax.jit(
    functools.partial(_unit_scores, jnp), static_argnames=("places", "reduce")
)


def _scores_on_host(
    leaves: Leaves, indices: Indices, places: Places, reduce: Reduce
) -> list[jax.Array]:
    with np.errstate(all="ignore"):  # as in JAX, inf and NaN are no events
        found = _unit_scores(np, leaves, indices, places, reduce)
    own = [[leaves[path] for path, _ in each] for each in places]
    dtypes = [np.result_type(*map(_wide_dtype, each)) for each in own]
    done = [units.astype(dtype) for units, dtype in zip(found, dtypes, strict=True)]
    return all_placed_like(done, [first for first, *_ in own])


def _wide_dtype(leaf: Any) -> Any:
    return numbers(np.zeros(0, leaf.dtype)).dtype


def _add_up(
    scores: jax.Array, axes: Sequence[int], reduce: Reduce
) -> dict[int, jax.Array]:
    """Axis -> the terms of all entries at every position of it, reduced."""
    terms = widened(scores)
    if reduce in ("l1", "l2"):
        terms = jnp.abs(terms) if reduce == "l1" else jnp.square(terms)
    add_up = jnp.max if reduce == "max" else jnp.sum
    rest = {d: tuple(k for k in range(scores.ndim) if k != d) for d in axes}
    return {d: add_up(terms, others) for d, others in rest.items()}


def _add_up_on_host(
    scores: Any, axes: Sequence[int], reduce: Reduce
) -> dict[int, np.ndarray]:
    """`_add_up`, reading memory once; sums of blocks add up in double precision."""
    whole = np.ascontiguousarray(scores)
    wide = np.result_type(_wide_dtype(whole), np.float64)
    start = -np.inf if reduce == "max" else 0
    lines = {d: np.full(whole.shape[d], start, wide) for d in axes}
    combine = np.maximum if reduce == "max" else np.add
    for block in _blocks(whole.shape):
        part = numbers(whole[block])
        for d, line in lines.items():
            here = line[block[d]] if d < len(block) else line
            combine(here, _line(part, d, reduce), out=here)
    return lines


_BLOCK = 1 << 18  # entries that stay in a core's cache with their terms


def _blocks(shape: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Pieces of consecutive entries, as slices of the leading axes."""
    inner = math.prod(shape[1:])
    rows = max(1, _BLOCK // max(1, inner))
    for start in range(0, shape[0], rows):
        here = slice(start, start + rows)
        if inner <= _BLOCK:
            yield (here,)
        else:
            yield from ((here, *rest) for rest in _blocks(shape[1:]))


def _line(part: np.ndarray, axis: int, reduce: Reduce) -> np.ndarray:
    """The terms of one piece at every position of an axis, reduced."""
    before, size = math.prod(part.shape[:axis]), part.shape[axis]
    grid = part.reshape(before, size, math.prod(part.shape[axis + 1 :]))
    if reduce == "l2":  # one pass, no squares in memory
        return np.einsum("abc,abc->b", grid, grid)
    if reduce == "max":
        return grid.max((0, 2))
    return (np.abs(grid) if reduce == "l1" else grid).sum((0, 2))


def _finished(xp: Any, total: Any, reduce: Reduce, entries: int) -> Any:
    if reduce == "l2":
        return _sqrt(xp, total)
    if reduce == "mean":
        return total / entries
    if reduce == "abs_of_sum":
        return xp.abs(total)
    return xp.square(total) if reduce == "square_of_sum" else total


def _sqrt(xp: Any, total: Any) -> Any:
    """Square root with gradient 0 at 0, so that a dead unit does not yield NaN."""
    zero = total == 0
    zeros, ones = xp.zeros_like(total), xp.ones_like(total)
    return xp.where(zero, zeros, xp.sqrt(xp.where(zero, ones, total)))


def _normalized(xp: Any, scores: Any, normalize: Normalize) -> Any:
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
def _compiled_normalized(unit_scores: list[Any], normalize: Normalize) -> list[Any]:
    return [_normalized(jnp, each, normalize) for each in unit_scores]


def scored_members(
    group: Group, leaves: Mapping[str, Any], members: Members
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


def scored_leaves(groups: Groups, scores: PyTree) -> dict[str, Any]:
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
    return {path: s for path, s in leaves.items() if path in parameters}


def _check_choice(what: str, value: Any, choices: Any) -> None:
    if value not in choices:
        raise ValueError(f"{what} must be one of {tuple(choices)}, got {value!r}")
