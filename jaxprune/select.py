"""Select: scores and a budget decide which units stay.

Both selections remove the lowest-scoring units and share their guarantees: the count
follows from the budget, not from a threshold, so equal scores or a layer of small
scores cannot change it; no group is emptied; ties are broken by position. With
``multiple_of > 1`` units leave in blocks (a block is rated by its best unit), and the
count is met to half a block.

The budget is concrete. Scores may be traced: then the decision is traced too.
"""

import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxprune.coupling.groups import Groups


def per_group(
    groups: Groups,
    scores: Mapping[str, Any],
    *,
    sparsity: float | Mapping[str, float],
    min_keep: int = 1,
    multiple_of: int = 1,
    max_sparsity: float = 1.0,
    only: str | Sequence[str] | None = None,
) -> dict[str, Any]:
    """Removes the same fraction of every group, lowest scores first.

    A group of n units loses ``round(sparsity * n)`` of them (Python's `round`: halves
    go to the even count). Where `min_keep`, `multiple_of` and `max_sparsity` allow
    less, it loses as many as they allow.

    Args:
        groups: what `trace` returned.
        scores: group name -> float ``[size]``, larger matters more (`group_scores`).
        sparsity: fraction of units to remove, in [0, 1]; or group name -> fraction,
            where groups that are not named are left alone.
        min_keep: how many units every group keeps at least; 1 or more.
        multiple_of: kept counts are rounded to the nearest multiple, at least one
            multiple; a group that is smaller stays whole.
        max_sparsity: no group loses more than this fraction.
        only: names or patterns (as `fnmatch`, ``*`` matches everything) of the groups
            to prune; None for all, or for those that `sparsity` names.

    Returns:
        Group name -> bool ``[size]``, True = kept, for the selected groups.

    Raises:
        ValueError: if an option is out of range, a pattern matches no group, or
            scores are missing, of the wrong length or NaN.
        TypeError: if the sparsity is traced.

    Example:
        >>> import jax, numpy as np
        >>> from jaxprune.coupling.groups import Group, Groups
        >>> groups = Groups({"h": Group("h", 4, ())}, (), {}, jax.tree.structure({}))
        >>> per_group(groups, {"h": np.array([3.0, 1.0, 2.0, 4.0])}, sparsity=0.5)
        {'h': array([ True, False, False,  True])}
    """
    limits = _limits(min_keep, multiple_of, max_sparsity)
    if not isinstance(sparsity, Mapping):
        sparsity = dict.fromkeys(_selected(groups, only), sparsity)
    elif only is not None:
        raise ValueError("only and a sparsity per group both select groups: give one")
    keep = {}
    for name in _selected(groups, list(sparsity)):
        if name not in sparsity:
            raise ValueError(f"sparsity must name groups in full; {name} is missing")
        ranking = _rank(name, groups[name].size, scores, limits)
        fraction = _fraction(f"sparsity of {name}", sparsity[name])
        count = round(fraction * groups[name].size)
        keep |= _remove_lowest({name: ranking}, count)
    return keep


def across_groups(
    groups: Groups,
    scores: Mapping[str, Any],
    *,
    sparsity: float,
    min_keep: int = 1,
    multiple_of: int = 1,
    max_sparsity: float = 1.0,
    only: str | Sequence[str] | None = None,
) -> dict[str, Any]:
    """Removes a fraction of all units, ranked together, lowest scores first.

    Of N units in the selected groups ``round(sparsity * N)`` go. A unit that
    `min_keep`, `multiple_of` or `max_sparsity` protects stays, and the next lowest of
    any group goes instead, so the budget is met to one unit (to half a block with
    ``multiple_of > 1``). Units of equal score leave their groups in proportion.

    Scores of different groups are compared as they are: see `normalize` of
    `group_scores`.

    Args:
        groups: what `trace` returned.
        scores: group name -> float ``[size]``, larger matters more (`group_scores`).
        sparsity: fraction of all units to remove, in [0, 1].
        min_keep: how many units every group keeps at least; 1 or more.
        multiple_of: kept counts are multiples; a group that loses nothing may keep
            any count, and one that is smaller stays whole.
        max_sparsity: no group loses more than this fraction.
        only: names or patterns (as `fnmatch`, ``*`` matches everything) of the groups
            to prune; None for all.

    Returns:
        Group name -> bool ``[size]``, True = kept, for the selected groups.

    Raises:
        ValueError: if the limits leave fewer removable units than the budget asks
            for, an option is out of range, a pattern matches no group, or scores are
            missing, of the wrong length or NaN.
        TypeError: if the sparsity is traced.

    Example:
        >>> import jax, numpy as np
        >>> from jaxprune.coupling.groups import Group, Groups
        >>> found = {"a": Group("a", 2, ()), "b": Group("b", 2, ())}
        >>> groups = Groups(found, (), {}, jax.tree.structure({}))
        >>> scores = {"a": np.array([0.1, 0.2]), "b": np.array([3.0, 2.0])}
        >>> across_groups(groups, scores, sparsity=0.5)
        {'a': array([False,  True]), 'b': array([ True, False])}
    """
    limits = _limits(min_keep, multiple_of, max_sparsity)
    names = _selected(groups, only)
    rankings = {name: _rank(name, groups[name].size, scores, limits) for name in names}
    units = sum(groups[name].size for name in names)
    count = round(_fraction("sparsity", sparsity) * units)
    removable = sum(int(ranking.blocks.sum()) for ranking in rankings.values())
    # Rounding to whole blocks may miss the budget by half a block, here as anywhere.
    if count - removable > multiple_of // 2:
        raise ValueError(
            f"sparsity={sparsity} asks for {count} of {units} units, but {limits} "
            f"leave only {removable} to remove in {len(names)} groups"
        )
    return _remove_lowest(rankings, count)


class _Limits(NamedTuple):
    min_keep: int
    multiple_of: int
    max_sparsity: float

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self._asdict().items())

    def blocks(self, size: int) -> np.ndarray:
        """Sizes of the blocks a group can lose, in order of leaving.

        The first block leaves a multiple behind; what the limits protect is in none.
        """
        spared = max(self.min_keep, math.ceil(size - self.max_sparsity * size - 1e-9))
        least = -(-spared // self.multiple_of) * self.multiple_of
        if least >= size:
            return np.zeros(0, np.int32)
        first = size % self.multiple_of or self.multiple_of
        more = (size - least - first) // self.multiple_of
        return np.array([first] + [self.multiple_of] * more, np.int32)


class _Ranking(NamedTuple):
    """The units of one group, lowest score first, in the blocks that may leave.

    Attributes:
        ranks: ``[size]``, where each unit stands in this order.
        blocks: ``[blocks]``, how many units each block has; what is not in a block
            stays.
        best: ``[blocks]``, the score of each block's best unit; ascending, so blocks
            ranked by it leave their group in order.
        lost: ``[blocks]``, the fraction of the group gone when a block is gone.
    """

    ranks: Any
    blocks: np.ndarray
    best: Any
    lost: np.ndarray


def _limits(min_keep: int, multiple_of: int, max_sparsity: float) -> _Limits:
    limits = _Limits(min_keep, multiple_of, _fraction("max_sparsity", max_sparsity))
    if min_keep < 1 or multiple_of < 1:
        raise ValueError(f"min_keep and multiple_of must be 1 or more, got {limits}")
    return limits


def _rank(name: str, size: int, scores: Mapping[str, Any], limits: _Limits) -> _Ranking:
    if name not in scores:
        raise ValueError(f"scores have no entry for the group {name}")
    values = scores[name]
    if np.shape(values) != (size,):
        raise ValueError(
            f"scores[{name}] has shape {np.shape(values)}, but the group has {size} "
            "units; were they made for other groups?"
        )
    xp = jnp if isinstance(values, Tracer) else np
    values = xp.asarray(values)
    if xp is np and np.isnan(values).any():
        raise ValueError(f"scores[{name}] is NaN for {np.isnan(values).sum()} units")
    order = xp.argsort(values, stable=True)
    blocks = limits.blocks(size)
    ends = np.cumsum(blocks, dtype=np.int32)
    best = values[order[ends - 1]]
    return _Ranking(xp.argsort(order), blocks, best, ends / np.float32(size))


def _remove_lowest(rankings: Mapping[str, _Ranking], count: int) -> dict[str, Any]:
    """Removes the lowest blocks of all groups until `count` units are gone."""
    if not rankings:
        return {}
    xp = jnp if any(isinstance(r.best, Tracer) for r in rankings.values()) else np
    best = xp.concatenate([r.best for r in rankings.values()])
    # Equal scores leave in proportion: next is the group that will have lost least.
    lost = np.concatenate([r.lost for r in rankings.values()])
    order = xp.lexsort((lost, best))
    blocks = xp.asarray(np.concatenate([r.blocks for r in rankings.values()]))[order]
    # A block goes if its middle lies below the budget: the nearest count, ties kept.
    goes = (2 * xp.cumsum(blocks) - blocks < 2 * count)[xp.argsort(order)]

    keep, start = {}, 0
    for name, ranking in rankings.items():
        stop = start + len(ranking.blocks)
        gone = xp.repeat(goes[start:stop], ranking.blocks)
        stays = xp.zeros(ranking.ranks.size - ranking.blocks.sum(), bool)
        keep[name] = ~xp.concatenate([gone, stays])[ranking.ranks]
        start = stop
    return keep


def _selected(groups: Groups, only: str | Sequence[str] | None) -> list[str]:
    if only is None:
        return list(groups)
    chosen: set[str] = set()
    for pattern in [only] if isinstance(only, str) else only:
        # A full name is taken literally, whatever characters it contains.
        found = [n for n in groups if n == pattern or fnmatch.fnmatchcase(n, pattern)]
        if not found:
            raise ValueError(
                f"{pattern!r} matches none of the {len(groups)} groups: "
                + ", ".join(list(groups)[:5])
            )
        chosen.update(found)
    return [name for name in groups if name in chosen]


def _fraction(what: str, value: float) -> float:
    if isinstance(value, Tracer):
        raise TypeError(
            f"{what} is traced, but decides how many units go: make it static"
        )
    if not 0 <= value <= 1:
        raise ValueError(f"{what} must be a fraction in [0, 1], got {value}")
    return float(value)
