"""Primitives that join, cut and repeat: concatenate, split, slice, pad, stack, ...

As in `jaxprune.coupling.rules._shape`, parameters that name sizes are recomputed.
"""

from typing import Any

import jax
import numpy as np
from jax import lax

from jaxprune.coupling._labels import (
    ALIVE,
    Axis,
    Column,
    Value,
    both,
    concatenate,
    take,
    with_zero,
)
from jaxprune.coupling._registry import rule
from jaxprune.coupling.rules._elementwise import join_axes


@rule("concatenate")
def _concatenate(walk: Any, eqn: Any, *values: Value) -> Value:
    shape, d = eqn.outvars[0].aval.shape, eqn.params["dimension"]
    joined = concatenate([v.axes[d] for v in values], [v.shape[d] for v in values])
    axes = tuple(
        joined if k == d else join_axes(walk, eqn, values, k, n, both)
        for k, n in enumerate(shape)
    )
    return Value(shape, axes, all(v.is_zero for v in values))


def ranges(sizes: Any) -> list[slice]:
    """The parts of a split as slices."""
    ends = np.cumsum([int(n) for n in sizes])
    return [slice(int(e) - int(n), int(e)) for e, n in zip(ends, sizes, strict=True)]


def _resize_split(kept: Any, step: Any) -> dict[str, Any]:
    d = step.eqn.params["axis"]
    return {"sizes": tuple([kept.shape(out)[d] for out in step.outs])}


@rule("split", resize=_resize_split)
def _split(walk: Any, eqn: Any, value: Value) -> list[Value]:
    d = eqn.params["axis"]
    return [
        _moved(value, d, take(value.axes[d], span), span.stop - span.start)
        for span in ranges(eqn.params["sizes"])
    ]


def _moved(value: Value, d: int, axis: Axis, n: int) -> Value:
    """`value` with another axis `d`."""
    shape = (*value.shape[:d], n, *value.shape[d + 1 :])
    axes = (*value.axes[:d], axis, *value.axes[d + 1 :])
    return Value(shape, axes, value.is_zero)


def narrow_take(kept: Any, x: Any, d: int, before: Axis, chosen: np.ndarray) -> Any:
    """``take(original, chosen, d)`` when `x` holds only the living positions.

    `chosen` are positions of the original axis, all living. A run of neighbours (or
    an even stride) stays a slice; only a true permutation becomes a gather.
    """
    alive = kept.positions(before)
    where = chosen if alive is None else np.searchsorted(alive, chosen)
    return kept.take(x, where, d)


def spans(eqn: Any) -> list[slice]:
    """The slice of every axis that a slice equation takes."""
    p = eqn.params
    steps = p["strides"] or (1,) * len(p["start_indices"])
    spans = zip(p["start_indices"], p["limit_indices"], steps, strict=True)
    return [slice(a, b, s) for a, b, s in spans]


def _narrow_slice(kept: Any, step: Any, x: Any) -> Any:
    before, after = step.ins[0], step.outs[0]
    for d, span in enumerate(spans(step.eqn)):
        chosen = np.arange(before.shape[d])[span]
        alive = kept.positions(after.axes[d])
        chosen = chosen if alive is None else chosen[alive]
        if len(chosen) != x.shape[d]:
            x = narrow_take(kept, x, d, before.axes[d], chosen)
    return x


@rule("slice", narrow=_narrow_slice)
def _slice(walk: Any, eqn: Any, value: Value) -> Value:
    axes = tuple(
        axis if span == slice(0, n, 1) else take(axis, span)
        for axis, n, span in zip(value.axes, value.shape, spans(eqn), strict=True)
    )
    return Value(eqn.outvars[0].aval.shape, axes, value.is_zero)


@rule("rev")
def _rev(walk: Any, eqn: Any, value: Value) -> Value:
    back = slice(None, None, -1)
    axes = tuple(
        take(axis, back) if d in eqn.params["dimensions"] else axis
        for d, axis in enumerate(value.axes)
    )
    return Value(value.shape, axes, value.is_zero)


def pad_map(n: int, low: int, high: int, interior: int) -> np.ndarray:
    """For every output position, its input position or -1 where padding stands."""
    size = low + high + n + max(n - 1, 0) * interior
    source = np.full(size, -1)
    target = low + np.arange(n) * (interior + 1)
    inside = (target >= 0) & (target < size)
    source[target[inside]] = np.arange(n)[inside]
    return source


def _narrow_pad(kept: Any, step: Any, x: Any, fill: Any) -> Any:
    before, after = step.ins[0], step.outs[0]
    config = list(step.eqn.params["padding_config"])
    for d, (low, high, interior) in enumerate(config):
        alive = kept.positions(after.axes[d])
        if alive is None and kept.positions(before.axes[d]) is None:
            continue
        stays = pad_map(before.shape[d], low, high, interior)
        stays = stays if alive is None else stays[alive]
        inner = np.flatnonzero(stays >= 0)
        x = narrow_take(kept, x, d, before.axes[d], stays[inner])
        if len(inner) and len(np.unique(np.diff(inner))) <= 1:
            gap = int(inner[1] - inner[0]) - 1 if len(inner) > 1 else 0
            config[d] = (int(inner[0]), len(stays) - 1 - int(inner[-1]), gap)
            continue
        # Unevenly spaced: append one position of padding, then pick.
        line = [(0, 0, 0)] * x.ndim
        line[d] = (0, 1, 0)
        x = lax.pad(x, fill, line)
        pick = np.full(len(stays), len(inner))
        pick[inner] = np.arange(len(inner))
        x, config[d] = jax.numpy.take(x, pick, axis=d), (0, 0, 0)
    return lax.pad(x, fill, config)


@rule("pad", narrow=_narrow_pad)
def _pad(walk: Any, eqn: Any, value: Value, fill: Value) -> Value:
    config = eqn.params["padding_config"]
    # The padding of one axis runs along all others, whatever is dead there.
    grown = [n > 0 for span in config for n in span]
    keeps = fill.is_zero or not any(grown)
    axes = []
    for axis, n, span in zip(value.axes, value.shape, config, strict=True):
        if span != (0, 0, 0):
            axis = _padded(walk, axis, n, span, fill.is_zero)
        axes.append(axis if keeps else with_zero(axis, False))
    zero = value.is_zero and fill.is_zero
    return Value(eqn.outvars[0].aval.shape, tuple(axes), zero)


def _padded(
    walk: Any, axis: Axis, n: int, span: tuple[int, int, int], zero: bool
) -> Axis:
    if isinstance(axis, int):
        return axis
    source = pad_map(n, *span)
    new = source < 0
    # Padding is a unit of its own: it goes when its consumer's position goes.
    fill = walk.ledger.fresh(len(source))
    columns = []
    for column in axis:
        old = np.where(new, 0, source)
        zeros = np.broadcast_to(column.zero, n)[old]
        units = np.where(new, fill, column.units[old])
        columns.append(Column(units, np.where(new, zero, zeros)))
        fill = np.full(len(source), ALIVE)
    return tuple(columns)


@rule("tile")
def _tile(walk: Any, eqn: Any, value: Value) -> Value:
    axes = tuple(
        axis if r == 1 else take(axis, np.tile(np.arange(n), r))
        for axis, n, r in zip(value.axes, value.shape, eqn.params["reps"], strict=True)
    )
    return Value(eqn.outvars[0].aval.shape, axes, value.is_zero)


@rule("stack")
def _stack(walk: Any, eqn: Any, *values: Value) -> Value:
    d, shape = eqn.params["axis"], values[0].shape
    why = walk.ledger.reason("stacked", eqn)
    axes = [join_axes(walk, eqn, values, k, n, both) for k, n in enumerate(shape)]
    axes.insert(d, why)
    zero = all(value.is_zero for value in values)
    return Value(eqn.outvars[0].aval.shape, tuple(axes), zero)


@rule("unstack")
def _unstack(walk: Any, eqn: Any, value: Value) -> list[Value]:
    d = eqn.params["axis"]
    walk.ledger.freeze(value.axes[d], walk.ledger.reason("unstacked", eqn))
    shape = (*value.shape[:d], *value.shape[d + 1 :])
    axes = (*value.axes[:d], *value.axes[d + 1 :])
    return [Value(shape, axes, value.is_zero) for _ in eqn.outvars]
