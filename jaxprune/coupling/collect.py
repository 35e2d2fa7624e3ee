"""From the solved ledger to `Groups`: units that occupy the same axes, together."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxprune.coupling.groups import Group, Groups, Member, Pinned
from jaxprune.coupling.jaxprs import source_line
from jaxprune.coupling.labels import Value
from jaxprune.coupling.ledger import Ledger
from jaxprune.coupling.roles import Whole, find_roles
from jaxprune.coupling.solution import NEVER, Solution


class _Line(NamedTuple):
    """The labels that some parameter axes share.

    Attributes:
        axes: these axes, ``(number, path, axis)``, in order.
        units: the unit of every position, or the reason why it cannot be cut.
        columns: the atoms of every position, see `Solution.atoms`.
    """

    axes: list[tuple[int, str, int]]
    units: np.ndarray | int
    columns: list[np.ndarray]


class _Places(NamedTuple):
    """Where units live: a row for every unit on every line, sorted by unit, line.

    A row says that `unit` holds ``positions[start : start + repeats]`` of its line.
    """

    unit: np.ndarray
    line: np.ndarray
    start: np.ndarray
    repeats: np.ndarray
    positions: np.ndarray


class Found(NamedTuple):
    """A group before it has a name.

    Attributes:
        place: orders groups: first axis, first position there, then coarse units and
            those of close positions first: heads come before the dimensions of a head,
            whichever the program names first.
        units: the atoms, in order of position.
        members: every line they are on, with the index of its `Member`s.
    """

    place: tuple[int, ...]
    units: np.ndarray
    members: list[tuple[_Line, np.ndarray]]


def collect_groups(
    ledger: Ledger,
    solution: Solution,
    variables: Mapping[str, Value],
    shapes: Mapping[str, tuple[int, ...]],
    treedef: Any,
    program: Whole | None = None,
) -> Groups:
    """Gathers units with the same signature into groups, in order of first use."""
    lines = _lines(ledger, solution, variables)
    found = _found(solution, lines)
    groups: dict[str, Group] = {}
    for each in found:
        group = _group(ledger, solution, each, groups)
        groups[group.name] = group
    if program is not None:
        units = [each.units for each in found]
        groups = _with_roles(ledger, solution, program, units, groups)
    return Groups(groups, _pinned(ledger, solution, lines), shapes, treedef)


def find_groups(
    ledger: Ledger, solution: Solution, variables: Mapping[str, Value]
) -> list[Found]:
    """The groups of `collect_groups`, in the same order."""
    return _found(solution, _lines(ledger, solution, variables))


def _found(solution: Solution, lines: list["_Line"]) -> list[Found]:
    alone = _alone(solution, lines)
    mixed = [line for line, one in zip(lines, alone, strict=True) if not one]
    found = [_whole(line) for line, one in zip(lines, alone, strict=True) if one]
    places = _places(mixed)
    found += [_parts(places, mixed, rows) for rows in _by_signature(places)]
    return sorted(found, key=lambda each: each.place)


def _lines(
    ledger: Ledger, solution: Solution, variables: Mapping[str, Value]
) -> list[_Line]:
    lines: dict[tuple[str, int], _Line] = {}
    axes = [
        (path, d, axis)
        for path, value in variables.items()
        for d, axis in enumerate(value.axes)
    ]
    for number, (path, d, axis) in enumerate(axes):
        if isinstance(axis, int):
            line = lines.setdefault(("frozen", axis), _Line([], axis, []))
        else:
            units = axis[0].units
            key = ("block", ledger.block(units))
            if key not in lines:
                lines[key] = _Line([], units, solution.atoms(units))
            line = lines[key]
        line.axes.append((number, path, d))
    return list(lines.values())


def _alone(solution: Solution, lines: list[_Line]) -> list[bool]:
    """Is every position of a line a unit of its own that is on no other line?"""
    columns = [column for line in lines for column in line.columns]
    every = np.concatenate([np.zeros(0, np.int32), *columns])
    uses = np.bincount(every + 1, minlength=len(solution.why) + 1)
    alone = np.append(uses[1:] == 1, False)  # the last entry speaks of `NONE`
    return [
        len(line.columns) == 1 and bool(alone[line.columns[0]].all()) for line in lines
    ]


def _whole(line: _Line) -> Found:
    """A line that is a group by itself."""
    units = line.columns[0]
    index = np.arange(len(units), dtype=np.int32)[:, None]
    return Found((line.axes[0][0], 0, -1, 0), units, [(line, index)])


def _places(lines: list[_Line]) -> _Places:
    """One row for every unit on every line, whatever its positions."""
    columns = [(k, column) for k, line in enumerate(lines) for column in line.columns]
    if not columns:
        return _Places(*(np.zeros(0, int) for _ in range(5)))
    sizes = [len(column) for _, column in columns]
    unit = np.concatenate([column for _, column in columns]).astype(np.int64)
    line = np.repeat([k for k, _ in columns], sizes)
    position = np.concatenate([np.arange(n) for n in sizes])
    held = unit >= 0
    unit, line, position = unit[held], line[held], position[held]
    key = line * (unit.max(initial=0) + 1) + unit
    order = np.argsort(key, kind="stable")
    if ((np.diff(key[order]) == 0) & (np.diff(position[order]) <= 0)).any():
        # A Gram matrix holds one unit in both of its factors, at one place of both.
        order = np.lexsort((position, key))
        same = np.diff(key[order], prepend=-1) == 0
        same &= np.diff(position[order], prepend=-1) == 0
        order = order[~same]
    unit, line, position = unit[order], line[order], position[order]
    start = _starts(key[order])
    repeats = np.diff(np.r_[start, len(unit)])
    unit, line = unit[start], line[start]
    order = np.argsort(unit, kind="stable")
    return _Places(unit[order], line[order], start[order], repeats[order], position)


def _starts(values: np.ndarray) -> np.ndarray:
    """Where a run of equal values begins."""
    new = np.ones(len(values), bool)
    new[1:] = values[1:] != values[:-1]
    return np.flatnonzero(new)


def _by_signature(places: _Places) -> list[np.ndarray]:
    """Rows of `places`, one array per group."""
    if not len(places.unit):
        return []
    kind = places.line * (places.repeats.max() + 1) + places.repeats
    # The signature of a unit is its set of (line, count): a sum of random words, in
    # 64 bits; a second word proves that no two signatures were confused.
    units = _starts(places.unit)
    one, two = (np.add.reduceat(_words(kind, salt), units) for salt in (1, 2))
    runs = _starts(one)  # neighbours mostly share theirs
    _, first, group = np.unique(one[runs], return_index=True, return_inverse=True)
    group = np.repeat(group, np.diff(np.r_[runs, len(units)]))
    assert (two[runs[first]][group] == two).all()
    per_row = np.repeat(group, np.diff(np.r_[units, len(places.unit)]))
    order = np.argsort(per_row, kind="stable")
    return np.split(order, _starts(per_row[order])[1:])


def _words(numbers: np.ndarray, salt: int) -> np.ndarray:
    """A random word of 64 bits for every number: the last step of SplitMix64."""
    words = numbers.astype(np.uint64) + np.uint64(salt * 0x9E3779B97F4A7C15 % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        words ^= words >> np.uint64(shift)
        words *= np.uint64(factor)
    return words ^ (words >> np.uint64(31))


def _parts(places: _Places, lines: list[_Line], rows: np.ndarray) -> Found:
    """The group of some rows of `places`."""
    units = places.unit[rows[_starts(places.unit[rows])]]
    rows = rows.reshape(len(units), -1)  # every unit is on the same lines
    rows = rows[np.argsort(places.positions[places.start[rows[:, 0]]])]
    index = []
    for column in rows.T:
        start, repeats = places.start[column][:, None], int(places.repeats[column[0]])
        held = places.positions[start if repeats == 1 else start + np.arange(repeats)]
        index.append((lines[places.line[column[0]]], held.astype(np.int32)))
    lead, first = index[0]
    place = lead.axes[0][0], int(first[0, 0]), -first.shape[1], int(first[0, -1])
    return Found(place, units, index)


def _group(
    ledger: Ledger, solution: Solution, found: Found, taken: Mapping[str, Group]
) -> Group:
    numbered = sorted(
        (number, path, d, index)
        for line, index in found.members
        for number, path, d in line.axes
    )
    members = tuple(Member(path, d, index) for _, path, d, index in numbered)
    doubt = solution.doubt[found.units].min()
    exact = bool(doubt == NEVER)
    why = "" if exact else explain(ledger, int(doubt))
    name = _unique(f"{members[0].path}:{members[0].axis}", taken)
    ordered = bool(solution.ordered[found.units].any())
    return Group(name, len(found.units), members, exact, why, ordered)


def _with_roles(
    ledger: Ledger,
    solution: Solution,
    program: Whole,
    units: list[np.ndarray],
    groups: Mapping[str, Group],
) -> dict[str, Group]:
    """The groups with what is known about merging their units."""
    consumers, refused = find_roles(ledger, solution, program, units)
    reads = {(program.names[n], d, g) for n, d, g in consumers}
    found = {}
    for g, (name, group) in enumerate(groups.items()):
        members = []
        for m in group.members:
            role = "consumer" if (m.path, m.axis, g) in reads else "producer"
            members.append(dataclasses.replace(m, role=role))
        obstacle = explain(ledger, refused[g]) if g in refused else ""
        found[name] = dataclasses.replace(
            group, members=tuple(members), obstacle=obstacle
        )
    return found


def _unique(name: str, taken: Mapping[str, Group]) -> str:
    if name not in taken:
        return name
    count = 2
    while f"{name}#{count}" in taken:
        count += 1
    return f"{name}#{count}"


def explain(ledger: Ledger, unit: int) -> str:
    """The text of a reason, with the user's source line where known."""
    reason = ledger.reasons[unit]
    if reason.eqn is None:
        return reason.text
    lines = (source_line(eqn) for eqn in (reason.eqn, *reason.calls[::-1]))
    place = next(filter(None, lines), "")
    where = reason.eqn.primitive.name + (f" at {place}" if place else "")
    return f"{reason.text} ({where})"


def _pinned(
    ledger: Ledger, solution: Solution, lines: list[_Line]
) -> tuple[Pinned, ...]:
    whole = bool((solution.partly == NEVER).all())
    found = [
        (number, Pinned(path, d, held, text))
        for line in lines
        for held, text in _held(ledger, solution, line, whole)
        for number, path, d in line.axes
    ]
    return tuple(pinned for _, pinned in sorted(found, key=lambda pair: pair[0]))


def _held(
    ledger: Ledger, solution: Solution, line: _Line, whole: bool
) -> list[tuple[int, str]]:
    """How many positions of a line are held, and why; is no class held in part?"""
    if isinstance(line.units, int):
        return [(1, explain(ledger, line.units))]
    held = []
    free = np.zeros(len(line.units), bool)
    for column in line.columns:
        free |= column >= 0
    if whole and free.all():
        return []
    partly = solution.partly[solution.classes[line.units[free]]]
    if len(partly) and partly.min() != NEVER:
        text = explain(ledger, int(partly.min()))
        count = int((partly != NEVER).sum())
        held.append((count, f"one of its factors: {text}"))
    if not free.all():
        why = solution.why[solution.classes[line.units[~free]]]
        reason = int(why.min())
        text = explain(ledger, reason) if reason != NEVER else "its factors are pinned"
        held.append((int((~free).sum()), text))
    return held
