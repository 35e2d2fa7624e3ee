"""From the results of `batch_bridgeout` to what a person reads.

Everything here is a function of ``results.json``, so a report can be made again. On
the paper's data sets and nets its curves lie beneath ours; they were read out of the
plots in the authors' repository (paper.json).
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.harness.methods import METHODS, subject
from experiments.harness.quirks import QUIRKS
from jaxprune.data import DATASETS
from jaxprune.display import (
    Interval,
    as_facts,
    as_svg,
    groups_picture,
    interval,
    new_figure,
    plot_runs,
    write_page,
)

LABELS = {
    "bridgeout": "Batch Bridgeout",
    "dropout": "Dropout",
    "weight_decay": "Weight decay",
}
COLORS = {"bridgeout": "#c2410c", "dropout": "#2563eb", "weight_decay": "#71717a"}

HERE = Path(__file__).parent
PAPER = HERE / "paper.json"

Results = Mapping[str, Any]


def summarize(results: Results) -> dict[str, Any]:
    """The numbers to compare with the paper's claim, for ``results.json``."""
    models = results["settings"]["models"]
    return {
        "area": {
            model: {m: interval(areas(results, model, m))._asdict() for m in METHODS}
            for model in models
        },
        "area gained over": {
            model: {m: _gain(results, model, m)._asdict() for m in METHODS[1:]}
            for model in models
        },
        "largest difference of sliced and masked": largest_difference(results),
    }


def areas(results: Results, model: str, method: str) -> list[float]:
    """Area under accuracy against pruned share, one number per seed."""
    return [run["area"] for run in _runs(results, model, method)]


def largest_difference(results: Results) -> float:
    """Over all nets, cuts and rounds."""
    records = results["records"]
    found = [
        max(run["difference"], default=0.0)
        for model in results["settings"]["models"]
        for method in METHODS
        for run in _runs(results, model, method)
    ]
    return max(found + [row["difference"] for row in records["rounds"]])


def write_report(folder: Path, results: Results) -> Path:
    """Writes ``report.html`` and ``curves.png`` into the folder of a finished run."""
    models = results["settings"]["models"]
    _curves(results, models).savefig(folder / "curves.png", dpi=150)
    path = folder / "report.html"
    write_page(path, "report.html.jinja", _values(results), HERE)
    return path


def _values(results: Results) -> dict[str, Any]:
    """What the template shows."""
    settings, records = results["settings"], results["records"]
    return {
        "title": f"Batch Bridgeout on {settings['dataset']}: which filters can go?",
        "models": settings["models"],
        "lead": _lead(results),
        "cards": _cards(results),
        "panels": [_panel(results, model) for model in settings["models"]],
        "cuts": [f"{100 * fraction:.0f} %" for fraction in settings["fractions"]],
        "accuracies": _accuracies(results),
        "labels": list(LABELS.values()),
        "difference": largest_difference(results),
        "sizes": [_sizes(results, model) for model in settings["models"]],
        "rounds": _rounds(results),
        "round_epochs": settings["round_epochs"],
        "shares": [f"{100 * row['sparsity']:.0f} %" for row in records["rounds"]],
        "layers": _layers(records["rounds"]),
        "picture": _picture(results),
        "export": records["export"],
        "command": results["command"],
        "facts": _facts(results),
        "hyper": settings["hyper"],
    }


def _lead(results: Results) -> list[str]:
    lines = []
    for model in results["settings"]["models"]:
        ours = interval(areas(results, model, METHODS[0])).mean
        verdicts = [
            f"{_verdict(_gain(results, model, other))} {LABELS[other].lower()}"
            for other in METHODS[1:]
        ]
        lines.append(
            f"{model}: the area under accuracy against the share of filters cut is "
            f"{ours:.3f} with Batch Bridgeout, {' and '.join(verdicts)}."
        )
    for quirk in results["settings"].get("quirks", ()):
        lines.append(f"As in the authors' code: {QUIRKS[quirk]}.")
    return lines


def _verdict(gain: Interval) -> str:
    if gain.n < 2:
        return f"{gain.mean:+.3f} to (one seed)"
    size = f"{abs(gain.mean):.3f} (95 % interval {gain.low:+.3f} to {gain.high:+.3f})"
    if gain.low > 0:
        return f"{size} more than with"
    return f"{size} less than with" if gain.high < 0 else "no clear difference from"


def _gain(results: Results, model: str, other: str) -> Interval:
    """Seeds are paired: same initial weights, same order of batches."""
    pairs = zip(
        areas(results, model, METHODS[0]), areas(results, model, other), strict=True
    )
    return interval([ours - theirs for ours, theirs in pairs])


def _cards(results: Results) -> dict[str, str]:
    records, settings = results["records"], results["settings"]
    dense = records[f"sizes/{settings['models'][0]}"][0]
    last = records["rounds"][-1]
    return {
        "largest difference, sliced to masked": f"{largest_difference(results):.0e}",
        f"fewer parameters after {len(records['rounds'])} rounds": (
            f"{dense['parameters'] / last['parameters']:.1f}x"
        ),
        "fewer FLOPs": f"{dense['flops'] / last['flops']:.1f}x",
        "accuracy of the exported model": _percent(records["export"]["accuracy"])
        + " %",
        "run time": f"{results['seconds']:.0f} s",
    }


def _panel(results: Results, model: str) -> dict[str, Any]:
    """The curves of one net, small enough to be read on a telephone."""
    caption = f"{model}: test accuracy against the share of filters cut."
    drawn = _curves(results, [model], height=3.6, width=4.6)
    return {"svg": as_svg(drawn, caption), "caption": caption}


def _curves(
    results: Results, models: list[str], *, height: float = 3.9, width: float = 9.2
) -> Any:
    drawn = new_figure(len(models), height=height, width=width)
    for axes, model in zip(drawn.axes, models, strict=True):
        runs = {
            LABELS[method]: [
                [100 * value for value in run["accuracy"]]
                for run in _runs(results, model, method)
            ]
            for method in METHODS
        }
        colors = {LABELS[method]: color for method, color in COLORS.items()}
        x = [100 * fraction for fraction in results["settings"]["fractions"]]
        _draw_paper(axes, results, model)
        plot_runs(axes, x, runs, colors)
        axes.set(title=model, xlabel="filters cut in every layer (%)", ylim=(0, 102))
    drawn.axes[0].set_ylabel("test accuracy (%)")
    drawn.axes[0].legend(frameon=False)
    return drawn


@functools.cache
def _published() -> dict[str, Any]:
    return json.loads(PAPER.read_text())["curves"]


def paper_curves(results: Results, model: str) -> dict[str, Any]:
    """Method -> the paper's curve for this data set and net; empty if there is none."""
    return _published().get(results["settings"]["dataset"], {}).get(model, {})


def _draw_paper(axes: Any, results: Results, model: str) -> None:
    for method, curve in paper_curves(results, model).items():
        axes.errorbar(
            curve["cut"],
            curve["accuracy"],
            [bar or 0.0 for bar in curve["half_bar"]],
            color=COLORS[method],
            lw=1.2,
            ls="--",
            alpha=0.7,
            capsize=2,
            zorder=1,
            label=f"{LABELS[method]}, the paper",
        )


def _accuracies(results: Results) -> list[dict[str, Any]]:
    """The rows of the first table: every net and method, the paper's below ours."""
    fractions = results["settings"]["fractions"]
    rows: list[dict[str, Any]] = []
    for model in results["settings"]["models"]:
        for method in METHODS:
            runs = _runs(results, model, method)
            row = {
                "net": model,
                "method": LABELS[method],
                "area": interval(areas(results, model, method)),
                "gain": None,
                "recalibrated": _recalibrated(runs),
                "accuracies": [
                    _percent(_mean_accuracy(runs, at)) for at in range(len(fractions))
                ],
            }
            if method != METHODS[0]:
                row["gain"] = _gain(results, model, method)
            rows.append(row)
            if theirs := paper_curves(results, model).get(method):
                paper = {"net": "", "method": "the paper", "area": None, "gain": None}
                paper["recalibrated"] = ""
                rows.append({**paper, "accuracies": _at(theirs, fractions)})
    return rows


def _recalibrated(runs: list[Results]) -> str:
    """The mean area after recalibration, where there is BatchNorm."""
    curves = [run["recalibrated"] for run in runs]
    return f"{np.mean(curves):.3f}" if all(curves) else ""


def _at(curve: Results, fractions: list[float]) -> list[str]:
    """The accuracy of a published curve at these cuts, where it has a point."""
    points = dict(zip(curve["cut"], curve["accuracy"], strict=True))
    found = [points.get(round(100 * fraction)) for fraction in fractions]
    return ["" if point is None else f"{point:.1f}" for point in found]


def _sizes(results: Results, model: str) -> dict[str, Any]:
    """The table of one net: what every measured cut costs, and its accuracy."""
    records = results["records"][f"sizes/{model}"]
    arms = [_runs(results, model, method) for method in METHODS]
    rows = []
    for row in records:
        at = results["settings"]["fractions"].index(row["fraction"])
        rows.append(
            {
                "cut": f"{100 * row['fraction']:.0f} %",
                "accuracies": [_percent(_mean_accuracy(arm, at)) for arm in arms],
                "parameters": row["parameters"],
                "mflops": row["flops"] / 1e6,
                "times": list(row["latency_ms"].values()),
            }
        )
    batches = [f"ms, batch {batch}" for batch in records[0]["latency_ms"]]
    return {"name": model, "batches": batches, "rows": rows}


def _rounds(results: Results) -> list[dict[str, Any]]:
    """The dense net, and the net after every round."""
    records, model = results["records"], results["settings"]["models"][0]
    dense = records[f"sizes/{model}"][0]
    start = _runs(results, model, METHODS[0])[0]["accuracy"][0]
    names = {"name": "dense", "before": "", "after": _percent(start)}
    rows = [
        {**names, "parameters": dense["parameters"], "mflops": dense["flops"] / 1e6}
    ]
    for row in records["rounds"]:
        rows.append(
            {
                "name": f"{100 * row['sparsity']:.0f} % of filters cut",
                "parameters": row["parameters"],
                "mflops": row["flops"] / 1e6,
                "before": _percent(row["before"]),
                "after": _percent(row["after"]),
            }
        )
    return rows


def _picture(results: Results) -> Any:
    """The groups of the first model, with what the last round has removed."""
    settings, last = results["settings"], results["records"]["rounds"][-1]
    # Which units went does not show in a picture, only how many of each group.
    keep = {
        name: np.arange(full) < kept for name, (kept, full) in last["units"].items()
    }
    groups = subject(settings["models"][0], DATASETS[settings["dataset"]]).groups
    return groups_picture(groups, keep)


def _layers(rounds: list[Results]) -> list[dict[str, Any]]:
    """How many filters of each layer every round leaves."""
    return [
        {
            "name": name.removeprefix("params/").partition("/kernel")[0],
            "full": full,
            "kept": [row["units"][name][0] for row in rounds],
        }
        for name, (_, full) in rounds[-1]["units"].items()
    ]


def _facts(results: Results) -> dict[str, str]:
    """Settings, machine and versions."""
    settings = {k: v for k, v in results["settings"].items() if k != "hyper"}
    return {
        **{name.replace("_", " "): _listed(value) for name, value in settings.items()},
        **as_facts(results["machine"]),
        "started": results["started"],
    }


def _runs(results: Results, model: str, method: str) -> list[Results]:
    seeds = range(results["settings"]["seeds"])
    return [results["records"][f"{model}/{method}/seed{seed}"] for seed in seeds]


def _mean_accuracy(runs: list[Results], at: int) -> float:
    return sum(run["accuracy"][at] for run in runs) / len(runs)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
