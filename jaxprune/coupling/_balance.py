"""Cuts that take other units from every block of a group, but as many from each."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from jaxprune.coupling._blocks import run
from jaxprune.coupling._collect import Found
from jaxprune.coupling._labels import Axis, Value
from jaxprune.coupling._rows import Rows, Slots, State
from jaxprune.coupling._solution import NONE, Solution
from jaxprune.coupling._walk import Walked
from jaxprune.program._jaxprs import scan_counts


class Blocks(NamedTuple):
    """Where the blocks of one group are on one axis.

    Attributes:
        slots: which unit of the group every position holds.
        block: int ``[layers, n]``, its block in every layer (one, where none are
            stacked); blocks with one number lose the same units.
    """

    slots: Slots
    block: np.ndarray

    def table(self) -> np.ndarray:
        """Positions ``[parts, size, copies]``: run by run, unit by unit."""
        slot, part = self.slots
        held = np.flatnonzero(slot != NONE)
        # By run, then by unit, then by position: every unit has as many in every run.
        order = np.lexsort((held, slot[held], part[held]))
        return held[order].reshape(self.slots.parts, int(slot.max()) + 1, -1)


class Apart(NamedTuple):
    """Which units of a group are told apart.

    Attributes:
        blocks: those of the blocks of a layer?
        layers: those of the layers of a scan?
    """

    blocks: bool
    layers: bool

    def classes(self, owners: Sequence[np.ndarray], count: int) -> np.ndarray:
        """For every class the number of those that lose the same units.

        Args:
            owners: for every member ``[layers, parts]``, the class there.
            count: how many classes there are.
        """
        ties = [(owner, owner[:1]) for owner in owners if not self.layers]
        if not self.blocks:
            ties += [(owner, owners[0][:, :1]) for owner in owners]
        pairs = [np.broadcast_arrays(*each) for each in ties]
        a, b = (
            np.concatenate([np.zeros(0, int), *(pair[k].ravel() for pair in pairs)])
            for k in range(2)
        )
        graph = coo_matrix((np.ones(len(a), bool), (a, b)), (count, count))
        return connected_components(graph, directed=False)[1]


class Balance:
    """Which groups of a program have blocks that may lose units of their own."""

    def __init__(
        self,
        solution: Solution,
        walked: Walked,
        found: Sequence[Found],
        *,
        layers: bool = False,
    ) -> None:
        """Looks at the blocks of groups and, if asked for, at the layers of scans."""
        stacked = _stacked_axes(walked) if layers else {}
        self._layers: dict[int, int] = {}  # by identity, as the states
        for value in walked.ins:
            axes = [stacked.get(_labels(axis)) for axis in value.axes]
            if any(order is not None for order in axes):  # of the outermost scan
                first = min(order for order in axes if order is not None)
                self._layers[id(value)] = axes.index(first)
        several = [_has_copies(each) for each in found]
        if self._layers:
            several = [len(each.units) > 1 for each in found]
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
            layer_axis = self._layers.get(id(value))
            self._states[id(value)] = self.rows.source(value, layer_axis)
        outs = run(self.rows, walked, [self._states[id(v)] for v in walked.ins])
        self.rows.leave(outs)
        self._classes = self.rows.classes()

    def layers(self, value: Value) -> int | None:
        """The axis of the layers of a variable that a scan iterates over."""
        return self._layers.get(id(value))

    def blocks(self, value: Value, d: int, number: int) -> Blocks | None:
        """Where a group is on an axis of a variable; None if it is not there."""
        slots = self.rows.slots(value.axes[d]).get(number)
        if slots is None:
            return None
        rows = self._states[id(value)][d, number]
        lines = self._lines(value, d, self._classes[rows])
        return Blocks(slots, np.broadcast_to(lines, (len(lines), len(slots.slot))))

    def _lines(self, value: Value, d: int, array: np.ndarray) -> np.ndarray:
        """What varies along an axis and that of the layers, as ``[layers, n]``."""
        layers = self.layers(value)
        if layers is None or layers == d:
            return array.reshape(1, -1)
        if array.ndim == 1:
            array = array[None]
        else:
            array = np.moveaxis(array, (layers, d), (0, 1))
            array = array.reshape(array.shape[:2])
        return np.broadcast_to(array, (value.shape[layers], array.shape[1]))

    def index(
        self, number: int, members: Iterable[tuple[Value, int]], apart: Apart
    ) -> tuple[int, list[np.ndarray]] | str:
        """The positions of every unit of every block, member by member.

        Where layers are apart, position `i` of layer `l` of an axis of `n` is
        ``l * n + i``.

        Returns:
            The number of blocks, and for every member int ``[blocks * size, repeats]``;
            or why there is but one block.
        """
        if number in self.rows.why:
            return self.rows.why[number]
        members = list(members)
        lengths = {v.shape[a] for v, _ in members if (a := self.layers(v)) is not None}
        if apart.layers and not all(self.layers(v) is not None for v, _ in members):
            return "not all that it cuts is stacked by layers"
        if apart.layers and len(lengths) > 1:
            return "it is cut in scans of different lengths"
        found = [self.blocks(value, d, number) for value, d in members]
        assert None not in found  # a member is where the group is
        tables = [(blocks.table(), blocks.block) for blocks in found if blocks]
        owners = [block[:, table[:, 0, 0]] for table, block in tables]
        classes = apart.classes(owners, len(self._classes))
        owners = [classes[owner][: None if apart.layers else 1] for owner in owners]
        order = list(dict.fromkeys(owners[0].ravel().tolist()))
        if apart.layers and _share(owners):
            return "its layers are computed together"
        every = []
        for (table, block), owner in zip(tables, owners, strict=True):
            shift = np.arange(len(owner)) * block.shape[1]
            table = table + shift[:, None, None, None]  # layers, parts, size, copies
            parts = [table[owner == one] for one in order]
            if sum(map(len, parts)) < owner.size or len({len(p) for p in parts}) > 1:
                return "its blocks occupy different numbers of positions on some axis"
            lines = [p.swapaxes(0, 1).reshape(table.shape[2], -1) for p in parts]
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
            keep: (number of a variable, axis) -> bool for every position, of the rank
                of the variable where its layers differ.

        Returns:
            Like `keep`; bool ``[layers, n]`` where layers still differ.
        """
        lines = {
            (k, d): self._lines(inputs[k], d, mask).copy()
            for (k, d), mask in keep.items()
        }
        of_layers = any(mask.ndim > 1 for mask in keep.values())
        for number, size in enumerate(self.rows.sizes):
            if number in self.rows.why:
                continue
            places = {
                (k, d): blocks
                for k, d in keep
                if (blocks := self.blocks(inputs[k], d, number)) is not None
            }
            if of_layers and all(keep[place].ndim == 1 for place in places):
                continue
            # [block, slot]: does the block keep the unit, on any axis?
            kept = np.zeros((len(self._classes), size), bool)
            for place, (slots, block) in places.items():
                rows = lines[place] & (slots.slot != NONE)
                slot = np.broadcast_to(slots.slot, rows.shape)
                kept[block[rows], slot[rows]] = True
            # `order[b, s]` is the slot whose fate slot s of block b takes over: those
            # kept come first, so that every block gives up its last.
            order = np.argsort(~kept, axis=1, kind="stable")
            for place, blocks in places.items():
                table = blocks.table()
                for line, block in zip(lines[place], blocks.block, strict=True):
                    chosen = order[block[table[:, 0, 0]]]
                    moved = np.take_along_axis(table, chosen[:, :, None], axis=1)
                    line[table] = line[moved]
        return {
            place: each[0] if (each == each[:1]).all() else each
            for place, each in lines.items()
        }

    def trouble(self, value: Value, d: int, keep: np.ndarray) -> str:
        """Why a mask is not a cut of as many units of every block, or "".

        Args:
            value: the variable.
            d: the axis.
            keep: bool ``[n]``, or ``[layers, n]``.
        """
        lines = np.atleast_2d(keep)
        for number in self.rows.slots(value.axes[d]):
            if number in self.rows.why:
                return self.rows.why[number]
            blocks = self.blocks(value, d, number)
            if blocks is None:
                continue
            kept = lines[:, blocks.table()].any(axis=3).sum(axis=2).ravel()
            kept = kept[kept > 0]
            if len(np.unique(kept)) > 1:
                some = ", ".join(map(str, kept[:8]))
                what = "layers" if len(lines) > 1 else "blocks"
                return f"its {what} keep {some}{', ...' * (len(kept) > 8)} units"
        return "its layers are computed together" if len(lines) > 1 else ""


def _share(owners: Sequence[np.ndarray]) -> bool:
    """Does any class stand in several layers, given ``[layers, parts]`` by member?"""
    each = [np.unique(np.concatenate(turn)) for turn in zip(*owners, strict=True)]
    return len(np.unique(np.concatenate(each))) < sum(map(len, each))


def _labels(axis: Axis) -> int:
    """What tells two axes of the same labels from others, as long as they live."""
    return -1 if isinstance(axis, int) else id(axis[0].units)


def _stacked_axes(walked: Walked) -> dict[int, int]:
    """The labels of what scans iterate over, with the order in which these are met."""
    found: dict[int, int] = {}
    for step in walked.steps:
        if step.eqn.primitive.name == "scan":
            for value in step.ins[sum(scan_counts(step.eqn.params)) :]:
                if not isinstance(value.axes[0], int):
                    found.setdefault(_labels(value.axes[0]), len(found))
        for sub in step.subs:
            for labels in _stacked_axes(sub):
                found.setdefault(labels, len(found))
    return found


def _has_copies(found: Found) -> bool:
    """Does some axis hold several positions of every unit, and are there units?"""
    return len(found.units) > 1 and any(
        index.shape[1] > 1 for _, index in found.members
    )
