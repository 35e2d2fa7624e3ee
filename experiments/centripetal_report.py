"""From the results of `centripetal` to docs/centripetal.md and its figure.

    python -m experiments.centripetal_report [RUN_FOLDER ...]

Given folders of runs, their results go into centripetal.json first, a part for every
net. Everything here is a function of that; what the numbers say is written by hand in
`NOTES`, and holds for the committed results only.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments import centripetal
from experiments.batch_bridgeout_search import write_compact
from experiments.centripetal import ARMS, CLUSTERINGS, SHARES, over_seeds
from jaxprune.report import interval, new_figure

RESULT = Path(centripetal.__file__).with_suffix(".json")
PAGE = Path(__file__).parents[1] / "docs" / "centripetal.md"
SHOWN = (*ARMS, *CLUSTERINGS[1:])
LABELS = {
    "centripetal": "C-SGD from the trained net, then trimmed",
    "redundant": "C-SGD from the start, then trimmed",
    "l1": "cut by L1 norm, then fine-tuned",
    "scratch": "trained at that width from scratch",
    "even": "C-SGD, neighbours as clusters",
    "imbalanced": "C-SGD, one large cluster",
}

NOTES = """\
What it says. Intervals are not corrected for the number of comparisons.

* Trimming is free, as published: in every arm, width and seed not one prediction
  changes when the clusters are merged, and outputs move by rounding. `merge` and the
  optimiser read the same clusters and the same trace, so dense layers, which the paper
  leaves alone, are no special case.
* Neither net confirms that the small net is a better one. C-SGD from the trained net is
  above neither L1 pruning with fine-tuning nor training from scratch, at either width:
  all intervals hold 0. Nor is a wide net that is trained into a narrow one from the
  start above the narrow one trained as usual. On ResNet-8 all arms are within 4 points
  of the wide net, so digits leave little to tell apart.
* Whom a unit is drawn to matters little, as published: k-means is a little above
  neighbours and one large cluster, and mostly within the interval.
* What this cannot say: 1800 steps in all are few, where the authors take 940 000. The
  pull is 100 times theirs and more, so that clusters meet in time.
"""

Results = Mapping[str, Any]


def main() -> None:
    """Writes the page and the figure."""
    if folders := sys.argv[1:]:
        there = json.loads(RESULT.read_text()) if RESULT.exists() else {}
        runs = [json.loads(Path(f, "results.json").read_text()) for f in folders]
        write_compact(RESULT, there | {run["settings"]["net"]: run for run in runs})
    found = json.loads(RESULT.read_text())
    PAGE.write_text("\n".join(page(found)))
    draw(found).savefig(PAGE.with_suffix(".png"), dpi=110)


def page(found: Mapping[str, Results]) -> Iterator[str]:
    """The lines of the page."""
    yield "# Centripetal SGD: is trimming free, and is the small net a good one?\n"
    for run in found.values():
        yield f"    {run['command']}"
    yield "    python -m experiments.centripetal_report\n"
    first = next(iter(found.values()))
    settings, machine = first["settings"], first["machine"]
    seconds = " and ".join(f"{run['seconds']:.0f}" for run in found.values())
    yield (
        "The last command makes this page. Every arm is trained "
        f"{settings['pretraining']} + {settings['epochs']} epochs on scikit-learn's\n"
        f"{settings['dataset']}, {settings['seeds']} seeds. Test accuracy in %, mean ± "
        "half of a 95 % confidence interval, and mean\ncross-entropy; "
        f"{seconds} s on {machine['cores']} busy cores ({machine['cpu']}), jax\n"
        f"{machine['versions']['jax']}. Every number is that of "
        "`experiments/centripetal.json`.\n"
    )
    yield NOTES
    for net, run in found.items():
        widths = ", ".join(map(str, run["settings"]["widths"]))
        yield f"## {net}, widths {widths}\n"
        yield from _table(run)
        yield from _trimming(run)
        yield from _differences(run)
        yield from _tuned(run)
    yield "![Accuracy of every seed by arm, net and width](centripetal.png)"
    yield ""


def _percent(values: list[float]) -> str:
    found = interval(values)
    return f"{100 * found.mean:.1f} ± {50 * (found.high - found.low):.1f}"


def _dense(found: Results, name: str) -> list[float]:
    records = found["records"]
    seeds = range(found["settings"]["seeds"])
    return [records[f"seed{s}"][name]["accuracy"] for s in seeds]


def _table(found: Results) -> Iterator[str]:
    costs = found["records"]["costs"]
    heads = [f"{share} of the width" for share in SHARES]
    yield f"| arm | {' | '.join(f'{head} | loss' for head in heads)} |"
    yield "|---|" + "--:|" * 2 * len(SHARES)
    for arm in SHOWN:
        cells = []
        for share in SHARES:
            loss = np.mean(over_seeds(found, share, arm, "loss"))
            accuracy = _percent(over_seeds(found, share, arm, "accuracy"))
            cells.append(f"{accuracy} | {loss:.3f}")
        yield f"| {LABELS[arm]} | {' | '.join(cells)} |"
    yield ""
    yield (
        f"The wide net: {_percent(_dense(found, 'dense'))} after "
        f"{found['settings']['pretraining']} epochs, "
        f"{_percent(_dense(found, 'dense, longer'))} after all. Share of its "
        "parameters and FLOPs\nat each width: "
        + "; ".join(
            f"{share}: {100 * costs[f'{share}']['parameters'] / costs['1.0']['parameters']:.0f} % "  # noqa: E501
            f"and {100 * costs[f'{share}']['flops'] / costs['1.0']['flops']:.0f} %"
            for share in SHARES
        )
        + ".\n"
    )


def _trimming(found: Results) -> Iterator[str]:
    yield "What trimming changes, the largest over all seeds:\n"
    yield "| arm | width | before | after | predictions changed | output error |"
    yield "|---|--:|--:|--:|--:|--:|"
    for arm in (*ARMS[:2], *CLUSTERINGS[1:]):
        for share in SHARES:
            before, after, changed, error = (
                over_seeds(found, share, arm, what)
                for what in (
                    "before",
                    "accuracy",
                    "changed predictions",
                    "output error",
                )
            )
            yield (
                f"| {LABELS[arm]} | {share} | {100 * np.mean(before):.2f} | "
                f"{100 * np.mean(after):.2f} | {max(changed)} | {max(error):.0e} |"
            )
    yield ""


def _differences(found: Results) -> Iterator[str]:
    yield "Gains in points of accuracy, paired by seed, with 95 % intervals:\n"
    yield f"| | {' | '.join(f'{share} of the width' for share in SHARES)} |"
    yield "|---|" + "--:|" * len(SHARES)
    pairs = [
        ("centripetal", "l1"),
        ("centripetal", "scratch"),
        ("redundant", "scratch"),
        ("centripetal", "even"),
        ("centripetal", "imbalanced"),
    ]
    for one, other in pairs:
        cells = []
        for share in SHARES:
            ours, theirs = (
                over_seeds(found, share, arm, "accuracy") for arm in (one, other)
            )
            gain = interval([100 * (a - b) for a, b in zip(ours, theirs, strict=True)])
            cells.append(f"{gain.mean:+.1f} [{gain.low:+.1f}, {gain.high:+.1f}]")
        yield f"| {one} over {other} | {' | '.join(cells)} |"
    yield ""


def _tuned(found: Results) -> Iterator[str]:
    tries = len(found["records"][f"tune/{ARMS[0]}"])
    yield f"Of {tries} tries each, every arm runs at:\n"
    for arm in ("dense", *ARMS):
        numbers = ", ".join(
            f"{name.replace('_', ' ')} {value}"
            for name, value in found["hyper"][arm].items()
        )
        yield f"* {arm}: {numbers}"
    yield ""


def draw(found: Mapping[str, Results]) -> Any:
    """A dot for every seed, a bar for their mean; dashed, the wide net."""
    figure = new_figure(
        len(found) * len(SHARES), height=3.4, width=5.0 * len(found) + 2
    )
    panels = [(net, share) for net in found for share in SHARES]
    for axes, (net, share) in zip(figure.axes, panels, strict=True):
        for row, arm in enumerate(SHOWN[::-1]):
            values = 100 * np.array(over_seeds(found[net], share, arm, "accuracy"))
            axes.scatter(values, np.full(len(values), row), s=18, alpha=0.5)
            axes.plot([values.mean()] * 2, [row - 0.3, row + 0.3], color="black")
        dense = 100 * np.mean(_dense(found[net], "dense, longer"))
        axes.axvline(dense, color="grey", lw=0.8, ls="--")
        labels = SHOWN[::-1] if axes is figure.axes[0] else [""] * len(SHOWN)
        axes.set_yticks(range(len(SHOWN)), labels)
        axes.set(title=f"{net}, {share} of the width", xlabel="test accuracy (%)")
    return figure


if __name__ == "__main__":
    main()
