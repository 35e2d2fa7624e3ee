"""Scores from the parameters alone: no data, no gradient."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jax.core import Tracer

from jaxprune.core._checks import check_leaves, finite
from jaxprune.core._leafwise import (
    each_leaf,
    is_float,
    numbers,
    wide,
    widened,
)
from jaxprune.core._leaves import named_leaves
from jaxprune.core._placement import empty, on_host, placed_like
from jaxprune.core._types import Array, ArrayNamespace, PyTree
from jaxprune.scores._lamp import lamp_of_leaf, sharded_lamp, spread
from jaxprune.scores._published import of_weights


@of_weights("l2")
def magnitude(params: PyTree) -> PyTree:
    """The absolute value of every weight, ``|w|``.

    With ``group_scores(reduce="l1")`` a unit scores the L1 norm of its weights, with
    ``reduce="l2"`` their L2 norm.

    Args:
        params: tree of arrays; also variables.

    Returns:
        Tree like `params`: floats of each leaf's shape, None for leaves that are not
        floating point.

    Example:
        >>> import jax.numpy as jnp
        >>> magnitude({"w": jnp.array([-2.0, 1.0]), "steps": jnp.array(3)})
        {'steps': None, 'w': Array([2., 1.], dtype=float32)}

    References:
        Han et al., `Learning both Weights and Connections for Efficient Neural
        Networks <https://arxiv.org/abs/1506.02626>`_, 2015
    """
    return each_leaf(_absolute, params, is_float)


@of_weights("l1")
def l1(params: PyTree) -> PyTree:
    """`magnitude`, for ``group_scores(reduce="l1")``: a unit's L1 norm.

    Args:
        params: tree of arrays; also variables.

    Returns:
        Tree like `params`: ``|w|``.

    Example:
        >>> import jax.numpy as jnp
        >>> l1({"w": jnp.array([-2.0, 1.0])})
        {'w': Array([2., 1.], dtype=float32)}
    """
    return magnitude(params)


@of_weights("l2")
def l2(params: PyTree) -> PyTree:
    """`magnitude`, for ``group_scores(reduce="l2")``, the default: a unit's L2 norm.

    The score of a single weight is the same for every norm; the norm is how the
    weights of a unit add up.

    Args:
        params: tree of arrays; also variables.

    Returns:
        Tree like `params`: ``|w|``.

    Example:
        >>> import jax.numpy as jnp
        >>> l2({"w": jnp.array([-2.0, 1.0])})
        {'w': Array([2., 1.], dtype=float32)}
    """
    return magnitude(params)


@of_weights("sum")
def lp(params: PyTree, p: float) -> PyTree:
    """The absolute value of every weight to the power p, ``|w|^p``.

    With ``group_scores(reduce="sum")`` a unit scores the p-th power of the Lp norm of
    its weights.

    Args:
        params: tree of arrays; also variables.
        p: the order of the norm, above 0.

    Returns:
        Tree like `params` of float32 or wider, None for leaves that are not floating
        point.

    Raises:
        ValueError: if p is not above 0, or the power of the largest weight of a leaf
            is 0 or infinite in its type (NaN under jit, which selection refuses).

    Example:
        >>> import jax.numpy as jnp
        >>> lp({"w": jnp.array([-2.0, 1.0])}, p=3.0)
        {'w': Array([8., 1.], dtype=float32)}
    """
    if not finite("p", p) > 0:
        raise ValueError(f"p must be above 0, got {p}")
    found = each_leaf(_power, params, is_float, p)
    leaves = named_leaves(params)
    for path, powers in named_leaves(found).items():
        if _is_lost(powers, leaves[path]):
            raise ValueError(
                f"the scores of {path} are not finite or all 0: its largest weight to "
                f"the power {p} leaves the range of {powers.dtype}; divide the "
                "parameters by their largest, or rank by a norm, as in "
                "group_scores(groups, params, reduce='l2')"
            )
    return found


def lamp(params: PyTree) -> PyTree:
    """The square of every weight over the squares of all that are not smaller.

    Layer-adaptive magnitude-based pruning: within a leaf, the weights rank by
    magnitude; across leaves, one threshold removes of each leaf what distorts the
    model least::

        score(u) = w_u^2 / sum of w_v^2 over all v of the leaf with |w_v| >= |w_u|

    Equal weights score the same (the paper breaks ties by position), so the largest
    weight of a leaf scores 1 divided by the number of weights as large. An all-zero
    leaf scores 0. A leaf sharded over several devices is ranked in turns: the shards
    pass through all devices, and none ever holds the whole leaf. Inside `jax.jit`,
    where its sharding is not known, XLA sorts it as it sees fit: score before.

    For whole units, ``group_scores(magnitude(params), normalize="lamp")`` puts the
    norms of the units of a group in the place of weights.

    Args:
        params: tree of arrays.

    Returns:
        Tree like `params` of float32 or wider in [0, 1]; None for leaves with fewer
        than two axes (a bias of a few entries would outrank every kernel) and for
        those that are not floating point.

    Example:
        >>> import jax.numpy as jnp
        >>> lamp({"w": jnp.array([[3.0, -1.0], [0.0, -2.0]]), "b": jnp.ones(2)})["w"]
        Array([[1.        , 0.07142857],
               [0.        , 0.30769232]], dtype=float32)

    References:
        Lee et al., `Layer-adaptive sparsity for the Magnitude-based Pruning
        <https://arxiv.org/abs/2010.07611>`_, 2020
    """

    def has_score(leaf: PyTree) -> bool:
        return is_float(leaf) and leaf.ndim > 1

    found = each_leaf(lamp_of_leaf, params, lambda x: has_score(x) and not spread(x))
    return jax.tree.map(
        lambda score, x: sharded_lamp(x) if has_score(x) and spread(x) else score,
        found,
        params,
        is_leaf=lambda leaf: leaf is None,
    )


@of_weights("mean")
def random(params: PyTree, key: jax.Array) -> PyTree:
    """Independent uniform numbers in [0, 1): the control every criterion must beat.

    Units of one group are exchangeable whatever the reduction. Units of different
    groups are not (a sum favours units with more weights), so select per group.

    Args:
        params: tree of arrays or ShapeDtypeStructs.
        key: random key, consumed.

    Returns:
        Tree like `params` of float32, None for leaves that are not floating point.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> random({"w": jnp.zeros((2, 3))}, jax.random.key(0))["w"].shape
        (2, 3)
    """
    check_leaves(params)
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    return treedef.unflatten(
        jax.random.uniform(key, leaf.shape, jnp.float32) if is_float(leaf) else None
        for key, leaf in zip(keys, leaves, strict=True)
    )


@of_weights("l1", "variables")
def batch_norm_scale(params: PyTree, *, name: str = "scale") -> PyTree:
    """The absolute scale factor of every normalisation channel, ``|gamma|``.

    Only the leaves called `name` score, so `group_scores` rates a unit by the scale
    factors of its normalisation layers alone.

    Args:
        params: tree of arrays.
        name: what the scale factors are called: the last part of a leaf's path
            ("scale" in Flax and Haiku, "weight" in Equinox).

    Returns:
        Tree like `params`: ``|gamma|`` for the leaves called `name`, else None.

    Raises:
        ValueError: if no leaf has that name.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"bn": {"scale": jnp.array([-0.5, 1.0]), "bias": jnp.zeros(2)}}
        >>> batch_norm_scale(params)["bn"]
        {'bias': None, 'scale': Array([0.5, 1. ], dtype=float32)}

    References:
        Liu et al., `Learning Efficient Convolutional Networks through Network Slimming
        <https://arxiv.org/abs/1708.06519>`_, 2017
    """
    leaves = named_leaves(params)
    places = [_place(path) for path in leaves]
    _check_called(places, name)
    scored = {
        path: leaf
        for (_, own), (path, leaf) in zip(places, leaves.items(), strict=True)
        if own == name
    }
    found = each_leaf(_absolute, scored, is_float)
    return jax.tree.structure(params).unflatten(map(found.get, leaves))


@of_weights("mean", "variables")
def activation_probability(
    params: PyTree, *, scale: str = "scale", bias: str = "bias"
) -> PyTree:
    """How likely ReLU lets a channel through after BatchNorm, ``Phi(beta/|gamma|)``.

    BatchNorm hands on ``gamma x + beta`` with x standard normal, which is above 0 with
    probability ``Phi(beta / |gamma|)``, Phi the normal distribution function. A
    channel with gamma 0 is constant: 1 if beta is above 0, else 0.

    Args:
        params: tree of arrays.
        scale: what the scale factors are called: the last part of a leaf's path.
        bias: what the shift beside it is called. A layer without one has beta 0.

    Returns:
        Tree like `params`: float32 or wider in [0, 1] for the leaves called `scale`,
        else None.

    Raises:
        ValueError: if no leaf is called `scale`, or none beside it `bias`.

    Example:
        >>> import jax.numpy as jnp
        >>> gamma, beta = jnp.array([1.0, -2.0, 0.0]), jnp.array([0.0, 0.0, -1.0])
        >>> activation_probability({"scale": gamma, "bias": beta})["scale"]
        Array([0.5, 0.5, 0. ], dtype=float32)

    References:
        Shao et al., `BWCP: Probabilistic Learning-to-Prune Channels for ConvNets via
        Batch Whitening <https://arxiv.org/abs/2105.06423>`_, 2021
    """
    leaves = named_leaves(params)
    places = [_place(path) for path in leaves]
    _check_called(places, scale)
    shifts = {
        layer: leaf
        for (layer, own), leaf in zip(places, leaves.values(), strict=True)
        if own == bias
    }
    if not any(own == scale and layer in shifts for layer, own in places):
        raise ValueError(
            f"no leaf called {bias!r} lies beside one called {scale!r}; the leaves are "
            f"called {_called(places)}"
        )
    return jax.tree.structure(params).unflatten(
        _above_zero(leaf, shifts.get(layer)) if own == scale else None
        for (layer, own), leaf in zip(places, leaves.values(), strict=True)
    )


def _above_zero(gamma: Array, beta: Array | None) -> Array:
    given = (gamma,) if beta is None else (gamma, beta)
    if on_host(*given):
        return placed_like(_likelihood(np, *map(numbers, given)), gamma)
    return _likelihood(jnp, *map(widened, given))


def _likelihood(xp: ArrayNamespace, gamma: Array, beta: Array | None = None) -> Array:
    spread = xp.abs(gamma)
    shift = xp.zeros_like(spread) if beta is None else beta
    constant = spread == 0
    ratio = shift / xp.where(constant, xp.ones_like(spread), spread)
    ndtr = scipy.special.ndtr if xp is np else jax.scipy.special.ndtr
    certain = (shift > 0).astype(spread.dtype)
    return xp.where(constant, certain, ndtr(ratio))


def _place(path: str) -> tuple[str, str]:
    """(layer, name) of a leaf; a Flax NNX state ends every path in "value"."""
    layer, _, name = path.removesuffix("/value").rpartition("/")
    return layer, name


def _called(places: list[tuple[str, str]]) -> str:
    return ", ".join(sorted({own for _, own in places}))


def _check_called(places: list[tuple[str, str]], name: str) -> None:
    if name not in {own for _, own in places}:
        raise ValueError(
            f"no leaf is called {name!r}, so nothing scores; the leaves are called "
            f"{_called(places)}"
        )


def _absolute(xp: ArrayNamespace, leaf: Array) -> Array:
    if xp is jnp:
        return jnp.abs(leaf)
    return np.abs(leaf, out=empty(leaf.shape, np.abs(leaf.ravel()[:0]).dtype))


def _power(xp: ArrayNamespace, leaf: Array, p: float) -> Array:
    """NaN throughout if the power of the largest entry leaves the range of its type."""
    sizes = xp.abs(wide(leaf))
    if p <= 1:
        return sizes**p
    largest = xp.max(sizes, initial=0)
    power = largest**p
    lost = (power < jnp.finfo(sizes.dtype).tiny) | ~xp.isfinite(power)
    lost = lost & (largest > 0) & xp.isfinite(largest)
    return xp.where(lost, xp.full_like(sizes, xp.nan), sizes**p)


def _is_lost(powers: PyTree, leaf: PyTree) -> bool:
    """Has `_power` given up on this leaf? Not known where it is traced or far away."""
    if isinstance(powers, Tracer) or not powers.size or not powers.is_fully_addressable:
        return False
    first = (0,) * powers.ndim
    if all(device.platform == "cpu" for device in powers.devices()):
        # numpy reads them in place, without a program.
        powers, leaf = np.asarray(powers), np.asarray(leaf)
    entries = float(powers[first]), float(leaf[first])
    return math.isnan(entries[0]) and not math.isnan(entries[1])
