"""Means over what is kept, where the smaller layer is to have statistics of its own."""

import math
from typing import Any

import jax
import numpy as np
from jax import lax

from jaxprune.coupling._data import concrete
from jaxprune.coupling._dead import MOVES, Scope, made_by
from jaxprune.coupling._walk import Step
from jaxprune.program._types import Atom


def by_own_count(
    emitter: Any, scope: Scope, step: Step, operands: list[Atom]
) -> list[Atom]:
    """The operands of a division, of which the second counts what is kept.

    A sum over N positions that is divided by N, or by N - 1, is a mean or a variance.
    Where n of the N are kept it is divided by n, or n - 1.

    Args:
        emitter: what writes the smaller program (`jaxprune.narrowing._build`).
        scope: of the program that the step is of.
        step: any step.
        operands: as written.
    """
    if step.eqn.primitive.name != "div":
        return operands
    total, count = operands
    number, of = concrete(step.ins[1]), _sum_behind(scope, step.eqn.invars[0])
    if number is None or of is None:
        return operands
    [value], axes = of.ins, of.eqn.params["axes"]
    small = emitter.kept.shape(value)
    every = math.prod(value.shape[d] for d in axes)
    gone = every - math.prod(small[d] for d in axes)
    if not 0 < gone < every or number not in (every, every - 1):
        return operands

    def shrunk(x: jax.Array) -> Any:
        return lax.sub(x, np.asarray(gone).astype(x.dtype))

    # `number` is N or N - 1: less what is gone it is n or n - 1.
    return [total, *emitter.traced(shrunk, [count])]


def _sum_behind(scope: Scope, var: Atom) -> Step | None:
    """The sum that is this value, in another shape perhaps."""
    while True:
        above = made_by(scope, var)
        if above is not None:
            scope, var, _ = above
            continue
        step, _ = scope.made.get(var, (None, 0))
        if step is None or step.eqn.primitive.name == "reduce_sum":
            return step
        if step.eqn.primitive.name not in (*MOVES, "convert_element_type"):
            return None
        var = step.eqn.invars[0]
