"""Linear algebra: batch dimensions may be cut, matrices may not."""

from typing import Any

from jaxprune.coupling._labels import Value
from jaxprune.coupling._registry import rule
from jaxprune.coupling._types import Liveness, Step, Walk
from jaxprune.coupling.rules._control import meet
from jaxprune.coupling.rules._elementwise import doubt_poles
from jaxprune.coupling.rules._factors import by_factors
from jaxprune.program._types import Equation


@rule("cholesky", "triangular_solve", "tridiagonal_solve")
def _of_regular(walk: Walk, eqn: Equation, *values: Value) -> Any:
    """A matrix that is 0 has no factor and no solution."""
    unit = eqn.params.get("unit_diagonal", False)  # its diagonal counts as 1
    for value in values[:0] if unit else values[:-1] or values:
        doubt_poles(walk, eqn, value)
    return by_factors(walk, eqn, *values)


def _constants(eqn: Equation) -> int:
    return sum(eqn.params["const_lengths"])


def _resize_solve(kept: Liveness, step: Step) -> dict[str, Any]:
    programs = step.eqn.params["jaxprs"]
    given = iter(step.subs)
    changed = [p if p is None else kept.program(next(given)) for p in programs]
    return {"jaxprs": type(programs)(*changed)}


@rule("custom_linear_solve", resize=_resize_solve, whole=_constants)
def _solve(walk: Walk, eqn: Equation, *values: Value) -> list[Value]:
    """The solution is what the solver makes; all programs agree on its labels."""
    # Its programs take the right-hand sides as they are cut, be they data or not.
    right = [Value(v.shape, v.axes, v.is_zero) for v in values[_constants(eqn) :]]
    given = iter(values)
    lengths, programs = eqn.params["const_lengths"], eqn.params["jaxprs"]
    found = right
    for length, program in zip(lengths, programs, strict=True):
        own = [next(given) for _ in range(length)]
        if program is not None:
            outs = walk.enter_branch(program, [*own, *found])
            found = [meet(walk, a, b) for a, b in zip(outs, found, strict=True)]
    return found
