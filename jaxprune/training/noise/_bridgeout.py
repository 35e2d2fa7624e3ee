"""Batch Bridgeout: noise on the weights that amounts to a bridge (L_q) penalty."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune.training._hyperparameters import check, current, is_ranked
from jaxprune.training._keys import StoredKey
from jaxprune.training._leaves import select_leaves
from jaxprune.training.noise._draws import kept_or_dropped, smallest
from jaxprune.training.noise._weight_noise import noise_of, weight_noise


class BridgeoutState(NamedTuple):
    """What `noisy_params` needs to rebuild the current draw; no noise is stored.

    Attributes:
        key: the words of a key, by the name of its implementation; the draw of a leaf
            depends on it, the leaf's path and `count`.
        count: int32 scalar, how many draws are behind.
        rate: float32 scalar, drop probability of the current draw.
        q: float32 scalar, norm of the penalty of the current draw.
        eps: float32 scalar, added to every magnitude.
        target_fraction: float32 scalar, or None if every weight gets noise.
        noised: paths of the leaves that get noise; a dict of None, so that they are
            part of the tree's structure and known while tracing.
    """

    key: StoredKey
    # Every optax state calls it so, over tuple.count.
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    rate: jax.Array
    q: jax.Array
    eps: jax.Array
    target_fraction: jax.Array | None
    noised: Any


def bridgeout(
    rate: optax.ScalarOrSchedule = 0.5,
    q: optax.ScalarOrSchedule = 1.0,
    *,
    target_fraction: float = 1.0,
    mask: Any = None,
    eps: float = 1e-12,
    key: int | jax.Array = 0,
) -> optax.GradientTransformation:
    r"""Regularises kernels by noise whose mean effect is an L_q penalty.

    Each mini-batch sees the weights through one draw per kernel (Batch Bridgeout),

    .. math::
        \tilde w = w + |w|^{q/2} \xi, \qquad
        \xi = \frac{\mathrm{Bernoulli}(1 - rate)}{1 - rate} - 1,

    which has mean :math:`w` and variance :math:`|w|^q \, rate / (1 - rate)`. For a
    linear model with squared loss this adds, exactly and in expectation,
    :math:`\frac{rate}{1 - rate} \sum_j |w_j|^q \sum_i x_{ij}^2` to the loss: lasso-like
    at q = 1, ridge-like at q = 2.

    The link pulls gradients back through the noise: they arrive at :math:`\tilde w`
    (take them at `noisy_params`) and leave multiplied by

    .. math:: d\tilde w / dw = 1 + \frac{q}{2} |w|^{q/2 - 1} \mathrm{sgn}(w) \xi,

    after which the count moves to the next draw. `params` always stay clean, so
    scores, weight decay, checkpoints and evaluation read them as they are.

    Where it goes:

    * First in `optax.chain`: whatever comes before it would see gradients at the
      noisy weights, and anything nonlinear there distorts the penalty.
    * ``chain(bridgeout(), MultiSteps(tx, k).gradient_transformation())`` gives every
      mini-batch its own draw. Inside `optax.MultiSteps` the draw is held for the k
      mini-batches, since gradients of different draws have no common pull-back: also
      right, but noisier.
    * Likewise outside `optax.apply_if_finite`, which would repeat the draw of a
      rejected step.
    * Under `optax.inject_hyperparams` an injected value reaches the draw one step
      late (noise and pull-back always agree); a schedule given here directly is on
      time. Name the others static: ``static_args=("target_fraction", "mask", "eps",
      "key")``.

    A zero weight gets no noise and the factor 1: what a mask holds at zero stays there
    (the gradient itself is the mask's business). For tiny nonzero weights and q < 2 the
    factor keeps its mean of 1 but swings as :math:`|w|^{q/2 - 1} \xi`, by up to
    ``q/2 * eps ** (q/2 - 1)`` (5e5 at q = 1 and rate = 0.5): follow with
    `optax.clip_by_global_norm`, or raise `eps`.

    Args:
        rate: drop probability, in [0, 1), or a schedule of it; 0 is the identity.
        q: norm of the penalty, above 0, or a schedule of it.
        target_fraction: in (0, 1]; below 1 only small weights get noise. Within every
            output filter (last axis) of a kernel ``[..., in, out]`` the ``in``
            entries are ranked, by their norm over the leading (spatial) axes, and
            those strictly below the one of rank ``int(in * target_fraction)`` (from
            0) are noisy.
        mask: tree of bool like `params` or a prefix of it, or a function from
            `params` to one; True = the whole leaf gets noise. By default every
            floating leaf of two axes or more, embeddings included, that is not named
            bias, b, scale or offset.
        eps: added to ``|w|``, as the authors do; above 0.
        key: seed, or one typed key. It is copied into the state and never split: a
            leaf's draw folds in its path and the count, so draws do not change when
            other leaves come or go.

    Returns:
        An `optax.GradientTransformation` with state `BridgeoutState`. Noise is
        computed in float32 at least, dtypes are kept.

    Raises:
        ValueError: if a hyperparameter is out of range (where its value is known), if
            `mask` does not fit `params` or selects nothing, if targeting meets a leaf
            with fewer than two axes or too few inputs for one to be targeted, or if
            ``update`` gets no `params`.
        TypeError: if `key` is no key, or `mask` holds something other than bools or
            selects a leaf that is not floating.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from jaxprune.training import bridgeout, noisy_params
        >>> def loss_fn(params, batch):
        ...     x, y = batch
        ...     return jnp.mean((x @ params["kernel"] - y) ** 2)
        >>> params = {"kernel": jnp.ones((3, 2))}
        >>> tx = optax.chain(bridgeout(rate=0.5, q=1.0), optax.sgd(0.1, momentum=0.9))
        >>> opt_state = tx.init(params)
        >>> @jax.jit
        ... def step(params, opt_state, batch):
        ...     noisy = noisy_params(params, opt_state)  # where the gradient is taken
        ...     grads = jax.grad(loss_fn)(noisy, batch)
        ...     updates, opt_state = tx.update(grads, opt_state, params)
        ...     return optax.apply_updates(params, updates), opt_state
        >>> batch = jnp.eye(3), jnp.zeros((3, 2))
        >>> for _ in range(3):
        ...     params, opt_state = step(params, opt_state, batch)
        >>> int(optax.tree.get(opt_state, "BridgeoutState").count)
        3

    References:
        Khan, Shah, Stavness, `Bridgeout: Stochastic Bridge Regularization for Deep
        Neural Networks <https://arxiv.org/abs/1804.08042>`_, IEEE Access, 2018

        Khan, Stavness, `Pruning Convolutional Filters using Batch Bridgeout
        <https://arxiv.org/abs/2009.10893>`_, 2020
    """
    check("rate", rate)
    check("q", q)
    check("target_fraction", target_fraction)
    check("eps", eps)
    ranked = is_ranked(target_fraction)

    def fixed() -> dict[str, jax.Array | None]:
        fraction = jnp.array(target_fraction, jnp.float32) if ranked else None
        return {"eps": jnp.array(eps, jnp.float32), "target_fraction": fraction}

    def scheduled(count: jax.Array) -> dict[str, jax.Array]:
        return {"rate": current("rate", rate, count), "q": current("q", q, count)}

    select = functools.partial(
        select_leaves,
        mask=mask,
        min_ndim=2 if ranked else 0,
        target_fraction=target_fraction,
    )
    return weight_noise(BridgeoutState, fixed, scheduled, select, key)


@noise_of(BridgeoutState)
def _bridgeout_noise(w: jax.Array, key: jax.Array, state: BridgeoutState) -> jax.Array:
    xi = kept_or_dropped(key, w, state.rate)
    noisy = w != 0
    if state.target_fraction is not None:
        noisy &= smallest(jax.lax.stop_gradient(w), state.target_fraction)
    return bridge_noise(w, xi, state.q, state.eps, noisy)


def bridge_noise(
    w: jax.Array, xi: jax.Array, q: Any, eps: Any, noisy: jax.Array
) -> jax.Array:
    """``(|w| + eps)^(q/2) * xi`` where `noisy` (False at 0), else 0."""
    q, eps = (jnp.asarray(x, w.dtype) for x in (q, eps))
    # The inner `where` keeps the power away from 0, where its slope is infinite: the
    # outer one alone would send inf * 0 = nan into the vjp.
    size = jnp.abs(jnp.where(w != 0, w, 1.0)) + eps
    spread = jnp.exp(q / 2 * jnp.log(size))  # a third of the time of a power
    return jnp.where(noisy, spread * xi, 0.0)
