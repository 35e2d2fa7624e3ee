"""Writes down what remains of a walked program, as a program of its own.

An equation whose operands and results shrink is mostly the same equation, with other
sizes among its parameters (`Rule.resize`). It is copied: nothing is traced, the types
of its results are known from the walk, and it keeps its source line, name stack and
context. Where parameters are not enough, the `narrow` half of the rule is traced and
its equations are copied in.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend.core import JaxprEqn, Literal, Var

from jaxprune.core._types import ApplyFn
from jaxprune.coupling._dead import REDUCTIONS
from jaxprune.coupling._labels import Value
from jaxprune.coupling._registry import RULES
from jaxprune.coupling._walk import Step, Walked
from jaxprune.narrowing._dead import complete
from jaxprune.narrowing._means import by_own_count
from jaxprune.program._interpret import interpret
from jaxprune.program._jaxprs import abstract, bind, closed, opened
from jaxprune.program._types import Atom, Equation

if TYPE_CHECKING:
    from jaxprune.narrowing._replay import Kept


def build(kept: "Kept", walked: Walked) -> Any:
    """A closed jaxpr that computes `walked` on operands without dead positions.

    Args:
        kept: what stays of every value (`jaxprune.narrowing._replay.Kept`).
        walked: the program; all of its results are computed.
    """
    emitter = _Emitter(kept)
    ins = [
        emitter.resized(var, kept.shape(value))
        for var, value in zip(walked.jaxpr.invars, walked.ins, strict=True)
    ]
    outs = emitter.write(walked, ins)
    if emitter.collapsed:
        emitter.drop_unread(outs)
    consts = list(emitter.consts.items())
    return closed(walked.jaxpr, consts, ins, outs, emitter.eqns, emitter.effects)


class _Emitter:
    """Emits the equations of the smaller program.

    Attributes:
        eqns: the equations.
        consts: variable -> its value.
        effects: of equations that the walked program did not have.
        envs: id of the scope of a program -> its variables, as written.
        dead: (id of a scope, variable, dimensions) -> what is at dead positions.
        collapsed: is some result without any positions, so that what it was made from
            may be read by nothing?
    """

    def __init__(self, kept: "Kept") -> None:
        self.kept = kept
        self.eqns: list[Equation] = []
        self.consts: dict[Any, Any] = {}
        self.effects: set[Any] = set()
        self.envs: dict[int, dict[Any, Any]] = {}
        self.dead: dict[Any, Any] = {}
        self.collapsed = False
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

    def write(self, walked: Walked, operands: Sequence[Atom]) -> list[Atom]:
        """Writes all steps of a program; returns its results, None if not computed."""
        arrays = dict(zip(walked.jaxpr.constvars, walked.consts, strict=True))
        env = self.envs[id(walked.scope)] = dict(
            zip(walked.jaxpr.invars, operands, strict=True)
        )
        for var, array in arrays.items():
            env[var] = self.constant(array, var.aval)

        def step(number: int, eqn: Equation, operands: list[Atom]) -> list[Atom]:
            here = walked.steps[number]
            for k, value in enumerate(here.ins):
                if value.data:
                    operands[k] = self._cut(operands[k], value)
            if not self.kept.counts_removed:
                operands = by_own_count(self, walked.scope, here, operands)
            results = self._step(here, operands)
            if self._is_completed(here):
                results = complete(self, walked.scope, here, results)
            env.update(zip(eqn.outvars, results, strict=True))
            return results

        def constant(var: Atom) -> Any:
            if isinstance(var, Literal) or var not in arrays:
                return var if isinstance(var, Literal) else None
            return self.constant(arrays[var], var.aval)

        outs = interpret(walked.jaxpr, operands, step, constant, walked.eqns)
        return [
            self._cut(out, value) if value.data and out is not None else out
            for out, value in zip(outs, walked.outs, strict=True)
        ]

    def _is_completed(self, step: Step) -> bool:
        """May a step have to count what is at dead positions?"""
        reduces = step.eqn.primitive.name in REDUCTIONS
        return reduces and self.kept.counts_removed and self.kept.touches(*step.ins)

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

    def _cut(self, operand: Atom, value: Value) -> Any:
        """Data at the positions that one use keeps."""
        if not self.kept.touches(value):
            return operand
        array = self._known(operand)
        if array is None or isinstance(array, Tracer):
            [cut] = self.traced(lambda x: [self.kept.cut(x, value)], [operand])
            return cut
        with jax.ensure_compile_time_eval():  # a constant stays one
            cut = self.kept.cut(array, value)
        return self.constant(cut, jax.typeof(cut))

    def _step(self, step: Step, operands: list[Atom]) -> list[Atom]:
        """Writes a step; returns its results."""
        eqn, kept = step.eqn, self.kept
        shapes = [kept.shape(value) for value in step.outs]
        if not (kept.touches(*step.ins, *step.outs) or kept.cuts_inside(step)):
            if isinstance(eqn, JaxprEqn):
                return self.copied(eqn, operands, shapes, eqn.params)
            return self.traced(lambda *xs: bind(eqn, *xs), operands)
        if shapes and all(0 in shape for shape in shapes):
            self.collapsed = True
            types = [var.aval.dtype for var in eqn.outvars]
            return self.traced(lambda: list(map(jnp.zeros, shapes, types)), [])
        rule = RULES[eqn.primitive.name]
        if rule.inline:
            return self.write(step.subs[0], operands)
        resize, narrow = rule.resize, rule.narrow
        changed = resize(kept, step) if resize else None
        if changed is not None:
            return self.copied(eqn, operands, shapes, {**eqn.params, **changed})
        if narrow is None:
            return self.copied(eqn, operands, shapes, eqn.params)
        with eqn.ctx.manager:
            outs = self.traced(lambda *xs: narrow(kept, step, *xs), operands)
        made = [out.aval.shape for out in outs]
        if made != shapes:
            raise ValueError(
                f"the rule of {eqn.primitive.name} narrows its results to {made}, but "
                f"their labels keep {shapes}: its halves do not agree"
            )
        return outs

    def copied(
        self,
        eqn: Equation,
        operands: list[Atom],
        shapes: list[tuple[int, ...]],
        params: Any,
    ) -> list[Atom]:
        """The same equation on these operands, for results of these shapes."""
        outs = list(map(self.resized, eqn.outvars, shapes))
        self.eqns.append(eqn.replace(invars=operands, outvars=outs, params=params))
        return outs

    def traced(self, fn: ApplyFn, operands: list[Atom]) -> list[Atom]:
        """The equations of a function of these operands."""
        known = list(map(self._known, operands))
        free = [operand for operand in operands if self._known(operand) is None]

        def call(*xs: Any) -> Any:
            rest = iter(xs)
            outs = fn(*[next(rest) if array is None else array for array in known])
            return list(outs) if isinstance(outs, (list, tuple)) else [outs]

        make = jax.make_jaxpr(call)
        jaxpr, consts = opened(make(*[abstract(operand.aval) for operand in free]))
        env = dict(zip(jaxpr.invars, free, strict=True))
        for var, array in zip(jaxpr.constvars, consts, strict=True):
            env[var] = self.constant(array, var.aval)
        for eqn in jaxpr.eqns:
            invars = [v if isinstance(v, Literal) else env[v] for v in eqn.invars]
            outs = [type(v)(v.aval) for v in eqn.outvars]
            env.update(zip(eqn.outvars, outs, strict=True))
            self.eqns.append(eqn.replace(invars=invars, outvars=outs))
        self.effects |= jaxpr.effects
        results = [v if isinstance(v, Literal) else env[v] for v in jaxpr.outvars]
        return cast(list[Atom], results)

    def _known(self, operand: Atom) -> Any:
        """The value of an operand, if it has one already."""
        return operand.val if isinstance(operand, Literal) else self.consts.get(operand)
