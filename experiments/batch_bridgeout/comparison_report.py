"""From the results of `comparison` and `defaults` to docs/batch_bridgeout.md.

python -m experiments.batch_bridgeout.comparison_report [RUN_FOLDER ...]

Run folders given are first copied to comparison.json and defaults.json beside this
file, each to the file that it is a run of.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.batch_bridgeout import defaults
from experiments.batch_bridgeout.comparison import (
    CELLS,
    COMPENSATED,
    SEEDS,
    TUNED_AT,
    Cell,
)
from experiments.harness import pages
from experiments.harness.methods import FRACTIONS, area
from jaxprune.display import Interval, interval, new_figure, plot_runs

HERE = Path(__file__).parent
RESULT, DEFAULTS = HERE / "comparison.json", HERE / "defaults.json"
FINDINGS = HERE / "findings.md"
PAGE = HERE.parents[1] / "docs" / "batch_bridgeout.md"
FIGURE = PAGE.with_suffix(".png")

LABELS = {
    "plain": "plain",
    "weight_decay": "weight decay",
    "bridgeout": "Batch Bridgeout",
    "relative_bridgeout": "relative noise",
    "untargeted_bridgeout": "untargeted",
    "shuffled": "targets shuffled",
    "dropout": "dropout",
    "targeted_dropout": "targeted dropout",
    "dropconnect": "DropConnect",
    "group_bridgeout": "group Bridgeout",
    "bridge_penalty": "bridge penalty",
}
COLORS = {
    "weight_decay": "#52525b",
    "bridgeout": "#c2410c",
    "dropout": "#2563eb",
    "relative_bridgeout": "#16a34a",
}
KINDS = ("one_shot", "recalibrated", "fisher", "tuned")

Results = Mapping[str, Any]


def runs_of(results: Results, cell: Cell) -> list[Results]:
    """The records of all seeds, or none if some are missing."""
    records, names = results["records"], [cell.seed(seed) for seed in range(SEEDS)]
    return [records[name] for name in names] if set(names) <= records.keys() else []


def complete(results: Results) -> list[Cell]:
    """Cells all of whose seeds were run, in the order of `CELLS`."""
    return [cell for cell in CELLS if runs_of(results, cell)]


def areas(results: Results, cell: Cell, kind: str) -> list[float]:
    """Area under accuracy against cut, one per seed; empty if not measured."""
    return [area(run[kind]) for run in runs_of(results, cell) if run.get(kind)]


def gain(results: Results, cell: Cell, other: str, kind: str) -> Interval:
    """Area of a cell less that of another arm at the same exposure, paired by seed."""
    ours = areas(results, cell, kind)
    theirs = areas(results, cell._replace(arm=other), kind)
    return interval([a - b for a, b in zip(ours, theirs, strict=True)])


def shown(found: Interval, sign: str = "+") -> str:
    """A mean and its interval."""
    return f"{found.mean:{sign}.3f} [{found.low:{sign}.3f}, {found.high:{sign}.3f}]"


def page(results: Results, as_it_comes: Results) -> str:
    """The whole page."""
    cpu, jax = results["machine"]["cpu"], results["machine"]["versions"]["jax"]
    parts = [
        "# Batch Bridgeout at equal weight decay",
        "    python -m experiments.batch_bridgeout.comparison\n"
        "    python -m experiments.batch_bridgeout.defaults\n"
        "    python -m experiments.batch_bridgeout.comparison_report "
        "runs/batch_bridgeout-comparison runs/batch_bridgeout-defaults",
        f"The last command makes this page. {results['seconds']:.0f} s and "
        f"{as_it_comes['seconds']:.0f} s on 2 busy cores ({cpu}), jax {jax}. "
        f"{SEEDS} paired seeds, 95 % intervals of paired differences (Student's t), "
        "not corrected for their number. The protocol is the header of "
        "`experiments/batch_bridgeout/comparison.py`.",
        f"![Accuracy against the share of filters cut]({FIGURE.name})",
        FINDINGS.read_text().strip(),
    ]
    for dataset, net in dict.fromkeys((c.dataset, c.net) for c in complete(results)):
        parts += [f"## {net} on {dataset}", _table(results, dataset, net)]
    parts += ["## Compensated", _compensated(results)]
    parts += ["## As it comes", _defaults(as_it_comes), "## Not run", _missing(results)]
    return "\n\n".join(parts) + "\n"


def summary(results: Results) -> str:
    """Batch Bridgeout beside weight decay wherever both were run, for the README."""
    there = complete(results)
    head = [
        "data",
        "net",
        "D",
        "uncut %",
        "area, one shot",
        "gain",
        "gain, recalibrated",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---|---|---:|---:|---:|---:|---:|"]
    for cell in sorted((c for c in there if c.arm == "bridgeout"), key=_place):
        decay = cell._replace(arm="weight_decay")
        if decay not in there:
            continue
        pairs = [
            [interval(of(results, one)).mean for one in (decay, cell)]
            for of in (_uncut, lambda results, one: areas(results, one, "one_shot"))
        ]
        recalibrated = ""
        if areas(results, cell, "recalibrated"):
            recalibrated = shown(gain(results, cell, decay.arm, "recalibrated"))
        numbers = [
            f"{cell.exposure:g}",
            "{:.1f} → {:.1f}".format(*pairs[0]),
            "{:.3f} → {:.3f}".format(*pairs[1]),
            shown(gain(results, cell, decay.arm, "one_shot")),
            recalibrated,
        ]
        lines.append("| " + " | ".join([cell.dataset, cell.net, *numbers]) + " |")
    return "\n".join(lines)


def _place(cell: Cell) -> tuple[bool, int, float]:
    nets = list(dict.fromkeys(other.net for other in CELLS))
    return cell.dataset != "digits", nets.index(cell.net), cell.exposure


def _uncut(results: Results, cell: Cell) -> list[float]:
    return [100 * run["one_shot"][0] for run in runs_of(results, cell)]


def _table(results: Results, dataset: str, net: str) -> str:
    head = ["D", "arm", "rate", "uncut %", "area, one shot", "over weight decay"]
    head += ["recalibrated", "over weight decay", "by Fisher", "tuned"]
    lines = ["| " + " | ".join(head) + " |", "| ---: | --- " + "| ---: " * 8 + "|"]
    for cell in complete(results):
        if (cell.dataset, cell.net) == (dataset, net):
            lines.append("| " + " | ".join(_row(results, cell)) + " |")
    return "\n".join(lines)


def _row(results: Results, cell: Cell) -> list[str]:
    runs = runs_of(results, cell)
    uncut = interval(_uncut(results, cell)).mean
    means = {
        kind: f"{interval(found).mean:.3f}" if found else ""
        for kind in KINDS
        for found in [areas(results, cell, kind)]
    }
    decay = cell._replace(arm="weight_decay")
    compared = decay in complete(results) and cell != decay
    over = {
        kind: shown(gain(results, cell, "weight_decay", kind))
        if compared and means[kind]
        else ""
        for kind in ("one_shot", "recalibrated")
    }
    rate = runs[0]["hyper"]["rate"]
    return [
        f"{cell.exposure:g}",
        LABELS[cell.arm],
        f"{rate:g}" if rate else "",
        f"{uncut:.1f}",
        means["one_shot"],
        over["one_shot"],
        means["recalibrated"],
        over["recalibrated"],
        means["fisher"],
        means["tuned"],
    ]


def _compensated(results: Results) -> str:
    """Accuracy after one-shot cuts: recalibrated, and compensated before that."""
    cuts = " | ".join(f"{100 * fraction:.0f} %" for fraction in TUNED_AT)
    lines = [f"| data | net | D | arm | | {cuts} |"]
    lines.append("| --- | --- | ---: | --- | --- " + "| ---: " * len(TUNED_AT) + "|")
    places = [FRACTIONS.index(fraction) for fraction in TUNED_AT]
    for cell in COMPENSATED:
        names = [f"compensated/{cell.seed(seed)}" for seed in range(SEEDS)]
        if not set(names) <= results["records"].keys():
            continue
        before = [
            [run["recalibrated"][k] for k in places] for run in runs_of(results, cell)
        ]
        after = [results["records"][name] for name in names]
        for what, curves in (("recalibrated", before), ("compensated too", after)):
            means = [interval(list(at)).mean for at in zip(*curves, strict=True)]
            numbers = " | ".join(f"{100 * mean:.1f}" for mean in means)
            where = f"{cell.dataset} | {cell.net} | {cell.exposure:g}"
            lines.append(f"| {where} | {LABELS[cell.arm]} | {what} | {numbers} |")
    return (
        "Accuracy (%) after one-shot cuts of every layer by L2, mean over seeds: with "
        "BatchNorm statistics measured anew, and with `jaxprune.compensate` on the "
        "same 512 images before that.\n\n" + "\n".join(lines)
    )


def _defaults(results: Results) -> str:
    arms = list(defaults.ARMS)
    lines = [
        "| data | net | learning rate, momentum | "
        + " | ".join([*arms, f"{arms[1]}, less {arms[0]}"])
        + " |",
        "| --- | --- | --- " + "| ---: " * (len(arms) + 1) + "|",
    ]
    by_arm: dict[defaults.Cell, dict[str, list[float]]] = {}
    for cell in defaults.CELLS:
        alike = by_arm.setdefault(cell._replace(seed=0, arm=""), {})
        alike.setdefault(cell.arm, []).append(results["records"].get(cell.name))
    worst = 0.0
    for cell, found in by_arm.items():
        if not any(None in accuracies for accuracies in found.values()):
            means = {arm: 100 * float(np.mean(found[arm])) for arm in arms}
            worst = max(worst, means[arms[0]] - means[arms[1]])
            shown = [f"{mean:.1f}" for mean in means.values()]
            numbers = " | ".join([*shown, pages.gain(found[arms[1]], found[arms[0]])])
            where = f"{cell.dataset} | {cell.net} | {cell.rate[0]:g}, {cell.rate[1]:g}"
            lines.append(f"| {where} | {numbers} |")
    return (
        "Test accuracy (%) with `optax.chain(jaxprune.bridgeout(), optax.sgd(rate))`, "
        "uncut and without clipping,\nat learning rates that plain SGD likes: mean "
        f"over {defaults.SEEDS} paired seeds, and the paired difference with its 95 % "
        f"interval. At worst it\nis {worst:.1f} points below plain SGD.\n\n"
        + "\n".join(lines)
    )


def _missing(results: Results) -> str:
    there = complete(results)
    lines = [
        f"* {cell.dataset}, {cell.net}, D = {cell.exposure:g}: {LABELS[cell.arm]}"
        for cell in CELLS
        if cell not in there
    ]
    if not lines:
        return "Nothing is missing."
    return (
        "The first command, given more time, goes on with these (CIFAR is "
        "`jaxprune run batch_bridgeout --dataset cifar10`):\n\n" + "\n".join(lines)
    )


def figure(results: Results) -> Any:
    """Curves at the paper's exposure: one shot on both data sets, recalibrated."""
    panels = {
        "digits, one shot": ("digits", "one_shot"),
        "digits, recalibrated": ("digits", "recalibrated"),
        "fashion_mnist, one shot": ("fashion_mnist", "one_shot"),
    }
    drawn = new_figure(len(panels), height=3.6, width=11.0)
    there = complete(results)
    for axes, (title, (dataset, kind)) in zip(drawn.axes, panels.items(), strict=True):
        cells = {arm: Cell(dataset, "vgg", 14.5, arm) for arm in COLORS}
        curves = {
            LABELS[arm]: [
                [100 * x for x in run[kind]] for run in runs_of(results, cell)
            ]
            for arm, cell in cells.items()
            if cell in there
        }
        colors = {LABELS[arm]: color for arm, color in COLORS.items()}
        plot_runs(axes, [100 * f for f in FRACTIONS], curves, colors)
        axes.set(title=title, xlabel="filters cut in every layer (%)", ylim=(0, 102))
    drawn.axes[0].set_ylabel("test accuracy (%)")
    drawn.axes[0].legend(frameon=False)
    return drawn


def main(folders: Sequence[str]) -> None:
    """Takes over the runs given, then writes the page and its figure."""
    for folder in folders:
        found = json.loads(Path(folder, "results.json").read_text())
        is_study = "fractions" in found["settings"]
        pages.write_compact(RESULT if is_study else DEFAULTS, found)
    results = json.loads(RESULT.read_text())
    PAGE.write_text(page(results, json.loads(DEFAULTS.read_text())))
    figure(results).savefig(FIGURE, dpi=110)


if __name__ == "__main__":
    main(sys.argv[1:])
