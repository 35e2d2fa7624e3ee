"""Gather, scatter and dynamic slices: exact where the indices are constants.

An axis that the operation takes whole keeps its labels. An axis indexed by constants
is a map of positions. An axis indexed by data cannot be cut.
"""

from typing import Any

import jax
import numpy as np

from jaxprune.coupling._data import concrete
from jaxprune.coupling._labels import Axis, Value, all_zero, take, with_zero
from jaxprune.coupling._registry import register_label, rule
from jaxprune.coupling._types import Liveness, Narrowed, Step, Walk
from jaxprune.coupling.rules._factors import by_factors
from jaxprune.coupling.rules._pieces import narrow_take
from jaxprune.program._types import Equation
from jaxprune.program.primitives._indexing import (
    batch_axes,
    offsets,
    picked,
    start_of,
)

# --- dynamic_slice, dynamic_update_slice ----------------------------------------------


def _start(value: Value, n: int, size: int) -> int | None:
    """The start of a window if it is a constant."""
    return start_of(concrete(value), n, size)


def _narrow_dynamic_slice(
    kept: Liveness, step: Step, x: jax.Array, *operands: jax.Array
) -> Narrowed:
    before, after = step.ins[0], step.outs[0]
    sizes = list(step.eqn.params["slice_sizes"])
    starts: list[Any] = list(operands)
    for d, size in enumerate(sizes):
        alive = kept.positions(after.axes[d])
        if kept.positions(before.axes[d]) is None and alive is None:
            continue
        if size != before.shape[d]:
            first = _start(step.ins[1 + d], before.shape[d], size)
            chosen = first + np.arange(size)
            chosen = chosen if alive is None else chosen[alive]
            x = narrow_take(kept, x, d, before.axes[d], chosen)
        sizes[d] = x.shape[d]
        starts[d] = np.zeros((), starts[d].dtype)
    return step.eqn.primitive.bind(x, *starts, slice_sizes=tuple(sizes))


register_label(by_factors, "dynamic_slice", narrow=_narrow_dynamic_slice)


def _narrow_update(
    kept: Liveness, step: Step, x: jax.Array, update: jax.Array, *operands: jax.Array
) -> Narrowed:
    whole, part = step.ins[0], step.ins[1]
    starts: list[Any] = list(operands)
    for d, (n, size) in enumerate(zip(whole.shape, part.shape, strict=True)):
        alive = kept.positions(whole.axes[d])
        if alive is None:
            continue
        first = 0 if size == n else int(_start(step.ins[2 + d], n, size) or 0)
        starts[d] = np.asarray(np.searchsorted(alive, first), starts[d].dtype)
    return step.eqn.primitive.bind(x, update, *starts, **step.eqn.params)


@rule("dynamic_update_slice", narrow=_narrow_update)
def _dynamic_update_slice(
    walk: Walk, eqn: Equation, value: Value, update: Value, *starts: Value
) -> Value:
    ledger, axes = walk.ledger, []
    for d, (n, size) in enumerate(zip(value.shape, update.shape, strict=True)):
        whole, part = value.axes[d], update.axes[d]
        first = 0 if size == n else _start(starts[d], n, size)
        if first is None:
            why = ledger.reason("dynamic_update", eqn)
            ledger.freeze(whole, why)
            ledger.freeze(part, why)
            axes.append(whole if isinstance(whole, int) else why)
            continue
        span = slice(first, first + size)
        ledger.tie(take(whole, span), part)
        axes.append(_updated(whole, part))
    return Value(value.shape, tuple(axes))


def _updated(whole: Axis, part: Axis) -> Axis:
    """Labels of an updated axis: 0 at dead positions only if both were."""
    same = all_zero(whole) and all_zero(part)
    return whole if same else with_zero(whole, False)


# --- gather ---------------------------------------------------------------------------


def _narrow_gather(
    kept: Liveness, step: Step, x: jax.Array, index: jax.Array
) -> Narrowed:
    take = picked(step.eqn, concrete(step.ins[1]))
    out = step.outs[0]
    before = step.ins[0]
    if take is not None and _touched(kept, before, out):
        d, positions, batch = take
        alive = kept.positions(out.axes[batch])
        chosen = positions if alive is None else positions[alive]
        taken = narrow_take(kept, x, d, before.axes[d], chosen)
        return _move_axis(taken, d, batch)
    params = dict(step.eqn.params)
    params["slice_sizes"] = tuple(
        x.shape[d] if size == before.shape[d] else size
        for d, size in enumerate(params["slice_sizes"])
    )
    return step.eqn.primitive.bind(x, index, **params)


def _touched(kept: Liveness, *values: Value) -> bool:
    return any(kept.positions(a) is not None for v in values for a in v.axes)


def _move_axis(x: jax.Array, source: int, target: int) -> Any:
    """Moves one axis."""
    order = [d for d in range(x.ndim) if d != source]
    order.insert(target, source)
    return x if order == list(range(x.ndim)) else x.transpose(order)


@rule("gather", narrow=_narrow_gather)
def _gather(walk: Walk, eqn: Equation, operand: Value, index: Value) -> Value:
    ledger, numbers = walk.ledger, eqn.params["dimension_numbers"]
    shape = eqn.outvars[0].aval.shape
    batch = batch_axes(eqn)
    axes: list[Axis] = [0] * len(shape)
    windows = offsets(numbers, len(operand.shape))
    for k, d in zip(numbers.offset_dims, windows, strict=True):
        axes[k] = _window_axis(walk, eqn, operand, index, d)
    table = concrete(index)
    found = picked(eqn, table)
    for d in numbers.collapsed_slice_dims:
        if found is None:
            known = table is not None
            why = ledger.reason(
                "indexed_by_constants" if known else "indexed_by_data", eqn
            )
            ledger.freeze(operand.axes[d], why)
    for k, axis in zip(batch, index.axes[:-1], strict=True):
        axes[k] = with_zero(axis, False)
    for d, i in zip(
        numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True
    ):
        ledger.tie(operand.axes[d], index.axes[i])
    ledger.freeze(index.axes[-1], ledger.reason("index_vector", eqn))
    if found is not None:
        d, positions, k = found
        ledger.tie(take(operand.axes[d], positions), axes[k])
        axes[k] = take(operand.axes[d], positions)
    return Value(shape, tuple(axes), operand.is_zero)


def _window_axis(
    walk: Walk, eqn: Equation, operand: Value, index: Value, d: int
) -> Axis:
    axis, size = operand.axes[d], eqn.params["slice_sizes"][d]
    if size == operand.shape[d] or isinstance(axis, int):
        return axis
    why = walk.ledger.reason("gather_window", eqn)
    walk.ledger.freeze(axis, why)
    return why
