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
            result = np.maximum(a, b)
        return _compressed(result)

    def collapse(self, rows: np.ndarray, axes: Sequence[int]) -> np.ndarray:
        """Ties the rows along axes that a value is mixed along; these get size 1."""
        for d in axes:
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

    def source(self, value: Value) -> State:
        """The state of a variable: a row for every run through the slots."""
        state = {}
        for d, axis in enumerate(value.axes):
            for number, slots in self.slots(axis).items():
                fresh = np.arange(self._size, self._size + slots.parts)
                self._size += slots.parts
                line = np.where(slots.slot == NONE, NO_ROW, fresh[slots.part])
                state[d, number] = _compressed(_along(line, d, len(value.shape)))
        return state

    def leave(self, states: Sequence[State]) -> None:
        """The outputs of the whole program keep one array for all rows."""
        for state in states:
            for (d, _), rows in state.items():
                self.collapse(rows, [k for k in range(rows.ndim) if k != d])

    def classes(self) -> np.ndarray:
        """For every row the number of those it is tied to."""
        a = np.concatenate([np.zeros(0, int), *(a for a, _ in self._ties)])
        b = np.concatenate([np.zeros(0, int), *(b for _, b in self._ties)])
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
    start = held & ((before == NONE) | (slot < before))
    part = np.where(held, np.cumsum(start) - 1, NONE)
    counts = np.bincount(part[held] * size + slot[held], minlength=start.sum() * size)
    grid = counts.reshape(-1, size)
    return part if (grid == grid[:, :1]).all() and grid.all() else None


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
