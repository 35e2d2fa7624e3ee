"""Marks: what merging equal units makes of a value.

Two units that are equal can be merged: one goes, and whoever reads the other reads the
one that stays twice. On the parameters this means that a *producer* keeps one of the
equal slices and a *consumer* keeps their sum. Every value of a walked program is
marked, for every group on each of its axes, as

* equal: the same at all units that are merged, so that one of them stands for all, or
* summed: what stands at a unit that stays is the sum over those merged into it.

Both survive some equations and not others. A product summed over the axis needs one
operand of each kind, ``sum_u a_u b_u = a_k sum_u b_u``; a sum needs its operand summed;
addition needs the same on both sides; a product is summed if exactly one factor is;
anything else (relu, exp, division by it) is right for equal operands alone. A maximum
over equal units is one of them. What sums equal units, such as a mean, counts them, and
its group cannot be merged.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from jaxprune.coupling._labels import Axis, Column, Value
from jaxprune.coupling._ledger import Ledger
from jaxprune.coupling._solution import Solution
from jaxprune.program._types import Equation

Place: TypeAlias = tuple[int, int, int]  # number of an input, axis, group
Sources: TypeAlias = Sequence[tuple[int, int]]  # (operand, axis)


class Mark(NamedTuple):
    """One group on one axis of a value.

    Attributes:
        summed: see above; else equal.
        flips: the parameter axes that would have to be summed to make this summed;
            empty if nothing can.
        reads: it weighs, with parameters alone, what an input feeds.
    """

    summed: bool = False
    flips: frozenset[Place] = frozenset()
    reads: bool = False


EQUAL = Mark()


class State(NamedTuple):
    """The marks of a value.

    Attributes:
        axes: for every axis group -> mark.
        fed: does it depend on an input that is no variable?
        zero: is it the constant 0?
    """

    axes: tuple[Mapping[int, Mark], ...]
    fed: bool = False
    zero: bool = False


class Places:
    """Where the units of the groups stand on an axis.

    Equal means equal position by position: the k-th position of one unit holds what the
    k-th of another does. Labels alone do not say so, hence the grids.
    """

    def __init__(
        self, ledger: Ledger, solution: Solution, units: Sequence[np.ndarray]
    ) -> None:
        self._ledger, self._solution = ledger, solution
        self._group = np.full(len(solution.why), -1)
        self._unit = np.zeros(len(solution.why), int)
        for k, classes in enumerate(units):
            self._group[classes] = k
            self._unit[classes] = np.arange(len(classes))
        self._sizes = [len(classes) for classes in units]
        self._seen: dict[Any, tuple[Axis, dict[int, np.ndarray | None]]] = {}

    def on(self, axis: Axis) -> Mapping[int, np.ndarray | None]:
        """Group -> positions ``[size, repeats]``; None if they are no such grid."""
        if isinstance(axis, int):
            return {}
        block = self._ledger.block(axis[0].units) if len(axis) == 1 else -1
        key = ("block", block) if block >= 0 else id(axis)
        if key not in self._seen:
            self._seen[key] = (axis, self._find(axis))
        return self._seen[key][1]

    def _find(self, axis: tuple[Column, ...]) -> dict[int, np.ndarray | None]:
        found: dict[int, np.ndarray | None] = {}
        for column in axis:
            for atoms in self._solution.atoms(column.units):
                where = np.flatnonzero(atoms >= 0)
                group = self._group[atoms[where]]
                for k in np.unique(group[group >= 0]).tolist():
                    rows = where[group == k]
                    grid = self._grid(k, self._unit[atoms[rows]], rows)
                    twice = k in found and not _same(found[k], grid)
                    found[k] = None if twice else grid
        return found

    def _grid(self, k: int, unit: np.ndarray, rows: np.ndarray) -> np.ndarray | None:
        counts = np.bincount(unit, minlength=self._sizes[k])
        if (counts != counts[0]).any():
            return None
        return rows[np.argsort(unit, kind="stable")].reshape(len(counts), -1)


def _same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is not None and b is not None and np.array_equal(a, b)


class Marking:
    """The marks of one pass, and what speaks against them.

    Attributes:
        places: where units are.
        proposed: parameter axes that some sum would have to have summed.
        refused: group -> why it cannot be merged, as a unit of the ledger.
    """

    def __init__(self, ledger: Ledger, places: Places, *, proposing: bool) -> None:
        self.places = places
        self.proposed: set[Place] = set()
        self.refused: dict[int, int] = {}
        self.eqn: Equation | None = None
        self._ledger, self._proposing = ledger, proposing

    def refuse(self, group: int, kind: str, **details: str) -> None:
        """This group cannot be merged."""
        if not self._proposing and group not in self.refused:
            self.refused[group] = self._ledger.reason(kind, self.eqn, **details)

    def constant(self, value: Value) -> State:
        """Data. Where it varies along an axis, the units there are ordered."""
        axes = tuple(dict.fromkeys(self.places.on(a), EQUAL) for a in value.axes)
        return State(axes, False, value.is_zero)

    # -- what is summed over

    def contract(self, a: State, i: int, b: State, j: int) -> None:
        """A sum of products over axis `i` of one value and axis `j` of another."""
        for g in {**a.axes[i], **b.axes[j]}:
            x, y = a.axes[i].get(g), b.axes[j].get(g)
            if x is None or y is None:
                self.refuse(g, "one_operand")
            elif x.summed and y.summed:
                self.refuse(g, "consumers_contracted")
            elif not x.summed and not y.summed:
                # What comes from parameters alone reads; what an input feeds is read.
                second, first = (x, y) if a.fed or not b.fed else (y, x)
                self._propose(g, first.flips or second.flips)

    def add_up(self, state: State, d: int) -> None:
        """A sum over axis `d`."""
        for g, mark in state.axes[d].items():
            if not mark.summed:
                self._propose(g, mark.flips if mark.reads else frozenset())

    def collapse(self, state: State, d: int, *, idempotent: bool) -> None:
        """Another reduction over axis `d`; `idempotent`: f(x, x) = x."""
        for g, mark in state.axes[d].items():
            if mark.summed or not idempotent:
                self.refuse(g, "reduction_counts")

    def _propose(self, group: int, flips: frozenset[Place]) -> None:
        self.proposed |= flips
        self.refuse(group, "sum_counts")

    # -- marks of results

    def result(
        self,
        out: Value,
        operands: Sequence[State],
        sources: Sequence[Sources],
        kind: str,
    ) -> State:
        """The marks of a result, from the operand axes that run along each axis."""
        axes = []
        for axis, along in zip(out.axes, sources, strict=True):
            marks = {}
            for g, grid in self.places.on(axis).items():
                if grid is None:
                    self.refuse(g, "uneven")
                found = [(n, operands[n].axes[d].get(g)) for n, d in along]
                there = {n: mark for n, mark in found if mark is not None}
                # A group that is on no operand is on a broadcast axis: of copies.
                marks[g] = self._combine(g, there, operands, kind) if there else EQUAL
            axes.append(marks)
        return State(tuple(axes), any(s.fed for s in operands), out.is_zero)

    def _combine(
        self, group: int, there: dict[int, Mark], operands: Sequence[State], kind: str
    ) -> Mark:
        summed = [n for n, mark in there.items() if mark.summed]
        if kind == "add":
            return self._sum(group, there, operands)
        if kind == "multiply":
            if len(summed) > 1:
                self.refuse(group, "consumers_multiplied")
            can = [(not operands[n].fed, n) for n, mark in there.items() if mark.flips]
            if not can:
                return Mark(bool(summed))
            alone, n = max(can)
            reads = alone and any(operands[k].fed for k in there)
            return Mark(bool(summed), there[n].flips, reads or there[n].reads)
        if kind == "divide" and 0 in there and summed in ([], [0]):
            return there[0]
        if summed:
            self.refuse(group, "nonlinear")
        return EQUAL

    def _sum(
        self, group: int, there: dict[int, Mark], operands: Sequence[State]
    ) -> Mark:
        """All operands alike, and none without the group; a 0 is alike to all."""
        marks = [mark for n, mark in there.items() if not operands[n].zero]
        alone = all(n in there or state.zero for n, state in enumerate(operands))
        if not marks:
            return EQUAL
        if any(m.summed for m in marks) and not (
            alone and all(m.summed for m in marks)
        ):
            self.refuse(group, "consumer_added")
        flips = frozenset[Place]()
        if alone and all(mark.flips for mark in marks):
            flips = flips.union(*(mark.flips for mark in marks))
        return Mark(marks[0].summed, flips, all(mark.reads for mark in marks))

    def joined(self, a: State, b: State) -> State:
        """The marks of what may be either of two values."""
        axes = []
        for x, y in zip(a.axes, b.axes, strict=True):
            there = {
                g: {k: m[g] for k, m in enumerate((x, y)) if g in m} for g in {**x, **y}
            }
            axes.append({g: self._sum(g, marks, (a, b)) for g, marks in there.items()})
        return State(tuple(axes), a.fed or b.fed, a.zero and b.zero)

    # -- positions

    def picked(self, axis: Axis, positions: np.ndarray) -> None:
        """A result holds these positions of an axis: the same of every unit?

        Args:
            axis: of the operand.
            positions: int, in the order of the result; -1 where it holds others.
        """
        for g, grid in self.places.on(axis).items():
            if grid is None or grid.shape[1] == 1:
                continue
            size, repeats = grid.shape
            # For every position of the axis: the unit that it belongs to, and its rank
            # among the positions of that unit; -1 where the group is not.
            unit = np.full(grid.max() + 1, -1)
            rank = np.zeros_like(unit)
            unit[grid] = np.arange(size)[:, None]
            rank[grid] = np.arange(repeats)
            held = positions[(positions >= 0) & (positions < len(unit))]
            held = held[unit[held] >= 0]
            # Equal units stay equal if the result holds the same ranks of each, in one
            # order.
            ranks = rank[held[np.argsort(unit[held], kind="stable")]]
            even = np.bincount(unit[held], minlength=size)
            if (even != even[0]).any() or np.ptp(ranks.reshape(size, -1), axis=0).any():
                self.refuse(g, "part_taken")

    def shuffled(self, *axes: Axis) -> None:
        """The positions of an axis change their order."""
        for axis in axes:
            for g, grid in self.places.on(axis).items():
                if grid is None or grid.shape[1] > 1:
                    self.refuse(g, "rearranged")
