"""Primitives that hold programs: jit, remat, scan, while, cond.

Those with derivatives of their own are in `jaxprune.coupling.rules._custom`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.extend.core import DropVar

from jaxprune.core._types import PyTree
from jaxprune.coupling._labels import (
    Axis,
    Value,
    all_zero,
    both,
    flags_on,
    with_flags,
    with_zero,
)
from jaxprune.coupling._layers import zeros_of_idle_step
from jaxprune.coupling._registry import rule
from jaxprune.coupling._types import Liveness, Narrowed, Step, Walk
from jaxprune.program._interpret import (
    CALLS,
    REMATS,
    Passage,
    inner_jaxprs,
    through,
)
from jaxprune.program._jaxprs import abstract, scan_counts
from jaxprune.program._types import Equation

# --- calls ---------------------------------------------------------------------------


def _all_operands(eqn: Equation) -> int:
    return len(eqn.invars)


def _used(eqn: Equation) -> list[bool]:
    return [not isinstance(v, DropVar) for v in eqn.outvars]


@rule(*CALLS, inline=True, whole=_all_operands)
def _call(walk: Walk, eqn: Equation, *values: Value) -> list[Value]:
    return walk.enter(inner_jaxprs(eqn)[0], list(values), _used(eqn))


@rule("call_hi_primitive", inline=True, whole=_all_operands)
def _high(walk: Walk, eqn: Equation, *values: Value) -> list[Value]:
    """A primitive of JAX that is itself a program (`jnp.digitize`, from 0.12 on)."""
    avals = [abstract(var.aval) for var in eqn.invars]
    expand = functools.partial(eqn.primitive.to_lojax, **eqn.params)
    return walk.enter(jax.make_jaxpr(expand)(*avals), list(values), _used(eqn))


def _narrow_remat(kept: Liveness, step: Step, *operands: jax.Array) -> Narrowed:
    p = step.eqn.params

    def body(*args: PyTree) -> Any:
        return kept.replay(step.subs[0], args)

    options = {"prevent_cse": p["prevent_cse"], "policy": p["policy"]}
    return jax.checkpoint(body, **options)(*operands)


# --- loops and branches --------------------------------------------------------------


def meet(walk: Walk, a: Value, b: Value) -> Value:
    """Ties two values that stand for one; 0 only where both are."""
    axes = []
    for x, y in zip(a.axes, b.axes, strict=True):
        walk.ledger.tie(x, y)
        axes.append(_weaker(x, y))
    return Value(a.shape, tuple(axes), a.is_zero and b.is_zero)


def _weaker(x: Axis, y: Axis) -> Axis:
    if isinstance(x, int) or isinstance(y, int):
        return x if isinstance(x, int) else y
    flags = [column.zero for column in x]
    return with_flags(x, list(map(both, flags, flags_on(x, y))))


def _flags(values: list[Value]) -> list[PyTree]:
    """What a loop can still lose: the zero flags and which axes are live."""
    return [
        (
            v.is_zero,
            [a if isinstance(a, int) else [str(c.zero) for c in a] for a in v.axes],
        )
        for v in values
    ]


def _pass_through(walk: Walk, eqn: Equation, *values: Value) -> list[Value]:
    """Labels through the inner programs of an equation."""
    programs = inner_jaxprs(eqn)
    length: Any = eqn.params.get("length")  # only a scan has one, and stacks
    layers, zeros = _layers(walk, eqn, values)
    stacks = iter(zeros)

    def run(number: int, ins: list[Value]) -> list[Value]:
        if number == 0:
            walk.forget_subs()  # of an earlier turn of a loop
        return walk.enter_branch(programs[number], ins)

    def unstacked(value: Value) -> Value:
        if isinstance(layers, int):
            walk.ledger.freeze(value.axes[0], layers)
        return Value(value.shape[1:], value.axes[1:], value.is_zero)

    def stacked(value: Value) -> Value:
        axis = with_zero(layers, next(stacks, False))
        return Value((length, *value.shape), (axis, *value.axes), value.is_zero)

    return through(
        eqn,
        values,
        Passage(
            run,
            join=lambda a, b: meet(walk, a, b),
            settled=lambda after, before: _flags(after) == _flags(before),
            carried=lambda v: Value(v.shape, v.axes, v.is_zero),  # no longer constant
            unstacked=unstacked,
            stacked=stacked,
        ),
    )


def _layers(
    walk: Walk, eqn: Equation, values: Sequence[Value]
) -> tuple[Axis, list[bool]]:
    """The axis of the layers that a scan iterates over, and what is 0 where one is.

    Returns:
        The labels, or the reason why no layer may go; and for each value that is
        stacked whether it is 0 where a layer is masked.
    """
    writers, none = walk.writers, []
    if eqn.primitive.name != "scan":
        return walk.ledger.reason("scan", eqn), none
    sliced = values[sum(scan_counts(eqn.params)) :]
    if writers is None or not any(writers.is_layered(v.axes[0]) for v in sliced):
        return walk.ledger.reason("scan", eqn), none
    zero = [value.is_zero or _is_cut_to_0(value.axes[0]) for value in sliced]
    made = zeros_of_idle_step(eqn, zero)
    if made is None:
        return walk.ledger.reason("no_identity", eqn), none
    first, *others = [value.axes[0] for value in sliced]
    for axis in others:
        walk.ledger.tie(first, axis)
        first = axis if isinstance(axis, int) else first
    if not isinstance(first, int):  # one is applied after the other
        walk.ledger.ordered.append(first[0].units)
    return first, made


def _is_cut_to_0(axis: Axis) -> bool:
    return not isinstance(axis, int) and all_zero(axis)


def _narrow_scan(kept: Liveness, step: Step, *operands: jax.Array) -> Narrowed:
    p = step.eqn.params
    n_consts, n_carry = scan_counts(p)
    consts, init = operands[:n_consts], operands[n_consts : n_consts + n_carry]

    def body(carry: PyTree, xs: PyTree) -> Any:
        outs = kept.replay(step.subs[0], [*consts, *carry, *xs])
        return outs[:n_carry], outs[n_carry:]

    xs = list(operands[n_consts + n_carry :])
    sliced = step.ins[n_consts + n_carry :]
    length = kept.shape(sliced[0])[0] if sliced else p["length"]
    unroll = p["unroll"] if length == p["length"] else min(p["unroll"], max(length, 1))
    options = {"length": length, "reverse": p["reverse"], "unroll": unroll}
    carry, ys = lax.scan(body, list(init), xs, **options)
    return [*carry, *ys]


def _scan_constants(eqn: Equation) -> int:
    return scan_counts(eqn.params)[0]


rule(*REMATS, narrow=_narrow_remat, whole=_all_operands)(_pass_through)
rule("scan", narrow=_narrow_scan, whole=_scan_constants)(_pass_through)


def _narrow_while(kept: Liveness, step: Step, *operands: jax.Array) -> Narrowed:
    p = step.eqn.params
    n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
    cond_consts, body_consts = operands[:n_cond], operands[n_cond : n_cond + n_body]

    def cond(carry: PyTree) -> Any:
        return kept.replay(step.subs[1], [*cond_consts, *carry])[0]

    def body(carry: PyTree) -> Any:
        return kept.replay(step.subs[0], [*body_consts, *carry])

    return lax.while_loop(cond, body, list(operands[n_cond + n_body :]))


def _loop_constants(eqn: Equation) -> int:
    return eqn.params["cond_nconsts"] + eqn.params["body_nconsts"]


rule("while", narrow=_narrow_while, whole=_loop_constants)(_pass_through)


def _narrow_cond(
    kept: Liveness, step: Step, index: jax.Array, *operands: jax.Array
) -> Narrowed:
    branches = [lambda *args, sub=sub: kept.replay(sub, args) for sub in step.subs]
    return lax.switch(index, branches, *operands)


rule("cond", narrow=_narrow_cond, whole=_all_operands)(_pass_through)
