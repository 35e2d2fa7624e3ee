"""Pictures: a model's groups as a person sees them.

Drawn without pyplot, so no figure stays behind and no backend is chosen.
"""

import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from jaxprune.core._groups import Groups
from jaxprune.core._positions import BoolArray
from jaxprune.display._colors import PINNED, group_color, readable_on
from jaxprune.display._columns import (
    GAP,
    Bar,
    Column,
    Segment,
    layer_columns,
    short_name,
)

_WIDTH = 6.0, 10.0  # of the smallest and the largest figure, in inches
_PANEL = 60.0  # length of a line of layers; the width of a bar is 1
_PANEL_HEIGHT = 2.7  # in inches, with the names
_NAME = 26  # characters of a layer's name
_LEGEND_SIZE = 6.5
_LETTER = 0.64 * _LEGEND_SIZE  # width of a letter, in points, a little generous
_HANDLE = 5 * _LEGEND_SIZE  # of the patch before an entry and the gap behind it
_NUMBERED = 0.12  # a smaller part of an axis has no room for its number


def groups_figure(
    groups: Groups, keep: Mapping[str, BoolArray] | None = None
) -> Figure:
    """Draws every layer that a group cuts as a column, every group as a colour.

    A column has one bar for each axis of the layer's kernel, in the kernel's order:
    inputs left, outputs right. A bar is the whole axis, whatever its length; its
    segments are the groups that cut it, numbered as in the legend, and what is pinned
    is grey. The same colour in several columns is what must be cut together. With
    `keep`, the removed part of a segment is hatched. Vectors that are cut like the
    kernel before them (biases, norms) have no bar.

    Args:
        groups: what `trace` returned.
        keep: group name -> bool ``[size]``, True = kept; groups that are not named
            are kept whole.

    Returns:
        A figure that belongs to no pyplot state; save it with ``figure.savefig``.

    Raises:
        ValueError: if there is no group, or `keep` does not fit the groups.

    Example:
        >>> import jax.numpy as jnp, jaxprune
        >>> from jaxprune.display import groups_figure
        >>> def mlp(params, x):
        ...     return jnp.tanh(x @ params["w1"]) @ params["w2"]
        >>> params = {"w1": jnp.ones((3, 4)), "w2": jnp.ones((4, 2))}
        >>> groups = jaxprune.trace(mlp, params, jnp.ones((1, 3)))
        >>> figure = groups_figure(groups, {"w1:1": jnp.arange(4) < 3})
        >>> [label.get_text() for label in figure.axes[0].get_xticklabels()]
        ['w1', 'w2']
    """
    if not groups:
        raise ValueError("there is no group to draw; print(groups.pinned) says why")
    columns = layer_columns(groups, keep)
    lines = list(_lines(columns))
    length = max(sum(column.width for column in line) for line in lines)
    width = float(np.clip(1.5 + 0.3 * length, *_WIDTH))
    legend = _legend(groups, keep, round((72 * width - _HANDLE) / _LETTER))
    legend_columns = _legend_columns(legend, width)
    rows = (
        sum(str(entry.get_label()).count("\n") + 1 for entry in legend) / legend_columns
    )
    height = len(lines) * _PANEL_HEIGHT + 0.15 * math.ceil(rows) + 0.4
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(len(lines), squeeze=False)[:, 0]
    numbers = {name: number for number, name in enumerate(groups, start=1)}
    for axes, line in zip(panels, lines, strict=True):
        _draw_line(axes, line, numbers, keep is not None)
        axes.set_xlim(-GAP, length)
    figure.suptitle(_title(groups, columns, keep), x=0.01, ha="left", fontsize=10)
    style = {"fontsize": _LEGEND_SIZE, "frameon": False, "ncols": legend_columns}
    figure.legend(handles=legend, loc="outside lower left", **style)
    return figure


def _lines(columns: Iterable[Column]) -> Iterator[list[Column]]:
    """Columns in lines that fit the page, as even as their order allows."""
    columns = list(columns)
    total = sum(column.width for column in columns)
    length = total / math.ceil(total / _PANEL)
    line, filled = [], 0.0
    for column in columns:
        line.append(column)
        filled += column.width
        if filled >= length:
            yield line
            line, filled = [], 0.0
    if line:
        yield line


def _draw_line(
    axes: Axes, columns: Iterable[Column], numbers: Mapping[str, int], with_keep: bool
) -> None:
    x, ticks, names = 0.0, [], []
    for column in columns:
        for place, bar in enumerate(column.bars):
            _draw_bar(axes, x + place, bar, numbers)
            text = f"{bar.kept}/{bar.size}" if with_keep else f"{bar.size}"
            style = {"ha": "center", "va": "bottom", "rotation": 90, "fontsize": 5.5}
            axes.text(x + place + 0.5, 1.03, text, **style)
        ticks.append(x + len(column.bars) / 2)
        names.append(_short(column.name))
        x += column.width
    axes.set_xticks(ticks, names, rotation=90, fontsize=6.5)
    axes.set_yticks([])
    axes.set_ylim(0, 1)
    axes.tick_params(length=0, pad=2)
    axes.spines[:].set_visible(False)


def _draw_bar(axes: Axes, x: float, bar: Bar, numbers: Mapping[str, int]) -> None:
    width = 1 / len(bar.lanes)
    for place, lane in enumerate(bar.lanes):
        left = x + place * width
        for segment in lane:
            _draw_segment(axes, left, width, segment, numbers)


def _draw_segment(
    axes: Axes, left: float, width: float, segment: Segment, numbers: Mapping[str, int]
) -> None:
    number = numbers.get(segment.group or "", 0)
    color = group_color(number)
    kept = segment.size * segment.kept
    line = {"facecolor": color, "edgecolor": "white", "linewidth": 0.5}
    axes.add_patch(Rectangle((left, segment.start), width, kept, **line))
    top, removed = segment.start + kept, segment.size - kept
    if removed:
        axes.add_patch(Rectangle((left, top), width, removed, **_removed(color)))
    if number and segment.size > _NUMBERED:
        on, middle = color, segment.start + kept / 2
        if kept < _NUMBERED:
            on, middle = "#ffffff", top + removed / 2
        _write(
            axes, left + width / 2, middle, str(number), on, 5.5 if width == 1 else 4
        )


def _write(axes: Axes, x: float, y: float, text: str, on: str, fontsize: float) -> None:
    box = {"boxstyle": "square,pad=0.1", "facecolor": on, "linewidth": 0}
    style = {"ha": "center", "va": "center", "fontsize": fontsize, "bbox": box}
    axes.text(x, y, text, color=readable_on(on), **style)


def _removed(color: object) -> dict[str, Any]:
    return {"facecolor": "white", "edgecolor": color, "hatch": "//////", "linewidth": 0}


def _short(name: str) -> str:
    return name if len(name) <= _NAME else "\N{HORIZONTAL ELLIPSIS}" + name[1 - _NAME :]


def _legend_columns(legend: list[Patch], width: float) -> int:
    """As many columns as the longest entry leaves room for."""
    lines = [line for entry in legend for line in str(entry.get_label()).split("\n")]
    entry = _LETTER * max(map(len, lines)) + _HANDLE
    return min(max(int(72 * width / entry), 1), 3)


def _legend(
    groups: Groups, keep: Mapping[str, BoolArray] | None, letters: int
) -> list[Patch]:
    """An entry for every group, in lines of at most so many letters."""
    entries = []
    for number, (name, group) in enumerate(groups.items(), start=1):
        units = f"{group.size}"
        if keep is not None:
            left = int(np.sum(keep.get(name, group.size)))
            units = f"{left} of {units}"
        text = f"{number}  {short_name(name)}  ({units})"
        text = "\n".join(textwrap.wrap(text, letters, subsequent_indent="    "))
        entries.append(Patch(color=group_color(number), label=text))
    if keep is not None:
        entries.append(Patch(**_removed("black"), label="removed"))
    return [*entries, Patch(color=PINNED, label="pinned")]


def _title(
    groups: Groups, columns: list[Column], keep: Mapping[str, BoolArray] | None
) -> str:
    units = sum(group.size for group in groups.values())
    kept = ""
    if keep is not None:
        left = sum(int(np.sum(keep.get(n, g.size))) for n, g in groups.items())
        kept = f", {left} kept"
    return f"{len(columns)} layers, {len(groups)} groups of {units} units{kept}"
