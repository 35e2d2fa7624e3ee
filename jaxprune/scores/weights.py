"""Scores from the parameters alone: no data, no gradient."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.masks import PyTree, named_leaves


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
    return jax.tree.map(lambda leaf: jnp.abs(leaf) if _is_float(leaf) else None, params)


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
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    return treedef.unflatten(
        jax.random.uniform(key, leaf.shape, jnp.float32) if _is_float(leaf) else None
        for key, leaf in zip(keys, leaves, strict=True)
    )


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
    # A Flax NNX state ends every path in "value".
    names = [path.removesuffix("/value").split("/")[-1] for path in leaves]
    if name not in names:
        raise ValueError(
            f"no leaf is called {name!r}, so nothing scores; the leaves are called "
            f"{', '.join(sorted(set(names)))}"
        )
    return jax.tree.structure(params).unflatten(
        jnp.abs(leaf) if own == name else None
        for own, leaf in zip(names, leaves.values(), strict=True)
    )


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)
