"""Rows: where every block of a group may lose units of its own.

A reshape to heads x features makes one unit of a feature of *every* head: cutting it
leaves an array. But an array is also left when every head loses as many features,
whichever they are. That is right wherever the program treats the heads alike and never
mixes a feature of one with a feature of another: there it does not matter which of its
features a head keeps, as it does not matter in which order a layer keeps its channels.

So call the units of such a group slots, and its copies (the features of one head) rows.
A row is a label that moves through the program with the values of its slots, and is
tied to the rows of whatever they are computed with. Rows that end up tied lose the same
slots; the others are free to differ. `Rows` collects the ties that
`jaxprune.coupling._blocks` finds; a primitive that is not declared ends the freedom of
the groups that it touches.

The layers of a scan are told apart in the same way: a stacked parameter has rows of its
own in every layer. The body of the scan is one program for all of them, so there a row
is a variable that stands for the row of the layer whose turn it is (`each_turn`), and a
tie between two of them is a tie in every layer (`classes`). What is the same in every
turn, a constant or what is carried, ties all layers that it meets.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from jaxprune.coupling._labels import Axis, Value
from jaxprune.coupling._solution import NONE, Solution

NO_ROW = 0
LIMIT = 1 << 22  # labels of one value; a program that needs more is not understood

# (axis, group) -> the row of every element, as an array that broadcasts to the value.
State: TypeAlias = dict[tuple[int, int], np.ndarray]


class Slots(NamedTuple):
    """The units of one group on one axis.

    Attributes:
        slot: int ``[n]``, the number of the unit at every position, `NONE` elsewhere.
        part: int ``[n]``, which run of positions through all slots it stands in.
    """

    slot: np.ndarray
    part: np.ndarray

    @property
    def parts(self) -> int:
        """How many runs there are."""
        return int(self.part.max()) + 1


class Rows:
    """One walk over a walked program.

    Attributes:
        why: group number -> why its rows cannot be told apart.
    """

    def __init__(self, solution: Solution, groups: Sequence[np.ndarray]) -> None:
        """Takes the classes of the units of every group, in order of position."""
        count = len(solution.why)
        self.solution = solution
        self.sizes = [len(units) for units in groups]
        self._group, self._slot = np.full((2, count), NONE)
        self.why: dict[int, str] = {}
        for number, units in enumerate(groups):
            self._group[units], self._slot[units] = number, np.arange(len(units))
            if solution.ordered[units].any():
                self.why[number] = "its units may be pruned but not permuted"
        self._size = NO_ROW + 1
        self._ties: list[tuple[np.ndarray, np.ndarray]] = []
        # Of every scan its first variable, and their rows ``[variables, turns]``.
        self._scans: list[tuple[int, np.ndarray]] = []
        self._seen: dict[int, tuple[Axis, dict[int, Slots]]] = {}

    # -- what rules are made of

    def slots(self, axis: Axis) -> dict[int, Slots]:
        """The groups on an axis."""
        if isinstance(axis, int):
            return {}
        if id(axis) not in self._seen:
            self._seen[id(axis)] = axis, self._find(axis)
        return self._seen[id(axis)][1]

    def tie(self, *rows: np.ndarray) -> np.ndarray:
        """Rows of values that are computed elementwise; returns those of the result."""
        result, *others = rows
        for other in others:
            shape = np.broadcast_shapes(result.shape, other.shape)
            a, b = self.spread(result, shape), self.spread(other, shape)
            new = (a != b) & (a != NO_ROW) & (b != NO_ROW)
            if new.any():
                self._ties.append((a[new], b[new]))
            # Either row stands for both once they are tied; `NO_ROW`, which is 0, gives
            # way.
            result = np.maximum(a, b)
        return _compressed(result)

    def collapse(self, rows: np.ndarray, axes: Sequence[int]) -> np.ndarray:
        """Ties the rows along axes that a value is mixed along; these get size 1."""
        for d in axes:
            # `NO_ROW` is 0, the least: the maximum is a row wherever there is one.
            first = rows.max(axis=d, keepdims=True)
            self.tie(first, rows)
            rows = first
        return rows

    def spread(self, rows: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """The rows of every element, for what moves elements one by one."""
        if math.prod(shape) > LIMIT:
            raise TooLargeError
        return np.broadcast_to(rows, shape)

    def forbid(self, numbers: Any, why: str) -> None:
        """These groups lose the same units everywhere."""
        for number in numbers:
            self.why.setdefault(number, why)

    # -- the states of a program

    def source(self, value: Value, layers: int | None = None) -> State:
        """The state of a variable: a row for every run through the slots.

        Args:
            value: the variable.
            layers: the axis of its layers, whose rows are their own; None if of none.
        """
        state, rank = {}, len(value.shape)
        for d, axis in enumerate(value.axes):
            for number, slots in self.slots(axis).items():
                turns, turn = 1, np.zeros(1, int)
                if layers is not None and layers != d:
                    turns = value.shape[layers]
                    turn = _along(np.arange(turns), layers, rank)
                fresh = self._fresh(turns * slots.parts).reshape(turns, -1)
                lines = fresh[turn, _along(slots.part, d, rank)]
                none = _along(slots.slot == NONE, d, rank)
                state[d, number] = _compressed(np.where(none, NO_ROW, lines))
        return state

    def _fresh(self, n: int) -> np.ndarray:
        rows = np.arange(self._size, self._size + n)
        self._size += n
        return rows

    # -- scans

    def new_scan(self) -> int:
        """The number of a scan, whose variables are made before those of inner ones."""
        self._scans.append((self._size, np.zeros((0, 1), int)))
        return len(self._scans) - 1

    def each_turn(self, rows: np.ndarray, scan: int) -> np.ndarray:
        """What a turn of a scan sees of rows that differ along axis 0: variables."""
        if len(rows) == 1:
            return rows[0]
        first, turns = self._scans[scan]
        flat = rows.reshape(len(rows), -1)
        seen, where = np.unique(flat, axis=1, return_inverse=True)
        variables = self._fresh(seen.shape[1])
        known = np.broadcast_to(turns, (len(turns), len(rows)))
        self._scans[scan] = first, np.concatenate([known, seen.T])
        variables = np.where((seen == seen[:1]).all(axis=0), seen[0], variables)
        return variables[where.ravel()].reshape(rows.shape[1:])

    def all_turns(self, rows: np.ndarray, scan: int) -> np.ndarray:
        """The rows of all turns, along a new axis 0: the inverse of `each_turn`."""
        first, turns = self._scans[scan]
        if not _within(rows, first, turns).any():
            return rows[None]
        every = _in_turns(rows.ravel(), first, turns).T
        return every.reshape(-1, *rows.shape)

    def one_turn(self, rows: np.ndarray, scan: int) -> np.ndarray:
        """The rows of what is the same in every turn: those of all turns are tied."""
        return self.collapse(self.all_turns(rows, scan), [0])[0]

    def leave(self, states: Sequence[State]) -> None:
        """The outputs of the whole program keep one array for all rows."""
        for state in states:
            for (d, _), rows in state.items():
                self.collapse(rows, [k for k in range(rows.ndim) if k != d])

    def classes(self) -> np.ndarray:
        """For every row the number of those it is tied to."""
        # Rows are the nodes, ties the edges; the empty array is for a program without
        # ties.
        a = np.concatenate([np.zeros(0, int), *(a for a, _ in self._ties)])
        b = np.concatenate([np.zeros(0, int), *(b for _, b in self._ties)])
        for first, turns in self._scans[::-1]:  # inner scans stand behind outer ones
            inner = _within(a, first, turns) | _within(b, first, turns)
            each = [_in_turns(side[inner], first, turns) for side in (a, b)]
            a, b = (
                np.concatenate([side[~inner], x.ravel()])
                for side, x in zip((a, b), each, strict=True)
            )
        graph = coo_matrix((np.ones(len(a), bool), (a, b)), (self._size, self._size))
        return connected_components(graph, directed=False)[1]

    def settled(self, value: Value, state: State) -> State:
        """The state of a result: one row for every run through the slots."""
        settled = {}
        for (d, number), rows in state.items():
            slots = self.slots(value.axes[d]).get(number)
            if number in self.why or slots is None:
                self.forbid([number], "the positions of its axis are rearranged")
                continue
            # Where two axes hold the units, neither tells the rows of the other apart.
            axes = enumerate(value.axes)
            twins = [k for k, a in axes if k != d and number in self.slots(a)]
            rows = self.collapse(rows, twins)
            if rows.shape[d] > 1:
                start = np.unique(slots.part, return_index=True)[1]
                start = start[-slots.parts :]  # without the part of what is no slot
                held = np.take(rows, start[slots.part], axis=d)
                held = np.where(_along(slots.slot, d, rows.ndim) == NONE, NO_ROW, held)
                self.tie(held, rows)
                rows = held
            settled[d, number] = _compressed(rows)
        return settled

    def _find(self, axis: tuple) -> dict[int, Slots]:
        found: dict[int, Slots] = {}
        for column in axis:
            for atoms in self.solution.atoms(column.units):
                group = np.where(atoms == NONE, NONE, self._group[atoms])
                for number in np.unique(group[group != NONE]).tolist():
                    slot = np.where(group == number, self._slot[atoms], NONE)
                    part = _parts(slot, self.sizes[number])
                    if part is None or number in found:
                        self.forbid([number], "its units are not in order on some axis")
                        part = np.zeros(len(slot), int)
                    found[number] = Slots(slot, part)
        return found


class TooLargeError(Exception):
    """The rows of a value are too many to look at."""


def _parts(slot: np.ndarray, size: int) -> np.ndarray | None:
    """The runs of ascending slots; None unless every run holds all slots alike.

    Then the order of the positions that stay says nothing about which slots stay, and
    every run keeps as many positions as it keeps slots.
    """
    held = slot != NONE
    before = np.r_[NONE, slot[:-1]]
    # A run begins where slots begin, or where their number falls back.
    start = held & ((before == NONE) | (slot < before))
    part = np.where(held, np.cumsum(start) - 1, NONE)
    # [runs, slots]: how many positions of a run hold a slot; even within every run.
    counts = np.bincount(part[held] * size + slot[held], minlength=start.sum() * size)
    grid = counts.reshape(-1, size)
    return part if (grid == grid[:, :1]).all() and grid.all() else None


def _within(rows: np.ndarray, first: int, turns: np.ndarray) -> np.ndarray:
    """Which rows are variables of these turns?"""
    return (rows >= first) & (rows < first + len(turns))


def _in_turns(rows: np.ndarray, first: int, turns: np.ndarray) -> np.ndarray:
    """The rows ``[n, turns]`` that these stand for in every turn."""
    inner = _within(rows, first, turns)
    each = turns[np.where(inner, rows - first, 0)]
    return np.where(inner[:, None], each, rows[:, None])


def _along(line: np.ndarray, d: int, rank: int) -> np.ndarray:
    """A line as an array of this rank that varies along one axis."""
    return line.reshape([-1 if k == d else 1 for k in range(rank)])


def _compressed(rows: np.ndarray) -> np.ndarray:
    """Size 1 on every axis along which nothing varies."""
    for d, n in enumerate(rows.shape):
        if n > 1:
            first = rows.take([0], axis=d)
            if (rows == first).all():
                rows = first
    return rows
