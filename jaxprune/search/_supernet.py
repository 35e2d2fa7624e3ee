"""Supernets: one trained network judged at any widths, by masks, without compiling."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.core._checks import finite
from jaxprune.core._groups import Groups
from jaxprune.core._limits import selected
from jaxprune.core._masks import apply_masks, expand_masks
from jaxprune.core._names import listed
from jaxprune.core._types import ApplyFn, PyTree
from jaxprune.costing import Cost
from jaxprune.search._counts import Counts
from jaxprune.search._sampling import Side
from jaxprune.select._units import to_sizes
from jaxprune.statistics._recalibration import recalibrate


def side_masks(
    groups: Groups, counts: Mapping[str, object], side: Side = "first"
) -> Any:
    """Masks that keep the first, or the last, units of every group.

    Of a balanced group as many of every block.

    Args:
        groups: what `trace` returned.
        counts: group name -> how many units stay; may be traced, so that one compiled
            program serves all widths.
        side: which end of a group stays.

    Returns:
        Masks like the traced variables.

    Raises:
        ValueError: if a name is no group or `side` is neither.

    Example:
        >>> import jax.numpy as jnp, jaxprune
        >>> mlp = lambda params, x: x @ params["w1"] @ params["w2"]
        >>> params = {"w1": jnp.ones((1, 3)), "w2": jnp.ones((3, 1))}
        >>> groups = jaxprune.trace(mlp, params, jnp.ones((1, 1)))
        >>> side_masks(groups, {"w1:1": 1}, "last")["w1"]
        array([[False, False,  True]])
    """
    if side not in ("first", "last"):
        raise ValueError(f"side must be 'first' or 'last', got {side!r}")
    keep = {}
    for name, count in counts.items():
        selected(groups, name, "groups")
        parts = groups[name].blocks
        places = np.arange(groups[name].size // parts)
        places = places if side == "first" else places[::-1].copy()
        own = jnp.asarray(places, jnp.int32) < jnp.asarray(count, jnp.int32) // parts
        keep[name] = jnp.tile(own, parts)
    return expand_masks(groups, keep)


def masked_error(
    groups: Groups,
    loss_fn: Callable[[PyTree, Any], jax.Array],
    variables: PyTree,
    batch: PyTree,
    *,
    sides: Sequence[Side] = ("first",),
) -> Callable[[Mapping[str, int]], float]:
    """The loss of a network at any widths, on one batch; compiled once for all.

    Args:
        groups: what `trace` returned, for variables whose most important units come
            first (`Slimmable.variables` without private leaves, or `permute`).
        loss_fn: ``(variables, batch) -> scalar``; with BatchNorm in training mode, so
            that statistics are those of the batch.
        variables: tree that was traced.
        batch: what the loss takes.
        sides: which ends of the groups stay; the loss is the mean over these, for a
            bilaterally coupled supernet (`bilateral_step`) that of both.

    Returns:
        ``counts -> loss``; counts name the groups that are cut, always the same ones.

    Example:
        >>> import jax.numpy as jnp, jaxprune
        >>> mlp = lambda params, x: (x @ params["w1"] @ params["w2"]).sum()
        >>> params = {"w1": jnp.ones((1, 3)), "w2": jnp.ones((3, 1))}
        >>> groups = jaxprune.trace(mlp, params, jnp.ones((1, 1)))
        >>> error = masked_error(groups, mlp, params, jnp.ones((1, 1)))
        >>> error({"w1:1": 3}), error({"w1:1": 1})
        (3.0, 1.0)
    """

    @jax.jit
    def loss(counts: Mapping[str, Any], variables: PyTree, batch: PyTree) -> jax.Array:
        masks = [side_masks(groups, counts, side) for side in sides]
        losses = [loss_fn(apply_masks(variables, each), batch) for each in masks]
        return sum(losses[1:], losses[0]) / len(losses)

    def error(counts: Mapping[str, int]) -> float:
        arrays = {name: np.int32(count) for name, count in counts.items()}
        return float(loss(arrays, variables, batch))

    return error


def evaluator(
    apply_fn: ApplyFn,
    groups: Groups,
    variables: PyTree,
    measure: Callable[[PyTree], Any],
    *,
    batches: Iterable[PyTree] | None = None,
    scores: Mapping[str, Any] | None = None,
    **kwargs: PyTree,
) -> Callable[[Mapping[str, int]], float]:
    """How good a network is at given widths, its BatchNorm statistics measured anew.

    Args:
        apply_fn: the function, called as in `jaxprune.recalibrate`.
        groups: what `trace` returned.
        variables: its variables.
        measure: masked variables -> a number, larger is better, such as accuracy on
            held-out images; jit-compiled by whoever writes it.
        batches: inputs for `jaxprune.recalibrate`; None to leave statistics.
        scores: group name -> float ``[size]``: a width keeps the highest; None for
            the first units of every group.
        **kwargs: how the function is called in training mode.

    Returns:
        ``counts -> number``; remembers what it has measured.
    """
    seen: dict[tuple[tuple[str, int], ...], float] = {}
    held = None if batches is None else list(batches)

    def judge(counts: Mapping[str, int]) -> float:
        key = tuple(sorted((name, int(count)) for name, count in counts.items()))
        if key not in seen:
            if scores is None:
                masks = side_masks(groups, counts)
            else:
                masks = expand_masks(groups, to_sizes(groups, scores, counts))
            found = apply_masks(variables, masks)
            if held is not None:
                found = recalibrate(apply_fn, found, held, **kwargs)
            seen[key] = float(measure(found))
        return seen[key]

    return judge


def greedy_slimming(
    groups: Groups,
    error: Callable[[Mapping[str, int]], float],
    cost: Cost,
    budgets: Iterable[float],
    *,
    steps: int = 12,
    only: str | Any | None = None,
) -> list[Counts]:
    """Slims the group whose slimming costs least accuracy, again and again.

    Every group loses units in `steps` equal portions. In each turn every group is
    tried one portion smaller, and the one with the lowest error stays so. The widths
    are recorded when the cost first falls to a budget.

    Args:
        groups: what `trace` returned.
        error: counts -> error, such as `masked_error` of a trained slimmable network.
        cost: what is to be spent: ``cost_model(...).multiply_adds``.
        budgets: the highest costs allowed.
        steps: into how many portions a group is divided.
        only: names, labels or patterns of the groups to slim; None for all.

    Returns:
        For every budget, the largest first, group name -> count.

    Raises:
        ValueError: if a budget is below the cost of one portion of every group, or is
            no finite number.

    Example:
        >>> import jax.numpy as jnp, jaxprune
        >>> mlp = lambda p, x: x @ p["a"] @ p["b"] @ p["c"]
        >>> shapes = {"a": (4, 4), "b": (4, 4), "c": (4, 1)}
        >>> params = {name: jnp.ones(shape) for name, shape in shapes.items()}
        >>> groups = jaxprune.trace(mlp, params, jnp.ones((1, 4)))
        >>> model = jaxprune.cost_model(mlp, params, jnp.ones((1, 4)), groups=groups)
        >>> error = lambda counts: -2.0 * counts["a:1"] - counts["b:1"]  # b is cheaper
        >>> greedy_slimming(groups, error, model.multiply_adds, [25], steps=4)
        [{'a:1': 4, 'b:1': 1}]

    References:
        Yu and Huang, `AutoSlim: Towards One-Shot Architecture Search for Channel
        Numbers <https://arxiv.org/abs/1903.11728>`_, 2019
    """
    if not isinstance(budgets, Iterable):
        raise TypeError(f"budgets must be a sequence of costs, got {budgets}")
    limits = sorted((finite("budgets", each) for each in budgets), reverse=True)
    names = selected(groups, only, "groups")
    portion = {name: _portion(groups, name, steps) for name in names}
    counts = {name: groups[name].size for name in names}
    found = []
    for budget in limits:
        while cost.value(counts) > budget:
            tries = [
                {**counts, name: counts[name] - portion[name]}
                for name in names
                if counts[name] > portion[name]
            ]
            if not tries:
                raise ValueError(
                    f"a budget of {budget:g} is below the least cost, "
                    f"{cost.value(counts):g}, which one of {steps} portions of every "
                    f"group leaves: {listed([f'{n} {k}' for n, k in counts.items()])}"
                )
            counts = min(tries, key=error)
        found.append(dict(counts))
    return found


def _portion(groups: Groups, name: str, steps: int) -> int:
    parts = groups[name].blocks
    return parts * max(1, groups[name].size // parts // steps)
