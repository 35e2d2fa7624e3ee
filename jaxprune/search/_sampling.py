"""Samplers: counts drawn at random, for supernets and searches. Jit-able."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.core._checks import whole_number
from jaxprune.core._groups import Groups
from jaxprune.core._limits import selected

Choices = Mapping[str, Sequence[int]]
Side = Literal["first", "last"]
_SIDES: tuple[Side, Side] = ("first", "last")


def choices(
    groups: Groups, bins: int = 20, *, only: str | Sequence[str] | None = None
) -> dict[str, tuple[int, ...]]:
    """The widths that a search may give to every group: equal steps up to the whole.

    Args:
        groups: what `trace` returned.
        bins: how many widths; fewer for groups with fewer units (or blocks of them).
        only: names, labels or patterns of the groups; None for all.

    Returns:
        Group name -> counts, ascending.

    Example:
        >>> import jax
        >>> from jaxprune.core._groups import Group, Groups
        >>> two = {"a": Group("a", 8, ()), "b": Group("b", 2, ())}
        >>> choices(Groups(two, (), {}, jax.tree.structure({})), 4)
        {'a': (2, 4, 6, 8), 'b': (1, 2)}
    """
    whole_number("bins", bins)
    found = {}
    for name in selected(groups, only, "groups"):
        parts = groups[name].blocks
        slots = groups[name].size // parts
        ends = np.arange(1, bins + 1) * slots / bins
        found[name] = tuple(sorted({parts * max(1, round(end)) for end in ends}))
    return found


def draw_counts(key: jax.Array, options: Choices) -> dict[str, jax.Array]:
    """A width for every group, each choice as likely.

    Args:
        key: PRNG key, consumed.
        options: group name -> counts to choose from.

    Returns:
        Group name -> int32 scalar; jit-able.

    Raises:
        ValueError: if a group has no counts to choose from.

    Example:
        >>> int(draw_counts(jax.random.key(0), {"a": (3,)})["a"])
        3
    """
    empty = [name for name, counts in options.items() if not len(counts)]
    if empty:
        raise ValueError(f"options[{empty[0]}] holds no count to draw from")
    keys = jax.random.split(key, max(len(options), 1))
    return {
        name: jax.random.choice(k, jnp.asarray(counts, jnp.int32))
        for k, (name, counts) in zip(keys, options.items(), strict=False)
    }


def sandwich(
    key: jax.Array, options: Choices, number: int = 4
) -> list[dict[str, jax.Array]]:
    """The widest network, the narrowest, and others drawn between: the sandwich rule.

    Args:
        key: PRNG key, consumed.
        options: group name -> counts to choose from.
        number: how many networks, 2 or more.

    Returns:
        Counts of each, the widest and the narrowest first; jit-able.

    Example:
        >>> found = sandwich(jax.random.key(0), {"a": (1, 2, 3)}, 2)
        >>> [int(counts["a"]) for counts in found]
        [3, 1]

    References:
        Yu and Huang, `Universally Slimmable Networks and Improved Training Techniques
        <https://arxiv.org/abs/1903.05134>`_, 2019
    """
    whole_number("number", number, 2)
    ends = [
        {name: jnp.int32(pick(counts)) for name, counts in options.items()}
        for pick in (max, min)
    ]
    keys = jax.random.split(key, max(number - 2, 1))[: number - 2]
    return ends + [draw_counts(k, options) for k in keys]


def complementary(
    groups: Groups, counts: Mapping[str, Any]
) -> tuple[tuple[dict[str, Any], Side], ...]:
    """The four networks that treat every unit alike: BCNet's complementary sampling.

    The first units and the last ones at these widths, then both at the widths that
    are left over: each unit is trained twice, whatever the widths are. A width of the
    whole group has none left over and is taken whole again.

    Args:
        groups: what `trace` returned.
        counts: group name -> count; may be traced.

    Returns:
        ``(counts, side)`` for `side_masks`, four times.

    References:
        Su et al., `BCNet: Searching for Network Width with Bilaterally Coupled Network
        <https://arxiv.org/abs/2105.10533>`_, 2021
    """
    left = {}
    for name, count in counts.items():
        size = groups[name].size
        rest = size - jnp.asarray(count, jnp.int32)
        left[name] = jnp.where(rest > 0, rest, size)
    return tuple((dict(own), side) for own in (counts, left) for side in _SIDES)
