"""Primitives that move positions without computing: reshape, transpose, pad, ...

Their parameters name sizes, so each has a half that recomputes them from the positions
that stay.
"""

from typing import Any

import jax
from jax import lax

from jaxprune.coupling._labels import (
    Axis,
    Value,
    merge,
)
from jaxprune.coupling._registry import register_label, rule
from jaxprune.coupling._types import Liveness, Narrowed, Step, Walk
from jaxprune.coupling.rules._factors import by_factors
from jaxprune.program._types import Equation
from jaxprune.program.primitives._moves import order_of_reshape
from jaxprune.program.primitives._signature import segments

# --- broadcast, iota -----------------------------------------------------------------


def _resize_broadcast(kept: Liveness, step: Step) -> dict[str, Any]:
    return {"shape": kept.shape(step.outs[0])}


register_label(by_factors, "broadcast_in_dim", resize=_resize_broadcast)


def _resize_iota(kept: Liveness, step: Step) -> dict[str, object] | None:
    out = step.outs[0]
    if kept.mask(out.axes[step.eqn.params["dimension"]]) is not None:
        return None  # some numbers are gone
    return {"shape": kept.shape(out)}


def _narrow_iota(kept: Liveness, step: Step) -> Narrowed:
    p, out = step.eqn.params, step.outs[0]
    positions = kept.positions(out.axes[p["dimension"]])
    line = jax.numpy.asarray(positions, p["dtype"])
    return lax.broadcast_in_dim(line, kept.shape(out), (p["dimension"],))


@rule("iota", resize=_resize_iota, narrow=_narrow_iota)
def _iota(walk: Walk, eqn: Equation, *dynamic: Value) -> Value:
    shape = tuple(eqn.params["shape"])
    return Value(shape, tuple(walk.ledger.fresh_axis(n) for n in shape))


# --- reshape, squeeze, transpose -----------------------------------------------------


def reshape_axes(
    walk: Walk, eqn: Equation, value: Value, shape: tuple[int, ...]
) -> tuple[Axis, ...]:
    """Labels after a row-major reshape."""
    if 0 in shape:  # nothing moves, so nothing is coupled
        return tuple(walk.ledger.fresh_axis(n, zero=True) for n in shape)
    why = walk.ledger.reason("size_one")
    sizes, moved = [], []
    for axis, n in zip(value.axes, value.shape, strict=True):
        if n != 1:
            sizes.append(n)
            moved.append(axis)
        elif not isinstance(axis, int):
            walk.ledger.freeze(axis, walk.ledger.reason("dropped", eqn))
    if sizes == [n for n in shape if n != 1]:  # only axes of size 1 come and go
        rest = iter(moved)
        return tuple([why if n == 1 else next(rest) for n in shape])
    axes: list[Axis] = [why] * len(shape)
    for run_a, run_b in segments(value.shape, shape):
        sizes_a = [value.shape[d] for d in run_a]
        merged = merge([value.axes[d] for d in run_a], sizes_a)
        if len(run_b) == 1:
            axes[run_b[0]] = merged
            continue
        parts = walk.ledger.split(merged, tuple(shape[d] for d in run_b))
        for d, part in zip(run_b, parts, strict=True):
            axes[d] = part
    return tuple(axes)


def _resize_reshape(kept: Liveness, step: Step) -> dict[str, Any]:
    return {"new_sizes": kept.shape(step.outs[0])}


@rule("reshape", resize=_resize_reshape)
def _reshape(walk: Walk, eqn: Equation, value: Value, *dynamic: Value) -> Value:
    order = order_of_reshape(eqn)
    value = value._replace(
        shape=tuple([value.shape[d] for d in order]),
        axes=tuple([value.axes[d] for d in order]),
    )
    shape = tuple(eqn.params["new_sizes"])
    return Value(shape, reshape_axes(walk, eqn, value, shape), value.is_zero)
