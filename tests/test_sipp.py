"""Sampling of single weights: what it is on average, and how draws are spread."""

import jax
import numpy as np
import pytest
import scipy.optimize

from jaxprune import recipes, scores
from jaxprune.program._jaxprs import trace_program
from jaxprune.recipes._sipp import Neurons, sampled, sampling_error, spread_draws
from jaxprune.statistics._contractions import contractions

pytestmark = pytest.mark.once

RNG = np.random.default_rng(0)
PARAMS = {
    "w1": RNG.normal(size=(6, 8)).astype(np.float32),
    "w2": RNG.normal(size=(8, 3)).astype(np.float32),
}
X = RNG.normal(size=(20, 6)).astype(np.float32)


def net(params, x):
    return jax.nn.relu(x @ params["w1"]) @ params["w2"]


def test_deterministic_keeps_the_most_sensitive_weights_of_all_layers():
    sparse = recipes.sipp(net, PARAMS, [X], sparsity=0.5, method="deterministic")
    found = scores.weight_sensitivity(net, PARAMS, [X], reduce="mean")
    every = np.concatenate([np.ravel(found["w1"]), np.ravel(found["w2"])])
    kept = np.concatenate([np.ravel(sparse.masks[n]) for n in ("w1", "w2")])
    assert kept.sum() == 36
    assert every[kept].min() >= every[~kept].max()
    for name, leaf in PARAMS.items():
        expected = np.where(sparse.masks[name], leaf, 0)
        np.testing.assert_array_equal(sparse.variables[name], expected)


def test_random_is_right_on_average_for_every_weight():
    found = contractions(trace_program(net, PARAMS, X))
    shares = scores.weight_sensitivity(net, PARAMS, [X])
    neurons, rng = Neurons.of(found, PARAMS, shares), np.random.default_rng(0)
    factors = [sampled(neurons, 50, rng, 3.0, 3.0, False) for _ in range(100)]
    error = np.std(factors, 0) / 100**0.5
    met = neurons.shares > 0  # what no example needs is never drawn
    assert met.mean() > 0.9 and (np.count_nonzero(factors, axis=1) <= 50).all()
    assert (np.abs(np.mean(factors, 0) - 1)[met] < 5 * error[met] + 1e-9).all()
    sparse = neurons.written(PARAMS, factors[0])
    ratios = sparse.variables["w1"] / PARAMS["w1"]
    np.testing.assert_array_equal(ratios > 0, sparse.masks["w1"])
    key = jax.random.key(0)
    sparse = recipes.sipp(net, PARAMS, [X], sparsity=0.3, method="random", key=key)
    assert 0 < np.mean(sparse.masks["w1"]) < 0.9


def test_draws_are_spread_as_the_convex_programme_says():
    totals, weights = np.array([1.0, 4.0, 2.0]), np.array([0.5, 0.25, 0.25])
    most, budget, factor = np.array([40, 60, 50]), 60.0, 3.0
    found = spread_draws(totals, most, weights, budget, factor)

    def objective(m):
        return (weights * sampling_error(totals, m, factor)).sum()

    expected = scipy.optimize.minimize(
        objective,
        np.full(3, 20.0),
        bounds=[(1, m) for m in most],
        constraints={"type": "ineq", "fun": lambda m: budget - m.sum()},
    )
    assert found.sum() <= budget + 1e-6
    assert objective(found) <= expected.fun + 1e-5
    np.testing.assert_allclose(found, expected.x, rtol=0.02)
    np.testing.assert_array_equal(spread_draws(totals, most, weights, 500, 1.0), most)
    with pytest.raises(ValueError, match="2 weights are fewer than the 3 neurons"):
        spread_draws(totals, most, weights, 2, 1.0)


def test_the_error_falls_and_is_convex_and_hybrid_has_the_smaller_bound():
    errors = sampling_error(2.0, np.arange(1.0, 50), 5.0)
    assert (np.diff(errors) < 0).all() and (np.diff(errors, 2) > 0).all()
    # With a confidence that asks for many draws keeping the largest is always better.
    both = recipes.sipp(net, PARAMS, [X], sparsity=0.3, key=jax.random.key(0))
    for name, leaf in PARAMS.items():
        kept = np.where(both.masks[name], leaf, 0)
        np.testing.assert_array_equal(both.variables[name], kept)
    with pytest.raises(ValueError, match="method='random' samples: give key="):
        recipes.sipp(net, PARAMS, [X], sparsity=0.5, method="random")
    with pytest.raises(ValueError, match="method must be 'deterministic'"):
        recipes.sipp(net, PARAMS, [X], sparsity=0.5, method="best")
