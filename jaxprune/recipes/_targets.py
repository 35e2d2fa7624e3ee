"""What is asked for: a sparsity or a budget, as a decision which units stay."""

import math
import numbers
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from jaxprune import select
from jaxprune.core._groups import Groups
from jaxprune.core._names import listed, matching, nearest, patterns
from jaxprune.core._types import Array, PyTree
from jaxprune.costing import Cost, CostModel, cost_model, latency_table

CostName = Literal[
    "flops", "multiply_adds", "parameters", "bytes", "activation_bytes", "seconds"
]
Scope = Literal["group", "global"]

_UNITS = {
    "%": 0.01,
    "": 1.0,
    "k": 1e3,
    "M": 1e6,
    "G": 1e9,
    "T": 1e12,
    "B": 1.0,
    "kB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "s": 1.0,
    "ms": 1e-3,
    "us": 1e-6,
}
_BUDGET = re.compile(r"\s*([0-9.]+(?:[eE][-+]?[0-9]+)?)\s*([a-zA-Z%]*)\s*")


def budget_of(
    budget: float | str, full: float, cost: CostName | Cost | None = None
) -> float:
    """A budget as a cost.

    Args:
        budget: up to 1 a fraction of the whole, above 1 a cost; or text, a number with
            a unit: ``"50%"``, ``"1.5M"``, ``"3ms"``.
        full: the cost of the whole.
        cost: what it is of, if its name is known: a budget in seconds is none of FLOPs.

    Returns:
        The highest cost allowed.

    Raises:
        ValueError: if it is no positive number, text that is none, or has the unit of
            another cost.
        TypeError: if it is neither a number nor text.

    Example:
        >>> budget_of(0.25, 200.0), budget_of("1.5k", 1e6), budget_of("3ms", 0.01)
        (50.0, 1500.0, 0.003)
    """
    if isinstance(budget, str):
        found = _BUDGET.fullmatch(budget)
        if not found or found[2] not in _UNITS:
            raise ValueError(
                f"budget {budget!r} is not a number with a unit; expected something "
                "like 0.5, '50%', '1.5M' or '3ms'"
            )
        number = float(found[1]) * _UNITS[found[2]]
        _check_unit(budget, found[2], cost)
        if found[2] in ("%", ""):
            return budget_of(number, full)
        return _positive(number)
    if isinstance(budget, bool) or not isinstance(budget, numbers.Real):
        raise TypeError(f"budget must be a number or text, got {budget!r}")
    number = _positive(float(budget))
    return number * full if number <= 1 else number


def _check_unit(budget: str, unit: str, cost: CostName | Cost | None) -> None:
    """A unit of time is of seconds alone, and one of bytes of bytes."""
    of = "seconds" if unit in ("s", "ms", "us") else "bytes" if unit[-1:] == "B" else ""
    if of and isinstance(cost, str) and of not in cost:
        raise ValueError(
            f"budget {budget!r} is in {of}, but cost={cost!r}; give cost={of!r}, or a "
            "fraction of the whole such as 0.5"
        )


def _positive(number: float) -> float:
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"budget must be a positive number, got {number}")
    return number


def cost_of(
    cost: CostName | Cost,
    apply_fn: Any,
    groups: Groups,
    variables: PyTree,
    call: PyTree,
    progress: bool | None = None,
) -> Cost:
    """The cost of this name, as a function of group sizes.

    Args:
        cost: its name; or a cost, which is returned.
        apply_fn: the function.
        groups: what `trace` returned for it.
        variables: its variables.
        call: ``(args, kwargs)``, the example arguments.
        progress: show progress bars? None for on a terminal.

    Returns:
        The cost.

    Raises:
        TypeError: if it is a model of several costs.
        ValueError: if the name is unknown.
    """
    if isinstance(cost, Cost):
        return cost
    if isinstance(cost, CostModel):
        raise TypeError(
            "cost is a CostModel, which holds several costs; give one of them, such as "
            "model.flops, or its name: cost='flops'"
        )
    names = get_args(CostName)
    if cost not in names:
        raise ValueError(
            f"unknown cost {cost!r}{nearest(str(cost), names)} Expected one of "
            f"{', '.join(names)}, or a cost such as latency_table(...)"
        )
    args, kwargs = call
    if cost == "seconds":
        options = {"groups": groups, "progress": progress}
        return latency_table(apply_fn, variables, *args, **options, **kwargs)
    model = cost_model(apply_fn, variables, *args, groups=groups, **kwargs)
    return getattr(model, "parameter_bytes" if cost == "bytes" else cost)


def sparsity_by_group(
    groups: Groups, names: Sequence[str], sparsity: Mapping[str, float]
) -> dict[str, float]:
    """Group name -> sparsity, from names and patterns; later entries win.

    Args:
        groups: what `trace` returned.
        names: the groups that may be cut.
        sparsity: name or pattern -> fraction.

    Raises:
        ValueError: if an entry matches no group, or none that may be cut.
    """
    found: dict[str, float] = {}
    for pattern, share in sparsity.items():
        matched = matching(pattern, groups)
        if not matched:
            raise ValueError(
                f"sparsity names {pattern!r}, which matches none of the "
                f"{len(groups)} groups: {listed(groups)}{nearest(pattern, groups)}"
            )
        allowed = [name for name in matched if name in set(names)]
        if not allowed:
            raise ValueError(
                f"sparsity names {pattern!r}, but {matched[0]} cannot be cut exactly "
                f"({groups[matched[0]].why or 'only leaves it out'}); pass "
                "exact=False to cut it anyway"
            )
        found |= dict.fromkeys(allowed, share)
    return {name: found[name] for name in names if name in found}


def cuttable(
    groups: Groups, only: str | Sequence[str] | None, exact: bool
) -> list[str]:
    """The names of the groups that may be cut, in order.

    Args:
        groups: what `trace` returned.
        only: names, labels or patterns; None for all.
        exact: only those for which cutting equals masking.

    Raises:
        ValueError: if there is none; the text says why.
    """
    allowed = [name for name, g in groups.items() if g.exact or not exact]
    if not allowed:
        raise ValueError(_nothing(groups))
    if only is None:
        return allowed
    chosen: set[str] = set()
    wanted = patterns("only", only)
    if not wanted:
        raise ValueError("only=() names no group, so nothing would be cut; give None")
    for pattern in wanted:
        matched = matching(pattern, groups)
        if not matched:
            raise ValueError(
                f"only names {pattern!r}, which matches none of the {len(groups)} "
                f"groups: {listed(groups)}{nearest(pattern, groups)}"
            )
        if not set(matched) & set(allowed):
            raise ValueError(
                f"only names {pattern!r}, but {matched[0]} cannot be cut exactly: "
                f"{groups[matched[0]].why}; pass exact=False to cut it anyway"
            )
        chosen.update(matched)
    return [name for name in allowed if name in chosen]


def _nothing(groups: Groups) -> str:
    if len(groups):
        worst = next(iter(groups.values()))
        return (
            "no group can be cut exactly; pass exact=False to cut anyway. The first, "
            f"{worst.name}: {worst.why}"
        )
    reasons = sorted({f"{pin.path}:{pin.axis} is {pin.why}" for pin in groups.pinned})
    return f"nothing can be cut: {'; '.join(reasons[:3])} (see trace(...).pinned)"


def literal(name: str) -> str:
    """A pattern that matches this name alone."""
    return name.replace("[", "[[]").replace("*", "[*]").replace("?", "[?]")


def keep_by_sparsity(
    groups: Groups,
    scores: Mapping[str, Array],
    names: Sequence[str],
    sparsity: float | Mapping[str, float],
    scope: Scope,
    limits: Mapping[str, Any],
) -> dict[str, Any]:
    """The decision that removes a fraction of the units.

    Args:
        groups: what `trace` returned.
        scores: group name -> float ``[size]``, larger matters more.
        names: the groups that may be cut.
        sparsity: one fraction, or group name -> fraction.
        scope: "group" or "global".
        limits: `min_keep`, `multiple_of` and `max_sparsity`, where given.
    """
    if isinstance(sparsity, Mapping):
        if scope == "global":
            raise ValueError(
                "sparsity by group already says what every group loses; scope='global' "
                "takes one number"
            )
        shares = sparsity_by_group(groups, names, sparsity)
        return select.per_group(groups, scores, sparsity=shares, **limits)
    if scope not in get_args(Scope):
        raise ValueError(f"scope must be 'group' or 'global', got {scope!r}")
    selection = select.per_group if scope == "group" else select.across_groups
    return selection(groups, scores, sparsity=sparsity, only=list(names), **limits)
