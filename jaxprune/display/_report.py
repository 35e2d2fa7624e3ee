"""Reports: what a run leaves for a person to read.

One HTML file that needs nothing else: figures are inline SVG, there are no scripts, and
nothing is fetched. Text is escaped wherever it enters; what is HTML already has the
type `Html`.
"""

import html
import importlib.metadata
import io
import math
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

PACKAGES = ("jaxprune", "jax", "flax", "optax", "orbax-checkpoint", "numpy")


class Html(str):
    """Text that is HTML; everything else is escaped."""


class Interval(NamedTuple):
    """What several runs say about one number.

    Attributes:
        mean: of the runs.
        std: sample standard deviation of the runs; nan for a single one.
        low: lower end of the 95 % confidence interval of the mean; nan likewise.
        high: upper end.
        n: how many runs.
    """

    mean: float
    std: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        if self.n < 2:
            return f"{self.mean:.3f}"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interval(values: Sequence[float]) -> Interval:
    """Estimates the mean of independent runs by Student's t.

    Args:
        values: one number per run.

    Returns:
        Mean, sample standard deviation and 95 % confidence interval of the mean.

    Raises:
        ValueError: if there are no values.

    Example:
        >>> print(interval([1.0, 2.0, 3.0]))
        2.000 [-0.484, 4.484]
    """
    if not len(values):
        raise ValueError("an interval needs at least one value")
    mean = float(np.mean(values))
    if len(values) == 1:
        return Interval(mean, math.nan, math.nan, math.nan, 1)
    std = float(np.std(values, ddof=1))
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * std / np.sqrt(len(values))
    return Interval(mean, std, mean - float(half), mean + float(half), len(values))


def machine() -> dict[str, Any]:
    """Says what the numbers were measured on.

    Returns:
        CPU model, cores this process may use, operating system, versions.

    Example:
        >>> sorted(machine())
        ['cores', 'cpu', 'system', 'versions']
    """
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "system": platform.platform(),
        "versions": {"python": platform.python_version(), **versions},
    }


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
    axes.grid(axis="y", color="#e4e4e7", lw=0.8)
    axes.set_axisbelow(True)


def new_figure(panels: int = 1, *, height: float = 3.6, width: float = 9.2) -> Any:
    """Returns a matplotlib figure with its axes in one row; no window, no pyplot."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(width, height), layout="constrained")
    figure.subplots(1, panels)
    return figure


def figure(drawn: Any, caption: str) -> Html:
    """Embeds a matplotlib figure as SVG.

    Args:
        drawn: the figure.
        caption: read aloud in its place, and printed below it.

    Returns:
        A ``<figure>``.
    """
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    drawn.savefig(file, format="svg", metadata=nothing)
    # The prologue names a DTD on the network; inside HTML only the element counts.
    svg = re.sub(r"(?s)^.*?<svg", "<svg role='img'", file.getvalue())
    svg = re.sub(r"(?s)<metadata>.*?</metadata>", "", svg)
    caption = html.escape(caption)
    return Html(f"<figure>{svg}<figcaption>{caption}</figcaption></figure>")


def panels(*figures: Html) -> Html:
    """Figures side by side, or below each other where the page is narrow."""
    return Html(f"<div class='panels'>{''.join(figures)}</div>")


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    note: str = "",
    *,
    text_columns: int = 1,
) -> Html:
    """Makes a table; numbers are for the caller to format.

    Args:
        columns: the header.
        rows: cells, as many in each row as there are columns.
        note: a caption below.
        text_columns: how many of the first columns hold text and are aligned left;
            the others hold numbers.

    Returns:
        A ``<table>``.

    Raises:
        ValueError: if a row does not have one cell per column.

    Example:
        >>> table(["net", "filters"], [["a < b", 16]])
        "...<td class='text'>a &lt; b</td><td>16</td>..."
    """

    def cells(tag: str, row: Sequence[Any]) -> str:
        if len(row) != len(columns):
            raise ValueError(f"the row {list(row)} does not fit the columns {columns}")
        kinds = [" class='text'" if i < text_columns else "" for i in range(len(row))]
        return "".join(
            f"<{tag}{kind}>{_escaped(cell)}</{tag}>"
            for kind, cell in zip(kinds, row, strict=True)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    caption = f"<caption>{_escaped(note)}</caption>" if note else ""
    return Html(
        f"<div class='wide'><table>{caption}<thead><tr>{cells('th', columns)}</tr>"
        f"</thead><tbody>{body}</tbody></table></div>"
    )


def aside(text: str) -> Html:
    """Text in small print, for what qualifies a number in a table cell."""
    return Html(f"<small>{_escaped(text)}</small>")


def bar(fraction: float, text: str = "") -> Html:
    """A bar of that length, from 0 to 1, for a table cell."""
    return Html(
        f"<span class='bar'><i style='width:{100 * fraction:.1f}%'></i></span> "
        + _escaped(text)
    )


def cards(facts: Mapping[str, str]) -> Html:
    """The few numbers to see first: what it is -> value."""
    boxes = "".join(
        f"<div><b>{_escaped(value)}</b><span>{_escaped(name)}</span></div>"
        for name, value in facts.items()
    )
    return Html(f"<div class='cards'>{boxes}</div>")


def text(*paragraphs: str) -> Html:
    """Paragraphs of plain text."""
    return Html("".join(f"<p>{_escaped(p)}</p>" for p in paragraphs))


def section(title: str, *parts: Html) -> Html:
    """A part of the page under a heading."""
    return Html(f"<section><h2>{_escaped(title)}</h2>{''.join(parts)}</section>")


def heading(title: str) -> Html:
    """A heading inside a section."""
    return Html(f"<h3>{_escaped(title)}</h3>")


def code(lines: str) -> Html:
    """Program text."""
    return Html(f"<pre>{_escaped(lines)}</pre>")


def write_page(path: str | Path, title: str, *parts: Html) -> None:
    """Writes the page, whole or not at all.

    Args:
        path: the HTML file.
        title: of the page.
        *parts: what the other functions return.

    Raises:
        TypeError: if a part is plain text.
    """
    for part in parts:
        if not isinstance(part, Html):
            raise TypeError(f"{part[:40]!r} is plain text; wrap it in text(...)")
    head = _escaped(title)
    page = (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{head}</title><style>{_STYLE}</style></head>"
        f"<body><main><h1>{head}</h1>{''.join(parts)}</main></body></html>\n"
    )
    aside = Path(path).with_suffix(".tmp")
    aside.write_text(page, "utf-8")
    aside.replace(path)


def _escaped(value: Any) -> str:
    return value if isinstance(value, Html) else html.escape(str(value))


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        found = re.search(r"model name\s*:\s*(.+)", info.read_text())
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


_STYLE = """
:root { --ink: #18181b; --soft: #52525b; --line: #e4e4e7; --accent: #c2410c;
  --page: #fff; --box: #f4f4f5; color-scheme: light dark; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e4e7; --soft: #a1a1aa; --line: #3f3f46; --accent: #fb923c;
    --page: #18181b; --box: #27272a; }
  figure svg { border-radius: .5rem; }
}
body { margin: 0; color: var(--ink); background: var(--page);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 2.5rem 1.25rem 5rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .5rem; padding-top: 1rem;
  border-top: 1px solid var(--line); }
p { margin: .5rem 0; max-width: 46rem; }
figure { margin: 1.25rem 0; }
figure svg { width: 100%; height: auto; background: #fff; }
.panels { display: flex; flex-wrap: wrap; gap: 0 1rem; }
.panels figure { flex: 1 1 20rem; min-width: 0; margin: 1rem 0 0; }
figcaption, caption { color: var(--soft); font-size: .875rem; text-align: left; }
caption { caption-side: bottom; padding-top: .5rem; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .9rem; width: 100%;
  font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .6rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { color: var(--soft); font-weight: 600; border-bottom: 2px solid var(--line); }
th.text, td.text { text-align: left; }
td.text { white-space: normal; }
th:first-child, td:first-child { padding-left: 0; }
small { color: var(--soft); font-size: .85em; }
h3 { font-size: 1rem; margin: 1.5rem 0 0; }
pre { background: var(--box); padding: .9rem 1rem; border-radius: .5rem;
  overflow-x: auto; font-size: .85rem; }
.cards { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.5rem 0; }
.cards div { flex: 1 1 9rem; border: 1px solid var(--line); border-radius: .5rem;
  padding: .75rem 1rem; }
.cards b { display: block; font-size: 1.5rem; line-height: 1.2; }
.cards span { color: var(--soft); font-size: .85rem; }
.bar { display: inline-block; width: 7rem; height: .6rem; background: var(--box);
  border-radius: .2rem; overflow: hidden; vertical-align: middle; }
.bar i { display: block; height: 100%; background: var(--accent); }
"""
