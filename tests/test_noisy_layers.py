"""Noise per example: moments in closed form, and the laws of the published variants."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxprune.training.noise.layers import bridgeout_dense, bridgeout_relu, sparseout

pytestmark = pytest.mark.once

DRAWS = 4000
RATE, Q = 0.3, 1.5
X = np.array([[1.0, -2.0, 0.5], [1.0, -2.0, 0.5]], np.float32)  # two equal examples
KERNEL = np.array([[0.5, -1.0], [0.25, 0.0], [-2.0, 1.5]], np.float32)


@pytest.fixture(scope="module")
def draws():
    """``[DRAWS, batch, out]``."""
    keys = jax.random.split(jax.random.key(0), DRAWS)
    draw = jax.vmap(lambda key: bridgeout_dense(X, KERNEL, key, rate=RATE, q=Q))
    return np.asarray(draw(keys), np.float64)


def test_dense_noise_has_the_moments_of_the_formula(draws):
    variance = RATE / (1 - RATE) * X**2 @ np.abs(KERNEL) ** Q
    error = np.sqrt(variance / DRAWS)
    assert (np.abs(draws.mean(0) - X @ KERNEL) < 4 * error).all()
    np.testing.assert_allclose(draws.var(0), variance, rtol=0.12)


def test_examples_do_not_share_a_draw(draws):
    first, second = draws[:, 0, 0], draws[:, 1, 0]
    correlation = np.corrcoef(first, second)[0, 1]
    assert abs(correlation) < 4 / np.sqrt(DRAWS)


def test_norm_two_on_positive_weights_is_dropconnect():
    kernel = np.array([[2.0]], np.float32)
    x = np.ones((64, 1), np.float32)
    y = bridgeout_dense(x, kernel, jax.random.key(1), rate=0.25, q=2.0)
    values = np.unique(np.round(np.asarray(y), 5))
    np.testing.assert_allclose(values, [0, 2 / 0.75], atol=1e-4)


def test_without_rate_the_layers_are_plain():
    key = jax.random.key(0)
    np.testing.assert_allclose(
        bridgeout_dense(X, KERNEL, key, rate=0.0), X @ KERNEL, rtol=1e-6
    )
    np.testing.assert_allclose(
        bridgeout_relu(X, KERNEL, rate=0.0), np.maximum(X @ KERNEL, 0), rtol=1e-6
    )
    np.testing.assert_array_equal(sparseout(X, key, rate=0.0), X)


def test_the_averaged_relu_is_the_mean_of_a_rectified_normal():
    bias = np.array([[0.1, -0.2]], np.float32)
    mean = X @ KERNEL + bias
    deviation = np.sqrt(RATE / (1 - RATE) * X**2 @ np.abs(KERNEL) ** Q)
    ratio = mean / deviation
    expected = mean * scipy.stats.norm.cdf(ratio)
    expected += deviation * scipy.stats.norm.pdf(ratio)
    found = bridgeout_relu(X, KERNEL, bias, rate=RATE, q=Q)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_averaged_relu_is_what_many_weights_do_on_average():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 200)).astype(np.float32)
    kernel = 0.1 * rng.normal(size=(200, 4)).astype(np.float32)
    many = np.repeat(x, 1000, axis=0)
    noisy = np.asarray(bridgeout_dense(many, kernel, jax.random.key(2), rate=0.5))
    rectified = np.maximum(noisy, 0).astype(np.float64)
    error = rectified.std(0) / np.sqrt(len(many))
    found = bridgeout_relu(x, kernel, rate=0.5)[0]
    assert (np.abs(rectified.mean(0) - found) < 4 * error + 0.01).all()
    slope = jax.grad(lambda w: bridgeout_relu(x, w, rate=0.5).sum())(kernel * 0)
    assert np.isfinite(slope).all()


def test_sparseout_has_its_moments_and_norm_two_is_dropout():
    x = np.array([[0.0, 0.5, 2.0]], np.float32)
    keys = jax.random.split(jax.random.key(3), DRAWS)
    found = jax.vmap(lambda key: sparseout(x, key, rate=RATE, q=1.0)[0])(keys)
    found = np.asarray(found, np.float64)
    variance = RATE / (1 - RATE) * x[0]
    error = np.sqrt(variance / DRAWS)
    assert (np.abs(found.mean(0) - x[0]) <= 4 * error).all()
    np.testing.assert_allclose(found.var(0), variance, rtol=0.1)
    twos = jax.vmap(lambda key: sparseout(x, key, rate=0.5, q=2.0)[0, 2])(keys[:50])
    np.testing.assert_allclose(np.unique(np.round(np.asarray(twos), 4)), [0.0, 4.0])


def test_targeted_sparseout_spares_the_strong_channels():
    x = jnp.array([[1.0, 2.0, 3.0, 4.0]])
    for seed in range(5):
        key = jax.random.key(seed)
        y = sparseout(x, key, rate=0.5, q=1.0, target_fraction=0.5)
        np.testing.assert_array_equal(y[0, 2:], x[0, 2:])
        assert (y[0, :2] != x[0, :2]).all()


def test_bad_arguments_are_refused():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"shapes \(3,\) and .* is the batch axis"):
        bridgeout_dense(jnp.ones(3), KERNEL, key, rate=0.5)
    with pytest.raises(ValueError, match=r"rate must be .* 1"):
        sparseout(X, key, rate=1.0)
