"""DropConnect: weights are dropped at random, the rest is scaled up."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune.training._hyperparameters import check, current, is_ranked
from jaxprune.training._keys import StoredKey
from jaxprune.training._leaves import MaskOrFn, select_leaves
from jaxprune.training.noise._draws import kept_or_dropped, smallest
from jaxprune.training.noise._weight_noise import noise_of, weight_noise


class DropConnectState(NamedTuple):
    """What `noisy_params` needs to rebuild the current draw; no noise is stored.

    Attributes:
        key: the words of a key, by the name of its implementation; the draw of a leaf
            depends on it, the leaf's path and `count`.
        count: int32 scalar, how many draws are behind.
        rate: float32 scalar, drop probability of the current draw.
        target_fraction: float32 scalar, or None if every weight may be dropped.
        noised: paths of the leaves that get noise; a dict of None.
    """

    key: StoredKey
    # Every optax state calls it so, over tuple.count.
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    rate: jax.Array
    target_fraction: jax.Array | None
    noised: dict[str, None]


def dropconnect(
    rate: optax.ScalarOrSchedule = 0.5,
    *,
    target_fraction: float = 1.0,
    mask: MaskOrFn = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformation:
    r"""Drops weights at random, one draw per kernel and mini-batch.

    .. math::
        \tilde w = w \, \frac{\mathrm{Bernoulli}(1 - rate)}{1 - rate}

    has the mean :math:`w` and the variance :math:`w^2 \, rate / (1 - rate)`: for a
    linear model with squared loss it is ridge regression with features scaled, the
    case q = 2 of `bridgeout` (the same law for positive weights, its mirror image for
    negative ones). With `target_fraction` below 1 only small weights are dropped,
    which is targeted dropout of weights.

    Used like `bridgeout`: first in `optax.chain`, gradients taken at `noisy_params`.

    Args:
        rate: drop probability, in [0, 1), or a schedule of it; 0 is the identity.
        target_fraction: in (0, 1]; below 1 only the smallest inputs of every output
            filter may be dropped, ranked as in `bridgeout`.
        mask: which leaves get noise, as in `bridgeout`; by default the kernels.
        key: seed, or one typed key; never split, see `bridgeout`.

    Returns:
        An `optax.GradientTransformation` with state `DropConnectState`.

    Raises:
        ValueError: if a hyperparameter is out of range (where its value is known), if
            `mask` does not fit `params` or selects nothing, if targeting meets a leaf
            with fewer than two axes, or if
            ``update`` gets no `params`.
        TypeError: if `key` is no key, or `mask` holds something other than bools or
            selects a leaf that is not floating.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> from jaxprune.training import dropconnect, noisy_params
        >>> params = {"kernel": jnp.full((4, 3), 0.5)}
        >>> noisy = noisy_params(params, dropconnect(rate=0.5).init(params))
        >>> sorted(set(np.ravel(noisy["kernel"]).tolist()))
        [0.0, 1.0]

    References:
        Wan et al., `Regularization of Neural Networks using DropConnect
        <https://proceedings.mlr.press/v28/wan13.html>`_, ICML, 2013

        Gomez et al., `Learning Sparse Networks Using Targeted Dropout
        <https://arxiv.org/abs/1905.13678>`_, 2019
    """
    check("rate", rate)
    check("target_fraction", target_fraction)
    ranked = is_ranked(target_fraction)

    def fixed() -> dict[str, jax.Array | None]:
        fraction = jnp.array(target_fraction, jnp.float32) if ranked else None
        return {"target_fraction": fraction}

    def scheduled(count: jax.Array) -> dict[str, jax.Array]:
        return {"rate": current("rate", rate, count)}

    select = functools.partial(select_leaves, mask=mask, min_ndim=2 if ranked else 0)
    return weight_noise(DropConnectState, fixed, scheduled, select, key)


@noise_of(DropConnectState)
def _dropconnect_noise(
    w: jax.Array, key: jax.Array, state: DropConnectState
) -> jax.Array:
    noise = w * kept_or_dropped(key, w, state.rate)
    if state.target_fraction is None:
        return noise
    return jnp.where(
        smallest(jax.lax.stop_gradient(w), state.target_fraction), noise, 0.0
    )
