"""Widths as counts: one factor for all groups, or what a threshold leaves of each."""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxprune.core._checks import concrete_array, number, whole_number
from jaxprune.core._groups import Groups
from jaxprune.core._limits import selected
from jaxprune.core._types import Array

Counts = dict[str, int]


def uniform(
    groups: Groups,
    shares: Sequence[float],
    *,
    multiple_of: int = 1,
    only: str | Sequence[str] | None = None,
) -> list[Counts]:
    """The same share of every group, for several shares: the widths of S-Net.

    A count is the nearest multiple, but never below nine tenths of the share, nor
    above the group.

    Args:
        groups: what `trace` returned.
        shares: of the units, in (0, 1], the largest first.
        multiple_of: counts are multiples of this (the authors' code: 8).
        only: names, labels or patterns of the groups; None for all.

    Returns:
        For every share, group name -> how many units stay.

    Raises:
        ValueError: if a share is out of range, or a pattern matches no group.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprune
        >>> mlp = lambda params, x: x @ params["w1"] @ params["w2"]
        >>> params = {"w1": jnp.ones((1, 10)), "w2": jnp.ones((10, 1))}
        >>> groups = jaxprune.trace(mlp, params, jnp.ones((1, 1)))
        >>> uniform(groups, (1.0, 0.5, 0.25))
        [{'w1:1': 10}, {'w1:1': 5}, {'w1:1': 3}]
        >>> uniform(groups, (0.5,), multiple_of=4)
        [{'w1:1': 8}]

    References:
        Yu et al., `Slimmable Neural Networks <https://arxiv.org/abs/1812.08928>`_, 2018
    """
    step = whole_number("multiple_of", multiple_of)
    names = selected(groups, only, "groups")
    found = []
    for share in shares:
        if not 0 < number("shares", share) <= 1:
            raise ValueError(f"shares must be in (0, 1], got {share}")
        found.append({name: _count(groups, name, share, step) for name in names})
    return found


def _count(groups: Groups, name: str, share: float, step: int) -> int:
    size, parts = groups[name].size, groups[name].blocks
    wanted, step = share * size, int(np.lcm(step, parts))
    count = max(step, int(wanted + step / 2) // step * step)
    if count < 0.9 * wanted:
        count += step
    return min(count, size)


def threshold_counts(
    groups: Groups,
    scores: Mapping[str, Array],
    *,
    keep_ratio: float,
    min_ratio: float = 0.1,
) -> Counts:
    r"""How many units of every group score above one threshold for all.

    The threshold is the score at place :math:`\lfloor (1 - r) N \rfloor` of all N
    scores in ascending order. Of a group of size C at least
    :math:`\lfloor min\_ratio \cdot C \rfloor` stay, and one.

    Args:
        groups: what `trace` returned for the base network.
        scores: group name -> float ``[size]``: BatchNorm scales; concrete.
        keep_ratio: r, the share of all units to keep, in (0, 1].
        min_ratio: the least share of a group.

    Returns:
        Group name -> count, for the groups of `scores`; the counts grow with r.

    Raises:
        ValueError: if a ratio is out of range, a name is no group, there are none, or
            scores are not finite or of another size.

    Example:
        >>> import jax, numpy as np
        >>> from jaxprune.core._groups import Group, Groups
        >>> two = {"a": Group("a", 4, ()), "b": Group("b", 4, ())}
        >>> groups = Groups(two, (), {}, jax.tree.structure({}))
        >>> scores = {"a": np.array([5.0, 6, 7, 8]), "b": np.array([1.0, 2, 3, 9])}
        >>> threshold_counts(groups, scores, keep_ratio=0.5)
        {'a': 2, 'b': 1}

    References:
        Kuratsu and Nakamura, `Slimmable Pruned Neural Networks
        <https://arxiv.org/abs/2212.03415>`_, 2022; the rule of its code

        Liu et al., `Learning Efficient Convolutional Networks through Network Slimming
        <https://arxiv.org/abs/1708.06519>`_, 2017
    """
    if not 0 < number("keep_ratio", keep_ratio) <= 1:
        raise ValueError(f"keep_ratio must be in (0, 1], got {keep_ratio}")
    if not 0 <= number("min_ratio", min_ratio) <= 1:
        raise ValueError(f"min_ratio must be in [0, 1], got {min_ratio}")
    for name in scores:
        selected(groups, name, "groups")
    if not scores:
        raise ValueError(
            f"scores are of no group; give those of some of the {len(groups)} groups"
        )
    every = {n: concrete_array(f"scores[{n}]", own) for n, own in scores.items()}
    for name, own in every.items():
        if own.shape != (groups[name].size,) or not np.isfinite(own).all():
            raise ValueError(
                f"scores[{name}] must be {groups[name].size} finite numbers, one for "
                f"every unit, got shape {own.shape}"
            )
    if keep_ratio == 1:  # the rule itself would lose the lowest
        return {name: groups[name].size for name in every}
    ranked = np.sort(np.concatenate(list(every.values())))
    threshold = ranked[int(len(ranked) * (1 - keep_ratio))]
    return {
        name: max(int((own > threshold).sum()), int(min_ratio * own.size), 1)
        for name, own in every.items()
    }


def multi_base(groups: Groups, found: Sequence[Mapping[str, int]]) -> list[Counts]:
    """Widths of SP-Net: the whole network, then what was found in several bases.

    Each width is pruned from a base network of suitable size, which is trained by
    itself; bases of one architecture have the same group names. What is kept of the
    bases are counts. A count above that of the width before is cut to it, so that the
    widths nest.

    Args:
        groups: of the widest network.
        found: for every narrower width, the largest first, what `threshold_counts`
            left of its base.

    Returns:
        For every width, the whole network first, group name -> count.

    Raises:
        ValueError: if a name is no group of the widest network, there are none, or a
            count is no whole number of at least 1.

    Example:
        >>> import jax
        >>> from jaxprune.core._groups import Group, Groups
        >>> two = {"a": Group("a", 8, ()), "b": Group("b", 8, ())}
        >>> groups = Groups(two, (), {}, jax.tree.structure({}))
        >>> multi_base(groups, [{"a": 6, "b": 2}, {"a": 3, "b": 4}])
        [{'a': 8, 'b': 8}, {'a': 6, 'b': 2}, {'a': 3, 'b': 2}]

    References:
        Kuratsu and Nakamura, `Slimmable Pruned Neural Networks
        <https://arxiv.org/abs/2212.03415>`_, 2022
    """
    names = list(dict.fromkeys(name for each in found for name in each))
    for name in names:
        selected(groups, name, "groups")
    if not names:
        raise ValueError("found holds no width; give one for every base")
    for i, each in enumerate(found):
        for name, count in each.items():
            whole_number(f"found[{i}][{name}]", count)
    widths = [{name: groups[name].size for name in names}]
    for each in found:
        before = widths[-1]
        widths.append({n: min(each.get(n, before[n]), before[n]) for n in names})
    return widths
