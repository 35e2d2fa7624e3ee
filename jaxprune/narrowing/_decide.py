"""From masks to units: what the masks say about every unit, and whether they agree."""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np

from jaxprune.coupling._balance import Balance
from jaxprune.coupling._collect import find_groups
from jaxprune.coupling._ledger import Ledger
from jaxprune.coupling._lines import explain
from jaxprune.coupling._solution import FROZEN, INNER, NEVER, NONE, Solution, pieces
from jaxprune.coupling._walk import Walked
from jaxprune.coupling._writers import Writers

# bool[n] of one axis, or of the rank of the input where the layers of a scan differ;
# None = every position lives.
Alive: TypeAlias = np.ndarray | None
Place: TypeAlias = tuple[int, int]  # number of an input and its axis
Keep: TypeAlias = dict[Place, Alive]
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
        (k, d): mask
        for k, (_, each) in enumerate(zip(walked.ins, masks, strict=False))
        for d, mask in enumerate(each)
        if mask is not SILENT
    }
    inputs = dict(zip(names, walked.ins, strict=False))
    if any(mask is not None and mask.ndim > 1 for mask in keep.values()):
        found = find_groups(ledger, solution, inputs)
        balance = Balance(solution, walked, found, layers=True)
        keep = _alike_in_layers(balance, walked, names, keep)
    liveness = _Liveness(ledger, solution, walked, names, keep)
    liveness.refuse_frozen()
    wrong = liveness.wrong()
    if wrong is not None:
        # Perhaps every block of a group loses units of its own, but as many as others.
        balance = Balance(solution, walked, find_groups(ledger, solution, inputs))
        same = balance.canonical(walked.ins, _every(walked, keep))
        again = _Liveness(ledger, solution, walked, names, same)
        if again.wrong() is not None:
            liveness.explain(*wrong, balance)
        liveness = again
    return liveness.units()


def _every(walked: Walked, keep: Keep) -> dict[Place, np.ndarray]:
    return {
        (k, d): np.ones(walked.ins[k].shape[d], bool) if mask is None else mask
        for (k, d), mask in keep.items()
    }


def _alike_in_layers(
    balance: Balance, walked: Walked, names: Sequence[str], keep: Keep
) -> Keep:
    """The same cut where every layer of a scan loses the same units.

    Raises:
        ValueError: if layers keep different numbers, or are computed together.
    """
    for (k, d), mask in keep.items():
        layers = balance.layers(walked.ins[k])
        if mask is not None and mask.ndim > 1 and layers in (None, d):
            varies = [n for n, size in enumerate(mask.shape) if size > 1]
            raise ValueError(
                f"{names[k]} axis {d}: the mask cuts units of their own from the "
                f"positions of axes {varies}, but no scan iterates over one of them"
            )
    alike = balance.canonical(walked.ins, _every(walked, keep))
    for (k, d), mask in alike.items():
        if mask.ndim > 1:
            why = balance.trouble(walked.ins[k], d, mask)
            raise ValueError(
                f"{names[k]} axis {d}: the mask cuts units of their own from the "
                f"layers along axis {balance.layers(walked.ins[k])}, but no one scan "
                f"computes what is left: {why}"
            )
    return {
        place: mask if keep[place] is not None else None
        for place, mask in alike.items()
    }


def narrower(
    solution: Solution, walked: Walked, masks: Sequence[Sequence[Alive]]
) -> list[Place]:
    """The axes whose masks cut what another axis of the same units keeps."""
    given = [
        (k, d, mask, solution.atoms_of(solution.classes[axis[0].units]))
        for k, (value, each) in enumerate(zip(walked.ins, masks, strict=False))
        for d, mask in enumerate(each)
        if mask is not SILENT and not isinstance(axis := value.axes[d], int)
        if mask is None or mask.ndim == 1
    ]
    kept = solution.kinds == FROZEN
    for _, _, mask, columns in given:
        for column in columns:
            kept[column if mask is None else column[mask]] = True
    return [
        (k, d)
        for k, d, mask, columns in given
        if mask is not None
        and np.logical_and.reduce([~mask, *(kept[c] for c in columns)]).any()
    ]


def refused_writer(
    ledger: Ledger, writers: Writers, walked: Walked, names: Sequence[str]
) -> ValueError:
    """Why a writer cannot lose units that its stream keeps."""
    block, why = next(iter(writers.refused.items()))
    axes = [
        f"{name} axis {d}"
        for name, value in zip(names, walked.ins, strict=False)
        for d, axis in enumerate(value.axes)
        if not isinstance(axis, int) and axis[0].units is ledger.blocks[block]
    ]
    return ValueError(
        f"{axes[0]}: the mask cuts what the stream that it is added to keeps, but it "
        f"cannot lose units of its own: {explain(ledger, why)}"
    )


class _Liveness:
    """Which classes live, from what all masks say about them.

    A position that is kept keeps every class that it needs; one that is cut only says
    that some class is dead, which may be another than the one in question. So a class
    lives if any kept position needs it, or if no cut position needs it dead
    (`_revive`): where a whole group is gone, nothing that it shares axes with is kept.

    Axes that are tied throughout and have one mask count once, as the first of them;
    all axes with a mask stand one after the other in arrays of positions.
    """

    def __init__(
        self,
        ledger: Ledger,
        solution: Solution,
        walked: Walked,
        names: Sequence[str],
        keep: Mapping[Place, Alive],
    ) -> None:
        self.ledger, self.solution, self.walked = ledger, solution, walked
        self.names, self.given = names, keep
        self.places: list[Place] = []
        classes, masks = [np.zeros(0, np.int32)], [np.zeros(0, bool)]
        same: dict[int, Alive] = {}  # block of units -> the mask it was given
        for (k, d), mask in keep.items():
            axis = walked.ins[k].axes[d]
            if isinstance(axis, int):
                continue
            block = ledger.block(axis[0].units)
            if block >= 0 and block in same and _equal(same[block], mask):
                continue  # it says what another axis has said
            same.setdefault(block, mask)
            found = solution.classes[axis[0].units]
            if mask is None and (solution.kinds[found] == FROZEN).all():
                continue  # it goes without saying
            self.places.append((k, d))
            classes.append(found)
            masks.append(np.ones(len(found), bool) if mask is None else mask)
        self.ends = np.cumsum([len(mask) for mask in masks[1:]])
        self.keep = np.concatenate(masks)
        self.classes = np.concatenate(classes)
        self.columns = solution.atoms_of(self.classes)
        # Lives what no axis speaks of, and `NONE`, of which the last entry speaks.
        self.alive = np.ones(len(solution.why) + 1, bool)
        for column in self.columns:
            self.alive[column] = False
        for column in self.columns:
            self.alive[column[self.keep]] = True
        self.alive[NONE] = True
        self._revive()

    def _revive(self) -> None:
        """Brings to life what need not be dead for the cut positions to be cut.

        A cut position needs one of its classes dead. Where only one of them can be, it
        is. Of the others die those that are exact, and what is not exact only where
        nothing else accounts for a cut.
        """
        if len(self.columns) < 2:
            return
        dead = ~self.alive
        # [factors, cut positions]: one of the classes in every column has to be dead.
        # In each step below, columns that a dead class accounts for leave `rows`.
        rows = np.stack([column[~self.keep] for column in self.columns])
        lone = _one_of(rows, dead[rows])
        needed = np.zeros(len(dead), bool)
        needed[lone[lone != NONE]] = True
        needed[NONE] = False
        rows = rows[:, ~needed[rows].any(axis=0)]
        # Of a writer and its stream the writer: an output may have the stream's shape.
        own = self._own() & dead
        needed[rows[own[rows]]] = True
        rows = rows[:, ~own[rows].any(axis=0)]
        exact = dead.copy()
        # The last entry is that of `NONE` and lives, see `__init__`.
        exact[:-1] &= self.solution.doubt == NEVER
        some = exact[rows]
        needed[rows[some]] = True
        left = rows[:, ~some.any(axis=0)]
        needed[left[dead[left]]] = True
        self.alive = ~needed

    def _own(self) -> np.ndarray:
        """Bool ``[classes + 1]``: the units of writers that their stream lacks."""
        own = np.zeros(len(self.alive), bool)
        writers = self.walked.writers
        for written in writers.found.values() if writers is not None else ():
            own[self.solution.classes[written.own]] = True
        own[NONE] = False
        return own

    def wrong(self) -> tuple[int, np.ndarray] | None:
        """An axis whose mask is not what its units say, and where it is not."""
        implied = np.ones(len(self.keep), bool)
        for column in self.columns:
            implied &= self.alive[column]
        wrong = implied != self.keep
        if not wrong.any():
            return None
        number = self._number(int(wrong.argmax()))
        return number, np.flatnonzero(wrong[self._span(number)])

    def units(self) -> np.ndarray:
        """From classes to units; a conjunction lives if all of its factors do."""
        alive = self.alive
        rows = np.flatnonzero(self.solution.kinds == INNER)
        factors = [column[rows] for column in self.solution.factors.T]
        before = None
        while before is None or (alive[rows] != before).any():
            # Factors may be conjunctions themselves: repeat until nothing changes.
            before = alive[rows]
            alive[rows] = np.logical_and.reduce([alive[factor] for factor in factors])
        return np.concatenate([alive[each] for each in pieces(self.solution.classes)])

    def refuse_frozen(self) -> None:
        """Raises if a mask cuts what nothing can cut, naming the first."""
        refused = {
            (k, d): axis
            for (k, d), mask in self.given.items()
            if mask is not None
            and isinstance(axis := self.walked.ins[k].axes[d], int)
            and not mask.all()
        }
        cut = np.flatnonzero(~self.keep)
        why = self.solution.why[self.classes[cut]]
        if (why != NEVER).any():
            first = int((why != NEVER).argmax())
            refused[self.places[self._number(cut[first])]] = int(why[first])
        if not refused:
            return
        place = min(refused)
        mask = self.given[place]
        assert mask is not None
        raise ValueError(
            f"{self._name(place)}: the mask cuts {int((~mask).sum())} of {len(mask)} "
            "positions, but this axis cannot be cut: "
            f"{explain(self.ledger, refused[place])}"
        )

    def explain(self, number: int, wrong: np.ndarray, balance: Balance) -> None:
        """Raises, naming the axes that do not agree."""
        (k, d), span = self.places[number], self._span(number)
        name, keep = self._name((k, d)), self.keep[span]
        columns = self.solution.atoms_of(self.classes[span])
        trouble = balance.trouble(self.walked.ins[k], d, keep)
        if len(columns) == 1 and not trouble:
            atoms = columns[0][wrong]
            other = self._keeper(atoms[0])
            whole = [n for n in (number, other) if self.keep[self._span(n)].all()]
            raise ValueError(
                f"{name} and {self._name(self.places[other])} are coupled but the "
                f"masks keep {int(keep.sum())} positions of one and "
                f"{int(self.keep[self._span(other)].sum())} of the other (or not the "
                f"same ones): {len(np.unique(atoms))} units are kept in one and cut in "
                "the other; build masks with expand_masks"
                + "".join(untraced(self.names[self.places[n][0]]) for n in whole[:1])
            )
        raise ValueError(
            f"{name}: the kept positions {np.flatnonzero(keep)[:8].tolist()}... "
            "do not form a product of its factors (heads x features, groups x "
            "channels), so no smaller program computes them"
            + (f" ({trouble})" if trouble else "")
            + "; cut whole units of its groups"
        )

    def _keeper(self, atom: int) -> int:
        """The last axis whose mask keeps an atom."""
        kept = [np.flatnonzero((c == atom) & self.keep) for c in self.columns]
        return self._number(max(int(found[-1]) for found in kept if len(found)))

    def _number(self, position: int) -> int:
        """Which axis with a mask holds a position."""
        return int(np.searchsorted(self.ends, position, side="right"))

    def _span(self, number: int) -> slice:
        """The positions of an axis with a mask."""
        return slice(self.ends[number - 1] if number else 0, self.ends[number])

    def _name(self, place: Place) -> str:
        return f"{self.names[place[0]]} axis {place[1]}"


def untraced(name: str) -> str:
    """What it may mean that a variable is whole where its neighbours are cut."""
    return (
        f". Were the groups traced in a function that does not use {name}, as in "
        "evaluation mode? Then trace the function that does (training mode): its masks "
        "fit both"
    )


def _one_of(rows: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """For each column of `rows` the class that is chosen, if it is one, or `NONE`."""
    classes = np.where(chosen, rows, NONE)
    # `NONE` is below every class, so the maximum is a chosen one wherever there is one.
    most = classes.max(axis=0)
    same = (classes == most) | ~chosen
    return np.where(same.all(axis=0), most, NONE)


def _equal(one: Alive, other: Alive) -> bool:
    if one is None or other is None:
        return one is other
    return one is other or np.array_equal(one, other)
