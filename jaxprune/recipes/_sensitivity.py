"""Sensitivity: how a metric falls when one group alone loses units."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import select
from jaxprune.core._groups import Groups
from jaxprune.core._limits import Each
from jaxprune.core._masks import apply_masks, expand_masks
from jaxprune.core._positions import BoolArray
from jaxprune.core._progress import advancing
from jaxprune.core._types import Array, PyTree

_MEMORY = 1 << 30  # bytes that the copies of the variables may take


@dataclasses.dataclass(frozen=True, eq=False)
class Sensitivity:
    """A metric for every group, at every sparsity of that group alone.

    Attributes:
        groups: the names, in order.
        sparsity: ``[groups, points]``, the fraction of the units that went.
        value: ``[groups, points]``, the metric.
        baseline: the metric when nothing goes.
    """

    groups: tuple[str, ...]
    sparsity: np.ndarray
    value: np.ndarray
    baseline: float

    def within(self, drop: float) -> dict[str, float]:
        """The largest sparsity of each group up to which the metric stays.

        Args:
            drop: how much less than the baseline the metric may be.

        Returns:
            Group name -> sparsity, for `per_group`: the last point before the first
            that loses more; 0 if all do.

        Example:
            >>> points, values = np.array([[0.25, 0.5]]), np.array([[0.9, 0.6]])
            >>> Sensitivity(("h",), points, values, 0.92).within(0.05)
            {'h': 0.25}
        """
        kept = np.minimum.accumulate(self.value >= self.baseline - drop, axis=1)
        best = np.where(kept, self.sparsity, 0.0).max(axis=1, initial=0.0)
        return dict(zip(self.groups, best.tolist(), strict=True))


def sensitivity(
    metric: Callable[..., object],
    variables: PyTree,
    groups: Groups,
    scores: Mapping[str, Array],
    *,
    sparsities: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    data: Iterable[object] | None = None,
    only: str | Sequence[str] | None = None,
    min_keep: Each[int] = 1,
    multiple_of: Each[int] = 1,
    max_sparsity: Each[float] = 1.0,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> Sensitivity:
    """Measures a metric with every group pruned alone, to several sparsities.

    All cuts run in one compiled program, under masks: `batch_size` of them at once, one
    such batch after the other.

    Args:
        metric: ``metric(variables) -> scalar``, larger is better; jit-able. With
            `data`, ``metric(variables, batch)``, averaged over the batches.
        variables: the variables that `groups` were traced with.
        groups: what `trace` returned.
        scores: group name -> float ``[size]``, larger matters more (`group_scores`).
        sparsities: fractions of a group to remove, ascending.
        data: batches of equal shapes, each a tree of arrays; read once.
        only: names, labels or patterns of the groups to scan; None for all.
        min_keep: as for `per_group`.
        multiple_of: as for `per_group`.
        max_sparsity: as for `per_group`.
        batch_size: how many cuts run at once; each holds a copy of the variables and
            of its activations. None: as many as keep these copies below 1 GiB, 16 at
            most.
        progress: show a progress bar? None for on a terminal.

    Returns:
        The metric for every group and point, and the fractions that really went.

    Raises:
        ValueError: if there are no batches, the sparsities do not ascend, or as
            `per_group`.

    Example:
        >>> import jax.numpy as jnp, jaxprune
        >>> def mlp(params, x):
        ...     return jax.nn.relu(x @ params["w1"]) @ params["w2"]
        >>> params = {"w1": jnp.ones((3, 4)), "w2": jnp.arange(4.0)[:, None]}
        >>> groups = jaxprune.trace(mlp, params, jnp.ones((1, 3)))
        >>> scan = sensitivity(lambda p: mlp(p, jnp.ones((1, 3))).sum(), params, groups,
        ...                    {"w1:1": np.arange(4.0)}, sparsities=[0.25, 0.5])
        >>> scan.baseline, scan.value.tolist(), scan.within(drop=5.0)
        (18.0, [[18.0, 15.0]], {'w1:1': 0.5})

    References:
        Li et al., `Pruning Filters for Efficient ConvNets
        <https://arxiv.org/abs/1608.08710>`_, 2016
    """
    points = list(sparsities)
    if not points or sorted(points) != points:
        raise ValueError(
            f"sparsities must be one or more numbers in ascending order, got {points}"
        )
    limits = {
        "min_keep": min_keep,
        "multiple_of": multiple_of,
        "max_sparsity": max_sparsity,
        "only": only,
    }
    cuts = [select.per_group(groups, scores, sparsity=s, **limits) for s in points]
    names = tuple(cuts[0])
    keep = _one_at_a_time(cuts, names)
    run = _compiled(metric, groups)
    rows = 1 + len(names) * len(cuts)
    parts = list(_parts(keep, rows, min(batch_size or _fitting(variables), rows)))
    batches = ((),) if data is None else ((batch,) for batch in data)
    known = len(data) if isinstance(data, Sized) else 1 if data is None else None
    total, number = np.zeros(rows), 0
    with advancing("sensitivity", known and known * len(parts), progress) as advance:
        for batch in batches:
            number += 1
            for place, some in parts:
                total[place] += run(variables, some, *batch)[: len(total[place])]
                advance()
    if not number:
        raise ValueError("data has no batches, so there is nothing to measure")
    values = total / number
    gone = [[1 - np.mean(cut[name]) for cut in cuts] for name in names]
    return Sensitivity(
        names,
        np.array(gone).reshape(len(names), len(points)),
        values[1:].reshape(len(names), len(points)),
        float(values[0]),
    )


def plot_sensitivity(axes: Any, scan: Sensitivity, colors: Sequence[str] = ()) -> None:
    """Draws the metric of every group against the sparsity of that group alone.

    Args:
        axes: matplotlib axes.
        scan: what `sensitivity` measured.
        colors: one for every group; matplotlib's own if there are none.
    """
    for k, name in enumerate(scan.groups):
        x, y = np.r_[0.0, scan.sparsity[k]], np.r_[scan.baseline, scan.value[k]]
        color = {"color": colors[k]} if len(colors) else {}
        axes.plot(x, y, lw=1.6, marker="o", ms=3.5, label=name, **color)
    axes.axhline(scan.baseline, color="#71717a", lw=0.8, ls="--")
    axes.set_xlabel("fraction of the group removed")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e4e7", lw=0.8)
    axes.set_axisbelow(True)


def _one_at_a_time(
    cuts: Sequence[Mapping[str, object]], names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Group name -> ``[1 + groups * points, size]``: all kept, then every cut alone."""
    rows = 1 + len(names) * len(cuts)
    keep = {}
    for k, name in enumerate(names):
        each = np.stack([np.asarray(cut[name]) for cut in cuts])
        keep[name] = np.ones((rows, each.shape[1]), bool)
        keep[name][1 + k * len(cuts) : 1 + (k + 1) * len(cuts)] = each
    return keep


def _parts(
    keep: Mapping[str, np.ndarray], rows: int, together: int
) -> Iterator[tuple[slice, dict[str, np.ndarray]]]:
    """So many rows of `keep` at a time; the last again, that all have one shape."""
    for start in range(0, rows, together):
        chosen = np.minimum(np.arange(start, start + together), rows - 1)
        some = {name: units[chosen] for name, units in keep.items()}
        yield slice(start, min(start + together, rows)), some


def _compiled(metric: Callable[..., object], groups: Groups) -> Any:
    @jax.jit
    def run(
        variables: PyTree, keep: Mapping[str, BoolArray], *batch: PyTree
    ) -> jax.Array:
        def one(units: Mapping[str, Any]) -> jax.Array:
            masks = expand_masks(groups, units)
            value = metric(apply_masks(variables, masks), *batch)
            return jnp.asarray(value, jnp.float32)

        return jax.vmap(one)(keep)

    return run


def _fitting(variables: PyTree) -> int:
    leaves = jax.tree.leaves(variables)
    held = sum(np.size(leaf) * jnp.result_type(leaf).itemsize for leaf in leaves)
    return int(np.clip(_MEMORY // max(held, 1), 1, 16))
