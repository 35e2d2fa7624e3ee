"""Channels and layers by one threshold on their gates, so that both shares adapt."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxprune.core._branches import without_branches
from jaxprune.core._checks import finite, number
from jaxprune.core._groups import Groups
from jaxprune.core._limits import fraction, selected
from jaxprune.costing import Cost
from jaxprune.select._ranking import unit_scores


def adaptive(
    groups: Groups,
    scales: Mapping[str, Any],
    gates: Mapping[str, Any],
    *,
    threshold: float | None = None,
    cost: Cost | None = None,
    budget: float | None = None,
    least: float = 0.0,
) -> dict[str, np.ndarray]:
    r"""Cuts channels and whole residual branches by one threshold on their gates.

    A channel goes if :math:`|\gamma| < \alpha \max |\gamma|` of its layer, a branch if
    its gate is that much smaller than the largest of all gates, or is 0, or too few of
    its channels are left. How many of each go is so learned by what trains the gates,
    an L1 norm on both: layers have thresholds of their own, by what they have learned.

    Args:
        groups: what ``trace(..., writers="*")`` returned.
        scales: group name -> float ``[size]``, gates of channels, such as
            ``group_scores(groups, scores.batch_norm_scale(params), reduce="l1")``;
            groups that are not named stay whole, unless their branch goes.
        gates: branch -> a number (`taps.gate_branches`); branches that are not named
            stay, unless too few of their channels do.
        threshold: alpha, in [0, 1]; or
        cost: what is to be spent, and
        budget: the highest cost allowed, which the smallest alpha is found for.
        least: a branch also goes if no more than this fraction of the channels in
            `scales` that it consists of are left.

    Returns:
        Group name -> bool ``[size]``, True = kept, for all groups that lose units. Of a
        group outside of branches one unit stays at least.

    Raises:
        ValueError: if neither or both of a threshold and a budget are given, the
            budget cannot be met, a number is out of range, or a group or a branch does
            not exist.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprune
        >>> def net(params, x):
        ...     h = x @ params["stem"]
        ...     h = h + jax.nn.relu(h @ params["block/up"]) @ params["block/down"]
        ...     return h @ params["head"]
        >>> shapes = {"stem": (2, 4), "block/up": (4, 3), "block/down": (3, 4),
        ...           "head": (4, 1)}
        >>> params = {name: jnp.ones(shape) for name, shape in shapes.items()}
        >>> groups = jaxprune.trace(net, params, jnp.ones((1, 2)), writers="*")
        >>> scales = {"block/up:1": np.array([2.0, 0.1, 1.0])}
        >>> adaptive(groups, scales, {"block": 0.5}, threshold=0.2)
        {'block/up:1': array([ True, False,  True])}
        >>> sorted(adaptive(groups, scales, {"block": 0.0}, threshold=0.2))
        ['block/down:1', 'block/up:1']

    References:
        Liu et al., `Learning Efficient Convolutional Networks through Network Slimming
        <https://arxiv.org/abs/1708.06519>`_, 2017 (gates of channels); Huang and Wang,
        `Data-Driven Sparse Structure Selection for Deep Neural Networks
        <https://arxiv.org/abs/1707.01213>`_, 2018 (gates of blocks)
    """
    if (threshold is None) == (budget is None) or (cost is None) != (budget is None):
        raise ValueError("give either threshold, or cost and budget")
    least = fraction("least", least)
    for name in scales:
        selected(groups, name)
    shares = {
        name: _shares(np.asarray(unit_scores(name, groups[name].size, scales)))
        for name in scales
    }
    whole = {name: abs(float(number(f"gates[{name}]", x))) for name, x in gates.items()}
    without_branches(groups, *whole)  # says if one does not exist
    largest = max(whole.values(), default=0.0)
    branches = {name: x / largest if largest else 0.0 for name, x in whole.items()}

    def decided(alpha: float) -> dict[str, np.ndarray]:
        return _decided(groups, shares, branches, alpha, least)

    if cost is not None and budget is not None:
        levels = np.unique(
            np.concatenate([[0.0], *shares.values(), list(branches.values())])
        )
        return _within(decided, levels, groups, cost, finite("budget", budget))
    assert threshold is not None  # one of the two is given
    return decided(fraction("threshold", threshold))


def _shares(scales: np.ndarray) -> np.ndarray:
    sizes = np.abs(scales.astype(np.float64))
    return sizes / (sizes.max() or 1.0)


def _decided(
    groups: Groups,
    shares: Mapping[str, np.ndarray],
    branches: Mapping[str, float],
    alpha: float,
    least: float,
) -> dict[str, np.ndarray]:
    keep = {name: own >= alpha for name, own in shares.items()}
    for name, kept in keep.items():
        if not kept.any():
            kept[np.argmax(shares[name])] = True
    gone = [name for name, gate in branches.items() if not gate or gate < alpha]
    for name, own in groups.branches.items():
        channels = [keep[group] for group in own if group in keep]
        if channels and least and np.concatenate(channels).mean() <= least:
            gone.append(name)
    keep |= without_branches(groups, *gone)
    return {name: kept for name, kept in keep.items() if not kept.all()}


def _within(
    decided: Any, levels: Iterable[float], groups: Groups, cost: Cost, budget: float
) -> dict[str, np.ndarray]:
    """The decision of the smallest threshold that is within a budget."""
    # Just above a level, what lies on it goes.
    alphas = [0.0, *(float(np.nextafter(level, 2)) for level in levels)]

    def spent(alpha: float) -> float:
        sizes = {name: group.size for name, group in groups.items()}
        sizes |= {name: int(kept.sum()) for name, kept in decided(alpha).items()}
        return float(cost.value(sizes))

    low, high = 0, len(alphas) - 1
    if spent(alphas[high]) > budget:
        raise ValueError(
            f"budget={budget:g} cannot be met: with one unit of every layer and no "
            f"branch that has a gate the cost is {spent(alphas[high]):g} of "
            f"{float(cost.full):g}"
        )
    while low < high:
        middle = (low + high) // 2
        fits = spent(alphas[middle]) <= budget
        low, high = (low, middle) if fits else (middle + 1, high)
    return decided(alphas[low])
