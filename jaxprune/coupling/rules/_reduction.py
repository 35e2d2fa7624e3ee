"""Reductions, scans along an axis, windows and orderings."""

import functools
from typing import Any

from jaxprune.coupling._labels import Value, with_zero
from jaxprune.coupling._registry import rule
from jaxprune.coupling._types import Walk
from jaxprune.program._types import Equation


def _drop(value: Value, gone: Any) -> tuple[tuple[int, ...], tuple]:
    stay = [d for d in range(len(value.shape)) if d not in gone]
    return tuple([value.shape[d] for d in stay]), tuple([value.axes[d] for d in stay])


def reduced(
    walk: Walk,
    eqn: Equation,
    value: Value,
    axes: Any,
    kind: str,
    *,
    keeps_zero: bool,
    **details: str,
) -> Value:
    """The value without some axes, which a reduction ran over.

    Args:
        walk: the walk.
        eqn: the equation.
        value: the operand.
        axes: which of its axes are reduced.
        kind: why cutting them is not exact, where it is not.
        keeps_zero: is the result the same with more zeros on these axes?
        **details: what the text of the reason names.
    """
    completes = functools.partial(walk.completes, eqn, value)
    for d in axes:
        axis = value.axes[d] if keeps_zero else with_zero(value.axes[d], False)
        walk.ledger.sum_over(axis, kind, eqn, completes, **details)
    return Value(*_drop(value, axes), value.is_zero)


@rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def _cumulative(walk: Walk, eqn: Equation, value: Value) -> Value:
    d = eqn.params["axis"]
    axis = value.axes[d]
    what = "cumulative"
    if eqn.primitive.name == "cumsum":
        walk.ledger.sum_over(axis, what, eqn)
    else:
        walk.ledger.sum_over(with_zero(axis, False), what, eqn)
    if not isinstance(axis, int):
        walk.ledger.ordered.extend(column.units for column in axis)
    keeps = eqn.primitive.name != "cumlogsumexp"
    axes = tuple(
        with_zero(a, False) if k == d or not keeps else a
        for k, a in enumerate(value.axes)
    )
    return Value(value.shape, axes, value.is_zero and keeps)


@rule("top_k")
def _top_k(walk: Walk, eqn: Equation, value: Value, *rest: Value) -> list[Value]:
    d = eqn.params.get("axis", -1) % len(value.shape)
    why = walk.ledger.reason("top_k", eqn)
    walk.ledger.freeze(value.axes[d], why)
    axes = (*value.axes[:d], why, *value.axes[d + 1 :])
    shape = eqn.outvars[0].aval.shape
    places = tuple(with_zero(axis, False) for axis in axes)
    return [Value(shape, axes), Value(shape, places)]
