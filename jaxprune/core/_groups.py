"""Groups: what `trace` finds, as frozen data.

A *unit* is the smallest thing that can be cut: one channel, one head, one hidden
neuron. A *group* holds the units that occupy the same axes of the same parameters;
a *member* says where on one of these axes each unit lives.
"""

import dataclasses
import shutil
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
import rich.console
import rich.table

from jaxprune.core._group_labels import labels_of
from jaxprune.core._tables import groups_table, pinned_table
from jaxprune.core._types import PyTree, PyTreeDef


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """One parameter axis that a group cuts.

    Attributes:
        path: the leaf, as ``jax.tree_util.keystr(simple=True, separator="/")``.
        axis: which axis of that leaf.
        index: int array ``[size, repeats]``; row ``u`` lists the positions that
            unit ``u`` occupies (several after a flatten or for a fused kernel). With
            `layers` position ``i`` of layer ``l`` is ``l * n + i`` on an axis of ``n``.
        role: ``"producer"`` if it makes the units, one by one (kernels that write
            them, biases, norms); ``"consumer"`` if it reads them (it weighs them in
            a sum); "" if `trace` was not asked for roles.
        layers: the axis of the stacked layers, if every unit is of one of them alone
            (see `per_layer` of `trace`); else None.
    """

    path: str
    axis: int
    index: np.ndarray
    role: str = ""
    layers: int | None = None

    @property
    def repeats(self) -> int:
        """How many positions of the axis one unit occupies."""
        return self.index.shape[1]


@dataclasses.dataclass(frozen=True)
class Reason:
    """Why an axis cannot be cut, a group is not exact, or units cannot be merged.

    Prints as its text, with the place in the user's program where known.

    Attributes:
        kind: which reason, as a word to compare with, such as "no_rule" or "output".
        text: the reason for a person.
        primitive: name of the JAX primitive that is the cause; "" if none is.
        source: ``file.py:12 (function)`` of the user's line; "" if not known.

    Example:
        >>> print(Reason("sorted", "values are sorted along this axis", "sort"))
        values are sorted along this axis (sort)
    """

    kind: str
    text: str
    primitive: str = ""
    source: str = ""

    @property
    def place(self) -> str:
        """The primitive and the user's line, as far as known."""
        return " at ".join(filter(None, (self.primitive, self.source)))

    def __str__(self) -> str:
        return f"{self.text} ({self.place})" if self.place else self.text


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Units that live and die on the same parameter axes.

    Attributes:
        name: unique, ``"path:axis"`` of the first member.
        size: how many units can be cut, each alone.
        members: every parameter axis a cut touches, in order of first use.
        exact: True if cutting any units equals masking them, up to rounding.
        reason: why not, if not exact; `why` is its text.
        ordered: the place of a unit matters (it is tied to an entry of a table, such
            as a rotary frequency, or the program takes the units apart), so units can
            be cut but not reordered.
        blocks: the units come in this many blocks of equal size, one after the other
            (see `balanced` and `per_layer` of `trace`); a cut takes as many from every
            block.
        obstacle: why units that are equal cannot be merged (see `merge`); None if they
            can be.
        label: what a person calls it, such as ``"encoder/block1 hidden"`` or
            ``"residual stream"``; unique among the groups that it was found with.
        stream: of the units of a writer (see `writers` of `trace`), which can be cut
            where the residual stream that they are added to keeps them: the name of
            the group of that stream, ``"pinned"`` if it cannot be cut. Else "".
        layers: of how many layers of a scan every one has units of its own (see
            `per_layer` of `trace`): the first have those of the first layer. Else 1.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    exact: bool = True
    reason: Reason | None = None
    ordered: bool = False
    blocks: int = 1
    obstacle: Reason | None = Reason("roles", "traced without roles=True")
    label: str = ""
    stream: str = ""
    layers: int = 1

    @property
    def why(self) -> str:
        """The reason for a person when not exact, with the place; else ""."""
        return "" if self.reason is None else str(self.reason)


@dataclasses.dataclass(frozen=True, eq=False)
class Pinned:
    """Positions of a parameter axis that cannot be cut.

    Attributes:
        path: the leaf.
        axis: which axis of that leaf.
        positions: how many positions of the axis are pinned.
        reason: why not; `why` is its text.
    """

    path: str
    axis: int
    positions: int
    reason: Reason

    @property
    def why(self) -> str:
        """The reason for a person, with the place in the user's program where known."""
        return str(self.reason)


class PinnedAxes(tuple[Pinned, ...]):
    """Every pinned axis, in order of first use; prints as a table of reasons."""

    __slots__ = ()

    def __rich__(self) -> rich.table.Table:
        return pinned_table(self)

    def __repr__(self) -> str:
        return _printed(pinned_table(self))


@dataclasses.dataclass(frozen=True, eq=False)
class Groups(Mapping[str, Group]):
    """An immutable mapping from name to `Group`; prints as a table.

    A group is also found by its label: ``groups["block1 hidden"]``.

    Attributes:
        by_name: the groups, in order of first use in the program.
        pinned: every parameter axis that cannot be cut, with the reason; prints as a
            table of its own.
        shapes: path -> shape of every leaf of the traced variables, in tree order.
        treedef: the tree structure of the traced variables.
        branches: of a trace with `writers`: the residual branches, by the path of their
            layers, each as the names of the groups that it consists of: its writer's
            and those of all that only it computes. If all units of all of them are cut
            the shortcut is left (see `without_branches`).
    """

    by_name: Mapping[str, Group]
    pinned: tuple[Pinned, ...]
    shapes: Mapping[str, tuple[int, ...]]
    treedef: PyTreeDef
    branches: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        labels = labels_of(self.by_name, self.shapes)
        labelled = {
            name: group
            if group.label == labels[name]
            else dataclasses.replace(group, label=labels[name])
            for name, group in self.by_name.items()
        }
        object.__setattr__(self, "by_name", MappingProxyType(labelled))
        object.__setattr__(self, "pinned", PinnedAxes(self.pinned))
        object.__setattr__(self, "shapes", MappingProxyType(dict(self.shapes)))
        object.__setattr__(self, "branches", MappingProxyType(dict(self.branches)))

    def __getitem__(self, name: str) -> Group:
        if name in self.by_name:
            return self.by_name[name]
        for group in self.by_name.values():
            if group.label == name:
                return group
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_name)

    def __len__(self) -> int:
        return len(self.by_name)

    def __reduce__(self) -> Any:
        # Neither read-only mappings nor, of every container, tree structures can be
        # pickled; a tree of numbers in their place can.
        like = self.treedef.unflatten(range(self.treedef.num_leaves))
        parts = dict(self.by_name), tuple(self.pinned), dict(self.shapes), like
        return _rebuilt, (*parts, dict(self.branches))

    def __rich__(self) -> rich.table.Table:
        return groups_table(self, self.pinned)

    def __repr__(self) -> str:
        return _printed(groups_table(self, self.pinned))


def _rebuilt(
    by_name: dict[str, Group],
    pinned: tuple[Pinned, ...],
    shapes: dict[str, tuple[int, ...]],
    like: PyTree,
    branches: dict[str, tuple[str, ...]],
) -> Groups:
    return Groups(by_name, pinned, shapes, jax.tree.structure(like), branches)


def _printed(table: rich.table.Table) -> str:
    """The table as text, as wide as the terminal allows."""
    columns = shutil.get_terminal_size((100, 24)).columns
    console = rich.console.Console(width=max(columns, 60), no_color=True)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())
