"""Which members of a group make its units, and which read them.

Two passes over a walked program. The first marks everything equal and notes which
parameters a sum would rather have summed; the second proves the result, or names the
place where it fails. See `jaxprune.coupling._marks` for what the marks mean.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxprune.coupling._labels import Value
from jaxprune.coupling._ledger import Ledger
from jaxprune.coupling._marks import Mark, Marking, Place, Places, State
from jaxprune.coupling._merging import mark as mark_step
from jaxprune.coupling._solution import Solution
from jaxprune.coupling._walk import Step, Walked
from jaxprune.program._interpret import interpret
from jaxprune.program._types import Atom, Equation


class Roles(NamedTuple):
    """What the two passes found.

    Attributes:
        consumers: the parameter axes that read, as (number of an input, axis, group).
        refused: group -> why it cannot be merged, as a unit of the ledger.
    """

    consumers: frozenset[Place]
    refused: Mapping[int, int]


class Whole(NamedTuple):
    """A walked program and what its inputs and outputs are.

    Attributes:
        walked: the program.
        names: paths of the variables, which are the first inputs.
        twins: for every output the number of the variable it is the new value of.
    """

    walked: Walked
    names: Sequence[str]
    twins: Sequence[int | None]


def find_roles(
    ledger: Ledger, solution: Solution, program: Whole, units: Sequence[np.ndarray]
) -> Roles:
    """The role of every member, and which groups cannot be merged.

    Args:
        ledger: of the walk.
        solution: the ledger, solved.
        program: what was walked.
        units: for every group the classes of its units.
    """
    places = Places(ledger, solution, units)
    guess = Marking(ledger, places, proposing=True)
    _mark(guess, program, frozenset())
    consumers = frozenset(guess.proposed)
    proof = Marking(ledger, places, proposing=False)
    _mark(proof, program, consumers)
    ordered = [k for k, each in enumerate(units) if solution.ordered[each].any()]
    why = ledger.reason("ordered")
    refused = {**proof.refused, **dict.fromkeys(ordered, why)}
    for axis, reason in ledger.completed:
        refused = {**dict.fromkeys(places.on(axis), reason), **refused}
    return Roles(consumers, refused)


def _mark(marking: Marking, program: Whole, consumers: frozenset[Place]) -> None:
    """Marks a whole program and checks what it returns."""
    states = [
        _input(marking, k, value, consumers, k >= len(program.names))
        for k, value in enumerate(program.walked.ins)
    ]
    outs = _run(marking, program.walked, states)
    for state, twin in zip(outs, program.twins, strict=True):
        for d, marks in enumerate(state.axes):
            for g, mark in marks.items():
                if mark.summed or (twin, d, g) in consumers:
                    marking.refuse(g, "consumer_returned")


def _input(
    marking: Marking, k: int, value: Value, consumers: frozenset[Place], fed: bool
) -> State:
    axes = []
    for d, axis in enumerate(value.axes):
        places = [(k, d, g) for g in marking.places.on(axis)]
        axes.append({p[2]: Mark(p in consumers, frozenset([p])) for p in places})
        for g, grid in marking.places.on(axis).items():
            if grid is None:
                marking.refuse(g, "not_one_axis")
    return State(tuple(axes), fed)


def _run(marking: Marking, walked: Walked, states: Sequence[State]) -> list[State]:
    """Marks the results of a program whose inputs have these marks."""
    _check(marking, walked.ins, states)

    def step(number: int, eqn: Equation, operands: list[State]) -> Sequence[State]:
        here = walked.steps[number]
        if all(value.data for value in here.outs):
            return list(map(marking.constant, here.outs))
        pairs = zip(here.ins, operands, strict=True)
        seen = [marking.constant(v) if v.data else state for v, state in pairs]
        before, marking.eqn = marking.eqn, eqn
        results = _step(marking, here, seen)
        marking.eqn = before
        return results

    def constant(var: Atom) -> State:
        return State(tuple({} for _ in getattr(var.aval, "shape", ())))

    outs = interpret(walked.jaxpr, states, step, constant, walked.eqns)
    pairs = zip(walked.outs, outs, strict=True)
    return [marking.constant(v) if v.data else state for v, state in pairs]


def _check(marking: Marking, values: Sequence[Value], states: Sequence[State]) -> None:
    """Every group on a value has its mark; what has none is not known to be equal."""
    for value, state in zip(values, states, strict=True):
        if value.data:
            continue
        for axis, marks in zip(value.axes, state.axes, strict=True):
            for g in marking.places.on(axis):
                if g not in marks:
                    marking.refuse(g, "no_merge_rule")


def _step(marking: Marking, step: Step, operands: list[State]) -> Sequence[State]:
    if _is_touched(marking, step, operands):

        def run(walked: Walked, states: Sequence[State]) -> list[State]:
            return _run(marking, walked, states)

        return mark_step(marking, run, step, operands)
    fed = any(state.fed for state in operands)
    empty = [tuple({} for _ in out.shape) for out in step.outs]
    return [
        State(axes, fed, out.is_zero)
        for axes, out in zip(empty, step.outs, strict=True)
    ]


def _is_touched(marking: Marking, step: Step, operands: list[State]) -> bool:
    """Is any group on a value of this step, or of the programs inside?"""
    return (
        bool(step.subs)
        or any(marks for state in operands for marks in state.axes)
        or any(marking.places.on(axis) for out in step.outs for axis in out.axes)
    )
