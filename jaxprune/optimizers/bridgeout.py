"""Bridgeout: noise on the weights that amounts to a bridge (L_q) penalty.

A weight-noise regulariser trains on ``w~ = w + noise(w)`` with a fresh draw per
mini-batch. What it regularises sits in the chain rule, not in the loss: the gradient
taken *at* ``w~`` averages to the plain gradient, and only the pull-back by
``dw~/dw`` carries the penalty. Hence two halves that share one state in the optimiser:

* `noisy_params` rebuilds the current draw and adds it, without touching `params`;
* the link's ``update`` takes gradients from ``w~`` back to ``w`` and moves to the
  next draw.

The second half of this file is that protocol, for any noise. A member of the family
is a state type and a function ``(w, key, state) -> noise``, differentiable in ``w``
and named in `_NOISES`; its pull-back is the vjp of that function, so no derivative
is written by hand and the two halves cannot disagree.
"""

import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer


class BridgeoutState(NamedTuple):
    """What `noisy_params` needs to rebuild the current draw; no noise is stored.

    Attributes:
        key: typed key; the draw of a leaf depends on it, the leaf's path and `count`.
        count: int32 scalar, how many draws are behind.
        rate: float32 scalar, drop probability of the current draw.
        q: float32 scalar, norm of the penalty of the current draw.
        eps: float32 scalar, added to every magnitude.
        target_fraction: float32 scalar, or None if every weight gets noise.
        noised: paths of the leaves that get noise; a dict of None, so that they are
            part of the tree's structure and known while tracing.
    """

    key: jax.Array
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
            with fewer than two axes, or if ``update`` gets no `params`.
        TypeError: if `key` is no key, or `mask` holds something other than bools or
            selects a leaf that is not floating.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from jaxprune.optimizers import bridgeout, noisy_params
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
    _check("rate", rate)
    _check("q", q)
    _check("target_fraction", target_fraction)
    _check("eps", eps)
    # Known to be 1 means no ranking at all; a traced fraction is ranked to be safe.
    ranked = isinstance(target_fraction, Tracer) or target_fraction < 1

    def fixed() -> dict[str, jax.Array | None]:
        fraction = jnp.array(target_fraction, jnp.float32) if ranked else None
        return {"eps": jnp.array(eps, jnp.float32), "target_fraction": fraction}

    def scheduled(count: jax.Array) -> dict[str, jax.Array]:
        return {"rate": _at("rate", rate, count), "q": _at("q", q, count)}

    select = functools.partial(_select, mask=mask, min_ndim=2 if ranked else 0)
    return _weight_noise(BridgeoutState, fixed, scheduled, select, key)


def _bridgeout_noise(w: jax.Array, key: jax.Array, state: BridgeoutState) -> jax.Array:
    kept = jax.random.bernoulli(key, 1 - state.rate, w.shape)
    rate, q, eps = (x.astype(w.dtype) for x in (state.rate, state.q, state.eps))
    noisy = w != 0
    # The inner `where` keeps the power away from 0, where its slope is infinite: the
    # outer one alone would send inf * 0 = nan into the vjp.
    spread = (jnp.abs(jnp.where(noisy, w, 1.0)) + eps) ** (q / 2)
    xi = jnp.where(kept, rate / (1 - rate), -1.0)
    if state.target_fraction is not None:
        noisy &= _smallest(jax.lax.stop_gradient(w), state.target_fraction)
    return jnp.where(noisy, spread * xi, 0.0)


def _smallest(w: jax.Array, fraction: jax.Array) -> jax.Array:
    """Which inputs of each output filter are small; bool ``[1, ..., 1, in, out]``."""
    leading = tuple(range(w.ndim - 2))
    norms = jnp.sqrt(jnp.sum(w * w, leading, keepdims=True)) if leading else jnp.abs(w)
    size = w.shape[-2]
    # The margin covers the rounding of float32 products: 100 * 0.29 has rank 29.
    rank = jnp.floor(size * fraction * (1 + 1e-6)).astype(jnp.int32)
    ordered = jnp.sort(norms, axis=-2)
    threshold = jax.lax.dynamic_slice_in_dim(ordered, rank, 1, axis=w.ndim - 2)
    return (norms < threshold) | (rank >= size)


# (weight, key, state) -> noise to add, like the weight
_NOISES: dict[type, Callable[[jax.Array, jax.Array, Any], jax.Array]] = {
    BridgeoutState: _bridgeout_noise,
}


def noisy_params(params: Any, opt_state: Any) -> Any:
    """Adds the current draw of noise to the parameters.

    Pure: the same arguments give the same weights; the draw only changes when the
    optimiser's ``update`` is called. The noise is held constant, i.e. the result is
    ``params + stop_gradient(noise)``, so the gradient is the same number inside
    (with respect to the noisy weights) and outside (with respect to `params`), and
    the link's pull-back enters once.

    Args:
        params: clean parameters, as given to ``tx.init``.
        opt_state: the optimiser's state; `BridgeoutState` is found in it wherever it
            lies (`optax.chain`, `optax.MultiSteps`, `optax.inject_hyperparams`,
            `optax.masked`, `optax.partition`, ...). Several are used together if no
            leaf gets noise from two of them.

    Returns:
        Tree like `params`, same dtypes. For evaluation use `params` themselves.

    Raises:
        ValueError: if there is no noise in `opt_state`, if a leaf gets it twice, or if
            `params` lack a leaf that should get it.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> from jaxprune.optimizers import bridgeout, noisy_params
        >>> params = {"kernel": jnp.full((4, 3), 0.25), "bias": jnp.ones(3)}
        >>> opt_state = bridgeout(rate=0.5, q=1.0).init(params)
        >>> noisy = noisy_params(params, opt_state)  # 0.25 +- 0.25 ** 0.5
        >>> sorted({f"{w:.2f}" for w in np.ravel(noisy["kernel"])})
        ['-0.25', '0.75']
        >>> noisy["bias"]
        Array([1., 1., 1.], dtype=float32)

    References:
        Khan, Stavness, `Pruning Convolutional Filters using Batch Bridgeout
        <https://arxiv.org/abs/2009.10893>`_, 2020
    """
    noises: dict[str, Callable[[jax.Array], jax.Array]] = {}
    for state in _noise_states(opt_state):
        found = _noises_of(state, params)
        if twice := sorted(noises.keys() & found.keys()):
            raise ValueError(
                f"opt_state holds several noise states for {twice[0]!r}, so its noise "
                "is ambiguous; keep one, or give them disjoint masks"
            )
        noises |= found

    def perturb(path: Any, w: jax.Array) -> jax.Array:
        noise = noises.get(_name(path))
        if noise is None:
            return w
        wide = _widened(w)
        return (wide + jax.lax.stop_gradient(noise(wide))).astype(w.dtype)

    return jax.tree.map_with_path(perturb, params)


def _weight_noise(
    state_type: Callable[..., Any],
    fixed: Callable[[], dict[str, Any]],
    scheduled: Callable[[jax.Array], dict[str, Any]],
    select: Callable[[Any], Any],
    key: int | jax.Array,
) -> optax.GradientTransformation:
    """The link of any weight noise in `_NOISES`.

    Args:
        state_type: NamedTuple with fields key, count, noised and those of the next two.
        fixed: fields that hold for every draw.
        scheduled: count -> fields that hold for the draw of that count.
        select: params -> paths of the leaves that get noise, see `_select`.
        key: seed or typed key.
    """

    def init(params: Any) -> Any:
        count = jnp.zeros((), jnp.int32)
        own = {"key": _typed_key(key), "count": count, "noised": select(params)}
        return state_type(**own, **fixed(), **scheduled(count))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError(
                "the gradients of weight noise are pulled back at the clean weights; "
                "call tx.update(grads, opt_state, params)"
            )
        noises = _noises_of(state, params)
        weights = _named_leaves(params)

        def pull_back(path: Any, grad: jax.Array) -> jax.Array:
            noise = noises.get(name := _name(path))
            if noise is None:
                return grad
            w = _widened(weights[name])
            _, vjp = jax.vjp(noise, w)
            wide = grad.astype(w.dtype)
            return (wide + vjp(wide)[0]).astype(grad.dtype)

        # The draw pulled back here was made with the values in `state`; what
        # `scheduled` gives now is for the next draw.
        count = jnp.asarray(optax.safe_increment(state.count))
        pulled = jax.tree.map_with_path(pull_back, updates)
        return pulled, state._replace(count=count, **scheduled(count))

    return optax.GradientTransformation(init, update)


def _noise_states(opt_state: Any) -> list[Any]:
    states = [
        # One leaf per field; flattening also unwraps boxes such as Flax NNX variables.
        state_type(
            *(x if isinstance(x, dict | None) else jax.tree.leaves(x)[0] for x in state)
        )
        for state_type in _NOISES
        for _, state in optax.tree.get_all_with_path(opt_state, state_type.__name__)
        if isinstance(state, state_type)
    ]
    if not states:
        names = ", ".join(state_type.__name__ for state_type in _NOISES)
        raise ValueError(
            f"opt_state holds none of {names}; is jaxprune.bridgeout(...) in the chain "
            "whose init made this state, and are the arguments (params, opt_state)?"
        )
    return states


def _noises_of(state: Any, params: Any) -> dict[str, Callable[[jax.Array], jax.Array]]:
    """Path -> function from a weight to the current draw of its noise."""
    paths = state.noised if isinstance(state.noised, dict) else {}
    if missing := sorted(paths.keys() - _named_leaves(params).keys()):
        raise ValueError(
            f"the optimiser's state has noise for {missing[0]!r}, which params lack "
            f"({len(missing)} such of {len(paths)}); was it made by tx.init for "
            "another tree?"
        )
    noise = _NOISES[type(state)]

    def draw(path: str) -> Callable[[jax.Array], jax.Array]:
        # crc32 and not hash(): the stream of a path is the same in every process.
        stream = jax.random.fold_in(state.key, zlib.crc32(path.encode()))
        key = jax.random.fold_in(stream, state.count)
        return lambda w: noise(w, key, state)

    return {path: draw(path) for path in paths}


def _select(params: Any, mask: Any, min_ndim: int) -> Any:
    """Paths of the leaves that get noise, as the keys of a dict."""
    leaves = _named_leaves(params)
    if not leaves:
        # optax.tree.map_params calls init on an empty stand-in for the parameters; a
        # single leaf there matches the dict of any real state.
        return jnp.zeros((), bool)
    chosen = _default_mask(params) if mask is None else _as_mask(mask, params)
    noised = {name: None for name in leaves if chosen[name]}
    if not noised:
        raise ValueError(
            f"none of the {len(leaves)} leaves ({', '.join(list(leaves)[:5])}, ...) "
            "gets noise; give a mask that is True for some leaf (the default takes "
            "kernels of two axes or more)"
        )
    for name in noised:
        shape, dtype = leaves[name].shape, leaves[name].dtype
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"mask selects {name!r} of dtype {dtype}, expected floats")
        if len(shape) < min_ndim:
            raise ValueError(
                f"target_fraction ranks the inputs of each output filter, but {name!r} "
                f"has shape {shape}; leave it out of the mask"
            )
    return noised


# What Flax, Haiku and Equinox call them. The number of axes alone does not tell:
# attention biases, and biases and scales stacked over scanned layers, have two.
_NOT_KERNELS = frozenset({"bias", "b", "scale", "offset"})


def _default_mask(params: Any) -> dict[str, bool]:
    return {
        name: np.ndim(w) >= 2
        and jnp.issubdtype(w.dtype, jnp.floating)
        and name.rsplit("/", 1)[-1] not in _NOT_KERNELS
        for name, w in _named_leaves(params).items()
    }


def _as_mask(mask: Any, params: Any) -> dict[str, bool]:
    tree = mask(params) if callable(mask) else mask
    for path, flag in jax.tree.leaves_with_path(tree):
        if np.shape(flag) != () or np.asarray(flag).dtype.kind != "b":
            raise TypeError(
                f"mask[{_name(path)!r}] is {flag!r}, expected one bool per leaf (True ="
                " gets noise); elementwise pruning masks go elsewhere"
            )
    try:
        full = jax.tree.map(lambda m, sub: jax.tree.map(lambda _: m, sub), tree, params)
    except ValueError as error:
        raise ValueError(f"mask is no prefix of params: {error}") from error
    return {name: bool(flag) for name, flag in _named_leaves(full).items()}


_DOMAINS: dict[str, tuple[Callable[[float], bool], str]] = {
    "rate": (lambda x: 0 <= x < 1, "in [0, 1)"),
    "q": (lambda x: x > 0, "above 0"),
    "eps": (lambda x: x > 0, "above 0"),
    "target_fraction": (lambda x: 0 < x <= 1, "in (0, 1]"),
}


def _check(name: str, value: Any) -> None:
    if callable(value) or isinstance(value, Tracer):
        return
    inside, domain = _DOMAINS[name]
    if not inside(float(value)):
        raise ValueError(f"{name} must be {domain}, got {value}")


def _at(name: str, value: optax.ScalarOrSchedule, count: jax.Array) -> jax.Array:
    current = value(count) if callable(value) else value
    _check(name, current)
    return jnp.array(current, jnp.float32)


def _typed_key(key: int | jax.Array) -> jax.Array:
    dtype, shape = jnp.result_type(key), jnp.shape(key)
    if jnp.issubdtype(dtype, jax.dtypes.prng_key) and shape == ():
        # A copy: donating the state's buffers must not delete the caller's key.
        return jnp.copy(key)
    if not jnp.issubdtype(dtype, jnp.integer) or shape != ():
        raise TypeError(
            f"key must be an int or a typed key such as jax.random.key(0), got {key!r};"
            " wrap raw uint32 keys with jax.random.wrap_key_data"
        )
    return jax.random.key(key)


def _widened(w: jax.Array) -> jax.Array:
    return w.astype(jnp.float32) if jnp.finfo(w.dtype).bits < 32 else w


def _name(path: Any) -> str:
    # A variable's box (Flax NNX Variable, Linen Partitioned) is not part of its name:
    # the state may be made with boxes and updated without.
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _named_leaves(tree: Any) -> dict[str, Any]:
    return {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
