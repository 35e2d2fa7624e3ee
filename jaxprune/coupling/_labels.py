"""Labels: which unit every position of every axis belongs to.

An axis of a value is either

* a tuple of `Column`s: position ``i`` dies if the unit ``column.units[i]`` of *any*
  column is dead. One column is the usual case; merging ``heads x head_dim`` into one
  axis gives two. Or
* an int: the axis can never be cut, and the int is the unit that stands for why
  (see `Ledger.reason`).

Restricting every value of a program to its living positions must commute with every
equation of the program; `zero` is what makes sums commute: it says that the value is 0
wherever the column's unit is dead.
"""

import math
from collections.abc import Callable
from operator import is_
from typing import NamedTuple, TypeAlias

import numpy as np

Units: TypeAlias = np.ndarray  # int64[n]
Zero: TypeAlias = bool | np.ndarray  # for all positions, or bool[n]

ALIVE = 0  # the unit that never dies, used to fill columns


class Column(NamedTuple):
    """The unit of every position of one axis.

    Attributes:
        units: int64 ``[n]``.
        zero: is the value 0 at the positions whose unit is dead?
    """

    units: Units
    zero: Zero


Axis: TypeAlias = int | tuple[Column, ...]


class Value(NamedTuple):
    """What is known about one value of the program.

    Attributes:
        shape: its full shape.
        axes: one `Axis` per dimension.
        is_zero: the value is the constant 0 throughout.
        data: it depends on no input (see `jaxprune.coupling._data`): the program
            computes it whole, and every use takes the positions it needs.
        origin: how to compute a value of integers that is data, else None.
        uniform: axes along which a value that is data is constant.
    """

    shape: tuple[int, ...]
    axes: tuple[Axis, ...]
    is_zero: bool = False
    data: bool = False
    origin: object = None
    uniform: frozenset[int] = frozenset()


def is_live(axis: Axis) -> bool:
    """Can any position of this axis be cut?"""
    return not isinstance(axis, int)


def all_zero(axis: Axis) -> bool:
    """Is the value 0 at every dead position of this axis?"""
    return isinstance(axis, int) or all(np.all(column.zero) for column in axis)


def both(a: Zero, b: Zero) -> Zero:
    """`a and b` for flags that may be per position."""
    if isinstance(a, bool):
        return b if a else False
    if isinstance(b, bool):
        return a if b else False
    return a & b


def either(a: Zero, b: Zero) -> Zero:
    """`a or b` for flags that may be per position."""
    if isinstance(a, bool):
        return True if a else b
    if isinstance(b, bool):
        return True if b else a
    return a | b


def flags_on(target: tuple[Column, ...], source: Axis) -> list[Zero]:
    """The zero flags of `source`, one for each column of `target`.

    Both label the same positions, tied. Columns are matched one to one only where
    that is certain; else all flags of `source` must hold.
    """
    if isinstance(source, int):
        return [True] * len(target)  # nothing dies here
    if len(target) == len(source) == 1 or same_units(target, source):
        return [column.zero for column in source]
    return [all_zero(source)] * len(target)


def with_flags(axis: tuple[Column, ...], flags: list[Zero]) -> Axis:
    """The same labels with a flag for each column; the same axis if it has them."""
    if len(axis) == 1:  # the usual case
        (units, held), (zero,) = axis[0], flags
        return axis if zero is held else (Column(units, zero),)
    if all(map(is_, flags, [column.zero for column in axis])):
        return axis
    return tuple(map(Column, [column.units for column in axis], flags))


def map_zero(axis: Axis, change: Callable[[Zero], Zero]) -> Axis:
    """The same labels, with every flag changed."""
    if isinstance(axis, int):
        return axis
    return with_flags(axis, [change(column.zero) for column in axis])


def with_zero(axis: Axis, zero: Zero) -> Axis:
    """The same labels with the flag `zero` on every column."""
    return axis if isinstance(axis, int) else with_flags(axis, [zero] * len(axis))


def same_units(a: Axis, b: Axis) -> bool:
    """Are these the very same labels (identity, not equality of content)?"""
    if isinstance(a, int) or isinstance(b, int):
        return a is b or (isinstance(a, int) and a == b)
    return len(a) == len(b) and all(
        x.units is y.units for x, y in zip(a, b, strict=True)
    )


def take(axis: Axis, positions: np.ndarray | slice) -> Axis:
    """Labels of ``x[positions]``; positions may repeat and reorder."""
    if isinstance(axis, int):
        return axis
    return tuple(
        Column(
            c.units[positions],
            c.zero if isinstance(c.zero, bool) else c.zero[positions],
        )
        for c in axis
    )


def concatenate(axes: list[Axis], sizes: list[int]) -> Axis:
    """Labels of the concatenation of axes of the given sizes.

    Axes that cannot be cut contribute their reason's unit; missing columns are filled
    with the unit that never dies.
    """
    if not any(is_live(axis) for axis in axes):
        return axes[0]
    parts = [
        (Column(np.full(n, axis), True),) if isinstance(axis, int) else axis
        for axis, n in zip(axes, sizes, strict=True)
    ]
    width = max(len(part) for part in parts)
    columns = []
    for k in range(width):
        column = [
            part[k] if k < len(part) else Column(np.full(n, ALIVE), True)
            for part, n in zip(parts, sizes, strict=True)
        ]
        columns.append(_join(column, sizes))
    return tuple(columns)


def _join(columns: list[Column], sizes: list[int]) -> Column:
    units = np.concatenate([column.units for column in columns])
    flags = [column.zero for column in columns]
    if all(flag is True for flag in flags):
        return Column(units, True)
    if all(flag is False for flag in flags):
        return Column(units, False)
    zero = np.concatenate(
        [np.broadcast_to(f, n) for f, n in zip(flags, sizes, strict=True)]
    )
    return Column(units, zero)


def merge(axes: list[Axis], sizes: list[int]) -> Axis:
    """Labels of the axis that a reshape makes from adjacent axes (row-major).

    A position of the merged axis dies if it dies in any of the parts, so columns are
    concatenated. Parts that cannot be cut add no column.
    """
    if len(axes) == 1 or not any(map(is_live, axes)):
        return axes[0]
    total = math.prod(sizes)
    columns = []
    for d, axis in enumerate(axes):
        if isinstance(axis, int):
            continue
        # Row-major: coordinate d of position p is (p // inner) % sizes[d].
        inner = math.prod(sizes[d + 1 :])
        outer = total // (inner * sizes[d])
        for units, zero in axis:
            spread = zero if isinstance(zero, bool) else _spread(zero, outer, inner)
            columns.append(Column(_spread(units, outer, inner), spread))
    return tuple(columns)


def _spread(values: np.ndarray, outer: int, inner: int) -> np.ndarray:
    grid = np.empty((outer, len(values), inner), values.dtype)
    grid[...] = values[:, None]
    return grid.ravel()
