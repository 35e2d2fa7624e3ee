"""What Bridgeout amounts to on average, by going through every draw there is.

Five weights have 32 draws. The library's own draws are taken until all of them have
come, and each is weighed by its exact probability: no sampling error is left, and what
`update` returns must be the gradient of the marginalised loss to rounding.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import quick_jit

from jaxprune.training import bridgeout, noisy_params

pytestmark = [
    pytest.mark.once,
    pytest.mark.filterwarnings("ignore:.*noisy_params was never called"),
]

RATE = 0.3


def published(q):
    return bridgeout(RATE, q, target_fraction=1.0, relative=False)


W = np.array([[-1.3], [-0.4], [0.15], [0.6], [1.1]], np.float32)
X = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32) / 2
Y = np.random.default_rng(1).poisson(1.0, (7, 1)).astype(np.float32)

# Negative log-likelihoods of linear models with the canonical link, up to constants:
# A(x w) - y x w, where A is the log-partition. Its second derivative comes third.
GLMS = {
    "linear": (lambda u: u**2 / 2, lambda u: 1 + 0 * u),
    "logistic": (lambda u: jnp.logaddexp(u, 0 * u), lambda u: 1 / (2 + 2 * np.cosh(u))),
    "poisson": (jnp.exp, np.exp),
}


def every_draw(q, log_partition):
    """Noisy weights, updates and probability of each of the 32 draws."""
    tx, params = published(q), {"kernel": jnp.asarray(W)}

    def loss(params):
        u = jnp.asarray(X) @ params["kernel"]
        return jnp.sum(log_partition(u) - jnp.asarray(Y) * u)

    def draw(count):
        state = tx.init(params)._replace(count=count)
        noisy = noisy_params(params, state)
        updates, _ = tx.update(jax.grad(loss)(noisy), state, params)
        return noisy["kernel"], updates["kernel"]

    noisy, updates = quick_jit(jax.vmap(draw))(jnp.arange(6_000, dtype=jnp.int32))
    noisy, updates = np.asarray(noisy, np.float64), np.asarray(updates, np.float64)
    kept = (noisy > W)[:, :, 0]
    patterns, first = np.unique(kept, axis=0, return_index=True)
    assert len(patterns) == 2**W.size
    chance = np.where(patterns, 1 - RATE, RATE).prod(1)
    np.testing.assert_allclose(chance.sum(), 1)
    return noisy[first], updates[first], chance[:, None, None]


def slope(function, w, h=1e-6):
    """Central differences."""
    found = np.zeros_like(w)
    for j in range(len(w)):
        step = np.zeros_like(w)
        step[j] = h
        found[j] = (function(w + step) - function(w - step)) / (2 * h)
    return found


def moments(w, q):
    """Values, with their chances, that a weight takes; ``[weights, 1]`` each."""
    size = np.abs(w) ** (q / 2)
    return ((1 - RATE, w + size * RATE / (1 - RATE)), (RATE, w - size))


@pytest.mark.parametrize("q", [1.0, 1.5])
def test_a_linear_model_gets_a_bridge_penalty(q):
    noisy, updates, chance = every_draw(q, GLMS["linear"][0])
    x, y = X.astype(np.float64), Y.astype(np.float64)
    strength, energy = RATE / (1 - RATE), (x**2).sum(0)[:, None]

    def marginal(w):
        nll = (np.square(x @ w) / 2 - y * (x @ w)).sum()
        return nll + strength / 2 * (energy * np.abs(w) ** q).sum()

    averaged = (chance * updates).sum(0)
    np.testing.assert_allclose(averaged, slope(marginal, np.float64(W)), rtol=2e-5)
    brute = (chance * (np.square(x @ noisy) / 2 - y * (x @ noisy))).sum()
    np.testing.assert_allclose(brute, marginal(np.float64(W)), rtol=1e-5)


@pytest.mark.parametrize("q", [1.0, 1.5])
def test_a_poisson_model_gets_a_product_of_moments(q):
    """E exp(x w~) factorises over the weights, so its penalty has a closed form."""
    noisy, updates, chance = every_draw(q, GLMS["poisson"][0])
    x, y = X.astype(np.float64), Y.astype(np.float64)

    def marginal(w):
        each = sum(p * np.exp(x.T * value) for p, value in moments(w, q))
        return each.prod(0).sum() - (y * (x @ w)).sum()

    averaged = (chance * updates).sum(0)
    np.testing.assert_allclose(averaged, slope(marginal, np.float64(W)), rtol=2e-4)
    brute = (chance * (np.exp(x @ noisy) - y * (x @ noisy))).sum()
    np.testing.assert_allclose(brute, marginal(np.float64(W)), rtol=1e-5)


@pytest.mark.parametrize(("glm", "falls"), [("logistic", 4), ("poisson", 2)])
def test_any_glm_gets_a_bridge_penalty_weighed_by_its_curvature(glm, falls):
    """To second order in the features: what is left over falls when they are halved.

    It halves; for the logistic model, whose third derivative is odd, it falls to a
    quarter.
    """
    q, (log_partition, curvature) = 1.0, GLMS[glm]
    noisy, _, chance = every_draw(q, log_partition)
    with jax.enable_x64(True):

        def off(scale):
            x = scale * X.astype(np.float64)
            at_noise = np.asarray(log_partition(jnp.asarray(x @ noisy)))
            clean = np.asarray(log_partition(jnp.asarray(x @ W)))
            found = (chance * at_noise).sum(0).sum() - clean.sum()
            energy = x**2 @ np.abs(W) ** q
            strength = RATE / (1 - RATE)
            return found / (strength / 2 * (curvature(x @ W) * energy).sum()) - 1

        far, near = off(0.2), off(0.1)
    assert abs(near) < 0.05
    assert far / near == pytest.approx(falls, abs=0.25)


@pytest.mark.parametrize("q", [1e-3, 0.5, 1.0, 2.0])
def test_the_variance_is_a_power_of_the_weight_and_at_last_a_constant(q):
    """Linear at 1, quadratic at 2; as q goes to 0 all weights are shaken alike."""
    w = np.array([[1e-3, 0.1, 1.0, 10.0, 0.0]], np.float32)
    tx, params = published(q), {"kernel": jnp.asarray(w)}
    counts = jnp.arange(64, dtype=jnp.int32)
    state = tx.init(params)
    draws = quick_jit(
        jax.vmap(lambda c: noisy_params(params, state._replace(count=c))["kernel"])
    )(counts)
    up, down = np.max(draws, 0) - w, w - np.min(draws, 0)  # kept and dropped
    variance = ((1 - RATE) * up**2 + RATE * down**2)[0]
    assert variance[-1] == 0
    slope = np.diff(np.log(variance[:-1])) / np.diff(np.log(w[0, :-1]))
    np.testing.assert_allclose(slope, q, atol=2e-3)
    if q == 1e-3:
        np.testing.assert_allclose(variance[:-1], RATE / (1 - RATE), rtol=1e-2)
        updates, _ = tx.update({"kernel": jnp.ones_like(w)}, state, params)
        # q / 2 * |w|^(q / 2 - 1) is 0.5 at 1e-3, and gone at 1.
        np.testing.assert_allclose(updates["kernel"][0, 2:], 1, atol=2e-3)
