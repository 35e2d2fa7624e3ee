"""Scatter: exact where the indices are constants, as for `indexing`."""

from typing import Any

import jax
import numpy as np

from jaxprune.coupling._data import concrete
from jaxprune.coupling._labels import Axis, Value, both, take
from jaxprune.coupling._ledger import Ledger
from jaxprune.coupling._registry import rule
from jaxprune.coupling._types import Liveness, Narrowed, Step, Walk
from jaxprune.coupling.rules._elementwise import join_axes
from jaxprune.coupling.rules._indexing import _updated
from jaxprune.program._jaxprs import bind
from jaxprune.program._types import Equation
from jaxprune.program.primitives._indexing import Write, windows, writes


def _narrow_scatter(
    kept: Liveness, step: Step, x: jax.Array, index: Any, update: jax.Array
) -> Narrowed:
    written = writes(step.eqn, concrete(step.ins[1]))
    if 0 in update.shape:
        return x
    columns = []
    for d, write in written.items():
        alive = kept.positions(step.ins[0].axes[d])
        where = write.positions
        if alive is not None:
            # The new number of a position that lives: how many live before it.
            where = np.searchsorted(alive, where[np.isin(where, alive)])
        # A window is written from its first position on, the others one by one.
        columns.append(where[:1] if write.window else where)
    if columns:
        moved = np.stack(columns, axis=-1).astype(index.dtype)
        lead = (1,) * (index.ndim - 2) + (len(moved),) if index.ndim > 1 else ()
        index = moved.reshape(*lead, len(columns))
    return bind(step.eqn, x, index, update)


@rule(
    "scatter",
    "scatter-add",
    "scatter-sub",
    "scatter-mul",
    "scatter-min",
    "scatter-max",
    narrow=_narrow_scatter,
)
def _scatter(
    walk: Walk, eqn: Equation, operand: Value, index: Value, update: Value
) -> Value:
    ledger = walk.ledger
    inside = windows(eqn.params["dimension_numbers"], len(operand.shape))
    indexed = eqn.params["dimension_numbers"].scatter_dims_to_operand_dims
    written = writes(eqn, concrete(index))
    why = ledger.reason("scattered", eqn)
    axes: list[Axis] = []
    tied = set()
    for d, (axis, n) in enumerate(zip(operand.axes, operand.shape, strict=True)):
        k = written[d].axis if d in written else inside.get(d)
        if d in written:
            axes.append(_written(ledger, eqn, axis, update, written[d]))
        elif k is not None and d not in indexed and update.shape[k] == n:
            pair = Value((n,), (axis,)), Value((n,), (update.axes[k],))
            axes.append(join_axes(walk, eqn, pair, 0, n, both))
        else:
            ledger.freeze(axis, why)
            axes.append(why)
            continue
        tied.add(k)
    rest = [axis for k, axis in enumerate(update.axes) if k not in tied]
    for axis in (*rest, *index.axes):
        ledger.freeze(axis, why)
    return Value(operand.shape, tuple(axes))


def _written(
    ledger: Ledger, eqn: Equation, axis: Axis, update: Value, write: Write
) -> Axis:
    """Labels of an axis that is written to at constant positions."""
    target = take(axis, write.positions)
    if write.axis is None:
        ledger.freeze(target, ledger.reason("written", eqn))
        return axis
    part = update.axes[write.axis]
    ledger.tie(target, part)
    return _updated(axis, part)
