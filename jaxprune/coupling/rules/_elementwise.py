"""Primitives that act on every position alone.

All operands tie: a position dies in one exactly if it dies in the others. They differ
only in whether the result is 0 where the operands are.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from jaxprune.coupling._data import concrete
from jaxprune.coupling._labels import (
    Axis,
    Value,
    Zero,
    both,
    either,
    flags_on,
    map_zero,
    with_flags,
    with_zero,
)
from jaxprune.coupling._registry import register_label
from jaxprune.coupling._types import Liveness, Narrowed, Step, Walk
from jaxprune.coupling._writers import SUMS, Writers
from jaxprune.program._jaxprs import bind
from jaxprune.program._types import Equation
from jaxprune.program.primitives import DECLARATIONS

Combine: TypeAlias = Callable[[Zero, Zero], Zero]  # folded over more operands


def elementwise(zero: str) -> Callable[..., Value]:
    """A labelling function; `zero` says when the result is 0.

    "any": if any operand is (products). "all": if all operands are (sums).
    "first": if the first operand is (odd functions). "quotient": if the first is and
    the second is not. "never".
    """
    combine = _COMBINE[zero]

    def label(walk: Walk, eqn: Equation, *values: Value) -> Value:
        shape = eqn.outvars[0].aval.shape
        if len(values) == 1:
            axes = values[0].axes
            if combine is _never:
                axes = tuple([with_zero(axis, False) for axis in axes])
        elif len(values) == 2:
            axes = _axes_of_two(walk, eqn, *values, combine)
        else:
            axes = [
                join_axes(walk, eqn, values, d, n, combine) for d, n in enumerate(shape)
            ]
        is_zero = zero == "any" and any(value.is_zero for value in values)
        return Value(shape, tuple(axes), is_zero)

    return label


def _axes_of_two(
    walk: Walk, eqn: Equation, x: Value, y: Value, combine: Combine
) -> list[Axis]:
    """The axes of two operands; a scalar or an axis of size 1 is there for all."""
    if x.shape == y.shape:
        if walk.writers is not None and walk.writers.sums(eqn):
            return _axes_of_sum(walk, eqn, x, y, combine)
        return [_pair(walk, a, b, combine) for a, b in zip(x.axes, y.axes, strict=True)]

    def x_alone(zero: Zero) -> Zero:
        return combine(zero, y.is_zero)

    def y_alone(zero: Zero) -> Zero:
        return combine(x.is_zero, zero)

    if not y.shape:
        return [map_zero(axis, x_alone) for axis in x.axes]
    if not x.shape:
        return [map_zero(axis, y_alone) for axis in y.axes]
    axes = []
    for a, m, b, n in zip(x.axes, x.shape, y.axes, y.shape, strict=True):
        if m == n:
            axes.append(_pair(walk, a, b, combine))
        elif n == 1:
            _spread(walk, eqn, b)
            axes.append(map_zero(a, x_alone))
        else:
            _spread(walk, eqn, a)
            axes.append(map_zero(b, y_alone))
    return axes


def _axes_of_sum(
    walk: Walk, eqn: Equation, x: Value, y: Value, combine: Combine
) -> list[Axis]:
    """The axes of a sum of which an operand may have units of its own."""
    axes: list[Axis] = []
    writers = cast(Writers, walk.writers)
    for a, b in zip(x.axes, y.axes, strict=True):
        stream = writers.join(eqn, a, b)
        if stream is None:
            axes.append(_pair(walk, a, b, combine))
        elif isinstance(stream, int):
            axes.append(stream)
        else:
            flags = [flags_on(stream, axis)[0] for axis in (a, b)]
            axes.append(with_flags(stream, [reduce(combine, flags)]))
    return axes


def _pair(walk: Walk, a: Axis, b: Axis, combine: Combine) -> Axis:
    """Ties two axes of the same size."""
    if a is b and combine in _IDEMPOTENT:
        return a
    walk.ledger.tie(a, b)
    if isinstance(b, int):
        return b
    if isinstance(a, int):
        return a
    if len(a) == len(b) == 1:  # the usual case
        return with_flags(a, [combine(a[0].zero, b[0].zero)])
    chosen = b if len(b) > len(a) else a
    flags = map(combine, flags_on(chosen, a), flags_on(chosen, b))
    return with_flags(chosen, list(flags))


def _spread(walk: Walk, eqn: Equation, axis: Axis) -> None:
    """An axis of size 1 is spread over a longer one: it cannot go."""
    if not isinstance(axis, int):
        walk.ledger.freeze(axis, walk.ledger.reason("broadcast", eqn))


def join_axes(
    walk: Walk, eqn: Equation, values: Sequence[Value], d: int, n: int, combine: Combine
) -> Axis:
    """Ties the axes `d`, of size `n`, of several operands, some of them scalars."""
    here: dict[int, Axis] = {}
    for k, value in enumerate(values):
        if value.shape and value.shape[d] == n:
            here[k] = value.axes[d]
        elif value.shape:
            _spread(walk, eqn, value.axes[d])
    chosen = _tie_all(walk, list(here.values()))
    if isinstance(chosen, int):
        return chosen
    per_operand = [
        flags_on(chosen, here[k]) if k in here else [value.is_zero] * len(chosen)
        for k, value in enumerate(values)
    ]
    columns = zip(*per_operand, strict=True)
    return with_flags(chosen, [reduce(combine, flags) for flags in columns])


def _tie_all(walk: Walk, axes: list[Axis]) -> Axis:
    """Ties the axes of several operands; returns the one with the most columns."""
    chosen = first = axes[0]
    for axis in axes[1:]:
        walk.ledger.tie(first, axis)
        if isinstance(axis, int) or (
            not isinstance(chosen, int) and len(axis) > len(chosen)
        ):
            chosen = axis
    return chosen


def _never(a: Zero, b: Zero) -> Zero:
    return False


def _first(a: Zero, b: Zero) -> Zero:
    return a


def _quotient(a: Zero, b: Zero) -> Zero:
    return both(a, not b if isinstance(b, bool) else ~b)  # 0 / 0 is nan, not 0


_COMBINE: dict[str, Combine] = {
    "any": either,
    "all": both,
    "first": _first,
    "quotient": _quotient,
    "never": _never,
}

_IDEMPOTENT = (either, both, _first)


for _name, _known in DECLARATIONS.items():
    if _known.elementwise:
        register_label(elementwise(_known.zero), _name)


def doubt_poles(walk: Walk, eqn: Equation, value: Value) -> None:
    """The masked program computes 1 / 0 or log 0 here, and nan * 0 is not 0."""
    for axis in value.axes:
        for units, zero in () if isinstance(axis, int) else axis:
            if zero is False:
                continue
            units = units if zero is True else units[zero]
            if len(units):
                what = "not_finite_at_zero"
                walk.ledger.doubt(units, walk.ledger.reason(what, eqn))


def _with_pole(walk: Walk, eqn: Equation, value: Value) -> Value:
    doubt_poles(walk, eqn, value)
    return elementwise("never")(walk, eqn, value)


def _divide(walk: Walk, eqn: Equation, x: Value, y: Value) -> Value:
    if eqn.outvars[0].aval.dtype.kind not in "iu":
        doubt_poles(walk, eqn, y)
    return elementwise("quotient")(walk, eqn, x, y)


def _integer_pow(walk: Walk, eqn: Equation, value: Value) -> Value:
    if eqn.params["y"] < 0:
        return _with_pole(walk, eqn, value)
    return elementwise("first" if eqn.params["y"] else "never")(walk, eqn, value)


def _pow(walk: Walk, eqn: Equation, x: Value, y: Value) -> Value:
    exponent = eqn.invars[1]
    known = isinstance(exponent, Literal)
    positive = known and np.all(np.asarray(exponent.val) > 0)
    if not known or np.any(np.asarray(exponent.val) < 0):
        doubt_poles(walk, eqn, x)
    return elementwise("first" if positive else "never")(walk, eqn, x, y)


def _select_n(walk: Walk, eqn: Equation, which: Value, *cases: Value) -> Value:
    # 0 is picked from either side only if all cases are 0; the choice may be scalar.
    kinds = elementwise("all")
    marked = Value(which.shape, tuple([with_zero(a, True) for a in which.axes]), True)
    shape, axes, *_ = kinds(walk, eqn, *cases, marked)
    return Value(shape, axes, all(case.is_zero for case in cases))


def _extreme(walk: Walk, eqn: Equation, x: Value, y: Value) -> Value:
    # max(0, c) = 0 if c <= 0, min(0, c) = 0 if c >= 0: such a limit counts as a 0.
    is_limit = _at_most_0 if eqn.primitive.name == "max" else _at_least_0
    x, y = [
        v._replace(is_zero=True) if not v.is_zero and is_limit(v) else v for v in (x, y)
    ]
    return elementwise("all")(walk, eqn, x, y)


def _at_most_0(value: Value) -> bool:
    number = None if value.shape else concrete(value)
    return number is not None and bool(number <= 0)


def _at_least_0(value: Value) -> bool:
    number = None if value.shape else concrete(value)
    return number is not None and bool(number >= 0)


def _clamp(walk: Walk, eqn: Equation, low: Value, x: Value, high: Value) -> Value:
    keeps = _at_most_0(low) and _at_least_0(high)
    return elementwise("first" if keeps else "never")(walk, eqn, x, low, high)


def _polynomial(walk: Walk, eqn: Equation, value: Value, *coefficients: Value) -> Value:
    kind = "first" if coefficients[0].is_zero else "never"
    return elementwise(kind)(walk, eqn, value, *coefficients)


def _bitcast(walk: Walk, eqn: Equation, value: Value) -> Value:
    if eqn.outvars[0].aval.shape != value.shape:
        return walk.unknown(eqn, value)[0]
    return elementwise("never")(walk, eqn, value)  # -0.0 has a bit


def _convert(walk: Walk, eqn: Equation, value: Value) -> Value:
    return Value(value.shape, value.axes, value.is_zero)


for _name in "log log2 rsqrt acosh lgamma digamma".split():  # not finite at 0
    register_label(_with_pole, _name)
for _name in ("div", "rem"):
    register_label(_divide, _name)
register_label(_integer_pow, "integer_pow")
register_label(_pow, "pow")
register_label(_polynomial, "polynomial")
register_label(_select_n, "select_n")
register_label(_clamp, "clamp")
register_label(_extreme, "max")
register_label(_extreme, "min")
register_label(_bitcast, "bitcast_convert_type")
register_label(_convert, "convert_element_type")
register_label(_convert, "copy")
register_label(_convert, "copy_p")


def _same_positions(kept: Liveness, step: Step) -> dict[str, object] | None:
    """Nothing changes unless an operand lacks positions that the sum has."""
    out = step.outs[0]
    for value in step.ins:
        if value.shape == out.shape and kept.shape(value) != kept.shape(out):
            return None
    return {}


def _narrow_sum(kept: Liveness, step: Step, *operands: jax.Array) -> Narrowed:
    """A sum into the positions of the result; what has none left adds nothing."""
    out: Value = step.outs[0]
    whole: list[Any] = []
    for x, value in zip(operands, step.ins, strict=True):
        if value.shape == out.shape and 0 in x.shape and kept.size(out):
            whole.append(None)
        elif value.shape == out.shape:
            whole.append(kept.spread(x, value, out))
        else:
            whole.append(x)
    x, y = whole
    if x is None and y is None:
        return jnp.zeros(kept.shape(out), step.eqn.outvars[0].aval.dtype)
    if y is None:
        return cast(jax.Array, x)
    if x is None:
        return -y if step.eqn.primitive.name == "sub" else y
    return bind(step.eqn, x, y)


for _name in SUMS:
    _known = DECLARATIONS[_name]
    register_label(
        elementwise(_known.zero), _name, narrow=_narrow_sum, resize=_same_positions
    )
for _name in ("optimization_barrier", "device_put"):
    register_label(lambda walk, eqn, *values: list(values), _name)
