"""Ranks by energy, value and count against loops; budgets against enumeration."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxprune

pytestmark = pytest.mark.once


def with_values(rows, columns, values, seed=0):
    """A matrix with these singular values."""
    rng = np.random.default_rng([seed, rows, columns])
    left, right = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (rows, columns))
    k = len(values)
    return jnp.asarray((left[:, :k] * values) @ right[:k], jnp.float32)


def mlp(params, x):
    return jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"]) @ params["c"]


PARAMS = {
    "a": with_values(10, 12, [4.0, 2.0, 1.0, 0.5, 0.25, 0.1]),
    "b": with_values(12, 9, [3.0, 2.9, 2.8, 2.7, 0.1]),
    "c": with_values(9, 2, [1.0, 0.1]),
}
X = jnp.ones((2, 10))


def test_energy_value_and_count():
    """The classifier's factors cost as much as it does at rank 2: it stays whole."""
    choose = lambda **how: jaxprune.factor_ranks(mlp, PARAMS, X, **how)  # noqa: E731
    # 16 + 4 = 20 of 21.3225; 9 + 8.41 + 7.84 + 7.29 of 32.55.
    assert choose(energy=20 / 21.33) == {"a": 2, "b": 4, "c": 1}
    assert choose(value=0.2) == {"a": 5, "b": 4, "c": 1}
    assert choose(count=3) == {"a": 3, "b": 3}
    assert choose(count=3, only=["a", "c"]) == {"a": 3}


def spent(ranks, sizes=((10, 12), (12, 9), (9, 2))):
    pairs = zip("abc", sizes, strict=True)
    return sum(ranks[p] * (d + n) if p in ranks else d * n for p, (d, n) in pairs)


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.8])
def test_a_budget_is_met_with_the_best_energy(budget):
    """Within the budget, and near the best of all ranks by enumeration."""
    ranks = jaxprune.factor_ranks(mlp, PARAMS, X, budget=budget, cost="parameters")
    whole = 120 + 108 + 18
    assert spent(ranks) <= budget * whole
    energies = {}
    for name, kernel in PARAMS.items():
        squares = np.linalg.svd(np.asarray(kernel), compute_uv=False) ** 2
        energies[name] = np.cumsum(squares) / squares.sum()

    def energy(ranks):
        return sum(np.log(energies[p][r - 1]) for p, r in ranks.items())

    found = []
    for a, b, c in itertools.product(
        [None, *range(1, 6)], [None, *range(1, 6)], [None, 1]
    ):
        some = {p: r for p, r in zip("abc", (a, b, c), strict=True) if r}
        if spent(some) <= budget * whole:
            found.append(energy(some))
    assert energy(ranks) >= max(found) - 0.06
    # FLOPs of matrices are proportional to their entries.
    assert ranks == jaxprune.factor_ranks(mlp, PARAMS, X, budget=budget)


def conv(params, x):
    return lax.conv_general_dilated(
        x, params["w"], (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),

    )  # fmt: skip


@pytest.mark.parametrize("kind", ["channel", "spatial", "depthwise", "basis"])
def test_flops_are_those_of_the_factorised_net(kind):
    """What a budget counts is what `costs` counts."""
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(3, 3, 8, 12)), jnp.float32)}
    x = jnp.ones((2, 8, 8, 8))
    options = {"kind": kind} | ({"basis_size": 4} if kind == "basis" else {})
    ranks = jaxprune.factor_ranks(conv, params, x, budget=0.6, **options)
    whole = jaxprune.costs(conv, params, x).multiply_adds
    small = jaxprune.factorise(conv, params, x, ranks=ranks, **options)
    found = jaxprune.costs(small.apply_fn, small.variables, x).multiply_adds
    more = jaxprune.factorise(conv, params, x, ranks={"w": ranks["w"] + 1}, **options)
    above = jaxprune.costs(more.apply_fn, more.variables, x).multiply_adds
    assert found <= 0.6 * whole < above


def test_layers_of_a_scan_have_one_rank():
    kernels = [with_values(6, 6, [2.0, 1.0, 0.1], seed) for seed in range(2)]
    params = {"w": jnp.stack([kernels[0], 3 * kernels[1]])}

    def net(params, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    x = jnp.ones((1, 6))
    assert jaxprune.factor_ranks(net, params, x, value=0.5) == {"w": 2}
    assert jaxprune.factor_ranks(net, params, x, energy=0.7) == {"w": 1}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, TypeError, "exactly one of energy, value, count, budget; got none"),
        ({"energy": 0.5, "count": 1}, TypeError, "got energy and count"),
        ({"energy": 1.5}, ValueError, r"energy must be in \(0, 1\], got 1.5"),
        ({"value": 0.0}, ValueError, "value must be in"),
        ({"count": 0}, ValueError, "count must be a whole number"),
        ({"budget": 1.0}, ValueError, r"budget must be in \(0, 1\)"),
        ({"budget": 0.01}, ValueError, "rank 1 everywhere still takes 0.2"),
        ({"budget": 0.5, "cost": "time"}, ValueError, "cost must be"),
        ({"energy": 0.5, "only": "d*"}, ValueError, "'d\\*', which matches no kernel"),
    ],
)
def test_bad_input_is_named(options, error, message):
    with pytest.raises(error, match=message):
        jaxprune.factor_ranks(mlp, PARAMS, X, **options)


def test_shapes_are_no_values():
    shapes = jax.eval_shape(lambda: PARAMS)
    with pytest.raises(TypeError, match="a is a ShapeDtypeStruct"):
        jaxprune.factor_ranks(mlp, shapes, X, count=1)
