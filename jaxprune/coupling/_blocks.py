"""Rows through equations: what their declarations make of blocks.

All operands of an equation are placed in the space of its factors. Rows that meet there
are tied, and so are those along a factor that is reduced over; what is left runs along
the axes of the results.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxprune.coupling._data import concrete
from jaxprune.coupling._labels import Value
from jaxprune.coupling._rows import NO_ROW, Rows, State, TooLargeError
from jaxprune.coupling._walk import Step, Walked
from jaxprune.program._interpret import HOLDERS, Passage, interpret, through
from jaxprune.program._types import Equation
from jaxprune.program.primitives import Signature, declaration
from jaxprune.program.primitives import signature as signature_of


def run(rows: Rows, walked: Walked, states: Sequence[State]) -> list[State]:
    """The states of the outputs of a program whose inputs have these states."""

    def step(number: int, eqn: Equation, operands: list[State]) -> Sequence[State]:
        return _step(rows, walked.steps[number], operands)

    return interpret(walked.jaxpr, states, step, lambda var: {}, walked.eqns)


def _step(rows: Rows, step: Step, states: Sequence[State]) -> Sequence[State]:
    name = step.eqn.primitive.name
    known = name in HOLDERS or declaration(step.eqn) is not None
    if not any(states) and (known or all(value.data for value in step.outs)):
        return [{}] * len(step.outs)
    try:
        results = _results(rows, step, states)
    except TooLargeError:
        results, name = None, f"{name} mixes too many of its blocks"
    if results is not None:
        return list(map(rows.settled, step.outs, results))
    touched = {number for state in states for _, number in state}
    for value in step.outs:
        touched |= {number for axis in value.axes for number in rows.slots(axis)}
    rows.forbid(touched, f"{name} does not tell its blocks apart")
    return [{}] * len(step.outs)


def _results(rows: Rows, step: Step, states: Sequence[State]) -> Sequence[State] | None:
    """The states of the results of a step; None if they are not known."""
    if step.eqn.primitive.name in HOLDERS:
        return through(step.eqn, states, _passage(rows, step))
    known = signature_of(step.eqn, lambda k: concrete(step.ins[k]))
    return None if known is None else _moved(rows, step, known, states)


def _passage(rows: Rows, step: Step) -> Passage[State]:
    """How states pass through inner programs; turns of a loop are tied."""
    scan = rows.new_scan()

    def joined(a: State, b: State) -> State:
        b = {key: rows.one_turn(x, scan) for key, x in b.items()}
        return {**a, **b, **{key: rows.tie(a[key], b[key]) for key in a.keys() & b}}

    def unstacked(state: State) -> State:
        entries = [(key, x) for key, x in state.items() if key[0]]
        return {(d - 1, number): rows.each_turn(x, scan) for (d, number), x in entries}

    def stacked(state: State) -> State:
        return {(d + 1, n): rows.all_turns(x, scan) for (d, n), x in state.items()}

    return Passage(
        run=lambda k, ins: run(rows, step.subs[k], ins),
        join=joined,
        settled=lambda after, before: list(map(set, after)) == list(map(set, before)),
        unstacked=unstacked,
        stacked=stacked,
    )


class _Placed(NamedTuple):
    """The rows of one group in the space of all factors.

    Attributes:
        number: of the group.
        along: the factors that its units are along.
        rows: int, one axis for every factor, of size 1 where nothing varies.
    """

    number: int
    along: frozenset[int]
    rows: np.ndarray


def _moved(
    rows: Rows, step: Step, signature: Signature, states: Sequence[State]
) -> list[State]:
    """The states of the results of an equation."""
    outs = []
    for number, value in enumerate(step.outs):
        placed = [
            _Placed(g, frozenset(signature.ins[k][d]), _place(rows, signature, k, x))
            for k in signature.feeding(number)
            for (d, g), x in states[k].items()
        ]
        out: State = {}
        for each in _met(rows, placed):
            _leave(rows, signature, number, value, each, out)
        outs.append(out)
    return outs


def _met(rows: Rows, placed: list[_Placed]) -> list[_Placed]:
    """The rows of a group on a shared factor are tied: they are computed together."""
    met: list[_Placed] = []
    for each in placed:
        same = [m for m in met if m.number == each.number and m.along & each.along]
        along = each.along.union(*(m.along for m in same))
        tied = rows.tie(each.rows, *(m.rows for m in same))
        met = [m for m in met if not any(m is s for s in same)]
        met.append(_Placed(each.number, along, tied))
    return met


def _place(rows: Rows, signature: Signature, k: int, x: np.ndarray) -> np.ndarray:
    """The rows of operand `k` in the space of all factors."""
    axes = signature.ins[k]
    x = rows.collapse(x, [d for d, factors in enumerate(axes) if not factors])
    shape, order = [], []
    for n, factors in zip(x.shape, axes, strict=True):
        order += factors
        for f in factors:
            held = signature.at.get((k, f))
            full = signature.sizes[f] if held is None else len(held)
            shape.append(full if n > 1 else 1)
    # Axes split into factors, then in the order of their numbers; what the operand does
    # not have gets size 1, so that all operands broadcast against each other.
    x = x.reshape(shape).transpose(np.argsort(order))
    sizes = dict(zip(sorted(order), x.shape, strict=True))
    x = x.reshape([sizes.get(f, 1) for f in range(len(signature.sizes))])
    for (j, f), positions in signature.at.items():
        if j == k:
            full = list(x.shape)
            full[f] = signature.sizes[f]
            # The operand holds a part of this factor only. `spread` refuses what is too
            # large.
            line = np.full(rows.spread(np.zeros(1, int), full).shape, NO_ROW)
            line[(slice(None),) * f + (positions,)] = x
            x = line
    return x


def _leave(
    rows: Rows,
    signature: Signature,
    number: int,
    value: Value,
    each: _Placed,
    out: State,
) -> None:
    """Puts the rows of a group on the axis of result `number` where its units are."""
    axes = signature.outs[number]
    there = [
        d
        for d, factors in enumerate(axes)
        if each.along.intersection(factors) and each.number in rows.slots(value.axes[d])
    ]
    gone = signature.contracted
    x = each.rows
    if not there and each.along & gone:
        return  # summed over
    x = rows.collapse(x, sorted(gone | signature.mixed))
    for (j, f), positions in signature.taken.items():
        if j == number and (x.shape[f] > 1 or (positions < 0).any()):
            x = _taken(rows, x, f, positions, signature.sizes[f])
    if not there and not x.any():
        return  # this part of the axis holds nothing of it
    if len(there) != 1:
        why = "a reshape spreads its units over several axes"
        rows.forbid(
            [each.number], why if there else "the positions of its axis are rearranged"
        )
        return
    key = there[0], each.number
    x = _on_axes(rows, signature, number, x)
    out[key] = rows.tie(out[key], x) if key in out else x


def _taken(
    rows: Rows, x: np.ndarray, f: int, positions: np.ndarray, size: int
) -> np.ndarray:
    full = list(x.shape)
    full[f] = size
    line = rows.spread(x, full).take(positions, axis=f)
    shape = [-1 if k == f else 1 for k in range(x.ndim)]
    return np.where((positions < 0).reshape(shape), NO_ROW, line)


def _on_axes(
    rows: Rows, signature: Signature, number: int, x: np.ndarray
) -> np.ndarray:
    """From the space of all factors to the axes of a result."""
    axes = signature.outs[number]
    order = [f for factors in axes for f in factors]
    rest = [f for f in range(x.ndim) if f not in order]
    x = x.transpose(order + rest).reshape([x.shape[f] for f in order])
    place, full, shape = 0, [], []
    for factors in axes:
        own = x.shape[place : place + len(factors)]
        if any(n > 1 for n in own) and len(factors) > 1:
            own = tuple([_length(signature, number, f) for f in factors])
        place += len(factors)
        full += own
        shape.append(int(np.prod(own)))
    return rows.spread(x, full).reshape(shape)


def _length(signature: Signature, number: int, f: int) -> int:
    taken = signature.taken.get((number, f))
    return signature.sizes[f] if taken is None else len(taken)
