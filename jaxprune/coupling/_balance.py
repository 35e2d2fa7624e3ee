"""Cuts that take other units from every block of a group, but as many from each."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxprune.core._groups import Group, Groups, Member, Reason
from jaxprune.core._names import listed, matching, nearest
from jaxprune.coupling._blocks import run
from jaxprune.coupling._collect import Found
from jaxprune.coupling._labels import Value
from jaxprune.coupling._reasons import text_of
from jaxprune.coupling._rows import Rows, Slots, State
from jaxprune.coupling._solution import NONE, Solution
from jaxprune.coupling._walk import Walked


class Blocks(NamedTuple):
    """Where the blocks of one group are on one axis.

    Attributes:
        slots: which unit of the group every position holds.
        block: int ``[n]``, its block; blocks with one number lose the same units.
    """

    slots: Slots
    block: np.ndarray

    def table(self) -> np.ndarray:
        """Positions ``[parts, size, copies]``: run by run, unit by unit."""
        slot, part = self.slots
        held = np.flatnonzero(slot != NONE)
        order = np.lexsort((held, slot[held], part[held]))
        return held[order].reshape(self.slots.parts, int(slot.max()) + 1, -1)


def balance_groups(
    groups: Groups,
    balance: "Balance",
    variables: Mapping[str, Value],
    patterns: Sequence[str],
) -> Groups:
    """The groups of these names with the units of every block apart, where it may be.

    Raises:
        ValueError: if a pattern matches no group, or none whose blocks are independent;
            the text says why the first is not.
    """
    named = dict(groups)
    numbers = {name: number for number, name in enumerate(groups)}
    for pattern in patterns:
        reasons = {}
        matched = matching(pattern, groups)
        for name in matched:
            apart = _apart(groups[name], numbers[name], balance, variables)
            if isinstance(apart, Group):
                named[name] = apart
            else:
                reasons[name] = apart
        if not matched:
            raise ValueError(
                f"balanced pattern {pattern!r} matches none of the groups "
                f"{listed(groups)}{nearest(pattern, groups)}"
            )
        if len(reasons) == len(matched):
            name, why = next(iter(reasons.items()))
            raise ValueError(
                f"balanced pattern {pattern!r} matches no group with blocks that may "
                f"lose units of their own; {name}: {why}"
            )
    return dataclasses.replace(groups, by_name=named)


def _apart(
    group: Group, number: int, balance: "Balance", variables: Mapping[str, Value]
) -> Group | str:
    """The group with the units of every block apart, or why they cannot be."""
    places = [(variables[m.path], m.axis) for m in group.members]
    found = balance.index(number, places)
    if isinstance(found, str):
        return found
    blocks, every = found
    members = tuple(
        Member(member.path, member.axis, index)
        for member, index in zip(group.members, every, strict=True)
    )
    size = group.size * blocks
    return dataclasses.replace(
        group,
        size=size,
        members=members,
        blocks=blocks,
        obstacle=Reason("balanced", text_of("balanced")),
    )


class Balance:
    """Which groups of a program have blocks that may lose units of their own."""

    def __init__(
        self, solution: Solution, walked: Walked, found: Sequence[Found]
    ) -> None:
        several = [_has_copies(each) for each in found]
        units = [
            each.units[: each.units.size * has]
            for each, has in zip(found, several, strict=True)
        ]
        self.rows = Rows(solution, units)
        alone = [number for number, has in enumerate(several) if not has]
        self.rows.forbid(alone, "no axis holds several positions of a unit")
        self._states: dict[int, State] = {}  # by identity: variables stay alive here
        self._values = walked.ins
        for value in walked.ins:
            self._states[id(value)] = self.rows.source(value)
        outs = run(self.rows, walked, [self._states[id(v)] for v in walked.ins])
        self.rows.leave(outs)
        self._classes = self.rows.classes()

    def blocks(self, value: Value, d: int, number: int) -> Blocks | None:
        """Where a group is on an axis of a variable; None if it is not there."""
        slots = self.rows.slots(value.axes[d]).get(number)
        if slots is None:
            return None
        line = self._states[id(value)][d, number].ravel()
        return Blocks(slots, self._classes[np.broadcast_to(line, slots.slot.shape)])

    def index(
        self, number: int, members: Iterable[tuple[Value, int]]
    ) -> tuple[int, list[np.ndarray]] | str:
        """The positions of every unit of every block, member by member.

        Returns:
            The number of blocks, and for every member int ``[blocks * size, repeats]``;
            or why there is but one block.
        """
        if number in self.rows.why:
            return self.rows.why[number]
        found = [self.blocks(value, d, number) for value, d in members]
        assert None not in found  # a member is where the group is
        tables = [(blocks.table(), blocks.block) for blocks in found if blocks]
        first, block = tables[0]
        order = list(dict.fromkeys(block[first[:, 0, 0]].tolist()))
        every = []
        for table, block in tables:
            owner = block[table[:, 0, 0]]
            parts = [table[owner == one] for one in order]
            if sum(map(len, parts)) < len(table) or len({len(p) for p in parts}) > 1:
                return "its blocks occupy different numbers of positions on some axis"
            lines = [p.swapaxes(0, 1).reshape(table.shape[1], -1) for p in parts]
            every.append(np.sort(np.concatenate(lines), axis=1).astype(np.int32))
        if len(order) == 1:
            return "its blocks are computed together"
        return len(order), every

    def canonical(
        self, inputs: Sequence[Value], keep: Mapping[tuple[int, int], np.ndarray]
    ) -> dict[tuple[int, int], np.ndarray]:
        """The same cut but for the order of the units inside of blocks.

        Every block gives up its last units instead of those that it lost; where all
        lost as many, what is left is the same cut of all blocks, of a program that
        does not see the difference.

        Args:
            inputs: the variables.
            keep: (number of a variable, axis) -> bool for every position.
        """
        keep = dict(keep)
        for number, size in enumerate(self.rows.sizes):
            if number in self.rows.why:
                continue
            places = {
                (k, d): blocks
                for k, d in keep
                if (blocks := self.blocks(inputs[k], d, number)) is not None
            }
            kept = np.zeros((len(self._classes), size), bool)
            for place, (slots, block) in places.items():
                rows = keep[place] & (slots.slot != NONE)
                kept[block[rows], slots.slot[rows]] = True
            order = np.argsort(~kept, axis=1, kind="stable")
            for place, blocks in places.items():
                table = blocks.table()
                chosen = order[blocks.block[table[:, 0, 0]]]
                moved = np.take_along_axis(table, chosen[:, :, None], axis=1)
                line = keep[place].copy()
                line[table] = keep[place][moved]
                keep[place] = line
        return keep

    def trouble(self, value: Value, d: int, keep: np.ndarray) -> str:
        """Why a mask is not a cut of as many units of every block, or ""."""
        for number in self.rows.slots(value.axes[d]):
            if number in self.rows.why:
                return self.rows.why[number]
            blocks = self.blocks(value, d, number)
            if blocks is None:
                continue
            kept = keep[blocks.table()].any(axis=2).sum(axis=1)
            kept = kept[kept > 0]
            if len(np.unique(kept)) > 1:
                some = ", ".join(map(str, kept[:8]))
                return f"its blocks keep {some}{', ...' * (len(kept) > 8)} units"
        return ""


def _has_copies(found: Found) -> bool:
    """Does some axis hold several positions of every unit, and are there units?"""
    return len(found.units) > 1 and any(
        index.shape[1] > 1 for _, index in found.members
    )
