"""Axis lengths as polynomials of group sizes.

A position of an axis lives if all of its units do. Of the positions that need k given
units of a group of n, the share that is left when m units stay is C(m, k) / C(n, k),
whichever units they are, if every k units hold equally many positions. Then the length
of an axis is a sum of products of such binomials: a constant for positions that cannot
go, linear for channels, a product for heads x dimensions, quadratic for a Gram matrix.
"""

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from functools import reduce
from typing import Any, TypeAlias

import numpy as np

from jaxprune.core._groups import Groups
from jaxprune.core._members import on_axis
from jaxprune.coupling._labels import ALIVE, Axis, Column, Value
from jaxprune.coupling._ledger import Ledger
from jaxprune.coupling._solution import NEVER, Solution

# (number of a group, power); of ~group it is 1 if any unit of the group is cut, else 0.
Monomial: TypeAlias = tuple[tuple[int, int], ...]
Number: TypeAlias = int | Fraction
Sum: TypeAlias = Mapping[Monomial, Number]

ONE: Sum = {(): 1}


def constant(n: int) -> Sum:
    """A number."""
    return {(): n} if n else {}


def plus(*sums: Sum) -> Sum:
    """The sum."""
    total: dict[Monomial, Number] = {}
    for monomial, coefficient in itertools.chain(*(s.items() for s in sums)):
        total[monomial] = total.get(monomial, 0) + coefficient
    return {monomial: c for monomial, c in total.items() if c}


def times(*sums: Sum) -> Sum:
    """The product."""
    total = ONE
    for other in sums:
        found: dict[Monomial, Number] = {}
        for a, x in total.items():
            for b, y in other.items():
                monomial = _joined(a, b)
                found[monomial] = found.get(monomial, 0) + x * y
        total = found
    return total


def _joined(a: Monomial, b: Monomial) -> Monomial:
    if not a or not b:
        return a or b
    powers = dict(a)
    for group, power in b:
        powers[group] = powers.get(group, 0) + power if group >= 0 else 1
    return tuple(sorted(powers.items()))


def either(a: Sum, b: Sum) -> Sum:
    """1 where one of two conditions holds, which are 0 or 1."""
    return plus(a, b, negative(times(a, b)))


def negative(total: Sum) -> Sum:
    """The sum times -1."""
    return {monomial: -c for monomial, c in total.items()}


def full_value(total: Sum, sizes: Sequence[int]) -> Number:
    """The value at the full sizes of all groups."""
    return sum(
        c * math.prod(sizes[g] ** power if g >= 0 else 0 for g, power in monomial)
        for monomial, c in total.items()
    )


def choose(group: int, k: int) -> Sum:
    """The binomial ``C(size of the group, k)``."""
    if k == 1:
        return {((group, 1),): 1}
    each = (
        {((group, 1),): Fraction(1, j + 1), (): Fraction(-j, j + 1)} for j in range(k)
    )
    return plus(times(*each))


class Units:
    """The units of the groups in a ledger, and the parameter axes they label."""

    def __init__(self, groups: Groups, ledger: Ledger) -> None:
        self.groups = groups
        self.ledger = ledger
        # Blocks that lose as many units each are as long as if they lost the same.
        self.units = [ledger.fresh(g.size // g.blocks) for g in groups.values()]
        self.derived: list[tuple[str, Any, list[tuple[np.ndarray, np.ndarray]]]] = []
        self._whole = {int(units[0]): units for units in self.units if len(units)}
        self._members: dict[tuple[str, int], list[tuple[np.ndarray, np.ndarray]]] = {}
        for own, group in zip(self.units, groups.values(), strict=True):
            for member in group.members:
                place = self._members.setdefault((member.path, member.axis), [])
                index = on_axis(member, groups.shapes[member.path])
                blocks = index.reshape(group.blocks, len(own), -1)
                each = [np.unique(blocks[:, k]) for k in range(len(own))]
                place.append((own, np.stack(each)))

    def label(self, path: str, shape: tuple[int, ...]) -> Value:
        """The labels of a parameter."""
        return Value(shape, tuple(self._axis(path, d, n) for d, n in enumerate(shape)))

    def _axis(self, path: str, d: int, n: int) -> Axis:
        columns: list[np.ndarray] = []
        for own, index in self._members.get((path, d), []):
            if len(np.unique(index)) < index.size:
                # A position that needs two units of one group, as in a Gram matrix:
                # which of them labels its row, the program says.
                axis = self.ledger.fresh_axis(n, zero=True)
                self.derived.append((path, axis, self._members[path, d]))
                return axis
            # Groups on different positions share a column.
            free = [column for column in columns if not column[index].any()]
            if not free:
                free = [np.full(n, ALIVE)]
                columns += free
            free[0][index] = own[:, None]
        return tuple(Column(self._same(c), True) for c in columns) or ALIVE

    def _same(self, column: np.ndarray) -> np.ndarray:
        """The very array of a group's units, if equal: ties of these are cheap."""
        own = self._whole.get(int(column[0]))
        return own if own is not None and np.array_equal(own, column) else column


class Lengths:
    """The length of every axis of a walked program.

    Attributes:
        uneven: numbers of the groups whose units hold unequal shares of some axis.
    """

    def __init__(self, units: Units, solution: Solution) -> None:
        self._solution = solution
        self._sizes = [len(own) for own in units.units]
        self._owner = np.full(len(solution.why), -1)
        self._seen: dict[tuple[int, ...], tuple[Axis, Sum]] = {}
        self.uneven: set[int] = set()
        for number, own in enumerate(units.units):
            classes = solution.classes[own]
            clash = (self._owner[classes] >= 0) | (solution.why[classes] != NEVER)
            if clash.any() or len(np.unique(classes)) < len(classes):
                raise ValueError(
                    f"the program couples units of {list(units.groups)[number]} that "
                    "the groups hold apart, or pins them; were the groups traced from "
                    "this function with these arguments?"
                )
            self._owner[classes] = number
        for path, axis, members in units.derived:
            atoms = solution.atoms(axis[0].units)
            for own, index in members:
                wanted = solution.classes[own][:, None]
                if not np.any([column[index] == wanted for column in atoms], 0).all():
                    raise ValueError(
                        f"the program does not say which units label the rows of {path}"
                        "; were the groups traced from this function?"
                    )

    def of(self, axis: Axis, n: int) -> Sum:
        """The length of an axis of full size `n`."""
        if isinstance(axis, int):
            return constant(n)
        key = tuple(id(column.units) for column in axis)
        if key not in self._seen:
            self._seen[key] = axis, self._count(axis, n)
        return self._seen[key][1]

    def size(self, value: Value, dead: Collection[int] = ()) -> Sum:
        """How many entries a value has: one along the dimensions `dead`."""
        dims = enumerate(zip(value.axes, value.shape, strict=True))
        return times(*(self.of(axis, n) for d, (axis, n) in dims if d not in dead))

    def dies(self, value: Value, d: int) -> bool:
        """Can any position of an axis be cut?"""
        return any(self.of(value.axes[d], value.shape[d]))

    def groups(self, value: Value, d: int) -> set[int]:
        """The groups that cut an axis."""
        length = self.of(value.axes[d], value.shape[d])
        return {g for monomial in length for g, _ in monomial}

    def is_cut(self, value: Value, d: int, besides: Collection[int] = ()) -> Sum:
        """1 if any position of an axis is cut, by no group of `besides`, else 0."""
        groups = sorted(self.groups(value, d).difference(besides))
        return reduce(either, ({((~g, 1),): 1} for g in groups), {})

    def _count(self, axis: tuple[Column, ...], n: int) -> Sum:
        atoms = [column for part in axis for column in self._solution.atoms(part.units)]
        owned = [
            np.where((column >= 0) & (self._owner[column] >= 0), column, -1)
            for column in atoms
        ]
        # Rows of classes, sorted, each once: -1 stands first, for nothing.
        rows = np.sort(np.stack([np.full(n, -1), *owned], axis=1), axis=1)
        rows[:, 1:][rows[:, 1:] == rows[:, :-1]] = -1
        groups = np.where(rows >= 0, self._owner[rows], -1)
        kinds, which = np.unique(np.sort(groups, axis=1), axis=0, return_inverse=True)
        which = which.ravel()
        return plus(
            *(
                self._binomials(kind[kind >= 0], rows[which == k])
                for k, kind in enumerate(kinds)
            )
        )

    def _binomials(self, kind: np.ndarray, rows: np.ndarray) -> Sum:
        """The positions that need units of these groups, one entry for each unit."""
        if not len(kind):
            return constant(len(rows))
        each = {int(g): int((kind == g).sum()) for g in np.unique(kind)}
        total = math.prod(math.comb(self._sizes[g], k) for g, k in each.items())
        _, counts = np.unique(np.sort(rows, axis=1), axis=0, return_counts=True)
        if len(counts) != total or len(np.unique(counts)) != 1:
            self.uneven |= set(each)
        share = constant(len(rows) // total)
        if len(rows) % total:
            share = {(): Fraction(len(rows), total)}
        return times(share, *(choose(g, k) for g, k in each.items()))
