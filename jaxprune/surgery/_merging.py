"""Merging: trim units that are equal without changing what a function computes.

Pruning removes what hardly matters; merging removes what is there twice. Of units that
are equal one stays, and whoever reads them reads the one that stays with the sum of
their weights. Nothing is lost and nothing has to be fine-tuned.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.core._checks import concrete_array, refuse_traced
from jaxprune.core._clusters import checked_clusters, units_first
from jaxprune.core._groups import Groups
from jaxprune.core._leaves import named_leaves
from jaxprune.core._masks import expand_masks
from jaxprune.core._types import ApplyFn, PyTree
from jaxprune.narrowing._narrow import narrow
from jaxprune.surgery._consumers import rewrite_consumers
from jaxprune.surgery._slicing import slice_params


class Merged(NamedTuple):
    """What is left when the units of every cluster are one.

    Attributes:
        variables: smaller, as `slice_params` makes them; run them with
            ``narrow(apply_fn, masks)``.
        masks: tree like the variables before; one unit of every cluster is kept.
        deviation: group -> how unequal the units were, see `deviation`.
    """

    variables: PyTree
    masks: PyTree
    deviation: dict[str, float]


def merge(
    variables: PyTree,
    groups: Groups,
    clusters: Mapping[str, np.ndarray],
    scores: Mapping[str, Any] | None = None,
) -> Merged:
    r"""Makes one unit of every cluster, losslessly where its units are equal.

    One unit :math:`k` of a cluster :math:`H` stays as it is. Every consumer reads
    it with the summed weight of all units of the cluster,

    .. math:: W_{:,k} \leftarrow \sum_{j \in H} W_{:,j},

    and the others are sliced away, in all producers and consumers. Which members are
    which comes from the trace, so streams with shortcuts, concatenation, depthwise
    convolution, flattening, attention heads and recurrence need no care.

    Args:
        variables: tree that `groups` was traced with; arrays, concrete or traced.
        groups: what ``trace(..., roles=True)`` returned.
        clusters: group -> int ``[size]``, the cluster of every unit; any numbers.
            Groups that are not named stay whole.
        scores: group -> float ``[size]``: of every cluster the unit with the largest
            stays (of BatchNorm's scale, say, where units are only alike). Of equal
            ones, and of groups without scores, the first.

    Returns:
        `Merged`. ``narrow(apply_fn, masks)(merged.variables, ...)`` equals ``apply_fn(
        variables, ...)`` to float rounding if all deviations are 0; `merge_error` says
        how far off it is if not.

    Raises:
        ValueError: if a group does not exist or its units cannot be merged (the text
            names the place in the program), or if clusters or scores have another
            length.
        TypeError: if clusters are not integers, or a consumer is not floating.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np, jaxprune
        >>> def mlp(params, x):
        ...     return jax.nn.relu(x @ params["w1"]) @ params["w2"]
        >>> params = {"w1": jnp.ones((3, 4)), "w2": jnp.arange(8.0).reshape(4, 2)}
        >>> x = jnp.ones((1, 3))
        >>> groups = jaxprune.trace(mlp, params, x, roles=True)
        >>> merged = jaxprune.merge(params, groups, {"w1:1": np.array([0, 0, 0, 1])})
        >>> merged.variables["w2"]
        Array([[6., 9.],
               [6., 7.]], dtype=float32)
        >>> jaxprune.narrow(mlp, merged.masks)(merged.variables, x) - mlp(params, x)
        Array([[0., 0.]], dtype=float32)

    References:
        Ding et al., `Centripetal SGD for Pruning Very Deep Convolutional Networks With
        Complicated Structure <https://arxiv.org/abs/1904.03837>`_, CVPR 2019, Sec. 3.3
    """
    refuse_traced("merge", clusters=dict(clusters))
    stay = {
        name: _representatives(name, checked_clusters(groups, name, ids), scores or {})
        for name, ids in clusters.items()
    }
    summed = variables
    for name, unit in stay.items():
        stands_for = unit[:, None] == np.arange(len(unit))
        summed = rewrite_consumers(summed, groups, name, stands_for)
    keep = {name: unit == np.arange(len(unit)) for name, unit in stay.items()}
    masks = expand_masks(groups, keep)
    off = deviation(variables, groups, clusters)
    return Merged(slice_params(summed, masks), masks, off)


def _representatives(
    name: str, first: np.ndarray, scores: Mapping[str, Any]
) -> np.ndarray:
    """The unit that stays of the cluster of every unit; `first` is its first."""
    if name not in scores:
        return first
    own = concrete_array(f"scores[{name}]", scores[name])
    if own.shape != first.shape or not np.isfinite(own).all():
        raise ValueError(
            f"scores[{name}] must be {len(first)} finite numbers, one for every unit, "
            f"got {own.shape} of {own.dtype}"
        )
    order = np.lexsort((np.arange(len(own)), -own, first))
    starts = np.flatnonzero(np.diff(first[order], prepend=-1))
    stays = np.zeros_like(first)
    stays[first[order[starts]]] = order[starts]
    return stays[first]


def deviation(
    variables: PyTree, groups: Groups, clusters: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    r"""How unequal the units of each cluster are.

    .. math:: \sum_H \sum_{j \in H} \| F_j - \bar F_H \|^2

    over everything that makes the units, normalisation statistics included. Jit-able:
    watch it while a regulariser draws units together.

    Args:
        variables: tree that `groups` was traced with, or its collection ``params``.
        groups: what ``trace(..., roles=True)`` returned.
        clusters: group -> int ``[size]``.

    Returns:
        Group -> float scalar, 0 where units are equal.

    Raises:
        ValueError: as `merge`.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np, jaxprune
        >>> def net(params, x):
        ...     return jax.nn.relu(x @ params["w1"]) @ params["w2"]
        >>> params = {"w1": jnp.array([[1.0, 3.0]]), "w2": jnp.ones((2, 2))}
        >>> groups = jaxprune.trace(net, params, jnp.ones((1, 1)), roles=True)
        >>> off = jaxprune.deviation(params, groups, {"w1:1": np.array([0, 0])})
        >>> float(off["w1:1"])  # (1 - 2)^2 + (3 - 2)^2
        2.0
    """
    leaves = named_leaves(variables)
    found = {}
    for name, ids in clusters.items():
        first = checked_clusters(groups, name, ids)
        total: Any = 0.0
        for member in groups[name].members:
            leaf = leaves.get(member.path, leaves.get(_in_params(member.path)))
            if member.role == "producer" and leaf is not None:
                rows = units_first(leaf, member).astype(np.float32)
                total = total + ((rows - averaging_matrix(first) @ rows) ** 2).sum()
        found[name] = total
    return found


class MergeError(NamedTuple):
    """How far the outputs of a merged model are from those of the whole one.

    Attributes:
        absolute: largest difference of any output.
        relative: that, as a share of the largest output.
    """

    absolute: float
    relative: float


def merge_error(
    apply_fn: ApplyFn,
    variables: PyTree,
    merged: Merged,
    *args: PyTree,
    **kwargs: PyTree,
) -> MergeError:
    """Compares a merged model with the whole one on some inputs.

    Args:
        apply_fn: the function that was traced.
        variables: the variables before merging.
        merged: what `merge` returned for them.
        *args: further arguments of `apply_fn`.
        **kwargs: further arguments of `apply_fn`. Outputs must keep their shape: no
            mutable collections.

    Returns:
        `MergeError`, over all floating outputs.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np, jaxprune
        >>> def net(params, x):
        ...     return jax.nn.relu(x @ params["w1"]) @ params["w2"]
        >>> params = {"w1": jnp.array([[1.0, 3.0]]), "w2": jnp.ones((2, 1))}
        >>> x = jnp.ones((1, 1))
        >>> groups = jaxprune.trace(net, params, x, roles=True)
        >>> merged = jaxprune.merge(params, groups, {"w1:1": np.array([0, 0])})
        >>> jaxprune.merge_error(net, params, merged, x)  # 1 + 1 instead of 1 + 3
        MergeError(absolute=2.0, relative=0.5)
    """
    whole = jax.tree.leaves(apply_fn(variables, *args, **kwargs))
    small_fn = narrow(apply_fn, merged.masks)
    small = jax.tree.leaves(small_fn(merged.variables, *args, **kwargs))
    off = largest = 0.0
    for a, b in zip(whole, small, strict=True):
        if a.size and jnp.issubdtype(a.dtype, jnp.floating):
            off = max(off, float(jnp.max(jnp.abs(a - b))))
            largest = max(largest, float(jnp.max(jnp.abs(a))))
    return MergeError(off, off / largest if largest else 0.0)


def averaging_matrix(first: np.ndarray) -> np.ndarray:
    r"""The matrix :math:`\Gamma`: 1 / cluster size within a cluster, else 0.

    Example:
        >>> averaging_matrix(np.array([0, 1, 0]))
        array([[0.5, 0. , 0.5],
               [0. , 1. , 0. ],
               [0.5, 0. , 0.5]], dtype=float32)
    """
    same = first[:, None] == first[None, :]
    return (same / same.sum(axis=1, keepdims=True)).astype(np.float32)


def _in_params(path: str) -> str:
    return path.removeprefix("params/")
