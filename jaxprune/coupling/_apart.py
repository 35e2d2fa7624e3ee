"""Groups of which every block, or every layer, loses units of its own."""

import dataclasses
from collections.abc import Mapping, Sequence

from jaxprune.core._groups import Group, Groups, Member, Reason
from jaxprune.core._names import listed, matching, nearest
from jaxprune.coupling._balance import Apart, Balance
from jaxprune.coupling._labels import Value
from jaxprune.coupling._reasons import text_of

_WHAT = {"balanced": "blocks", "per_layer": "layers"}


def apart_groups(
    groups: Groups,
    balance: Balance,
    variables: Mapping[str, Value],
    options: Mapping[str, Sequence[str]],
) -> Groups:
    """The groups of these names with the units of every block apart, where it may be.

    Args:
        groups: all groups.
        balance: what is known of their blocks.
        variables: the variables by path.
        options: "balanced" and "per_layer" -> patterns.

    Raises:
        ValueError: if a pattern matches no group, or none whose blocks or layers are
            independent; the text says why the first is not.
    """
    named = dict(groups)
    numbers = {name: number for number, name in enumerate(groups)}
    chosen: dict[str, set[str]] = {}
    for option, patterns in options.items():
        for pattern in patterns:
            matched = matching(pattern, groups)
            if not matched:
                raise ValueError(
                    f"{option} pattern {pattern!r} matches none of the groups "
                    f"{listed(groups)}{nearest(pattern, groups)}"
                )
            reasons = {}
            for name in matched:
                both = Apart(*(o in {*chosen.get(name, ()), option} for o in _WHAT))
                found = _apart(groups[name], numbers[name], balance, variables, both)
                if isinstance(found, Group):
                    named[name] = found
                    chosen.setdefault(name, set()).add(option)
                else:
                    reasons[name] = found
            if len(reasons) == len(matched):
                name, why = next(iter(reasons.items()))
                raise ValueError(
                    f"{option} pattern {pattern!r} matches no group with "
                    f"{_WHAT[option]} that may lose units of their own; {name}: {why}"
                )
    return dataclasses.replace(groups, by_name=named)


def _apart(
    group: Group,
    number: int,
    balance: Balance,
    variables: Mapping[str, Value],
    apart: Apart,
) -> Group | str:
    """The group with the units of every block apart, or why they cannot be."""
    places = [(variables[m.path], m.axis) for m in group.members]
    found = balance.index(number, places, apart)
    if isinstance(found, str):
        return found
    blocks, every = found
    axes = [balance.layers(value) if apart.layers else None for value, _ in places]
    members = tuple(
        Member(member.path, member.axis, index, layers=layers)
        for member, index, layers in zip(group.members, every, axes, strict=True)
    )
    lengths = [
        v.shape[a] for (v, _), a in zip(places, axes, strict=True) if a is not None
    ]
    return dataclasses.replace(
        group,
        size=group.size * blocks,
        members=members,
        blocks=blocks,
        layers=lengths[0] if lengths else 1,
        obstacle=Reason("balanced", text_of("balanced")),
    )
