"""Writes down what remains of a walked program, as a program of its own.

An equation whose operands and results shrink is mostly the same equation, with other
sizes among its parameters (`Rule.resize`). It is copied: nothing is traced, the types
of its results are known from the walk, and it keeps its source line, name stack and
context. Where parameters are not enough, the `narrow` half of the rule is traced and
its equations are copied in.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend.core import JaxprEqn, Literal

from jaxprune.coupling._dead import REDUCTIONS
from jaxprune.coupling._labels import Value
from jaxprune.coupling._registry import RULES
from jaxprune.coupling._walk import Step, Walked
from jaxprune.narrowing._dead import complete
from jaxprune.narrowing._means import by_own_count
from jaxprune.program._interpret import interpret
from jaxprune.program._jaxprs import bind, closed
from jaxprune.program._types import Atom, Equation
from jaxprune.program._writer import Writer

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


class _Emitter(Writer):
    """Emits the equations of the smaller program.

    Attributes:
        envs: id of the scope of a program -> its variables, as written.
        dead: (id of a scope, variable, dimensions) -> what is at dead positions.
        collapsed: is some result without any positions, so that what it was made from
            may be read by nothing?
    """

    def __init__(self, kept: "Kept") -> None:
        super().__init__()
        self.kept = kept
        self.envs: dict[int, dict[Any, Any]] = {}
        self.dead: dict[Any, Any] = {}
        self.collapsed = False

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

    def _cut(self, operand: Atom, value: Value) -> Any:
        """Data at the positions that one use keeps."""
        if not self.kept.touches(value):
            return operand
        array = self.known(operand)
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
