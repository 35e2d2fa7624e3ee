"""Sparse from the first step to the last, with connections that move.

Removed weights count nothing, learn nothing and are zero: multipliers (0, 0, 0) of
`sparse_training`. What is grown starts from zero, with fresh statistics.
"""

from collections.abc import Callable, Mapping

import jax
import numpy as np
import optax

from jaxprune import select
from jaxprune.training._leaves import MaskOrFn
from jaxprune.training.schedules import cyclic
from jaxprune.training.sparse._rules import (
    Budget,
    Selection,
    budget_of,
    check_alone,
    drop_and_grow,
    every_so_often,
    gradient_size,
    in_turns,
    scored_start,
    scorer,
)
from jaxprune.training.sparse._state import Arrays, Moment, Rule, Sparsity
from jaxprune.training.sparse._transform import sparse_training


def sparse_evolutionary_training(
    tx: optax.GradientTransformation,
    sparsity: Sparsity = None,
    *,
    drop: optax.ScalarOrSchedule = 0.3,
    every: int = 100,
    start: int | None = None,
    until: int | None = None,
    selection: Selection = select.per_leaf,
    prunable: MaskOrFn = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """Replaces the weakest connections by random ones (SET).

    A leaf with n connections keeps the ``max(1, round(n * (1 - drop)))`` largest and is
    filled up to its sparsity, from zero; the same weight may be chosen again.

    Args:
        tx: any optimiser.
        sparsity: fraction that is removed all the time; path -> fraction for every leaf
            that is pruned (`select.erk`); None if `selection` takes no sparsity.
        drop: fraction of the connections of a leaf that is replaced, in [0, 1], or a
            schedule of it.
        every: steps between two refreshes; a refresh takes the place of a step.
        start: the first refresh; None for `every`.
        until: the last refresh; None for no end.
        selection: `select.per_leaf`; or `select.blocks`, `select.n_of_m` with their
            options fixed by `functools.partial`.
        prunable: which leaves, see `Budget`.
        key: seed or typed key of the masks.

    Returns:
        An optimiser, see `sparse_training`.

    Raises:
        ValueError: if an argument is out of range or fits no other.

    Example:
        >>> import optax
        >>> tx = sparse_evolutionary_training(optax.adam(1e-3), 0.9, every=500)

    References:
        Mocanu et al., `Scalable Training of Artificial Neural Networks with Adaptive
        Sparse Connectivity <https://arxiv.org/abs/1707.04780>`_, 2018
    """
    budget = budget_of(sparsity, selection, prunable)
    return _moving(tx, budget, drop, scorer("random"), (every, start, until), key)


def rigl(
    tx: optax.GradientTransformation,
    sparsity: Sparsity = None,
    *,
    drop: optax.ScalarOrSchedule = 0.3,
    every: int = 100,
    start: int | None = None,
    until: int | None = None,
    selection: Selection = select.per_leaf,
    prunable: MaskOrFn = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """Replaces the weakest connections where the gradient is largest (RigL).

    Take dense gradients: those of removed weights say where to grow. They are used at a
    refresh only, and never reach the optimiser. The count is that of
    `sparse_evolutionary_training`.

    Args:
        tx: any optimiser.
        sparsity: fraction that is removed all the time; path -> fraction for every leaf
            that is pruned, as `select.erk`, which the authors use; None if `selection`
            takes no sparsity.
        drop: fraction of the connections of a leaf that is replaced, in [0, 1], or a
            schedule of it: the authors use
            ``optax.cosine_decay_schedule(0.3, 0.75 * steps)``.
        every: steps between two refreshes; a refresh takes the place of a step.
        start: the first refresh; None for `every`.
        until: the last refresh, three quarters of training; None for no end.
        selection: `select.per_leaf`; or `select.blocks`, `select.n_of_m` with their
            options fixed by `functools.partial`.
        prunable: which leaves, see `Budget`.
        key: seed or typed key of the first masks.

    Returns:
        An optimiser, see `sparse_training`.

    Raises:
        ValueError: if an argument is out of range or fits no other.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from jaxprune import select
        >>> params = {"a": jnp.ones((4, 5)), "b": jnp.ones((40, 50))}
        >>> drop = optax.cosine_decay_schedule(0.3, 7500)
        >>> tx = rigl(
        ...     optax.sgd(0.1, momentum=0.9),
        ...     select.erk(params, sparsity=0.9),
        ...     drop=drop,
        ...     until=7500,
        ... )

    References:
        Evci, Gale, Menick, Castro, Elsen, `Rigging the Lottery: Making All Tickets
        Winners <https://arxiv.org/abs/1911.11134>`_, ICML 2020
    """
    budget = budget_of(sparsity, selection, prunable)
    return _moving(tx, budget, drop, gradient_size, (every, start, until), key)


def _moving(
    tx: optax.GradientTransformation,
    budget: Budget,
    drop: optax.ScalarOrSchedule,
    grow: Callable[[Moment], Arrays],
    when: tuple[int, int | None, int | None],
    key: int | jax.Array,
) -> optax.GradientTransformationExtraArgs:
    if not callable(drop) and not 0 <= float(drop) <= 1:
        raise ValueError(f"drop must be a fraction in [0, 1], got {drop}")
    check_alone(budget, "sparse training with connections that move")
    every, start, until = when
    rule = Rule(
        scored_start(budget, "random"),
        drop_and_grow(budget, drop, grow),
        every_so_often(
            every, every if start is None else start, until, budget.sparsity
        ),
        replaces_step=True,
    )
    return sparse_training(tx, rule, key=key)


def grow_and_prune(
    tx: optax.GradientTransformation,
    sparsity: Sparsity = None,
    *,
    parts: int | Mapping[str, int],
    every: int,
    rounds: int | None = None,
    selection: Selection = select.per_leaf,
    prunable: MaskOrFn = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """Makes one part of the network dense at a time, and prunes it back (GaP).

    Starts from a random sparse network. In turn t the weights of part ``t % parts`` are
    all trained, those that are grown from zero; then that part is pruned back to its
    sparsity by magnitude and the next one grows. After `rounds` rounds every part has
    been dense equally often, and the masks are held.

    Args:
        tx: any optimiser.
        sparsity: fraction to remove; path -> fraction for every leaf that is pruned
            (`select.erk`); None if `selection` takes no sparsity.
        parts: into how many runs of leaves, of about equal size, the network is split;
            or path -> index of its part, for every prunable leaf.
        every: steps of one turn.
        rounds: how often every part grows; None for ever.
        selection: `select.per_leaf`, or one whose leaves do not compete; see `Budget`.
        prunable: which leaves, see `Budget`.
        key: seed or typed key of the first masks.

    Returns:
        An optimiser, see `sparse_training`.

    Raises:
        ValueError: if an argument is out of range or fits no other; from ``init``, if
            the leaves cannot be split so.

    Example:
        >>> import optax
        >>> tx = grow_and_prune(optax.sgd(0.1), 0.9, parts=4, every=5000, rounds=2)

    References:
        Ma et al., `Effective Model Sparsification by Scheduled Grow-and-Prune Methods
        <https://arxiv.org/abs/2106.09857>`_, ICLR 2022
    """
    budget = budget_of(sparsity, selection, prunable)
    check_alone(budget, "grow_and_prune")
    number = parts if isinstance(parts, int) else 1 + max(parts.values())
    turn = cyclic(number, every=every, rounds=rounds)
    first = scored_start(budget, "random")

    def start(params: optax.Params, key: jax.Array) -> Arrays:
        masks = first(params, key)
        _split(parts, masks)  # complains early
        return masks

    last = None if rounds is None else rounds * number * every
    rule = Rule(
        start,
        in_turns(budget, turn, lambda weights: _split(parts, weights)),
        every_so_often(every, 0, last, budget.sparsity),
    )
    return sparse_training(tx, rule, key=key)


def _split(parts: int | Mapping[str, int], leaves: Arrays) -> dict[str, int]:
    """Path -> index of its part: as given, or runs of leaves of about equal size."""
    if not isinstance(parts, int):
        if missing := sorted(leaves.keys() - parts.keys()):
            raise ValueError(f"parts must name {missing[0]!r}, which is prunable")
        return {path: parts[path] for path in leaves}
    if not 1 <= parts <= len(leaves):
        raise ValueError(
            f"{len(leaves)} prunable leaves cannot be split into {parts} parts"
        )
    sizes = np.array([leaf.size for leaf in leaves.values()])
    middle = np.cumsum(sizes) - sizes / 2
    index = np.minimum((middle * parts / sizes.sum()).astype(int), parts - 1)
    # A large leaf may swallow a whole part: none is left empty, and order is kept.
    for i in range(len(sizes)):
        highest = index[i - 1] + 1 if i else 0
        index[i] = min(max(index[i], parts - (len(sizes) - i)), highest)
    return dict(zip(leaves, index.tolist(), strict=True))
