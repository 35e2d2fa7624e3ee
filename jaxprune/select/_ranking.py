"""Rankings: the units of a group in the order in which they leave."""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxprune.core._limits import Limits
from jaxprune.core._types import Array


class Ranking(NamedTuple):
    """The units of one group, lowest score first, in the blocks that may leave.

    Attributes:
        ranks: ``[size]``, where each unit stands in this order.
        blocks: ``[blocks]``, how many units each block has; what is not in a block
            stays.
        best: ``[blocks]``, the score of each block's best unit; ascending, so blocks
            ranked by it leave their group in order.
        lost: ``[blocks]``, the fraction of the group gone when a block is gone.
    """

    ranks: Array
    blocks: np.ndarray
    best: Array
    lost: np.ndarray


def rank(name: str, size: int, scores: Mapping[str, Array], limits: Limits) -> Ranking:
    """Orders the units of a group by score; of equal ones the last comes first."""
    values = unit_scores(name, size, scores)
    xp = jnp if isinstance(values, Tracer) else np
    order = leaving_order(values, limits.parts)
    blocks = limits.blocks(size)
    ends = np.cumsum(blocks, dtype=np.int32)
    best = best_up_to(values[order], ends, limits.parts)
    return Ranking(xp.argsort(order), blocks, best, ends / np.float32(size))


def leaving_order(values: Array, parts: int) -> Array:
    """The units by score, the lowest first; one of every part after the other.

    Example:
        >>> leaving_order(np.array([3.0, 1.0, 2.0, 4.0, 6.0, 5.0]), 2)
        array([1, 3, 2, 5, 0, 4])
    """
    xp = jnp if isinstance(values, Tracer) else np
    # Backwards, so that of equal scores the later unit leaves first.
    backwards = values.reshape(parts, -1)[:, ::-1]
    inside = backwards.shape[1] - 1 - xp.argsort(backwards, axis=1, stable=True)
    return (inside + np.arange(0, len(values), len(values) // parts)[:, None]).T.ravel()


def best_up_to(ordered: Array, ends: np.ndarray, parts: int) -> Array:
    """The largest of the first so many scores, whole rounds through all parts."""
    return ordered.reshape(-1, parts).max(axis=1)[ends // parts - 1]


def unit_scores(name: str, size: int, scores: Mapping[str, Array]) -> Array:
    """The scores of one group: float64 where concrete, float32 where traced.

    Raises:
        ValueError: if they are missing, of another length, NaN or infinite.
    """
    if name not in scores:
        raise ValueError(f"scores have no entry for the group {name}")
    values = scores[name]
    if np.shape(values) != (size,):
        raise ValueError(
            f"scores[{name}] has shape {np.shape(values)}, but the group has {size} "
            "units; were they made for other groups?"
        )
    if isinstance(values, Tracer):
        return values.astype(jnp.promote_types(values.dtype, jnp.float32))
    if np.iscomplexobj(values):
        raise TypeError(f"scores[{name}] are complex, which has no order")
    values = np.asarray(values).astype(np.float64)
    if np.isnan(values).any():
        raise ValueError(f"scores[{name}] is NaN for {np.isnan(values).sum()} units")
    if np.isinf(values).any():
        raise ValueError(
            f"scores[{name}] are not finite: infinite for {np.isinf(values).sum()} of "
            f"{size} units, which have no order then; the weights or scores of this "
            "group may leave the range of their type when they add up: divide them by "
            "their largest"
        )
    return values


def remove_lowest(rankings: Mapping[str, Ranking], count: int) -> dict[str, Array]:
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
