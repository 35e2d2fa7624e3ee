"""Curves of several runs, drawn without pyplot, and figures as a part of a page."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.figure
import numpy as np


def plot_runs(
    axes: Any,
    x: Sequence[float],
    runs: Mapping[str, Sequence[Sequence[float]]],
    colors: Mapping[str, str],
) -> None:
    """Draws curves of several runs each: every run, their mean, and their spread.

    Args:
        axes: matplotlib axes.
        x: the points.
        runs: label -> one curve per run, ``[runs, points]``.
        colors: label -> color.
    """
    for label, curves in runs.items():
        values, color = np.asarray(curves), colors[label]
        mean = values.mean(0)
        for curve in values:
            axes.plot(x, curve, color=color, lw=0.7, alpha=0.35)
        if len(values) > 1:
            std = values.std(0, ddof=1)
            axes.fill_between(x, mean - std, mean + std, color=color, alpha=0.14, lw=0)
        axes.plot(x, mean, color=color, lw=2.2, marker="o", ms=4.5, label=label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#8888", lw=0.6)
    axes.set_axisbelow(True)


def new_figure(panels: int = 1, *, height: float = 3.6, width: float = 9.2) -> Any:
    """Returns a matplotlib figure with its axes in one row; no window, no pyplot."""
    figure = matplotlib.figure.Figure(figsize=(width, height), layout="constrained")
    figure.subplots(1, panels)
    return figure


def as_svg(figure: Any, label: str) -> str:
    """A matplotlib figure as an SVG element.

    Text stays text, so it can be read, searched and found by a screen reader. What
    matplotlib draws black takes the colour of the text around the figure, and nothing
    is drawn behind it, so the figure is legible on light and dark pages.

    Args:
        figure: the figure.
        label: what a screen reader says in its place.

    Returns:
        ``<svg>...</svg>`` as `markupsafe.Markup`.
    """
    import markupsafe

    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(file, format="svg", metadata=nothing, transparent=True)
    # The prologue names a DTD on the network; inside HTML only the element counts.
    svg = re.sub(r"(?s)^.*?<svg", "<svg", file.getvalue())
    svg = re.sub(r"(?s)<metadata>.*?</metadata>", "", svg)
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)  # the same in every figure of a page
    svg = svg.replace("#000000", "currentColor")
    opening = markupsafe.Markup("<svg role='img' aria-label='{}'").format(label)
    return opening + markupsafe.Markup(svg.removeprefix("<svg"))
