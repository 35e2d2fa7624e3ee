"""Batch Bridgeout: noise on the weights that amounts to a bridge (L_q) penalty."""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxprune.training._hyperparameters import check, current, is_ranked
from jaxprune.training._keys import StoredKey
from jaxprune.training._leaves import MaskOrFn, select_leaves
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
        unit: ``{"kernel": None}`` if noise is relative to the scale of its kernel,
            ``{"one": None}`` if it is as published; part of the tree's structure.
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
    unit: dict[str, None]
    noised: dict[str, None]


def bridgeout(
    rate: optax.ScalarOrSchedule = 0.1,
    q: optax.ScalarOrSchedule = 1.5,
    *,
    target_fraction: float = 0.75,
    relative: bool = True,
    mask: MaskOrFn = None,
    eps: float = 1e-12,
    key: int | jax.Array = 0,
) -> optax.GradientTransformation:
    r"""Regularises kernels by noise whose mean effect is an L_q penalty.

    Each mini-batch sees the weights through one draw per kernel (Batch Bridgeout),

    .. math::
        \tilde w = w + s \, |w / s|^{q/2} \xi, \qquad
        \xi = \frac{\mathrm{Bernoulli}(1 - rate)}{1 - rate} - 1,

    which has mean :math:`w` and variance :math:`s^{2-q} |w|^q \, rate / (1 - rate)`.
    For a linear model with squared loss this adds, exactly and in expectation,
    :math:`\frac{rate}{1 - rate} s^{2-q} \sum_j |w_j|^q \sum_i x_{ij}^2` to the loss:
    lasso-like at q = 1, ridge-like at q = 2.

    The published noise has s = 1 (``relative=False``). By default s is the root mean
    square of the kernel's nonzero weights, held constant in the slope: the noise is
    then a fixed share of the weights whatever their scale, where the published noise
    is the larger the smaller the weights are, at q < 2: in a net whose kernels are
    around 0.05 more than the weights themselves. So the published noise trains some
    nets badly, at the learning rates that plain SGD likes, and others not at all (see
    docs/batch_bridgeout.md); the relative one trains them all. To make filters
    dispensable as the paper does, it is the published noise that is needed, behind
    BatchNorm and with weight decay: ``bridgeout(0.3, relative=False)``. Both are the
    same at q = 2.

    The link pulls gradients back through the noise: they arrive at :math:`\tilde w`
    (take them at `noisy_params`) and leave multiplied by

    .. math:: d\tilde w / dw = 1 + \frac{q}{2} |w/s|^{q/2 - 1} \mathrm{sgn}(w) \xi,

    after which the count moves to the next draw. `params` always stay clean, so
    scores, weight decay, checkpoints and evaluation read them as they are. Gradients
    taken at the clean weights are not regularised; an ``update`` without any call of
    `noisy_params` before it in this process warns, once for the same leaves.

    Where BatchNorm follows a kernel, the scale of a filter does not matter to the
    function, and noise with q < 2 is the smaller, relative to a filter, the larger the
    filter is: the expected loss falls as a filter grows (at q = 2 it does not change),
    so the mean effect there is no shrinkage. What shrinks weak filters is weight decay;
    the noise has a say in which ones are weak.

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
      time. Name the others static: ``static_args=("target_fraction", "relative",
      "mask", "eps", "key")``.

    A zero weight gets no noise and the factor 1: what a mask holds at zero stays there
    (the gradient itself is the mask's business). For tiny nonzero weights and q < 2 the
    factor keeps its mean of 1 but swings as :math:`|w/s|^{q/2 - 1} \xi`, by up to
    ``q/2 * eps ** (q/2 - 1)`` (750 at q = 1.5, 5e5 at q = 1): at small q follow with
    `optax.clip_by_global_norm`, or raise `eps`.

    Args:
        rate: drop probability, in [0, 1), or a schedule of it; 0 is the identity. The
            authors' 0.3 costs some nets accuracy, those without BatchNorm above all.
        q: norm of the penalty, above 0, or a schedule of it; by default the authors',
            as `target_fraction` is.
        target_fraction: in (0, 1]; below 1 only small weights get noise. Within every
            output filter (last axis) of a kernel ``[..., in, out]`` the ``in``
            entries are ranked, by their norm over the leading (spatial) axes, and
            those strictly below the one of rank ``int(in * target_fraction)`` (from
            0), but at least one, are noisy. Where ``in`` is 1 (a grey stem, a
            depthwise kernel) the weights of a filter are ranked one by one.
        relative: whether noise is in units of its kernel's scale; False is as
            published.
        mask: tree of bool like `params` or a prefix of it, or a function from
            `params` to one; True = the whole leaf gets noise. By default every
            floating leaf of two axes or more, embeddings included, that is not named
            bias, b, scale or offset.
        eps: added to ``|w/s|``, as the authors add it to ``|w|``; above 0.
        key: seed, or one typed key. It is copied into the state and never split: a
            leaf's draw folds in its path and the count, so draws do not change when
            other leaves come or go.

    Returns:
        An `optax.GradientTransformation` with state `BridgeoutState`. Noise is
        computed in float32 at least, dtypes are kept.

    Raises:
        ValueError: if a hyperparameter is out of range (where its value is known), if
            `mask` does not fit `params` or selects nothing, if targeting meets a leaf
            with fewer than two axes, or if
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
        >>> tx = optax.chain(bridgeout(), optax.sgd(0.1, momentum=0.9))
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

    def fixed() -> Mapping[str, object]:
        fraction = jnp.array(target_fraction, jnp.float32) if ranked else None
        unit = {"kernel" if relative else "one": None}
        number = jnp.array(eps, jnp.float32)
        return {"eps": number, "target_fraction": fraction, "unit": unit}

    def scheduled(count: jax.Array) -> dict[str, jax.Array]:
        return {"rate": current("rate", rate, count), "q": current("q", q, count)}

    select = functools.partial(select_leaves, mask=mask, min_ndim=2 if ranked else 0)
    return weight_noise(BridgeoutState, fixed, scheduled, select, key)


@noise_of(BridgeoutState)
def _bridgeout_noise(w: jax.Array, key: jax.Array, state: BridgeoutState) -> jax.Array:
    xi = kept_or_dropped(key, w, state.rate)
    noisy = w != 0
    if state.target_fraction is not None:
        noisy &= smallest(jax.lax.stop_gradient(w), state.target_fraction)
    if "one" in state.unit:
        return bridge_noise(w, xi, state.q, state.eps, noisy)
    unit = jax.lax.stop_gradient(scale(w))
    return unit * bridge_noise(w / unit, xi, state.q, state.eps, noisy)


def scale(w: jax.Array) -> jax.Array:
    """The root mean square of the weights that are not 0; 1 if there are none.

    Zeros do not count, so a kernel has the same scale whether its pruned weights are
    masked or sliced away.
    """
    # In units of the largest weight, so that squares neither vanish nor overflow.
    largest = jnp.max(jnp.abs(w), initial=0.0)
    largest = jnp.where(largest >= jnp.finfo(w.dtype).tiny, largest, 1.0)
    alive = jnp.maximum(jnp.sum(w != 0), 1).astype(w.dtype)
    mean = jnp.sum(jnp.square(w / largest)) / alive
    return jnp.where(mean > 0, largest * jnp.sqrt(mean), 1.0)


def bridge_noise(
    w: jax.Array, xi: jax.Array, q: ArrayLike, eps: ArrayLike, noisy: jax.Array
) -> jax.Array:
    """``(|w| + eps)^(q/2) * xi`` where `noisy` (False at 0), else 0."""
    q, eps = (jnp.asarray(x, w.dtype) for x in (q, eps))
    # The inner `where` keeps the power away from 0, where its slope is infinite: the
    # outer one alone would send inf * 0 = nan into the vjp.
    size = jnp.abs(jnp.where(w != 0, w, 1.0)) + eps
    spread = jnp.exp(q / 2 * jnp.log(size))  # a third of the time of a power
    return jnp.where(noisy, spread * xi, 0.0)
