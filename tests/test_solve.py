"""The solver against its specification: every choice it leaves open keeps the ledger.

What a ledger is told are statements about positions of axes: two axes live and die
together, a grid lives where its row and its column do, a position never dies. Whatever atoms
of the solution die, every statement must hold; the reference is the statements themselves.
"""

import functools
import itertools

import numpy as np
import pytest

from jaxprune.coupling._labels import Column, concatenate, merge
from jaxprune.coupling._ledger import Ledger
from jaxprune.coupling._solution import NEVER
from jaxprune.coupling._solve import solve


def lives(axis, alive, n):
    """Which positions of an axis live: those that live in every column."""
    keep = np.ones(n, bool)
    for column in () if isinstance(axis, int) else axis:
        keep &= alive[column.units]
    return keep


def moved(axis, positions):
    if isinstance(axis, int):
        return axis
    return tuple(Column(c.units[positions], c.zero) for c in axis)


class Recorded:
    """A ledger of axes of 12 positions that remembers, in its own words, what it is told.

    Every fact is a function of "which units live" that must be true.
    """

    def __init__(self):
        self.ledger, self.facts = Ledger(), []
        self.axes = [self.ledger.fresh_axis(12) for _ in range(3)]

    def tie(self, a, b, n=12):
        self.ledger.tie(a, b)
        self.facts.append(
            lambda alive: (lives(a, alive, n) == lives(b, alive, n)).all()
        )

    def split(self, one, sizes):
        parts = self.ledger.split(one, sizes)

        def grid(alive):
            lines = [lives(p, alive, n) for p, n in zip(parts, sizes, strict=True)]
            return functools.reduce(np.logical_and.outer, lines).ravel()

        self.facts.append(lambda alive: (lives(one, alive, 12) == grid(alive)).all())
        self.axes.append(merge(parts, list(sizes)))

    def freeze(self, axis, n):
        self.ledger.freeze(axis, self.ledger.reason("pinned"))
        self.facts.append(lambda alive: lives(axis, alive, n).all())


def random_ledger(rng):
    """Axes reshaped, tied, permuted, halved and frozen at random."""
    recorded = Recorded()
    for _ in range(rng.integers(2, 7)):
        kind = rng.choice(["split", "tie", "permute", "halves", "freeze"])
        one, other = (
            recorded.axes[k] for k in rng.integers(len(recorded.axes), size=2)
        )
        if kind == "split":
            sizes = [(2, 6), (3, 4), (2, 2, 3), (4, 3), (6, 2)][rng.integers(5)]
            recorded.split(one, sizes)
        elif kind == "tie":
            recorded.tie(one, other)
        elif kind == "permute":
            recorded.tie(one, moved(other, rng.permutation(12)))
        elif kind == "halves":
            recorded.tie(moved(one, np.arange(6)), moved(one, np.arange(6, 12)), 6)
        else:
            n = 1 + int(rng.integers(2))
            recorded.freeze(moved(one, rng.choice(12, size=n, replace=False)), n)
    return recorded


def alive_units(solution, dead_atoms):
    """For every unit: it lives if it is an atom that lives, or all its factors do."""
    alive = np.ones(len(solution.why), bool)
    alive[dead_atoms] = False
    composite = np.flatnonzero(solution.factors[:, 0] >= 0)
    for _ in range(len(composite) + 1):
        for c in composite:
            alive[c] = all(alive[f] for f in solution.factors[c] if f >= 0)
    return alive[solution.classes]


def broken(recorded, alive):
    """The numbers of the facts that do not hold."""
    return [k for k, fact in enumerate(recorded.facts) if not fact(alive)]


def atoms(solution):
    """Classes that can be cut on their own."""
    free = (solution.why == NEVER) & (solution.factors[:, 0] < 0)
    return np.flatnonzero(free)


@pytest.mark.parametrize("first", range(0, 800, 200))
def test_every_choice_keeps_the_ledger(first):
    cut = 0
    for seed in range(first, first + 200):
        rng = np.random.default_rng(seed)
        recorded = random_ledger(rng)
        solution = solve(recorded.ledger)
        free = atoms(solution)
        for share in (0.0, 0.2, 0.5, 1.0):
            dead = free[rng.random(len(free)) < share]
            alive = alive_units(solution, dead)
            assert broken(recorded, alive) == [], seed
            cut += (~alive).any()
        for unit in free[:8]:
            assert broken(recorded, alive_units(solution, [unit])) == [], seed
    assert cut > 100  # freezing everything keeps any ledger


def test_two_factorings_of_one_axis_are_refined_to_their_common_factors():
    # 12 = 2 x 6 and 12 = 4 x 3 share 12 = 2 x 2 x 3.
    ledger = Ledger()
    whole = ledger.fresh_axis(12)
    two, six = ledger.split(whole, (2, 6))
    four, three = ledger.split(whole, (4, 3))
    solution = solve(ledger)
    found = {
        len(np.unique(column[column >= 0]))
        for part in (two, six, four, three)
        for column in solution.atoms(part[0].units)
    }
    assert found == {2, 3}
    assert len(atoms_of(solution, whole)) == 2 + 2 + 3


def atoms_of(solution, axis):
    columns = solution.atoms(axis[0].units)
    return set(itertools.chain(*(column[column >= 0] for column in columns)))


def test_a_frozen_position_freezes_its_factors_and_leaves_the_rest():
    ledger = Ledger()
    whole = ledger.fresh_axis(6)
    ledger.split(whole, (2, 3))
    ledger.freeze((Column(whole[0].units[:1], False),), ledger.reason("pinned"))
    solution = solve(ledger)
    # Row 0 and column 0 stay; row 1, column 1 and column 2 can go.
    assert len(atoms_of(solution, whole)) == 3


def test_axes_that_are_tied_to_the_same_labels_are_tied_to_each_other():
    ledger = Ledger()
    parts = [ledger.fresh_axis(2), ledger.fresh_axis(3)]
    whole = concatenate(parts, [2, 3])
    scale, bias, other = (ledger.fresh_axis(5) for _ in range(3))
    ledger.tie(scale, whole)
    ledger.tie(whole, bias)
    ledger.tie(other, concatenate(parts, [2, 3]))  # equal labels, but not the same
    blocks = [ledger.block(axis[0].units) for axis in (scale, bias, other)]
    assert blocks[0] == blocks[1] != blocks[2]
    classes = solve(ledger).classes
    for axis in scale, bias, other:
        np.testing.assert_array_equal(classes[axis[0].units], classes[whole[0].units])
