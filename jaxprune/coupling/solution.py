"""What a solved ledger says of every class of units."""

import dataclasses
import functools

import numpy as np

NEVER = np.iinfo(np.int64).max  # "no reason": the class is not frozen
NONE = -1  # "no class" in a row of factors


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
        done: list[np.ndarray] = []
        todo = [self.classes[units]]
        inside, cut = self._kinds
        while todo:
            column = todo.pop()
            inner, free = inside[column], cut[column]
            if free.any():
                done.append(np.where(free, column, NONE))
            if inner.any():
                for factor in self.factors.T:
                    todo.append(np.where(inner, factor[column], NONE))
        return done

    @functools.cached_property
    def _kinds(self) -> tuple[np.ndarray, np.ndarray]:
        """Is a class a conjunction? An atom? The last entry speaks of `NONE`."""
        inside = self.factors[:, 0] >= 0
        return np.append(inside, False), np.append(~inside & (self.why == NEVER), False)


def pass_on(factors: np.ndarray, doubt: np.ndarray, ordered: np.ndarray) -> None:
    """What is said of a conjunction holds for each of its factors."""
    told = np.flatnonzero((factors[:, 0] >= 0) & ((doubt != NEVER) | ordered))
    while len(told):
        for inner in factors[told].T:
            known = inner >= 0
            np.minimum.at(doubt, inner[known], doubt[told[known]])
            ordered[inner[known & ordered[told]]] = True
        told = np.unique(factors[told])
        told = told[(told >= 0) & (factors[told, 0] >= 0)]
