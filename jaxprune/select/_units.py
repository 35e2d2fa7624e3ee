"""Units: scores of whole units and a budget in units decide which stay."""

from collections.abc import Iterable, Mapping, Sequence

import jax

from jaxprune.core._checks import whole_number
from jaxprune.core._groups import Groups
from jaxprune.core._limits import (
    Each,
    Limits,
    fraction,
    fractions,
    limits_of,
    selected,
)
from jaxprune.core._types import Array
from jaxprune.select._ranking import rank, remove_lowest


def per_group(
    groups: Groups,
    scores: Mapping[str, Array],
    *,
    sparsity: float | Mapping[str, float],
    min_keep: Each[int] = 1,
    multiple_of: Each[int] = 1,
    max_sparsity: Each[float] = 1.0,
    only: str | Sequence[str] | None = None,
) -> dict[str, Array]:
    """Removes the same fraction of every group, lowest scores first.

    A group of n units loses ``round(sparsity * n)`` of them (Python's `round`: halves
    go to the even count). Where `min_keep`, `multiple_of` and `max_sparsity` allow
    less, it loses as many as they allow.

    Args:
        groups: what `trace` returned.
        scores: group name -> float ``[size]``, larger matters more (`group_scores`).
        sparsity: fraction of units to remove, in [0, 1]; or group name -> fraction,
            where groups that are not named are left alone.
        min_keep: how many units every group keeps at least; 1 or more. This and the
            next two may also be given by name or pattern, ``{"conv*": 8}``.
        multiple_of: kept counts are rounded to the nearest multiple, at least one
            multiple; a group that is smaller stays whole.
        max_sparsity: no group loses more than this fraction.
        only: names, labels or patterns (``*`` matches everything) of the groups
            to prune; None for all, or for those that `sparsity` names.

    Returns:
        Group name -> bool ``[size]``, True = kept, for the selected groups.

    Raises:
        ValueError: if an option is out of range, a pattern matches no group, or
            scores are missing, of the wrong length, NaN or infinite.
        TypeError: if the sparsity is traced.

    Example:
        >>> import jax, numpy as np
        >>> from jaxprune.core._groups import Group, Groups
        >>> groups = Groups({"h": Group("h", 4, ())}, (), {}, jax.tree.structure({}))
        >>> per_group(groups, {"h": np.array([3.0, 1.0, 2.0, 4.0])}, sparsity=0.5)
        {'h': array([ True, False, False,  True])}
    """
    limits = limits_of(groups, min_keep, multiple_of, max_sparsity)
    keep = {}
    for name, share in fractions(groups, sparsity, only).items():
        size = groups[name].size
        count = round(fraction(f"sparsity of {name}", share) * size)
        ranking = rank(name, size, scores, limits[name])
        keep |= remove_lowest({name: ranking}, count)
    return keep


def across_groups(
    groups: Groups,
    scores: Mapping[str, Array],
    *,
    sparsity: float,
    min_keep: Each[int] = 1,
    multiple_of: Each[int] = 1,
    max_sparsity: Each[float] = 1.0,
    only: str | Sequence[str] | None = None,
) -> dict[str, Array]:
    """Removes a fraction of all units, ranked together, lowest scores first.

    Of N units in the selected groups ``round(sparsity * N)`` go. A unit that
    `min_keep`, `multiple_of` or `max_sparsity` protects stays, and the next lowest of
    any group goes instead, so the budget is met to one unit (to half a block with
    ``multiple_of > 1``). Units of equal score leave their groups in proportion.

    A group with blocks (see `balanced` of `trace`) loses its lowest unit of every
    block at a time, rated by the best of them.

    Scores of different groups are compared as they are: see `normalize` of
    `group_scores`.

    Args:
        groups: what `trace` returned.
        scores: group name -> float ``[size]``, larger matters more (`group_scores`).
        sparsity: fraction of all units to remove, in [0, 1].
        min_keep: how many units every group keeps at least; 1 or more. This and the
            next two may also be given by name or pattern, ``{"conv*": 8}``.
        multiple_of: kept counts are multiples; a group that loses nothing may keep
            any count, and one that is smaller stays whole.
        max_sparsity: no group loses more than this fraction.
        only: names, labels or patterns (``*`` matches everything) of the groups
            to prune; None for all.

    Returns:
        Group name -> bool ``[size]``, True = kept, for the selected groups.

    Raises:
        ValueError: if the limits leave fewer removable units than the budget asks
            for, an option is out of range, a pattern matches no group, or scores are
            missing, of the wrong length, NaN or infinite.
        TypeError: if the sparsity is traced.

    Example:
        >>> import jax, numpy as np
        >>> from jaxprune.core._groups import Group, Groups
        >>> found = {"a": Group("a", 2, ()), "b": Group("b", 2, ())}
        >>> groups = Groups(found, (), {}, jax.tree.structure({}))
        >>> scores = {"a": np.array([0.1, 0.2]), "b": np.array([3.0, 2.0])}
        >>> across_groups(groups, scores, sparsity=0.5)
        {'a': array([False,  True]), 'b': array([ True, False])}
    """
    limits = limits_of(groups, min_keep, multiple_of, max_sparsity)
    sizes = {name: groups[name].size for name in selected(groups, only)}
    rankings = {n: rank(n, size, scores, limits[n]) for n, size in sizes.items()}
    units = sum(sizes.values())
    count = round(fraction("sparsity", sparsity) * units)
    if not sizes:
        return {}
    removable = sum(int(ranking.blocks.sum()) for ranking in rankings.values())
    # Rounding to whole blocks may miss the budget by half a block, here as anywhere.
    if count - removable > max(limits[n].multiple_of for n in sizes) // 2:
        raise ValueError(
            f"sparsity={sparsity} asks for {count} of {units} units, but "
            f"{_said(limits, sizes)} leave only {removable} to remove in {len(sizes)} "
            "groups"
        )
    return remove_lowest(rankings, count)


def to_sizes(
    groups: Groups,
    scores: Mapping[str, Array],
    sizes: Mapping[str, int],
) -> dict[str, Array]:
    """Keeps the highest-scoring units of each group, as many as a width says.

    Turns widths from anywhere (a search, `bisect`, `widths_from_nonzeros`, another
    library) into a decision.

    Args:
        groups: what `trace` returned.
        scores: group name -> float ``[size]``, larger matters more.
        sizes: group name -> how many units to keep, 1 to the group's size; groups
            that are not named are left alone.

    Returns:
        Group name -> bool ``[size]``, True = kept, for the named groups.

    Raises:
        ValueError: if a name is no group or a width is out of range.

    Example:
        >>> import jax, numpy as np
        >>> from jaxprune.core._groups import Group, Groups
        >>> groups = Groups({"h": Group("h", 4, ())}, (), {}, jax.tree.structure({}))
        >>> to_sizes(groups, {"h": np.array([3.0, 1.0, 2.0, 4.0])}, {"h": 3})
        {'h': array([ True, False,  True,  True])}
    """
    keep = {}
    for name, left in sizes.items():
        selected(groups, name)
        size = groups[name].size
        if not 1 <= whole_number(f"sizes[{name}]", left) <= size:
            raise ValueError(
                f"sizes[{name}] must be a whole number from 1 to {size}, got {left}"
            )
        parts = groups[name].blocks
        if left % parts:
            raise ValueError(
                f"sizes[{name}] must be a multiple of its {parts} blocks, got {left}"
            )
        ranking = rank(name, size, scores, Limits(parts=parts))
        keep |= remove_lowest({name: ranking}, size - int(left))
    return keep


def random(
    groups: Groups,
    key: jax.Array,
    *,
    sparsity: float | Mapping[str, float],
    min_keep: Each[int] = 1,
    multiple_of: Each[int] = 1,
    max_sparsity: Each[float] = 1.0,
    only: str | Sequence[str] | None = None,
) -> dict[str, Array]:
    """Removes units at random: the control that every criterion must beat.

    Args:
        groups: what `trace` returned.
        key: random key, consumed.
        sparsity: as for `per_group`.
        min_keep: as for `per_group`.
        multiple_of: as for `per_group`.
        max_sparsity: as for `per_group`.
        only: as for `per_group`.

    Returns:
        Group name -> bool ``[size]``, True = kept: as many as `per_group` keeps, any
        choice of units equally likely.

    Example:
        >>> import jax
        >>> from jaxprune.core._groups import Group, Groups
        >>> groups = Groups({"h": Group("h", 8, ())}, (), {}, jax.tree.structure({}))
        >>> int(random(groups, jax.random.key(0), sparsity=0.25)["h"].sum())
        6
    """
    keys = jax.random.split(key, max(len(groups), 1))
    scores = {
        name: jax.random.uniform(own, (group.size,))
        for own, (name, group) in zip(keys, groups.items(), strict=False)
    }
    return per_group(
        groups,
        scores,
        sparsity=sparsity,
        min_keep=min_keep,
        multiple_of=multiple_of,
        max_sparsity=max_sparsity,
        only=only,
    )


def _said(limits: Mapping[str, Limits], names: Iterable[str]) -> str:
    """The limits of these groups in words."""
    found = {limits[name] for name in names}
    return str(found.pop()) if len(found) == 1 else "their limits"
