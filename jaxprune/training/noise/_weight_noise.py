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

import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol, Self, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import KeyPath

from jaxprune.core._leafwise import widened
from jaxprune.core._leaves import keystr, named_leaves
from jaxprune.core._types import PyTree
from jaxprune.training._auto_axes import under_auto_axes
from jaxprune.training._keys import StoredKey, stored_key, typed_key
from jaxprune.training._links import link


class NoiseState(Protocol):
    """What the states of all weight noises have; each adds its hyperparameters.

    Attributes:
        key: words of a key, by the name of its implementation.
        count: int32 scalar, number of the next draw.
        noised: paths of the leaves that get noise, as the keys of a dict of None.
    """

    @property
    def key(self) -> StoredKey: ...
    @property
    def count(self) -> jax.Array: ...
    @property
    def noised(self) -> dict[str, None]: ...
    def __iter__(self) -> Iterator[PyTree]: ...
    def _replace(self, **fields: object) -> Self: ...


Noise = Callable[..., jax.Array]
_AnyNoise = TypeVar("_AnyNoise", bound=Callable[..., jax.Array])

# State type -> (weight, key, state) -> noise to add, like the weight.
NOISES: dict[type, Noise] = {}

# Which draws `noisy_params` was asked for in this process, while tracing or not: the
# types of the states and the paths of their leaves.
_ADDED: set[tuple[str, tuple[str, ...]]] = set()


def noise_of(state_type: type) -> Callable[[_AnyNoise], _AnyNoise]:
    """Decorates the noise that belongs to a type of state."""

    def register(noise: _AnyNoise) -> _AnyNoise:
        NOISES[state_type] = noise
        return noise

    return register


def noisy_params(params: optax.Params, opt_state: optax.OptState) -> PyTree:
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
        >>> from jaxprune.training import bridgeout, noisy_params
        >>> params = {"kernel": jnp.full((4, 3), 0.25), "bias": jnp.ones(3)}
        >>> opt_state = bridgeout(rate=0.5, target_fraction=1.0).init(params)
        >>> noisy = noisy_params(params, opt_state)  # 0.25 +- 0.25
        >>> sorted({f"{w:.2f}" for w in np.ravel(noisy["kernel"])})
        ['0.00', '0.50']
        >>> noisy["bias"]
        Array([1., 1., 1.], dtype=float32)

    References:
        Khan, Stavness, `Pruning Convolutional Filters using Batch Bridgeout
        <https://arxiv.org/abs/2009.10893>`_, 2020
    """
    states = _noise_states(opt_state)
    return under_auto_axes(_perturbed, params, states, like=params)


def _perturbed(params: optax.Params, states: list[NoiseState]) -> PyTree:
    noises: dict[str, Callable[[jax.Array], jax.Array]] = {}
    for state in states:
        _ADDED.add(_who(state))
        found = _noises_of(state, params)
        if twice := sorted(noises.keys() & found.keys()):
            raise ValueError(
                f"opt_state holds several noise states for {twice[0]!r}, so its noise "
                "is ambiguous; keep one, or give them disjoint masks"
            )
        noises |= found

    def perturb(path: KeyPath, w: jax.Array) -> jax.Array:
        noise = noises.get(keystr(path))
        if noise is None:
            return w
        wide = widened(w)
        return (wide + jax.lax.stop_gradient(noise(wide))).astype(w.dtype)

    return jax.tree.map_with_path(perturb, params)


def weight_noise(
    state_type: Callable[..., NoiseState],
    fixed: Callable[[], Mapping[str, object]],
    scheduled: Callable[[jax.Array], Mapping[str, object]],
    select: Callable[[optax.Params], dict[str, None] | jax.Array],
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

    def init(params: optax.Params) -> NoiseState:
        count = jnp.zeros((), jnp.int32)
        own = {"key": stored_key(key), "count": count, "noised": select(params)}
        return state_type(**own, **fixed(), **scheduled(count))

    def update(
        updates: optax.Updates, state: NoiseState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, NoiseState]:
        if params is None:
            raise ValueError(
                "the gradients of weight noise are pulled back at the clean weights; "
                "call tx.update(grads, opt_state, params)"
            )
        _warn_if_never_added(state)
        # The draw pulled back here was made with the values in `state`; what
        # `scheduled` gives now is for the next draw.
        count = jnp.asarray(optax.safe_increment(state.count))
        pulled = under_auto_axes(_pulled_back, updates, state, params, like=updates)
        return pulled, state._replace(count=count, **scheduled(count))

    return link(init, update)


def _pulled_back(
    updates: optax.Updates, state: NoiseState, params: optax.Params
) -> PyTree:
    noises, weights = _noises_of(state, params), named_leaves(params)

    def pull_back(path: KeyPath, grad: jax.Array) -> jax.Array:
        noise = noises.get(name := keystr(path))
        if noise is None:
            return grad
        w = widened(weights[name])
        _, vjp = jax.vjp(noise, w)
        wide = grad.astype(w.dtype)
        return (wide + vjp(wide)[0]).astype(grad.dtype)

    return jax.tree.map_with_path(pull_back, updates)


def _who(state: NoiseState) -> tuple[str, tuple[str, ...]]:
    paths = state.noised if isinstance(state.noised, dict) else {}
    return type(state).__name__, tuple(sorted(paths))


def _warn_if_never_added(state: NoiseState) -> None:
    """Warns, once for these leaves, if their noise was never asked for.

    Python sees each call of `noisy_params` and of ``update`` once per trace, the former
    first in any training step, so this costs nothing in a compiled step.
    """
    if (who := _who(state)) in _ADDED:
        return
    _ADDED.add(who)
    kind = who[0].removesuffix("State")
    warnings.warn(
        f"{kind} got gradients, but jaxprune.noisy_params was never called for its "
        f"{len(who[1])} leaves: gradients taken at the clean weights are not "
        "regularised; take them at noisy_params(params, opt_state)",
        stacklevel=3,
    )


def _noise_states(opt_state: optax.OptState) -> list[NoiseState]:
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


def _noises_of(
    state: NoiseState, params: optax.Params
) -> dict[str, Callable[[jax.Array], jax.Array]]:
    """Path -> function from a weight to the current draw of its noise."""
    paths = state.noised if isinstance(state.noised, dict) else {}
    if missing := sorted(paths.keys() - named_leaves(params).keys()):
        raise ValueError(
            f"the optimiser's state has noise for {missing[0]!r}, which params lack "
            f"({len(missing)} such of {len(paths)}); was it made by tx.init for "
            "another tree?"
        )
    noise, own = NOISES[type(state)], typed_key(state.key)

    def draw(path: str) -> Callable[[jax.Array], jax.Array]:
        # crc32 and not hash(): the stream of a path is the same in every process.
        stream = jax.random.fold_in(own, zlib.crc32(path.encode()))
        key = jax.random.fold_in(stream, state.count)
        return lambda w: noise(w, key, state)

    return {path: draw(path) for path in paths}
