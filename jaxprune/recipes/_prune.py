"""`prune`: the five questions in one call."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Never

import numpy as np

from jaxprune import scores as scoring
from jaxprune.core._checks import naming_traced
from jaxprune.core._limits import Each
from jaxprune.core._masks import expand_masks
from jaxprune.core._types import ApplyFn, PyTree
from jaxprune.costing import Cost
from jaxprune.narrowing._narrow import narrow
from jaxprune.recipes._deciding import Problem, decide, problem_of, recalibrated
from jaxprune.recipes._pruned import Pruned, make_pruned
from jaxprune.recipes._reports import as_call
from jaxprune.recipes._request import DEFAULTS, OPTIONS, Request, refuse_unknown
from jaxprune.recipes._targets import CostName, Scope
from jaxprune.recipes._unit_scores import Score
from jaxprune.select._budget import Method
from jaxprune.surgery._composing import compose_masks
from jaxprune.surgery._slicing import slice_params


def prune(
    apply_fn: ApplyFn | Pruned,
    variables: PyTree = None,
    *args: PyTree,
    kwargs: Mapping[str, PyTree] | None = None,
    sparsity: float | Mapping[str, float] | None = None,
    budget: float | str | None = None,
    cost: CostName | Cost = "flops",
    score: Score = "l2",
    loss_fn: Callable[[PyTree, PyTree], PyTree] | None = None,
    batches: Iterable[PyTree] | None = None,
    inputs: Callable[[PyTree], tuple[PyTree, ...]] | None = None,
    rounds: int = 1,
    scope: Scope = "group",
    method: Method | None = None,
    normalize: scoring.Normalize | None = None,
    members: scoring.Members = "all",
    only: str | Sequence[str] | None = None,
    pin: str | Sequence[str] = (),
    unpin: str | Sequence[str] = (),
    balanced: str | Sequence[str] = (),
    writers: str | Sequence[str] = (),
    layers: bool = False,
    per_layer: str | Sequence[str] = (),
    max_sparsity: Each[float] | None = None,
    min_keep: Each[int] | None = None,
    multiple_of: Each[int] | None = None,
    exact: bool = True,
    recalibrate: bool | Mapping[str, Any] = True,
    progress: bool | None = None,
    **unknown: Never,
) -> Pruned:
    """Cuts the least important units of any JAX function.

    `trace`, a score, `select`, `expand_masks`, `slice_params` and `narrow` in one
    call; nothing is changed in place.

    Args:
        apply_fn: the function; its first argument is the variables. Or what an earlier
            call returned, to cut further: then the masks are those of the original.
        variables: its variables, e.g. ``{"params": ..., "batch_stats": ...}``; with an
            earlier result None for its own, or these trained further.
        *args: example arguments of the function, arrays or shapes.
        kwargs: its keyword arguments.
        sparsity: fraction of units to remove, in [0, 1); or group name or pattern ->
            fraction, where groups that are not named are left alone.
        budget: instead of a sparsity, the highest cost allowed: up to 1 a fraction of
            the cost of the whole, above 1 a cost, or text such as ``"1.5M"``,
            ``"3ms"``.
        cost: what the budget is of: "flops", "multiply_adds", "parameters", "bytes"
            (of the parameters), "activation_bytes" or "seconds" (measured on this
            machine); or a cost such as ``latency_table(...)``.
        score: from weights "l1", "l2", "lamp", "geometric_median",
            "batch_norm_scale", "activation_probability" or "synflow"; with `loss_fn`
            and `batches` "taylor", "snip", "grasp", "fisher" or "group_fisher"; with
            `batches` "wanda", "mean_activation", "apoz", "entropy" or
            "empirical_sensitivity" (see `scores`).
            Or a function of the variables; or what it would return (larger matters
            more): a tree of scores like the variables, or scores of units ``{group:
            float[size]}`` for exactly these groups.
        loss_fn: ``(variables, batch) -> scalar``, the mean loss over the batch.
        batches: batches of data, examples along axis 0. With running averages among
            the variables they are also measured anew on these (see `recalibrate`).
        inputs: batch -> positional arguments of the function. None: the batch, if an
            array; the first entries of a tuple, as many as there are arguments.
        rounds: in how many steps to cut, with scores computed anew on what is left:
            with scores from data 4 leave more accuracy than 1 (see `select.to_budget`).
        scope: for one sparsity: "group" removes the fraction from every group,
            "global" ranks the units of all groups together.
        method: for a budget: how groups compete, see `select.to_budget`; None for its
            default.
        normalize: how the scores of a group are scaled, see `group_scores`; "lamp"
            scores are always scaled its own way.
        members: which members of a group score, see `group_scores`.
        only: names, labels or patterns of the groups to cut, ``"params/encoder/*"``.
        pin: patterns of leaves or axes not to cut, see `trace`.
        unpin: patterns of outputs that may shrink, see `trace`.
        balanced: patterns of groups whose blocks lose units of their own, see `trace`.
        writers: patterns of writers that lose units their stream keeps, see `trace`.
        layers: are layers of scans units too? See `trace`.
        per_layer: patterns of groups of which every layer of a scan loses units of its
            own, see `trace`.
        max_sparsity: no group loses more than this fraction. This and the next two may
            also be given by name or pattern, ``{"conv*": 0.5}``.
        min_keep: how many units every group keeps at least.
        multiple_of: kept counts are multiples of this.
        exact: cut only groups for which cutting equals masking; with False also
            those whose `Group.why` names a difference.
        recalibrate: measure running averages anew where there are batches? Or the
            keyword arguments that put the function into training mode; True takes
            `kwargs` with their flags (``train``, ``deterministic``, ...) turned.
        progress: show progress bars? None for on a terminal.
        **unknown: none; a misspelt option raises.

    Returns:
        The small function, its variables, the masks and the groups.

    Raises:
        ValueError: if nothing can be cut, the budget is out of reach, or an option is
            out of range.
        TypeError: if an option does not exist, or is of the wrong kind.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprune
        >>> def mlp(params, x):
        ...     return jax.nn.relu(x @ params["w1"]) @ params["w2"]
        >>> params = {"w1": jnp.ones((3, 8)), "w2": jnp.ones((8, 2))}
        >>> pruned = jaxprune.prune(mlp, params, jnp.ones((1, 3)), sparsity=0.5)
        >>> pruned.variables["w1"].shape
        (3, 4)
        >>> pruned.apply_fn(pruned.variables, jnp.ones((1, 3))).shape
        (1, 2)
        >>> jaxprune.prune(mlp, params, jnp.ones((1, 3)), budget=0.25).costs.flops
        20
    """
    given = locals()
    refuse_unknown("prune", unknown, (*OPTIONS, "kwargs"))
    request = Request(**{name: given[name] for name in OPTIONS})
    if isinstance(apply_fn, Pruned):
        return _further(apply_fn, variables, args, kwargs, request)
    read = {"variables": variables, "args": args, "kwargs": kwargs}
    with naming_traced("prune", **read, score=score, batches=batches):
        problem = problem_of(apply_fn, variables, args, kwargs, request)
        return _cut(problem, variables)


def _cut(problem: Problem, variables: PyTree) -> Pruned:
    """Cuts in as many steps as are asked for."""
    keep: dict[str, np.ndarray] = {}
    small, masks = variables, None
    steps = problem.request.rounds
    for number in range(1, steps + 1):
        keep = decide(problem, small, keep, number / steps)
        masks = expand_masks(problem.groups, keep)
        small = recalibrated(
            problem, narrow(problem.apply_fn, masks), slice_params(variables, masks)
        )
    call = problem.groups, problem.args, problem.kwargs, _as_call(problem)
    return make_pruned(problem.apply_fn, variables, masks, *call, small=small)


def _as_call(problem: Problem) -> str:
    options = {name: getattr(problem.request, name) for name in OPTIONS}
    options |= {"kwargs": problem.kwargs} if problem.kwargs else {}
    del options["progress"]
    call = "jaxprune.prune", problem.apply_fn, problem.args
    return as_call(*call, options, DEFAULTS)


def _further(
    before: Pruned,
    variables: PyTree,
    args: tuple[PyTree, ...],
    kwargs: Mapping[str, PyTree] | None,
    request: Request,
) -> Pruned:
    """Cuts what an earlier cut has left; the masks are those of the original."""
    if before.is_program:
        raise ValueError(
            "this was loaded without the original function, as a compiled program, "
            "which cannot be cut; load it with jaxprune.load(folder, apply_fn)"
        )
    before = before._now()
    variables = before.variables if variables is None else variables
    args, kwargs = args or before.args, before.kwargs if kwargs is None else kwargs
    problem = problem_of(before.apply_fn, variables, args, kwargs, request)
    again = _cut(problem, variables)
    masks = compose_masks(before.masks, again.masks)
    return before._cut_again(
        apply_fn=narrow(before.dense_fn, masks),
        variables=again.variables,
        masks=masks,
        args=again.args,
        kwargs=again.kwargs,
        last_masks=again.masks,
        seconds=None,
        counted=None,
        call=f"{before.call}\n{again.call}",
    )
