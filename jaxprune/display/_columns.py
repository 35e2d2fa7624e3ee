"""Layers as columns: which groups cut which part of each axis, as numbers to draw."""

import graphlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxprune.core._groups import Groups
from jaxprune.core._masks import expand_masks
from jaxprune.core._members import on_axis
from jaxprune.core._positions import BoolArray
from jaxprune.core._tables import split_axis
from jaxprune.display._colors import PINNED, group_color, readable_on

GAP = 0.9  # between layers; the width of a bar is 1


class Segment(NamedTuple):
    """A part of an axis.

    Attributes:
        group: the name of its group, None where the axis is pinned.
        start: where it starts, as a fraction of the axis.
        size: its fraction of the axis.
        kept: the fraction of the segment that stays.
    """

    group: str | None
    start: float
    size: float
    kept: float


class Bar(NamedTuple):
    """One axis of one leaf.

    Attributes:
        path: the leaf.
        axis: which of its axes.
        size: its length.
        kept: how many positions stay.
        lanes: segments side by side; several lanes where two groups share positions
            (heads and the dimensions of a head, after a reshape).
    """

    path: str
    axis: int
    size: int
    kept: int
    lanes: tuple[tuple[Segment, ...], ...]


class Column(NamedTuple):
    """One layer.

    Attributes:
        name: its path without the collection.
        bars: its axes; of axes that are cut alike only the first.
    """

    name: str
    bars: tuple[Bar, ...]

    @property
    def width(self) -> float:
        """With the gap to the next column."""
        return len(self.bars) + GAP


def layer_columns(
    groups: Groups, keep: Mapping[str, BoolArray] | None = None
) -> list[Column]:
    """What a picture of the groups draws, as numbers.

    Args:
        groups: what `trace` returned.
        keep: group name -> bool ``[size]``, True = kept.

    Returns:
        The layers that have a cut axis, in program order.

    Raises:
        ValueError: if `keep` names no group, or a length is not the group's size.

    Example:
        >>> import jax.numpy as jnp, jaxprune
        >>> from jaxprune.display._columns import layer_columns
        >>> params = {"w1": jnp.ones((3, 4)), "w2": jnp.ones((4, 2))}
        >>> groups = jaxprune.trace(
        ...     lambda params, x: jnp.tanh(x @ params["w1"]) @ params["w2"],
        ...     params, jnp.ones((1, 3)))
        >>> first, second = layer_columns(groups, {"w1:1": jnp.arange(4) < 3})
        >>> [(bar.size, bar.kept) for bar in first.bars + second.bars]
        [(3, 3), (4, 3), (4, 3), (2, 2)]
    """
    expand_masks(groups, keep or {})  # names and sizes are checked there
    units = {name: np.ones(group.size, bool) for name, group in groups.items()}
    units |= {name: np.asarray(kept) for name, kept in (keep or {}).items()}
    bars: dict[str, list[Bar]] = {}
    for bar in _all_bars(groups, units):
        layer = bars.setdefault(layer_name(bar.path), [])
        if all(_cut_alike(bar) != _cut_alike(other) for other in layer):
            layer.append(bar)
    every = itertools.chain.from_iterable(bars.values())
    kernels = {_cut_alike(b) for b in every if _rank(groups, b) > 1}
    return [
        Column(name, tuple(layer))
        for name, layer in bars.items()
        # A layer of vectors alone that are cut like a kernel says nothing new.
        if any(_rank(groups, b) > 1 or _cut_alike(b) not in kernels for b in layer)
    ]


def layer_name(path: str) -> str:
    """The layer that a leaf is of, without the collection.

    Example:
        >>> layer_name("params/conv1/kernel"), layer_name("w1")
        ('conv1', 'w1')
    """
    _, layer, leaf = split_axis(f"{path}:0")
    return "".join(layer) or leaf.removesuffix(":0")


def short_name(name: str) -> str:
    """The name of a group without the collection."""
    collection, _, _ = split_axis(name)
    return name.removeprefix(collection)


def _rank(groups: Groups, bar: Bar) -> int:
    return len(groups.shapes[bar.path])


def _cut_alike(bar: Bar) -> tuple[Any, ...]:
    """What two bars share if drawing both says nothing new."""
    return bar.size, bar.lanes


def _all_bars(groups: Groups, units: Mapping[str, np.ndarray]) -> Iterator[Bar]:
    """Every axis of every leaf that is cut, leaves in program order.

    Of layers with units of their own the first, as they all keep as many.
    """
    units = {
        name: units[name][: group.size // group.layers]
        for name, group in groups.items()
    }
    cuts: dict[tuple[str, int], list[tuple[str, np.ndarray]]] = {}
    for name, group in groups.items():
        for member in group.members:
            there = cuts.setdefault((member.path, member.axis), [])
            index = on_axis(member, groups.shapes[member.path])
            there.append((name, index[: group.size // group.layers]))
    # The window of a convolution is pinned by nature: no bar.
    windows = {(p.path, p.axis) for p in groups.pinned if p.reason.kind == "window"}
    cut_paths = {path for path, _ in cuts}
    for path in program_order(groups):
        for axis, size in enumerate(groups.shapes[path]):
            there = cuts.get((path, axis), [])
            trivial = not there and (size == 1 or (path, axis) in windows)
            if path in cut_paths and not trivial:
                yield _bar(path, axis, size, there, units)


def program_order(groups: Groups) -> Iterable[str]:
    """The leaves in order of first use, which every group and `pinned` follow."""
    order: graphlib.TopologicalSorter[str] = graphlib.TopologicalSorter()
    lists = [groups.pinned, *(group.members for group in groups.values())]
    for places in lists:
        paths = list(dict.fromkeys(place.path for place in places))
        order.add(paths[0]) if paths else None
        for before, after in itertools.pairwise(paths):
            order.add(after, before)
    return order.static_order()


def _bar(
    path: str,
    axis: int,
    size: int,
    cuts: list[tuple[str, np.ndarray]],
    units: Mapping[str, np.ndarray],
) -> Bar:
    kept = np.ones(size, bool)
    lanes: list[dict[str, np.ndarray]] = [{}]
    for name, index in cuts:
        kept[index[~units[name]]] = False
        lane = next((lane for lane in lanes if not _meets(lane, index)), None)
        if lane is None:
            lanes.append(lane := {})
        lane[name] = index
    held = size - len(np.unique(np.concatenate([i.ravel() for _, i in cuts] or [[]])))
    segments = (tuple(_segments(size, lane, held, units)) for lane in lanes)
    return Bar(path, axis, size, int(kept.sum()), tuple(segments))


def _meets(lane: Mapping[str, np.ndarray], index: np.ndarray) -> bool:
    return any(np.isin(index, other).any() for other in lane.values())


def _segments(
    size: int,
    lane: Mapping[str, np.ndarray],
    held: int,
    units: Mapping[str, np.ndarray],
) -> Iterator[Segment]:
    """The groups in order of their first position, then what is pinned."""
    start = 0.0
    for name, index in sorted(lane.items(), key=lambda item: item[1].min()):
        positions = len(np.unique(index))
        left = positions - len(np.unique(index[~units[name]]))
        yield Segment(name, start, positions / size, left / positions)
        start += positions / size
    if held:
        yield Segment(None, start, held / size, 1.0)


# --- the picture on a page -----------------------------------------------------------


class Entry(NamedTuple):
    """What the legend says of a group.

    Attributes:
        number: of the group, from 1; 0 for what is pinned.
        name: of the group, without the collection.
        size: how many units it has.
        kept: how many of them stay.
        color: of its segments.
        ink: of what is written on them.
    """

    number: int
    name: str
    size: int
    kept: int
    color: str
    ink: str


class Picture(NamedTuple):
    """What the macro ``groups`` of ``parts.html.jinja`` shows.

    Attributes:
        columns: the layers.
        entries: name of a group -> what the legend says; None for what is pinned.
        cut: is anything removed, or might it be?
    """

    columns: list[Column]
    entries: dict[str | None, Entry]
    cut: bool


def groups_picture(
    groups: Groups, keep: Mapping[str, BoolArray] | None = None
) -> Picture:
    """The picture of `groups_figure`, for a page: it takes the width that there is.

    Args:
        groups: what `trace` returned.
        keep: group name -> bool ``[size]``, True = kept; groups that are not named
            are kept whole.

    Raises:
        ValueError: if `keep` names no group, or a length is not the group's size.
    """
    entries: dict[str | None, Entry] = {}
    for number, (name, group) in enumerate(groups.items(), start=1):
        kept = int(np.sum((keep or {}).get(name, group.size)))
        color = group_color(number)
        about = short_name(name), group.size, kept, color, readable_on(color)
        entries[name] = Entry(number, *about)
    entries[None] = Entry(0, "pinned", 0, 0, PINNED, readable_on(PINNED))
    return Picture(layer_columns(groups, keep), entries, keep is not None)
