"""The best widths within a budget, as a mixed-integer programme.

Every group takes one of its widths: binary variables ``z[g, w]`` that sum to 1. The
score kept is linear in them, and so is any power of a size. A product of several sizes
is taken apart group by group: with ``y`` the value of the other factors::

    size_g ** p * y  =  sum_w  w ** p * v[w],     v[w] = z[g, w] * y

and ``v`` is described exactly by linear constraints, because one of the z is 1::

    sum_w v[w] = y,     low * z[g, w] <= v[w] <= high * z[g, w]

for ``low <= y <= high``. Nothing is approximated: an optimum is one of the true cost.
"""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from scipy.sparse import coo_matrix

from jaxprune.costing import Cost, Polynomial

Row = dict[int, float]  # variable -> coefficient
# (group, power, is it 0 at full size?): the factors of a term, see `costing.Term`.
Powers = tuple[tuple[str, int, bool], ...]


def solve_exactly(
    widths: Mapping[str, np.ndarray],
    kept: Mapping[str, np.ndarray],
    cost: Cost,
    budget: float,
    time_limit: float,
) -> tuple[np.ndarray | None, float]:
    """Chooses a width for every group.

    Args:
        widths: group name -> the widths to choose from.
        kept: group name -> the score that each keeps.
        cost: a polynomial.
        budget: the highest cost allowed.
        time_limit: seconds.

    Returns:
        For every group which width, or None if there was no time to find any; and a
        bound that no choice within the budget exceeds.

    Raises:
        ValueError: if the cost is no polynomial.
    """
    if not isinstance(cost, Polynomial):
        raise ValueError(
            f"method='exact' needs a polynomial cost, got {type(cost).__name__}; use "
            "'greedy'"
        )
    programme, limit, bound = _Programme(widths, cost), float(budget), None
    while True:
        found = programme.solve(kept, limit, time_limit)
        if bound is None:  # of the budget itself
            best = found.mip_dual_bound
            bound = np.inf if best is None else -float(best)
        if found.x is None:
            return None, bound
        gone = np.array([found.x[own].argmax() for own in programme.choices.values()])
        sizes = {
            name: int(own[k])
            for (name, own), k in zip(widths.items(), gone, strict=True)
        }
        over = float(cost.value(sizes)) - budget
        if over <= 0:
            return gone, bound
        # The solver meets constraints to a tolerance: ask for a little less.
        limit -= 2 * over


class _Programme:
    """Variables and constraints, as they are added."""

    def __init__(self, widths: Mapping[str, np.ndarray], cost: Polynomial) -> None:
        self.widths, self.sizes = widths, cost.sizes
        self.low: list[float] = []
        self.high: list[float] = []
        self.rows: list[tuple[Row, float, float]] = []
        self.products: dict[Powers, tuple[Row, float, float]] = {}
        self.choices = {n: self._variables(len(own), 0, 1) for n, own in widths.items()}
        self.binary = len(self.low)
        for own in self.choices.values():
            self.rows.append((dict.fromkeys(own.tolist(), 1.0), 1, 1))
        self.fixed, self.spent = 0.0, {}
        for term in cost.terms:
            self._spend(float(term.coefficient), dict(term.powers), term.cut)

    def solve(
        self, kept: Mapping[str, np.ndarray], budget: float, time_limit: float
    ) -> Any:
        """Runs HiGHS."""
        # Slow to import, and seldom used.
        from scipy.optimize import Bounds, LinearConstraint, milp

        value = np.zeros(len(self.low))
        for name, own in self.choices.items():
            value[own] = kept[name]
        scale = max(abs(budget), 1.0)
        spent = {k: c / scale for k, c in self.spent.items()}
        rows = [*self.rows, (spent, -np.inf, (budget - self.fixed) / scale)]
        entries = [
            (r, k, c) for r, (row, _, _) in enumerate(rows) for k, c in row.items()
        ]
        at, column, data = np.array(entries, float).reshape(-1, 3).T
        matrix = coo_matrix(
            (data, (at.astype(int), column.astype(int))), (len(rows), len(self.low))
        )
        low, high = (np.array([row[k] for row in rows]) for k in (1, 2))
        bounds: Any = (np.array(self.low), np.array(self.high))
        constraint: Any = (matrix.tocsc(), low, high)
        return milp(
            -value,
            integrality=np.arange(len(self.low)) < self.binary,
            bounds=Bounds(*bounds),
            constraints=LinearConstraint(*constraint),
            options={"time_limit": time_limit, "mip_rel_gap": 0.0},
        )

    def _variables(self, n: int, low: float, high: float) -> np.ndarray:
        start = len(self.low)
        self.low += [low] * n
        self.high += [high] * n
        return np.arange(start, start + n)

    def _spend(
        self, coefficient: float, powers: Mapping[str, int], cut: Collection[str]
    ) -> None:
        """Adds a term to the cost; groups that are not chosen have their full size."""
        if any(name not in self.widths for name in cut):
            return
        for name, power in powers.items():
            # Relative sizes keep all numbers near 1.
            coefficient *= float(self.sizes[name]) ** power
        chosen = [
            (name, powers.get(name, 0), name in cut)
            for name in sorted({*powers, *cut})
            if name in self.widths
        ]
        if not chosen:
            self.fixed += coefficient
            return
        row, _, _ = self._product(tuple(chosen))
        for variable, c in row.items():
            self.spent[variable] = self.spent.get(variable, 0.0) + coefficient * c

    def _product(self, powers: Powers) -> tuple[Row, float, float]:
        """A product of relative sizes as a sum of variables, and its bounds."""
        if powers in self.products:
            return self.products[powers]
        # The group with the most choices is last: its sum needs no more variables.
        powers_by_count = sorted(powers, key=lambda each: len(self.widths[each[0]]))
        (name, power, at_a_cut), *rest = powers_by_count
        shares = (self.widths[name] / self.sizes[name]) ** power
        if at_a_cut:
            shares = shares * (self.widths[name] < self.sizes[name])
        own = self.choices[name]
        if not rest:
            found = dict(zip(own.tolist(), shares.tolist(), strict=True))
            result = found, float(shares.min()), float(shares.max())
        else:
            others, low, high = self._product(tuple(sorted(rest)))
            v = self._variables(len(own), 0.0, high)
            for choice, part in zip(own.tolist(), v.tolist(), strict=True):
                self.rows.append(({part: 1.0, choice: -low}, 0, np.inf))
                self.rows.append(({part: 1.0, choice: -high}, -np.inf, 0))
            balance = dict.fromkeys(v.tolist(), 1.0)
            for variable, c in others.items():
                balance[variable] = balance.get(variable, 0.0) - c
            self.rows.append((balance, 0, 0))
            found = dict(zip(v.tolist(), shares.tolist(), strict=True))
            result = found, low * float(shares.min()), high * float(shares.max())
        self.products[powers] = result
        return result
