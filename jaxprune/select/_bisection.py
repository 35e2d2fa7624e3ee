"""Allocations with one knob: the number whose widths spend a budget."""

from collections.abc import Callable, Mapping

from jaxprune.core._checks import finite
from jaxprune.costing import Cost


def bisect(
    widths: Callable[[float], Mapping[str, int]],
    cost: Cost,
    *,
    budget: float,
    low: float,
    high: float,
) -> dict[str, int]:
    """Finds the one number whose widths spend a budget.

    Many allocations have one knob: a threshold on importances, an error allowed to
    every layer, a keep ratio. Where the last step widens several groups at once, they
    are widened one after another, in their order, as far as the budget allows: so it
    is met to one step of one group.

    Args:
        widths: number -> group name -> how many units stay; every width grows with the
            number, or every one falls.
        cost: what is to be spent.
        budget: the highest cost allowed.
        low: one end of the search.
        high: the other end.

    Returns:
        Group name -> width, for `to_sizes`.

    Raises:
        ValueError: if both ends cost more than the budget.

    Example:
        AdaPruner's keep ratios: the importance of a layer times one number, at most 1.

        >>> from jaxprune.costing import Polynomial
        >>> from jaxprune.costing._polynomial import Term
        >>> terms = Term(3, (("a", 1),)), Term(9, (("a", 1), ("b", 1)))
        >>> cost = Polynomial({"a": 16, "b": 32}, terms)
        >>> importance = {"a": 1.0, "b": 0.4}
        >>> def widths(ratio):
        ...     kept = {name: min(1.0, ratio * own) for name, own in importance.items()}
        ...     return {n: max(1, round(kept[n] * cost.sizes[n])) for n in kept}
        >>> sizes = bisect(widths, cost, budget=0.3 * cost.full, low=0.0, high=3.0)
        >>> sizes, cost.value(sizes) / cost.full
        ({'a': 13, 'b': 11}, 0.284...)

    References:
        Liu et al., `AdaPruner <https://arxiv.org/abs/2109.06397>`_, 2021
    """
    return ends(widths, cost, budget, low, high)[0]


def ends(
    widths: Callable[[float], Mapping[str, int]],
    cost: Cost,
    budget: float,
    low: float,
    high: float,
) -> tuple[dict[str, int], dict[str, int]]:
    """The widths that fit, and those of the next number, which does not."""
    budget = finite("budget", budget)
    low, high = finite("low", low), finite("high", high)
    low, high = sorted((low, high), key=lambda number: cost.value(widths(number)))
    if cost.value(widths(low)) > budget:
        raise ValueError(
            f"budget={budget:g} cannot be met: between the two ends costs go from "
            f"{cost.value(widths(high)):g} down to {cost.value(widths(low)):g}"
        )
    if cost.value(widths(high)) <= budget:
        return dict(widths(high)), dict(widths(high))
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high) or widths(low) == widths(high):
            break
        fits = cost.value(widths(middle)) <= budget
        low, high = (middle, high) if fits else (low, middle)
    sizes, wider = dict(widths(low)), dict(widths(high))
    for name in sizes:
        if cost.value({**sizes, name: wider[name]}) <= budget:
            sizes[name] = wider[name]
    return sizes, wider
