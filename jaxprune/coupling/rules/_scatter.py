"""Scatter: exact where the indices are constants, as for `indexing`."""

from typing import Any, NamedTuple

import numpy as np

from jaxprune.coupling._labels import Axis, Value, both, take
from jaxprune.coupling._registry import rule
from jaxprune.coupling.rules._elementwise import join_axes
from jaxprune.coupling.rules._indexing import _indices, _updated
from jaxprune.program._jaxprs import bind


class _Write(NamedTuple):
    """Where a scatter writes on one axis of its operand."""

    positions: np.ndarray
    axis: int | None  # the axis of the update that runs along these positions
    window: bool  # neighbours, of which the index holds the first


def _windows(numbers: Any, ndim: int) -> dict[int, int]:
    """Axis of the operand -> axis of the update that holds windows of it."""
    gone = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    stay = [d for d in range(ndim) if d not in gone]
    return dict(zip(stay, numbers.update_window_dims, strict=True))


def _writes(eqn: Any, values: tuple[Value, ...]) -> dict[int, _Write]:
    """The axes on which a scatter writes to constant positions.

    Either one block at a constant place, or one axis at a list of constants, as in
    ``x.at[2:5]``, ``x.at[:, ::2]`` and ``x.at[3]``; empty for all else.
    """
    numbers = eqn.params["dimension_numbers"]
    operand, index, update = values
    dims = numbers.scatter_dims_to_operand_dims
    found = _indices(index, len(dims))
    if found is None or numbers.operand_batching_dims:
        return {}
    windows = _windows(numbers, len(operand.shape))
    lines = [k for k in range(len(update.shape)) if k not in numbers.update_window_dims]
    listed = len(dims) == len(lines) == 1 and dims[0] not in windows
    if len(found) != 1 and not listed:
        return {}
    writes = {}
    for d, starts in zip(dims, found.T, strict=True):
        k = lines[0] if listed else windows.get(d)
        size = update.shape[windows[d]] if d in windows else 1
        if (starts < 0).any() or (starts > operand.shape[d] - size).any():
            return {}
        positions = (starts[:, None] + np.arange(size)[None]).ravel()
        writes[d] = _Write(positions, k, d in windows)
    return writes


def _narrow_scatter(kept: Any, step: Any, x: Any, index: Any, update: Any) -> Any:
    writes = _writes(step.eqn, step.ins)
    if 0 in update.shape:
        return x
    columns = []
    for d, write in writes.items():
        alive = kept.positions(step.ins[0].axes[d])
        where = write.positions
        if alive is not None:
            where = np.searchsorted(alive, where[np.isin(where, alive)])
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
def _scatter(walk: Any, eqn: Any, operand: Value, index: Value, update: Value) -> Value:
    ledger, values = walk.ledger, (operand, index, update)
    windows = _windows(eqn.params["dimension_numbers"], len(operand.shape))
    indexed = eqn.params["dimension_numbers"].scatter_dims_to_operand_dims
    writes = _writes(eqn, values)
    why = ledger.reason("scattered", eqn)
    axes: list[Axis] = []
    tied = set()
    for d, (axis, n) in enumerate(zip(operand.axes, operand.shape, strict=True)):
        k = writes[d].axis if d in writes else windows.get(d)
        if d in writes:
            axes.append(_written(ledger, eqn, axis, update, writes[d]))
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


def _written(ledger: Any, eqn: Any, axis: Axis, update: Value, write: _Write) -> Axis:
    """Labels of an axis that is written to at constant positions."""
    target = take(axis, write.positions)
    if write.axis is None:
        ledger.freeze(target, ledger.reason("written", eqn))
        return axis
    part = update.axes[write.axis]
    ledger.tie(target, part)
    return _updated(axis, part)
