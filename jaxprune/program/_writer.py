"""Writes the equations of a program that is derived from another.

An equation that stays is copied: nothing is traced, and it keeps its source line, name
stack and context. Where a copy is not enough, a function is traced and its equations
are copied in.
"""

from collections.abc import Sequence
from typing import Any, cast

import jax
from jax.extend.core import Literal, Var

from jaxprune.core._types import ApplyFn
from jaxprune.program._jaxprs import abstract, opened
from jaxprune.program._types import Atom, Equation


class Writer:
    """What has been written of a program.

    Attributes:
        eqns: the equations.
        consts: variable -> its value.
        effects: of equations that the first program did not have.
    """

    def __init__(self) -> None:
        self.eqns: list[Equation] = []
        self.consts: dict[Any, Any] = {}
        self.effects: set[Any] = set()
        self._types: dict[Any, Any] = {}  # (id of the full type, shape) -> type
        self._variables: dict[int, Any] = {}  # id of a constant -> its variable

    def resized(self, var: Atom, shape: tuple[int, ...]) -> Any:
        """A new variable like `var`, of this shape."""
        aval = var.aval
        if shape != getattr(aval, "shape", shape):
            key = id(aval), shape
            if key not in self._types:
                self._types[key] = aval.update(shape=shape)
            aval = self._types[key]
        made: Any = type(var)
        return made(aval)

    def constant(self, array: Any, aval: Any) -> Any:
        """The variable that holds an array of this type."""
        var = self._variables.get(id(array))
        if var is None:
            var = self._variables[id(array)] = Var(aval)
            self.consts[var] = array
        return var

    def known(self, operand: Atom) -> Any:
        """The value of an operand, if it has one already."""
        return operand.val if isinstance(operand, Literal) else self.consts.get(operand)

    def copied(
        self,
        eqn: Equation,
        operands: Sequence[Atom],
        shapes: Sequence[tuple[int, ...]],
        params: Any,
    ) -> list[Atom]:
        """The same equation on these operands, for results of these shapes."""
        outs = list(map(self.resized, eqn.outvars, shapes))
        self.eqns.append(
            eqn.replace(invars=list(operands), outvars=outs, params=params)
        )
        return outs

    def traced(
        self, fn: ApplyFn, operands: Sequence[Atom], like: Equation | None = None
    ) -> list[Atom]:
        """The equations of a function of these operands.

        Args:
            fn: the function.
            operands: variables and literals.
            like: an equation whose source line and name stack the new ones get.
        """
        known = list(map(self.known, operands))
        free = [operand for operand in operands if self.known(operand) is None]

        def call(*xs: Any) -> Any:
            rest = iter(xs)
            outs = fn(*[next(rest) if array is None else array for array in known])
            return list(outs) if isinstance(outs, (list, tuple)) else [outs]

        make = jax.make_jaxpr(call)
        jaxpr, consts = opened(make(*[abstract(operand.aval) for operand in free]))
        env = dict(zip(jaxpr.invars, free, strict=True))
        for var, array in zip(jaxpr.constvars, consts, strict=True):
            env[var] = self.constant(array, var.aval)
        named = {} if like is None else {"source_info": like.source_info}
        for eqn in jaxpr.eqns:
            invars = [v if isinstance(v, Literal) else env[v] for v in eqn.invars]
            outs = [type(v)(v.aval) for v in eqn.outvars]
            env.update(zip(eqn.outvars, outs, strict=True))
            self.eqns.append(eqn.replace(invars=invars, outvars=outs, **named))
        self.effects |= jaxpr.effects
        results = [v if isinstance(v, Literal) else env[v] for v in jaxpr.outvars]
        return cast(list[Atom], results)

    def drop_unread(self, outs: Sequence[Atom]) -> None:
        """Drops the equations whose results nothing reads, and constants likewise."""
        read = {var for var in outs if not isinstance(var, Literal)}
        left = []
        for eqn in reversed(self.eqns):
            if eqn.effects or not read.isdisjoint(eqn.outvars):
                read.update(v for v in eqn.invars if not isinstance(v, Literal))
                left.append(eqn)
        self.eqns = left[::-1]
        self.consts = {var: x for var, x in self.consts.items() if var in read}
