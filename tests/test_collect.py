"""From a solved ledger to groups, where programs rarely go."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune
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


def test_units_that_the_program_takes_apart_are_not_interchangeable():
    """One part is squashed, the other rectified; fused kernels are not taken apart."""

    def apart(p, x):
        h = x @ p["w1"]
        return jnp.concatenate([jnp.tanh(h[:, :4]), jax.nn.relu(h[:, 4:])], 1) @ p["w2"]

    def overwritten(p, x):
        return (x @ p["w1"]).at[:, 1:3].set(0.0) @ p["w2"]

    def fused(p, x):
        a, b = jnp.split(x @ p["w1"], 2, 1)
        return (a * jax.nn.sigmoid(b)) @ p["w2"]

    def inside_a_loop(p, x):
        return jax.lax.scan(lambda c, x: (c, apart(p, x[None])[0]), 0, x)[1]

    x = jnp.ones((2, 3))
    found = {}
    for fn, width in ((apart, 8), (overwritten, 8), (fused, 4), (inside_a_loop, 8)):
        p = {"w1": jnp.ones((3, 8)), "w2": jnp.ones((width, 2))}
        found[fn.__name__] = [g.ordered for g in jaxprune.trace(fn, p, x).values()]
    assert found == {
        "apart": [True],
        "overwritten": [True],
        "fused": [False],
        "inside_a_loop": [True],
    }
