"""Compensation: what is left of a layer's inputs is fitted to the outputs it had."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.core._groups import Groups, Member
from jaxprune.core._leaves import named_leaves
from jaxprune.core._masks import apply_masks, concrete, pair_masks
from jaxprune.core._positions import axis_keep
from jaxprune.core._types import ApplyFn, Array, PyTree
from jaxprune.program._jaxprs import trace_program
from jaxprune.statistics._contractions import Contraction, contractions
from jaxprune.statistics._moments import (
    Sums,
    inputs,
    joint_sums,
    peeked,
    streamed,
)
from jaxprune.statistics._streaming import Batches, twice
from jaxprune.surgery._consumers import put
from jaxprune.surgery._reconstruction import matched_spread, refit


class Item(NamedTuple):
    """Matrices of a contraction that are fitted together.

    Attributes:
        order: of the program.
        name: of the contraction.
        path: of its parameter.
        blocks: which of its matrices.
        before: the parameters that their inputs depend on.
    """

    order: int
    name: str
    path: str
    blocks: np.ndarray
    before: frozenset[str]


def compensate(
    groups: Groups,
    apply_fn: ApplyFn,
    variables: PyTree,
    masks: PyTree,
    batches: Batches,
    *,
    ridge: float = 1e-6,
    rescale: bool = False,
    unfitted: Literal["warn", "raise", "ignore"] = "warn",
    progress: bool | None = None,
) -> PyTree:
    r"""Fits what reads a pruned group to the outputs that it had: no training.

    Every contraction that loses inputs gets the kernel and the bias that give its old
    outputs best, in least squares over all rows of the batches,

    .. math:: W' = (\Sigma_{SS} + \lambda I)^{-1} (E[x_S y^T] + \lambda W_S), \qquad
        b' = b + E[y] - W'^T E[x_S]

    with x what the pruned net feeds it, all layers before it fitted already (a
    recurrent kernel: what the whole net does), and :math:`y = W^T x_0` what it made of
    the inputs of the whole net. Both are centred;
    where there is no bias (a parameter that nothing else uses, added to the outputs,
    or subtracted as the running mean of a BatchNorm is), moments about 0 are used. A
    unit that is an affine function of kept ones is so removed without any change.

    Layers are fitted one after the other in the order of the program, on any function:
    dense layers, convolutions, attention, experts, layers under ``lax.scan``. Layers
    that do not depend on each other share a pass over the batches. Then `slice_params`
    and `narrow` as ever.

    Some cuts leave nothing to fit: positions of queries and keys, which meet each other
    and no parameter; an embedding that is also the output layer, so that it cannot
    change for one use alone; a consumer that is no contraction or is quantised. They
    stay as they were cut, and a warning names each with its cause.

    Args:
        groups: what `trace` returned; with ``roles=True`` consumers that cannot be
            fitted are told apart from producers, and named.
        apply_fn: ``(variables, batch) -> anything``, as it is to be used: BatchNorm
            with its running statistics.
        variables: tree of arrays that `groups` was traced with, not pruned yet.
        masks: tree of bools like `variables`, True = kept; concrete.
        batches: trees of arrays; a list, or an object that can be iterated again, as
            there are several passes. A few hundred rows more than a layer has inputs
            are enough.
        ridge: :math:`\lambda`, as a share of the mean variance of a kept input. It
            draws to the old weights, so what the data leave open stays as it was.
        rescale: also scale every output to the variance that it had.
        unfitted: what to do about cuts that leave nothing to fit: "warn", "raise", or
            "ignore" them.
        progress: show a progress bar? None for on a terminal.

    Returns:
        Tree like `variables`; 0 where masked.

    Raises:
        ValueError: if batches run dry, `ridge` is 0 and there are too few rows, or
            inputs that others explain; with ``unfitted="raise"`` if a cut leaves
            nothing to fit.
        TypeError: if a mask is traced.

    Warns:
        UserWarning: if a layer has fewer rows than inputs, so the ridge decides; if a
            cut leaves nothing to fit.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np, jaxprune
        >>> def mlp(params, x):
        ...     return jnp.tanh(x @ params["w1"]) @ params["w2"]
        >>> params = {"w1": jnp.array([[1.0, -1.0]]), "w2": jnp.array([[2.0], [5.0]])}
        >>> x = jnp.array([[1.0], [2.0], [3.0]])
        >>> groups = jaxprune.trace(mlp, params, x, roles=True)
        >>> keep = {"w1:1": np.array([True, False])}  # tanh(-x) = -tanh(x)
        >>> masks = jaxprune.expand_masks(groups, keep)
        >>> fitted = jaxprune.compensate(groups, mlp, params, masks, [x])
        >>> np.asarray(fitted["w2"]).round(3).tolist()
        [[-3.0], [0.0]]

    References:
        Xie et al., `Pruning with Compensation <https://arxiv.org/abs/2108.13728>`_,
        2021; He et al., `Channel Pruning for Accelerating Very Deep Neural Networks
        <https://arxiv.org/abs/1707.06168>`_, ICCV 2017 (inputs from the net as pruned
        so far, outputs from the whole one)
    """
    if unfitted not in ("warn", "raise", "ignore"):
        raise ValueError(
            f"unfitted must be 'warn', 'raise' or 'ignore', got {unfitted!r}"
        )
    first, again = peeked(batches)
    found = contractions(trace_program(apply_fn, variables, first))
    kept = kept_weights(found, variables, masks)
    whole = named_leaves(variables)
    items, refused = fittable(found, kept, whole)
    refused += _unread(groups, variables, masks, found)
    _tell(refused, unfitted)
    if len(list(waves(items))) > 1:
        twice(batches, "compensate, which fits one layer after the other,")
    data = apply_masks(variables, masks), variables, again
    options = {"ridge": ridge, "rescale": rescale}
    steps = Steps(apply_fn, found)
    current = fit_in_waves(items, kept, steps, *data, progress, **options)
    return apply_masks(current, masks)


def fit_in_waves(
    items: Sequence[Item],
    kept: Mapping[str, np.ndarray],
    steps: "Steps",
    current: PyTree,
    variables: PyTree,
    batches: Batches,
    progress: bool | None,
    *,
    ridge: float,
    rescale: bool,
) -> PyTree:
    """`current` with these matrices fitted, one wave after the other.

    Args:
        items: what to fit.
        kept: contraction -> bool ``[K, D, N]``, True = kept.
        steps: of the function.
        current: the masked variables.
        variables: the whole ones, whose outputs are to be met.
        batches: trees of arrays.
        progress: show progress bars? None for on a terminal.
        ridge: as in `compensate`.
        rescale: as in `compensate`.
    """
    found, whole = steps.found, named_leaves(variables)
    for wave in waves(items):
        names = tuple(dict.fromkeys(item.name for item in wave))
        title = f"compensate {names[0]}" + (" ..." if len(names) > 1 else "")
        data = steps, current, variables, batches
        sums = sums_of(names, *data, title, progress)
        leaves = named_leaves(current)
        for item in wave:
            options = {"ridge": ridge, "rescale": rescale}
            own = sums[item.name]
            fit(found[item.name], item, kept[item.name], own, whole, leaves, **options)
        current = jax.tree.structure(current).unflatten(leaves.values())
    return current


def _tell(refused: Sequence[str], unfitted: str) -> None:
    if not refused or unfitted == "ignore":
        return
    text = "; ".join(dict.fromkeys(refused))
    if unfitted == "raise":
        raise ValueError(text)
    warnings.warn(f"stays as it was cut: {text}", stacklevel=3)


def sums_of(
    names: Sequence[str],
    steps: "Steps",
    current: PyTree,
    whole: PyTree,
    batches: Batches,
    title: str,
    progress: bool | None,
) -> dict[str, Sums]:
    """Of contractions the sums of inputs in `current` and outputs in `whole`.

    Args:
        names: of the contractions.
        steps: of the function.
        current: the variables whose inputs are looked at.
        whole: the variables whose outputs are.
        batches: trees of arrays.
        title: of the progress bar.
        progress: show it? None for on a terminal.
    """
    leaves = named_leaves(whole)
    found = [steps.found[name] for name in names]
    kernels = [one.kernel(np.asarray(leaves[one.path])) for one in found]
    trees = current, whole, kernels
    sums = streamed(steps(tuple(names)), trees, batches, title, progress)
    return dict(zip(names, sums, strict=True))


def kept_weights(
    found: Mapping[str, Contraction], variables: PyTree, masks: PyTree
) -> dict[str, np.ndarray]:
    """Contraction -> bool ``[K, D, N]``, for those whose parameter is masked."""
    by_path = {}
    for path, leaf, mask in pair_masks(variables, masks):
        mask = concrete(path, mask)
        if not mask.all():
            by_path[path] = np.broadcast_to(mask, np.shape(leaf)).reshape(-1)
    return {
        name: by_path[one.path][one.at]
        for name, one in found.items()
        if one.path in by_path
    }


def fittable(
    found: Mapping[str, Contraction],
    kept: Mapping[str, np.ndarray],
    leaves: Mapping[str, Array],
) -> tuple[list[Item], list[str]]:
    """What lost inputs and can be fitted, in the order of the program.

    Args:
        found: all contractions.
        kept: contraction -> bool ``[K, D, N]``, as `kept_weights` gives.
        leaves: path -> leaf of the variables.

    Returns:
        The matrices to fit, and of those that cannot be, why.
    """
    items, refused = [], []
    for name, weights in kept.items():
        one = found[name]
        outputs = np.any(weights, axis=1)
        lost = np.any(~weights & outputs[:, None], axis=(1, 2))
        why = one.fixed(leaves[one.path])
        if lost.any() and why:
            refused.append(f"{one.path} loses inputs but cannot be fitted: {why}")
            continue
        for stage in one.stages:
            blocks = stage.blocks[lost[stage.blocks]]
            if blocks.size:
                items.append(Item(stage.order, name, one.path, blocks, stage.before))
    return sorted(items, key=lambda item: item.order), refused


def waves(items: Sequence[Item]) -> Iterator[list[Item]]:
    """Runs of items none of which depends on another."""
    wave: list[Item] = []
    for item in items:
        if any(other.path in item.before for other in wave):
            yield wave
            wave = []
        wave.append(item)
    if wave:
        yield wave


def _unread(
    groups: Groups,
    variables: PyTree,
    masks: PyTree,
    found: Mapping[str, Contraction],
) -> list[str]:
    """What says of pruned groups that nothing, or not everything, can be fitted."""
    reading: dict[str, set[str]] = {}
    for one in found.values():
        for name in one.units(groups):
            reading.setdefault(name, set()).add(one.path)
    by_path = {path: (leaf, mask) for path, leaf, mask in pair_masks(variables, masks)}
    refused = []
    for name, group in groups.items():
        cut = [m for m in group.members if _is_cut(m, by_path)]
        refused += [
            f"{m.path} axis {m.axis} reads the pruned group {name}, but not as a "
            "contraction of activations with this parameter as it is, so there is "
            "nothing to fit"
            for m in cut
            if m.role == "consumer" and m.path not in reading.get(name, ())
        ]
        if cut and name not in reading:
            first = group.members[0]
            refused.append(
                f"{first.path} axis {first.axis}: group {name} is pruned, but no "
                "contraction reads its units through a parameter as it is, so there "
                "is nothing to fit"
            )
    return refused


def _is_cut(member: Member, by_path: Mapping[str, tuple[Any, Any]]) -> bool:
    if member.path not in by_path:
        raise ValueError(
            f"groups have the leaf {member.path}, which variables lack; were they "
            "traced for other variables?"
        )
    leaf, mask = by_path[member.path]
    kept = axis_keep(concrete(member.path, mask), np.shape(leaf))[member.axis]
    if member.layers is not None:
        return kept is not None
    return kept is not None and not kept[member.index].all()


class Steps:
    """Compiled steps, one for every set of contractions."""

    def __init__(self, apply_fn: ApplyFn, found: Mapping[str, Contraction]) -> None:
        self.apply_fn, self.found = apply_fn, found
        self.known: dict[tuple[str, ...], Callable[..., list[Sums]]] = {}

    def __call__(self, names: tuple[str, ...]) -> Callable[..., list[Sums]]:
        if names not in self.known:
            self.known[names] = jax.jit(self._step(names))
        return self.known[names]

    def _step(self, names: tuple[str, ...]) -> Callable[..., list[Sums]]:
        # What a recurrent kernel takes in changes as it is fitted, and becomes again,
        # as far as the fit can make it, what the whole net feeds it.
        known = [self.found[name].recurrent for name in names]

        def step(
            current: PyTree, whole: PyTree, kernels: list[Any], batch: PyTree
        ) -> list[Sums]:
            pruned = inputs(self.apply_fn, names, current, batch)
            before = inputs(self.apply_fn, names, whole, batch)
            return [
                joint_sums(x0 if own else x, _product(x0, kernel))
                for x, x0, kernel, own in zip(
                    pruned, before, kernels, known, strict=True
                )
            ]

        return step


def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.matmul(x, kernel.astype(x.dtype), precision=jax.lax.Precision.HIGHEST)


def fit(
    one: Contraction,
    item: Item,
    kept: np.ndarray,
    sums: Sums,
    whole: Mapping[str, Array],
    leaves: dict[str, Array],
    *,
    ridge: float,
    rescale: bool,
) -> None:
    """Fits some matrices of a contraction, and puts them into the leaves."""
    _check_rows(one, item, kept, sums, ridge)
    matrices = one.kernel(np.asarray(whole[one.path])).astype(np.float64)
    kernels, shifts = [], []
    for k in item.blocks:
        second, cross = sums.scatter[k] / sums.count, sums.cross[k] / sums.count
        spread = sums.spread[k] / sums.count
        if one.bias is None:
            # Without a bias nothing takes up the means: moments about 0, not about
            # them. E[x xᵀ] = Cov(x) + E[x] E[x]ᵀ.
            second = second + np.outer(sums.mean[k], sums.mean[k])
            cross = cross + np.outer(sums.mean[k], sums.target[k])
            spread = spread + sums.target[k] ** 2
        try:
            kernel = refit(second, cross, matrices[k], kept[k], ridge)
        except ValueError as error:
            raise ValueError(f"{one.name}: {error}") from None
        if rescale:
            kernel = matched_spread(kernel, second, spread)
        kernels.append(kernel)
        live = kept[k].any(0)
        # The best bias for a kernel W is E[y] - E[x] W; outputs that are cut have none.
        shifts.append(np.where(live, sums.target[k] - sums.mean[k] @ kernel, 0.0))
    leaves[one.path] = put(leaves[one.path], one.at[item.blocks], np.stack(kernels))
    if one.bias is not None:
        old, at = np.asarray(whole[one.bias.path]).reshape(-1), one.bias.at[item.blocks]
        new = old[at].astype(np.float64) + one.bias.sign * np.stack(shifts)
        leaves[one.bias.path] = put(leaves[one.bias.path], at, new)


def _check_rows(
    one: Contraction, item: Item, kept: np.ndarray, sums: Sums, ridge: float
) -> None:
    """Says if there are too few rows, or rows that are no numbers."""
    if not np.isfinite(sums.mean).all() or not np.isfinite(sums.cross).all():
        raise ValueError(f"the inputs of {one.name} are not finite on these batches")
    width = int(kept[item.blocks].sum(1).max())
    if sums.count > width:
        return
    few = f"{one.name} has {width} inputs but only {sums.count} rows in the batches"
    if ridge == 0:
        raise ValueError(f"{few}, so the fit is not unique; give more, or a ridge")
    warnings.warn(
        f"{few}: the ridge decides what they leave open, close to the old weights",
        stacklevel=4,
    )
