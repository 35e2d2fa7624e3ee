"""The report of a pruned function, or of a run of rounds: one page for a person."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxprune.core._groups import Groups
from jaxprune.core._kept import quantity
from jaxprune.core._leaves import parameter_paths
from jaxprune.core._positions import BoolArray
from jaxprune.display._columns import groups_picture, layer_name, program_order
from jaxprune.display._curves import as_svg, new_figure, plot_runs
from jaxprune.display._environment import as_facts, machine
from jaxprune.display._intervals import interval
from jaxprune.display._pages import write_page

_INK = "#c2410c"


class Stage(NamedTuple):
    """A net at one time: before, after, or after a round.

    Attributes:
        name: what it is called.
        kept: fraction of the units that it has.
        parameters: how many.
        flops: of one call.
        seconds: of one call, None if not measured.
        metrics: name -> number, such as the accuracy.
    """

    name: str
    kept: float
    parameters: float
    flops: float
    seconds: float | None = None
    metrics: Mapping[str, float] = {}


class Cell(NamedTuple):
    """A number in a table, and what qualifies it in small print."""

    text: str
    small: str = ""


class Layer(NamedTuple):
    """A layer before and after.

    Attributes:
        name: its path without the collection.
        shapes: leaf, shape before and after, of the leaves of two axes or more (of
            all, if there are none).
        before: how many parameters it has.
        after: how many are left.
    """

    name: str
    shapes: tuple[tuple[str, str, str], ...]
    before: int
    after: int


def write_report(
    path: str | Path,
    runs: Sequence[Sequence[Stage]],
    groups: Groups,
    keep: Mapping[str, BoolArray],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    title: str,
    call: str = "",
    command: str = "",
    figures: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Writes the report of one or several runs as one HTML file.

    `Pruned.report` and `Rounds.report` gather what it shows.

    Args:
        path: the HTML file; replaced as a whole.
        runs: for each run (of another seed, say) its stages, the first of them the
            whole net; of all runs alike.
        groups: what `trace` returned.
        keep: group name -> bool ``[size]``, True = kept, of the net that is drawn.
        shapes: path -> shape of the variables that are left.
        title: of the page.
        call: the Python call that made it.
        command: the command that made it.
        figures: caption -> matplotlib figure.

    Raises:
        ValueError: if the runs do not have the same stages.
        ModuleNotFoundError: if jinja2 is missing.
    """
    names = [[stage.name for stage in run] for run in runs]
    if not names or any(each != names[0] for each in names):
        raise ValueError(f"the runs must have the same stages, got {names}")
    values = {
        "title": title,
        "runs": len(runs),
        "cards": _cards(runs),
        "metrics": _metrics(runs),
        "rows": _rows(runs),
        "timed": _timed(runs),
        "curves": _curves(runs),
        "layers": layers(_in_order(groups), shapes),
        "figures": {text: as_svg(each, text) for text, each in figures.items()},
        "picture": groups_picture(groups, keep),
        "pinned": reasons(groups),
        "call": call,
        "command": command,
        "facts": as_facts(machine()),
    }
    write_page(path, "report.html.jinja", values)


def layers(
    before: Mapping[str, tuple[int, ...]], after: Mapping[str, tuple[int, ...]]
) -> Sequence[Layer]:
    """The layers of a net before and after, by the shapes of their parameters.

    Example:
        >>> layers({"a/w": (3, 4), "a/b": (4,)}, {"a/w": (3, 2), "a/b": (2,)})
        [Layer(name='a', shapes=(('w', '3 × 4', '3 × 2'),), before=16, after=8)]
    """  # noqa: RUF002
    found: dict[str, list[str]] = {}
    counted = parameter_paths(before)
    for path in before:
        if path in counted:
            found.setdefault(layer_name(path), []).append(path)
    return [_layer(name, paths, before, after) for name, paths in found.items()]


def _in_order(groups: Groups) -> dict[str, tuple[int, ...]]:
    """The shapes of the leaves, those that are used first in front."""
    paths = dict.fromkeys([*program_order(groups), *groups.shapes])
    return {path: groups.shapes[path] for path in paths}


def _layer(
    name: str, paths: list[str], before: Mapping[str, Any], after: Mapping[str, Any]
) -> Layer:
    kernels = [path for path in paths if len(before[path]) > 1] or paths
    shapes = tuple(
        (path.rpartition("/")[2], _times(before[path]), _times(after[path]))
        for path in kernels
    )
    sizes = (sum(math.prod(each[p]) for p in paths) for each in (before, after))
    return Layer(name, shapes, *sizes)


def _times(shape: Sequence[int]) -> str:
    return " \N{MULTIPLICATION SIGN} ".join(map(str, shape)) or "scalar"


def reasons(groups: Groups) -> dict[str, list[str]]:
    """Why axes are pinned -> these axes, as ``path:axis``."""
    found: dict[str, list[str]] = {}
    for pin in groups.pinned:
        if pin.reason.kind != "window":  # of a convolution: nobody asks
            found.setdefault(pin.why, []).append(f"{pin.path}:{pin.axis}")
    return found


def _metrics(runs: Sequence[Sequence[Stage]]) -> list[str]:
    return list(dict.fromkeys(m for run in runs for s in run for m in s.metrics))


def _timed(runs: Sequence[Sequence[Stage]]) -> bool:
    return all(stage.seconds is not None for run in runs for stage in run)


def _rows(runs: Sequence[Sequence[Stage]]) -> list[list[Cell]]:
    """A row for every stage, all runs together."""
    rows = []
    for at, first in enumerate(runs[0]):
        stages = [run[at] for run in runs]
        wholes = [run[0] for run in runs]
        cells = [Cell(first.name), _cell([s.kept for s in stages], _percent)]
        for name in _metrics(runs):
            values = [s.metrics[name] for s in stages if name in s.metrics]
            cells.append(_cell(values, "{:.4g}".format))
        for read in (_parameters, _flops, _seconds)[: 2 + _timed(runs)]:
            values = [read(stage) for stage in stages]
            cell = _cell(values, quantity)
            if at:
                ratios = [read(w) / v for w, v in zip(wholes, values, strict=True) if v]
                cell = Cell(cell.text, _ratio(ratios) or cell.small)
            cells.append(cell)
        rows.append(cells)
    return rows


def _ratio(ratios: Sequence[float]) -> str:
    if not ratios:
        return ""
    mean = interval(ratios).mean
    times, word = (mean, "less") if mean >= 1 else (1 / mean, "more")
    return f"{times:.3g} \N{MULTIPLICATION SIGN} {word}"


def _cell(values: Sequence[float], form: Callable[[float], str]) -> Cell:
    """Their mean, and where there are several its 95 % interval."""
    if not values:
        return Cell("")
    found = interval(values)
    if found.n < 2 or form(found.low) == form(found.high):
        return Cell(form(found.mean))
    return Cell(form(found.mean), f"{form(found.low)} to {form(found.high)}")


def _parameters(stage: Stage) -> float:
    return stage.parameters


def _flops(stage: Stage) -> float:
    return stage.flops


def _seconds(stage: Stage) -> float:
    return stage.seconds or 0.0


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"


def _cards(runs: Sequence[Sequence[Stage]]) -> dict[str, str]:
    """The whole net and the last, in a few numbers."""
    ends = [(run[0], run[-1]) for run in runs]
    found = {"units left": _percent(interval([last.kept for _, last in ends]).mean)}
    reads = {"parameters left": _parameters, "FLOPs left": _flops, "latency": _seconds}
    for name, read in reads.items():
        if name != "latency" or _timed(runs):
            shares = [read(last) / read(first) for first, last in ends if read(first)]
            found |= {name: _percent(interval(shares).mean)} if shares else {}
    for name in _metrics(runs):
        pairs = [[s.metrics[name] for s in end if name in s.metrics] for end in ends]
        means = [interval(values).mean for values in zip(*pairs, strict=True)]
        found[name] = " \N{RIGHTWARDS ARROW} ".join(f"{mean:.3g}" for mean in means)
    return found


def _curves(runs: Sequence[Sequence[Stage]]) -> list[dict[str, Any]]:
    """Every metric against what is left; without a metric, what is left by round."""
    if len(runs[0]) < 3:
        return []
    reads = {"parameters": _parameters, "FLOPs": _flops}
    found = []
    for metric in _metrics(runs):
        for cost, read in reads.items():
            x = [
                interval(shares).mean for shares in zip(*_left(runs, read), strict=True)
            ]
            curves = [[stage.metrics[metric] for stage in run] for run in runs]
            found.append(_curve(x, curves, f"{cost} left (%)", metric))
    if not found:
        x = list(range(len(runs[0])))
        for cost, read in reads.items():
            found.append(_curve(x, _left(runs, read), "round", f"{cost} left (%)"))
    return found


def _left(
    runs: Sequence[Sequence[Stage]], read: Callable[[Stage], float]
) -> list[list[float]]:
    """Run -> percent of the whole that is left after every stage."""
    return [[100 * read(s) / max(read(run[0]), 1) for s in run] for run in runs]


def _curve(
    x: Sequence[float], curves: Sequence[Sequence[float]], across: str, up: str
) -> dict[str, Any]:
    drawn = new_figure(height=3.4, width=4.6)
    axes = drawn.axes[0]
    plot_runs(axes, x, {up: curves}, {up: _INK})
    axes.set(xlabel=across, ylabel=up)
    if across != "round":
        axes.invert_xaxis()  # from the whole net to what is left of it
    caption = f"{up} against {across.removesuffix(' (%)')}"
    return {"svg": as_svg(drawn, caption), "caption": f"{caption}."}
