"""Nested widths: what a person asks for, as an order of units and counts of them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxprune import scores as scoring
from jaxprune.core._checks import concrete_array, whole_number
from jaxprune.core._groups import Group, Groups
from jaxprune.core._names import listed, nearest
from jaxprune.core._positions import BoolArray
from jaxprune.core._types import PyTree
from jaxprune.surgery._permuting import can_permute, refuse_fixed, sources


class Nested(NamedTuple):
    """Widths that nest.

    Attributes:
        order: group name -> int ``[size]``, the old unit at every place, so that every
            width keeps the first units of a group (of each of its blocks).
        ranks: likewise for writers of a stream, which keep their places all the same.
        counts: for every width, the widest first, group name -> how many units stay.
    """

    order: Mapping[str, np.ndarray]
    ranks: Mapping[str, np.ndarray]
    counts: tuple[Mapping[str, int], ...]


def nested(
    groups: Groups,
    variables: PyTree,
    keeps: Sequence[Mapping[str, object]],
    order: Mapping[str, object] | None,
) -> Nested:
    """Sorts the units of every group so that every width is a prefix.

    Raises:
        ValueError: if widths do not nest, a group is missing from one of them or does
            not exist, or a width is out of range.
        TypeError: if a width is no mapping, or holds neither bools nor a count.
    """
    _check_names(groups, keeps)
    names = list(keeps[0])
    units = {name: [each[name] for each in keeps] for name in names}
    ranked = [name for name in names if _needs_scores(groups[name], units[name])]
    scores = _scores(groups, variables, ranked, order)
    found = {
        name: _one_group(groups[name], units[name], scores.get(name)) for name in names
    }
    return Nested(
        {name: each[0] for name, each in found.items() if not groups[name].stream},
        {name: each[0] for name, each in found.items() if groups[name].stream},
        tuple({n: found[n][1][i] for n in names} for i in range(len(keeps))),
    )


def sorted_keeps(groups: Groups, widths: Nested) -> list[dict[str, np.ndarray]]:
    """For every width the units that stay of the network with its units sorted.

    Of a group the first ones. A writer keeps its own choice, which now stands where
    the stream that it is added to has put it.
    """
    placed = {}
    for name, rank in widths.ranks.items():
        placed[name] = np.argsort(rank)[_old_units(groups, name, widths.order)]
    return [
        {
            name: placed[name] < n if name in placed else prefix(groups[name], n)
            for name, n in counts.items()
        }
        for counts in widths.counts
    ]


def _old_units(groups: Groups, name: str, order: Mapping[str, np.ndarray]) -> Any:
    """The unit of a writer that stands at every place once its stream is sorted."""
    group = groups[name]
    member = group.members[0]
    source = sources(groups, order).get((member.path, member.axis))
    if source is None:
        return np.arange(group.size)
    unit_at = np.full(groups.shapes[member.path][member.axis], -1)
    unit_at[member.index[:, 0]] = np.arange(group.size)
    return unit_at[source[member.index[:, 0]]]


def fused(groups: Groups, keep: Mapping[str, BoolArray]) -> dict[str, np.ndarray]:
    """What streams keep whose writers are pruned independently: what any writer keeps.

    The zero padding match of SP-Net: a unit of a stream goes once no writer keeps it.

    Args:
        groups: what ``trace(..., writers=...)`` returned.
        keep: group name -> bool ``[size]``, True = kept; writers that are not named
            are whole.

    Returns:
        `keep`, with all streams of the writers named in it.

    Raises:
        ValueError: if no group in `keep` is a writer.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprune
        >>> def block(p, x):
        ...     return jax.nn.relu(x @ p["a"] + x @ p["b"]) @ p["c"]
        >>> shapes = {"a": (2, 3), "b": (2, 3), "c": (3, 1)}
        >>> params = {name: jnp.ones(shape) for name, shape in shapes.items()}
        >>> groups = jaxprune.trace(block, params, jnp.ones((1, 2)), writers="*")
        >>> writers = [name for name, group in groups.items() if group.stream]
        >>> one, two = np.array([True, False, False]), np.array([False, False, True])
        >>> fused(groups, dict(zip(writers, (one, two))))["a:1"]
        array([ True, False,  True])

    References:
        Kuratsu and Nakamura, `Slimmable Pruned Neural Networks
        <https://arxiv.org/abs/2212.03415>`_, 2022
    """
    found = {name: np.asarray(units) for name, units in keep.items()}
    streams = {group.stream for name, group in groups.items() if name in found}
    streams -= {"", "pinned"}
    if not streams:
        raise ValueError(
            "keep names no writer of a stream that can be cut; trace with writers='*'"
        )
    while streams:  # those first that wait for no other
        ready = [
            s
            for s in streams
            if not any(groups[name].stream == s for name in streams - {s})
        ]
        for stream in ready:
            own = [name for name, group in groups.items() if group.stream == stream]
            whole = np.ones(groups[stream].size, bool)
            found[stream] = np.logical_or.reduce([found.get(n, whole) for n in own])
            above = groups[stream].stream
            streams |= {above} - {"", "pinned"}
        streams -= set(ready)
    return found


def prefix(group: Group, count: int) -> np.ndarray:
    """Keeps the first units of a group, as many of every block."""
    own = np.arange(group.size // group.blocks) < count // group.blocks
    return np.tile(own, group.blocks)


def _check_names(groups: Groups, keeps: Sequence[Mapping[str, object]]) -> None:
    if isinstance(keeps, Mapping) or not len(keeps):
        raise ValueError(
            "keeps must be a sequence of widths, the widest first, each a mapping "
            "group name -> bools or a count"
        )
    for i, each in enumerate(keeps):
        if not isinstance(each, Mapping):
            raise TypeError(
                f"keeps[{i}] must be a mapping group name -> bools or a count, got "
                f"{type(each).__name__}"
            )
    for i, each in enumerate(keeps):
        for name in each:
            if name not in groups.by_name:
                raise ValueError(
                    f"keeps[{i}] names the group {name!r}, which does not exist"
                    f"{nearest(name, groups)}"
                )
            other = next((j for j, own in enumerate(keeps) if name not in own), None)
            if other is not None:
                raise ValueError(
                    f"keeps[{i}] cuts the group {name}, but keeps[{other}] does not "
                    f"name it; every width says how many units it has, all "
                    f"{groups[name].size} if it loses none"
                )


def _is_count(units: Any) -> bool:
    return np.ndim(units) == 0


def _needs_scores(group: Group, units: Sequence[object]) -> bool:
    counted = [n for n in units if _is_count(n) and n != group.size]
    return bool(counted) and (can_permute(group) or bool(group.stream))


def _one_group(
    group: Group, units: Sequence[object], scores: np.ndarray | None
) -> tuple[np.ndarray, list[int]]:
    """The order of the units of one group, and how many every width keeps."""
    levels = np.zeros(group.size)  # in how many widths with bools a unit stays
    before: tuple[int, np.ndarray] | None = None
    counts = []
    for i, own in enumerate(units):
        if _is_count(own):
            counts.append(_checked_count(group, i, own))
            continue
        kept = _checked_bools(group, i, own)
        if before is not None and (kept & ~before[1]).any():
            unit = int(np.flatnonzero(kept & ~before[1])[0])
            raise ValueError(
                f"keeps[{i}][{group.name}] keeps unit {unit}, which keeps[{before[0]}] "
                "cuts; widths must nest, the widest first"
            )
        before = i, kept
        counts.append(int(kept.sum()))
        levels += kept
    for i in range(1, len(counts)):
        if counts[i] > counts[i - 1]:
            raise ValueError(
                f"keeps[{i}][{group.name}] keeps {counts[i]} units, more than the "
                f"{counts[i - 1]} of keeps[{i - 1}]; widths must nest, the widest first"
            )
    return _sorted(group, levels, scores), counts


def _sorted(group: Group, levels: np.ndarray, scores: np.ndarray | None) -> np.ndarray:
    """Units of every block: those in more widths first, then those that matter more."""
    own = np.zeros(group.size) if scores is None else scores
    block = np.arange(group.size) // (group.size // group.blocks)
    order = np.lexsort((np.arange(group.size), -own, -levels, block))
    if not group.stream and (order != np.arange(group.size)).any():
        refuse_fixed(group)
    return order


def _checked_count(group: Group, i: int, count: object) -> int:
    what = f"keeps[{i}][{group.name}]"
    if isinstance(count, bool | np.bool_):
        raise TypeError(f"{what} must be a count or bools [{group.size}], got {count}")
    found = whole_number(what, count)
    if found > group.size:
        raise ValueError(f"{what} is {found}, but the group has {group.size} units")
    if found % group.blocks:
        raise ValueError(
            f"{what} is {found}, but must be a multiple of its {group.blocks} blocks"
        )
    return found


def _checked_bools(group: Group, i: int, units: Any) -> np.ndarray:
    what = f"keeps[{i}][{group.name}]"
    kept = concrete_array(what, units)
    if kept.dtype != np.bool_:
        raise TypeError(f"{what} must be bools (True = kept) or a count, {kept.dtype}")
    if kept.shape != (group.size,):
        raise ValueError(
            f"{what} has shape {kept.shape}, but the group has {group.size} units"
        )
    per_block = kept.reshape(group.blocks, -1).sum(1)
    if not per_block.all() or (per_block != per_block[0]).any():
        raise ValueError(
            f"{what} keeps {listed(per_block.astype(str).tolist())} units of its "
            f"{group.blocks} blocks; every width keeps the same number of "
            "each, at least 1"
        )
    return kept


def _scores(
    groups: Groups,
    variables: PyTree,
    names: Sequence[str],
    order: Mapping[str, Any] | None,
) -> dict[str, np.ndarray]:
    """Scores of the units of these groups; by default those of `importance`."""
    given = {}
    for name, each in (order or {}).items():
        if name not in groups.by_name:
            raise ValueError(
                f"order names the group {name!r}, which does not exist"
                f"{nearest(name, groups)}"
            )
        own = np.asarray(concrete_array(f"order[{name}]", each), np.float64)
        if own.shape != (groups[name].size,) or not np.isfinite(own).all():
            raise ValueError(
                f"order[{name}] must be {groups[name].size} finite scores, one for "
                f"every unit, got shape {own.shape}"
            )
        given[name] = own
    missing = [name for name in names if name not in given]
    return {**importance(groups, variables, only=missing), **given}


def importance(
    groups: Groups, variables: PyTree, *, only: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """How much units matter: the scale of their BatchNorm, else the norm of weights.

    A group behind BatchNorm (a leaf ``scale`` beside a ``mean``, or with the same path
    in ``batch_stats``) is rated by ``|gamma|``, any other by the L2 norm of everything
    that its units occupy.

    Args:
        groups: what `trace` returned.
        variables: tree that they were traced with; concrete.
        only: names of groups; None for all.

    Returns:
        Group name -> float ``[size]``, larger matters more.

    Example:
        >>> import jax.numpy as jnp, jaxprune
        >>> params = {"w1": jnp.array([[1.0, 2.0]]), "w2": jnp.array([[0.0], [0.0]])}
        >>> mlp = lambda params, x: x @ params["w1"] @ params["w2"]
        >>> groups = jaxprune.trace(mlp, params, jnp.ones((1, 1)))
        >>> importance(groups, params)
        {'w1:1': array([1., 2.], dtype=float32)}
    """
    chosen = {name: groups[name] for name in (groups if only is None else only)}
    scaled = {n: g for n, g in chosen.items() if _has_batch_norm(groups, g)}
    others = {n: g for n, g in chosen.items() if n not in scaled}
    found: dict[str, Any] = {}
    if scaled:
        part = Groups(scaled, (), groups.shapes, groups.treedef)
        found |= scoring.group_scores(part, scoring.batch_norm_scale(variables))
    if others:
        part = Groups(others, (), groups.shapes, groups.treedef)
        found |= scoring.group_scores(part, variables)
    return {name: np.asarray(found[name]) for name in chosen}


def _has_batch_norm(groups: Groups, group: Group) -> bool:
    layers = {
        path.rpartition("/")[0].removeprefix("batch_stats/")
        for path in groups.shapes
        if path.rpartition("/")[2] == "mean"
    }
    scales = [m.path for m in group.members if m.path.rpartition("/")[2] == "scale"]
    return any(
        path.rpartition("/")[0].removeprefix("params/") in layers for path in scales
    )
