"""Clusters of units that say the same: hierarchical clustering of their activations."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import scipy.cluster.hierarchy
import scipy.spatial.distance

from jaxprune.core._checks import finite
from jaxprune.core._clusters import check_mergeable
from jaxprune.core._groups import Groups
from jaxprune.core._limits import selected
from jaxprune.core._masks import PyTree
from jaxprune.costing import Cost
from jaxprune.statistics import moments
from jaxprune.statistics._streaming import Batches

Linkage = Literal["average", "complete"]


def distances(
    groups: Groups,
    apply_fn: Callable[..., object],
    variables: PyTree,
    batches: Batches,
    *,
    only: str | Sequence[str] | None = None,
    progress: bool | None = None,
) -> dict[str, np.ndarray]:
    r"""How far the activations of every two units of a group are apart.

    .. math:: d_{ij} = E \| x_i - x_j \|^2 = S_{ii} + S_{jj} - 2 S_{ij}

    with S the second moments of what the layers that read them take in, after their
    nonlinearity, summed over windows and layers, and divided by the mean over pairs, so
    that groups compare. The paper derives this expectation from BatchNorm's parameters
    and a correlation; here it is measured.

    Args:
        groups: what ``trace(..., roles=True)`` returned.
        apply_fn: ``(variables, batch) -> anything``.
        variables: tree of arrays that `groups` was traced with.
        batches: trees of arrays.
        only: names, labels or patterns of the groups; None for all whose units can be
            merged and that contractions read.
        progress: show a progress bar? None for on a terminal.

    Returns:
        Group name -> float64 ``[size, size]``, symmetric, 0 on the diagonal.

    Raises:
        ValueError: if a group that is asked for cannot be merged or is read by no
            contraction, or there are no batches.

    Example:
        >>> import jax.numpy as jnp, jaxprune
        >>> def net(params, x):
        ...     return jnp.maximum(x @ params["w1"], 0) @ params["w2"]
        >>> params = {"w1": jnp.array([[1.0, 2.0, 1.0]]), "w2": jnp.ones((3, 1))}
        >>> groups = jaxprune.trace(net, params, jnp.ones((1, 1)), roles=True)
        >>> distances(groups, net, params, [jnp.array([[1.0], [3.0]])])["w1:1"]
        array([[0. , 1.5, 0. ],
               [1.5, 0. , 1.5],
               [0. , 1.5, 0. ]])

    References:
        Channel similarity pruning, `arXiv 1908.02620
        <https://arxiv.org/abs/1908.02620>`_, 2019
    """
    if only is None:
        names = [n for n, g in groups.items() if not g.obstacle and g.blocks == 1]
    else:
        names = list(selected(groups, only))
        for name in names:
            check_mergeable(groups, name)
    found: dict[str, np.ndarray] = {}
    for one in moments(apply_fn, variables, batches, groups=groups, progress=progress):
        for name in set(names) & set(one.units):
            for second, units in zip(one.second, one.units[name], strict=True):
                own = _apart(second, units, groups[name].size)
                found[name] = found.get(name, 0.0) + own
    if only is not None and set(names) - set(found):
        raise ValueError(
            f"no contraction reads {min(set(names) - set(found))} through a parameter "
            "as it is, so its units have no activations to compare"
        )
    return {name: _scaled(found[name]) for name in names if name in found}


def _apart(second: np.ndarray, units: np.ndarray, size: int) -> np.ndarray:
    """The sum over the window of the squared distances of all pairs."""
    total = np.zeros((size, size))
    places = [np.flatnonzero(units == unit) for unit in range(size)]
    for tap in range(min(map(len, places))):
        own = np.array([place[tap] for place in places])
        # |a - b|² = |a|² + |b|² - 2 a·b, which rounding may leave below 0.
        gram = second[np.ix_(own, own)]
        total += gram.diagonal()[:, None] + gram.diagonal() - 2 * gram
    return np.maximum(total, 0.0)


def _scaled(apart: np.ndarray) -> np.ndarray:
    size = len(apart)
    apart = (apart + apart.T) / 2
    np.fill_diagonal(apart, 0.0)
    mean = apart.sum() / max(size * (size - 1), 1)
    return apart / mean if mean else apart


def similar(
    groups: Groups,
    distances: Mapping[str, np.ndarray],
    *,
    threshold: float | None = None,
    cost: Cost | None = None,
    budget: float | None = None,
    linkage: Linkage = "average",
) -> dict[str, np.ndarray]:
    """Puts units whose activations are alike into one cluster, for `merge`.

    Agglomerative clustering of every group, cut at one distance for all: the one given,
    or the smallest at which the merged net is within a budget.

    Args:
        groups: what ``trace(..., roles=True)`` returned.
        distances: group name -> float ``[size, size]``.
        threshold: the distance up to which clusters are joined.
        cost: instead, what is to be spent, and
        budget: the highest cost allowed.
        linkage: the distance of two clusters: of their units on "average", or of the
            two that are furthest apart, "complete".

    Returns:
        Group name -> int32 ``[size]``, the cluster of every unit.

    Raises:
        ValueError: if neither or both of a threshold and a budget are given, or the
            budget cannot be met.

    Example:
        >>> import jax.numpy as jnp, jaxprune
        >>> def net(params, x):
        ...     return jnp.maximum(x @ params["w1"], 0) @ params["w2"]
        >>> params = {"w1": jnp.ones((1, 3)), "w2": jnp.ones((3, 1))}
        >>> groups = jaxprune.trace(net, params, jnp.ones((1, 1)), roles=True)
        >>> apart = np.array([[0, 2.0, 0], [2.0, 0, 2.0], [0, 2.0, 0]])
        >>> similar(groups, {"w1:1": apart}, threshold=0.1)
        {'w1:1': array([0, 1, 0], dtype=int32)}
    """
    if (threshold is None) == (budget is None) or (cost is None) != (budget is None):
        raise ValueError("give either threshold, or cost and budget")
    for name in distances:
        check_mergeable(groups, name)
    trees = {
        name: scipy.cluster.hierarchy.linkage(
            scipy.spatial.distance.squareform(apart, checks=False), method=linkage
        )
        for name, apart in distances.items()
        if len(apart) > 1
    }
    if cost is not None and budget is not None:
        threshold = _within(trees, cost, finite("budget", budget))
    assert threshold is not None  # one of the two is given
    return {name: _cut(tree, threshold) for name, tree in trees.items()}


def _within(trees: Mapping[str, np.ndarray], cost: Cost, budget: float) -> float:
    """The smallest height of any join whose widths are within a budget."""

    def spent(height: float) -> float:
        widths = {
            n: len(tree) + 1 - int((tree[:, 2] <= height).sum())
            for n, tree in trees.items()
        }
        return float(cost.value(widths))

    heights = np.unique(np.concatenate([[-1.0], *(t[:, 2] for t in trees.values())]))
    low, high = 0, len(heights) - 1
    if spent(heights[high]) > budget:
        raise ValueError(
            f"budget={budget:g} cannot be met: with one cluster for every group the "
            f"cost is {spent(heights[high]):g} of {float(cost.full):g}"
        )
    while low < high:
        middle = (low + high) // 2
        fits = spent(heights[middle]) <= budget
        low, high = (low, middle) if fits else (middle + 1, high)
    return float(heights[low])


def _cut(tree: np.ndarray, threshold: float) -> np.ndarray:
    """Clusters numbered in the order of their first units."""
    ids = np.arange(len(tree) + 1)
    if threshold >= 0:
        ids = scipy.cluster.hierarchy.fcluster(tree, threshold, criterion="distance")
    # `unique` sorts clusters by id; they are renumbered by where they begin.
    _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse].astype(np.int32)
