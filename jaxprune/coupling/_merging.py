"""Marks through equations: what their declarations make of equal units."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from jaxprune.coupling._data import concrete
from jaxprune.coupling._marks import EQUAL, Marking, State
from jaxprune.coupling._walk import Step, Walked
from jaxprune.program._interpret import HOLDERS, Passage, through
from jaxprune.program.primitives import Declaration, Signature, declaration

Run: TypeAlias = Callable[[Walked, Sequence[State]], list[State]]


def mark(
    marking: Marking, run: Run, step: Step, operands: list[State]
) -> Sequence[State]:
    """The marks of the results of a step; `run` marks its inner programs."""
    if step.eqn.primitive.name in HOLDERS:
        return through(step.eqn, operands, _passage(marking, run, step))
    known = declaration(step.eqn)
    signature = known and known.signature(step.eqn, lambda k: concrete(step.ins[k]))
    if known is None or signature is None:
        return _unknown(marking, step, operands)
    return _marked(marking, step, operands, known, signature)


def _unknown(marking: Marking, step: Step, operands: Sequence[State]) -> list[State]:
    """A primitive that says nothing about equal units."""
    marks = [m for state in operands for m in state.axes]
    outs = [marking.places.on(axis) for value in step.outs for axis in value.axes]
    _refuse_all(marking, step, *marks, *outs)
    return [marking.constant(value) for value in step.outs]


def _refuse_all(marking: Marking, step: Step, *axes: Any) -> None:
    name = step.eqn.primitive.name
    for g in {g for marks in axes for g in marks}:
        marking.refuse(g, "unknown_to_merge", name=name)


def _refuse_summed(marking: Marking, state: State) -> None:
    """What decides where something goes must not be a sum over units."""
    for marks in state.axes:
        for g, mark in marks.items():
            if mark.summed:
                marking.refuse(g, "consumer_indexes")


def _marked(
    marking: Marking,
    step: Step,
    operands: list[State],
    known: Declaration,
    signature: Signature,
) -> list[State]:
    for k, axes in enumerate(signature.ins):
        if k in signature.deciding:
            _refuse_summed(marking, operands[k])
        loose = [m for f, m in zip(axes, operands[k].axes, strict=True) if not f]
        _refuse_all(marking, step, *loose)
    if known.combine == "draw":
        return _unknown(marking, step, [])
    _follow_positions(marking, step, signature)
    left = _reduced(marking, operands, known, signature)
    fed = any(state.fed for state in operands)
    states = []
    for number, out in enumerate(step.outs):
        feeding = [k for k in signature.feeding(number) if k not in signature.deciding]
        sources = [
            [(feeding.index(k), d) for k, d in along]
            for along in signature.sources(number)
        ]
        for along in sources:
            _refuse_merged(marking, [left[k] for k in feeding], along)
        own = [left[k] for k in feeding]
        state = marking.result(out, own, sources, known.combines(step.eqn))
        states.append(state._replace(fed=fed))
    return states


def _refuse_merged(
    marking: Marking, operands: Sequence[State], along: Sequence[tuple[int, int]]
) -> None:
    met: set[tuple[int, int]] = set()
    for k, d in along:
        for g in operands[k].axes[d]:
            if (k, g) in met:
                marking.refuse(g, "axes_joined")
            met.add((k, g))


def _reduced(
    marking: Marking, operands: list[State], known: Declaration, signature: Signature
) -> list[State]:
    """Checks what is reduced over; the operands without the groups that this takes.

    Of the channels of a grouped convolution those within a group are summed over and
    the groups multiplied one by one: the kernel's axis tells which are which.
    """
    left = [[dict(marks) for marks in state.axes] for state in operands]
    for f in signature.contracted:
        places = [
            (k, d)
            for k, axes in enumerate(signature.ins)
            for d, factors in enumerate(axes)
            if f in factors
        ]
        alone = [(k, d) for k, d in places if len(signature.ins[k][d]) == 1]
        held = {g for k, d in alone for g in operands[k].axes[d]}
        taken = []
        for k, d in places:
            marks = operands[k].axes[d]
            own = {g: m for g, m in marks.items() if (k, d) in alone or g in held}
            left[k][d] = {g: m for g, m in left[k][d].items() if g not in own}
            taken.append(State((own,), operands[k].fed))
        _reduce(marking, taken, known)
    pairs = zip(operands, left, strict=True)
    return [state._replace(axes=tuple(axes)) for state, axes in pairs]


def _reduce(marking: Marking, taken: list[State], known: Declaration) -> None:
    if known.is_product and len(taken) == 2:
        marking.contract(taken[0], 0, taken[1], 0)
        return
    for state in taken:
        if known.reduce == "sum":
            marking.add_up(state, 0)
        else:
            marking.collapse(state, 0, idempotent=known.reduce == "idempotent")


def _follow_positions(marking: Marking, step: Step, signature: Signature) -> None:
    """The positions of a unit keep their order, the same for all units."""
    axis_of = {
        (k, factors[0]): value.axes[d]
        for k, (axes, value) in enumerate(zip(signature.ins, step.ins, strict=True))
        for d, factors in enumerate(axes)
        if len(factors) == 1
    }
    for (_, f), positions in signature.taken.items():
        for (_, own), axis in axis_of.items():
            if own == f:
                marking.picked(axis, positions)
    for f in {f for _, f in signature.at}:
        holders = [k for k, own in axis_of if own == f]
        if any((k, f) not in signature.at for k in holders):  # a part is overwritten
            marking.shuffled(*(axis_of[k, f] for k in holders))


def _passage(marking: Marking, run: Run, step: Step) -> Passage[State]:
    def carried(state: State) -> State:
        """What goes round a loop: equal, before and after."""
        _refuse_summed(marking, state)
        return State(tuple(dict.fromkeys(m, EQUAL) for m in state.axes), True)

    def unstacked(state: State) -> State:
        for g in state.axes[0]:  # ordered, too: one is applied after the other
            marking.refuse(g, "stacked_layers")
        return state._replace(axes=state.axes[1:])

    return Passage(
        run=lambda k, ins: run(step.subs[k], ins),
        join=marking.joined,
        carried=carried,
        unstacked=unstacked,
        stacked=lambda state: state._replace(axes=({}, *state.axes)),
        deciding=lambda state: _refuse_summed(marking, state),
    )
