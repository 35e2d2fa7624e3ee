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
    with_zero,
)
from jaxprune.coupling._registry import register_label, rule
from jaxprune.coupling._types import Liveness, Narrowed, Step, Walk
from jaxprune.coupling.rules._elementwise import join_axes
from jaxprune.coupling.rules._factors import by_factors
from jaxprune.program._types import Equation
from jaxprune.program.primitives._moves import pad_map, spans


@rule("concatenate")
def _concatenate(walk: Walk, eqn: Equation, *values: Value) -> Value:
    shape, d = eqn.outvars[0].aval.shape, eqn.params["dimension"]
    joined = concatenate([v.axes[d] for v in values], [v.shape[d] for v in values])
    axes = tuple(
        joined if k == d else join_axes(walk, eqn, values, k, n, both)
        for k, n in enumerate(shape)
    )
    return Value(shape, axes, all(v.is_zero for v in values))


def _resize_split(kept: Liveness, step: Step) -> dict[str, Any]:
    d = step.eqn.params["axis"]
    return {"sizes": tuple([kept.shape(out)[d] for out in step.outs])}


register_label(by_factors, "split", resize=_resize_split)


def narrow_take(
    kept: Liveness, x: jax.Array, d: int, before: Axis, chosen: np.ndarray
) -> Any:
    """``take(original, chosen, d)`` when `x` holds only the living positions.

    `chosen` are positions of the original axis, all living. A run of neighbours (or
    an even stride) stays a slice; only a true permutation becomes a gather.
    """
    alive = kept.positions(before)
    where = chosen if alive is None else np.searchsorted(alive, chosen)
    return kept.take(x, where, d)


def _narrow_slice(kept: Liveness, step: Step, x: jax.Array) -> Narrowed:
    before, after = step.ins[0], step.outs[0]
    for d, span in enumerate(spans(step.eqn)):
        chosen = np.arange(before.shape[d])[span]
        alive = kept.positions(after.axes[d])
        chosen = chosen if alive is None else chosen[alive]
        if len(chosen) != x.shape[d]:
            x = narrow_take(kept, x, d, before.axes[d], chosen)
    return x


register_label(by_factors, "slice", narrow=_narrow_slice)


def _narrow_pad(kept: Liveness, step: Step, x: jax.Array, fill: jax.Array) -> Narrowed:
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
def _pad(walk: Walk, eqn: Equation, value: Value, fill: Value) -> Value:
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
    walk: Walk, axis: Axis, n: int, span: tuple[int, int, int], zero: bool
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


@rule("stack")
def _stack(walk: Walk, eqn: Equation, *values: Value) -> Value:
    d, shape = eqn.params["axis"], values[0].shape
    why = walk.ledger.reason("stacked", eqn)
    axes = [join_axes(walk, eqn, values, k, n, both) for k, n in enumerate(shape)]
    axes.insert(d, why)
    zero = all(value.is_zero for value in values)
    return Value(eqn.outvars[0].aval.shape, tuple(axes), zero)
