"""Members of the Bridgeout family whose noise is per example, so not in the optimiser.

Batch Bridgeout draws one noise per kernel and mini-batch; that is `jaxprune.bridgeout`,
an optax link. Here the noise belongs to each example (`bridgeout_dense`), to the
activations (`sparseout`), or is averaged over (`bridgeout_relu`). These are functions
for inside a model. Differentiate through them as through any other: the regulariser
is in the chain rule, and no pull-back is needed.

They are for training; in evaluation apply the plain layer.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxprune.core._types import Scalar
from jaxprune.training._hyperparameters import check, is_ranked
from jaxprune.training._leaves import reaches
from jaxprune.training.noise._bridgeout import bridge_noise
from jaxprune.training.noise._draws import kept_or_dropped, lowest, smallest


def bridgeout_dense(
    x: jax.Array,
    kernel: jax.Array,
    key: jax.Array,
    *,
    rate: float | jax.Array,
    q: float | jax.Array = 1.0,
    target_fraction: float | jax.Array = 1.0,
    eps: float = 1e-15,
) -> jax.Array:
    r"""Multiplies each example by a noisy kernel of its own (Bridgeout of 2018).

    .. math::
        y_n = x_n (w + |w|^{q/2} \xi_n), \qquad
        \xi_n = \frac{\mathrm{Bernoulli}(1 - rate)}{1 - rate} - 1

    with an independent :math:`\xi_n` for every weight and example. The expected loss is
    that of `jaxprune.bridgeout`, with less variance, since examples do not share a
    draw. It costs ``batch * in * out`` numbers of memory, so it is for dense layers.

    Args:
        x: ``[batch, ..., in]``; one draw for each position of the first axis.
        kernel: ``[in, out]``. Zero weights get no noise.
        key: consumed.
        rate: drop probability in [0, 1).
        q: norm of the penalty, above 0.
        target_fraction: in (0, 1]; below 1 only the smallest inputs of every output
            get noise, see `jaxprune.bridgeout`.
        eps: added to ``|w|``.

    Returns:
        ``[batch, ..., out]``; add the bias to it.

    Raises:
        ValueError: if a number is out of range (where its value is known) or the
            shapes do not fit.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x, kernel = jnp.ones((3, 8)), jnp.full((8, 4), 0.25)
        >>> y = bridgeout_dense(x, kernel, jax.random.key(0), rate=0.5)
        >>> bool((y[0] != y[1]).any())  # equal examples, different noise
        True

    References:
        Khan, Shah, Stavness, `Bridgeout: Stochastic Bridge Regularization for Deep
        Neural Networks <https://arxiv.org/abs/1804.08042>`_, IEEE Access, 2018
    """
    _check(rate=rate, q=q, target_fraction=target_fraction, eps=eps)
    if x.ndim < 2 or kernel.ndim != 2 or x.shape[-1] != kernel.shape[0]:
        raise ValueError(
            "expected x [batch, ..., in] and kernel [in, out], got shapes "
            f"{x.shape} and {kernel.shape}; is the batch axis missing?"
        )
    noisy = kernel != 0
    if is_ranked(target_fraction):
        _check_reach(f"inputs of kernel {kernel.shape}", -2, kernel, target_fraction)
        fraction = jnp.asarray(target_fraction, jnp.float32)
        noisy &= smallest(jax.lax.stop_gradient(kernel), fraction)
    rate = jnp.asarray(rate, jnp.float32)

    def one(example: jax.Array, key: jax.Array) -> jax.Array:
        xi = kept_or_dropped(key, kernel, rate)
        return example @ (kernel + bridge_noise(kernel, xi, q, eps, noisy))

    return jax.vmap(one)(x, jax.random.split(key, x.shape[0]))


def bridgeout_relu(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | float = 0.0,
    *,
    rate: float | jax.Array,
    q: float | jax.Array = 1.0,
    eps: float = 1e-12,
    linear: Callable[[jax.Array, jax.Array], jax.Array] = jnp.matmul,
) -> jax.Array:
    r"""A ReLU layer under Bridgeout, averaged over the noise ("fast" Bridgeout).

    The sum of many noisy weights is nearly normal with mean :math:`\mu = x w + b` and
    variance :math:`s^2 = \frac{rate}{1 - rate} x^2 |w|^q`, so the layer's average is

    .. math:: E[\max(0, y)] = \mu \, \Phi(\mu / s) + s \, \varphi(\mu / s)

    with the distribution function and the density of the standard normal. No random
    number is drawn. (The authors' published code divides by :math:`s^2` instead of
    :math:`s`; this is the corrected form.)

    Args:
        x: input of `linear`, such as ``[batch, in]``.
        kernel: weights, such as ``[in, out]``.
        bias: broadcastable to the output.
        rate: drop probability in [0, 1); 0 is the plain ReLU layer.
        q: norm of the penalty, above 0.
        eps: added to ``|w|``.
        linear: ``(x, kernel) -> output``, linear in both, in which every output sums
            products of an input and a weight that it uses once: a matrix product or a
            convolution.

    Returns:
        What ``relu(linear(x, kernel) + bias)`` returns on average.

    Raises:
        ValueError: if a number is out of range (where its value is known).

    Example:
        >>> import jax.numpy as jnp
        >>> x, kernel = jnp.ones((1, 4)), jnp.zeros((4, 2))
        >>> bridgeout_relu(x, kernel.at[:, 0].set(0.25), rate=0.5, q=2.0)
        Array([[1.0042..., 0.       ]], dtype=float32)

    References:
        Wang and Manning, `Fast dropout training
        <https://proceedings.mlr.press/v28/wang13a.html>`_, ICML, 2013, for the moments;
        Khan, Shah, Stavness, `Bridgeout: Stochastic Bridge Regularization for Deep
        Neural Networks <https://arxiv.org/abs/1804.08042>`_, IEEE Access, 2018
    """
    _check(rate=rate, q=q, eps=eps)
    rate = jnp.asarray(rate, kernel.dtype)
    mean = linear(x, kernel) + bias
    # bridge_noise with half of q doubled is (|w| + eps)^q, safe at 0.
    spread = bridge_noise(
        kernel, jnp.ones_like(kernel), 2 * jnp.asarray(q), eps, kernel != 0
    )
    variance = rate / (1 - rate) * linear(x * x, spread)
    some = variance > 0
    deviation = jnp.sqrt(jnp.where(some, variance, 1.0))
    ratio = mean / deviation
    density = jnp.exp(-ratio * ratio / 2) / math.sqrt(2 * math.pi)
    expected = mean * jax.scipy.special.ndtr(ratio) + deviation * density
    return jnp.where(some, expected, jax.nn.relu(mean))


def sparseout(
    x: jax.Array,
    key: jax.Array,
    *,
    rate: float | jax.Array,
    q: float | jax.Array = 1.0,
    target_fraction: float | jax.Array = 1.0,
    eps: float = 1e-12,
) -> jax.Array:
    r"""Bridgeout's noise on activations: the smaller q, the sparser they become.

    .. math::
        \tilde x = x + |x|^{q/2} \xi, \qquad
        \xi = \frac{\mathrm{Bernoulli}(1 - rate)}{1 - rate} - 1.

    For activations that are not negative q = 2 is dropout.

    Args:
        x: activations ``[batch, ..., channels]``. Zeros stay zero.
        key: consumed.
        rate: drop probability in [0, 1).
        q: norm of the penalty, above 0.
        target_fraction: in (0, 1]; below 1 only the weakest channels of each example
            get noise, by the L2 norm of their feature map, as in
            `jaxprune.models.TargetedDropout`.
        eps: added to ``|x|``.

    Returns:
        Like `x`.

    Raises:
        ValueError: if a number is out of range (where its value is known).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x = jnp.array([[0.0, 1.0, 4.0]])
        >>> noise = sparseout(x, jax.random.key(0), rate=0.5, q=1.0) - x
        >>> jnp.round(noise**2, 4)  # |x|, as rate / (1 - rate) is 1
        Array([[0., 1., 4.]], dtype=float32)

    References:
        Khan and Stavness, `Sparseout: Controlling Sparsity in Deep Networks
        <https://arxiv.org/abs/1904.08050>`_, 2019
    """
    _check(rate=rate, q=q, target_fraction=target_fraction, eps=eps)
    noisy = x != 0
    if is_ranked(target_fraction):
        _check_reach(f"channels of x {x.shape}", -1, x, target_fraction)
        spatial = tuple(range(1, x.ndim - 1))
        energy = jnp.square(jax.lax.stop_gradient(x)).sum(spatial, keepdims=True)
        noisy &= lowest(energy, jnp.asarray(target_fraction, jnp.float32), axis=-1)
    xi = kept_or_dropped(key, x, jnp.asarray(rate, jnp.float32))
    return x + bridge_noise(x, xi, q, eps, noisy)


def _check_reach(what: str, axis: int, x: jax.Array, target_fraction: Scalar) -> None:
    if not reaches(x.shape[axis], target_fraction):
        raise ValueError(
            f"target_fraction={target_fraction} of the {x.shape[axis]} {what} is none, "
            "so nothing would get noise; raise it, or leave this layer without noise"
        )


def _check(**numbers: float | jax.Array) -> None:
    for name, value in numbers.items():
        check(name, value)
