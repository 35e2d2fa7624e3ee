"""One unit at a time, for methods that score anew after every removal."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from jaxprune.core._checks import concrete_array, concrete_bools
from jaxprune.core._groups import Groups
from jaxprune.core._limits import Each
from jaxprune.core._positions import BoolArray
from jaxprune.core._types import Array
from jaxprune.costing import Cost
from jaxprune.select._queue import queues

# Below every score; so low that many of them still have a finite sum.
_GONE = float(np.finfo(np.float64).min) / 2**32


def remove_one(
    groups: Groups,
    scores: Mapping[str, Array],
    cost: Cost,
    keep: Mapping[str, BoolArray] | None = None,
    *,
    min_keep: Each[int] = 1,
    multiple_of: Each[int] = 1,
    max_sparsity: Each[float] = 1.0,
    only: str | Sequence[str] | None = None,
) -> dict[str, np.ndarray]:
    """Removes the one unit with the least score per cost that it saves.

    For methods that score anew after every removal. With ``multiple_of > 1`` one block
    goes, the lowest units of a group down to the next multiple.

    Args:
        groups: what `trace` returned.
        scores: group name -> float ``[size]``, larger matters more; those of units
            that are gone do not matter.
        cost: what a unit saves, at the sizes still there.
        keep: what is still there, group name -> bool ``[size]``; None for all.
        min_keep: as for `to_budget`.
        multiple_of: as for `to_budget`.
        max_sparsity: as for `to_budget`, of the full size.
        only: as for `to_budget`.

    Returns:
        Group name -> bool ``[size]``, True = kept, for the selected groups.

    Raises:
        ValueError: if the limits allow no group to lose more, or as `to_budget`.
        TypeError: if scores or `keep` are traced, or `keep` is not boolean.

    Example:
        Group Fisher pruning accumulates scores between two removals, until the cost
        is met; here the scores stay as they are.

        >>> import jax, jax.numpy as jnp, numpy as np, jaxprune
        >>> def mlp(params, x):
        ...     return jax.nn.relu(x @ params["a"]) @ params["b"]
        >>> params = {"a": jnp.ones((4, 8)), "b": jnp.ones((8, 2))}
        >>> groups = jaxprune.trace(mlp, params, jnp.ones((1, 4)))
        >>> memory = jaxprune.cost_model(mlp, params, jnp.ones((1, 4))).activation_bytes
        >>> keep = {name: np.ones(group.size, bool) for name, group in groups.items()}
        >>> sizes = {}
        >>> while memory.value(sizes) > 0.5 * memory.full:
        ...     scores = {name: np.arange(8.0) for name in groups}
        ...     keep = remove_one(groups, scores, memory, keep)
        ...     sizes = {name: int(units.sum()) for name, units in keep.items()}
        >>> sizes
        {'a:1': 3}

    References:
        Liu et al., `Group Fisher Pruning for Practical Network Compression
        <https://arxiv.org/abs/2108.00708>`_, 2021
    """
    there = {name: np.ones(group.size, bool) for name, group in groups.items()}
    there |= {n: concrete_bools(f"keep[{n}]", k) for n, k in (keep or {}).items()}
    # What is gone already leaves first, so that a queue can be entered half way.
    masked = {
        name: np.where(
            units,
            concrete_array(f"scores[{name}]", scores[name]).astype(np.float64),
            _GONE,
        )
        for name, units in there.items()
        if name in scores
    }
    found = queues(groups, masked, cost, only, min_keep, multiple_of, max_sparsity)
    left = {name: int(there[name].sum()) for name in found}
    options = {}
    for name, q in found.items():
        lower = q.widths[q.widths < left[name]]
        if len(lower):
            gone = q.order[len(q.order) - left[name] : len(q.order) - lower[0]]
            saved = cost.value(left) - cost.value({**left, name: int(lower[0])})
            loss = float(q.scores[gone].sum())
            options[name] = (loss / saved if saved > 0 else math.inf, int(lower[0]))
    if not options:
        raise ValueError("no group can lose another unit within the limits")
    best = min(options, key=lambda name: options[name][0])
    return {
        name: q.keep(options[best][1] if name == best else left[name])
        for name, q in found.items()
    }
