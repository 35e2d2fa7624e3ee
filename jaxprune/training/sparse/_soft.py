"""Masks that change their mind: removed weights go on learning and may return.

Gradients always reach all weights. Take them at `masked_params`, which is what the
network computes with; the dense weights stay in `params`.
"""

import functools
import math

import jax
import jax.numpy as jnp
import optax

from jaxprune import select
from jaxprune.training._hyperparameters import check
from jaxprune.training._leaves import MaskOrFn
from jaxprune.training.sparse._rules import (
    Score,
    Selection,
    at,
    budget_of,
    dense_start,
    every_so_often,
    hysteresis,
    keep_best,
    kept,
    scored_start,
    zero_start,
)
from jaxprune.training.sparse._state import Arrays, Due, Moment, Rule, Sparsity
from jaxprune.training.sparse._transform import sparse_training


def straight_through(
    tx: optax.GradientTransformation,
    sparsity: Sparsity = None,
    *,
    every: int = 1,
    score: Score = "magnitude",
    selection: Selection = select.per_leaf,
    prunable: MaskOrFn = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """Computes with the best weights, and trains all of them (straight-through).

    Multipliers (0, 1, 1): masks are made anew from the weights of every step; the
    gradient, taken at `masked_params`, updates the dense weights.

    Args:
        tx: any optimiser.
        sparsity: fraction removed, a schedule of it, or path -> such for every leaf
            that is pruned; None if `selection` takes no sparsity.
        every: steps between two refreshes.
        score: "magnitude" ``|w|``, "saliency" ``|w g|``, "random", or a function
            (params, grads) -> scores, larger matters more; both are path -> arrays, the
            gradient that of the step before. With a score of gradients the first step
            sees all weights.
        selection: which go: `select.per_leaf`, `select.across_leaves`, ...; see
            `Budget`.
        prunable: which leaves, see `Budget`.
        key: seed or typed key, for random scores.

    Returns:
        An optimiser, see `sparse_training`. The pruned network is
        ``masked_params(params, opt_state)``.

    Raises:
        ValueError: if an argument is out of range or fits no other.

    Example:
        >>> import functools, optax
        >>> from jaxprune import select
        >>> two_of_four = functools.partial(select.n_of_m, n=2, m=4, axis=-2)
        >>> tx = straight_through(optax.sgd(0.1), selection=two_of_four)

    References:
        Bengio, Léonard, Courville, `Estimating or Propagating Gradients Through
        Stochastic Neurons <https://arxiv.org/abs/1308.3432>`_, 2013;
        Zhou et al., `Learning N:M Fine-grained Structured Sparse Neural Networks From
        Scratch <https://arxiv.org/abs/2102.04010>`_, 2021
    """
    budget = budget_of(sparsity, selection, prunable)
    at_once = isinstance(score, str) and score in ("magnitude", "random")
    rule = Rule(
        scored_start(budget, score) if at_once else dense_start(budget),
        keep_best(budget, score, regrow=True),
        every_so_often(every, 0 if at_once else 1, None, budget.sparsity),
    )
    return sparse_training(tx, rule, gradient=1.0, post_step=1.0, key=key)


def movement_pruning(
    tx: optax.GradientTransformation,
    sparsity: Sparsity = None,
    *,
    learning_rate: optax.ScalarOrSchedule = 1e-2,
    every: int = 1,
    selection: Selection = select.per_leaf,
    prunable: MaskOrFn = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps the weights that move away from zero, whatever their size (movement).

    Every weight has a score that is trained with it, straight through the selection:

    .. math::
        M = \mathrm{best}(S), \qquad W' = W \odot M, \qquad
        S \leftarrow S - \alpha \, \frac{\partial L}{\partial W'} \odot W

    so that a score grows while its weight grows away from zero. Scores start at 0, and
    those of removed weights are trained too: a weight may return, with the value that
    it had. Multipliers (0, 0, 1): removed weights themselves get no gradient. Take
    gradients at `masked_params`; they are those of :math:`W'`.

    Args:
        tx: any optimiser, of the weights.
        sparsity: schedule of the fraction removed, a number, or path -> such for every
            leaf that is pruned; None if `selection` takes no sparsity. The authors
            raise it along `jaxprune.schedules.cubic`.
        learning_rate: :math:`\alpha`, of the scores, or a schedule of it.
        every: steps between two refreshes of the masks.
        selection: which go: `select.per_leaf` (the authors'), `select.across_leaves`,
            ...; see `Budget`.
        prunable: which leaves, see `Budget`.

    Returns:
        An optimiser, see `sparse_training`. The pruned network is
        ``masked_params(params, opt_state)``.

    Raises:
        ValueError: if an argument is out of range or fits no other.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from jaxprune.training import masked_params
        >>> tx = movement_pruning(optax.sgd(0.1), 0.5)
        >>> params = {"w": jnp.array([[5.0, 1.0]])}
        >>> grads = {"w": jnp.array([[1.0, -1.0]])}  # the large one shrinks
        >>> _, opt_state = tx.update(grads, tx.init(params), params)
        >>> masked_params(params, opt_state)["w"]
        Array([[0., 1.]], dtype=float32)

    References:
        Sanh, Wolf, Rush, `Movement Pruning: Adaptive Sparsity by Fine-Tuning
        <https://arxiv.org/abs/2005.07683>`_, NeurIPS 2020
    """
    check("learning_rate", learning_rate)
    budget = budget_of(sparsity, selection, prunable)
    rule = Rule(
        zero_start(budget),
        lambda moment: kept(budget, moment.memory, moment.count),
        every_so_often(every, 0, None, budget.sparsity),
        remember=lambda params: {
            path: jnp.zeros(w.shape, jnp.float32) for path, w in params.items()
        },
        learn=functools.partial(_moved, learning_rate),
    )
    return sparse_training(tx, rule, post_step=1.0)


def _moved(learning_rate: optax.ScalarOrSchedule, moment: Moment) -> Arrays:
    """The scores of movement after a step."""
    alpha = jnp.asarray(at(learning_rate, moment.count), jnp.float32)
    return {
        path: moment.memory[path]
        - alpha * w.astype(jnp.float32) * moment.grads[path].astype(jnp.float32)
        for path, w in moment.params.items()
    }


def dynamic_network_surgery(
    tx: optax.GradientTransformation,
    deviations: float,
    *,
    margin: float = 0.1,
    probability: optax.ScalarOrSchedule = 1.0,
    prunable: MaskOrFn = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Prunes small weights and splices back those that grow (DNS).

    Multipliers (0, 1, 1). With the mean and the standard deviation of :math:`|w|` in
    each leaf, taken once at the start, and :math:`t = \max(\mu + c\,\sigma, 0)`,

    .. math::
        T_{new} = \begin{cases}
        0 & |w| < (1 - margin)\, t \\ T & \text{in between} \\
        1 & |w| \ge (1 + margin)\, t \end{cases}

    and the largest weight of a leaf always stays.

    Args:
        tx: any optimiser.
        deviations: c. The authors tune it per layer; 4 for the first dense layer of
            LeNet.
        margin: half of the hysteresis, in [0, 1); 0 is a plain threshold.
        probability: that masks are renewed in a step, or a schedule of it
            (`jaxprune.schedules.inverse_decay`).
        prunable: which leaves, see `Budget`. The authors prune biases too.
        key: seed or typed key, for the steps in which masks are renewed.

    Returns:
        An optimiser, see `sparse_training`. The pruned network is
        ``masked_params(params, opt_state)``.

    Raises:
        ValueError: if `margin` or `probability` is out of range.

    Example:
        >>> import optax
        >>> from jaxprune.training.schedules import inverse_decay
        >>> often = inverse_decay(1e-4, stop=14_000)
        >>> tx = dynamic_network_surgery(optax.sgd(0.01), 1.0, probability=often)

    References:
        Guo, Yao, Chen, `Dynamic Network Surgery for Efficient DNNs
        <https://arxiv.org/abs/1608.04493>`_, NIPS 2016
    """
    if not math.isfinite(deviations):
        raise ValueError(f"deviations must be finite, got {deviations}")
    if not 0 <= margin < 1:
        raise ValueError(f"margin must be in [0, 1), got {margin}")
    if not callable(probability) and not 0 <= float(probability) <= 1:
        raise ValueError(f"probability must be in [0, 1], got {probability}")

    def due(count: jax.Array, key: jax.Array) -> Due:
        if not callable(probability) and probability == 1:
            return True
        return jax.random.uniform(jax.random.fold_in(key, 1)) < at(probability, count)

    def remember(params: Arrays) -> dict[str, jax.Array]:
        sizes = {path: jnp.abs(w.astype(jnp.float32)) for path, w in params.items()}
        return {
            path: jnp.maximum(jnp.mean(size) + deviations * jnp.std(size), 0)
            for path, size in sizes.items()
        }

    rule = Rule(
        dense_start(budget_of(0.0, select.per_leaf, prunable)),
        hysteresis(1 - margin, 1 + margin),
        due,
        remember=remember,
    )
    return sparse_training(tx, rule, gradient=1.0, post_step=1.0, key=key)


def iterative_soft_shrinkage(
    tx: optax.GradientTransformation,
    sparsity: Sparsity = None,
    *,
    shrinkage: float = 0.95,
    every: int = 1,
    selection: Selection = select.per_leaf,
    prunable: MaskOrFn = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Shrinks the smallest weights a little in every step (ISS-P).

    Multipliers (1, 1, `shrinkage`): after the step the weights that are the smallest
    now are multiplied by :math:`\alpha`. They may grow back: under a constant gradient
    G and learning rate :math:`\eta` a shrunk weight settles at
    :math:`-\eta\, G\, \alpha / (1 - \alpha)`. At the end,
    ``hold_masks(tx, current_masks(params, opt_state))`` fine-tunes what is left.

    Args:
        tx: any optimiser.
        sparsity: fraction that is shrunk, a schedule of it, or path -> such for every
            leaf that is pruned; None if `selection` takes no sparsity. The authors use
            the final fraction from the start.
        shrinkage: :math:`\alpha`, in [0, 1]; 1 is the optimiser alone, 0 is
            `iterative_hard_thresholding`.
        every: steps between two shrinkages; in between all weights train freely.
        selection: which shrink: `select.per_leaf`, `select.across_leaves`, ...; see
            `Budget`.
        prunable: which leaves, see `Budget`.

    Returns:
        An optimiser, see `sparse_training`.

    Raises:
        ValueError: if an argument is out of range or fits no other.

    Example:
        >>> import optax
        >>> tx = iterative_soft_shrinkage(optax.adam(2e-4), 0.9)

    References:
        Wang et al., `Iterative Soft Shrinkage Learning for Efficient Image
        Super-Resolution <https://arxiv.org/abs/2303.09650>`_, ICCV 2023
    """
    if not 0 <= shrinkage <= 1:
        raise ValueError(f"shrinkage must be in [0, 1], got {shrinkage}")
    budget = budget_of(sparsity, selection, prunable)
    rule = Rule(
        scored_start(budget, "magnitude"),
        keep_best(budget, "magnitude", regrow=True),
        every_so_often(every, 0, None, budget.sparsity),
    )
    return sparse_training(tx, rule, forward=1.0, gradient=1.0, post_step=shrinkage)


def iterative_hard_thresholding(
    tx: optax.GradientTransformation,
    sparsity: Sparsity = None,
    *,
    every: int = 1,
    selection: Selection = select.per_leaf,
    prunable: MaskOrFn = None,
) -> optax.GradientTransformationExtraArgs:
    """Projects onto sparse weights after the step (IHT).

    Multipliers (1, 1, 0): the smallest weights are set to zero, and their gradients may
    bring them back in the next step. With whole filters and one projection per epoch
    this is soft filter pruning, as in the example.

    Args:
        tx: any optimiser.
        sparsity: fraction set to zero, a schedule of it, or path -> such for every leaf
            that is pruned; None if `selection` takes no sparsity.
        every: steps between two projections; in between all weights train freely.
        selection: which go: `select.per_leaf`, `select.across_leaves`, ...; see
            `Budget`.
        prunable: which leaves, see `Budget`.

    Returns:
        An optimiser, see `sparse_training`.

    Raises:
        ValueError: if an argument is out of range or fits no other.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from jaxprune import select
        >>> from jaxprune.training import current_masks
        >>> def filters(scores, sparsity):
        ...     norms = {
        ...         path: jnp.sum(x**2, axis=tuple(range(x.ndim - 1)), keepdims=True)
        ...         for path, x in scores.items()
        ...     }
        ...     return select.per_leaf(norms, sparsity=sparsity)
        >>> tx = iterative_hard_thresholding(
        ...     optax.sgd(0.1), 0.5, every=391, selection=filters
        ... )
        >>> params = {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
        >>> current_masks(params, tx.init(params))
        {'kernel': Array([[False,  True]], dtype=bool)}

    References:
        Blumensath, Davies, `Iterative Hard Thresholding for Compressed Sensing
        <https://arxiv.org/abs/0805.0510>`_, 2009;
        He et al., `Soft Filter Pruning for Accelerating Deep Convolutional Neural
        Networks <https://arxiv.org/abs/1808.06866>`_, IJCAI 2018
    """
    return iterative_soft_shrinkage(
        tx,
        sparsity,
        shrinkage=0.0,
        every=every,
        selection=selection,
        prunable=prunable,
    )
