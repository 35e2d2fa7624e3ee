"""Lines: the labels of parameter axes, solved; axes tied throughout share one."""

import dataclasses
from collections.abc import Iterator, Mapping
from operator import itemgetter
from typing import NamedTuple, TypeAlias

import numpy as np

from jaxprune.core._groups import Pinned, Reason
from jaxprune.coupling._labels import Value
from jaxprune.coupling._ledger import Ledger
from jaxprune.coupling._reasons import text_of
from jaxprune.coupling._solution import ATOM, FROZEN, NEVER, Solution
from jaxprune.program._jaxprs import source_line

Axes: TypeAlias = list[tuple[int, str, int]]  # number among all axes, path, axis


class Lines(NamedTuple):
    """The lines of some variables.

    Attributes:
        axes: the axes on every line, in order.
        classes: int ``[positions]`` of every line, the classes of its units; none is
            empty.
        columns: the atoms on every line, see `Solution.atoms`.
        alone: does every position of a line hold one atom that stands nowhere else?
        frozen: the axes that cannot be cut, by the unit that stands for the reason.
    """

    axes: list[Axes]
    classes: list[np.ndarray]
    columns: list[list[np.ndarray]]
    alone: list[bool]
    frozen: dict[int, Axes]


def find_lines(
    ledger: Ledger, solution: Solution, variables: Mapping[str, Value]
) -> Lines:
    """The lines of some variables, in order of their first axes."""
    axes: dict[int, Axes] = {}
    frozen: dict[int, Axes] = {}
    classes: list[np.ndarray] = []
    every = [(path, d, v) for path, v in variables.items() for d in range(len(v.axes))]
    for number, (path, d, value) in enumerate(every):
        axis = value.axes[d]
        if isinstance(axis, int):
            frozen.setdefault(axis, []).append((number, path, d))
            continue
        if not value.shape[d]:
            continue
        block = ledger.block(axis[0].units)
        if block not in axes:
            axes[block] = []
            classes.append(solution.classes[axis[0].units])
        axes[block].append((number, path, d))
    return Lines(list(axes.values()), classes, *_columns(solution, classes), frozen)


def _columns(
    solution: Solution, lines: list[np.ndarray]
) -> tuple[list[list[np.ndarray]], list[bool]]:
    """`Lines.columns` and `alone`."""
    of_class = solution.kinds
    kinds, starts = _joined([of_class[line] for line in lines])
    least = np.minimum.reduceat(kinds, starts)
    most = np.maximum.reduceat(kinds, starts)
    columns: list[list[np.ndarray]] = [[] for _ in lines]
    pure = np.flatnonzero(least == ATOM).tolist()
    for k in pure:
        columns[k].append(lines[k])
    mixed = np.flatnonzero((least < ATOM) & (most > FROZEN)).tolist()
    inside, ends = _joined([lines[k] for k in mixed])
    every, starts = _joined([lines[k] for k in pure])
    # Most classes are on no line: `bincount` would write to all of their counts. And
    # `add.at` is fast only between numbers of one type.
    uses, one = np.zeros(len(of_class), np.int32), np.int32(1)
    np.add.at(uses, every, one)
    for column in solution.atoms_of(inside):
        np.add.at(uses, column[column >= 0], one)
        some = np.maximum.reduceat(column, ends) >= 0
        for k, part, has in zip(mixed, np.split(column, ends[1:]), some, strict=True):
            if has:
                columns[k].append(part)
    alone = np.zeros(len(lines), bool)
    alone[pure] = np.logical_and.reduceat(uses[every] == 1, starts)
    return columns, alone.tolist()


def _joined(lines: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The lines one after the other, and where each begins."""
    starts = np.cumsum([0, *map(len, lines)])[:-1]
    return np.concatenate(lines or [np.zeros(0, int)]), starts


def find_pinned(ledger: Ledger, solution: Solution, lines: Lines) -> tuple[Pinned, ...]:
    """What cannot be cut, axis by axis."""
    found = [(axes, 1, explain(ledger, why)) for why, axes in lines.frozen.items()]
    classes, starts = _joined(lines.classes)
    why = solution.why[classes]
    if (solution.partly != NEVER).any():
        partly = np.where(why == NEVER, solution.partly[classes], NEVER)
        for line, count, unit in _held(partly, starts):
            inner = explain(ledger, unit)
            text = text_of("factor", why=inner.text)
            reason = dataclasses.replace(inner, kind="factor", text=text)
            found.append((lines.axes[line], count, reason))
    for line, count, unit in _held(why, starts):
        found.append((lines.axes[line], count, explain(ledger, unit)))
    pinned = [
        (number, Pinned(path, d, count, reason))
        for axes, count, reason in found
        for number, path, d in axes
    ]
    return tuple([each for _, each in sorted(pinned, key=itemgetter(0))])


def _held(reasons: np.ndarray, starts: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Lines with a reason at some position: number, how many positions, the first."""
    if not len(starts):
        return
    # No line is empty (see `Lines.classes`), or `reduceat` would read the next one.
    counts = np.add.reduceat(reasons != NEVER, starts, dtype=int)
    held = np.flatnonzero(counts)
    first = np.minimum.reduceat(reasons, starts)
    yield from zip(
        held.tolist(), counts[held].tolist(), first[held].tolist(), strict=True
    )


def explain(ledger: Ledger, unit: int) -> Reason:
    """A reason, with the user's source line where known."""
    kind, text, eqn, calls = ledger.reasons[unit]
    if eqn is None:
        return Reason(kind, text)
    source = next(filter(None, map(source_line, (eqn, *calls[::-1]))), "")
    return Reason(kind, text, eqn.primitive.name, source)
