"""Primitives that move positions without computing: reshape, slice, pad, stack, ..."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxprune.program._types import Equation
from jaxprune.program.primitives._declaration import declare
from jaxprune.program.primitives._signature import (
    Constants,
    Factors,
    Signature,
    refined,
    shape_of,
    shapes_of,
    unindexed,
)


@declare("broadcast_in_dim", combine="add", zero="all", moves=True, pinned="broadcast")
def _broadcast(eqn: Equation, constant: Constants) -> Signature:
    shape, out = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    dims = eqn.params["broadcast_dimensions"]
    axes = [(d,) if n == out[d] else () for n, d in zip(shape, dims, strict=True)]
    return _one(eqn, out, axes, [(d,) for d in range(len(out))])


def _one(eqn: Equation, sizes: Any, axes: Any, out: Any, **more: Any) -> Signature:
    """From the first operand to every result; further operands name sizes."""
    rest = unindexed(list(map(shape_of, eqn.invars[1:])))
    deciding = frozenset(range(1, len(eqn.invars)))
    outs = (tuple(out),) * len(eqn.outvars)
    return Signature(
        tuple(sizes), (tuple(axes), *rest), outs, deciding=deciding, **more
    )


def order_of_reshape(eqn: Equation) -> tuple[int, ...]:
    """In which order a reshape reads the axes of its operand.

    ``lax.reshape(x, sizes, dimensions)`` transposes first; JAX writes it when it
    batches convolutions.
    """
    order = eqn.params.get("dimensions")
    return tuple(range(len(shape_of(eqn.invars[0])))) if order is None else order


@declare("reshape", combine="add", zero="all", moves=True)
def _reshape(eqn: Equation, constant: Constants) -> Signature | None:
    shape, after = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    order = order_of_reshape(eqn)
    before = tuple([shape[d] for d in order])
    axes: list[Factors] = [()] * len(before)
    out: list[Factors] = [()] * len(after)
    sizes = []
    for size, i, j in refined(before, after) if math.prod(after) else ():
        axes[order[i]] += (len(sizes),)
        out[j] += (len(sizes),)
        sizes.append(size)
    return _one(eqn, sizes, axes, out)


@declare("squeeze", combine="add", zero="all", moves=True, pinned="dropped")
def _squeeze(eqn: Equation, constant: Constants) -> Signature:
    shape, gone = shape_of(eqn.invars[0]), eqn.params["dimensions"]
    axes = [() if d in gone else (d,) for d in range(len(shape))]
    return _one(eqn, shape, axes, [f for d, f in enumerate(axes) if d not in gone])


@declare("transpose", combine="add", zero="all", moves=True)
def _transpose(eqn: Equation, constant: Constants) -> Signature:
    shape = shape_of(eqn.invars[0])
    axes = [(d,) for d in range(len(shape))]
    return _one(eqn, shape, axes, [axes[d] for d in eqn.params["permutation"]])


# --- some positions of an axis --------------------------------------------------------


def _moved(eqn: Equation, positions: dict[int, np.ndarray]) -> Signature:
    """Every axis keeps its place; the result holds these positions of some."""
    shape = shape_of(eqn.invars[0])
    axes = [(d,) for d in range(len(shape))]
    taken = {(0, d): line for d, line in positions.items()}
    return _one(eqn, shape, axes, axes, taken=taken)


def spans(eqn: Equation) -> list[slice]:
    """The slice of every axis that a slice equation takes."""
    p = eqn.params
    steps = p["strides"] or (1,) * len(p["start_indices"])
    spans = zip(p["start_indices"], p["limit_indices"], steps, strict=True)
    return [slice(a, b, s) for a, b, s in spans]


@declare("slice", combine="add", zero="all", moves=True)
def _slice(eqn: Equation, constant: Constants) -> Signature:
    pairs = enumerate(zip(shape_of(eqn.invars[0]), spans(eqn), strict=True))
    cut = {d: np.arange(n)[s] for d, (n, s) in pairs if s != slice(0, n, 1)}
    return _moved(eqn, cut)


@declare("rev", combine="add", zero="all", moves=True)
def _rev(eqn: Equation, constant: Constants) -> Signature:
    shape = shape_of(eqn.invars[0])
    return _moved(eqn, {d: np.arange(shape[d])[::-1] for d in eqn.params["dimensions"]})


@declare("tile", combine="add", zero="all", moves=True)
def _tile(eqn: Equation, constant: Constants) -> Signature:
    pairs = enumerate(zip(shape_of(eqn.invars[0]), eqn.params["reps"], strict=True))
    return _moved(eqn, {d: np.tile(np.arange(n), r) for d, (n, r) in pairs if r != 1})


@declare("permute", combine="add", zero="all", moves=True)
def _permute(eqn: Equation, constant: Constants) -> Signature:
    return _moved(eqn, {eqn.params["axis"]: moved_order(eqn.params)})


def moved_order(params: Mapping[str, Any]) -> np.ndarray:
    """For every position of a permuted axis, the position it comes from."""
    places = np.arange(math.prod(params["sizes"])).reshape(params["sizes"])
    return places.transpose(params["order"]).ravel()


@declare("pad", combine="add", zero="all", moves=True)
def _pad(eqn: Equation, constant: Constants) -> Signature:
    """The first operand, and around it the second, which is one number."""
    shape, config = shape_of(eqn.invars[0]), eqn.params["padding_config"]
    pairs = enumerate(zip(shape, config, strict=True))
    lines = {d: pad_map(n, *c) for d, (n, c) in pairs if tuple(c) != (0, 0, 0)}
    return _moved(eqn, lines)._replace(deciding=frozenset())


def pad_map(n: int, low: int, high: int, interior: int) -> np.ndarray:
    """For every output position, its input position or -1 where padding stands."""
    size = low + high + n + max(n - 1, 0) * interior
    source = np.full(size, -1)
    target = low + np.arange(n) * (interior + 1)
    inside = (target >= 0) & (target < size)
    source[target[inside]] = np.arange(n)[inside]
    return source


def ranges(sizes: Any) -> list[slice]:
    """The parts of a split as slices."""
    ends = np.cumsum([int(n) for n in sizes])
    return [slice(int(e) - int(n), int(e)) for e, n in zip(ends, sizes, strict=True)]


@declare("split", combine="add", zero="all", moves=True)
def _split(eqn: Equation, constant: Constants) -> Signature:
    d, found = eqn.params["axis"], _moved(eqn, {})
    line = np.arange(found.sizes[d])
    parts = enumerate(ranges(eqn.params["sizes"]))
    return found._replace(taken={(k, d): line[span] for k, span in parts})


@declare("unstack", combine="add", zero="all", moves=True, pinned="unstacked")
def _unstack(eqn: Equation, constant: Constants) -> Signature:
    shape, gone = shape_of(eqn.invars[0]), eqn.params["axis"]
    axes = [(d,) for d in range(len(shape))]
    out = [f for d, f in enumerate(axes) if d != gone]
    taken = {(k, gone): np.array([k]) for k in range(len(eqn.outvars))}
    return _one(eqn, shape, axes, out, taken=taken, fixed=frozenset([gone]))


# --- several operands side by side ----------------------------------------------------


@declare("concatenate", combine="add", zero="all", moves=True)
def _concatenate(eqn: Equation, constant: Constants) -> Signature:
    ins, [out] = shapes_of(eqn)
    d, index = eqn.params["dimension"], tuple([(k,) for k in range(len(out))])
    parts = enumerate(ranges([shape[d] for shape in ins]))
    at = {(k, d): np.arange(span.start, span.stop) for k, span in parts}
    return Signature(out, (index,) * len(ins), (index,), at=at)


@declare("stack", combine="add", zero="all", moves=True)
def _stack(eqn: Equation, constant: Constants) -> Signature:
    ins, [out] = shapes_of(eqn)
    new, index = eqn.params["axis"], tuple([(k,) for k in range(len(out))])
    own = index[:new] + index[new + 1 :]
    at = {(k, new): np.array([k]) for k in range(len(ins))}
    return Signature(out, (own,) * len(ins), (index,), at=at)
