"""Clusters of units by features of theirs, and cuts that leave one of every cluster."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxprune.core._checks import concrete_array, whole_number
from jaxprune.core._clusters import first_units
from jaxprune.core._groups import Group, Groups
from jaxprune.core._limits import fraction, fractions
from jaxprune.core._masks import expand_masks
from jaxprune.select._ranking import unit_scores


def by_features(
    groups: Groups,
    features: Mapping[str, Any],
    *,
    count: int | Mapping[str, int] | None = None,
    most: Mapping[str, int] | None = None,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Puts units with close features into one cluster, by k-means.

    Features are whatever tells units apart: images that excite them
    (`taps.exciting_inputs`), rows of a kernel.

    Args:
        groups: what `trace` returned.
        features: group name -> float ``[size, ...]``; groups that are not named are
            left alone.
        count: how many clusters, of all groups or by name; None for the elbow: of some
            counts up to half of the units, the one where the sum of squares lies
            furthest below the line between the first and the last.
        most: group name -> never more clusters than this.
        seed: of the starts.

    Returns:
        Group name -> int32 ``[size]``, the cluster of every unit, counted in the order
        of their first units. Units of equal features share one.

    Raises:
        ImportError: if scikit-learn is missing.
        ValueError: if a group does not exist, features have another length or are not
            finite, or a count is out of range.

    Example:
        >>> import jax.numpy as jnp, jaxprune
        >>> def net(params, x):
        ...     return jnp.maximum(x @ params["w1"], 0) @ params["w2"]
        >>> params = {"w1": jnp.ones((1, 4)), "w2": jnp.ones((4, 1))}
        >>> groups = jaxprune.trace(net, params, jnp.ones((1, 1)))
        >>> features = {"w1:1": np.array([[0.0], [5.0], [0.1], [5.1]])}
        >>> by_features(groups, features, count=2)
        {'w1:1': array([0, 1, 0, 1], dtype=int32)}
    """
    found = {}
    for name, own in features.items():
        rows = _rows(groups, name, own)
        wanted = count.get(name) if isinstance(count, Mapping) else count
        limit = min((most or {}).get(name, len(rows)), len(np.unique(rows, axis=0)))
        if wanted is None:
            ids = _elbow(rows, limit, seed)
        else:
            if not 1 <= whole_number(f"count of {name}", wanted) <= len(rows):
                raise ValueError(
                    f"count of {name} must be 1 to {len(rows)}, its units, got {wanted}"
                )
            ids = _k_means(rows, min(wanted, limit), seed)[0]
        _, numbers = np.unique(first_units(ids), return_inverse=True)
        found[name] = numbers.astype(np.int32)
    return found


def _rows(groups: Groups, name: str, features: Any) -> np.ndarray:
    size = _known(groups, name).size
    rows = concrete_array(f"features[{name}]", features)
    if len(rows) != size:
        raise ValueError(
            f"features[{name}] has {len(rows)} rows, but the group has {size} units"
        )
    rows = rows.reshape(size, -1).astype(np.float64)
    if not np.isfinite(rows).all():
        raise ValueError(f"features[{name}] are not finite")
    return rows


# scikit-learn's annotation knows only "auto".
_STARTS: dict[str, Any] = {"n_init": 4}


def _k_means(rows: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, float]:
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise ImportError(
            "clusters.by_features needs scikit-learn: pip install jaxprune[experiments]"
        ) from error
    found = KMeans(count, **_STARTS, random_state=seed).fit(rows)
    assert found.labels_ is not None and found.inertia_ is not None
    return found.labels_, float(found.inertia_)


def _elbow(rows: np.ndarray, limit: int, seed: int) -> np.ndarray:
    last = max(1, min(limit, (len(rows) + 1) // 2))
    counts = np.unique(np.geomspace(1, last, 8).round().astype(int))
    tried = [_k_means(rows, int(count), seed) for count in counts]
    squares = np.array([each for _, each in tried])
    if len(counts) < 3 or not squares[0] > 0:
        return tried[-1][0]
    along = (counts - counts[0]) / (counts[-1] - counts[0])
    below = squares[0] + along * (squares[-1] - squares[0]) - squares
    return tried[int(np.argmax(below))][0]


def within_clusters(
    groups: Groups,
    scores: Mapping[str, Any],
    clusters: Mapping[str, Any],
    *,
    sparsity: float | Mapping[str, float],
) -> dict[str, np.ndarray]:
    """Removes as large a share of every cluster, its lowest scores first.

    No cluster is emptied, so what a unit does is done by another that stays. Of a group
    of n units ``round(sparsity * n)`` go: from every cluster in proportion to its size,
    the remainder where the shares were rounded down furthest.

    Args:
        groups: what `trace` returned.
        scores: group name -> float ``[size]``, larger matters more.
        clusters: group name -> int ``[size]``, the cluster of every unit.
        sparsity: fraction of the units to remove, of all groups in `clusters`; or group
            name -> fraction.

    Returns:
        Group name -> bool ``[size]``, True = kept.

    Raises:
        ValueError: if fewer units would stay than there are clusters, a group comes in
            blocks, or scores or clusters do not fit the groups.

    Example:
        >>> import jax.numpy as jnp, jaxprune
        >>> def net(params, x):
        ...     return jnp.maximum(x @ params["w1"], 0) @ params["w2"]
        >>> params = {"w1": jnp.ones((1, 4)), "w2": jnp.ones((4, 1))}
        >>> groups = jaxprune.trace(net, params, jnp.ones((1, 1)))
        >>> one = {"w1:1": np.array([9.0, 8.0, 7.0, 1.0])}  # unit 3 is alone
        >>> ids = {"w1:1": np.array([0, 0, 0, 1])}
        >>> within_clusters(groups, one, ids, sparsity=0.5)
        {'w1:1': array([ True, False, False,  True])}

    References:
        Qin et al., `Functionality-Oriented Convolutional Filter Pruning
        <https://arxiv.org/abs/1810.07322>`_, 2019
    """
    if not isinstance(sparsity, Mapping):
        sparsity = dict.fromkeys(clusters, sparsity)
    keep = {}
    for name, share in fractions(groups, sparsity, None).items():
        group = _known(groups, name)
        if name not in clusters or group.blocks > 1:
            what = f"comes in {group.blocks} blocks that lose as many units each"
            what = what if name in clusters else "has no clusters"
            raise ValueError(f"group {name} {what}; leave it out of sparsity")
        values = np.asarray(unit_scores(name, group.size, scores))
        ids = concrete_array(f"clusters[{name}]", clusters[name])
        if ids.shape != (group.size,):
            raise ValueError(
                f"clusters[{name}] has shape {ids.shape}, but the group has "
                f"{group.size} units"
            )
        gone = round(fraction(f"sparsity of {name}", share) * group.size)
        keep[name] = _cut(name, values, ids, gone)
    return keep


def _cut(name: str, scores: np.ndarray, ids: np.ndarray, gone: int) -> np.ndarray:
    _, ids, sizes = np.unique(ids, return_inverse=True, return_counts=True)
    if gone > len(ids) - len(sizes):
        raise ValueError(
            f"{name} is to lose {gone} of {len(ids)} units, but it has {len(sizes)} "
            "clusters of which each keeps one; ask for fewer clusters"
        )
    wanted = gone * sizes / len(ids)
    counts = np.minimum(np.floor(wanted).astype(int), sizes - 1)
    while counts.sum() < gone:
        counts[np.argmax(np.where(counts < sizes - 1, wanted - counts, -np.inf))] += 1
    kept = np.ones(len(ids), bool)
    for number, count in enumerate(counts):
        own = np.flatnonzero(ids == number)
        # Of equal scores the earlier stays.
        order = np.lexsort((-own, scores[own]))
        kept[own[order[:count]]] = False
    return kept


def _known(groups: Groups, name: str) -> Group:
    if name not in groups:
        expand_masks(groups, {name: np.ones(0, bool)})  # says what there is instead
    return groups[name]
