"""From the results of `centripetal` to docs/centripetal.md and its figure.

    python -m experiments.centripetal_report [RUN_FOLDER]

Given the folder of a run, its results become centripetal.json first. Everything here is
a function of that; what the numbers say is written by hand in `NOTES`, and holds for
the committed results only.
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
"""


def main() -> None:
    """Writes the page and the figure."""
    if len(sys.argv) > 1:
        found = json.loads(Path(sys.argv[1], "results.json").read_text())
        write_compact(RESULT, found)
    found = json.loads(RESULT.read_text())
    PAGE.write_text("\n".join(page(found)))
    draw(found).savefig(PAGE.with_suffix(".png"), dpi=110)


def page(found: Mapping[str, Any]) -> Iterator[str]:
    """The lines of the page."""
    machine, settings = found["machine"], found["settings"]
    yield "# Centripetal SGD: is trimming free, and is the small net a good one?\n"
    yield f"    {found['command']}"
    yield "    python -m experiments.centripetal_report\n"
    yield (
        f"The second command makes this page. A ResNet-{settings['depth']} of widths "
        f"{', '.join(map(str, settings['widths']))} on scikit-learn's\n"
        f"{settings['dataset']}; every arm gets {settings['pretraining']} + "
        f"{settings['epochs']} epochs, "
        f"{settings['seeds']} seeds. Test accuracy in %,\nmean ± half of a 95 % "
        f"confidence interval, and the mean cross-entropy; {found['seconds']:.0f} s on "
        f"{machine['cores']} busy\ncores ({machine['cpu']}), jax "
        f"{machine['versions']['jax']}. Every number is that of\n"
        "`experiments/centripetal.json`.\n"
    )
    yield NOTES
    yield from _table(found)
    yield from _trimming(found)
    yield from _differences(found)
    yield from _tuned(found)
    yield "![Accuracy of every seed by arm and width](centripetal.png)"
    yield ""


def _percent(values: list[float]) -> str:
    found = interval(values)
    return f"{100 * found.mean:.1f} ± {50 * (found.high - found.low):.1f}"


def _dense(found: Mapping[str, Any], name: str) -> list[float]:
    records = found["records"]
    seeds = range(found["settings"]["seeds"])
    return [records[f"seed{s}"][name]["accuracy"] for s in seeds]


def _table(found: Mapping[str, Any]) -> Iterator[str]:
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


def _trimming(found: Mapping[str, Any]) -> Iterator[str]:
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


def _differences(found: Mapping[str, Any]) -> Iterator[str]:
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


def _tuned(found: Mapping[str, Any]) -> Iterator[str]:
    tries = len(found["records"][f"tune/{ARMS[0]}"])
    yield f"Of {tries} tries each, every arm runs at:\n"
    for arm in ARMS:
        numbers = ", ".join(
            f"{name.replace('_', ' ')} {value}"
            for name, value in found["hyper"][arm].items()
        )
        yield f"* {arm}: {numbers}"
    yield ""


def draw(found: Mapping[str, Any]) -> Any:
    """A dot for every seed, a bar for their mean."""
    figure = new_figure(len(SHARES), height=3.4)
    dense = 100 * np.mean(_dense(found, "dense, longer"))
    for axes, share in zip(figure.axes, SHARES, strict=True):
        for row, arm in enumerate(SHOWN[::-1]):
            values = 100 * np.array(over_seeds(found, share, arm, "accuracy"))
            axes.scatter(values, np.full(len(values), row), s=18, alpha=0.5)
            axes.plot([values.mean()] * 2, [row - 0.3, row + 0.3], color="black")
        axes.axvline(dense, color="grey", lw=0.8, ls="--")
        axes.set_yticks(range(len(SHOWN)), SHOWN[::-1])
        axes.set(title=f"{share} of the width", xlabel="test accuracy (%)")
    return figure


if __name__ == "__main__":
    main()
