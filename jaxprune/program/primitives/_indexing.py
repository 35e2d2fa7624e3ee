"""Gather, scatter and dynamic slices: exact where the indices are constants.

An axis that the operation takes whole is a factor. An axis indexed by constants is a
factor of which the result, or the update, holds some positions. An axis indexed by data
is not indexed: what stands on it is not known.
"""

from typing import Any, NamedTuple

import numpy as np
from jax.lax import GatherScatterMode

from jaxprune.program._types import Equation
from jaxprune.program.primitives._declaration import declare
from jaxprune.program.primitives._signature import (
    Builder,
    Constants,
    Factors,
    Signature,
    shape_of,
    shapes_of,
    unindexed,
)

# --- dynamic_slice, dynamic_update_slice ----------------------------------------------


def start_of(start: np.ndarray | None, n: int, size: int) -> int | None:
    """The start of a window if it is a constant, clamped as the primitive does."""
    return None if start is None else int(np.clip(start, 0, n - size))


_STARTS = "dynamic_slice"


@declare(
    "dynamic_slice",
    combine="add",
    zero="all",
    moves=True,
    pinned=_STARTS,
    made=_STARTS,
)
def _dynamic_slice(eqn: Equation, constant: Constants) -> Signature:
    ins, [out] = shapes_of(eqn)
    axes: list[Factors] = [(d,) for d in range(len(out))]
    taken = {}
    for d, (n, size) in enumerate(zip(ins[0], out, strict=True)):
        first = 0 if n == size else start_of(constant(1 + d), n, size)
        if first is None:
            axes[d] = ()
        elif n != size:
            taken[0, d] = np.arange(first, first + size)
    every = (tuple(axes), *unindexed(ins[1:]))
    deciding = frozenset(range(1, len(ins)))
    return Signature(ins[0], every, (tuple(axes),), taken=taken, deciding=deciding)


@declare("dynamic_update_slice", combine="add", moves=True)
def _update(eqn: Equation, constant: Constants) -> Signature:
    (whole, part, *starts), _ = shapes_of(eqn)
    axes: list[Factors] = [(d,) for d in range(len(whole))]
    own, at = list(axes), {}
    for d, (n, size) in enumerate(zip(whole, part, strict=True)):
        first = 0 if n == size else start_of(constant(2 + d), n, size)
        if first is None:
            axes[d] = own[d] = ()
        elif n != size:
            at[1, d] = np.arange(first, first + size)
    every = (tuple(axes), tuple(own), *unindexed(starts))
    deciding = frozenset(range(2, 2 + len(starts)))
    return Signature(whole, every, (tuple(axes),), at=at, deciding=deciding)


# --- gather ---------------------------------------------------------------------------


class Picked(NamedTuple):
    """A gather that is ``take(x, positions, axis)``."""

    axis: int
    positions: np.ndarray
    out: int  # the axis of the result that runs along the positions


def indices(index: np.ndarray | None, dims: int) -> np.ndarray | None:
    """Constant indices ``[m, dims]`` if there are any, else None."""
    if index is None:
        return None
    return index.reshape(int(np.prod(index.shape[:-1])), dims)


def offsets(numbers: Any, ndim: int) -> list[int]:
    """The operand dimensions that a gather takes as windows, in offset order."""
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    return [d for d in range(ndim) if d not in gone]


def batch_axes(eqn: Equation) -> list[int]:
    """The axes of the result of a gather that run along its indices."""
    inside = eqn.params["dimension_numbers"].offset_dims
    return [k for k in range(len(shape_of(eqn.outvars[0]))) if k not in inside]


def picked(eqn: Equation, index: np.ndarray | None) -> Picked | None:
    """What a gather takes, when it takes constant positions of one axis."""
    numbers, shape = eqn.params["dimension_numbers"], shape_of(eqn.invars[0])
    if len(numbers.start_index_map) != 1 or numbers.operand_batching_dims:
        return None
    (d,), batch = numbers.start_index_map, batch_axes(eqn)
    found = indices(index, 1)
    if d not in numbers.collapsed_slice_dims or found is None or len(batch) != 1:
        return None
    positions = found[:, 0]
    if eqn.params["mode"] == GatherScatterMode.CLIP:
        positions = np.clip(positions, 0, shape[d] - 1)
    inside = (positions >= 0) & (positions < shape[d])
    return Picked(int(d), positions, batch[0]) if inside.all() else None


def _gather_combine(eqn: Equation) -> Any:
    # What stands in for positions outside is not summed, unless it is 0 or nan.
    return "add" if eqn.params.get("fill_value") is None else "apply"


@declare("gather", combine=_gather_combine)
def _gather(eqn: Equation, constant: Constants) -> Signature:
    numbers, ([operand, index], [out]) = (
        eqn.params["dimension_numbers"],
        shapes_of(eqn),
    )
    build, batch = Builder(), batch_axes(eqn)
    axes: list[Factors] = [()] * len(operand)
    result: list[Factors] = [()] * len(out)
    for k, d in zip(numbers.offset_dims, offsets(numbers, len(operand)), strict=True):
        if out[k] == operand[d]:
            axes[d] = result[k] = (build.new(out[k]),)
    of_index = [*build.axes(index[:-1]), ()]
    for k, factors in zip(batch, of_index, strict=False):
        result[k] = factors
    for d, i in zip(
        numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True
    ):
        axes[d] = of_index[i]
    taken, take = {}, picked(eqn, constant(1))
    if take is not None:
        axes[take.axis] = result[take.out] = (build.new(operand[take.axis]),)
        taken[0, axes[take.axis][0]] = take.positions
        of_index = [()] * len(index)
    return Signature(
        tuple(build.sizes),
        (tuple(axes), tuple(of_index)),
        (tuple(result),),
        taken=taken,
        deciding=frozenset([1]),
    )


# --- scatter --------------------------------------------------------------------------


class Write(NamedTuple):
    """Where a scatter writes on one axis of its operand."""

    positions: np.ndarray
    axis: int | None  # the axis of the update that runs along these positions
    window: bool  # neighbours, of which the index holds the first


def windows(numbers: Any, ndim: int) -> dict[int, int]:
    """Axis of the operand -> axis of the update that holds windows of it."""
    gone = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    stay = [d for d in range(ndim) if d not in gone]
    return dict(zip(stay, numbers.update_window_dims, strict=True))


def writes(eqn: Equation, index: np.ndarray | None) -> dict[int, Write]:
    """The axes on which a scatter writes to constant positions.

    Either one block at a constant place, or one axis at a list of constants, as in
    ``x.at[2:5]``, ``x.at[:, ::2]`` and ``x.at[3]``; empty for all else.
    """
    numbers = eqn.params["dimension_numbers"]
    operand, _, update = shapes_of(eqn)[0]
    dims = numbers.scatter_dims_to_operand_dims
    found = indices(index, len(dims))
    if found is None or numbers.operand_batching_dims:
        return {}
    inside = windows(numbers, len(operand))
    lines = [k for k in range(len(update)) if k not in numbers.update_window_dims]
    listed = len(dims) == len(lines) == 1 and dims[0] not in inside
    if len(found) != 1 and not listed:
        return {}
    found_writes = {}
    for d, starts in zip(dims, found.T, strict=True):
        k = lines[0] if listed else inside.get(d)
        size = update[inside[d]] if d in inside else 1
        if (starts < 0).any() or (starts > operand[d] - size).any():
            return {}
        positions = (starts[:, None] + np.arange(size)[None]).ravel()
        found_writes[d] = Write(positions, k, d in inside)
    return found_writes


@declare("scatter", combine="add", moves=True)
@declare("scatter-add", "scatter-sub", combine="add")
@declare("scatter-mul", "scatter-min", "scatter-max")
def _scatter(eqn: Equation, constant: Constants) -> Signature:
    operand, index, update = shapes_of(eqn)[0]
    numbers = eqn.params["dimension_numbers"]
    inside, written = windows(numbers, len(operand)), writes(eqn, constant(1))
    axes: list[Factors] = [()] * len(operand)
    own: list[Factors] = [()] * len(update)
    at = {}
    for d, n in enumerate(operand):
        k = written[d].axis if d in written else inside.get(d)
        whole = k is not None and update[k] == n
        whole &= d not in numbers.scatter_dims_to_operand_dims
        if d in written or whole:
            axes[d] = (d,)
            if k is not None:
                own[k] = (d,)
        if d in written:
            at[2, d] = written[d].positions
    every = (tuple(axes), *unindexed([index]), tuple(own))
    return Signature(operand, every, (tuple(axes),), at=at, deciding=frozenset([1]))
