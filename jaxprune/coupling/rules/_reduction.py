"""Reductions, scans along an axis, windows and orderings."""

from typing import Any

from jaxprune.coupling._labels import Value, both, with_zero
from jaxprune.coupling._registry import rule
from jaxprune.coupling.rules._elementwise import join_axes


def _drop(value: Value, gone: Any) -> tuple[tuple[int, ...], tuple]:
    stay = [d for d in range(len(value.shape)) if d not in gone]
    return tuple([value.shape[d] for d in stay]), tuple([value.axes[d] for d in stay])


def reduced(
    walk: Any,
    eqn: Any,
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
    for d in axes:
        axis = value.axes[d] if keeps_zero else with_zero(value.axes[d], False)
        walk.ledger.sum_over(axis, kind, eqn, **details)
    return Value(*_drop(value, axes), value.is_zero)


@rule("reduce_sum")
def _reduce_sum(walk: Any, eqn: Any, value: Value) -> Value:
    return reduced(walk, eqn, value, eqn.params["axes"], "sum", keeps_zero=True)


@rule(
    "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor"
)
def _reduce(walk: Any, eqn: Any, value: Value) -> Value:
    verb = {"max": "a maximum", "min": "a minimum", "prod": "a product"}
    name = verb.get(eqn.primitive.name.removeprefix("reduce_"), "a reduction")
    axes = eqn.params["axes"]
    return reduced(walk, eqn, value, axes, "reduction", keeps_zero=False, name=name)


@rule("argmax", "argmin")
def _arg(walk: Any, eqn: Any, value: Value) -> Value:
    for d in eqn.params["axes"]:
        why = walk.ledger.reason("argument", eqn)
        walk.ledger.freeze(value.axes[d], why)
    shape, axes = _drop(value, eqn.params["axes"])
    return Value(shape, tuple(with_zero(axis, False) for axis in axes))


@rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def _cumulative(walk: Any, eqn: Any, value: Value) -> Value:
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


@rule("reduce_window_max", "reduce_window_min", "reduce_window_sum")
def _window(walk: Any, eqn: Any, value: Value) -> Value:
    p = eqn.params
    axes = list(value.axes)
    for d, size in enumerate(p["window_dimensions"]):
        plain = size == 1 and p["window_strides"][d] == 1
        plain = plain and tuple(p["padding"][d]) == (0, 0)
        plain = plain and p["base_dilation"][d] == 1
        if not plain:
            why = walk.ledger.reason("pooling", eqn)
            walk.ledger.freeze(axes[d], why)
            axes[d] = why
    return Value(eqn.outvars[0].aval.shape, tuple(axes))


@rule("sort")
def _sort(walk: Any, eqn: Any, *values: Value) -> list[Value]:
    d = eqn.params["dimension"]
    why = walk.ledger.reason("sorted", eqn)
    for value in values:
        walk.ledger.freeze(value.axes[d], why)
    axes = tuple(
        why if k == d else join_axes(walk, eqn, values, k, n, both)
        for k, n in enumerate(values[0].shape)
    )
    return [Value(value.shape, axes) for value in values]


@rule("top_k")
def _top_k(walk: Any, eqn: Any, value: Value, *rest: Value) -> list[Value]:
    d = eqn.params.get("axis", -1) % len(value.shape)
    why = walk.ledger.reason("top_k", eqn)
    walk.ledger.freeze(value.axes[d], why)
    axes = (*value.axes[:d], why, *value.axes[d + 1 :])
    shape = eqn.outvars[0].aval.shape
    places = tuple(with_zero(axis, False) for axis in axes)
    return [Value(shape, axes), Value(shape, places)]
