"""Solves the ledger: which units are one, which are frozen, which are conjunctions.

Ties are one connected-components call. Definitions (unit = all of several units) are
then compared: two definitions of one class must agree, which ties their factors or
splits them further, until nothing changes. What does not match is frozen.
"""

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from jaxprune.coupling._classes import Classes
from jaxprune.coupling._definitions import Agreement, Record, live_factors
from jaxprune.coupling._ledger import Ledger
from jaxprune.coupling._solution import NEVER, NONE, Solution, pass_on


def solve(ledger: Ledger) -> Solution:
    """Runs the rounds to their fixed point."""
    state = _State(ledger)
    while state.round():
        pass
    return state.solution()


class _Batch(Record):
    """All records of one width, with what they say in a round."""

    whole: np.ndarray  # the classes of left
    factors: np.ndarray  # the classes of right
    live: np.ndarray  # see `live_factors`


class _State:
    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.mismatch = ledger.reason("reshapes")
        self.classes = Classes(ledger)
        self.records = [Record(left, right.T) for left, right in ledger.definitions]
        self.batches: list[_Batch] = []
        self.partly: list[tuple[np.ndarray, np.ndarray]] = []  # units, why

    # -- one round

    def round(self) -> bool:
        self.classes.changed = False
        self.classes.merge()
        self._batch()
        for batch in self.batches:
            self._simplify(batch)
        defined = np.zeros(len(self.classes.why), bool)
        for batch in self.batches:
            defined[batch.whole[batch.rows]] = True
        if np.count_nonzero(defined) < sum(b.rows.sum() for b in self.batches):
            self._compare()
        elif not self.classes.changed:
            self._tie_cycles(defined)
        return self.classes.changed

    def _batch(self) -> None:
        """Joins the records of one width: what is done row by row is done at once."""
        if sum(len(batch.left) for batch in self.batches) == sum(
            len(record.left) for record in self.records
        ):
            return
        self.batches = []
        for width in {len(record.right) for record in self.records}:
            records = [r for r in self.records if len(r.right) == width]
            batch = _Batch(
                np.concatenate([record.left for record in records]),
                np.concatenate([record.right for record in records], axis=1),
            )
            batch.rows[:] = np.concatenate([record.rows for record in records])
            ends = np.cumsum([len(record.left) for record in records])
            for record, rows in zip(records, np.split(batch.rows, ends), strict=False):
                record.rows = rows  # a view: both see what the other changes
            self.batches.append(batch)

    def _simplify(self, batch: _Batch) -> None:
        classes, left, right = self.classes, batch.left, batch.right
        whole = batch.whole = classes.of[left]
        factors = batch.factors = classes.of[right]
        live = batch.live = live_factors(classes, batch)
        frozen = (classes.why[whole] != NEVER) & batch.rows
        inside = factors == whole
        if live.all() and not frozen.any() and not inside.any():
            return  # conjunctions of other classes that can all be cut
        for k, rows in enumerate(frozen & live):  # what never dies: no factor does
            classes.freeze(right[k, rows], classes.why[whole[rows]])
        cyclic = (inside & live).any(axis=0) & ~frozen
        count = live.sum(axis=0)
        open_rows = batch.rows & ~frozen
        # u = u and v holds if v is u; u = v is a tie.
        tied = live & open_rows & (cyclic | (count == 1))
        held = open_rows & (classes.why[factors] != NEVER)
        for k in range(len(right)):
            classes.tie(left[tied[k]], right[k, tied[k]])
            self.partly.append((left[held[k]], classes.why[factors[k, held[k]]]))
        empty = open_rows & (count == 0)
        classes.freeze(left[empty], classes.why[factors[0, empty]])
        batch.rows &= ~(frozen | cyclic | (count <= 1))

    def _compare(self) -> None:
        """Makes all definitions of one class agree."""
        rows = [np.flatnonzero(record.rows) for record in self.records]
        left = [r.left[at] for r, at in zip(self.records, rows, strict=True)]
        whole = self.classes.of[np.concatenate(left)]
        order = np.argsort(whole, kind="stable")
        which = np.repeat(np.arange(len(rows)), list(map(len, rows)))[order]
        owner, whole = np.concatenate(rows)[order], whole[order]
        # Sorted by class, the definitions of one class are a run: every row of it is
        # made to agree with the first. `head` marks the first, `first` finds it for
        # every row.
        head = np.r_[True, whole[1:] != whole[:-1]]
        first = np.flatnonzero(head)[np.cumsum(head) - 1]  # the row to agree with
        others = np.flatnonzero(~head)
        # Rows of the same two records agree together: one number for each such pair.
        pair = which[first[others]] * len(rows) + which[others]
        order = np.argsort(pair, kind="stable")
        ends = np.flatnonzero(np.diff(pair[order])) + 1
        agreement = Agreement(self.classes, self.mismatch)
        for bt in np.split(others[order], ends):
            at = first[bt]
            a, b = self.records[which[at[0]]], self.records[which[bt[0]]]
            agreement.agree(a, owner[at], b, owner[bt])
        self.records += agreement.found

    def _tie_cycles(self, defined: np.ndarray) -> None:
        """Classes that are defined by each other are one: each lives if the other does.

        So the definitions that are left at the end can be computed one after another.
        """
        for batch in self.batches:
            batch.live &= batch.rows
        if not any(
            (batch.live & defined[batch.factors]).any() for batch in self.batches
        ):
            return
        found = [(batch, *np.nonzero(batch.live)) for batch in self.batches]
        left = np.concatenate([batch.left[row] for batch, _, row in found])
        right = np.concatenate([batch.right[k, row] for batch, k, row in found])
        whole, factor = self.classes.of[left], self.classes.of[right]
        size = len(defined)
        # An arrow from a class to each of its factors. Classes on a cycle are those of
        # one strongly connected component.
        graph = coo_matrix((np.ones(len(whole), bool), (whole, factor)), (size, size))
        _, part = connected_components(graph, directed=True, connection="strong")
        same = part[whole] == part[factor]
        self.classes.tie(left[same], right[same])

    # -- the result

    def solution(self) -> Solution:
        of, why = self.classes.of, self.classes.why
        width = max((len(batch.right) for batch in self.batches), default=1)
        factors = np.full((width, len(why)), NONE, np.int32)
        for batch in self.batches:
            # Nothing has changed since the last round.
            rows = np.flatnonzero(batch.rows)
            right, live = batch.factors[:, rows], batch.live[:, rows]
            if not live.all():
                # Living factors first: `factors[:, 0]` then says whether a class is
                # defined.
                first = np.argsort(~live, axis=0, kind="stable")
                right = np.take_along_axis(np.where(live, right, NONE), first, 0)
            factors[: len(right), batch.whole[rows]] = right
        doubt = self.classes.least(self.ledger.doubts)
        partly = np.full(len(why), NEVER)
        for units, reasons in self.partly:
            np.minimum.at(partly, of[units], reasons)
        ordered = np.zeros(len(why), bool)
        if self.ledger.ordered:
            ordered[of[np.concatenate(self.ledger.ordered)]] = True
        pass_on(factors.T, doubt, ordered)
        return Solution(of, why, doubt, factors.T, partly, ordered)
