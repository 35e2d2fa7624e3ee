"""The registry of handlers, and what they share.

A handler is ``(marking, run, step, operands) -> states of the results``, where `run`
marks an inner program.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from jaxprune.coupling._marks import Marking, Sources, State
from jaxprune.coupling._walk import Step, Walked

Run: TypeAlias = Callable[[Walked, Sequence[State]], list[State]]
Handler: TypeAlias = Callable[[Marking, Run, Step, list[State]], list[State]]

HANDLERS: dict[str, Handler] = {}


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Decorator: registers how marks move through the named primitives."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


def unknown(marking: Marking, run: Run, step: Step, operands: list[State]) -> Any:
    """A primitive that says nothing about equal units."""
    touched = {g for state in operands for marks in state.axes for g in marks}
    touched |= {
        g for v in step.outs for axis in v.axes for g in marking.places.on(axis)
    }
    name = step.eqn.primitive.name
    for g in touched:
        marking.refuse(g, "unknown_to_merge", name=name)
    return [marking.constant(value) for value in step.outs]


def all_results(
    marking: Marking,
    step: Step,
    operands: list[State],
    sources: Sequence[Sources],
    kind: str,
) -> list[State]:
    """The states of all results, from the same axes of the operands."""
    return [marking.result(out, operands, sources, kind) for out in step.outs]


def alike(step: Step, count: int | None = None) -> list[Sources]:
    """Every axis of the result from the same axis of the operands that have axes."""
    full = [n for n, value in enumerate(step.ins[:count]) if value.shape]
    return [[(n, d) for n in full] for d in range(len(step.outs[0].shape))]


def refuse_summed(marking: Marking, *states: State) -> None:
    """What decides where something goes must not be a sum over units."""
    for state in states:
        for marks in state.axes:
            for g, mark in marks.items():
                if mark.summed:
                    marking.refuse(g, "consumer_indexes")
