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
from jaxprune.display._pictures import groups_figure
from jaxprune.display._report import (
    Html,
    Interval,
    aside,
    bar,
    cards,
    code,
    figure,
    heading,
    interval,
    new_figure,
    panels,
    plot_runs,
    section,
    table,
    text,
    write_page,
)

LABELS = {
    "bridgeout": "Batch Bridgeout",
    "dropout": "Dropout",
    "weight_decay": "Weight decay",
}
COLORS = {"bridgeout": "#c2410c", "dropout": "#2563eb", "weight_decay": "#52525b"}

PAPER = Path(__file__).with_name("paper.json")

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
    dataset = results["settings"]["dataset"]
    write_page(
        path,
        f"Batch Bridgeout on {dataset}: which filters can go?",
        _lead(results),
        cards(_cards(results)),
        section(
            "Accuracy after one-shot cuts",
            text(
                "The same share of every layer is cut at once, filters of the lowest "
                "L2 norm first; nothing is fine-tuned."
            ),
            panels(*(_panel(results, model) for model in models)),
            text(
                "Thin lines are seeds, thick lines their mean, bands one standard "
                "deviation; broken lines are the paper's, where it has this net on "
                "this data set."
            ),
            _accuracy_tables(results),
        ),
        section("What slicing buys", *_size_tables(results)),
        section("Rounds of cutting and fine-tuning", *_rounds_section(results)),
        section("The exported model", *_export_section(results)),
        section("How it was done", *_conditions(results)),
    )
    return path


def _lead(results: Results) -> Html:
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
    return text(*lines)


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


def _panel(results: Results, model: str) -> Html:
    """The curves of one net, small enough to be read on a telephone."""
    drawn = _curves(results, [model], height=3.6, width=4.6)
    return figure(drawn, f"{model}: test accuracy against the share of filters cut.")


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


def _accuracy_tables(results: Results) -> Html:
    fractions = results["settings"]["fractions"]
    columns = ["net", "method", "area", "gain", "recalibrated"]
    columns += [f"{100 * f:.0f} %" for f in fractions]
    rows = []
    for model in results["settings"]["models"]:
        for method in METHODS:
            runs = _runs(results, model, method)
            means = [_percent(_mean_accuracy(runs, at)) for at in range(len(fractions))]
            gain = ""
            if method != METHODS[0]:
                gain = _with_interval(_gain(results, model, method), sign="+")
            areas_ = [
                _with_interval(interval(areas(results, model, method))),
                gain,
                _recalibrated(runs),
            ]
            rows.append([model, LABELS[method], *areas_, *means])
            if theirs := paper_curves(results, model).get(method):
                rows.append(["", "the paper", "", "", "", *_at(theirs, fractions)])
    return table(
        columns,
        rows,
        "Area: mean accuracy over all cuts. Gain: area of Batch Bridgeout less that of "
        "the method, paired by seed. Small print: 95 % confidence interval of the mean "
        "(Student's t). Recalibrated: area with the statistics of BatchNorm measured "
        "anew after each cut. Then mean test accuracy in % by share of filters cut.",
        text_columns=2,
    )


def _recalibrated(runs: list[Results]) -> str:
    """The mean area after recalibration, where there is BatchNorm."""
    curves = [run["recalibrated"] for run in runs]
    return f"{np.mean(curves):.3f}" if all(curves) else ""


def _at(curve: Results, fractions: list[float]) -> list[str]:
    """The accuracy of a published curve at these cuts, where it has a point."""
    points = dict(zip(curve["cut"], curve["accuracy"], strict=True))
    found = [points.get(round(100 * fraction)) for fraction in fractions]
    return ["" if point is None else f"{point:.1f}" for point in found]


def _with_interval(found: Interval, sign: str = "") -> Html:
    ends = f"{found.low:{sign}.3f} to {found.high:{sign}.3f}" if found.n > 1 else ""
    return Html(f"{found.mean:{sign}.3f}{'<br>' if ends else ''}{aside(ends)}")


def _size_tables(results: Results) -> list[Html]:
    parts = [
        text(
            "Sliced nets are smaller arrays run by a smaller program, without masks. "
            "On every net and cut they computed what the masked net computes, to at "
            f"most {largest_difference(results):.0e} of the largest output."
        )
    ]
    for model in results["settings"]["models"]:
        parts += [heading(model), _size_table(results, model)]
    return parts


def _size_table(results: Results, model: str) -> Html:
    rows = results["records"][f"sizes/{model}"]
    batches = list(rows[0]["latency_ms"])
    body = []
    for row in rows:
        at = results["settings"]["fractions"].index(row["fraction"])
        runs = [_runs(results, model, method) for method in METHODS]
        times = [(row["latency_ms"][b], rows[0]["latency_ms"][b]) for b in batches]
        body.append(
            [
                f"{100 * row['fraction']:.0f} %",
                *(_percent(_mean_accuracy(arm, at)) for arm in runs),
                _smaller(row["parameters"], rows[0]["parameters"]),
                _smaller(row["flops"] / 1e6, rows[0]["flops"] / 1e6, 2),
                *(_smaller(*pair, 2) for pair in times),
            ]
        )
    columns = ["cut", *LABELS.values(), "parameters", "MFLOPs"]
    columns += [f"ms, batch {batch}" for batch in batches]
    note = "Test accuracy in %, mean of all seeds; times are medians, sizes are exact."
    return table(columns, body, note)


def _rounds_section(results: Results) -> list[Html]:
    records, model = results["records"], results["settings"]["models"][0]
    rounds, dense = records["rounds"], records[f"sizes/{model}"][0]
    start = _runs(results, model, METHODS[0])[0]["accuracy"][0]
    rows = [
        [
            "dense",
            f"{dense['parameters']:,}",
            f"{dense['flops'] / 1e6:.2f}",
            "",
            _percent(start),
        ]
    ]
    rows += [
        [
            f"{100 * row['sparsity']:.0f} % of filters cut",
            _smaller(row["parameters"], dense["parameters"]),
            _smaller(row["flops"] / 1e6, dense["flops"] / 1e6, 2),
            _percent(row["before"]),
            _percent(row["after"]),
        ]
        for row in rounds
    ]
    columns = ["round", "parameters", "MFLOPs", "accuracy, cut", "accuracy, tuned"]
    epochs = results["settings"]["round_epochs"]
    return [
        text(
            f"{model}, seed 0 of Batch Bridgeout. Every round slices the net and the "
            f"optimiser's momentum, and trains for {epochs} epochs more."
        ),
        table(columns, rows),
        text("What each layer has left:"),
        _layers(rounds),
        _picture(results),
    ]


def _picture(results: Results) -> Html:
    """The groups of the first model, with what the last round has removed."""
    settings, last = results["settings"], results["records"]["rounds"][-1]
    model = settings["models"][0]
    # Which units went does not show in a picture, only how many of each group.
    keep = {
        name: np.arange(full) < kept for name, (kept, full) in last["units"].items()
    }
    groups = subject(model, DATASETS[settings["dataset"]]).groups
    return figure(
        groups_figure(groups, keep),
        f"{model} after the last round: every column a layer, every bar an axis of its "
        "kernel, every colour a group of channels that is cut together.",
    )


def _layers(rounds: list[Results]) -> Html:
    rows = [
        [
            name.removeprefix("params/").partition("/kernel")[0],
            full,
            *(row["units"][name][0] for row in rounds),
            bar(kept / full),
        ]
        for name, (kept, full) in rounds[-1]["units"].items()
    ]
    shares = [f"{100 * row['sparsity']:.0f} %" for row in rounds]
    return table(["filters of", "dense", *shares, "left"], rows)


def _export_section(results: Results) -> list[Html]:
    export = results["records"]["export"]
    size = sum(export["bytes"].values()) / 1024
    usage = (
        "from jaxprune.io.export import load_exported\n"
        f'model = load_exported("{export["folder"]}")\n'
        "logits = model(images)      # uint8 [any batch, height, width, channels]"
    )
    return [
        text(
            f"The folder {export['folder']}/ ({size:.0f} kB) holds the last round's "
            "net: the program as StableHLO, its parameters, and their description. "
            "Read back, it gave the same logits (largest difference "
            f"{export['difference']:.0e}) and {_percent(export['accuracy'])} % test "
            "accuracy."
        ),
        code(usage),
    ]


def _conditions(results: Results) -> list[Html]:
    settings, machine = results["settings"], results["machine"]
    hyper = [
        [arm, *(f"{value:g}" for value in values.values())]
        for arm, values in settings["hyper"].items()
    ]
    plain = {k: v for k, v in settings.items() if k != "hyper"}
    facts = {
        "command": results["command"],
        **{name.replace("_", " "): _listed(value) for name, value in plain.items()},
        "machine": f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}",
        "versions": ", ".join(f"{k} {v}" for k, v in machine["versions"].items()),
        "started": results["started"],
    }
    return [
        table(["setting", "value"], list(facts.items()), text_columns=2),
        table(
            [
                "hyper-parameters",
                "learning rate",
                "weight decay",
                "rate",
                "target",
                "q",
            ],
            hyper,
        ),
    ]


def _runs(results: Results, model: str, method: str) -> list[Results]:
    seeds = range(results["settings"]["seeds"])
    return [results["records"][f"{model}/{method}/seed{seed}"] for seed in seeds]


def _mean_accuracy(runs: list[Results], at: int) -> float:
    return sum(run["accuracy"][at] for run in runs) / len(runs)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _smaller(value: float, dense: float, digits: int = 0) -> Html:
    ratio = f" {dense / value:.1f}x" if value != dense else ""
    return Html(f"{value:,.{digits}f}{aside(ratio)}")


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
