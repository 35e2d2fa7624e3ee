"""How groups print: layers instead of leaves, and one line for what repeats."""

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import rich.box
import rich.console
import rich.table
import rich.text

if TYPE_CHECKING:
    from jaxprune.core._groups import Group, Pinned

_COLLECTION = re.compile(r"^(params|batch_stats)/")
_AXIS = re.compile(r"(?:(?P<layer>.*?)/)?(?P<leaf>[^/]+(?:/value)?:[^/]*)")

_Tokens = tuple[str, ...]


class _Row(NamedTuple):
    """One line of a table, for one group or layer or for several alike.

    Attributes:
        collection: ``"params/"``, ``"batch_stats/"`` or "".
        layer: its path cut around its numbers: every second token is a number.
        leaf: the leaf and its axis; for a layer all its leaves.
        cuts: layer and leaf of every member of a group.
        size: units of each group.
        note: what a reader has to know besides, or "".
        place: where in the user's program the reason for the note is, or "".
        label: of a group, cut around its numbers as `layer` is.
        times: how many rows this one stands for.
    """

    collection: str
    layer: _Tokens
    leaf: str
    cuts: tuple[tuple[_Tokens, str], ...] = ()
    size: int = 0
    note: str = ""
    place: str = ""
    label: _Tokens = ()
    times: int = 1

    @property
    def name(self) -> str:
        """The path as a person writes it."""
        layer = "".join(self.layer)
        return f"{self.collection}{layer}{'/' if layer else ''}{self.leaf}"


def groups_table(
    groups: Mapping[str, "Group"], pinned: Sequence["Pinned"]
) -> rich.table.Table:
    """A row for every group: its name, its units, and the layers that lose them.

    The leaves of a layer stand in one line; layers, and groups, that differ in one
    number only are one row: ``block_{0..11}``.
    """
    exact = sum(group.exact for group in groups.values())
    units = sum(group.size for group in groups.values())
    title = f"{_plural(len(groups), 'group')}, {_plural(units, 'unit')}"
    if exact < len(groups):
        title += f"; {exact} exact, the others say why not"
    table = _table(title, "units", "group, and the layers it cuts: leaf:axis")
    table.caption = _pinned_caption(pinned)
    for row in _fold([_group_row(group) for group in groups.values()]):
        each = f"{row.times} x " if row.times > 1 else ""
        note = " ".join(filter(None, [row.note, row.place and f"({row.place})"]))
        notes = [rich.text.Text(note, "italic")] if note else []
        heading = _heading(row.name)
        heading.append(f"  {''.join(row.label)}".rstrip(), "not bold")
        cell = rich.console.Group(heading, _layers(row.cuts), *notes)
        table.add_row(f"{each}{row.size}", cell)
    return table


def pinned_table(pinned: Sequence["Pinned"]) -> rich.table.Table:
    """A row for every reason: what it is, which axes it holds, where it is met."""
    reasons: dict[str, list[tuple[Pinned, str]]] = {}
    for pin in pinned:
        reasons.setdefault(pin.reason.text, []).append((pin, pin.reason.place))
    title = f"{_plural(len(pinned), 'axis', 'axes')} pinned, whole or in part"
    table = _table(title, "axes", "why, and the layers it holds: leaf:axis")
    for text, held in reasons.items():
        places = dict.fromkeys(place for _, place in held if place)
        cuts = [split_axis(f"{pin.path}:{pin.axis}")[1:] for pin, _ in held]
        heading = _heading(" ".join(filter(None, [text, _some(list(places))])))
        table.add_row(str(len(held)), rich.console.Group(heading, _layers(cuts)))
    return table


def _table(title: str, *columns: str) -> rich.table.Table:
    table = rich.table.Table(
        title=title,
        title_justify="left",
        caption_justify="left",
        box=rich.box.HORIZONTALS,
        show_lines=True,
    )
    for header, justify in zip(columns, ("right", "left"), strict=True):
        no_wrap = justify == "right"
        table.add_column(header, justify=justify, no_wrap=no_wrap, overflow="fold")
    return table


def _heading(text: str) -> rich.text.Text:
    return rich.text.Text(text, "bold", overflow="fold")


def _pinned_caption(pinned: Sequence["Pinned"]) -> str:
    if not pinned:
        return "every axis of every leaf can be cut"
    leaves = len({pin.path for pin in pinned})
    return (
        f"{_plural(len(pinned), 'axis', 'axes')} of {_plural(leaves, 'leaf', 'leaves')}"
        " pinned, whole or in part: print(groups.pinned) says why"
    )


def _group_row(group: "Group") -> _Row:
    cuts = []
    for member in group.members:
        _, layer, leaf = split_axis(f"{member.path}:{member.axis}")
        repeats = f" x{member.repeats}" if member.repeats > 1 else ""
        cuts.append((layer, leaf + repeats))
    reason = group.reason
    notes = [] if reason is None else [f"not exact: {reason.text}"]
    place = "" if reason is None else reason.place
    if group.blocks > 1:
        each = _plural(group.size // group.blocks, "unit")
        what = "layers" if group.layers == group.blocks else "blocks"
        notes.append(f"{group.blocks} {what} of {each}: cut as many from each")
    notes += ["units may be pruned but not permuted"] * group.ordered
    label = _tokens(group.label)
    name = split_axis(group.name)
    return _Row(*name, tuple(cuts), group.size, "; ".join(notes), place, label)


def split_axis(name: str) -> tuple[str, _Tokens, str]:
    """Collection, layer and leaf of ``path:axis``.

    Example:
        >>> split_axis("params/block0_1/conv2/kernel:3")
        ('params/', ('block', '0', '_', '1', '/conv', '2', ''), 'kernel:3')
    """
    found = _COLLECTION.match(name)
    collection = found[0] if found else ""
    parts = _AXIS.fullmatch(name.removeprefix(collection))
    layer, leaf = (parts["layer"] or "", parts["leaf"]) if parts else ("", name)
    return collection, _tokens(layer), leaf


def _tokens(text: str) -> _Tokens:
    return tuple(re.split(r"(\d+)", text))


def _layers(cuts: Iterable[tuple[_Tokens, str]]) -> rich.table.Table:
    """Layer and leaves side by side, one line for layers alike."""
    leaves: dict[_Tokens, list[str]] = {}
    for layer, leaf in cuts:
        leaves.setdefault(layer, []).append(leaf)
    rows = []
    for layer, each in leaves.items():
        texts = [", ".join(each)] if any(layer) else each
        rows += [_Row("", layer, text) for text in texts]
    rows = _fold(rows)
    longest = max((len("".join(row.layer)) for row in rows), default=0)
    lines = rich.table.Table.grid(padding=(0, 2))
    lines.add_column("indent")
    lines.add_column("layer", overflow="fold", min_width=min(longest, 40))
    lines.add_column("leaf:axis", overflow="fold")
    for row in rows:
        layer = "".join(row.layer)
        texts = (layer, row.leaf) if layer else (row.leaf, "")
        lines.add_row("", *map(rich.text.Text, texts))
    return lines


def fold_names(
    rows: Iterable[tuple[str, int, int]],
) -> list[tuple[str, int, int, int]]:
    """Joins rows of name and two numbers that are alike but for one number in the name.

    Example:
        >>> fold_names([("conv1:3", 8, 4), ("conv2:3", 8, 4), ("head:1", 8, 8)])
        [('conv1:3', 1, 8, 4), ('conv2:3', 1, 8, 4), ('head:1', 1, 8, 8)]
        >>> fold_names([("block_0/w:1", 8, 4), ("block_1/w:1", 8, 4)])
        [('block_{0,1}/w:1', 2, 8, 4)]
    """
    each = [
        _Row(*split_axis(name), size=before, note=str(after))
        for name, before, after in rows
    ]
    return [(row.name, row.times, row.size, int(row.note)) for row in _fold(each)]


def _fold(rows: list[_Row]) -> list[_Row]:
    """Joins rows that are the same but for one number, the last number first."""
    longest = max((len(row.layer) for row in rows), default=0)
    for slot in range(longest - 2, 0, -2):
        alike: dict[Hashable, list[_Row]] = {}
        for k, row in enumerate(rows):
            has_number = slot < len(row.layer)
            alike.setdefault(_but_for(row, slot) if has_number else k, []).append(row)
        rows = [
            _join(same, slot) if len(same) > 1 else same[0] for same in alike.values()
        ]
    return rows


def _but_for(row: _Row, slot: int) -> Hashable:
    """The row without the number in this slot."""
    blank = _numbered(row, slot, "")
    return blank._replace(place="", times=0)


def _join(rows: list[_Row], slot: int) -> _Row:
    numbers = _ranges([row.layer[slot] for row in rows])
    return _numbered(rows[0], slot, numbers)._replace(
        times=sum(row.times for row in rows)
    )


def _numbered(row: _Row, slot: int, number: str) -> _Row:
    """The row with another number in this slot, in all that lies in the same layer."""
    start = row.layer[: slot + 1]

    def changed(layer: _Tokens) -> _Tokens:
        if layer[: slot + 1] != start:
            return layer
        return (*layer[:slot], number, *layer[slot + 1 :])

    cuts = tuple((changed(layer), leaf) for layer, leaf in row.cuts)
    label = changed(row.label)
    return row._replace(layer=changed(row.layer), cuts=cuts, label=label)


def _ranges(numbers: list[str]) -> str:
    """The numbers as a pattern.

    Example:
        >>> _ranges(["4"]), _ranges(["0", "1", "2", "3", "7"])
        ('4', '{0..3,7}')
    """
    ordered = sorted(set(numbers), key=int)
    runs: list[list[str]] = []
    for number in ordered:
        if runs and int(number) == int(runs[-1][-1]) + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [f"{r[0]}..{r[-1]}" if len(r) > 2 else ",".join(r) for r in runs]
    return ordered[0] if len(ordered) == 1 else "{" + ",".join(parts) + "}"


def _some(places: list[str]) -> str:
    if not places:
        return ""
    rest = len(places) - 1
    more = f" and {rest} more place{'s' * (rest > 1)}" if rest else ""
    return f"({places[0]}{more})"


def _plural(count: int, one: str, many: str = "") -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"
