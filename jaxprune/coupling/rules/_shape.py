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
from jaxprune.coupling._registry import rule

# --- broadcast, iota -----------------------------------------------------------------


def _resize_broadcast(kept: Any, step: Any) -> dict[str, Any]:
    return {"shape": kept.shape(step.outs[0])}


@rule("broadcast_in_dim", resize=_resize_broadcast)
def _broadcast_in_dim(walk: Any, eqn: Any, value: Value, *dynamic: Value) -> Value:
    shape, source = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    axes: list[Axis | None] = [None] * len(shape)
    for axis, size, d in zip(value.axes, value.shape, source, strict=True):
        if size == shape[d]:
            axes[d] = axis
        elif not isinstance(axis, int):
            walk.ledger.freeze(axis, walk.ledger.reason("broadcast", eqn))
    # A broadcast axis holds copies: it takes whatever size its use asks for.
    filled = [
        walk.ledger.fresh_axis(n, zero=value.is_zero) if axis is None else axis
        for axis, n in zip(axes, shape, strict=True)
    ]
    return Value(tuple(shape), tuple(filled), value.is_zero)


def _resize_iota(kept: Any, step: Any) -> dict[str, Any] | None:
    out = step.outs[0]
    if kept.mask(out.axes[step.eqn.params["dimension"]]) is not None:
        return None  # some numbers are gone
    return {"shape": kept.shape(out)}


def _narrow_iota(kept: Any, step: Any) -> Any:
    p, out = step.eqn.params, step.outs[0]
    positions = kept.positions(out.axes[p["dimension"]])
    line = jax.numpy.asarray(positions, p["dtype"])
    return lax.broadcast_in_dim(line, kept.shape(out), (p["dimension"],))


@rule("iota", resize=_resize_iota, narrow=_narrow_iota)
def _iota(walk: Any, eqn: Any, *dynamic: Value) -> Value:
    shape = tuple(eqn.params["shape"])
    return Value(shape, tuple(walk.ledger.fresh_axis(n) for n in shape))


# --- reshape, squeeze, transpose -----------------------------------------------------


def segments(
    a: tuple[int, ...], b: tuple[int, ...]
) -> list[tuple[list[int], list[int]]]:
    """Smallest runs of dimensions of `a` and `b` with equal products.

    Dimensions of size 1 belong to no run: they carry no position.

    >>> segments((8, 4, 6), (32, 2, 3))
    [([0, 1], [0]), ([2], [1, 2])]
    """
    left = [d for d, n in enumerate(a) if n != 1]
    right = [d for d, n in enumerate(b) if n != 1]
    runs, i, j = [], 0, 0
    while i < len(left) and j < len(right):
        run_a, run_b = [left[i]], [right[j]]
        size_a, size_b = a[left[i]], b[right[j]]
        i, j = i + 1, j + 1
        while size_a != size_b:
            if size_a < size_b:
                run_a.append(left[i])
                size_a, i = size_a * a[left[i]], i + 1
            else:
                run_b.append(right[j])
                size_b, j = size_b * b[right[j]], j + 1
        runs.append((run_a, run_b))
    return runs


def reshape_axes(
    walk: Any, eqn: Any, value: Value, shape: tuple[int, ...]
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


def _resize_reshape(kept: Any, step: Any) -> dict[str, Any]:
    return {"new_sizes": kept.shape(step.outs[0])}


@rule("reshape", resize=_resize_reshape)
def _reshape(walk: Any, eqn: Any, value: Value, *dynamic: Value) -> Value:
    if eqn.params.get("dimensions") is not None:
        return walk.unknown(eqn, value)[0]
    shape = tuple(eqn.params["new_sizes"])
    return Value(shape, reshape_axes(walk, eqn, value, shape), value.is_zero)


@rule("squeeze")
def _squeeze(walk: Any, eqn: Any, value: Value) -> Value:
    gone = eqn.params["dimensions"]
    for d in gone:
        walk.ledger.freeze(value.axes[d], walk.ledger.reason("dropped", eqn))
    stay = [d for d in range(len(value.shape)) if d not in gone]
    axes = tuple(value.axes[d] for d in stay)
    return Value(tuple(value.shape[d] for d in stay), axes, value.is_zero)


@rule("transpose")
def _transpose(walk: Any, eqn: Any, value: Value) -> Value:
    order = eqn.params["permutation"]
    shape = tuple([value.shape[d] for d in order])
    return Value(shape, tuple([value.axes[d] for d in order]), value.is_zero)
