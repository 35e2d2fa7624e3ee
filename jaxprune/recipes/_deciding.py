"""Deciding which units stay: what is left of a program, and what is asked for."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxprune import select
from jaxprune.core._functions import check_function
from jaxprune.core._groups import Groups
from jaxprune.core._masks import expand_masks
from jaxprune.core._progress import tracked
from jaxprune.core._types import ApplyFn, PyTree
from jaxprune.costing import Cost
from jaxprune.coupling._trace import trace
from jaxprune.narrowing._narrow import narrow
from jaxprune.recipes._request import Request
from jaxprune.recipes._targets import (
    budget_of,
    cost_of,
    cuttable,
    keep_by_sparsity,
    literal,
)
from jaxprune.recipes._unit_scores import Subject, unit_scores
from jaxprune.statistics._recalibration import recalibrate

# Keyword arguments by which layers of Flax and others know that they are trained.
_TRAINING = {
    "train": True,
    "training": True,
    "is_training": True,
    "use_running_average": False,
    "deterministic": False,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A program to cut and what is asked for.

    Attributes:
        apply_fn: the function as it was written.
        args: example arguments.
        kwargs: example keyword arguments.
        request: what is asked for.
        groups: what `trace` found.
        names: the groups that may be cut.
        cost: what the budget is of, or None.
    """

    apply_fn: ApplyFn
    args: tuple[PyTree, ...]
    kwargs: dict[str, PyTree]
    request: Request
    groups: Groups
    names: list[str]
    cost: Cost | None = None


def problem_of(
    apply_fn: ApplyFn,
    variables: PyTree,
    args: tuple[PyTree, ...],
    kwargs: Mapping[str, PyTree] | None,
    request: Request,
) -> Problem:
    """Traces a function and says what of it may be cut.

    Raises:
        TypeError: if it is no function, or the variables are missing.
        ValueError: if nothing may be cut.
    """
    check_function(apply_fn)
    if variables is None:
        raise TypeError("variables are missing: prune(apply_fn, variables, *args, ...)")
    kwargs = dict(kwargs or {})
    groups = trace(apply_fn, variables, *args, **request.patterns, **kwargs)
    names = cuttable(groups, request.only, request.exact)
    cost = None
    if request.budget is not None:
        call = groups, variables, (args, kwargs)
        cost = cost_of(request.cost, apply_fn, *call, request.progress)
    return Problem(apply_fn, args, kwargs, request, groups, names, cost)


def decide(
    problem: Problem,
    small: PyTree,
    keep: Mapping[str, np.ndarray],
    share: float = 1.0,
) -> dict[str, np.ndarray]:
    """Which units stay, scored on what is left.

    Args:
        problem: what is cut.
        small: the variables as `keep` has left them.
        keep: group name -> bool ``[size]``, True = kept; missing ones are whole.
        share: how far to go from the whole to what is asked for, in (0, 1].

    Returns:
        Group name -> bool ``[size]``, True = kept: a part of `keep`.
    """
    return decide_by(problem, scores_of(problem, small, keep), keep, share)


def decide_by(
    problem: Problem,
    scores: Mapping[str, np.ndarray],
    keep: Mapping[str, np.ndarray],
    share: float = 1.0,
) -> dict[str, np.ndarray]:
    """Which units stay, by these scores of all units.

    Args:
        problem: what is cut.
        scores: group name -> float ``[size]``, larger matters more.
        keep: group name -> bool ``[size]``, True = kept; missing ones are whole.
        share: how far to go from the whole to what is asked for, in (0, 1].

    Returns:
        Group name -> bool ``[size]``, True = kept: a part of `keep`.
    """
    # What is gone already goes first.
    scores = {
        name: _spread(each[keep[name]], keep[name]) if name in keep else each
        for name, each in scores.items()
    }
    found = _selected(problem, scores, share)
    return {
        name: units & keep[name] if name in keep else units
        for name, units in {**keep, **found}.items()
    }


def _selected(
    problem: Problem, scores: Mapping[str, np.ndarray], share: float
) -> dict[str, np.ndarray]:
    request, groups = problem.request, problem.groups
    if problem.cost is None:
        sparsity: Any = request.sparsity
        if isinstance(sparsity, Mapping):
            sparsity = {name: part * share for name, part in sparsity.items()}
        else:
            sparsity = sparsity * share
        return keep_by_sparsity(
            groups, scores, problem.names, sparsity, request.scope, request.limits
        )
    full = float(problem.cost.full)
    assert request.budget is not None  # what the cost is for
    target = budget_of(request.budget, full, request.cost)
    options = dict(request.limits)
    if request.method is not None:
        options["method"] = request.method
    found = select.to_budget(
        groups,
        scores,
        problem.cost,
        budget=full - share * max(full - target, 0.0),
        only=[literal(name) for name in problem.names],
        **options,
    )
    return {name: np.asarray(units) for name, units in found.items()}


def scores_of(
    problem: Problem, small: PyTree, keep: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Scores of all units, counted on what is left; 0 for what is gone.

    Args:
        problem: what is cut.
        small: the variables as `keep` has left them.
        keep: group name -> bool ``[size]``, True = kept; missing ones are whole.

    Returns:
        Group name -> float ``[size]``, larger matters more.
    """
    if not keep:
        found = _scored(problem, problem.apply_fn, problem.groups, small, None)
        return {name: np.asarray(each) for name, each in found.items()}
    masks = expand_masks(problem.groups, keep)
    left = narrow(problem.apply_fn, masks)
    options = problem.request.patterns
    groups = trace(left, small, *problem.args, **options, **problem.kwargs)
    found = _scored(problem, left, groups, small, masks)
    return {
        name: _placed(found.get(name), keep.get(name), group.size)
        for name, group in problem.groups.items()
    }


def _scored(
    problem: Problem, apply_fn: Any, groups: Groups, variables: PyTree, masks: PyTree
) -> dict[str, jax.Array]:
    request = problem.request
    loss_fn = request.loss_fn
    if loss_fn is not None and masks is not None:
        loss_fn = narrow(loss_fn, masks)
    subject = Subject(
        groups,
        apply_fn,
        variables,
        problem.args,
        problem.kwargs,
        loss_fn,
        request.batches,
        request.inputs_of(problem.args),
        request.progress,
    )
    options: dict[str, Any] = {"normalize": request.normalize}
    found = unit_scores(subject, request.score, members=request.members, **options)
    return jax.device_get(found)


def _placed(scores: object, kept: np.ndarray | None, size: int) -> np.ndarray:
    """Scores of the units that are left, back in their places."""
    if scores is None:  # one unit is left and no longer seen as a group of its own
        return np.ones(size, np.float32)
    if kept is None:
        return np.asarray(scores)
    placed = np.zeros(size, np.asarray(scores).dtype)
    placed[kept] = scores
    return placed


def _spread(scores: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Scores of the units that are left, in their places, and less for the others."""
    low = scores.min() - (np.ptp(scores) + 1)
    spread = np.full(kept.shape, low, scores.dtype)
    spread[kept] = scores
    return spread


def recalibrated(problem: Problem, apply_fn: Any, variables: PyTree) -> PyTree:
    """The variables with running averages measured anew, where that is asked for.

    Args:
        problem: what is cut; its batches are run.
        apply_fn: the narrowed function.
        variables: its variables.
    """
    request = problem.request
    wanted = request.recalibrate is not False and request.batches is not None
    has_averages = isinstance(variables, Mapping) and "batch_stats" in variables
    if not (wanted and has_averages and variables["batch_stats"]):
        return variables
    inputs = request.inputs_of(problem.args)
    shown = tracked(request.batches or (), "recalibrate", request.progress)
    batches = (inputs(batch) for batch in shown)
    quiet: Any = {"progress": False}  # it would not know how many there are
    training = training_kwargs(problem.kwargs, request.recalibrate)
    try:
        return recalibrate(apply_fn, variables, batches, **quiet, **training)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"BatchNorm statistics cannot be measured on the batches: {error}. Say how "
            "the function is called in training, recalibrate={'train': True}, or leave "
            "them as they are: recalibrate=False"
        ) from error


def training_kwargs(
    kwargs: Mapping[str, PyTree], given: bool | Mapping[str, object]
) -> dict[str, Any]:
    """The keyword arguments that put a function into training mode.

    Example:
        >>> training_kwargs({"train": False, "scale": 2}, True)
        {'train': True, 'scale': 2}
        >>> training_kwargs({}, {"is_training": True})
        {'is_training': True}
    """
    if isinstance(given, Mapping):
        return {**kwargs, **given}
    if not set(kwargs) & set(_TRAINING):
        return {**kwargs, "train": True}
    return {name: _TRAINING.get(name, value) for name, value in kwargs.items()}
