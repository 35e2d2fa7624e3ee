"""`prune`: the five questions in one call."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax

from jaxprune import scores as scoring
from jaxprune import select
from jaxprune.core._groups import Groups
from jaxprune.core._masks import PyTree, expand_masks
from jaxprune.coupling._trace import trace
from jaxprune.narrowing._narrow import narrow
from jaxprune.surgery._slicing import slice_params

Scope = Literal["group", "global"]

# What a weight scores, and how the scores of a unit add up.
_SCORES: dict[str, tuple[Callable[..., PyTree], dict[str, Any]]] = {
    "l1": (scoring.magnitude, {"reduce": "l1"}),
    "l2": (scoring.magnitude, {"reduce": "l2"}),
    "lamp": (scoring.magnitude, {"reduce": "l2", "normalize": "lamp"}),
    "batch_norm_scale": (scoring.batch_norm_scale, {"reduce": "l1"}),
    "activation_probability": (scoring.activation_probability, {"reduce": "mean"}),
}
_NAMES = (*_SCORES, "geometric_median", "synflow")


@dataclasses.dataclass(frozen=True, eq=False)
class Pruned:
    """A smaller function and its variables.

    Attributes:
        apply_fn: the narrowed function, with the signature of the original.
        variables: its variables, sliced.
        masks: what was kept, like the original variables, True = kept.
        groups: what `trace` found in the original.
    """

    apply_fn: Callable[..., Any]
    variables: PyTree
    masks: PyTree
    groups: Groups


def prune(
    apply_fn: Callable[..., Any],
    variables: PyTree,
    *args: Any,
    sparsity: float,
    score: str | Callable[[PyTree], PyTree] | PyTree = "l2",
    scope: Scope = "group",
    normalize: scoring.Normalize | None = None,
    members: scoring.Members = "all",
    multiple_of: int = 1,
    min_keep: int = 1,
    exact: bool = True,
    pin: Sequence[str] = (),
    balanced: Sequence[str] = (),
    **kwargs: Any,
) -> Pruned:
    """Cuts the least important units of any JAX function.

    ``trace``, ``group_scores``, ``select``, ``expand_masks``, ``slice_params`` and
    ``narrow`` in one call; nothing is changed in place.

    Args:
        apply_fn: the function; its first argument is the variables.
        variables: its variables, e.g. ``{"params": ..., "batch_stats": ...}``.
        *args: example arguments, arrays or shapes.
        sparsity: fraction of units to remove, in [0, 1].
        score: "l1", "l2", "lamp", "geometric_median", "batch_norm_scale",
            "activation_probability" or "synflow" (see `scores`); or a function of the
            variables; or what it would return (larger matters more): a tree of scores
            like the variables, or scores of units ``{group: float[size]}`` for exactly
            these groups, such as those that look at data.
        scope: "group" removes the fraction from every group, "global" ranks the units
            of all groups together.
        normalize: how the scores of a group are scaled, see `group_scores`; "lamp"
            scores are always scaled its own way.
        members: which members of a group score, see `group_scores`.
        multiple_of: kept counts are multiples of this.
        min_keep: how many units every group keeps at least.
        exact: cut only groups for which cutting equals masking; with False also
            those whose `Group.why` names a difference.
        pin: patterns of leaves or axes not to cut, see `trace`.
        balanced: patterns of groups whose blocks lose units of their own, see `trace`.
        **kwargs: further example arguments.

    Returns:
        The small function, its variables, the masks and the groups.

    Raises:
        ValueError: if nothing can be cut, or an option is unknown or out of range.

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
    """
    groups = trace(apply_fn, variables, *args, pin=pin, balanced=balanced, **kwargs)
    chosen = [name for name, group in groups.items() if group.exact or not exact]
    if not chosen:
        raise ValueError(_nothing(groups))
    if isinstance(score, str) and score == "synflow":
        flow = scoring.synflow(apply_fn, variables, *args, **kwargs)
        score = scoring.group_scores(groups, flow, reduce="sum", members=members)
    numbers = _unit_scores(groups, variables, score, normalize, members)
    selection = {"group": select.per_group, "global": select.across_groups}
    if scope not in selection:
        raise ValueError(f"scope must be 'group' or 'global', got {scope!r}")
    keep = selection[scope](
        groups,
        jax.device_get(numbers),
        sparsity=sparsity,
        multiple_of=multiple_of,
        min_keep=min_keep,
        only=[_literal(name) for name in chosen],
    )
    masks = expand_masks(groups, keep)
    small = slice_params(variables, masks)
    return Pruned(narrow(apply_fn, masks), small, masks, groups)


def _unit_scores(
    groups: Groups,
    variables: PyTree,
    score: str | Callable[[PyTree], PyTree] | PyTree,
    normalize: scoring.Normalize | None,
    members: scoring.Members,
) -> Mapping[str, jax.Array]:
    options: dict[str, Any] = {"members": members}
    if isinstance(score, str):
        if score == "geometric_median":
            units = scoring.geometric_median(groups, variables, members=members)
            return scoring.normalized(units, normalize)
        if score not in _SCORES:
            raise ValueError(
                f"unknown score {score!r}; expected a function, scores or one of "
                f"{_NAMES}"
            )
        function, defaults = _SCORES[score]
        options |= {"normalize": normalize, **defaults}
        return scoring.group_scores(groups, function(variables), **options)
    numbers = score(variables) if callable(score) else score
    if isinstance(numbers, Mapping) and set(numbers) == set(groups):
        return scoring.normalized(numbers, normalize)
    return scoring.group_scores(groups, numbers, normalize=normalize, **options)


def _literal(name: str) -> str:
    """A pattern that matches this name alone."""
    return name.replace("[", "[[]").replace("*", "[*]").replace("?", "[?]")


def _nothing(groups: Groups) -> str:
    if len(groups):
        worst = next(iter(groups.values()))
        return (
            "no group can be cut exactly; pass exact=False to cut anyway. The first, "
            f"{worst.name}: {worst.why}"
        )
    reasons = sorted({f"{pin.path}:{pin.axis} is {pin.why}" for pin in groups.pinned})
    return f"nothing can be cut: {'; '.join(reasons[:3])} (see trace(...).pinned)"
