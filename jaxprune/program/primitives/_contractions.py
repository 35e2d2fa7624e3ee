"""Sums of products: dot_general, ragged_dot_general and convolutions."""

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
    unindexed,
)


@declare("dot_general", combine="multiply", reduce="sum", zero="any")
def _dot_general(eqn: Equation, constant: Constants) -> Signature:
    return _products(eqn, eqn.params["dimension_numbers"])


def _products(eqn: Equation, numbers: Any, whole: tuple[int, ...] = ()) -> Signature:
    """Batch factors, summed factors, and the free ones of both operands.

    Args:
        eqn: the equation.
        numbers: its ``((lhs_sum, rhs_sum), (lhs_batch, rhs_batch))``.
        whole: axes of the second operand that no entry runs along.
    """
    (lhs_sum, rhs_sum), (lhs_batch, rhs_batch) = numbers
    build, shapes = Builder(), shapes_of(eqn)[0]
    sides: list[dict[int, Factors]] = [{}, dict.fromkeys(whole, ())]
    left, right = (*lhs_batch, *lhs_sum), (*rhs_batch, *rhs_sum)
    for i, j in zip(left, right, strict=True):
        sides[0][i] = sides[1][j] = (build.new(shapes[0][i]),)
    out = [sides[0][i] for i in lhs_batch]
    for side, shape in zip(sides, shapes, strict=False):
        for d, n in enumerate(shape):
            if d not in side:
                side[d] = (build.new(n),)
                out.append(side[d])
    ins = [tuple([side[d] for d in range(len(side))]) for side in sides]
    return Signature(tuple(build.sizes), tuple(ins), (tuple(out),))


@declare(
    "ragged_dot_general",
    combine="multiply",
    reduce="sum",
    zero="any",
    pinned="ragged",
    made="ragged",
)
def _ragged_dot(eqn: Equation, constant: Constants) -> Signature:
    """Rows in groups of unequal sizes, a matrix for each: experts without padding.

    With a ragged contraction each group sums its own part of the axis, and the result
    has an axis of groups in front.
    """
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    found = _products(
        eqn, numbers.dot_dimension_numbers, tuple(numbers.rhs_group_dimensions)
    )
    sizes = unindexed(list(map(shape_of, eqn.invars[2:])))
    [out] = found.outs
    out = ((),) * (len(shape_of(eqn.outvars[0])) - len(out)) + out
    deciding = frozenset(range(2, len(eqn.invars)))
    rows = [found.ins[0][d] for d in numbers.lhs_ragged_dimensions]
    return found._replace(
        ins=found.ins + sizes,
        outs=(out,),
        deciding=deciding,
        fixed=frozenset().union(*rows),
    )


@declare(
    "conv_general_dilated",
    combine="multiply",
    reduce="sum",
    zero="any",
    pinned="window",
    made="space",
)
def _convolution(eqn: Equation, constant: Constants) -> Signature:
    """Channels in groups; a window that slides over space.

    The positions of a transposed convolution are those of its input, each of which
    meets the whole window; those of any other are of its output.
    """
    p, build = eqn.params, Builder()
    numbers = p["dimension_numbers"]
    lhs, rhs = map(shape_of, eqn.invars)
    groups, batches = p["feature_group_count"], p["batch_group_count"]
    (batch, feature, *space), (made, into, *window) = numbers.lhs_spec, numbers.rhs_spec
    shared = (build.new(groups * batches),) if groups * batches > 1 else ()
    summed = (build.new(rhs[into]),)
    ins: list[dict[int, Factors]] = [dict.fromkeys(space, ()), {}]
    ins[1][into] = summed
    rows = (build.new(lhs[batch] // batches),)
    ins[0][batch] = (*shared, *rows) if batches > 1 else rows
    ins[0][feature] = (*shared, *summed) if groups > 1 else summed
    ins[1][made] = (*shared, build.new(rhs[made] // (groups * batches)))
    for d in window:
        ins[1][d] = (build.new(rhs[d]),)
    fixed = frozenset().union(*(ins[1][d] for d in window))
    out: list[Factors] = [()] * len(lhs)
    out[numbers.out_spec[0]] = rows
    out[numbers.out_spec[1]] = ins[1][made]
    backwards = any(step > 1 for step in p["lhs_dilation"])
    slides = [(0, d) for d in space] if backwards else []
    slides = slides or [(-1, d) for d in numbers.out_spec[2:]]
    axes = [tuple([side[d] for d in range(len(side))]) for side in ins]
    return Signature(
        tuple(build.sizes),
        tuple(axes),
        (tuple(out),),
        fixed=fixed,
        slides=tuple(slides),
    )
