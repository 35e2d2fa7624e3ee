"""distrax: normalizing flows and a hidden Markov model, with nets in Haiku."""

from collections.abc import Callable
from typing import Any

import distrax
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.third_party.models import Model, normal


def _transformed(function: Callable[..., Any], *args: Any) -> Model:
    net = hk.without_apply_rng(hk.transform(function))
    return Model(net.apply, net.init(jax.random.key(0), *args), args)


def _conditioner(outputs: tuple[int, ...]) -> hk.Sequential:
    width = int(np.prod(outputs))
    return hk.Sequential(
        [hk.nets.MLP([32, 32, width]), hk.Reshape(outputs, preserve_dims=-1)]
    )


def _flow(bijector: Callable[[Any], Any], numbers: int) -> Model:
    """Masked couplings, alternating, as in distrax's example of a flow."""

    def log_prob(x: jax.Array) -> jax.Array:
        layers, mask = [], jnp.arange(6) % 2 == 0
        for _ in range(3):
            conditioner = _conditioner((6, numbers))
            layers.append(distrax.MaskedCoupling(mask, conditioner, bijector))
            mask = ~mask
        base = distrax.MultivariateNormalDiag(jnp.zeros(6), jnp.ones(6))
        return distrax.Transformed(
            base, distrax.Inverse(distrax.Chain(layers))
        ).log_prob(x)

    return _transformed(log_prob, 0.5 * normal(4, 6))


def affine_flow() -> Model:
    def bijector(params: jax.Array) -> Any:
        shift, log_scale = params[..., 0], jnp.tanh(params[..., 1])
        return distrax.ScalarAffine(shift=shift, log_scale=log_scale)

    return _flow(bijector, 2)


def spline_flow() -> Model:
    bijector = lambda params: distrax.RationalQuadraticSpline(params, -2.0, 2.0)
    return _flow(bijector, 3 * 4 + 1)


def variational_autoencoder() -> Model:
    def elbo(x: jax.Array) -> jax.Array:
        hidden = jax.nn.relu(hk.Linear(32)(x))
        mean, scale = hk.Linear(4)(hidden), jnp.exp(hk.Linear(4)(hidden))
        posterior = distrax.MultivariateNormalDiag(mean, scale)
        z = posterior.sample(seed=jax.random.key(1))
        logits = hk.Linear(12)(jax.nn.relu(hk.Linear(32)(z)))
        likelihood = distrax.Independent(distrax.Bernoulli(logits), 1)
        prior = distrax.MultivariateNormalDiag(jnp.zeros(4), jnp.ones(4))
        return likelihood.log_prob(x > 0) - posterior.kl_divergence(prior)

    return _transformed(elbo, normal(4, 12))


def policy() -> Model:
    def log_prob(x: jax.Array) -> jax.Array:
        hidden = hk.nets.MLP([32, 32], activate_final=True)(x)
        mixture = distrax.MixtureSameFamily(
            distrax.Categorical(hk.Linear(3)(hidden)),
            distrax.Normal(hk.Linear(3)(hidden), jax.nn.softplus(hk.Linear(3)(hidden))),
        )
        return mixture.log_prob(x[:, 0])

    return _transformed(log_prob, normal(4, 6))


MODELS: dict[str, Callable[[], Model]] = {
    "affine coupling flow": affine_flow,
    "spline coupling flow": spline_flow,
    "variational autoencoder": variational_autoencoder,
    "mixture density network": policy,
}
