"""Pruning while training: masks that are held, or that lose weights for good.

Removed weights count nothing, learn nothing and are zero: multipliers (0, 0, 0) of
`sparse_training`.
"""

from collections.abc import Callable

import jax
import optax

from jaxprune import select
from jaxprune.core._types import PyTree
from jaxprune.training._hyperparameters import check
from jaxprune.training._leaves import MaskOrFn
from jaxprune.training.sparse._rules import (
    Score,
    Selection,
    above_threshold,
    budget_of,
    dense_start,
    every_so_often,
    keep_best,
)
from jaxprune.training.sparse._state import Arrays, Rule, Sparsity, given_masks
from jaxprune.training.sparse._transform import sparse_training


def hold_masks(
    tx: optax.GradientTransformation, masks: PyTree | Callable[[optax.Params], PyTree]
) -> optax.GradientTransformationExtraArgs:
    """Trains the kept weights only; the removed ones stay exactly zero.

    Args:
        tx: any optimiser.
        masks: tree of bools like the parameters, True = kept, broadcastable to them
            (`jaxprune.expand_masks`, `select`, `current_masks`); or a function from the
            parameters to one. Random masks are the control for every other method:
            ``select.per_leaf(scores.random(params, key), sparsity=0.9)``.

    Returns:
        An optimiser, see `sparse_training`. Its first step sets removed weights to
        zero; `masked_params` are zero there from the start.

    Raises:
        ValueError: if masks and parameters differ, from ``init``.
        TypeError: if a mask is not boolean, from ``init``.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> masks = {"w": jnp.array([True, False])}
        >>> tx = hold_masks(optax.sgd(0.1, momentum=0.9), masks)
        >>> params = {"w": jnp.array([1.0, 0.0])}
        >>> grads = {"w": jnp.array([1.0, 5.0])}
        >>> updates, _ = tx.update(grads, tx.init(params), params)
        >>> float(optax.apply_updates(params, updates)["w"][1])
        0.0
    """

    def start(params: optax.Params, key: jax.Array) -> Arrays:
        del key
        return given_masks(params, masks(params) if callable(masks) else masks)

    return sparse_training(tx, Rule(start))


def gradual_pruning(
    tx: optax.GradientTransformation,
    sparsity: Sparsity = None,
    *,
    every: int = 100,
    start: int = 0,
    until: int | None = None,
    score: Score = "magnitude",
    selection: Selection = select.per_leaf,
    prunable: MaskOrFn = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """Removes the lowest-scoring weights while training, more and more of them.

    Masks are renewed before the step, from weights and gradients as they are, and the
    step obeys them. What is removed never comes back.

    Args:
        tx: any optimiser.
        sparsity: schedule of the fraction removed (`jaxprune.schedules.cubic`, ...), a
            constant, or path -> such for every leaf that is pruned; None if `selection`
            takes no sparsity.
        every: steps between two refreshes.
        start: the first refresh; others follow `every` steps apart, and one falls on
            the step at which a schedule of `sparsity` reaches its last value.
        until: the last refresh, wherever it falls, no earlier than the end of a
            schedule; None for no end. One-shot pruning is a constant sparsity with
            ``start=until=step``.
        score: "magnitude" ``|w|``, "saliency" ``|w g|``, "random", or a function
            (params, grads) -> scores, larger matters more; both are path -> arrays.
        selection: which go: `select.per_leaf`, `select.across_leaves`, ...; see
            `Budget`.
        prunable: which leaves, see `Budget`.
        key: seed or typed key, for random scores.

    Returns:
        An optimiser, see `sparse_training`.

    Raises:
        ValueError: if an argument is out of range or fits no other.

    Example:
        >>> import optax
        >>> from jaxprune.training.schedules import cubic
        >>> schedule = cubic(0.9, start=1000, end=9000, frequency=100)
        >>> tx = gradual_pruning(optax.adam(1e-3), schedule, start=1000, until=9000)

    References:
        Zhu, Gupta, `To Prune, or Not to Prune <https://arxiv.org/abs/1710.01878>`_,
        2017; Lee, Ajanthan, Torr, `SNIP <https://arxiv.org/abs/1810.02340>`_, 2018
        (saliency)
    """
    budget = budget_of(sparsity, selection, prunable)
    rule = Rule(
        dense_start(budget),
        keep_best(budget, score, regrow=False),
        every_so_often(every, start, until, budget.sparsity),
    )
    return sparse_training(tx, rule, key=key)


def threshold_pruning(
    tx: optax.GradientTransformation,
    limit: optax.ScalarOrSchedule,
    *,
    every: int = 100,
    start: int = 0,
    until: int | None = None,
    in_deviations: bool = False,
    prunable: MaskOrFn = None,
) -> optax.GradientTransformationExtraArgs:
    """Removes weights below a threshold while training, for good.

    The sparsity follows from the weights. The largest weight of a leaf always stays.

    Args:
        tx: any optimiser.
        limit: schedule of the threshold on ``|w|`` (`jaxprune.schedules.narang`), or a
            constant.
        every: steps between two refreshes.
        start: the first refresh.
        until: the last refresh, no earlier than the end of `limit`; None for no end.
        in_deviations: the limit counts standard deviations of the remaining weights
            of each leaf, as Han et al. do.
        prunable: which leaves, see `Budget`.

    Returns:
        An optimiser, see `sparse_training`.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> import optax
        >>> from jaxprune.training.schedules import narang
        >>> limit = narang(0.1, start=1000, ramp=4000, end=8000)
        >>> tx = threshold_pruning(optax.adam(1e-3), limit, start=1000, until=8000)

    References:
        Narang, Elsen, Diamos, Sengupta, `Exploring Sparsity in Recurrent Neural
        Networks <https://arxiv.org/abs/1704.05119>`_, 2017;
        Han, Pool, Tran, Dally, `Learning both Weights and Connections for Efficient
        Neural Networks <https://arxiv.org/abs/1506.02626>`_, 2015
    """
    check("limit", limit)
    current = limit if callable(limit) else lambda count: limit
    rule = Rule(
        dense_start(budget_of(0.0, select.per_leaf, prunable)),
        above_threshold(current, in_deviations=in_deviations),
        every_so_often(every, start, until, limit),
    )
    return sparse_training(tx, rule)
