"""What elementwise functions make of the sign of an operand that is 0.

Floating-point numbers have two zeros, which compare equal. A mask, or a product with a
0, gives one or the other; most functions do not tell them apart, but ``1 / x``,
``atan2`` and whatever reads bits do.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import jax.numpy as jnp
from jax.extend.core import Literal as Number

from jaxprune.program._types import Atom, Equation

# "lost": f(-0) and f(+0) are the same to the bit; "kept": they differ at most in the
# sign of a 0; "read": they may be any two numbers, as far as is known.
Sign: TypeAlias = Literal["lost", "kept", "read"]

_LOST = frozenset(
    """
    abs acos bessel_i0e cos cosh eq erfc exp exp2 ge gt is_finite le log log2 logistic
    lt ne square
    """.split()
)
_KEPT = frozenset(
    """
    add add_any asin asinh atan atanh bessel_i1e broadcast_in_dim cbrt ceil clamp
    complex conj convert_element_type copy copy_p erf erf_inv expm1 floor imag
    log1p max min mul name neg real reduce_precision reshape round select_n sign sin
    sinh sqrt squeeze stop_gradient sub tan tanh transpose
    """.split()
)
# Of complex numbers: functions with a branch cut see from which side it is met.
_LINEAR = frozenset(
    """
    add add_any broadcast_in_dim complex conj convert_element_type copy copy_p imag mul
    name neg real reshape select_n squeeze stop_gradient sub transpose
    """.split()
)
# With a number on the other side that decides the result where this one is 0.
_SHIFTS: Mapping[str, Callable[[Any], Any]] = {
    "add": lambda number: number != 0,
    "sub": lambda number: number != 0,
    "max": lambda number: number > 0,
    "min": lambda number: number < 0,
}


def signs_of_zeros(eqn: Equation) -> Sequence[Sign]:
    """What an equation makes of the sign of a 0, for each operand.

    Example:
        >>> import jax
        >>> [eqn] = jax.make_jaxpr(jax.lax.div)(1.0, 2.0).eqns
        >>> signs_of_zeros(eqn)
        ['kept', 'read']
    """
    sign = _sign(eqn)
    if eqn.primitive.name == "div" and not _is_complex(eqn):
        return ["kept", "read"]
    return [sign if _has_two_zeros(var) else "lost" for var in eqn.invars]


def _sign(eqn: Equation) -> Sign:
    name = eqn.primitive.name
    if _is_complex(eqn):
        return "kept" if name in _LINEAR else "read"
    if name == "integer_pow":
        power = eqn.params["y"]
        return "lost" if power % 2 == 0 else "kept" if power > 0 else "read"
    if name == "mul" and eqn.invars[0] is eqn.invars[1]:
        return "lost"
    numbers = [var.val for var in eqn.invars if isinstance(var, Number)]
    if name in _SHIFTS and any(map(_SHIFTS[name], numbers)):
        return "lost"
    if name in _LOST:
        return "lost"
    return "kept" if name in _KEPT else "read"


def _is_complex(eqn: Equation) -> bool:
    return any(
        jnp.issubdtype(var.aval.dtype, jnp.complexfloating)
        for var in (*eqn.invars, *eqn.outvars)
    )


def _has_two_zeros(var: Atom) -> bool:
    return jnp.issubdtype(var.aval.dtype, jnp.inexact)
