"""The brain surgeon against its formulas and a slow oracle, column by column."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune import recipes
from jaxprune.surgery._surgeon import brain_surgeon, inverse_factor

pytestmark = pytest.mark.once

RNG = np.random.default_rng(0)
X = RNG.normal(size=(50, 12)) @ RNG.normal(size=(12, 12))
SECOND = X.T @ X / len(X)
KERNEL = RNG.normal(size=(12, 5))


def oracle(sparsity, block):
    """Every Hessian inverted anew for every input."""
    weights, kept = KERNEL.copy(), np.ones(KERNEL.shape, bool)
    for first in range(0, 12, block):
        rows = range(first, min(first + block, 12))
        inverses = [np.linalg.inv(SECOND[d:, d:]) for d in rows]
        first_entries = np.array([inverse[0, 0] for inverse in inverses])
        saliency = weights[rows.start : rows.stop] ** 2 / first_entries[:, None]
        lowest = np.argsort(saliency, axis=None)[: round(sparsity * saliency.size)]
        gone = np.isin(np.arange(saliency.size), lowest).reshape(saliency.shape)
        kept[rows.start : rows.stop] = ~gone
        for d, inverse in zip(rows, inverses, strict=True):
            for n in np.flatnonzero(~kept[d]):
                weights[d:, n] -= weights[d, n] * inverse[:, 0] / inverse[0, 0]
    return np.where(kept, weights, 0.0), kept


@pytest.mark.parametrize("block", [4, 5, 128])
def test_the_surgeon_is_the_oracle(block):
    weights, kept = brain_surgeon(SECOND, KERNEL, block=block, ridge=0.0)
    expected, held = oracle(0.5, block)
    np.testing.assert_array_equal(kept, held)
    np.testing.assert_allclose(weights, expected, rtol=1e-6, atol=1e-9)


def test_one_weight_removed_is_the_optimum_without_it():
    kernel = KERNEL[:, :1].copy()
    kernel[0] = 1e-3  # the first input goes, all others may make up for it
    weights, kept = brain_surgeon(SECOND, kernel, sparsity=1 / 12, ridge=0.0)
    assert kept.ravel().tolist() == [False] + [True] * 11
    expected = np.linalg.lstsq(X[:, 1:], X @ kernel, rcond=None)[0]
    np.testing.assert_allclose(weights[1:], expected, rtol=1e-6)


def test_the_factor_is_of_the_inverse():
    factor = inverse_factor(SECOND, 0.0)
    np.testing.assert_array_equal(factor, np.triu(factor))
    np.testing.assert_allclose(factor.T @ factor @ SECOND, np.eye(12), atol=1e-7)


def test_patterns_are_the_same_whatever_the_block():
    one, kept = brain_surgeon(SECOND, KERNEL, pattern=(2, 4), block=4)
    for block in (1, 9, 128):
        other, also = brain_surgeon(SECOND, KERNEL, pattern=(2, 4), block=block)
        np.testing.assert_array_equal(kept, also)
        np.testing.assert_allclose(one, other, rtol=1e-7, atol=1e-12)


def test_patterns_run_along_the_inputs_and_lose_less_than_magnitude():
    weights, kept = brain_surgeon(SECOND, KERNEL, pattern=(2, 4))
    assert (kept.reshape(3, 4, 5).sum(1) == 2).all() and not weights[~kept].any()
    runs = np.abs(KERNEL).reshape(3, 4, 5)
    largest = (np.argsort(np.argsort(-runs, axis=1), axis=1) < 2).reshape(12, 5)
    alone = np.square(X @ np.where(largest, 0.0, KERNEL)).sum()
    assert np.square(X @ (weights - KERNEL)).sum() < alone
    with pytest.raises(ValueError, match="12 inputs cannot be divided into runs of 5"):
        brain_surgeon(SECOND, KERNEL, pattern=(2, 5))


def test_first_inputs_removed_together_are_the_optimum_without_them():
    """Each removal is of the inputs that are left, so all come to the least squares."""
    kernel = KERNEL.copy()
    kernel[:4] *= 1e-4
    weights, kept = brain_surgeon(SECOND, kernel, sparsity=4 / 12, ridge=0.0)
    assert not kept[:4].any() and kept[4:].all()
    expected = np.linalg.lstsq(X[:, 4:], X @ kernel, rcond=None)[0]
    np.testing.assert_allclose(weights[4:], expected, rtol=1e-6)


def test_of_uncorrelated_inputs_the_smallest_weights_go_and_nothing_changes():
    weights, kept = brain_surgeon(np.eye(12), KERNEL, sparsity=0.5)
    lowest = np.abs(KERNEL) < np.median(np.abs(KERNEL))
    np.testing.assert_array_equal(kept, ~lowest)
    np.testing.assert_array_equal(weights, np.where(lowest, 0, KERNEL))


def test_an_input_that_is_always_zero_and_moments_without_an_inverse():
    second = SECOND.copy()
    second[3] = second[:, 3] = 0
    weights, kept = brain_surgeon(second, KERNEL, sparsity=0.25, ridge=0.0)
    assert np.isfinite(weights).all() and not weights[~kept].any()
    with pytest.raises(ValueError, match="linear combinations of each other"):
        brain_surgeon(np.ones((12, 12)), KERNEL, ridge=0.0)
    with pytest.raises(ValueError, match="not finite"):
        brain_surgeon(second * np.nan, KERNEL)


# The whole net.


def net(params, x):
    hidden = jnp.tanh(x @ params["w1"] + params["b1"][None])
    return hidden @ params["w2"]


PARAMS = {
    "w1": RNG.normal(size=(12, 8)).astype(np.float32),
    "b1": RNG.normal(size=8).astype(np.float32),
    "w2": RNG.normal(size=(8, 3)).astype(np.float32),
}
ROWS = X.astype(np.float32)


def test_layers_are_pruned_one_after_the_other():
    sparse = recipes.sparse_gpt(net, PARAMS, [ROWS[:30], ROWS[30:]], sparsity=0.5)
    assert sparse.masks["b1"] and sparse.masks["w1"].mean() == 0.5
    np.testing.assert_array_equal(sparse.variables["w1"] != 0, sparse.masks["w1"])
    rows = ROWS.astype(np.float64)
    first, _ = brain_surgeon(rows.T @ rows / 50, PARAMS["w1"])
    np.testing.assert_allclose(sparse.variables["w1"], first, rtol=1e-3, atol=1e-5)
    # The second layer sees what the pruned first one makes.
    hidden = np.tanh(rows @ sparse.variables["w1"] + PARAMS["b1"])
    second, _ = brain_surgeon(hidden.T @ hidden / 50, PARAMS["w2"])
    np.testing.assert_allclose(sparse.variables["w2"], second, rtol=1e-3, atol=1e-5)
    lost = np.square(net(sparse.variables, ROWS) - net(PARAMS, ROWS)).mean()
    magnitude = jaxprune.select.per_leaf(
        jaxprune.scores.magnitude(PARAMS), sparsity=0.5
    )
    cut = jaxprune.apply_masks(PARAMS, {**magnitude, "b1": np.array(True)})
    assert lost < np.square(net(cut, ROWS) - net(PARAMS, ROWS)).mean()


def test_patterns_and_layers_are_chosen():
    sparse = recipes.sparse_gpt(net, PARAMS, [ROWS], pattern=(2, 4), layers="w2")
    assert sparse.masks["w1"].all()
    assert (sparse.masks["w2"].reshape(2, 4, 3).sum(1) == 2).all()
    with pytest.raises(ValueError, match="w2: 8 inputs cannot be divided into runs"):
        recipes.sparse_gpt(net, PARAMS, [ROWS], pattern=(2, 3), layers="w2")
    with pytest.raises(ValueError, match="give either sparsity, or pattern"):
        recipes.sparse_gpt(net, PARAMS, [ROWS])
    with pytest.raises(ValueError, match="w cannot be pruned .* read along different"):
        recipes.sparse_gpt(
            lambda p, x: x @ p["w"] @ p["w"].T,
            {"w": PARAMS["w1"]},
            [ROWS],
            sparsity=0.5,
        )
