"""What a solved ledger says of every class of units."""

import dataclasses
import functools

import numpy as np

NEVER = np.int32(2**31 - 1)  # "no reason": the class is not frozen
NONE = -1  # "no class" in a row of factors
FROZEN, INNER, ATOM = range(3)  # kinds of classes: nothing, something, all can be cut


@dataclasses.dataclass(frozen=True, eq=False)
class Solution:
    """What the ledger says, solved.

    Attributes:
        classes: int ``[units]``; units with equal class live and die together.
        why: int ``[classes]``; the reason a class is frozen, or `NEVER`.
        doubt: int ``[classes]``; the reason cutting it is not exact, or `NEVER`.
        factors: int ``[classes, width]``; a class lives if all of these live; rows
            of `NONE` are atoms, which can be cut on their own.
        partly: int ``[classes]``; the reason that one factor of a class is frozen
            though others can be cut, or `NEVER`.
        ordered: bool ``[classes]``; the place of a class matters.
    """

    classes: np.ndarray
    why: np.ndarray
    doubt: np.ndarray
    factors: np.ndarray
    partly: np.ndarray
    ordered: np.ndarray

    def atoms(self, units: np.ndarray) -> list[np.ndarray]:
        """Columns of atoms for an array of units; `NONE` where nothing can be cut."""
        return self.atoms_of(self.classes[units])

    def atoms_of(self, classes: np.ndarray) -> list[np.ndarray]:
        """`atoms` for an array of classes."""
        done: list[np.ndarray] = []
        todo = [classes] if len(classes) else []
        while todo:
            column = todo.pop()
            kind = self.kinds[column]
            atom, inner = kind == ATOM, kind == INNER
            if atom.any():
                done.append(np.where(atom, column, NONE))
            if inner.any():
                todo += [np.where(inner, f[column], NONE) for f in self.factors.T]
        return done

    @functools.cached_property
    def kinds(self) -> np.ndarray:
        """int8 ``[classes + 1]``: is a class frozen, a conjunction (inner) or an atom?

        A conjunction has atoms among its factors. The last entry speaks of `NONE`.
        """
        kinds = np.full(len(self.why) + 1, FROZEN, np.int8)
        kinds[:-1][self.why == NEVER] = ATOM
        kinds[:-1][self.factors[:, 0] >= 0] = INNER
        return kinds


def pass_on(factors: np.ndarray, doubt: np.ndarray, ordered: np.ndarray) -> None:
    """What is said of a conjunction holds for each of its factors."""
    # A conjunction dies as soon as one factor does, so what is true of cutting it is
    # true of cutting the factor; level by level, as factors may be defined in turn.
    told = np.flatnonzero((factors[:, 0] >= 0) & ((doubt != NEVER) | ordered))
    while len(told):
        for inner in factors[told].T:
            known = inner >= 0
            np.minimum.at(doubt, inner[known], doubt[told[known]])
            ordered[inner[known & ordered[told]]] = True
        told = np.unique(factors[told])
        told = told[(told >= 0) & (factors[told, 0] >= 0)]


def pieces(index: np.ndarray) -> list[np.ndarray]:
    """Views of a long array of int32, to index with one after the other.

    NumPy copies an index to int64 first: a copy of twice its size, if it is used whole.
    """
    return np.array_split(index, 1 + len(index) // 2**16)
