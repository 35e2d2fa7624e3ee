"""Layer by layer: choose units by what their readers lose, and make up for it.

LASSO channel pruning, ThiNet and pruning with compensation are one loop over groups in
the order of the program, from second moments of what reads each. They differ in how
units are chosen and in how their readers are mended.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jaxprune.core._groups import Groups
from jaxprune.core._leaves import named_leaves
from jaxprune.core._limits import fraction
from jaxprune.core._masks import apply_masks, expand_masks
from jaxprune.core._names import nearest
from jaxprune.core._types import ApplyFn, PyTree
from jaxprune.program._jaxprs import trace_program
from jaxprune.statistics._contractions import Contraction, contractions
from jaxprune.statistics._moments import Sums, peeked
from jaxprune.statistics._streaming import Batches, twice
from jaxprune.surgery._compensation import (
    Steps,
    fit,
    fit_in_waves,
    fittable,
    kept_weights,
    sums_of,
)
from jaxprune.surgery._consumers import scale_units
from jaxprune.surgery._reconstruction import (
    Part,
    greedy_backward,
    lasso,
    rank_units,
    unit_factors,
    unit_moments,
)

Method = Literal["compensation", "lasso", "thinet"]
METHODS = ("compensation", "lasso", "thinet")


class Reconstructed(NamedTuple):
    """A pruned net whose layers were mended.

    Attributes:
        variables: tree like those given, of the same shapes, 0 where masked; then
            `slice_params` and `narrow`.
        masks: tree of bools like `variables`, True = kept.
        keep: group name -> bool ``[size]``, True = kept.
    """

    variables: PyTree
    masks: PyTree
    keep: dict[str, np.ndarray]


def reconstruct(
    groups: Groups,
    apply_fn: ApplyFn,
    variables: PyTree,
    batches: Batches,
    *,
    sparsity: float | Mapping[str, float],
    method: Method = "compensation",
    ridge: float = 1e-6,
    progress: bool | None = None,
) -> Reconstructed:
    r"""Prunes group after group by what the layers that read it lose.

    Inputs are those of the net as pruned so far, outputs those of the original.

    * "compensation": units are ranked by how much of the outputs each explains after
      those before it, and the readers are fitted by least squares (Xie et al.).
    * "lasso": a factor for every unit under an L1 penalty, the fewest that are not 0;
      then the readers are fitted by least squares (He et al.).
    * "thinet": one by one the unit goes whose loss the outputs feel least; then one
      factor for every unit that stays is fitted and folded into the readers (Luo et
      al.).

    Args:
        groups: what ``trace(..., roles=True)`` returned.
        apply_fn: ``(variables, batch) -> anything``, as it is to be used.
        variables: tree of arrays that `groups` was traced with.
        batches: trees of arrays; a list, or an object that can be iterated again.
        sparsity: fraction to remove of every group that contractions read; or group
            name -> fraction, where groups that are not named are left alone.
        method: see above.
        ridge: of least squares, see `compensate`.
        progress: show progress bars? None for on a terminal.

    Returns:
        `Reconstructed`.

    Raises:
        ValueError: if the method is unknown, a group that is named is read by no
            contraction that can be fitted or comes in blocks, or batches run dry.

    Example:
        >>> import jax.numpy as jnp, jaxprune
        >>> def mlp(params, x):
        ...     return jnp.tanh(x @ params["w1"]) @ params["w2"]
        >>> params = {"w1": jnp.array([[1.0, -1.0]]), "w2": jnp.array([[2.0], [5.0]])}
        >>> x = jnp.array([[1.0], [2.0], [3.0]])
        >>> groups = jaxprune.trace(mlp, params, x, roles=True)
        >>> found = reconstruct(groups, mlp, params, [x], sparsity=0.5)
        >>> jnp.abs(mlp(found.variables, x) - mlp(params, x)).max() < 1e-4
        Array(True, dtype=bool)

    References:
        Xie et al., `Pruning with Compensation <https://arxiv.org/abs/2108.13728>`_,
        2021; He et al., `Channel Pruning for Accelerating Very Deep Neural Networks
        <https://arxiv.org/abs/1707.06168>`_, ICCV 2017; Luo et al., `ThiNet
        <https://arxiv.org/abs/1707.06342>`_, ICCV 2017
    """
    if method not in METHODS:
        raise ValueError(
            f"method must be one of {', '.join(METHODS)}, got {method!r}"
            f"{nearest(method, METHODS)}"
        )
    work = _Work(groups, apply_fn, variables, batches, progress)
    counts = _counts(work, sparsity)
    keep: dict[str, np.ndarray] = {}
    current, masks = variables, expand_masks(groups, keep)
    for name in work.order(counts):
        # Factors leave biases as they are.
        parts = work.parts(name, work.sums(name, current), method != "thinet")
        size = groups[name].size
        kept = _CHOICES[method](parts, size, counts[name])
        keep[name] = kept
        masks = expand_masks(groups, keep)
        current = apply_masks(current, masks)
        if method == "thinet":
            factors = unit_factors(*_grams(parts, size), kept)
            current = scale_units(current, groups, {name: factors})
        else:
            current = work.fitted(name, current, masks, ridge)
    return Reconstructed(apply_masks(current, masks), masks, keep)


class Searched(NamedTuple):
    """What `search_with_compensation` found.

    Attributes:
        variables: tree like those given, of the same shapes, 0 where masked.
        masks: tree of bools like `variables`, True = kept.
        keep: group name -> bool ``[size]``, True = kept.
        metrics: the metric of the whole net, then after every group.
    """

    variables: PyTree
    masks: PyTree
    keep: dict[str, np.ndarray]
    metrics: tuple[float, ...]


def search_with_compensation(
    groups: Groups,
    apply_fn: ApplyFn,
    variables: PyTree,
    batches: Batches,
    evaluate: Callable[[PyTree], Any],
    *,
    drop: float,
    max_sparsity: float = 0.9,
    steps: int = 6,
    ridge: float = 1e-6,
    rescale: bool = False,
    progress: bool | None = None,
) -> Searched:
    """Pruning with compensation: how far can every group be cut for a drop in a metric?

    Statistics and ranking are of the whole net. Group after group, in the order of the
    program, the lowest metric allowed falls by an equal share of `drop`, and bisection
    finds the largest sparsity whose compensated net is not below it. So the metric at
    the end is at most `drop` below that of the whole net, on what it is measured on.

    Args:
        groups: what ``trace(..., roles=True)`` returned.
        apply_fn: ``(variables, batch) -> anything``, as it is to be used.
        variables: tree of arrays that `groups` was traced with.
        batches: trees of arrays; a list, or an object that can be iterated again.
        evaluate: ``variables -> number``, larger is better; of masked variables.
        drop: how much lower the metric may be at the end, 0 or more.
        max_sparsity: no group loses more than this fraction.
        steps: of bisection, for every group.
        ridge: of least squares, see `compensate`.
        rescale: also scale every output to the variance that it had.
        progress: show progress bars? None for on a terminal.

    Returns:
        `Searched`.

    Raises:
        ValueError: if batches run dry, `drop` is negative, or no group is read by a
            contraction that can be fitted.

    References:
        Xie et al., `Pruning with Compensation: Efficient Channel Pruning for Deep
        Convolutional Neural Networks <https://arxiv.org/abs/2108.13728>`_, 2021
    """
    if not drop >= 0:
        raise ValueError(f"drop must be at least 0, got {drop}")
    most = fraction("max_sparsity", max_sparsity)
    work = _Work(groups, apply_fn, variables, batches, progress)
    order = work.order(work.readers)
    if not order:
        raise ValueError("no group is read by a contraction that can be fitted")
    metrics = [float(evaluate(variables))]
    least, options = metrics[0], {"ridge": ridge, "rescale": rescale}
    keep: dict[str, np.ndarray] = {}
    current, masks = variables, expand_masks(groups, keep)
    for name in order:
        least -= drop / len(order)
        size, sums = groups[name].size, work.sums(name, variables)
        ranked = rank_units(work.parts(name, sums), size)
        low, high, metric = 0.0, most, metrics[-1]
        best = current, masks, np.ones(size, bool)
        for _ in range(steps):
            middle = (low + high) / 2
            kept = np.isin(np.arange(size), ranked[: max(size - int(size * middle), 1)])
            new = expand_masks(groups, {**keep, name: kept})
            made = work.mended(name, apply_masks(current, new), new, sums, options)
            reached = float(evaluate(made))
            if reached >= least:
                low, metric, best = middle, reached, (made, new, kept)
            else:
                high = middle
        current, masks, keep[name] = best
        metrics.append(metric)
    return Searched(apply_masks(current, masks), masks, keep, tuple(metrics))


class _Work:
    """What both loops read: contractions, who reads which group, and data."""

    def __init__(
        self,
        groups: Groups,
        apply_fn: ApplyFn,
        variables: PyTree,
        batches: Batches,
        progress: bool | None,
    ) -> None:
        self.batches = twice(batches, "pruning one layer after the other")
        first, _ = peeked(self.batches)
        self.groups, self.variables, self.progress = groups, variables, progress
        self.found = contractions(trace_program(apply_fn, variables, first))
        self.whole = named_leaves(variables)
        self.steps = Steps(apply_fn, self.found)
        self.readers: dict[str, list[Contraction]] = {}
        for one in self.found.values():
            for name in one.units(groups):
                self.readers.setdefault(name, []).append(one)
        self.readers = {n: own for n, own in self.readers.items() if not self.why(n)}

    def why(self, name: str) -> str:
        """Why a group cannot be pruned by what its readers lose, or ""."""
        readers, group = self.readers.get(name, []), self.groups[name]
        paths = {one.path for one in readers}
        others = [
            member.path
            for member in group.members
            if member.role == "consumer" and member.path not in paths
        ]
        if others or not readers:
            what = f"{others[0]} reads it otherwise" if others else "nothing reads it"
            return f"{what} than as a contraction with a parameter as it is"
        if group.blocks > 1:
            return f"it comes in {group.blocks} blocks that lose as many units each"
        for one in readers:
            kept = {one.name: np.zeros(one.at.shape, bool)}
            kept[one.name][:, 0] = True
            reasons = fittable(self.found, kept, self.whole)[1]
            if reasons:
                return reasons[0]
        return ""

    def order(self, names: Any) -> list[str]:
        """The groups in the order in which the program reads them."""
        first = {
            n: min(s.order for one in self.readers[n] for s in one.stages)
            for n in names
        }
        return sorted(first, key=first.__getitem__)

    def sums(self, name: str, current: PyTree) -> dict[str, Sums]:
        """Of all readers of a group: inputs in `current`, outputs in the whole net."""
        names = [one.name for one in self.readers[name]]
        data = self.steps, current, self.variables, self.batches
        return sums_of(names, *data, f"moments of {name}", self.progress)

    def parts(
        self, name: str, sums: Mapping[str, Sums], about_means: bool = True
    ) -> list[Part]:
        """The moments of every matrix that reads a group.

        About the means if a bias is to be fitted too, where there is one.
        """
        parts = []
        for one in self.readers[name]:
            own, units = sums[one.name], one.units(self.groups)[name]
            kernel = one.kernel(np.asarray(self.whole[one.path])).astype(np.float64)
            for k in range(len(one.at)):
                second, cross = own.scatter[k] / own.count, own.cross[k] / own.count
                if one.bias is None or not about_means:
                    second = second + np.outer(own.mean[k], own.mean[k])
                    cross = cross + np.outer(own.mean[k], own.target[k])
                parts.append(Part(second, cross, kernel[k], units[k]))
        return parts

    def fitted(self, name: str, current: PyTree, masks: PyTree, ridge: float) -> PyTree:
        """The net with the readers of a group fitted on new data of it."""
        items, kept = self.items(name, masks)
        data = current, self.variables, self.batches
        options = {"ridge": ridge, "rescale": False}
        return fit_in_waves(items, kept, self.steps, *data, self.progress, **options)

    def mended(
        self,
        name: str,
        current: PyTree,
        masks: PyTree,
        sums: Mapping[str, Sums],
        options: Any,
    ) -> PyTree:
        """The net with the readers of a group fitted from these moments."""
        items, kept = self.items(name, masks)
        leaves = dict(named_leaves(current))
        for item in items:
            own, weights = self.found[item.name], kept[item.name]
            fit(own, item, weights, sums[item.name], self.whole, leaves, **options)
        return apply_masks(
            jax.tree.structure(current).unflatten(leaves.values()), masks
        )

    def items(self, name: str, masks: PyTree) -> tuple[list[Any], Any]:
        kept = kept_weights(self.found, self.variables, masks)
        items, _ = fittable(self.found, kept, self.whole)
        names = {one.name for one in self.readers[name]}
        return [item for item in items if item.name in names], kept


def _counts(work: _Work, sparsity: float | Mapping[str, float]) -> dict[str, int]:
    """Group name -> how many units stay, at least one."""
    if not isinstance(sparsity, Mapping):
        sparsity = dict.fromkeys(work.readers, sparsity)
    for name in sparsity:
        if name not in work.groups:
            raise ValueError(
                f"sparsity names the group {name!r}, which does not exist"
                f"{nearest(name, list(work.groups))}"
            )
        if name not in work.readers:
            raise ValueError(f"group {name} cannot be reconstructed: {work.why(name)}")
    sizes = {name: work.groups[name].size for name in sparsity}
    return {
        name: max(
            1, sizes[name] - round(fraction(f"sparsity[{name}]", s) * sizes[name])
        )
        for name, s in sparsity.items()
    }


def _grams(parts: Sequence[Part], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Moments of what units contribute, and of that with the outputs."""
    gram, target = np.zeros((size, size)), np.zeros(size)
    for second, cross, kernel, units in parts:
        gram += unit_moments(second, kernel, units, size)
        fixed, own = units < 0, units >= 0
        # What is not of the group stays as it is, so only the rest is to be made.
        rest = cross - second[:, fixed] @ kernel[fixed]
        np.add.at(target, units[own], (kernel * rest).sum(1)[own])
    return gram, target


def _by_rank(parts: Sequence[Part], size: int, count: int) -> np.ndarray:
    return np.isin(np.arange(size), rank_units(parts, size)[:count])


def _by_lasso(parts: Sequence[Part], size: int, count: int) -> np.ndarray:
    return lasso(*_grams(parts, size), count)


def _by_removal(parts: Sequence[Part], size: int, count: int) -> np.ndarray:
    return greedy_backward(_grams(parts, size)[0], count)


_CHOICES: Mapping[str, Callable[[Sequence[Part], int, int], np.ndarray]] = {
    "compensation": _by_rank,
    "lasso": _by_lasso,
    "thinet": _by_removal,
}
