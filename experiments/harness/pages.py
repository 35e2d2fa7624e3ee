"""What the pages of results share: numbers as text, runs by net, dots by arm."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxprune.display import interval, new_figure

Results = Mapping[str, Any]


def gathered(result: Path, folders: Sequence[str]) -> Mapping[str, Results]:
    """Net -> results, from a committed file into which these runs go first."""
    if folders:
        there = json.loads(result.read_text()) if result.exists() else {}
        runs = [json.loads(Path(f, "results.json").read_text()) for f in folders]
        write_compact(result, there | {run["settings"]["net"]: run for run in runs})
    return json.loads(result.read_text())


def percent(values: Sequence[float]) -> str:
    """Mean and half of the 95 % interval of fractions, in percent."""
    found = interval(values)
    return f"{100 * found.mean:.1f} ± {50 * (found.high - found.low):.1f}"


def gain(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """By how many points ours are above theirs, paired, with the 95 % interval."""
    found = interval([100 * (a - b) for a, b in zip(ours, theirs, strict=True)])
    return f"{found.mean:+.1f} [{found.low:+.1f}, {found.high:+.1f}]"


def numbers(hyper: Mapping[str, float]) -> str:
    """Hyper-parameters in a line."""
    return ", ".join(f"{name.replace('_', ' ')} {x}" for name, x in hyper.items())


def dots(
    panels: Mapping[str, tuple[Mapping[str, Sequence[float]], Sequence[float]]],
    *,
    height: float,
    width: float,
    size: float,
) -> Any:
    """A dot for every seed, a bar for their mean; dashed, the dense net.

    Args:
        panels: title -> accuracy of every seed: by arm, from the bottom up, and of the
            dense net.
        height: of the figure, in inches.
        width: in inches.
        size: of the dots.
    """
    figure = new_figure(len(panels), height=height, width=width)
    for axes, (title, (arms, dense)) in zip(figure.axes, panels.items(), strict=True):
        for row, values in enumerate(arms.values()):
            points = 100 * np.array(values)
            axes.scatter(points, np.full(len(points), row), s=size, alpha=0.5)
            axes.plot([points.mean()] * 2, [row - 0.3, row + 0.3], color="black")
        axes.axvline(100 * np.mean(dense), color="grey", lw=0.8, ls="--")
        names = list(arms) if axes is figure.axes[0] else [""] * len(arms)
        axes.set_yticks(range(len(arms)), names)
        axes.set(title=title, xlabel="test accuracy (%)")
    return figure


def write_compact(path: Path, found: dict[str, Any]) -> None:
    """Writes a result, with a line for each list of numbers."""
    lines = json.dumps(found, indent=1)
    lists = re.compile(r"\[\s+([-\d.,\s]+?)\s+\]")
    lines = lists.sub(lambda m: "[" + re.sub(r"\s+", " ", m[1]) + "]", lines)
    path.write_text(lines + "\n")
