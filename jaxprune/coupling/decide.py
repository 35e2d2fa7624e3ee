"""From masks to units: what the masks say about every unit, and whether they agree."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from jaxprune.coupling.balance import Balance
from jaxprune.coupling.collect import explain, find_groups
from jaxprune.coupling.ledger import Ledger
from jaxprune.coupling.solution import NEVER, NONE, Solution
from jaxprune.coupling.walk import Walked

Alive: TypeAlias = np.ndarray | None  # bool[n] of one axis; None = every position lives
Place: TypeAlias = tuple[int, int]  # number of an input and its axis
SILENT = np.zeros(0, bool)  # in place of a mask: follow the axes it is coupled to


def decide(
    ledger: Ledger,
    solution: Solution,
    walked: Walked,
    names: Sequence[str],
    masks: Sequence[Sequence[Alive]],
) -> np.ndarray:
    """Which units of a program live, given the masks of its inputs.

    Args:
        ledger: what the walk found.
        solution: the ledger, solved.
        walked: the program.
        names: what to call its inputs in error messages.
        masks: for the first inputs, which positions of each axis live.

    Returns:
        bool ``[units]``.

    Raises:
        ValueError: if two coupled axes disagree, or a pinned position is cut.
    """
    keep = {
        (k, d): np.ones(value.shape[d], bool) if mask is None else mask
        for k, (value, each) in enumerate(zip(walked.ins, masks, strict=False))
        for d, mask in enumerate(each)
        if mask is not SILENT
    }
    told = _Told(ledger, solution, walked, names, keep)
    told.refuse_frozen()
    wrong = told.wrong()
    if wrong is not None:
        # Perhaps every block of a group loses units of its own, but as many as others.
        inputs = dict(zip(names, walked.ins, strict=False))
        balance = Balance(solution, walked, find_groups(ledger, solution, inputs))
        same = balance.canonical(walked.ins, keep)
        again = _Told(ledger, solution, walked, names, same)
        if again.wrong() is not None:
            told.explain(*wrong, balance)
        told = again
    return told.units()


class _Axis(NamedTuple):
    """What the mask of one axis says."""

    units: np.ndarray
    keep: np.ndarray
    columns: list[np.ndarray]  # the classes that decide each position, see `atoms`


class _Told:
    """What all masks say about every class.

    A position that is kept keeps every class that it needs; one that is cut only says
    that some class is dead, which may be another than the one in question. So a class
    lives if any kept position needs it, and dies if only cut positions do.
    """

    def __init__(
        self,
        ledger: Ledger,
        solution: Solution,
        walked: Walked,
        names: Sequence[str],
        keep: Mapping[Place, np.ndarray],
    ) -> None:
        self.ledger, self.solution, self.walked = ledger, solution, walked
        self.names, self.keep = names, keep
        self.axes: dict[Place, _Axis] = {}
        seen = np.zeros(len(solution.why), bool)
        self.kept_by = np.full((len(solution.why), 2), NONE)  # a place
        same: dict[int, np.ndarray] = {}  # block of units -> the mask it was told
        for (k, d), mask in keep.items():
            axis = walked.ins[k].axes[d]
            if isinstance(axis, int):
                continue
            units = axis[0].units
            block = ledger.block(units)
            first = same.setdefault(block, mask)
            if block >= 0 and first is not mask and np.array_equal(first, mask):
                continue  # it says what another axis has said
            told = self.axes[k, d] = _Axis(units, mask, solution.atoms(units))
            for column in told.columns:
                rows = column >= 0
                seen[column[rows]] = True
                self.kept_by[column[rows & mask]] = k, d
        self.alive = (self.kept_by[:, 0] != NONE) | ~seen

    def wrong(self) -> tuple[Place, np.ndarray] | None:
        """An axis whose mask is not what its units say, and where it is not."""
        for place, told in self.axes.items():
            implied = np.ones(len(told.units), bool)
            for column in told.columns:
                implied &= np.where(column >= 0, self.alive[column], True)
            if (implied != told.keep).any():
                return place, np.flatnonzero(implied != told.keep)
        return None

    def units(self) -> np.ndarray:
        """From classes to units; a conjunction lives if all of its factors do."""
        factors, alive = self.solution.factors, self.alive
        rows = np.flatnonzero(factors[:, 0] >= 0)
        before = None
        while before is None or (alive[rows] != before).any():
            before = alive[rows]
            inner = np.where(factors[rows] >= 0, alive[factors[rows]], True)
            alive[rows] = inner.all(axis=1)
        return alive[self.solution.classes]

    def refuse_frozen(self) -> None:
        """Raises if a mask cuts what nothing can cut."""
        for (k, d), mask in self.keep.items():
            axis = self.walked.ins[k].axes[d]
            if mask.all():
                continue
            if isinstance(axis, int):
                raise self._refusal((k, d), axis)
            why = self.solution.why[self.solution.classes[axis[0].units[~mask]]]
            if (why != NEVER).any():
                raise self._refusal((k, d), int(why[why != NEVER][0]))

    def _refusal(self, place: Place, why: int) -> ValueError:
        mask = self.keep[place]
        return ValueError(
            f"{self._name(place)}: the mask cuts {int((~mask).sum())} of {len(mask)} "
            f"positions, but this axis cannot be cut: {explain(self.ledger, why)}"
        )

    def explain(self, place: Place, wrong: np.ndarray, balance: Balance) -> None:
        """Raises, naming the axes that do not agree."""
        name, told = self._name(place), self.axes[place]
        classes = told.columns[0][wrong]
        trouble = balance.trouble(self.walked.ins[place[0]], place[1], told.keep)
        if len(told.columns) == 1 and not trouble:
            other = tuple(self.kept_by[classes[0]].tolist())
            raise ValueError(
                f"{name} and {self._name(other)} are coupled but the masks keep "
                f"{int(told.keep.sum())} positions of one and "
                f"{int(self.keep[other].sum())} of the other (or not the same ones): "
                f"{len(np.unique(classes))} units are kept in one and cut in the "
                "other; build masks with expand_masks"
            )
        raise ValueError(
            f"{name}: the kept positions {np.flatnonzero(told.keep)[:8].tolist()}... "
            "do not form a product of its factors (heads x features, groups x "
            "channels), so no smaller program computes them"
            + (f" ({trouble})" if trouble else "")
            + "; cut whole units of its groups"
        )

    def _name(self, place: Place) -> str:
        return f"{self.names[place[0]]} axis {place[1]}"
