"""Primitives that hold programs: jit, remat, custom derivatives, scan, while, cond."""

import functools
from typing import Any

import jax
from jax import lax
from jax.extend.core import ClosedJaxpr, DropVar
from jax.extend.linear_util import wrap_init

from jaxprune.coupling._labels import Axis, Value, both, flags_on, with_flags
from jaxprune.coupling._registry import rule
from jaxprune.program._jaxprs import abstract, bind, opened, scan_counts

# --- calls ---------------------------------------------------------------------------


def _all_operands(eqn: Any) -> int:
    return len(eqn.invars)


def _used(eqn: Any) -> list[bool]:
    return [not isinstance(v, DropVar) for v in eqn.outvars]


@rule("jit", "pjit", "closed_call", "core_call", inline=True, whole=_all_operands)
def _call(walk: Any, eqn: Any, *values: Value) -> list[Value]:
    inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    return walk.enter(inner, list(values), _used(eqn))


def _narrow_remat(kept: Any, step: Any, *operands: Any) -> Any:
    p = step.eqn.params

    def body(*args: Any) -> Any:
        return kept.replay(step.subs[0], args)

    options = {"prevent_cse": p["prevent_cse"], "policy": p["policy"]}
    return jax.checkpoint(body, **options)(*operands)


@rule("remat2", "checkpoint", "remat", narrow=_narrow_remat, whole=_all_operands)
def _remat(walk: Any, eqn: Any, *values: Value) -> list[Value]:
    return walk.enter_branch(eqn.params["jaxpr"], list(values))


# --- custom derivatives --------------------------------------------------------------
#
# The derivative rule of the original call is itself traced, at its full size, and
# narrowed like any other program, when somebody differentiates.


def _full_avals(eqn: Any) -> list[jax.ShapeDtypeStruct]:
    return [abstract(v.aval) for v in eqn.invars]


def _resize_custom_jvp(kept: Any, step: Any) -> dict[str, Any]:
    p = step.eqn.params
    ins = step.ins[p["num_consts"] :]
    slopes = [Value(value.shape, value.axes, data=value.data) for value in ins]

    @functools.cache
    def small_jvp(*zeros: bool) -> Any:
        jaxpr, consts, out_zeros = p["jvp_jaxpr_fun"].call_wrapped(*zeros)
        tangents = [v for v, zero in zip(slopes, zeros, strict=True) if not zero]
        given = list(map(kept.given, (*ins, *tangents)))
        small = kept.narrow_jaxpr(ClosedJaxpr(jaxpr, consts), given)
        return *opened(small), out_zeros

    debug_info = p["jvp_jaxpr_fun"].debug_info
    return {
        "call_jaxpr": kept.program(step.subs[0]),
        "jvp_jaxpr_fun": wrap_init(small_jvp, debug_info=debug_info),
    }


def _narrow_custom_vjp(kept: Any, step: Any, *operands: Any) -> Any:
    eqn = step.eqn
    avals = tuple(_full_avals(eqn))

    @jax.custom_vjp
    def call(*args: Any) -> Any:
        return kept.replay(step.subs[0], args)

    def full_forward(*primals: Any) -> Any:
        return jax.vjp(lambda *xs: bind(eqn, *xs), *primals)

    forward = kept.narrow_call(full_forward, avals, list(map(kept.given, step.ins)))

    def full_backward(residuals: Any, cotangents: Any) -> Any:
        return residuals(cotangents)

    def backward(residuals: Any, cotangents: Any) -> Any:
        shapes = forward.out_shapes[1]
        cts = [abstract(v.aval) for v in eqn.outvars]
        given = [*forward.out_given[len(cts) :], *map(kept.given, step.outs)]
        run = kept.narrow_call(full_backward, (shapes, cts), given)
        slopes = run(residuals, list(cotangents))
        # Nobody asks for the slope of data, which is whole.
        pairs = zip(slopes, step.ins, strict=True)
        return tuple([None if value.data else slope for slope, value in pairs])

    call.defvjp(forward, backward)
    return call(*operands)


@rule("custom_jvp_call", resize=_resize_custom_jvp, whole=_all_operands)
def _custom_jvp(walk: Any, eqn: Any, *values: Value) -> list[Value]:
    return walk.enter_branch(eqn.params["call_jaxpr"], list(values))


@rule("custom_vjp_call", narrow=_narrow_custom_vjp, whole=_all_operands)
def _custom_vjp(walk: Any, eqn: Any, *values: Value) -> list[Value]:
    return walk.enter_branch(eqn.params["call_jaxpr"], list(values))


# --- loops and branches --------------------------------------------------------------


def _meet(walk: Any, a: Value, b: Value) -> Value:
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


def _flags(values: list[Value]) -> list[Any]:
    """What a loop can still lose: the zero flags and which axes are live."""
    return [
        (
            v.is_zero,
            [a if isinstance(a, int) else [str(c.zero) for c in a] for a in v.axes],
        )
        for v in values
    ]


def _fixed_point(walk: Any, carry: list[Value], body: Any) -> list[Value]:
    """Walks a loop body until its carry keeps the flags it came in with."""
    carry = [Value(v.shape, v.axes, v.is_zero) for v in carry]  # no longer constant
    while True:
        walk.forget_subs()
        after = [_meet(walk, x, y) for x, y in zip(carry, body(carry), strict=True)]
        if _flags(after) == _flags(carry):
            return after
        carry = after


def _narrow_scan(kept: Any, step: Any, *operands: Any) -> Any:
    p = step.eqn.params
    n_consts, n_carry = scan_counts(p)
    consts, init = operands[:n_consts], operands[n_consts : n_consts + n_carry]

    def body(carry: Any, xs: Any) -> Any:
        outs = kept.replay(step.subs[0], [*consts, *carry, *xs])
        return outs[:n_carry], outs[n_carry:]

    xs = list(operands[n_consts + n_carry :])
    options = {"length": p["length"], "reverse": p["reverse"], "unroll": p["unroll"]}
    carry, ys = lax.scan(body, list(init), xs, **options)
    return [*carry, *ys]


@rule("scan", narrow=_narrow_scan, whole=lambda eqn: scan_counts(eqn.params)[0])
def _scan(walk: Any, eqn: Any, *values: Value) -> list[Value]:
    n_consts, n_carry = scan_counts(eqn.params)
    consts = list(values[:n_consts])
    why = walk.ledger.reason("the axis of a scan", eqn)
    inner = []
    for value in values[n_consts + n_carry :]:
        walk.ledger.freeze(value.axes[0], why)
        inner.append(Value(value.shape[1:], value.axes[1:], value.is_zero))
    ys: list[Value] = []

    def body(carry: list[Value]) -> list[Value]:
        outs = walk.enter_branch(eqn.params["jaxpr"], [*consts, *carry, *inner])
        ys[:] = outs[n_carry:]
        return outs[:n_carry]

    carry = _fixed_point(walk, list(values[n_consts : n_consts + n_carry]), body)
    length = eqn.params["length"]
    stacked = [Value((length, *y.shape), (why, *y.axes), y.is_zero) for y in ys]
    return carry + stacked


def _narrow_while(kept: Any, step: Any, *operands: Any) -> Any:
    p = step.eqn.params
    n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
    cond_consts, body_consts = operands[:n_cond], operands[n_cond : n_cond + n_body]

    def cond(carry: Any) -> Any:
        return kept.replay(step.subs[1], [*cond_consts, *carry])[0]

    def body(carry: Any) -> Any:
        return kept.replay(step.subs[0], [*body_consts, *carry])

    return lax.while_loop(cond, body, list(operands[n_cond + n_body :]))


def _loop_constants(eqn: Any) -> int:
    return eqn.params["cond_nconsts"] + eqn.params["body_nconsts"]


@rule("while", narrow=_narrow_while, whole=_loop_constants)
def _while(walk: Any, eqn: Any, *values: Value) -> list[Value]:
    p = eqn.params
    n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
    cond_consts, body_consts = values[:n_cond], values[n_cond : n_cond + n_body]

    def body(carry: list[Value]) -> list[Value]:
        return walk.enter_branch(p["body_jaxpr"], [*body_consts, *carry])

    carry = _fixed_point(walk, list(values[n_cond + n_body :]), body)
    walk.enter(p["cond_jaxpr"], [*cond_consts, *carry])
    return carry


def _narrow_cond(kept: Any, step: Any, index: Any, *operands: Any) -> Any:
    branches = [lambda *args, sub=sub: kept.replay(sub, args) for sub in step.subs]
    return lax.switch(index, branches, *operands)


@rule("cond", narrow=_narrow_cond, whole=_all_operands)
def _cond(walk: Any, eqn: Any, index: Value, *operands: Value) -> list[Value]:
    branches = eqn.params["branches"]
    outs = [walk.enter_branch(branch, list(operands)) for branch in branches]
    met = list(outs[0])
    for other in outs[1:]:
        met = [_meet(walk, x, y) for x, y in zip(met, other, strict=True)]
    return met
