"""From a solved ledger to groups, where programs rarely go."""

import numpy as np

from jaxprune.coupling._collect import find_groups
from jaxprune.coupling._labels import Value, take
from jaxprune.coupling._ledger import Ledger
from jaxprune.coupling._solve import solve


def test_units_are_in_order_of_position_on_the_first_axis():
    ledger = Ledger()
    old, new = ledger.fresh_axis(4), ledger.fresh_axis(4)
    order = np.array([2, 0, 3, 1])
    ledger.tie(new, take(old, order))
    solution = solve(ledger)
    variables = {"new": Value((4,), (new,)), "old": Value((4,), (old,))}
    (found,) = find_groups(ledger, solution, variables)
    np.testing.assert_array_equal(found.units, solution.classes[new[0].units])
    positions = {axes[0][1]: index[:, 0].tolist() for axes, index in found.members}
    assert positions == {"new": [0, 1, 2, 3], "old": order.tolist()}


def test_an_axis_without_positions_is_no_group_and_is_not_pinned():
    ledger = Ledger()
    empty, full = ledger.fresh_axis(0), ledger.fresh_axis(2)
    variables = {"w": Value((0, 2), (empty, full))}
    (found,) = find_groups(ledger, solve(ledger), variables)
    assert [axis for axes, _ in found.members for axis in axes] == [(1, "w", 1)]
