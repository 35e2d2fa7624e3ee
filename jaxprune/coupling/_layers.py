"""Layers under a scan: may one of them go?

A scan over stacked parameters applies one layer after the other to what is carried. A
layer whose parameters are all masked may be left out if it carries on what it was
given, as a residual block does: every branch adds 0. So each value in the body is
followed for a layer of zeros: it is 0, or it is what was carried in, or unknown.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from jax.extend.core import Literal as Number

from jaxprune.program._interpret import PLAIN, inner_jaxprs, interpret
from jaxprune.program._jaxprs import opened, scan_counts
from jaxprune.program._types import Equation, Jaxpr
from jaxprune.program.primitives import declaration


class Carried(NamedTuple):
    """What was carried in, as it is.

    Attributes:
        number: which of the carried values.
        dtype: its type; it may stand in a wider one.
    """

    number: int
    dtype: Any


State: TypeAlias = Literal["zero"] | Carried | None  # None: unknown

_SAME = frozenset("convert_element_type copy copy_p name sharding_constraint".split())


def zeros_of_idle_step(eqn: Equation, zero: Sequence[bool]) -> list[bool] | None:
    """For each value that a scan stacks, is it 0 for a layer of zeros?

    Args:
        eqn: the scan.
        zero: for each operand that is sliced, is it 0 where a layer is masked?

    Returns:
        None if such a layer does not carry on what it was given.
    """
    jaxpr = inner_jaxprs(eqn)[0]
    n_consts, n_carry = scan_counts(eqn.params)
    carried = opened(jaxpr)[0].invars[n_consts : n_consts + n_carry]
    carry = [Carried(k, var.aval.dtype) for k, var in enumerate(carried)]
    slices: list[State] = ["zero" if each else None for each in zero]
    outs = _run(jaxpr, [*[None] * n_consts, *carry, *slices])
    if outs[:n_carry] != carry:
        return None
    return [state == "zero" for state in outs[n_carry:]]


def _run(jaxpr: Jaxpr, ins: Sequence[State]) -> list[State]:
    def step(number: int, eqn: Equation, operands: list[State]) -> Sequence[State]:
        if not any(state is not None for state in operands):
            return [None] * len(eqn.outvars)
        return _step(eqn, operands)

    def constant(var: object) -> State:
        is_zero = isinstance(var, Number) and np.ndim(var.val) == 0 and var.val == 0
        return "zero" if is_zero else None

    return interpret(opened(jaxpr)[0], ins, step, constant)


def _step(eqn: Equation, operands: list[State]) -> Sequence[State]:
    name = eqn.primitive.name
    unknown: list[State] = [None] * len(eqn.outvars)
    if name in PLAIN:
        jaxpr = inner_jaxprs(eqn)[0]
        same = len(opened(jaxpr)[0].invars) == len(operands)
        return _run(jaxpr, operands) if same else unknown
    if name == "scan":
        outs = _run(inner_jaxprs(eqn)[0], operands)
        n_consts, n_carry = scan_counts(eqn.params)
        carry = operands[n_consts : n_consts + n_carry]
        return [*carry, *unknown[n_carry:]] if outs[:n_carry] == carry else unknown
    if name == "optimization_barrier":
        return operands
    if len(eqn.outvars) != 1:
        return unknown
    return [_result(eqn, operands)]


def _result(eqn: Equation, operands: list[State]) -> State:
    name, first = eqn.primitive.name, operands[0]
    if name in _SAME and isinstance(first, Carried):
        made = eqn.outvars[0].aval.dtype
        same = made == first.dtype or np.can_cast(first.dtype, made, "safe")
        return first if same else None
    if name in ("add", "add_any", "sub") and "zero" in operands:
        if isinstance(first, Carried) and operands[1] == "zero":
            return first
        if isinstance(operands[1], Carried) and name != "sub":
            return operands[1]
    known = declaration(eqn)
    signature = known and known.signature(eqn, lambda k: None)
    if known is None or signature is None:
        return None
    zero = [
        state == "zero"
        for k, state in enumerate(operands)
        if k not in signature.deciding
    ]
    if known.is_product or known.zero == "any":
        return "zero" if any(zero) else None
    is_zero = {
        "all": all(zero),
        "first": bool(zero) and zero[0],
        "quotient": bool(zero) and zero[0] and not zero[-1],
        "never": False,
    }[known.zero]
    return "zero" if is_zero else None
