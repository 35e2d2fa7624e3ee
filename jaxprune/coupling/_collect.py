"""From the solved ledger to `Groups`: units that occupy the same axes, together."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxprune.core._groups import Group, Groups, Member, Reason
from jaxprune.core._types import PyTreeDef
from jaxprune.coupling._labels import Value
from jaxprune.coupling._ledger import Ledger
from jaxprune.coupling._lines import Axes, Lines, explain, find_lines, find_pinned
from jaxprune.coupling._parted import parted
from jaxprune.coupling._reasons import text_of
from jaxprune.coupling._roles import Whole, find_roles
from jaxprune.coupling._solution import NEVER, Solution
from jaxprune.coupling._walk import Walked
from jaxprune.coupling._writers import Written


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
        members: the axes of every line they are on, with the index of its `Member`s.
    """

    place: tuple[int, ...]
    units: np.ndarray
    members: list[tuple[Axes, np.ndarray]]


def collect_groups(
    ledger: Ledger,
    solution: Solution,
    variables: Mapping[str, Value],
    shapes: Mapping[str, tuple[int, ...]],
    treedef: PyTreeDef,
    program: Whole | None = None,
    walked: Walked | None = None,
) -> Groups:
    """Gathers units with the same signature into groups, in order of first use."""
    lines = find_lines(ledger, solution, variables)
    found = _found(solution, lines)
    groups = _named(ledger, solution, found)
    units = [each.units for each in found]
    if walked is not None:
        apart = parted(solution, walked, units)
        groups = {
            name: dataclasses.replace(group, ordered=True) if g in apart else group
            for g, (name, group) in enumerate(groups.items())
        }
    if program is not None:
        groups = _with_roles(ledger, solution, program, units, groups)
    if walked is not None and walked.writers is not None:
        written = list(walked.writers.found.values())
        groups = _with_streams(solution, found, groups, written)
    return Groups(groups, find_pinned(ledger, solution, lines), shapes, treedef)


def find_groups(
    ledger: Ledger, solution: Solution, variables: Mapping[str, Value]
) -> list[Found]:
    """The groups of `collect_groups`, in the same order."""
    return _found(solution, find_lines(ledger, solution, variables))


def _found(solution: Solution, lines: Lines) -> list[Found]:
    found, mixed = [], []
    for line, alone in enumerate(lines.alone):
        if alone:
            found.append(_whole(lines.axes[line], lines.columns[line][0]))
        else:
            mixed += [(line, column) for column in lines.columns[line]]
    places = _places(mixed)
    found += [_parts(places, lines.axes, rows) for rows in _by_signature(places)]
    return sorted(found, key=lambda each: each.place)


def _whole(axes: Axes, units: np.ndarray) -> Found:
    """A line that is a group by itself."""
    index = np.arange(len(units), dtype=np.int32)[:, None]
    return Found((axes[0][0], 0, -1, 0, int(units[0])), units, [(axes, index)])


def _places(columns: list[tuple[int, np.ndarray]]) -> _Places:
    """One row for every unit on every line, given the columns of the lines."""
    if not columns:
        return _Places(*(np.zeros(0, int) for _ in range(5)))
    sizes = [len(column) for _, column in columns]
    unit = np.concatenate([column for _, column in columns])
    # One number for each (line, unit), in the order of lines: a single stable sort then
    # gathers the positions of a unit on a line, ascending.
    size = int(unit.max()) + 1
    key = np.repeat(np.array([line for line, _ in columns]) * size, sizes)
    key += unit
    position = np.concatenate([np.arange(n, dtype=np.int32) for n in sizes])
    if unit.min() < 0:
        held = unit >= 0
        key, position = key[held], position[held]
    order = np.argsort(key, kind="stable")
    key, position = key[order], position[order]
    if ((key[1:] == key[:-1]) & (position[1:] <= position[:-1])).any():
        # A Gram matrix holds one unit in both of its factors, at one place of both.
        order = np.lexsort((position, key))
        key, position = key[order], position[order]
        new = np.ones(len(key), bool)
        new[1:] = (key[1:] != key[:-1]) | (position[1:] != position[:-1])
        key, position = key[new], position[new]
    start = _starts(key)
    repeats = np.diff(start, append=len(key))
    line, unit = np.divmod(key[start], size)
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


def _parts(places: _Places, axes: list[Axes], rows: np.ndarray) -> Found:
    """The group of some rows of `places`."""
    # `rows` is [units * lines], unit by unit; all units of a group have one width.
    width = np.count_nonzero(places.unit[rows] == places.unit[rows[0]])
    rows = rows.reshape(-1, width)  # every unit is on the same lines
    first = places.positions[places.start[rows[:, 0]]]
    rows = rows[np.argsort(first, kind="stable")].T
    start = places.start[rows]
    single = places.positions[start][:, :, None]
    line, repeats = places.line[rows[:, 0]], places.repeats[rows[:, 0]].tolist()
    index = [
        one if n == 1 else places.positions[at[:, None] + np.arange(n)]
        for n, at, one in zip(repeats, start, single, strict=True)
    ]
    members = [(axes[k], each) for k, each in zip(line.tolist(), index, strict=True)]
    lead, first = members[0]
    unit = places.unit[rows[0]]
    ends = int(first[0, 0]), int(first[0, -1])
    place = lead[0][0], ends[0], -first.shape[1], ends[1], int(unit[0])
    return Found(place, unit, members)


def _named(ledger: Ledger, solution: Solution, found: list[Found]) -> dict[str, Group]:
    units = np.concatenate([np.zeros(0, int), *[each.units for each in found]])
    starts = np.cumsum([0, *[len(each.units) for each in found]])[:-1]
    # The earliest reason stands for the group: `NEVER` is larger than any unit.
    doubts = np.minimum.reduceat(solution.doubt[units], starts).tolist()
    ordered = np.logical_or.reduceat(solution.ordered[units], starts).tolist()
    groups: dict[str, Group] = {}
    for each, doubt, fixed in zip(found, doubts, ordered, strict=True):
        axes = sorted((*axis, index) for axes, index in each.members for axis in axes)
        members = tuple([Member(path, d, index) for _, path, d, index in axes])
        name = _unique(f"{members[0].path}:{members[0].axis}", groups)
        reason = None if doubt == NEVER else explain(ledger, doubt)
        groups[name] = Group(
            name, len(each.units), members, reason is None, reason, fixed
        )
    return groups


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
        obstacle = explain(ledger, refused[g]) if g in refused else None
        found[name] = dataclasses.replace(
            group, members=tuple(members), obstacle=obstacle
        )
    return found


def _with_streams(
    solution: Solution,
    found: Sequence[Found],
    groups: Mapping[str, Group],
    written: Sequence[Written],
) -> dict[str, Group]:
    """The groups, of which those of writers know their stream."""
    owner = {
        int(atom): name
        for each, name in zip(found, groups, strict=True)
        for atom in each.units
    }

    def names(units: np.ndarray) -> list[str]:
        atoms = np.concatenate(list(solution.atoms(units)) or [np.zeros(0, int)])
        return list(dict.fromkeys(owner[a] for a in atoms.tolist() if a in owner))

    streams: dict[str, str] = {}
    for own, stream in written:
        around = [] if isinstance(stream, int) else names(stream[0].units)
        for name in names(own):
            if name not in around:  # else something else ties it to the stream
                streams.setdefault(name, around[0] if around else "pinned")
    obstacle = Reason("writer", text_of("writer"))
    return {
        name: dataclasses.replace(
            group,
            stream=streams[name],
            obstacle=group.obstacle or obstacle,
        )
        if name in streams
        else group
        for name, group in groups.items()
    }


def _unique(name: str, taken: Mapping[str, Group]) -> str:
    if name not in taken:
        return name
    count = 2
    while f"{name}#{count}" in taken:
        count += 1
    return f"{name}#{count}"
