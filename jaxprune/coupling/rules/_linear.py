"""Contractions: dot_general and convolution."""

from typing import Any

import jax.numpy as jnp

from jaxprune.coupling._labels import Axis, Value, either, flags_on, merge, with_flags
from jaxprune.coupling._registry import rule


def _product(walk: Any, a: Axis, b: Axis) -> Axis:
    """Ties two axes that are multiplied position by position."""
    walk.ledger.tie(a, b)
    if isinstance(a, int) or isinstance(b, int):
        return a if isinstance(a, int) else b
    chosen, other = (a, b) if len(a) >= len(b) else (b, a)
    flags = [column.zero for column in chosen]
    return with_flags(chosen, list(map(either, flags, flags_on(chosen, other))))


def _empty(kept: Any, step: Any) -> bool:
    """Is an operand empty?"""
    return any(0 in kept.shape(value) for value in step.ins[:2])


def _sum_over_nothing(kept: Any, step: Any, *operands: Any) -> Any:
    return jnp.zeros(kept.shape(step.outs[0]), step.eqn.outvars[0].aval.dtype)


def _resize_dot(kept: Any, step: Any) -> dict[str, Any] | None:
    return None if _empty(kept, step) else {}


@rule("dot_general", resize=_resize_dot, narrow=_sum_over_nothing)
def _dot_general(walk: Any, eqn: Any, lhs: Value, rhs: Value) -> Value:
    (lhs_sum, rhs_sum), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
    for i, j in zip(lhs_sum, rhs_sum, strict=True):
        what = "contraction"
        walk.ledger.contract(lhs.axes[i], rhs.axes[j], what, eqn)
    axes = [
        _product(walk, lhs.axes[i], rhs.axes[j])
        for i, j in zip(lhs_batch, rhs_batch, strict=True)
    ]
    axes += _free(lhs, (*lhs_sum, *lhs_batch)) + _free(rhs, (*rhs_sum, *rhs_batch))
    return Value(eqn.outvars[0].aval.shape, tuple(axes), lhs.is_zero or rhs.is_zero)


def _free(value: Value, taken: tuple[int, ...]) -> list[Axis]:
    return [axis for d, axis in enumerate(value.axes) if d not in taken]


@rule("ragged_dot_general", resize=_resize_dot, narrow=_sum_over_nothing)
def _ragged_dot(
    walk: Any, eqn: Any, lhs: Value, rhs: Value, sizes: Value, *offset: Value
) -> Value:
    """Rows in groups of unequal sizes, a matrix for each: experts without padding."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (lhs_sum, rhs_sum), (lhs_batch, rhs_batch) = numbers.dot_dimension_numbers
    rows, groups = numbers.lhs_ragged_dimensions, numbers.rhs_group_dimensions
    if lhs_batch or rhs_batch or not groups or rows[0] in lhs_sum:
        return walk.unknown(eqn, lhs, rhs, sizes, *offset)[0]
    why = walk.ledger.reason("ragged", eqn)
    held = [lhs.axes[rows[0]], rhs.axes[groups[0]], *sizes.axes]
    for axis in held + [axis for value in offset for axis in value.axes]:
        walk.ledger.freeze(axis, why)
    for i, j in zip(lhs_sum, rhs_sum, strict=True):
        what = "contraction"
        walk.ledger.contract(lhs.axes[i], rhs.axes[j], what, eqn)
    axes = _free(lhs, lhs_sum) + _free(rhs, (*rhs_sum, *groups))
    return Value(eqn.outvars[0].aval.shape, tuple(axes), lhs.is_zero or rhs.is_zero)


@rule("fft")
def _fft(walk: Any, eqn: Any, value: Value) -> Value:
    """Mixes the positions of its last axes; the axes before them are a batch."""
    why = walk.ledger.reason("fourier", eqn)
    batch = len(value.shape) - len(eqn.params["fft_lengths"])
    for axis in value.axes[batch:]:
        walk.ledger.freeze(axis, why)
    shape = eqn.outvars[0].aval.shape
    axes = (*value.axes[:batch], *(why for _ in shape[batch:]))
    return Value(shape, axes, value.is_zero)


def _resize_conv(kept: Any, step: Any) -> dict[str, Any] | None:
    if _empty(kept, step):
        return None
    numbers = step.eqn.params["dimension_numbers"]
    lhs, rhs = map(kept.shape, step.ins)
    groups = lhs[numbers.lhs_spec[1]] // rhs[numbers.rhs_spec[1]]
    return {"feature_group_count": groups}


@rule("conv_general_dilated", resize=_resize_conv, narrow=_sum_over_nothing)
def _conv_general_dilated(walk: Any, eqn: Any, lhs: Value, rhs: Value) -> Value:
    ledger, params = walk.ledger, eqn.params
    if params["batch_group_count"] != 1:
        return walk.unknown(eqn, lhs, rhs)[0]
    numbers = params["dimension_numbers"]
    (batch, feature, *space), (out, into, *window) = numbers.lhs_spec, numbers.rhs_spec
    why = ledger.reason("window", eqn)
    for value, spatial in ((lhs, space), (rhs, window)):
        for d in spatial:
            ledger.freeze(value.axes[d], why)
    groups = params["feature_group_count"]
    over = lhs.axes[feature], lhs.shape[feature]
    made = rhs.axes[out], rhs.shape[out]
    out_axis = _grouped(walk, eqn, over, rhs.axes[into], made, groups)
    why = ledger.reason("space", eqn)
    axes: list[Axis] = [why] * len(lhs.shape)
    axes[numbers.out_spec[0]] = lhs.axes[batch]
    axes[numbers.out_spec[1]] = out_axis
    shape = eqn.outvars[0].aval.shape
    return Value(shape, tuple(axes), lhs.is_zero or rhs.is_zero)


def _grouped(
    walk: Any,
    eqn: Any,
    over: tuple[Axis, int],
    into: Axis,
    made: tuple[Axis, int],
    groups: int,
) -> Axis:
    """Ties the channels of a convolution; returns the labels of its output.

    With G groups the input is ``G x I/G`` and the output ``G x O/G``: the G axes act
    like a batch axis, the I/G axis is the one summed over.
    """
    ledger = walk.ledger
    what = "convolution"
    if groups == 1:
        ledger.contract(over[0], into, what, eqn)
        return made[0]
    inside, outside = over[1] // groups, made[1] // groups
    lhs_group, lhs_in = _two(ledger, over[0], groups, inside)
    rhs_group, rhs_out = _two(ledger, made[0], groups, outside)
    if inside > 1:
        ledger.contract(lhs_in, into, what, eqn)
    group = _product(walk, lhs_group, rhs_group)
    return merge([group, rhs_out], [groups, outside]) if outside > 1 else group


def _two(ledger: Any, axis: Axis, groups: int, each: int) -> list[Axis]:
    if each == 1:
        return [axis, ledger.reason("size_one")]
    return ledger.split(axis, (groups, each))
