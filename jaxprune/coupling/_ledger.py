"""The ledger: everything the walk over a program finds out about its units.

Six kinds of entries, appended as arrays; the first five are solved once at the end
(`solve`): ties (two units are one), definitions (a unit lives if all of several others
live), freezes (a unit can never be cut, and why), doubts (cutting a unit differs from
masking it, and why), orders (a unit is tied to a place in a table) and completions (a
reduction counts what is at the dead positions of an axis).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxprune.coupling._labels import (
    ALIVE,
    Axis,
    Column,
    Units,
    Zero,
    either,
    flags_on,
    same_units,
    with_flags,
)
from jaxprune.coupling._reasons import text_of
from jaxprune.program._types import Equation


class Cause(NamedTuple):
    """Why something cannot be cut or is not exact, and where.

    Attributes:
        kind: a key of `jaxprune.coupling._reasons.TEXTS`.
        text: what a person reads.
        eqn: the equation that is the cause.
        calls: the equations around it, outermost first: the programs that were being
            walked. Inside a jitted library function only they know the user's line.
    """

    kind: str
    text: str
    eqn: Equation | None = None
    calls: tuple[Equation, ...] = ()


class Ledger:
    """Append-only record of one walk; the only mutable object of the engine."""

    def __init__(self) -> None:
        self.size = 1  # unit ALIVE exists from the start
        self.blocks: dict[int, Units] = {}  # first unit -> all units of one `fresh`
        self._twins: dict[int, int] = {}  # a block -> one tied to it throughout
        self._mates: dict[int, tuple[Units, Units]] = {}  # by id: units, a block tied
        self.ties: list[tuple[Units, Units]] = []
        self.definitions: list[tuple[Units, np.ndarray]] = []
        self.freezes: list[tuple[Units, int]] = []
        self.doubts: list[tuple[Units, int]] = []
        self.ordered: list[Units] = []
        self.completed: list[tuple[Axis, int]] = []
        self.reasons: dict[int, Cause] = {ALIVE: Cause("alive", text_of("alive"))}
        self.calls: list[Equation] = []  # the equations being walked, outermost first
        self._reason_of: dict[tuple[str | int, ...], int] = {}
        self._factors: dict[Any, tuple[Units, list[tuple[Column, ...]]]] = {}

    def copy(self) -> "Ledger":
        """A ledger that goes on from here; units and axes mean the same in both."""
        other = Ledger()
        for name, entries in vars(self).items():
            setattr(other, name, entries if name == "size" else entries.copy())
        return other

    def fresh(self, n: int) -> Units:
        """`n` new units."""
        start = self.size
        self.size += n
        units = np.arange(start, start + n)
        if n:
            self.blocks[start] = units
        return units

    def block(self, units: Units) -> int:
        """The first unit of the block that these units are tied to; -1 if of none.

        Most ties join whole axes. They are kept as pairs of blocks, so that what is
        the same throughout is solved and collected once, whatever its size.
        """
        start = units.item(0) if len(units) else -1
        if self.blocks.get(start) is not units:
            return -1
        twins = self._twins
        while start in twins:
            above = twins[start]
            twins[start] = start = twins.get(above, above)
        return start

    def fresh_axis(self, n: int, *, zero: bool = False) -> Axis:
        """An axis whose positions are units of their own; size 1 is never cut."""
        if n == 1:
            return self.reason("size_one")
        return (Column(self.fresh(n), zero),)

    def reason(self, kind: str, eqn: Equation | None = None, **details: str) -> int:
        """The unit that stands for a reason; doubles as a frozen `Axis`.

        Args:
            kind: a key of `jaxprune.coupling._reasons.TEXTS`.
            eqn: the equation that is the cause, if one is.
            **details: what the text of this kind names.
        """
        where = () if eqn is None else (id(eqn), *map(id, self.calls))
        key = (kind, *details.values(), *where)
        unit = self._reason_of.get(key)
        if unit is None:
            unit = self._reason_of[key] = self.size
            self.size += 1
            calls = () if eqn is None else tuple(self.calls)
            self.reasons[unit] = Cause(kind, text_of(kind, **details), eqn, calls)
        return unit

    def freeze(self, axis: Axis, why: int) -> None:
        """No position of this axis may be cut."""
        if not isinstance(axis, int):
            for column in axis:
                self.freezes.append((column.units, why))

    def doubt(self, units: Units, why: int) -> None:
        """Cutting these units is not the same as masking them."""
        self.doubts.append((units, why))

    def tie(self, a: Axis, b: Axis) -> None:
        """The same positions of `a` and `b` live and die together."""
        if isinstance(a, int):
            self.freeze(b, a)
        elif isinstance(b, int):
            self.freeze(a, b)
        elif len(a) == len(b) == 1:
            self._tie_units(a[0].units, b[0].units)
        elif not same_units(a, b):
            self._equate(a, b)

    def _tie_units(self, a: Units, b: Units) -> None:
        if a is b:
            return
        one, other = self.block(a), self.block(b)
        if (one < 0 and other < 0) or len(a) != len(b):
            self.ties.append((a, b))
        elif one < 0 or other < 0:
            units, block = (a, b) if one < 0 else (b, a)
            first = self._mates.setdefault(id(units), (units, block))[1]
            if first is block:
                self.ties.append((a, b))
            else:  # blocks that are tied to the same units are tied to each other
                self._tie_units(first, block)
        elif one != other:
            # The older block stands for both: chains stay short.
            self._twins[max(one, other)] = min(one, other)

    def _equate(self, a: tuple[Column, ...], b: tuple[Column, ...]) -> None:
        if len(a) > 1 and len(b) > 1:
            # Both composite: name the conjunction and define it twice.
            middle = (Column(self.fresh(len(a[0].units)), False),)
            self._equate(middle, a)
            self._equate(middle, b)
            return
        if len(a) > 1:
            a, b = b, a
        single, several = next(iter(a)), b
        # A position of `single` lives if its units in all columns do: [n, columns].
        matrix = np.stack([column.units for column in several], axis=1)
        self.definitions.append((single.units, matrix))

    def sum_over(
        self,
        axis: Axis,
        kind: str,
        eqn: Equation,
        completes: Callable[[], bool] | None = None,
        **details: str,
    ) -> None:
        """A sum over `axis`: exact where dead positions hold 0, or it is completed."""
        if isinstance(axis, int):
            return
        for units, zero in axis:
            if zero is not True and not np.all(zero):
                if completes is not None and completes():
                    self.completed.append((axis, self.reason("completed", eqn)))
                    return
                bad = units if isinstance(zero, bool) else units[~zero]
                self.doubt(bad, self.reason(kind, eqn, **details))

    def contract(
        self,
        a: Axis,
        b: Axis,
        kind: str,
        eqn: Equation,
        completes: Callable[[], bool] | None = None,
    ) -> None:
        """A sum over products of `a` and `b`: exact if one of them is 0 when dead."""
        self.tie(a, b)
        if isinstance(a, int) or isinstance(b, int):
            return  # nothing dies here
        # 0 * x = 0: the product is 0 at a dead position if either factor is.
        flags = [column.zero for column in a]
        product = list(map(either, flags, flags_on(a, b)))
        self.sum_over(with_flags(a, product), kind, eqn, completes)

    def split(self, axis: Axis, sizes: tuple[int, ...]) -> list[Axis]:
        """Labels of the axes that a reshape makes from one axis (row-major).

        Each column goes to the part it varies along. A column that varies along
        several parts is factored: fresh units for each part, and the old unit lives
        if all of its factors live.
        """
        if isinstance(axis, int):
            return [axis] * len(sizes)
        parts: list[list[Column]] = [[] for _ in sizes]
        for column in axis:
            for part, found in zip(
                parts, self._split_column(column, sizes), strict=True
            ):
                part.extend(found)
        free = self.reason("size_one")
        whole = self.reason("not_split")
        return [
            tuple(part) if part else (free if n == 1 else whole)
            for part, n in zip(parts, sizes, strict=True)
        ]

    def _split_column(
        self, column: Column, sizes: tuple[int, ...]
    ) -> list[tuple[Column, ...]]:
        key = (id(column.units), sizes)
        if key in self._factors and self._factors[key][0] is column.units:
            found = self._factors[key][1]
        else:
            found = self._factor(column.units, sizes)
            self._factors[key] = (column.units, found)
        return [
            tuple([Column(c.units, _split_zero(column.zero, sizes, d)) for c in part])
            for d, part in enumerate(found)
        ]

    def _factor(self, units: Units, sizes: tuple[int, ...]) -> list[tuple[Column, ...]]:
        grid = units.reshape(sizes)
        fresh = len(units) and self.blocks.get(int(units[0])) is units  # all differ
        varying = [
            d
            for d, n in enumerate(sizes)
            if n > 1 and (fresh or (grid != np.take(grid, [0], axis=d)).any())
        ]
        found: list[tuple[Column, ...]] = [() for _ in sizes]
        if not varying:  # one unit throughout: it cannot die without the whole value
            self.freezes.append((units[:1], self.reason("one_unit")))
        elif len(varying) == 1:
            d = varying[0]
            line = grid[tuple(slice(None) if k == d else 0 for k in range(len(sizes)))]
            found[d] = (Column(line, False),)
        else:
            # u[i, j] = all of (a[i], b[j]): the factor of each varying part, broadcast
            # over the grid, is one column of the definition.
            right = np.empty((*sizes, len(varying)), int)
            for k, d in enumerate(varying):
                part = self.fresh(sizes[d])
                found[d] = (Column(part, False),)
                right[..., k] = part.reshape(-1, *(1,) * (len(sizes) - d - 1))
            self.definitions.append((units, right.reshape(len(units), -1)))
        return found


def _split_zero(zero: Zero, sizes: tuple[int, ...], d: int) -> Zero:
    if isinstance(zero, bool):
        return zero
    # A unit of part d dies at all positions with its coordinate: 0 at every one.
    others = tuple(k for k in range(len(sizes)) if k != d)
    return np.asarray(zero.reshape(sizes).all(axis=others))
