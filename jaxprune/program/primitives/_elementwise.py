"""Primitives that act on every position alone."""

from typing import Any

import jax.numpy as jnp

from jaxprune.program._types import Equation
from jaxprune.program.primitives._declaration import (
    DECLARATIONS,
    Combine,
    Declaration,
    Zero,
    declare,
)
from jaxprune.program.primitives._signature import (
    Builder,
    Constants,
    Signature,
    shapes_of,
)


def alike(
    eqn: Equation, constant: Constants, deciding: frozenset[int] = frozenset()
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

    def combine(eqn: Equation) -> Combine:
        types = [v.aval.dtype for v in (*eqn.invars, *eqn.outvars)]
        real = all(jnp.issubdtype(dtype, jnp.inexact) for dtype in types)
        return kind if real else "apply"

    return combine


def elementwise(
    zero: Zero, combine: Combine = "apply", *, moves: bool = False
) -> Declaration:
    """The declaration of a primitive that acts on every position alone.

    Args:
        zero: when the result is 0: if "any" operand is (products), if "all" are (sums),
            if the "first" is (odd functions), as a "quotient", or "never".
        combine: "add" if it is linear in all operands together, "multiply" if in each,
            "divide" if in the first alone, "apply" if it is not.
        moves: does it give its operand back as it is?
    """
    kind: Any = combine if combine == "apply" else _between_numbers(combine)
    return Declaration(alike, kind, zero=zero, elementwise=True, moves=moves)


def _elementwise(zero: Zero, names: str, combine: Combine = "apply") -> None:
    DECLARATIONS.update(dict.fromkeys(names.split(), elementwise(zero, combine)))


# f(0) = 0
_elementwise(
    "first",
    """
    sign floor ceil round abs sqrt cbrt tanh sin tan asin atan sinh asinh atanh erf
    erf_inv expm1 log1p square imag conj population_count zeros_like
    """,
)
_elementwise(
    "first",
    """
    neg real reduce_precision stop_gradient sharding_constraint layout_constraint
    reshard relayout with_memory_space_constraint name pvary pcast reduced_vary_cast
    reduced_vary_cast_p vary_unreduced_cast vary_unreduced_cast_p
    """,
    "add",
)
# f(0) != 0, or a comparison; atan2(0, -0) is pi
_elementwise(
    "never",
    """
    exp exp2 logistic cos cosh acos erfc is_finite not clz eq ne lt le gt ge eq_to le_to
    lt_to nextafter igamma igammac polygamma zeta bessel_i0e bessel_i1e
    regularized_incomplete_beta atan2 one_minus_square igamma_grad_a
    """,
)
# not finite at 0
_elementwise("never", "log log2 rsqrt acosh lgamma digamma")
_elementwise("all", "add sub add_any", "add")
_elementwise("all", "or xor complex max min")
_elementwise("any", "mul", "multiply")
_elementwise("any", "and mulhi")
_elementwise("first", "shift_left shift_right_logical shift_right_arithmetic")
_elementwise("quotient", "div", "divide")
_elementwise("quotient", "rem")
# by what they are raised to
_elementwise("never", "integer_pow pow clamp polynomial")
for _name in ("convert_element_type", "copy", "copy_p"):
    DECLARATIONS[_name] = elementwise("first", "add", moves=True)


@declare("bitcast_convert_type", elementwise=True)
def _bitcast(eqn: Equation, constant: Constants) -> Signature | None:
    (before,), (after,) = shapes_of(eqn)
    return alike(eqn, constant) if before == after else None


@declare("select_n", combine="add", zero="all", elementwise=True)
def _select_n(eqn: Equation, constant: Constants) -> Signature:
    return alike(eqn, constant, deciding=frozenset([0]))


@declare("optimization_barrier", "device_put", combine="add", moves=True)
def _as_they_are(eqn: Equation, constant: Constants) -> Signature:
    build = Builder()
    axes = tuple([tuple(build.axes(shape)) for shape in shapes_of(eqn)[0]])
    feeds = tuple([(k,) for k in range(len(axes))])
    return Signature(tuple(build.sizes), axes, axes, feeds=feeds)
