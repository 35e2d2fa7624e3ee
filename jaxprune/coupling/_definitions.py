"""Definitions: a class lives if all of several others do; how two of them agree."""

import dataclasses
import itertools

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from jaxprune.coupling._classes import Classes
from jaxprune.coupling._solution import NEVER


@dataclasses.dataclass
class Record:
    """Rows of definitions written down together: class(left) = all of class(right)."""

    left: np.ndarray  # units [n]
    right: np.ndarray  # units [width, n]
    rows: np.ndarray = dataclasses.field(init=False)  # which rows still count

    def __post_init__(self) -> None:
        self.rows = np.ones(len(self.left), bool)


def live_factors(classes: Classes, record: Record) -> np.ndarray:
    """Which factors of each row can still be cut: no repeats, nothing frozen."""
    right = classes.of[record.right]
    live = (classes.why[right] == NEVER) & record.rows
    for k, j in itertools.combinations(range(len(right)), 2):
        # k < j: of factors that are one class the first stands for all.
        live[j] &= ~((right[k] == right[j]) & live[k])
    return live


class Agreement:
    """Makes the definitions of one class agree.

    Attributes:
        found: definitions of the factors that it needed.
    """

    def __init__(self, classes: Classes, mismatch: int) -> None:
        """Takes the reason to freeze what does not match."""
        self.classes, self.mismatch = classes, mismatch
        self.found: list[Record] = []

    def agree(self, a: Record, at: np.ndarray, b: Record, bt: np.ndarray) -> None:
        """Rows `at` of `a` and `bt` of `b` define the same classes; those of `b` go."""
        columns_a = self._columns(a, at)
        columns_b = self._columns(b, bt)
        self.classes.changed = True
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
            frozen = self.classes.why[self.classes.of[a.right]] != NEVER
            every = np.where(frozen, 0, a.right)
            for column in every:
                self._tie_columns(column[at], column[bt])
            return
        self._refine(columns_a, columns_b)

    def _columns(self, record: Record, rows: np.ndarray) -> list[np.ndarray]:
        """Factor columns (units); frozen entries are replaced by the frozen unit 0."""
        live = live_factors(self.classes, record)[:, rows]
        units = np.where(live, record.right[:, rows], 0)
        return [column for column, some in zip(units, live, strict=True) if some.any()]

    def _one_to_one(self, x: np.ndarray, y: np.ndarray) -> bool:
        a, b = self.classes.of[x].astype(int), self.classes.of[y]
        # As many pairs as there are values on either side: each meets one other alone.
        # `astype(int)`: the product of two int32 numbers would overflow.
        pairs = len(np.unique(a * len(self.classes.why) + b))
        return pairs == len(np.unique(a)) == len(np.unique(b))

    def _tie_columns(self, x: np.ndarray, y: np.ndarray) -> None:
        dead_x, dead_y = x == 0, y == 0
        self.classes.freeze(x[~dead_x & dead_y], self.mismatch)
        self.classes.freeze(y[~dead_y & dead_x], self.mismatch)
        rows = ~dead_x & ~dead_y
        self.classes.tie(x[rows], y[rows])

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
        _, a = np.unique(self.classes.of[x], return_inverse=True)
        _, b = np.unique(self.classes.of[y], return_inverse=True)
        n = int(a.max()) + 1
        size = n + int(b.max()) + 1
        # Bipartite: the classes of x are nodes 0 to n - 1, those of y come after them.
        graph = coo_matrix((np.ones(len(a), bool), (a, n + b)), (size, size))
        count, parts = connected_components(graph, directed=False)
        if count == 1:
            return None
        return self.classes.fresh(count)[parts[a]]

    def _define(self, column: np.ndarray, factors: list[np.ndarray]) -> None:
        """Each class of `column` := all of its entries in `factors`."""
        for factor in factors:  # what never dies has no factor that does
            self.classes.freeze(factor[column == 0], self.mismatch)
        _, rows = np.unique(self.classes.of[column], return_index=True)
        rows = rows[column[rows] != 0]
        if not factors:
            self.classes.freeze(column[rows], self.mismatch)
        elif len(factors) == 1:
            self.classes.tie(column[rows], factors[0][rows])
        else:
            right = np.stack([factor[rows] for factor in factors])
            self.found.append(Record(column[rows], right))
