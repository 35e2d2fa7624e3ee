"""Group Bridgeout: the noise of a weight grows with the norm of its whole group."""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune.training._hyperparameters import check, current
from jaxprune.training._keys import StoredKey
from jaxprune.training._leaves import MaskOrFn, select_leaves
from jaxprune.training.noise._draws import kept_or_dropped
from jaxprune.training.noise._weight_noise import noise_of, weight_noise


class GroupBridgeoutState(NamedTuple):
    """What `noisy_params` needs to rebuild the current draw; no noise is stored.

    Attributes:
        key: the words of a key, by the name of its implementation; the draw of a leaf
            depends on it, the leaf's path and `count`.
        count: int32 scalar, how many draws are behind.
        rate: float32 scalar, drop probability of the current draw.
        q: float32 scalar, norm of the penalty on the groups' norms.
        inner_q: float32 scalar, norm inside a group.
        eps: float32 scalar, added to every norm.
        groups: ``{"input": None}`` or ``{"output": None}``, part of the structure.
        noised: paths of the leaves that get noise; a dict of None.
    """

    key: StoredKey
    # Every optax state calls it so, over tuple.count.
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    rate: jax.Array
    q: jax.Array
    inner_q: jax.Array
    eps: jax.Array
    groups: dict[str, None]
    noised: dict[str, None]


def group_bridgeout(
    rate: optax.ScalarOrSchedule = 0.5,
    q: optax.ScalarOrSchedule = 1.0,
    *,
    inner_q: float = 2.0,
    groups: Literal["input", "output"] = "input",
    mask: MaskOrFn = None,
    eps: float = 1e-15,
    key: int | jax.Array = 0,
) -> optax.GradientTransformation:
    r"""Regularises whole groups of weights by noise as large as the group.

    With :math:`\|w_g\|` the `inner_q`-norm of all weights of one group,

    .. math::
        \tilde w = w + \|w_g\|^{q/2} \xi, \qquad
        \xi = \frac{\mathrm{Bernoulli}(1 - rate)}{1 - rate} - 1

    with one :math:`\xi` per weight. For a linear model with squared loss and groups
    by input it adds, in expectation,
    :math:`\frac{rate}{1 - rate} \, outputs \sum_g \|w_g\|_{inner}^q \sum_i x_{ig}^2`:
    at q = 1 and inner_q = 2 a group lasso on the weights of each input.

    The variance of one weight is the norm of its group, so the same rate means far
    more noise than in `bridgeout`, and the more so the larger the groups are: for
    kernels of convolutions use rates of a percent or less.

    Used like `bridgeout`: first in `optax.chain`, gradients taken at `noisy_params`. A
    zero weight gets no noise here either, also in a group that is alive (in the
    authors' code it does): what a mask holds at zero stays there.

    Args:
        rate: drop probability, in [0, 1), or a schedule of it; 0 is the identity.
        q: norm of the penalty on the groups' norms, above 0, or a schedule of it.
        inner_q: norm inside a group, at least 1.
        groups: "input", as published, groups all weights that read one input (axis -2
            of a kernel ``[..., in, out]``); "output" those of one output filter.
        mask: which leaves get noise, as in `bridgeout`; by default the kernels.
        eps: added to every norm, as the authors do; above 0.
        key: seed, or one typed key; never split, see `bridgeout`.

    Returns:
        An `optax.GradientTransformation` with state `GroupBridgeoutState`.

    Raises:
        ValueError: if an argument is out of range (where its value is known), if
            `mask` does not fit `params`, selects nothing or a leaf with fewer than two
            axes, or if ``update`` gets no `params`.
        TypeError: if `key` is no key, or `mask` holds something other than bools or
            selects a leaf that is not floating.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxprune.training import group_bridgeout, noisy_params
        >>> params = {"kernel": jnp.array([[3.0, 4.0], [0.3, 0.4]])}
        >>> state = group_bridgeout(rate=0.5, q=1.0).init(params)
        >>> noise = noisy_params(params, state)["kernel"] - params["kernel"]
        >>> jnp.round(noise**2, 4)  # the norms of the rows, 5 and 0.5
        Array([[5. , 5. ],
               [0.5, 0.5]], dtype=float32)

    References:
        Khan, Shah, Stavness, `Bridgeout: Stochastic Bridge Regularization for Deep
        Neural Networks <https://arxiv.org/abs/1804.08042>`_, IEEE Access, 2018; the
        form with groups is from the authors' code.
    """
    check("rate", rate)
    check("q", q)
    check("inner_q", inner_q)
    check("eps", eps)
    if groups not in ("input", "output"):
        raise ValueError(f'groups must be "input" or "output", got {groups!r}')

    def fixed() -> dict[str, object]:
        numbers = {"inner_q": inner_q, "eps": eps}
        arrays = {name: jnp.array(x, jnp.float32) for name, x in numbers.items()}
        return {**arrays, "groups": {groups: None}}

    def scheduled(count: jax.Array) -> dict[str, jax.Array]:
        return {"rate": current("rate", rate, count), "q": current("q", q, count)}

    select = functools.partial(select_leaves, mask=mask, min_ndim=2)
    return weight_noise(GroupBridgeoutState, fixed, scheduled, select, key)


@noise_of(GroupBridgeoutState)
def _group_noise(w: jax.Array, key: jax.Array, state: GroupBridgeoutState) -> jax.Array:
    xi = kept_or_dropped(key, w, state.rate)
    q, inner_q, eps = (x.astype(w.dtype) for x in (state.q, state.inner_q, state.eps))
    own = w.ndim - (2 if "input" in state.groups else 1)
    others = tuple(axis for axis in range(w.ndim) if axis != own)
    # The norm is taken in units of the largest weight, whose powers do not vanish; it
    # does not depend on the unit, which is therefore no part of the slope.
    unit = jax.lax.stop_gradient(jnp.max(jnp.abs(w), others, keepdims=True))
    unit = jnp.where(unit >= jnp.finfo(w.dtype).tiny, unit, 1.0)
    alive = w != 0
    # Powers of 0 have infinite slopes: every `where` keeps them out of the vjp.
    terms = jnp.where(alive, jnp.abs(jnp.where(alive, w / unit, 1.0)) ** inner_q, 0.0)
    total = jnp.sum(terms, others, keepdims=True)
    some = total > 0
    norm = jnp.where(some, unit * jnp.where(some, total, 1.0) ** (1 / inner_q), 0.0)
    return jnp.where(alive, (norm + eps) ** (q / 2) * xi, 0.0)
