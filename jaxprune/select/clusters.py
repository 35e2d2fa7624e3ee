"""Clusters: which units of a group are to become one.

A cluster is drawn together while training (`jaxprune.training._centripetal`) and is
one unit afterwards (`jaxprune.merge`). Clusters are plain data, group -> the number of
every unit's cluster, made here or by hand.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxprune.core._checks import concrete_array, refuse_traced
from jaxprune.core._clusters import check_mergeable, first_units, units_first
from jaxprune.core._groups import Group, Groups
from jaxprune.core._leaves import named_leaves, parameter_paths
from jaxprune.core._limits import Each
from jaxprune.core._types import Array, PyTree
from jaxprune.select._features import by_features as by_features
from jaxprune.select._features import within_clusters as within_clusters
from jaxprune.select._similarity import distances as distances
from jaxprune.select._similarity import similar as similar
from jaxprune.select._units import per_group


def k_means(
    groups: Groups,
    variables: PyTree,
    *,
    sparsity: float | Mapping[str, float],
    multiple_of: Each[int] = 1,
    only: str | Sequence[str] | None = None,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Puts units with similar kernels into one cluster.

    Lloyd's algorithm from ten starts (k-means++) on everything that makes a unit and
    has two axes or more: on a residual stream the kernels of all layers that write it,
    side by side. Biases and normalisation are not looked at, as in the paper.

    Args:
        groups: what ``trace(..., roles=True)`` returned.
        variables: tree that `groups` was traced with; concrete.
        sparsity: fraction of units that merging is to remove, in [0, 1], so a group of
            n units gets ``n - round(sparsity * n)`` clusters, the widths of
            `select.per_group`; or group name -> fraction. Groups that are not named
            are left alone.
        multiple_of: the number of clusters is rounded to the nearest multiple; or name
            or pattern -> multiple.
        only: names, labels or patterns of the groups to cluster; None for all whose
            units can be merged.
        seed: of the starts.

    Returns:
        Group name -> int32 ``[size]``, the cluster of every unit, counted in order of
        their first units; no cluster is empty. The clusters of a balanced group lie in
        its blocks, as many in each.

    Raises:
        ImportError: if scikit-learn is missing.
        ValueError: if a pattern matches nothing, no group can be merged, or one that is
            asked for cannot (the text names the place in the program).

    Example:
        >>> import jax, jax.numpy as jnp, jaxprune
        >>> def net(params, x):
        ...     return jax.nn.relu(x @ params["w1"]) @ params["w2"]
        >>> params = {"w1": jnp.array([[1.0, 5.0, 1.1, 5.2]]), "w2": jnp.ones((4, 1))}
        >>> groups = jaxprune.trace(net, params, jnp.ones((1, 1)), roles=True)
        >>> k_means(groups, params, sparsity=0.5)
        {'w1:1': array([0, 1, 0, 1], dtype=int32)}

    References:
        Ding et al., `Centripetal SGD for Pruning Very Deep Convolutional Networks With
        Complicated Structure <https://arxiv.org/abs/1904.03837>`_, CVPR 2019, Sec. 3.2
    """
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise ImportError(
            "clusters.k_means needs scikit-learn: pip install jaxprune[experiments]; "
            "clusters.even and clusters.imbalanced need nothing"
        ) from error
    refuse_traced("clusters.k_means", variables=variables)
    leaves = named_leaves(variables)

    def split(group: Group, units: slice, count: int) -> np.ndarray:
        rows = _kernels(groups, group, leaves)[units]
        if count == len(rows):
            return np.arange(count)
        _, alike = np.unique(rows, axis=0, return_inverse=True)
        if alike.max() < count:  # more clusters than there are different units
            return _refined(alike.ravel(), count)
        found = KMeans(count, **_STARTS, random_state=seed).fit_predict(rows)
        return _refined(found, count)

    return _clusters(groups, sparsity, multiple_of, only, split)


def even(
    groups: Groups,
    *,
    sparsity: float | Mapping[str, float],
    multiple_of: Each[int] = 1,
    only: str | Sequence[str] | None = None,
) -> dict[str, np.ndarray]:
    """Puts neighbouring units into clusters of equal size, whatever they are like.

    Where the sizes cannot be equal, the first clusters have one unit more.

    Args:
        groups: what ``trace(..., roles=True)`` returned.
        sparsity: as in `k_means`, and so are the others.
        multiple_of: of the number of clusters.
        only: the groups to cluster.

    Returns:
        As `k_means`.

    Raises:
        ValueError: as `k_means`.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprune
        >>> def net(params, x):
        ...     return jax.nn.relu(x @ params["w1"]) @ params["w2"]
        >>> params = {"w1": jnp.ones((1, 5)), "w2": jnp.ones((5, 1))}
        >>> groups = jaxprune.trace(net, params, jnp.ones((1, 1)), roles=True)
        >>> even(groups, sparsity=0.6)
        {'w1:1': array([0, 0, 0, 1, 1], dtype=int32)}

    References:
        Ding et al., `Centripetal SGD <https://arxiv.org/abs/1904.03837>`_, 2019
    """

    def split(group: Group, units: slice, count: int) -> np.ndarray:
        del group
        parts = np.array_split(np.arange(units.stop - units.start), count)
        return np.repeat(np.arange(count), [len(part) for part in parts])

    return _clusters(groups, sparsity, multiple_of, only, split)


def imbalanced(
    groups: Groups,
    *,
    sparsity: float | Mapping[str, float],
    multiple_of: Each[int] = 1,
    only: str | Sequence[str] | None = None,
) -> dict[str, np.ndarray]:
    """Puts the first units into one large cluster, and every other alone.

    The paper's control: how much does it matter who is drawn to whom?

    Args:
        groups: what ``trace(..., roles=True)`` returned.
        sparsity: as in `k_means`, and so are the others.
        multiple_of: of the number of clusters.
        only: the groups to cluster.

    Returns:
        As `k_means`.

    Raises:
        ValueError: as `k_means`.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprune
        >>> def net(params, x):
        ...     return jax.nn.relu(x @ params["w1"]) @ params["w2"]
        >>> params = {"w1": jnp.ones((1, 5)), "w2": jnp.ones((5, 1))}
        >>> groups = jaxprune.trace(net, params, jnp.ones((1, 1)), roles=True)
        >>> imbalanced(groups, sparsity=0.4)
        {'w1:1': array([0, 0, 0, 1, 2], dtype=int32)}

    References:
        Ding et al., `Centripetal SGD <https://arxiv.org/abs/1904.03837>`_, 2019
    """

    def split(group: Group, units: slice, count: int) -> np.ndarray:
        del group
        large = units.stop - units.start - count
        return np.maximum(np.arange(units.stop - units.start) - large, 0)

    return _clusters(groups, sparsity, multiple_of, only, split)


# scikit-learn's annotation knows only "auto".
_STARTS: dict[str, Any] = {"n_init": 10}


def _clusters(
    groups: Groups,
    sparsity: float | Mapping[str, float],
    multiple_of: Each[int],
    only: str | Sequence[str] | None,
    split: Callable[[Group, slice, int], np.ndarray],
) -> dict[str, np.ndarray]:
    """Clusters of the groups asked for; `split` is called for every block of each."""
    if only is None and not isinstance(sparsity, Mapping):
        only = [name for name, group in groups.items() if not group.obstacle]
        if not only:
            for name in groups:
                check_mergeable(groups, name)
            raise ValueError("there are no groups")
    flat = {name: np.zeros(group.size) for name, group in groups.items()}
    kept = per_group(
        groups, flat, sparsity=sparsity, multiple_of=multiple_of, only=only
    )
    found = {}
    for name, keep in kept.items():
        group = check_mergeable(groups, name)
        size, count = group.size // group.blocks, int(keep.sum()) // group.blocks
        blocks = [
            count * k + split(group, slice(size * k, size * (k + 1)), count)
            for k in range(group.blocks)
        ]
        _, numbers = np.unique(first_units(np.concatenate(blocks)), return_inverse=True)
        found[name] = numbers.astype(np.int32)
    return found


def _kernels(groups: Groups, group: Group, leaves: Mapping[str, Array]) -> np.ndarray:
    """What makes every unit, side by side: ``[size, weights]``."""
    trained = parameter_paths(groups.shapes)
    makers = [m for m in group.members if m.role == "producer" and m.path in trained]
    kernels = [m for m in makers if len(groups.shapes[m.path]) > 1] or makers
    rows = [units_first(concrete_array(m.path, leaves[m.path]), m) for m in kernels]
    return np.concatenate(rows, axis=1).astype(np.float32)


def _refined(ids: np.ndarray, count: int) -> np.ndarray:
    """The same clusters, the largest split until there are so many."""
    ids = np.unique(ids, return_inverse=True)[1].ravel()
    for number in range(ids.max() + 1, count):
        largest = np.bincount(ids).argmax()
        ids[np.flatnonzero(ids == largest)[-1]] = number
    return ids
