"""The interpreter: walks a jaxpr once, moving labels through every equation."""

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from jax.extend.core import Literal

from jaxprune.core._types import PyTree
from jaxprune.coupling import _data as data
from jaxprune.coupling import rules
from jaxprune.coupling._dead import Scope, completes
from jaxprune.coupling._labels import Value
from jaxprune.coupling._ledger import Ledger
from jaxprune.coupling._refused import REFUSED
from jaxprune.coupling._registry import RULES, Rule
from jaxprune.coupling._writers import Labelled, Writers
from jaxprune.coupling.rules._shuffle import join_shuffles
from jaxprune.program._interpret import interpret
from jaxprune.program._jaxprs import Program, input_name, live_equations, opened
from jaxprune.program._types import Atom, Equation, Jaxpr

assert rules  # importing the package fills the registry


class Step(NamedTuple):
    """One equation with the labels that its operands and results carry.

    Attributes:
        eqn: the equation.
        ins: a `Value` for each operand.
        outs: a `Value` for each result.
        subs: the walked inner programs (scan body, branches, ...), in rule order.
    """

    eqn: Equation
    ins: tuple[Value, ...]
    outs: tuple[Value, ...]
    subs: tuple["Walked", ...] = ()


class Walked(NamedTuple):
    """A walked jaxpr: what `narrow` writes down at other sizes.

    Attributes:
        scope: its steps by what they make, to find what is at dead positions.
        writers: of a whole program: those with units of their own, if any may.
    """

    jaxpr: Jaxpr
    consts: list[Any]
    ins: list[Value]
    outs: list[Value]
    steps: list[Step]
    scope: Scope
    writers: Writers | None = None

    @property
    def eqns(self) -> list[PyTree]:
        """The equations of the steps."""
        return [step.eqn for step in self.steps]


class Walk:
    """One walk: the ledger being filled and the inner programs met on the way."""

    def __init__(
        self, ledger: Ledger, writers: Writers | Labelled | None = None
    ) -> None:
        self.ledger = ledger
        self.writers = writers
        self._subs: list[Walked] = []
        self._scope: Scope | None = None

    def run(
        self, jaxpr: Jaxpr, ins: list[Value], used: list[bool] | None = None
    ) -> Walked:
        """Walks a jaxpr (closed or open) whose inputs carry the labels `ins`."""
        jaxpr, consts = opened(jaxpr)
        known = dict(zip(jaxpr.constvars, map(data.constant, consts), strict=True))
        eqns = join_shuffles(live_equations(jaxpr, used), jaxpr.outvars)
        outer, steps = self._subs, []
        around, scope = self._scope, self._inner_scope(jaxpr, ins)
        self._scope, made = scope, scope.made
        calls, writers = self.ledger.calls, self.writers
        if writers is not None and calls:
            writers.enter_inner(calls[-1], jaxpr.invars)

        def step(number: int, eqn: Equation, values: list[Value]) -> tuple[Value, ...]:
            self._subs = []
            calls.append(eqn)
            labelled = self._label(eqn, values)
            calls.pop()
            made.update({var: (labelled, k) for k, var in enumerate(eqn.outvars)})
            steps.append(labelled)
            if writers is not None:
                writers.leave(eqn)
            return labelled.outs

        def constant(var: Atom) -> Value:
            if isinstance(var, Literal):
                return data.literal(var)
            return known.get(var) or unused(var)

        outs = interpret(jaxpr, ins, step, constant, eqns)
        self._subs, self._scope = outer, around
        return Walked(jaxpr, consts, list(ins), outs, steps, scope)

    def _inner_scope(self, jaxpr: Jaxpr, ins: list[Value]) -> Scope:
        """The scope of a program that the current equation, if any, holds."""
        eqn = self.ledger.calls[-1] if self.ledger.calls else None
        if eqn is None or not RULES[eqn.primitive.name].inline:
            return Scope()
        around = zip(eqn.invars, ins, strict=True)
        return Scope(self._scope, zip(jaxpr.invars, around, strict=True))

    def completes(self, eqn: Equation, *values: Value) -> bool:
        """Can a reduction be completed with what is at the dead positions?"""
        return self._scope is not None and completes(self._scope, eqn, *values)

    def enter(
        self, jaxpr: Jaxpr, ins: list[Value], used: list[bool] | None = None
    ) -> list[Value]:
        """Walks an inner program of the current equation; returns its outputs."""
        sub = self.run(jaxpr, ins, used)
        self._subs.append(sub)
        return sub.outs

    def enter_branch(self, jaxpr: Jaxpr, ins: list[Value]) -> list[Value]:
        """Like `enter`, for outputs that must agree with those of other programs."""
        outs = self.enter(jaxpr, ins)
        outs[:] = map(self.view, outs)
        return outs

    def forget_subs(self) -> None:
        """Drops the inner programs of the current equation, to walk them again."""
        self._subs.clear()

    def view(self, value: Value) -> Value:
        """One use of a value: data gets labels of its own, for this use alone."""
        if not value.data or not value.shape:
            return value
        axes = tuple(self.ledger.fresh_axis(n, zero=value.is_zero) for n in value.shape)
        for d, axis in enumerate(axes):
            if d not in value.uniform and not isinstance(axis, int):
                self.ledger.ordered.append(axis[0].units)
        return value._replace(axes=axes)

    def unknown(self, eqn: Equation, *values: Value) -> list[Value]:
        """Pins everything an equation touches: what is not understood is not cut."""
        name = eqn.primitive.name
        if name in REFUSED:
            why = self.ledger.reason("refused", eqn, name=name, why=REFUSED[name])
        else:
            why = self.ledger.reason("no_rule", eqn, name=name)
        return self.frozen(eqn, why, *values)

    def frozen(self, eqn: Equation, why: int, *values: Value) -> list[Value]:
        """Pins all axes of the operands and results of an equation."""
        for value in values:
            for axis in value.axes:
                self.ledger.freeze(axis, why)
        shapes = [getattr(v.aval, "shape", ()) for v in eqn.outvars]
        return [Value(shape, (why,) * len(shape)) for shape in shapes]

    def _label(self, eqn: Equation, values: list[Value]) -> Step:
        """The equation on these operands: what it sees of them, and its results."""
        known = [value.data for value in values]
        if False not in known:
            operands = tuple(values)
            return Step(eqn, operands, data.derive(eqn, operands))
        rule = RULES.get(eqn.primitive.name, _NO_RULE)
        if True in known:
            for k in range(rule.whole(eqn), len(values)):
                values[k] = self.view(values[k])
        results = rule.label(self, eqn, *values)
        outs = (results,) if isinstance(results, Value) else tuple(results)
        return Step(eqn, tuple(values), outs, tuple(self._subs))


_NO_RULE = Rule(Walk.unknown)


def walk_program(
    program: Program,
    count: int,
    known: Mapping[int, Value] = MappingProxyType({}),
    zero: Mapping[int, Sequence[bool]] = MappingProxyType({}),
    free: Collection[tuple[int, int]] = (),
    layers: Collection[tuple[int, int]] = (),
) -> tuple[Ledger, Walked]:
    """Walks a program whose first `count` inputs may be cut anywhere, others nowhere.

    Inputs that are data of an outer program are `known`, by their number; `zero` says
    of which axes of an input the dead positions hold 0: of all, if it is not named. The
    writers that end on an axis of `free`, as (number of an input, axis), have units of
    their own (see `jaxprune.coupling._writers`); stacked layers on the axes of `layers`
    may go one by one (see `jaxprune.coupling._layers`).

    A program is walked once, however often it is asked for (by `trace`, by `narrow`);
    the ledger is the caller's own.
    """
    plain = program.lasting and all(map(all, zero.values()))
    if known or free or layers or not plain:
        return _walk_program(program, count, known, zero, free, layers)
    # By the rules too: what was registered since makes it another walk. And with the
    # jaxpr, so that no other can have its id.
    key = id(program.closed), count, tuple(program.paths), tuple(RULES.items())
    if key not in program.memory:
        while len(program.memory) >= _MOST_WALKS:  # the oldest goes
            del program.memory[next(iter(program.memory))]
        walk = _walk_program(program, count, {}, {})
        program.memory[key] = program.closed, *walk
    _, ledger, walked = program.memory[key]
    return ledger.copy(), walked


def _walk_program(
    program: Program,
    count: int,
    known: Mapping[int, Value],
    zero: Mapping[int, Sequence[bool]],
    free: Collection[tuple[int, int]] = (),
    layers: Collection[tuple[int, int]] = (),
) -> tuple[Ledger, Walked]:
    ledger = Ledger()
    ledger.reason("pinned")  # of several reasons the first is told
    ins = []
    for k, (path, var) in enumerate(
        zip(program.paths, program.jaxpr.invars, strict=True)
    ):
        shape = var.aval.shape
        if k in known:
            ins.append(known[k])
            continue
        if k < count:  # what is cut from a variable is zero in the masked program
            flags = zero.get(k, (True,) * len(shape))
            pairs = zip(shape, flags, strict=True)
            axes = tuple([ledger.fresh_axis(n, zero=flag) for n, flag in pairs])
        else:
            why = ledger.reason("input", name=input_name(path))
            axes = (why,) * len(shape)
        ins.append(Value(shape, axes))
    writers = None
    if free or layers:
        leaves = [axis for value in ins for axis in value.axes]
        own, stacked = ([ins[k].axes[d] for k, d in some] for some in (free, layers))
        writers = Writers(ledger, leaves, own, stacked)
        invars = program.jaxpr.invars
        writers.enter(invars, [k >= count for k in range(len(invars))])
    walked = Walk(ledger, writers).run(program.closed, ins)
    return ledger, walked._replace(writers=writers)


_MOST_WALKS = 2


def unused(var: Atom) -> Value:
    """A result that nothing needs."""
    shape = getattr(var.aval, "shape", ())
    return Value(shape, (0,) * len(shape))
