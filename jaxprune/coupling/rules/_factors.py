"""Labels by factors: the rule of every primitive whose declaration says it all.

Axes that share a factor are tied, axes without one are pinned, and what is reduced over
is exact where dead positions hold 0.
"""

from collections.abc import Mapping, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple, TypeAlias

from jaxprune.coupling._data import concrete
from jaxprune.coupling._labels import (
    Axis,
    Value,
    both,
    either,
    flags_on,
    merge,
    take,
    with_flags,
    with_zero,
)
from jaxprune.coupling._types import Walk
from jaxprune.program._types import Equation
from jaxprune.program.primitives import (
    Declaration,
    Signature,
    declaration,
)
from jaxprune.program.primitives._signature import Factors

# Where labels along a factor are read: (operand, axis, which part of a composite axis).
Place: TypeAlias = tuple[int, int, int]


class _Plan(NamedTuple):
    """What to do with the labels of an equation, whatever they are.

    Attributes:
        known: the declaration.
        signature: the factors.
        pinned: (operand, axis) without a factor, or with one that keeps its size.
        composite: (operand, axis) -> the sizes of its parts.
        along: factor -> where labels along it are read.
        reduced: the factors that are reduced over.
        outs: for every axis of every result the factors that carry its labels.
        bare: is some axis of a result without a factor?
    """

    known: Declaration
    signature: Signature
    pinned: tuple[tuple[int, int], ...]
    composite: Mapping[tuple[int, int], tuple[int, ...]]
    along: Mapping[int, tuple[Place, ...]]
    reduced: tuple[int, ...]
    outs: tuple[tuple[Factors, ...], ...]
    bare: bool


def by_factors(walk: Walk, eqn: Equation, *values: Value) -> Any:
    """Labels of the results of an equation, from its declaration."""
    plan = _planned(eqn, values)
    if plan is None:
        return walk.unknown(eqn, *values)
    known = plan.known
    for k, d in plan.pinned:
        if not isinstance(axis := values[k].axes[d], int):
            walk.ledger.freeze(axis, walk.ledger.reason(known.pinned, eqn))
    parts = {
        (k, d): walk.ledger.split(values[k].axes[d], sizes)
        for (k, d), sizes in plan.composite.items()
    }
    joined = {}
    for f, places in plan.along.items():
        axes = [
            parts[k, d][part] if (k, d) in parts else values[k].axes[d]
            for k, d, part in places
        ]
        if f in plan.reduced:
            _reduce(walk, eqn, known, axes, values)
        else:
            joined[f] = _join(walk, plan, places, axes)
    is_zero = not plan.bare and _is_zero(plan, values)
    outs = [_result(walk, eqn, plan, n, joined, is_zero) for n in range(len(plan.outs))]
    return outs if eqn.primitive.multiple_results else outs[0]


def _planned(eqn: Equation, values: Sequence[Value]) -> _Plan | None:
    """The plan of an equation; layers that repeat share one."""
    known = declaration(eqn)
    if known is None:
        return None
    read = False

    def constant(operand: int) -> Any:
        nonlocal read
        read = True
        return concrete(values[operand])

    types = tuple([value.shape for value in values])
    key = eqn.primitive.name, id(known), types, tuple(eqn.params.values())
    try:
        plan = _PLANS.get(key)
    except TypeError:  # a parameter that cannot be hashed
        return _plan(eqn, known, constant)
    if plan is None:
        plan = _plan(eqn, known, constant)
        if plan is not None and not read:
            if len(_PLANS) >= _MOST_PLANS:
                _PLANS.clear()
            _PLANS[key] = plan
    return plan


_PLANS: dict[Any, _Plan] = {}
_MOST_PLANS = 4096


def _plan(eqn: Equation, known: Declaration, constant: Any) -> _Plan | None:
    signature = known.signature(eqn, constant)
    if signature is None:
        return None
    pinned, composite, along = [], {}, {}
    for k, axes in enumerate(signature.ins):
        for d, factors in enumerate(axes):
            if not factors or not signature.fixed.isdisjoint(factors):
                pinned.append((k, d))
            own = _long(signature, factors)
            if len(own) > 1:
                composite[k, d] = tuple([signature.sizes[f] for f in own])
            for part, f in enumerate(own):
                along.setdefault(f, []).append((k, d, part))
    return _Plan(
        known,
        signature,
        tuple(pinned),
        composite,
        {f: tuple(places) for f, places in sorted(along.items())},
        tuple(signature.contracted - signature.fixed),
        tuple([tuple([_long(signature, f) for f in axes]) for axes in signature.outs]),
        any(not factors for axes in signature.outs for factors in axes),
    )


def _long(signature: Signature, factors: Factors) -> Factors:
    """The factors that carry labels: those of size 1 beside others carry none."""
    if len(factors) <= 1:
        return factors
    return tuple([f for f in factors if signature.sizes[f] != 1]) or factors[:1]


def _reduce(
    walk: Walk,
    eqn: Equation,
    known: Declaration,
    axes: list[Axis],
    values: Sequence[Value],
) -> None:
    ledger, completes = walk.ledger, partial(walk.completes, eqn, *values)
    if known.is_product and len(axes) == 2:
        ledger.contract(axes[0], axes[1], "contraction", eqn, completes)
        return
    for axis in axes:
        if known.reduce == "sum":
            ledger.sum_over(axis, "sum", eqn, completes)
        else:
            name = _KINDS.get(eqn.primitive.name.removeprefix("reduce_"), "a reduction")
            pinned = with_zero(axis, False)
            ledger.sum_over(pinned, "reduction", eqn, completes, name=name)


_KINDS = {"max": "a maximum", "min": "a minimum", "prod": "a product"}


def _join(
    walk: Walk, plan: _Plan, places: Sequence[Place], axes: Sequence[Axis]
) -> Axis:
    """The labels along a factor, tied; 0 where the declaration says so."""
    zero, deciding = plan.known.zero, plan.signature.deciding
    live: Any = axes[0]
    if len(axes) == 1 and not deciding:  # the usual case
        return with_zero(live, False) if zero == "never" else live
    for axis in axes[1:]:
        walk.ledger.tie(axes[0], axis)
    for axis in axes:
        if isinstance(axis, int):
            return axis
        live = axis if len(axis) > len(live) else live
    data = [a for a, (k, _, _) in zip(axes, places, strict=True) if k not in deciding]
    if zero == "never" or not data:
        return with_zero(live, False)
    combine = either if zero == "any" else both
    flags = zip(*[flags_on(live, axis) for axis in data], strict=True)
    return with_flags(live, [reduce(combine, each) for each in flags])


def _is_zero(plan: _Plan, values: Sequence[Value]) -> bool:
    zero, deciding = plan.known.zero, plan.signature.deciding
    data = [value.is_zero for k, value in enumerate(values) if k not in deciding]
    return any(data) if zero == "any" else zero == "all" and all(data)


def _result(
    walk: Walk,
    eqn: Equation,
    plan: _Plan,
    number: int,
    joined: Mapping[int, Axis],
    is_zero: bool,
) -> Value:
    signature, shape = plan.signature, eqn.outvars[number].aval.shape
    axes: list[Axis] = []
    for n, factors in zip(shape, plan.outs[number], strict=True):
        if not factors:
            axes.append(walk.ledger.reason(plan.known.made, eqn))
            continue
        first: Any = factors[0]
        if first not in joined:
            # A broadcast axis holds copies: it takes whatever size its use asks for.
            axes.append(walk.ledger.fresh_axis(n, zero=is_zero))
        elif len(factors) > 1:
            sizes = [signature.sizes[f] for f in factors]
            axes.append(merge([joined[f] for f in factors], sizes))
        elif (number, first) in signature.taken:
            axes.append(take(joined[first], signature.taken[number, first]))
        else:
            axes.append(joined[first])
    return Value(shape, tuple(axes), is_zero)
