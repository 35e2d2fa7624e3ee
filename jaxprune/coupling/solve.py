"""Solves the ledger: which units are one, which are frozen, which are conjunctions.

Ties are one connected-components call. Definitions (unit = all of several units) are
then compared: two definitions of one class must agree, which ties their factors or
splits them further, until nothing changes. What does not match is frozen.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from jaxprune.coupling.ledger import Ledger
from jaxprune.coupling.solution import NEVER, NONE, Solution, pass_on

Reasons: TypeAlias = Sequence[tuple[np.ndarray, np.ndarray | int]]  # units, why


def solve(ledger: Ledger) -> Solution:
    """Runs the rounds to their fixed point."""
    state = _State(ledger)
    while state.round():
        pass
    return state.solution()


@dataclasses.dataclass
class _Record:
    """Rows of definitions written down together: class(left) = all of class(right)."""

    left: np.ndarray  # units [n]
    right: np.ndarray  # units [n, width]
    rows: np.ndarray = dataclasses.field(init=False)  # which rows still count
    live: np.ndarray = dataclasses.field(init=False)  # see `_State._live`

    def __post_init__(self) -> None:
        self.rows = np.ones(len(self.left), bool)


def _blocks_merged(ledger: Ledger) -> np.ndarray:
    """A class for every unit; blocks that are tied throughout share theirs."""
    used = np.ones(ledger.size, bool)
    twins = {}
    for start, units in ledger.blocks.items():
        first = ledger.block(units)
        if first != start:
            twins[start] = first, len(units)
            used[start : start + len(units)] = False
    classes = np.cumsum(used, dtype=np.int32) - 1
    for start, (first, n) in twins.items():
        classes[start : start + n] = classes[first : first + n]
    return classes


class _State:
    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.mismatch = ledger.reason("two reshapes split it in ways that do not match")
        self.size = ledger.size
        self.ties = list(ledger.ties)
        self.freezes: list[tuple[np.ndarray, np.ndarray | int]] = list(ledger.freezes)
        self.frozen_units = np.array(sorted(ledger.reasons))
        self.records = [_Record(left, right) for left, right in ledger.definitions]
        self.batches: list[_Record] = []
        self.partly: list[tuple[np.ndarray, np.ndarray]] = []
        self.classes = _blocks_merged(ledger)
        self.changed = False

    # -- bookkeeping

    def fresh(self, n: int) -> np.ndarray:
        self.size += n
        return np.arange(self.size - n, self.size)

    def tie(self, a: np.ndarray, b: np.ndarray) -> None:
        """Ties units whose classes differ; `changed` only if something is new."""
        new = self.classes[a] != self.classes[b]
        if new.any():
            self.ties.append((a[new], b[new]))
            self.changed = True

    def freeze(self, units: np.ndarray, why: np.ndarray | int) -> None:
        new = self.why[self.classes[units]] == NEVER
        if new.any():
            reasons = np.broadcast_to(why, units.shape)[new]
            np.minimum.at(self.why, self.classes[units[new]], reasons)
            self.freezes.append((units[new], reasons))
            self.changed = True

    # -- one round

    def round(self) -> bool:
        self.changed = False
        self._classify()
        self._batch()
        for batch in self.batches:
            self._simplify(batch)
        if self.records:
            self._compare()
        if self.records and not self.changed:
            self._tie_cycles()
        return self.changed

    def _classify(self) -> None:
        """Merges the classes joined by the ties written since the last round."""
        start = self.classes.max() + 1
        new = np.arange(start, start + self.size - len(self.classes), dtype=np.int32)
        before = np.concatenate([self.classes, new])
        ones = [np.broadcast_arrays(a, b) for a, b in self.ties]
        self.ties.clear()
        a = before[np.concatenate([x for x, _ in ones] or [np.zeros(0, int)])]
        b = before[np.concatenate([y for _, y in ones] or [np.zeros(0, int)])]
        count = int(before.max()) + 1
        self.classes = before
        if len(a):
            graph = coo_matrix((np.ones(len(a), bool), (a, b)), (count, count))
            count, merged = connected_components(graph, directed=False)
            self.classes = merged[before]
        reasons = (self.frozen_units, self.frozen_units)
        self.why = self._least([reasons, *self.freezes], count)

    def _least(self, entries: Reasons, count: int) -> np.ndarray:
        """The first reason that any entry gives for each class, or `NEVER`."""
        units = [np.zeros(0, int), *(units for units, _ in entries)]
        whys = [np.zeros(0, int), *(np.full(len(u), why) for u, why in entries)]
        found = np.full(count, NEVER)
        np.minimum.at(found, self.classes[np.concatenate(units)], np.concatenate(whys))
        return found

    def _batch(self) -> None:
        """Joins the records of one width: what is done row by row is done at once."""
        if sum(len(batch.left) for batch in self.batches) == sum(
            len(record.left) for record in self.records
        ):
            return
        self.batches = []
        for width in {record.right.shape[1] for record in self.records}:
            records = [r for r in self.records if r.right.shape[1] == width]
            batch = _Record(
                np.concatenate([record.left for record in records]),
                np.concatenate([record.right for record in records]),
            )
            batch.rows[:] = np.concatenate([record.rows for record in records])
            ends = np.cumsum([len(record.left) for record in records])
            for record, rows in zip(records, np.split(batch.rows, ends), strict=False):
                record.rows = rows  # a view: both see what the other changes
            self.batches.append(batch)

    def _live(self, record: _Record) -> np.ndarray:
        """Which factors of each row can still be cut (no repeats, nothing frozen)."""
        right = self.classes[record.right]
        live = (self.why[right] == NEVER) & record.rows[:, None]
        for k, j in itertools.combinations(range(right.shape[1]), 2):
            live[:, j] &= ~((right[:, k] == right[:, j]) & live[:, k])
        return live

    def _simplify(self, record: _Record) -> None:
        left, right = record.left, record.right
        frozen = (self.why[self.classes[left]] != NEVER) & record.rows
        live = record.live = self._live(record)
        for k in range(right.shape[1]):  # a conjunction that never dies: no factor does
            rows = frozen & live[:, k]
            self.freeze(right[rows, k], self.why[self.classes[left[rows]]])
        inside = self.classes[right] == self.classes[left][:, None]
        cyclic = (inside & live).any(axis=1) & ~frozen
        count = live.sum(axis=1)
        for k in range(right.shape[1]):
            # u = u and v holds if v is u; u = v is a tie.
            rows = live[:, k] & (cyclic | (count == 1)) & ~frozen
            self.tie(left[rows], right[rows, k])
            held = (
                record.rows & ~frozen & (self.why[self.classes[right[:, k]]] != NEVER)
            )
            self.partly.append((left[held], self.why[self.classes[right[held, k]]]))
        empty = (count == 0) & record.rows & ~frozen
        first = self.why[self.classes[right[:, 0]]]
        self.freeze(left[empty], first[empty])
        record.rows &= ~(frozen | cyclic | (count <= 1))

    def _compare(self) -> None:
        """Makes all definitions of one class agree."""
        owner = np.concatenate([np.flatnonzero(r.rows) for r in self.records])
        which = np.concatenate(
            [np.full(r.rows.sum(), k) for k, r in enumerate(self.records)]
        )
        if not len(owner):
            return
        left = self.classes[np.concatenate([r.left[r.rows] for r in self.records])]
        if np.bincount(left).max() == 1:
            return
        order = np.lexsort((owner, which, left))
        left, which, owner = left[order], which[order], owner[order]
        head = np.r_[True, left[1:] != left[:-1]]
        first = np.flatnonzero(head)[np.cumsum(head) - 1]  # the row to agree with
        others = np.flatnonzero(~head)
        pairs = np.stack([which[first[others]], which[others]], axis=1)
        for a, b in np.unique(pairs, axis=0):
            rows = others[(pairs == (a, b)).all(axis=1)]
            self._agree(
                self.records[a], owner[first[rows]], self.records[b], owner[rows]
            )

    def _agree(self, a: _Record, at: np.ndarray, b: _Record, bt: np.ndarray) -> None:
        """Rows `at` of `a` and `bt` of `b` define the same classes."""
        columns_a = self._columns(a, at)
        columns_b = self._columns(b, bt)
        self.changed = True
        b.rows[bt] = False
        for order in itertools.permutations(range(len(columns_b))):
            if len(columns_a) == len(columns_b) and all(
                self._one_to_one(x, columns_b[k])
                for x, k in zip(columns_a, order, strict=True)
            ):
                for x, k in zip(columns_a, order, strict=True):
                    self._tie_columns(x, columns_b[k])
                return
        if a is b:  # rows of one grid: tying column by column is always enough
            frozen = self.why[self.classes[a.right]] != NEVER
            every = np.where(frozen, 0, a.right)
            for x, y in zip(every[at].T, every[bt].T, strict=True):
                self._tie_columns(x, y)
            return
        self._refine(columns_a, columns_b)

    def _columns(self, record: _Record, rows: np.ndarray) -> list[np.ndarray]:
        """Factor columns (units); frozen entries are replaced by the frozen unit 0."""
        live = self._live(record)[rows]
        units = np.where(live, record.right[rows], 0)
        return [units[:, k] for k in range(units.shape[1]) if live[:, k].any()]

    def _one_to_one(self, x: np.ndarray, y: np.ndarray) -> bool:
        a, b = self.classes[x], self.classes[y]
        pairs = len(np.unique(a * (self.classes.max() + 1) + b))
        return pairs == len(np.unique(a)) == len(np.unique(b))

    def _tie_columns(self, x: np.ndarray, y: np.ndarray) -> None:
        dead_x, dead_y = x == 0, y == 0
        self.freeze(x[~dead_x & dead_y], self.mismatch)
        self.freeze(y[~dead_y & dead_x], self.mismatch)
        rows = ~dead_x & ~dead_y
        self.tie(x[rows], y[rows])

    def _refine(self, columns_a: list, columns_b: list) -> None:
        """Two factorings of the same positions: split both into common factors.

        The finest partition coarser than column x and column y (the components of
        the graph that joins x[p] and y[p] for every position p) is a factor of both.
        Writing every column as the conjunction of its common factors makes the two
        conjunctions equal, whatever the factorings are.
        """
        common = [[self._join(x, y) for y in columns_b] for x in columns_a]
        for k, x in enumerate(columns_a):
            self._define(x, [row for row in common[k] if row is not None])
        for k, y in enumerate(columns_b):
            column = [common[j][k] for j in range(len(columns_a))]
            self._define(y, [row for row in column if row is not None])

    def _join(self, x: np.ndarray, y: np.ndarray) -> np.ndarray | None:
        """Fresh units for the common factor of two columns, or None if trivial."""
        _, a = np.unique(self.classes[x], return_inverse=True)
        _, b = np.unique(self.classes[y], return_inverse=True)
        n = int(a.max()) + 1
        size = n + int(b.max()) + 1
        graph = coo_matrix((np.ones(len(a), bool), (a, n + b)), (size, size))
        count, parts = connected_components(graph, directed=False)
        if count == 1:
            return None
        return self.fresh(count)[parts[a]]

    def _define(self, column: np.ndarray, factors: list[np.ndarray]) -> None:
        """Each class of `column` := all of its entries in `factors`."""
        for factor in factors:  # what never dies has no factor that does
            self.freezes.append((factor[column == 0], self.mismatch))
        _, rows = np.unique(self.classes[column], return_index=True)
        rows = rows[column[rows] != 0]
        if not factors:
            self.freeze(column[rows], self.mismatch)
        elif len(factors) == 1:
            self.ties.append((column[rows], factors[0][rows]))
        else:
            right = np.stack([factor[rows] for factor in factors], axis=1)
            self.records.append(_Record(column[rows], right))

    def _tie_cycles(self) -> None:
        """Classes that are defined by each other are one: each lives if the other does.

        So the definitions that are left at the end can be computed one after another.
        """
        for batch in self.batches:
            batch.live &= batch.rows[:, None]
        found = [np.nonzero(batch.live) for batch in self.batches]
        left = [b.left[row] for b, (row, _) in zip(self.batches, found, strict=True)]
        right = [b.right[at] for b, at in zip(self.batches, found, strict=True)]
        units = np.concatenate(left), np.concatenate(right)
        whole, factor = (self.classes[u] for u in units)
        if not np.isin(factor, whole).any():
            return
        count = len(self.why)
        graph = coo_matrix((np.ones(len(whole), bool), (whole, factor)), (count, count))
        _, part = connected_components(graph, directed=True, connection="strong")
        same = part[whole] == part[factor]
        self.tie(units[0][same], units[1][same])

    # -- the result

    def solution(self) -> Solution:
        count = len(self.why)
        width = max([batch.right.shape[1] for batch in self.batches], default=1)
        factors = np.full((count, width), NONE, np.int32, order="F")
        for batch in self.batches:
            rows = np.flatnonzero(batch.rows)
            live = batch.live[rows]  # nothing has changed since the last round
            right = np.where(live, self.classes[batch.right[rows]], NONE)
            if not live.all():
                first = np.argsort(~live, axis=1, kind="stable")
                right = np.take_along_axis(right, first, 1)
            left = self.classes[batch.left[rows]]
            for k, column in enumerate(right.T):
                factors[left, k] = column
        doubt = self._least(self.ledger.doubts, count)
        partly = self._least(self.partly, count)
        ordered = np.zeros(count, bool)
        if self.ledger.ordered:
            ordered[self.classes[np.concatenate(self.ledger.ordered)]] = True
        pass_on(factors, doubt, ordered)
        return Solution(self.classes, self.why, doubt, factors, partly, ordered)
