"""Parted groups: the program treats some of their units by themselves.

Units of a group stand on the same axes of the same leaves. That does not make them
interchangeable: where ``h[:, :4]`` and ``h[:, 4:]`` go separate ways, the first four
are treated otherwise than the rest. A value that holds some units of a group and not
others comes from taking a part of an axis, so it is enough to look there.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from jaxprune.coupling._labels import Axis
from jaxprune.coupling._solution import NONE, Solution
from jaxprune.coupling._walk import Walked

# What takes or overwrites a part of an axis, at positions that are known or not.
_PARTING = frozenset(
    {
        "dynamic_slice",
        "dynamic_update_slice",
        "gather",
        "pad",
        "scatter",
        "scatter-add",
        "scatter-max",
        "scatter-min",
        "scatter-mul",
        "scatter-sub",
        "scatter_add",
        "scatter_max",
        "scatter_min",
        "scatter_mul",
        "scatter_sub",
        "slice",
        "split",
    }
)


def parted(
    solution: Solution, walked: Walked, groups: Sequence[np.ndarray]
) -> set[int]:
    """Which groups have units that the program takes apart.

    Args:
        solution: the ledger, solved.
        walked: the program.
        groups: for every group the classes of its units.

    Returns:
        Numbers of groups.
    """
    of = np.full(len(solution.why) + 1, NONE)  # the last entry speaks of `NONE`
    for number, units in enumerate(groups):
        of[units] = number
    found: set[int] = set()
    seen: dict[int, Axis] = {}
    for axis in _axes(walked):
        if isinstance(axis, int) or id(axis) in seen:
            continue
        seen[id(axis)] = axis
        columns = [c for each in axis for c in solution.atoms(each.units)]
        if not columns:
            continue
        # How often every class stands on the axis; `NONE`, which is -1, is shifted
        # away.
        counts = np.bincount(np.concatenate(columns) + 1, minlength=len(of))[1:]
        for number in set(of[:-1][counts > 0].tolist()) - found - {NONE}:
            own = counts[groups[number]]
            if (own != own[0]).any():
                found.add(number)
    return found


def _axes(walked: Walked) -> Iterator[Axis]:
    """The axes of everything that is taken from or put into a part of something."""
    for step in walked.steps:
        for sub in step.subs:
            yield from _axes(sub)
        if step.eqn.primitive.name in _PARTING:
            for value in (*step.ins, *step.outs):
                yield from value.axes
