"""Classes of units that live and die together, and why some of them never die."""

from collections.abc import Sequence

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from jaxprune.coupling._ledger import Ledger
from jaxprune.coupling._solution import NEVER, pieces


class Classes:
    """A partition of units that only gets coarser.

    Attributes:
        of: int32 ``[units]``, the class of every unit; ties count from `merge` on.
        why: int32 ``[classes]``, the first reason a class is frozen, or `NEVER`.
        changed: has a tie or a freeze said something new? The caller clears it.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.of = _blocks_merged(ledger)
        self.why = np.full(int(self.of.max()) + 1, NEVER)
        self.changed = False
        self._ties = list(ledger.ties)
        self.merge()
        # Reasons are numbered as they are met, so that the least is the first. `.at`,
        # because units of one class repeat an index, and plain indexing would keep
        # the last of them.
        reasons = np.array(list(ledger.reasons), np.int32)
        np.minimum.at(self.why, self.of[reasons], reasons)
        np.minimum.at(self.why, *self._flat(ledger.freezes))

    def fresh(self, n: int) -> np.ndarray:
        """`n` new units, each a class of its own."""
        units = np.arange(len(self.of), len(self.of) + n)
        classes = np.arange(len(self.why), len(self.why) + n, dtype=np.int32)
        self.of = np.concatenate([self.of, classes])
        self.why = np.concatenate([self.why, np.full(n, NEVER)])
        return units

    def tie(self, a: np.ndarray, b: np.ndarray) -> None:
        """These units live and die together, pair by pair."""
        new = self.of[a] != self.of[b]
        if new.any():
            self._ties.append((a[new], b[new]))
            self.changed = True

    def freeze(self, units: np.ndarray, why: np.ndarray | int) -> None:
        """These units never die; those that are frozen keep their reason."""
        new = self.why[self.of[units]] == NEVER
        if new.any():
            reasons = np.broadcast_to(np.asarray(why, np.int32), units.shape)[new]
            np.minimum.at(self.why, self.of[units[new]], reasons)
            self.changed = True

    def merge(self) -> None:
        """Makes one class of all that are tied."""
        if not self._ties:
            return
        pairs = [np.broadcast_arrays(a, b) for a, b in self._ties]
        self._ties.clear()
        # All ties at once, between classes and not units: connected components are
        # linear in the ties, where one union after another would be a loop in Python.
        a, b = (self.of[np.concatenate(side)] for side in zip(*pairs, strict=True))
        size = len(self.why)
        graph = coo_matrix((np.ones(len(a), bool), (a, b)), (size, size))
        count, merged = connected_components(graph, directed=False)
        for units in pieces(self.of):
            units[:] = merged[units]
        # A merged class is frozen if any of its parts is: NEVER is above all reasons.
        before, self.why = self.why, np.full(count, NEVER)
        np.minimum.at(self.why, merged, before)

    def least(self, entries: Sequence[tuple[np.ndarray, int]]) -> np.ndarray:
        """The first reason that any entry (units, why) gives for each class."""
        found = np.full(len(self.why), NEVER)
        np.minimum.at(found, *self._flat(entries))
        return found

    def _flat(
        self, entries: Sequence[tuple[np.ndarray, int]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The class of every unit of the entries, and its reason."""
        units = [units for units, _ in entries]
        whys = np.array([why for _, why in entries], np.int32)
        every = np.concatenate([np.zeros(0, int), *units])
        return self.of[every], np.repeat(whys, list(map(len, units)))


def _blocks_merged(ledger: Ledger) -> np.ndarray:
    """A class for every unit; blocks that are tied throughout share theirs."""
    classes = np.empty(ledger.size, np.int32)
    done = count = 0  # the units up to `done` are in the classes up to `count`
    for start, units in ledger.blocks.items():
        first = ledger.block(units)
        if first != start:
            if done < start:
                n = start - done
                classes[done:start] = np.arange(count, count + n, dtype=np.int32)
                count += n
            done = start + len(units)
            classes[start:done] = classes[first : first + len(units)]
    classes[done:] = np.arange(count, count + ledger.size - done)
    return classes
