"""Rules that renew masks, for `sparse_training`.

Each is a function of weights, gradients and masks; none knows an optimiser. What stays
is decided by a function of `jaxprune.select`, whose ties and rounding hold: of equal
scores the earlier stays, and a leaf of n weights loses ``round(sparsity * n)``.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from jaxprune import scores as scoring
from jaxprune import select
from jaxprune.core._leaves import named_leaves
from jaxprune.core._types import Array, Scalar
from jaxprune.training._auto_axes import beside_leaves, shapes_of
from jaxprune.training._hyperparameters import is_whole
from jaxprune.training._leaves import MaskOrFn, select_leaves
from jaxprune.training.sparse._state import Arrays, Due, Moment, Sparsity

# Scores by path -> masks by path; takes a sparsity, unless the pattern says it all.
Selection = Callable[..., Mapping[str, Array]]
Score = str | Callable[[Arrays, Arrays], Arrays]


class Budget(NamedTuple):
    """How much goes, where, and in which shape: what most methods have in common.

    Attributes:
        sparsity: fraction of weights to remove or a schedule of it; or path -> such
            (`select.erk`, `select.uniform`, `select.lamp`), for leaves named in full;
            or None, if `selection` takes no sparsity.
        selection: (scores by path, sparsity) -> masks by path: `select.per_leaf`,
            `select.across_leaves`, `select.n_of_m` or `select.blocks`, their options
            fixed by `functools.partial`, or a function like them that works under jit.
        prunable: tree of bool like the parameters or a prefix of it, or a function from
            the parameters to one; None for the leaves that `sparsity` names, or for
            every floating leaf of two axes or more that is not named bias, b, scale or
            offset.
    """

    sparsity: Sparsity
    selection: Selection
    prunable: MaskOrFn = None


def budget_of(sparsity: Sparsity, selection: Selection, prunable: MaskOrFn) -> Budget:
    """A budget that makes sense by itself.

    Raises:
        ValueError: if a sparsity is no fraction, or both `sparsity` and `prunable`
            name leaves.
    """
    by_path = isinstance(sparsity, Mapping)
    for value in sparsity.values() if by_path else [sparsity]:
        if value is not None and not callable(value) and not 0 <= float(value) <= 1:
            raise ValueError(f"sparsity must be a fraction in [0, 1], got {value}")
    if by_path and prunable is not None:
        raise ValueError(
            "prunable and a sparsity by path both select leaves; give only one"
        )
    return Budget(sparsity, selection, prunable)


def prunable_leaves(budget: Budget, params: optax.Params) -> dict[str, jax.Array]:
    """Path -> weights that may go.

    Raises:
        ValueError: if there are none, or sparsities are for leaves that do not exist.
        TypeError: if one is not floating.
    """
    leaves = named_leaves(params)
    if not isinstance(budget.sparsity, Mapping):
        chosen = select_leaves(params, budget.prunable, gets="pruned")
        return {path: leaves[path] for path in chosen}
    if unknown := sorted(set(budget.sparsity) - set(leaves)):
        raise ValueError(
            f"sparsity names {unknown[0]!r}, which params lack: {', '.join(leaves)}; "
            "was it made for another tree?"
        )
    return {path: leaves[path] for path in leaves if path in budget.sparsity}


def kept(
    budget: Budget, scores: Arrays, count: Scalar, among: Arrays | None = None
) -> dict[str, jax.Array]:
    """The masks that a budget leaves at a step.

    Args:
        budget: how much goes.
        scores: path -> floats like the weights, larger matters more.
        count: the step, for schedules.
        among: path -> mask; only what it keeps may stay.
    """
    if among is not None:
        scores = {p: jnp.where(among[p], x, -jnp.inf) for p, x in scores.items()}
    now = budget.sparsity
    if isinstance(now, Mapping):
        now = {path: at(now[path], count) for path in scores}
    options = {} if now is None else {"sparsity": at(now, count)}
    try:
        masks = budget.selection(dict(scores), **options)
    except (TypeError, ValueError) as error:
        how = "by leaf" if isinstance(now, Mapping) else "as one number"
        raise ValueError(
            f"selection={_name(budget.selection)} cannot serve this method, which asks "
            f"for a sparsity {'of its own' if now is None else how}: {error}"
        ) from error
    masks = {path: jnp.asarray(masks[path]) for path in scores}
    return masks if among is None else {p: m & among[p] for p, m in masks.items()}


def competes(selection: Selection) -> bool:
    """Whether leaves are known to be ranked together, so that one loses for another."""
    options: dict[str, bool] = {}
    while isinstance(selection, functools.partial):
        options = {**selection.keywords, **options}
        selection = selection.func
    together = selection is select.across_leaves
    return together or (selection is select.blocks and options.get("across", False))


def check_alone(budget: Budget, method: str) -> None:
    """Complains about a selection whose leaves compete.

    Raises:
        ValueError: saying so.
    """
    if competes(budget.selection):
        raise ValueError(
            f"selection={_name(budget.selection)} ranks all leaves together, but "
            f"{method} gives every leaf a budget of its own; use select.per_leaf, with "
            "sparsity=select.erk(...) for budgets that differ"
        )


def _name(selection: Selection) -> str:
    while isinstance(selection, functools.partial):
        selection = selection.func
    return getattr(selection, "__name__", repr(selection))


def at(value: object, count: Scalar) -> Any:
    """The value of a number or a schedule at a step."""
    return value(count) if callable(value) else value


# --- when ----------------------------------------------------------------------------


def every_so_often(
    every: int, start: int, until: int | None, ramp: Sparsity = None
) -> Callable[[jax.Array, jax.Array], Due]:
    """Due at `start`, `start` + `every`, ..., and at `until`, the last time.

    Where a schedule reaches its last value in between, masks are due there too, so that
    the step at which a ramp ends is the one at which its end is reached.

    Args:
        every: steps between two refreshes.
        start: the first.
        until: the last, or None.
        ramp: number or schedule of what the masks obey, or path -> such.

    Raises:
        ValueError: if a number is out of range, or a ramp ends after `until`.
    """
    steps = {"every": every, "start": start}
    for name, step in (steps if until is None else {**steps, "until": until}).items():
        if not is_whole(step):
            raise ValueError(f"{name} must be a whole number of steps, got {step!r}")
    if every < 1 or start < 0 or (until is not None and until < start):
        raise ValueError(
            f"need every >= 1 and 0 <= start <= until: {every=}, {start=}, {until=}"
        )
    if until is not None:
        _check_reached(ramp, until)
    values = ramp.values() if isinstance(ramp, Mapping) else [ramp]
    schedules = [value for value in values if callable(value)]

    def due(count: jax.Array, key: jax.Array) -> Due:
        del key
        if every == 1 and start == 0 and until is None:
            return True
        regular = (count - start) % every == 0
        for schedule in schedules if every > 1 else []:
            regular |= _has_just_ended(schedule, count)
        regular &= count >= start
        if until is None:
            return regular
        return (regular & (count <= until)) | (count == until)

    return due


_LAST = 2**31 - 1


def _check_reached(ramp: Sparsity, until: int) -> None:
    """Complains about a schedule that settles only after the last refresh.

    One that never settles has no end but `until`; of traced ones nothing is known.

    Raises:
        ValueError: naming both steps and both values.
    """
    for path, schedule in (ramp if isinstance(ramp, Mapping) else {"": ramp}).items():
        if not callable(schedule):
            continue

        def value(step: int, schedule: Any = schedule) -> Any:
            with jax.ensure_compile_time_eval():
                found = schedule(jnp.int32(step))
                return found if isinstance(found, Tracer) else float(found)

        now, last, before = map(value, (until, _LAST, _LAST // 2))
        if isinstance(last, Tracer) or last != before or abs(now - last) <= 1e-3 * last:
            continue
        low, high = until, _LAST // 2  # the schedule has ended at `high`
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if value(middle) == last else (middle, high)
        raise ValueError(
            f"until={until} is before step {high}, at which the schedule"
            f"{f' of {path}' if path else ''} ends: masks would stay at "
            f"{now:.4g} and never reach {last:.4g}; give until={high} or "
            "later, or a schedule that ends by then"
        )


def _has_just_ended(
    schedule: Callable[[jax.Array], object], count: jax.Array
) -> jax.Array:
    """Does the schedule reach the value that it keeps at this step?"""
    last = jnp.asarray(schedule(jnp.int32(_LAST)))
    before = jnp.asarray(schedule(jnp.maximum(count - 1, 0)))
    return (jnp.asarray(schedule(count)) == last) & (before != last)


# --- scores --------------------------------------------------------------------------


def scorer(score: Score) -> Callable[[Moment], Arrays]:
    """What weights are ranked by: a name, or a function (params, grads) -> scores.

    Raises:
        ValueError: if the name is unknown.
    """
    if callable(score):
        return lambda moment: score(moment.params, moment.grads)
    known = {"magnitude": _magnitude, "saliency": _saliency, "random": _random}
    if score not in known:
        raise ValueError(
            f"score must be one of {list(known)} or a function, got {score!r}"
        )
    return known[score]


def gradient_size(moment: Moment) -> Arrays:
    """``|g|`` of the dense gradient: also of weights that are removed."""
    return {path: jnp.abs(grad) for path, grad in moment.grads.items()}


def _magnitude(moment: Moment) -> Arrays:
    return scoring.magnitude(dict(moment.params))


def _saliency(moment: Moment) -> Arrays:
    return {
        path: jnp.abs(w * moment.grads[path].astype(w.dtype))
        for path, w in moment.params.items()
    }


def _random(moment: Moment) -> Arrays:
    return scoring.random(dict(moment.params), moment.key)


# --- first masks ---------------------------------------------------------------------


def dense_start(budget: Budget) -> Callable[[optax.Params, jax.Array], Arrays]:
    """Nothing is removed yet, in masks of the shape that the selection gives."""

    def start(params: optax.Params, key: jax.Array) -> Arrays:
        del key
        leaves = prunable_leaves(budget, params)
        shapes = jax.eval_shape(
            lambda leaves: kept(budget, scoring.magnitude(leaves), jnp.int32(0)),
            shapes_of(leaves),
        )
        # A leaf whose mask is a scalar is left alone by the selection.
        return {path: jnp.ones(s.shape, bool) for path, s in shapes.items() if s.shape}

    return start


def scored_start(
    budget: Budget, score: Score
) -> Callable[[optax.Params, jax.Array], Arrays]:
    """Already at the budget of step 0, by a score that needs no gradient."""

    def start(params: optax.Params, key: jax.Array) -> Arrays:
        leaves, count = prunable_leaves(budget, params), jnp.int32(0)

        def masks(leaves: Arrays, key: jax.Array) -> Arrays:
            scores = scorer(score)(Moment(leaves, {}, {}, {}, count, key))
            return {p: m for p, m in kept(budget, scores, count).items() if m.ndim}

        return beside_leaves(
            masks, leaves, jax.random.fold_in(key, count), leaves=leaves
        )

    return start


def zero_start(budget: Budget) -> Callable[[optax.Params, jax.Array], Arrays]:
    """Already at the budget of step 0, by scores that are all 0."""

    def start(params: optax.Params, key: jax.Array) -> Arrays:
        del key
        leaves = prunable_leaves(budget, params)

        def masks(leaves: Arrays) -> Arrays:
            zeros = {
                path: jnp.zeros(w.shape, jnp.float32) for path, w in leaves.items()
            }
            found = kept(budget, zeros, jnp.int32(0))
            return {path: mask for path, mask in found.items() if mask.ndim}

        return beside_leaves(masks, leaves, leaves=leaves)

    return start


# --- next masks ----------------------------------------------------------------------


def keep_best(
    budget: Budget, score: Score, *, regrow: bool
) -> Callable[[Moment], Arrays]:
    """Keeps what scores highest; without `regrow`, only of what is still there."""
    scores = scorer(score)
    return lambda moment: kept(
        budget, scores(moment), moment.count, None if regrow else moment.masks
    )


def above_threshold(
    limit: optax.Schedule, *, in_deviations: bool
) -> Callable[[Moment], Arrays]:
    """Removes for good what is below a limit; the largest weight always stays."""

    def masks(moment: Moment) -> Arrays:
        least = jnp.asarray(limit(moment.count), jnp.float32)
        new = {}
        for path, w in moment.params.items():
            old = moment.masks[path]
            size = jnp.where(old, jnp.abs(w.astype(jnp.float32)), 0)
            unit = jnp.std(w.astype(jnp.float32), where=old) if in_deviations else 1.0
            new[path] = old & (size >= jnp.minimum(least * unit, jnp.max(size)))
        return new

    return masks


def hysteresis(low: float, high: float) -> Callable[[Moment], Arrays]:
    """Weights below `low` times a remembered scale go, from `high` on they return.

    The largest weight of a leaf always stays.
    """

    def masks(moment: Moment) -> Arrays:
        new = {}
        for path, w in moment.params.items():
            size, scale = jnp.abs(w.astype(jnp.float32)), moment.memory[path]
            stays = moment.masks[path] & (size >= low * scale)
            new[path] = stays | (size >= jnp.minimum(high * scale, jnp.max(size)))
        return new

    return masks


def drop_and_grow(
    budget: Budget, drop: optax.ScalarOrSchedule, grow: Callable[[Moment], Arrays]
) -> Callable[[Moment], Arrays]:
    """Drops the smallest of what is there, adds as many of the rest as score best.

    A leaf with n connections keeps ``max(1, round(n * (1 - drop)))``. A weight that was
    dropped may be chosen again, as in the published code.
    """
    # N of M is no budget for what is dropped: that is ranked by leaf.
    alone = select.per_leaf if budget.sparsity is None else budget.selection

    def masks(moment: Moment) -> Arrays:
        share = 1 - jnp.asarray(at(drop, moment.count), jnp.float32)
        gone = {}
        for path, mask in moment.masks.items():
            there = jnp.sum(mask, dtype=jnp.uint32).astype(jnp.float32)
            left = jnp.maximum(jnp.round(there * share), jnp.minimum(there, 1))
            gone[path] = 1 - left / mask.size
        stay = kept(Budget(gone, alone), _magnitude(moment), 0, moment.masks)
        scores = {
            path: jnp.where(stay[path], jnp.inf, score)
            for path, score in grow(moment).items()
        }
        return kept(budget, scores, moment.count)

    return masks


def in_turns(
    budget: Budget, turn: optax.Schedule, parts: Callable[[Arrays], Mapping[str, int]]
) -> Callable[[Moment], Arrays]:
    """One part is dense, the others are pruned back to the budget by magnitude."""

    def masks(moment: Moment) -> Arrays:
        index, part = turn(moment.count), parts(moment.params)
        sparse = kept(budget, _magnitude(moment), moment.count, moment.masks)
        return {p: mask | (index == part[p]) for p, mask in sparse.items()}

    return masks
