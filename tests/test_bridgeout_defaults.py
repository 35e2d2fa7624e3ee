"""Bridgeout as it comes: relative noise, one-input kernels, a forgotten step, learning."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import quick_jit
from sklearn.datasets import load_digits

from jaxprune.training import bridgeout, dropconnect, noisy_params

pytestmark = pytest.mark.once

FORGOTTEN = "noisy_params was never called"


def noisy_and_updates(params, **kwargs):
    """The current draw, and what becomes of gradients of 1."""
    tx = bridgeout(**kwargs)
    state = tx.init(params)
    noisy = noisy_params(params, state)
    return noisy, tx.update(jax.tree.map(jnp.ones_like, params), state, params)[0]


def kernel(w):
    return {"kernel": jnp.asarray(w, jnp.float32)}


@pytest.fixture(scope="module")
def w():
    return np.random.default_rng(0).normal(size=(3, 3, 8, 6)).astype(np.float32)


@pytest.mark.parametrize("q", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("fraction", [0.75, 1.0])
def test_relative_noise_is_the_published_noise_in_units_of_the_kernel(w, q, fraction):
    w = 0.01 * w
    w[..., 2] = 0.0  # pruned: no part of the unit
    unit = np.sqrt(np.square(w[w != 0]).mean())
    how = {"q": q, "target_fraction": fraction}
    noisy, updates = noisy_and_updates(kernel(w), **how)
    plain, plain_updates = noisy_and_updates(kernel(w / unit), relative=False, **how)
    close = {"rtol": 1e-5, "atol": 1e-6}
    np.testing.assert_allclose(noisy["kernel"] / unit, plain["kernel"], **close)
    np.testing.assert_allclose(updates["kernel"], plain_updates["kernel"], **close)
    assert np.any(updates["kernel"] != 1)
    np.testing.assert_array_equal(noisy["kernel"][..., 2], 0)


def test_relative_noise_grows_with_the_kernel(w):
    for factor in (2.0**-60, 2.0**-20, 2.0**20, 2.0**60):
        noisy, updates = noisy_and_updates(kernel(w))
        scaled, same = noisy_and_updates(kernel(factor * w))
        np.testing.assert_allclose(
            scaled["kernel"] / factor, noisy["kernel"], rtol=1e-5
        )
        np.testing.assert_allclose(
            same["kernel"], updates["kernel"], rtol=1e-5, atol=1e-6
        )


def test_at_norm_two_the_unit_does_not_matter(w):
    noisy, updates = noisy_and_updates(kernel(w), q=2.0)
    plain, plain_updates = noisy_and_updates(kernel(w), q=2.0, relative=False)
    close = {"rtol": 1e-5, "atol": 1e-6}
    np.testing.assert_allclose(noisy["kernel"], plain["kernel"], **close)
    np.testing.assert_allclose(updates["kernel"], plain_updates["kernel"], **close)


def test_nothing_is_noisy_in_a_kernel_of_zeros():
    noisy, updates = noisy_and_updates(kernel(np.zeros((4, 3))))
    np.testing.assert_array_equal(noisy["kernel"], 0)
    np.testing.assert_array_equal(updates["kernel"], 1)


@pytest.mark.parametrize("make", [bridgeout, dropconnect])
@pytest.mark.parametrize(
    ("shape", "noisy"), [((3, 3, 1, 5), 6), ((1, 5), 1), ((7, 1, 5), 5), ((2, 5), 1)]
)
def test_filters_of_one_input_get_noise_on_their_small_weights(make, shape, noisy):
    """Of 9 taps the 6 smallest; at least one weight of every filter."""
    w = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    taps = np.abs(w).reshape(-1, shape[-1])
    expected = taps < np.sort(taps, axis=0)[noisy] if noisy < len(taps) else taps > 0
    found = np.zeros(shape, bool)
    state = make(0.5, target_fraction=0.75).init(kernel(w))
    for count in range(12):
        draw = noisy_params(kernel(w), state._replace(count=jnp.int32(count)))
        found |= np.asarray(draw["kernel"]) != w
    np.testing.assert_array_equal(found.reshape(-1, shape[-1]), expected)


def test_forgetting_noisy_params_is_noticed_once(w):
    params = {"forgotten": kernel(w)}
    tx = optax.chain(bridgeout(), optax.sgd(0.1))

    @quick_jit
    def step(params, opt_state):
        return tx.update(jax.tree.map(jnp.ones_like, params), opt_state, params)

    with pytest.warns(UserWarning, match=rf"Bridgeout got gradients, .*{FORGOTTEN}"):
        _, opt_state = step(params, tx.init(params))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(params, opt_state)
        tx.update(params, opt_state, params)


def test_remembering_noisy_params_is_silent(w):
    params = {"remembered": kernel(w)}
    tx = optax.chain(optax.clip(1.0), bridgeout(), optax.sgd(0.1))
    opt_state = tx.init(params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.eval_shape(noisy_params, params, opt_state)  # while tracing
        tx.update(params, opt_state, params)


def test_as_it_comes_it_learns_what_plain_sgd_learns():
    """A dense net on digits; the published noise of q = 1 stays at chance here."""
    images, labels = load_digits(return_X_y=True)
    x, y = jnp.asarray(images / 8 - 0.6, jnp.float32), jnp.asarray(labels)

    def logits(params, x):
        h = jax.nn.relu(x @ params["one"]["kernel"] + params["one"]["bias"][None])
        return h @ params["two"]["kernel"]

    def loss(params, rows):
        out = logits(params, x[rows])
        return optax.softmax_cross_entropy_with_integer_labels(out, y[rows]).mean()

    def accuracy(noise):
        one, two = jax.random.split(jax.random.key(0))
        params = {
            "one": {
                "kernel": jax.random.normal(one, (64, 96)) / 8,
                "bias": jnp.zeros(96),
            },
            "two": {"kernel": jax.random.normal(two, (96, 10)) / 10},
        }
        tx = optax.chain(*noise, optax.sgd(0.2))

        def step(carry, rows):
            params, opt_state = carry
            where = noisy_params(params, opt_state) if noise else params
            updates, opt_state = tx.update(
                jax.grad(loss)(where, rows), opt_state, params
            )
            return (optax.apply_updates(params, updates), opt_state), None

        rows = np.random.default_rng(0).integers(0, 1400, (500, 32))
        scan = jax.jit(lambda carry: jax.lax.scan(step, carry, rows))
        (params, _), _ = scan((params, tx.init(params)))
        return float((logits(params, x[1400:]).argmax(-1) == y[1400:]).mean())

    plain = accuracy([])
    assert plain > 0.9
    assert accuracy([bridgeout()]) > plain - 0.03
    assert accuracy([bridgeout(q=1.0, target_fraction=1.0)]) > 0.8
