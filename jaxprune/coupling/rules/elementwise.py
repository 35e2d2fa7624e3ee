"""Primitives that act on every position alone.

All operands tie: a position dies in one exactly if it dies in the others. They differ
only in whether the result is 0 where the operands are.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import numpy as np
from jax.extend.core import Literal

from jaxprune.coupling.data import concrete
from jaxprune.coupling.labels import (
    Axis,
    Column,
    Value,
    Zero,
    both,
    either,
    flags_on,
    with_zero,
)
from jaxprune.coupling.registry import register_rule

Flags = Sequence[Zero]


def tie_all(walk: Any, axes: list[tuple[int, Axis]]) -> Axis:
    """Ties the axes of several operands; returns the one with the most columns."""
    first = axes[0][1]
    chosen = first
    for _, axis in axes[1:]:
        walk.ledger.tie(first, axis)
        if isinstance(axis, int) or (
            not isinstance(chosen, int) and len(axis) > len(chosen)
        ):
            chosen = axis
    return chosen


def elementwise(zero: str) -> Callable[..., Value]:
    """A labelling function; `zero` says when the result is 0.

    "any": if any operand is (products). "all": if all operands are (sums).
    "first": if the first operand is (odd functions). "quotient": if the first is and
    the second is not. "never".
    """
    combine = _COMBINE[zero]

    def label(walk: Any, eqn: Any, *values: Value) -> Value:
        shape = eqn.outvars[0].aval.shape
        if len(values) == 1 and combine is not _never:
            return Value(shape, values[0].axes)
        axes = tuple(
            [_axis(walk, eqn, values, d, n, combine) for d, n in enumerate(shape)]
        )
        return Value(shape, axes, zero == "any" and any(v.is_zero for v in values))

    return label


def _axis(walk: Any, eqn: Any, values: tuple[Value, ...], d: int, n: int, combine):
    if len(values) == 1:
        axis = values[0].axes[d]
        return with_zero_of(axis, combine)
    if len(values) == 2:
        x, y = values
        if len(x.shape) == len(y.shape) and x.shape[d] == n == y.shape[d]:
            a, b = x.axes[d], y.axes[d]
            if isinstance(a, int) or isinstance(b, int):
                if a != b:
                    walk.ledger.tie(a, b)
                return b if isinstance(b, int) else a
            if a is b and combine in _ALIKE:
                return a  # the same labels: so are the flags
    here = []
    for k, v in enumerate(values):
        if not v.shape:
            continue
        axis = v.axes[d]
        if v.shape[d] == n:
            here.append((k, axis))
        elif not isinstance(axis, int):  # of size 1, spread over n: it cannot go
            walk.ledger.freeze(axis, walk.ledger.reason("it is broadcast", eqn))
    chosen = tie_all(walk, here)
    if isinstance(chosen, int):
        return chosen
    alike = len(here) == len(values) and all(axis is chosen for _, axis in here)
    if alike and combine in _ALIKE:
        return chosen
    present = dict(here)
    per_operand = [
        flags_on(chosen, present[k]) if k in present else [v.is_zero] * len(chosen)
        for k, v in enumerate(values)
    ]
    return tuple(
        Column(column.units, combine([flags[c] for flags in per_operand]))
        for c, column in enumerate(chosen)
    )


def with_zero_of(axis: Axis, combine: Callable[[Flags], Zero]) -> Axis:
    """The flags of a unary function's result."""
    if isinstance(axis, int) or combine is not _never:
        return axis
    return with_zero(axis, False)


def _never(flags: Flags) -> Zero:
    return False


def _first(flags: Flags) -> Zero:
    return flags[0]


def _quotient(flags: Flags) -> Zero:
    numerator, denominator = flags  # 0 / 0 is nan, not 0
    if isinstance(denominator, bool):
        return False if denominator else numerator
    return False if denominator is True else both(numerator, ~denominator)


def _any(flags: Flags) -> Zero:
    return reduce(either, flags)


def _all(flags: Flags) -> Zero:
    return reduce(both, flags)


_ALIKE = (_any, _all, _first)  # of equal flags they make the same

_COMBINE: dict[str, Callable[[Flags], Zero]] = {
    "any": _any,
    "all": _all,
    "first": _first,
    "quotient": _quotient,
    "never": _never,
}

# f(0) = 0
KEEPS_ZERO = """
    neg sign floor ceil round abs sqrt cbrt tanh sin tan asin atan sinh asinh atanh erf
    erf_inv expm1 log1p square real imag conj reduce_precision stop_gradient
    sharding_constraint name pvary pcast population_count
""".split()
# f(0) != 0, or a comparison; atan2(0, -0) is pi
LOSES_ZERO = """
    exp exp2 logistic cos cosh acos erfc is_finite not clz eq ne lt le gt ge eq_to le_to
    lt_to nextafter igamma igammac polygamma zeta bessel_i0e bessel_i1e
    regularized_incomplete_beta atan2
""".split()
POLE_AT_ZERO = "log rsqrt acosh lgamma digamma".split()
SUMS = "add sub add_any or xor complex".split()
PRODUCTS = "mul and".split()
SHIFTS = "shift_left shift_right_logical shift_right_arithmetic".split()

for _names, _zero in (
    (KEEPS_ZERO, "first"),
    (LOSES_ZERO, "never"),
    (SUMS, "all"),
    (PRODUCTS, "any"),
    (SHIFTS, "first"),
):
    for _name in _names:
        register_rule(_name, elementwise(_zero))


def doubt_poles(walk: Any, eqn: Any, value: Value) -> None:
    """The masked program computes 1 / 0 or log 0 here, and nan * 0 is not 0."""
    for axis in value.axes:
        for column in () if isinstance(axis, int) else axis:
            units = column.units[np.broadcast_to(column.zero, column.units.shape)]
            if len(units):
                what = "it is 0 where it is cut, and the result is not finite there"
                walk.ledger.doubt(units, walk.ledger.reason(what, eqn))


def _with_pole(walk: Any, eqn: Any, value: Value) -> Value:
    doubt_poles(walk, eqn, value)
    return elementwise("never")(walk, eqn, value)


def _divide(walk: Any, eqn: Any, x: Value, y: Value) -> Value:
    if not np.issubdtype(eqn.outvars[0].aval.dtype, np.integer):
        doubt_poles(walk, eqn, y)
    return elementwise("quotient")(walk, eqn, x, y)


def _integer_pow(walk: Any, eqn: Any, value: Value) -> Value:
    if eqn.params["y"] < 0:
        return _with_pole(walk, eqn, value)
    return elementwise("first" if eqn.params["y"] else "never")(walk, eqn, value)


def _pow(walk: Any, eqn: Any, x: Value, y: Value) -> Value:
    exponent = eqn.invars[1]
    known = isinstance(exponent, Literal)
    positive = known and np.all(np.asarray(exponent.val) > 0)
    if not known or np.any(np.asarray(exponent.val) < 0):
        doubt_poles(walk, eqn, x)
    return elementwise("first" if positive else "never")(walk, eqn, x, y)


def _select_n(walk: Any, eqn: Any, which: Value, *cases: Value) -> Value:
    # 0 is picked from either side only if all cases are 0; the choice may be scalar.
    kinds = elementwise("all")
    marked = Value(which.shape, tuple(with_zero(a, True) for a in which.axes), True)
    result = kinds(walk, eqn, *cases, marked)
    return result._replace(is_zero=all(case.is_zero for case in cases))


def _extreme(walk: Any, eqn: Any, x: Value, y: Value) -> Value:
    # max(0, c) = 0 if c <= 0, min(0, c) = 0 if c >= 0: such a limit counts as a 0.
    is_limit = _at_most_0 if eqn.primitive.name == "max" else _at_least_0
    x, y = (v._replace(is_zero=True) if is_limit(v) else v for v in (x, y))
    return elementwise("all")(walk, eqn, x, y)


def _at_most_0(value: Value) -> bool:
    number = None if value.shape else concrete(value)
    return number is not None and bool(number <= 0)


def _at_least_0(value: Value) -> bool:
    number = None if value.shape else concrete(value)
    return number is not None and bool(number >= 0)


def _clamp(walk: Any, eqn: Any, low: Value, x: Value, high: Value) -> Value:
    keeps = _at_most_0(low) and _at_least_0(high)
    return elementwise("first" if keeps else "never")(walk, eqn, x, low, high)


def _bitcast(walk: Any, eqn: Any, value: Value) -> Value:
    if eqn.outvars[0].aval.shape != value.shape:
        return walk.unknown(eqn, value)[0]
    return elementwise("never")(walk, eqn, value)  # -0.0 has a bit


def _convert(walk: Any, eqn: Any, value: Value) -> Value:
    return Value(value.shape, value.axes, value.is_zero)


for _name in POLE_AT_ZERO:
    register_rule(_name, _with_pole)
for _name in ("div", "rem"):
    register_rule(_name, _divide)
register_rule("integer_pow", _integer_pow)
register_rule("pow", _pow)
register_rule("select_n", _select_n)
register_rule("clamp", _clamp)
register_rule("max", _extreme)
register_rule("min", _extreme)
register_rule("bitcast_convert_type", _bitcast)
register_rule("convert_element_type", _convert)
register_rule("copy", _convert)
register_rule("copy_p", _convert)
register_rule("optimization_barrier", lambda walk, eqn, *values: list(values))
