"""Weight noise as an optax link: what every member of the Bridgeout family shares.

A weight-noise regulariser trains on ``w~ = w + noise(w)`` with a fresh draw per
mini-batch. What it regularises sits in the chain rule, not in the loss: the gradient
taken *at* ``w~`` averages to the plain gradient, and only the pull-back by
``dw~/dw`` carries the penalty. Hence two halves that share one state in the optimiser:

* `noisy_params` rebuilds the current draw and adds it, without touching `params`;
* the link's ``update`` takes gradients from ``w~`` back to ``w`` and moves to the
  next draw.

A member of the family is a state type and a function ``(w, key, state) -> noise``,
differentiable in ``w`` and joined to its state by `noise_of`; its pull-back is the vjp
of that function, so no derivative is written by hand and the two halves cannot
disagree.
"""

import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from jaxprune.optimizers.leaves import name_of, named_leaves

Noise = Callable[[jax.Array, jax.Array, Any], jax.Array]
_AnyNoise = TypeVar("_AnyNoise", bound=Callable[..., jax.Array])

# State type -> (weight, key, state) -> noise to add, like the weight.
NOISES: dict[type, Noise] = {}


def noise_of(state_type: type) -> Callable[[_AnyNoise], _AnyNoise]:
    """Decorates the noise that belongs to a type of state."""

    def register(noise: _AnyNoise) -> _AnyNoise:
        NOISES[state_type] = noise
        return noise

    return register


def noisy_params(params: Any, opt_state: Any) -> Any:
    """Adds the current draw of noise to the parameters.

    Pure: the same arguments give the same weights; the draw only changes when the
    optimiser's ``update`` is called. The noise is held constant, i.e. the result is
    ``params + stop_gradient(noise)``, so the gradient is the same number inside
    (with respect to the noisy weights) and outside (with respect to `params`), and
    the link's pull-back enters once.

    Args:
        params: clean parameters, as given to ``tx.init``.
        opt_state: the optimiser's state; a noise state (`BridgeoutState`,
            `DropConnectState`, `GroupBridgeoutState`) is found in it wherever it lies
            (`optax.chain`, `optax.MultiSteps`, `optax.inject_hyperparams`,
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
        noise = noises.get(name_of(path))
        if noise is None:
            return w
        wide = _widened(w)
        return (wide + jax.lax.stop_gradient(noise(wide))).astype(w.dtype)

    return jax.tree.map_with_path(perturb, params)


def weight_noise(
    state_type: Callable[..., Any],
    fixed: Callable[[], dict[str, Any]],
    scheduled: Callable[[jax.Array], dict[str, Any]],
    select: Callable[[Any], Any],
    key: int | jax.Array,
) -> optax.GradientTransformation:
    """The link of any weight noise in `NOISES`.

    Args:
        state_type: NamedTuple with fields key, count, noised and those of the next two.
        fixed: fields that hold for every draw.
        scheduled: count -> fields that hold for the draw of that count.
        select: params -> paths of the leaves that get noise, see `select_leaves`.
        key: seed or typed key.
    """

    def init(params: Any) -> Any:
        count = jnp.zeros((), jnp.int32)
        own = {"key": typed_key(key), "count": count, "noised": select(params)}
        return state_type(**own, **fixed(), **scheduled(count))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError(
                "the gradients of weight noise are pulled back at the clean weights; "
                "call tx.update(grads, opt_state, params)"
            )
        noises = _noises_of(state, params)
        weights = named_leaves(params)

        def pull_back(path: Any, grad: jax.Array) -> jax.Array:
            noise = noises.get(name := name_of(path))
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
        for state_type in NOISES
        for _, state in optax.tree.get_all_with_path(opt_state, state_type.__name__)
        if isinstance(state, state_type)
    ]
    if not states:
        names = ", ".join(state_type.__name__ for state_type in NOISES)
        raise ValueError(
            f"opt_state holds none of {names}; is jaxprune.bridgeout(...) (or another "
            "weight noise) in the chain whose init made this state, and are the "
            "arguments (params, opt_state)?"
        )
    return states


def _noises_of(state: Any, params: Any) -> dict[str, Callable[[jax.Array], jax.Array]]:
    """Path -> function from a weight to the current draw of its noise."""
    paths = state.noised if isinstance(state.noised, dict) else {}
    if missing := sorted(paths.keys() - named_leaves(params).keys()):
        raise ValueError(
            f"the optimiser's state has noise for {missing[0]!r}, which params lack "
            f"({len(missing)} such of {len(paths)}); was it made by tx.init for "
            "another tree?"
        )
    noise = NOISES[type(state)]

    def draw(path: str) -> Callable[[jax.Array], jax.Array]:
        # crc32 and not hash(): the stream of a path is the same in every process.
        stream = jax.random.fold_in(state.key, zlib.crc32(path.encode()))
        key = jax.random.fold_in(stream, state.count)
        return lambda w: noise(w, key, state)

    return {path: draw(path) for path in paths}


_DOMAINS: dict[str, tuple[Callable[[float], bool], str]] = {
    "rate": (lambda x: 0 <= x < 1, "in [0, 1)"),
    "q": (lambda x: x > 0, "above 0"),
    "inner_q": (lambda x: x >= 1, "at least 1"),
    "eps": (lambda x: x > 0, "above 0"),
    "strength": (lambda x: x >= 0, "at least 0"),
    "vector_strength": (lambda x: x >= 0, "at least 0"),
    "weight_decay": (lambda x: x >= 0, "at least 0"),
    "nonzero_ratio": (lambda x: 0 < x <= 1, "in (0, 1]"),
    "target_fraction": (lambda x: 0 < x <= 1, "in (0, 1]"),
}


def check(name: str, value: Any) -> None:
    """Raises if a hyperparameter is out of range; schedules and tracers pass."""
    if callable(value) or isinstance(value, Tracer):
        return
    inside, domain = _DOMAINS[name]
    if not inside(float(value)):
        raise ValueError(f"{name} must be {domain}, got {value}")


def current(name: str, value: optax.ScalarOrSchedule, count: jax.Array) -> jax.Array:
    """The value of a number or a schedule at a count, checked where it is known."""
    now = value(count) if callable(value) else value
    check(name, now)
    return jnp.array(now, jnp.float32)


def is_ranked(target_fraction: Any) -> bool:
    """Whether weights must be ranked: not if the fraction is known to be 1."""
    return isinstance(target_fraction, Tracer) or target_fraction < 1


def typed_key(key: int | jax.Array) -> jax.Array:
    """The key of a seed, or a copy of a typed key."""
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


def kept_or_dropped(key: jax.Array, w: jax.Array, rate: jax.Array) -> jax.Array:
    """The random factor of the family, like `w`: mean 0, variance rate / (1 - rate).

    It is ``rate / (1 - rate)`` where a weight is kept, with probability ``1 - rate``,
    and -1 where it is dropped.
    """
    # Rounded down by at most 2^-32; a rate of 0 drops nothing.
    threshold = (rate.astype(jnp.float32) * jnp.float32(2**32)).astype(jnp.uint32)
    dropped = random_words(key, w.shape) < threshold
    rate = rate.astype(w.dtype)
    return jnp.where(dropped, -1.0, rate / (1 - rate))


def random_words(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Uniform words uint32, of half the random bits.

    Every second word is the one before with its halves swapped: each is uniform, and
    two of a pair compare with a threshold independently unless the upper half of one
    ties with it, which has probability 2^-16. The pairs lie side by side on the last
    axis, so that sharded words are drawn where they are needed.
    """
    *rows, last = shape or (1,)
    words = jax.random.bits(key, (*rows, -(-last // 2)), jnp.uint32)
    pairs = jnp.stack([words, (words << 16) | (words >> 16)], axis=-1)
    return pairs.reshape((*rows, -1))[..., :last].reshape(shape)


def smallest(w: jax.Array, fraction: jax.Array) -> jax.Array:
    """Which inputs of each output filter are small; bool ``[1, ..., 1, in, out]``."""
    leading = tuple(range(w.ndim - 2))
    norms = jnp.sqrt(jnp.sum(w * w, leading, keepdims=True)) if leading else jnp.abs(w)
    return lowest(norms, fraction, axis=-2)


def lowest(x: jax.Array, fraction: jax.Array | float, *, axis: int) -> jax.Array:
    """Which entries along an axis lie below the one of rank ``int(size * fraction)``.

    Entries are not negative. Ranks count from 0 and the comparison is strict, so ties
    with that entry are out.
    """
    size = x.shape[axis]
    # The margin covers the rounding of float32 products: 100 * 0.29 has rank 29.
    rank = jnp.floor(size * jnp.asarray(fraction) * (1 + 1e-6)).astype(jnp.int32)
    # As unsigned integers the bits of floats that are not negative have their order.
    width = jnp.finfo(x.dtype).bits
    bits = jax.lax.bitcast_convert_type(x, f"uint{width}")

    def settle(index: jax.Array, bound: jax.Array) -> jax.Array:
        bit = jnp.asarray(1, bits.dtype) << (width - 2 - index).astype(bits.dtype)
        below = jnp.sum(bits < (bound | bit), axis, jnp.int32, keepdims=True)
        return jnp.where(below <= rank, bound | bit, bound)

    # The largest number with at most `rank` entries below it is the entry of that rank,
    # found from its highest bit down: a tenth of the time of a sort.
    begin = jnp.zeros_like(jax.lax.slice_in_dim(bits, 0, 1, axis=axis % x.ndim))
    bound = jax.lax.fori_loop(jnp.int32(0), jnp.int32(width - 1), settle, begin)
    return (bits < bound) | (rank >= size)
