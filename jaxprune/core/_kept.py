"""How a decision prints: units before and after, and what the whole costs."""

import io
import shutil
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import rich.box
import rich.console
import rich.table

from jaxprune.core._groups import Groups
from jaxprune.core._positions import BoolArray
from jaxprune.core._tables import fold_names

_HTML = "<pre style='line-height:1.2;overflow-x:auto'>{code}</pre>"


class Cost(NamedTuple):
    """One cost before and after.

    Attributes:
        name: what it is.
        before: of the original.
        after: of what is left.
    """

    name: str
    before: float
    after: float

    def __str__(self) -> str:
        share = f" ({self.after / self.before:.1%})" if self.before else ""
        return f"{self.name}: {quantity(self.before)} -> {quantity(self.after)}{share}"


def kept_table(
    groups: Groups, keep: Mapping[str, BoolArray], found: tuple[Cost, ...]
) -> rich.table.Table:
    """A row for every group: its units before and after; the costs below.

    Groups alike but for one number are one row, as in the table of `Groups`.

    Args:
        groups: what `trace` returned.
        keep: group name -> bool ``[size]``, True = kept; missing ones are whole.
        found: what the program costs.
    """
    table = rich.table.Table(box=rich.box.HORIZONTALS, title_justify="left")
    table.title = _title(groups, keep)
    table.caption, table.caption_justify = "\n".join(map(str, found)), "left"
    for header in ("before", "after", "kept"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("units of group", overflow="fold")
    rows = [(name, g.size, _left(keep, name, g.size)) for name, g in groups.items()]
    for name, times, before, after in fold_names(rows):
        each = f"{times} x " if times > 1 else ""
        share = f"{after / before:.0%}"
        table.add_row(f"{each}{before}", f"{each}{after}", share, name)
    return table


def _left(keep: Mapping[str, BoolArray], name: str, size: int) -> int:
    return int(np.count_nonzero(keep[name])) if name in keep else size


def _title(groups: Groups, keep: Mapping[str, BoolArray]) -> str:
    units = sum(group.size for group in groups.values())
    left = sum(_left(keep, name, group.size) for name, group in groups.items())
    several = "group" if len(groups) == 1 else "groups"
    return f"{left} of {units} units kept in {len(groups)} {several}"


def quantity(number: float) -> str:
    """A number as a person reads it: whole below 10,000, else with a unit.

    Example:
        >>> quantity(9999), quantity(1_234_000), quantity(0.00125)
        ('9999', '1.23 M', '1.25 ms')
    """
    if 0 < number < 1:
        scale, unit = next(
            (s, u) for s, u in _SMALL if number >= s or s == _SMALL[-1][0]
        )
        return f"{number / scale:.3g} {unit}"
    for scale, unit in _LARGE:
        if number >= 10 * scale or (number >= scale and scale > 1e3):
            return f"{number / scale:.3g} {unit}"
    return f"{number:.6g}"


_SMALL = ((1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))
_LARGE = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def as_text(table: rich.table.Table) -> str:
    """The table as text, as wide as the terminal allows."""
    columns = max(shutil.get_terminal_size((100, 24)).columns, 60)
    console = rich.console.Console(width=columns, no_color=True)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def as_html(table: rich.table.Table, columns: int = 100) -> str:
    """The table for a notebook."""
    console = rich.console.Console(record=True, width=columns, file=io.StringIO())
    console.print(table)
    return console.export_html(inline_styles=True, code_format=_HTML)
