"""Collectives: reductions and moves over named axes.

Where `jax.vmap` binds the name, it leaves a collective over a dimension of the operand,
given by its number: that dimension is reduced as by `reduce_sum` and the like. A name
that a mesh binds stands for copies of the program on other devices, each of which cuts
the same positions: a position that is 0 on one is 0 on all.
"""

from typing import Any

import numpy as np

from jaxprune.coupling._labels import Axis, Value, take
from jaxprune.coupling._registry import rule
from jaxprune.coupling._types import Walk
from jaxprune.coupling.rules._elementwise import elementwise
from jaxprune.coupling.rules._reduction import reduced
from jaxprune.program._types import Equation


@rule("psum", "psum2", "psum_invariant", "unreduced_psum")
def _psum(walk: Walk, eqn: Equation, *values: Value) -> list[Value]:
    return [_over_dimensions(walk, eqn, v, "sum", keeps_zero=True) for v in values]


@rule("pmax", "pmin", "unreduced_pmax", "unreduced_pmin")
def _extreme(walk: Walk, eqn: Equation, *values: Value) -> list[Value]:
    name = "a maximum" if "pmax" in eqn.primitive.name else "a minimum"
    options = {"keeps_zero": False, "name": name}
    return [_over_dimensions(walk, eqn, v, "reduction", **options) for v in values]


def _over_dimensions(
    walk: Walk, eqn: Equation, value: Value, kind: str, **options: Any
) -> Value:
    """Reduces the dimensions that are named by numbers."""
    numbers = [d for d in eqn.params["axes"] if isinstance(d, int)]
    return reduced(walk, eqn, value, numbers, kind, **options)


for _name in ("ppermute", "pbroadcast", "preduced"):  # what nobody sends is 0
    rule(_name)(elementwise("first"))


def _with_axis(value: Value, shape: tuple[int, ...], d: int, axis: Axis) -> Value:
    """The value after a collective that changes or adds dimension `d`."""
    rest = d + 1 if len(shape) == len(value.shape) else d
    axes = (*value.axes[:d], axis, *value.axes[rest:])
    return Value(shape, axes, value.is_zero)


@rule("all_gather", "all_gather_invariant", "all_gather_reduced")
def _all_gather(walk: Walk, eqn: Equation, *values: Value) -> list[Value]:
    p, outs = eqn.params, []
    d, copies = p["all_gather_dimension"], p["axis_size"]
    for value, var in zip(values, eqn.outvars, strict=True):
        axis: Axis = walk.ledger.reason("gathered", eqn)
        if p["tiled"]:  # the copies stand one after the other
            axis = take(value.axes[d], _tiled(value.shape[d], copies))
        outs.append(_with_axis(value, var.aval.shape, d, axis))
    return outs


def _tiled(size: int, copies: int) -> np.ndarray:
    return np.tile(np.arange(size), copies)


@rule("reduce_scatter", "unreduced_reduce_scatter")
def _reduce_scatter(walk: Walk, eqn: Equation, value: Value) -> Value:
    d = eqn.params["scatter_dimension"]
    why = walk.ledger.reason("distributed", eqn)
    walk.ledger.freeze(value.axes[d], why)
    shape = eqn.outvars[0].aval.shape
    if eqn.params["tiled"]:
        return _with_axis(value, shape, d, why)
    axes = (*value.axes[:d], *value.axes[d + 1 :])
    return Value(shape, axes, value.is_zero)


@rule("all_to_all")
def _all_to_all(walk: Walk, eqn: Equation, value: Value) -> Value:
    p = eqn.params
    split, joined = p["split_axis"], p["concat_axis"]
    why = walk.ledger.reason("distributed", eqn)
    axes = list(value.axes)
    for d in (split, joined):
        walk.ledger.freeze(axes[d], why)
        axes[d] = why
    if not p["tiled"]:
        del axes[split]
        axes.insert(joined, why)
    return Value(eqn.outvars[0].aval.shape, tuple(axes), value.is_zero)
