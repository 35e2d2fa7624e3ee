"""AdaPruner: from a budget to widths, and to the criterion that inherits best."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxprune.core._groups import Groups
from jaxprune.core._limits import selected
from jaxprune.costing import Cost
from jaxprune.select import bisect
from jaxprune.select._units import to_sizes


class Inherited(NamedTuple):
    """What `adapruner` chose.

    Attributes:
        counts: group name -> how many units stay.
        keep: group name -> bool ``[size]``, True = kept, by the best criterion.
        criterion: its name.
        values: name -> what every criterion was worth.
    """

    counts: Mapping[str, int]
    keep: Mapping[str, np.ndarray]
    criterion: str
    values: Mapping[str, float]


def adapruner(
    groups: Groups,
    importance: Mapping[str, Any],
    cost: Cost,
    *,
    budget: float,
    candidates: Mapping[str, Mapping[str, Any]],
    measure: Callable[[Mapping[str, np.ndarray]], float],
) -> Inherited:
    r"""Widths by one number that meets a budget, then the best of several criteria.

    A group of mean importance :math:`I_l` (relative to the largest) keeps the share
    :math:`\min(1, r I_l)` of its units; r is found by bisection. Each candidate then
    chooses which units, and a quick evaluation which candidate.

    Args:
        groups: what `trace` returned.
        importance: group name -> float ``[size]``, at least 0: BatchNorm scales after
            training with an L1 penalty on them.
        cost: what is to be spent.
        budget: the highest cost allowed.
        candidates: name of a criterion -> scores ``{group: float[size]}``.
        measure: keep -> number, larger is better: accuracy with statistics measured
            anew.

    Returns:
        The decision; no candidate is worth more by `measure`.

    Raises:
        ValueError: if the budget is below the cost of one unit in every group, there
            are no candidates, or a group has no importance.

    Example:
        >>> import jax.numpy as jnp, jaxprune
        >>> mlp = lambda p, x: x @ p["a"] @ p["b"] @ p["c"]
        >>> shapes = {"a": (4, 4), "b": (4, 4), "c": (4, 1)}
        >>> params = {name: jnp.ones(shape) for name, shape in shapes.items()}
        >>> groups = jaxprune.trace(mlp, params, jnp.ones((1, 4)))
        >>> model = jaxprune.cost_model(mlp, params, jnp.ones((1, 4)), groups=groups)
        >>> found = adapruner(
        ...     groups, {"a:1": np.full(4, 2.0), "b:1": np.ones(4)},
        ...     model.multiply_adds, budget=22,
        ...     candidates={"up": dict.fromkeys(groups, np.arange(4.0)),
        ...                 "down": dict.fromkeys(groups, -np.arange(4.0))},
        ...     measure=lambda keep: float(keep["a:1"][0]))
        >>> found.counts, found.criterion
        ({'a:1': 3, 'b:1': 2}, 'down')

    References:
        Liu et al., `AdaPruner <https://arxiv.org/abs/2109.06397>`_, 2021. Its map from
        importance to keep ratios is this one in spirit, not to the letter.
    """
    if not candidates:
        raise ValueError("candidates is empty; give at least one criterion")
    for name in importance:
        selected(groups, name, "groups")
    means = {name: float(np.mean(own)) for name, own in importance.items()}
    low = [name for name, mean in means.items() if not mean > 0]
    if low:
        raise ValueError(
            f"the mean importance of the units of {low[0]} must be above 0, got "
            f"{means[low[0]]}"
        )
    top = max(means.values())

    def widths(ratio: float) -> dict[str, int]:
        return {n: _count(groups, n, ratio * mean / top) for n, mean in means.items()}

    high = top / min(means.values())
    counts = bisect(widths, cost, budget=budget, low=0.0, high=high)
    keeps = {
        name: {
            group: np.asarray(units)
            for group, units in to_sizes(groups, own, counts).items()
        }
        for name, own in candidates.items()
    }
    values = {name: float(measure(keep)) for name, keep in keeps.items()}
    best = max(values, key=lambda name: values[name])
    return Inherited(counts, keeps[best], best, values)


def _count(groups: Groups, name: str, share: float) -> int:
    parts = groups[name].blocks
    slots = groups[name].size // parts
    return parts * min(slots, max(1, round(share * slots)))
