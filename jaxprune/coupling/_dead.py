"""What the masked program holds at dead positions, where that is not 0.

A reduction over an axis that is cut sees the dead positions in the masked program. It
can be completed in the narrowed program if what stands there is known: 0, or a value
that is the same at all of them, *even*, so that one slice of size 1 stands for all. The
operands of elementwise functions being even, so are the results:

    sum_i f(x_i) = sum_{i lives} f(x_i) + (number of dead i) * f(dead x).

Whether a value is even is asked only where a reduction needs it, and answered by going
back through the equations that made it. `narrow` computes the dead values by the same
steps (`jaxprune.narrowing._dead`).
"""

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from jax.extend.core import Literal

from jaxprune.coupling._labels import Value, all_zero
from jaxprune.coupling._registry import RULES
from jaxprune.program._types import Atom, Equation
from jaxprune.program.primitives import (
    DECLARATIONS,
    Declaration,
    declaration,
    signature,
    signs_of_zeros,
)

if TYPE_CHECKING:
    from jaxprune.coupling._walk import Step

Dims: TypeAlias = frozenset[int]  # of a value: those at a dead position
NOWHERE: Dims = frozenset()

# What is followed besides elementwise functions.
MOVES = frozenset("broadcast_in_dim reshape squeeze transpose".split())
FOLDS = frozenset("reduce_max reduce_min".split())
REDUCTIONS = FOLDS | {"reduce_sum", "dot_general"}
# Elementwise, but they say where on a mesh their results are.
_REFUSED = frozenset(
    """
    sharding_constraint device_put reshard relayout layout_constraint pvary pcast
    reduced_vary_cast reduced_vary_cast_p vary_unreduced_cast vary_unreduced_cast_p
    with_memory_space_constraint
    """.split()
)
_ELEMENTWISE = {DECLARATIONS[name].signature for name in ("exp", "select_n")}
_MOST = 3  # axes that one equation reduces over and that can all be cut


class Scope:
    """The equations of one program, by the variables that they make.

    Attributes:
        made: variable -> (its step, which of the results).
        outer: for the program of a call that is inlined, the scope around it.
        bound: variable of this program -> (variable, value) of the scope around it.
        known: (variable, dimensions, signed) -> `is_even`.
    """

    def __init__(self, outer: "Scope | None" = None, bound: Any = ()) -> None:
        self.made: dict[Any, tuple[Step, int]] = {}
        self.outer = outer
        self.bound: dict[Any, tuple[Any, Value]] = dict(bound)
        self.known: dict[tuple[Any, Dims, bool], bool] = {}


class Part(NamedTuple):
    """Some of the positions that an equation runs over.

    Attributes:
        factors: the contracted factors (see `Signature`) at dead positions.
        dims: for each operand, the dimensions at dead positions.
    """

    factors: tuple[int, ...]
    dims: tuple[Dims, ...]

    def axes(self, eqn: Equation) -> list[tuple[int, int]]:
        """For every factor an (operand, axis) along which it runs."""
        found = signature(eqn)
        assert found is not None
        alone = dict(found.alone())
        return [alone[factor] for factor in self.factors]


def is_zero_at(value: Value, dims: Dims) -> bool:
    """Is the value 0 where these dimensions are at dead positions?"""
    return value.is_zero or any(all_zero(value.axes[d]) for d in dims)


def parts(
    eqn: Equation, ins: Sequence[Value], dims: Dims, dies: Callable[[Value, int], bool]
) -> list[Part] | None:
    """What the result is made of where `dims` of it are at dead positions.

    Args:
        eqn: the equation.
        ins: its operands.
        dims: of its only result.
        dies: can a position of this axis be dead?

    Returns:
        First the part that contracts over positions that live; then, for a reduction,
        one for every set of contracted axes that are at dead positions, without those
        that add 0. None if the equation is not one that is followed.
    """
    known = declaration(eqn)
    found = None
    if known is not None and _is_followed(eqn, known):
        found = known.signature(eqn, lambda k: None)
    if known is None or found is None or found.mixed or found.at or found.taken:
        return None
    dead = [found.outs[0][d] for d in dims]
    if any(len(factors) != 1 for factors in dead):
        return None
    axes = [(k, d, f) for k, each in enumerate(found.ins) for d, f in enumerate(each)]
    gone = [
        factor
        for factor in sorted(found.contracted)
        if all(dies(ins[k], d) for k, d, factors in axes if factor in factors)
    ]
    if len(gone) > _MOST or (gone and eqn.primitive.name not in REDUCTIONS):
        return None
    made = []
    for n in range(len(gone) + 1):
        for chosen in itertools.combinations(gone, n):
            here = {*chosen, *(factor for (factor,) in dead)}
            there = [(k, d, f) for k, d, f in axes if not here.isdisjoint(f)]
            if any(len(factors) != 1 for _, _, factors in there):
                return None
            per = [frozenset(d for k, d, _ in there if k == j) for j in range(len(ins))]
            part = Part(chosen, tuple(per))
            zero = map(is_zero_at, ins, per)
            if not (chosen and known.reduce == "sum" and any(zero)):
                made.append(part)
    return made


def _is_followed(eqn: Equation, known: Declaration) -> bool:
    """Is it an equation whose dead values come from those of its operands?"""
    name = eqn.primitive.name
    if len(eqn.outvars) != 1 or name in _REFUSED:
        return False
    if any(eqn.params.get(key) is not None for key in ("sharding", "out_sharding")):
        return False
    if name in MOVES or name in REDUCTIONS:
        return True
    return known.signature in _ELEMENTWISE  # it names no sizes


def is_even(
    scope: Scope, var: Atom, value: Value, dims: Dims, *, signed: bool = False
) -> bool:
    """Is the value the same wherever these dimensions are at dead positions?

    Args:
        scope: of the program that the variable is of.
        var: the variable.
        value: what is known of it.
        dims: those at dead positions.
        signed: if the value is 0 there, must it be known to be +0 or -0?
    """
    if not dims:
        return True
    if _is_placed(var):
        return False
    if not signed and is_zero_at(value, dims):
        return True
    if value.data:
        return dims <= value.uniform and _is_whole(scope, var)
    key = var, dims, signed
    found = scope.known.get(key)
    if found is None:
        found = scope.known[key] = _is_even(scope, var, value, dims, signed)
    return found


def _is_even(scope: Scope, var: Atom, value: Value, dims: Dims, signed: bool) -> bool:
    above = made_by(scope, var)
    if above is not None:
        return is_even(*above, dims, signed=signed)
    if var not in scope.made or any(len(value.axes[d]) != 1 for d in dims):  # pyright: ignore
        return False  # of an axis with several units it matters which is dead
    step, _ = scope.made[var]
    found = parts(step.eqn, step.ins, dims, may_die)
    if signed and is_zero_at(value, dims):
        # Written as +0, which it is if the sign of what makes it 0 is lost.
        return _loses_signs(step.eqn) and are_even(scope, step.eqn, step.ins, found)
    if signed and step.eqn.primitive.name in REDUCTIONS:
        return False  # parts that add 0 are left out, of either sign
    return are_even(scope, step.eqn, step.ins, found, signed=signed)


def _loses_signs(eqn: Equation) -> bool:
    return all(sign == "lost" for sign in signs_of_zeros(eqn))


def are_even(
    scope: Scope,
    eqn: Equation,
    ins: Sequence[Value],
    found: list[Part] | None,
    *,
    signed: bool = False,
) -> bool:
    """Are the operands even, for all parts of an equation?

    Its result is even then. Where it reads the sign of a 0, or keeps it and the sign of
    the result must be known (`signed`), that of the operand must be.
    """
    if found is None:
        return False
    reduces = eqn.primitive.name in REDUCTIONS
    signs = ["kept"] * len(ins) if reduces else signs_of_zeros(eqn)
    needed = [sign == "read" or (signed and sign == "kept") for sign in signs]
    return all(
        is_even(scope, var, value, dims, signed=need)
        for part in found
        for var, value, dims, need in zip(
            eqn.invars, ins, part.dims, needed, strict=True
        )
    )


def completes(scope: Scope, eqn: Equation, *ins: Value) -> bool:
    """Can `narrow` complete this reduction with what is at the dead positions?"""
    return are_even(scope, eqn, ins, parts(eqn, ins, NOWHERE, may_die))


def may_die(value: Value, d: int) -> bool:
    """Can any position of this axis be cut?"""
    return not isinstance(value.axes[d], int)


def made_by(scope: Scope, var: Atom) -> tuple[Scope, Any, Value] | None:
    """The same array on the other side of the border of an inlined call, if any."""
    if var in scope.bound and scope.outer is not None:
        return scope.outer, *scope.bound[var]
    step, k = scope.made.get(var, (None, 0))
    if step is None or not step.subs or not RULES[step.eqn.primitive.name].inline:
        return None
    inner = step.subs[0]
    return inner.scope, inner.jaxpr.outvars[k], inner.outs[k]


def _is_whole(scope: Scope, var: Atom) -> bool:
    """Is data computed by equations of its own, whole?"""
    if isinstance(var, Literal):
        return True
    above = made_by(scope, var)
    if above is not None:
        return _is_whole(*above[:2])
    return var not in scope.made or not scope.made[var][0].subs


def _is_placed(var: Atom) -> bool:
    """Does the type of an array say where on a mesh its parts are?"""
    aval = var.aval
    spec = getattr(getattr(aval, "sharding", None), "spec", ())
    manual = getattr(aval, "manual_axis_type", None)
    varying = getattr(aval, "vma", None) or getattr(manual, "varying", None)
    return bool(varying) or any(part is not None for part in spec)
