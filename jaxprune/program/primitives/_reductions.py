"""Reductions, running reductions, windows, orderings, transforms."""

from collections.abc import Mapping
from typing import Any

from jaxprune.program._types import Equation
from jaxprune.program.primitives._declaration import declare
from jaxprune.program.primitives._signature import (
    Builder,
    Constants,
    Factors,
    Signature,
    shape_of,
    shapes_of,
)


@declare("reduce_sum", combine="add", reduce="sum", zero="all")
@declare("reduce_max", "reduce_min", reduce="idempotent", zero="all")
@declare("reduce_and", "reduce_or", reduce="idempotent", zero="all")
@declare("reduce_prod", "reduce_xor", zero="all")
def _reduction(eqn: Equation, constant: Constants) -> Signature:
    shape, gone = shape_of(eqn.invars[0]), eqn.params["axes"]
    axes = [(d,) for d in range(len(shape))]
    out = [factors for d, factors in enumerate(axes) if d not in gone]
    return Signature(shape, (tuple(axes),), (tuple(out),))


@declare(
    "argmax",
    "argmin",
    reduce="idempotent",
    pinned="argument",
)
def _arg(eqn: Equation, constant: Constants) -> Signature:
    return _reduction(eqn, constant)._replace(fixed=frozenset(eqn.params["axes"]))


@declare("cumsum", combine="add", reduce="sum")
@declare("cumprod", "cummax", "cummin", "cumlogsumexp")
def _cumulative(eqn: Equation, constant: Constants) -> Signature:
    return along(eqn, ())._replace(mixed=frozenset([eqn.params["axis"]]))


_SLIDES = "pooling"


@declare("reduce_window_sum", combine="add", zero="all", pinned=_SLIDES, made=_SLIDES)
@declare(
    "reduce_window_max", "reduce_window_min", zero="all", pinned=_SLIDES, made=_SLIDES
)
def _window(eqn: Equation, constant: Constants) -> Signature:
    p = eqn.params
    return along(eqn, [d for d in range(len(p["padding"])) if not _is_plain(p, d)])


def _is_plain(p: Mapping[str, Any], d: int) -> bool:
    """Does the window take every position of this axis alone?"""
    ones = ("window_dimensions", "window_strides", "base_dilation")
    return all(p[name][d] == 1 for name in ones) and tuple(p["padding"][d]) == (0, 0)


@declare("sort", zero="all", pinned="sorted", made="sorted")
def _sort(eqn: Equation, constant: Constants) -> Signature:
    return along(eqn, [eqn.params["dimension"]])


@declare("top_k")
def _top_k(eqn: Equation, constant: Constants) -> Signature:
    found = along(eqn, [eqn.params.get("axis", -1) % len(shape_of(eqn.invars[0]))])
    return found._replace(deciding=frozenset(range(1, len(eqn.invars))))


@declare(
    "fft",
    combine="add",
    zero="all",
    pinned="fourier",
    made="fourier",
)
def _fft(eqn: Equation, constant: Constants) -> Signature:
    """Mixes the positions of its last axes; the axes before them are a batch."""
    rank = len(shape_of(eqn.invars[0]))
    return along(eqn, range(rank - len(eqn.params["fft_lengths"]), rank))


def along(eqn: Equation, taken: Any) -> Signature:
    """Axes shared by operands and results, but for those that the primitive mixes."""
    ins, outs = shapes_of(eqn)
    build = Builder()
    index = [() if d in taken else f for d, f in enumerate(build.axes(ins[0]))]

    def axes(shape: tuple[int, ...]) -> tuple[Factors, ...]:
        return tuple(index) if len(shape) == len(index) else ((),) * len(shape)

    sizes = tuple(build.sizes)
    return Signature(sizes, tuple(map(axes, ins)), tuple(map(axes, outs)))
