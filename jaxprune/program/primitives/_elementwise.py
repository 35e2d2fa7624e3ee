"""Primitives that act on every position alone."""

from typing import Any

import jax.numpy as jnp

from jaxprune.program.primitives._declaration import (
    DECLARATIONS,
    Combine,
    Declaration,
    declare,
)
from jaxprune.program.primitives._signature import (
    Builder,
    Constants,
    Signature,
    shapes_of,
)


def elementwise(
    eqn: Any, constant: Constants, deciding: frozenset[int] = frozenset()
) -> Signature:
    """Every axis of the result is an index; operands have size 1 where they lack it."""
    del constant
    ins, outs = shapes_of(eqn)
    full = outs[0]
    axes = [
        tuple([(d,) if n == full[d] else () for d, n in enumerate(shape)])
        for shape in ins
    ]
    index = tuple([(d,) for d in range(len(full))])
    return Signature(full, tuple(axes), (index,) * len(outs), deciding=deciding)


def _between_numbers(kind: Combine) -> Any:
    """Linear on floating-point and complex numbers; rounding and wrapping are not."""

    def combine(eqn: Any) -> Combine:
        types = [v.aval.dtype for v in (*eqn.invars, *eqn.outvars)]
        real = all(jnp.issubdtype(dtype, jnp.inexact) for dtype in types)
        return kind if real else "apply"

    return combine


def _elementwise(zero: str, names: str, combine: Combine = "apply") -> None:
    found: Any = combine if combine == "apply" else _between_numbers(combine)
    known = Declaration(elementwise, found, zero=zero)  # pyright: ignore
    DECLARATIONS.update(dict.fromkeys(names.split(), known))


# f(0) = 0
_elementwise(
    "first",
    """
    sign floor ceil round abs sqrt cbrt tanh sin tan asin atan sinh asinh atanh erf
    erf_inv expm1 log1p square imag conj population_count
    """,
)
_elementwise(
    "first",
    "neg real reduce_precision stop_gradient sharding_constraint name pvary pcast",
    "add",
)
# f(0) != 0, or a comparison; atan2(0, -0) is pi
_elementwise(
    "never",
    """
    exp exp2 logistic cos cosh acos erfc is_finite not clz eq ne lt le gt ge eq_to le_to
    lt_to nextafter igamma igammac polygamma zeta bessel_i0e bessel_i1e
    regularized_incomplete_beta atan2
    """,
)
# not finite at 0
_elementwise("never", "log rsqrt acosh lgamma digamma")
_elementwise("all", "add sub add_any", "add")
_elementwise("all", "or xor complex max min")
_elementwise("any", "mul", "multiply")
_elementwise("any", "and")
_elementwise("first", "shift_left shift_right_logical shift_right_arithmetic")
_elementwise("quotient", "div", "divide")
_elementwise("quotient", "rem")
# by what they are raised to
_elementwise("never", "integer_pow pow clamp")
for _name in ("convert_element_type", "copy", "copy_p"):
    DECLARATIONS[_name] = Declaration(
        elementwise, _between_numbers("add"), zero="first", moves=True
    )


@declare("bitcast_convert_type", zero="never")
def _bitcast(eqn: Any, constant: Constants) -> Signature | None:
    (before,), (after,) = shapes_of(eqn)
    return elementwise(eqn, constant) if before == after else None


@declare("select_n", combine="add", zero="all")
def _select_n(eqn: Any, constant: Constants) -> Signature:
    return elementwise(eqn, constant, deciding=frozenset([0]))


@declare("optimization_barrier", "device_put", combine="add", moves=True)
def _as_they_are(eqn: Any, constant: Constants) -> Signature:
    build = Builder()
    axes = tuple([tuple(build.axes(shape)) for shape in shapes_of(eqn)[0]])
    feeds = tuple([(k,) for k in range(len(axes))])
    return Signature(tuple(build.sizes), axes, axes, feeds=feeds)
