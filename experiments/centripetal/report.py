"""From the results of `centripetal` to docs/centripetal.md and its figure.

    python -m experiments.centripetal.report [RUN_FOLDER ...]

Given folders of runs, their results go into study.json first, a part for every
net. Everything here is a function of that; what the numbers say is written by hand in
`NOTES`, and holds for the committed results only.
"""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.centripetal import study as centripetal
from experiments.centripetal.study import ARMS, CLUSTERINGS, SHARES, over_seeds
from experiments.harness.pages import Results, dots, gain, gathered, numbers, percent

RESULT = Path(centripetal.__file__).with_suffix(".json")
PAGE = Path(__file__).parents[2] / "docs" / "centripetal.md"
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


def main() -> None:
    """Writes the page and the figure."""
    found = gathered(RESULT, sys.argv[1:])
    PAGE.write_text("\n".join(page(found)))
    draw(found).savefig(PAGE.with_suffix(".png"), dpi=110)


def page(found: Mapping[str, Results]) -> Iterator[str]:
    """The lines of the page."""
    yield "# Centripetal SGD: is trimming free, and is the small net a good one?\n"
    for run in found.values():
        yield f"    {run['command']}"
    yield "    python -m experiments.centripetal.report\n"
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
        "`experiments/centripetal/study.json`.\n"
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
            accuracy = percent(over_seeds(found, share, arm, "accuracy"))
            cells.append(f"{accuracy} | {loss:.3f}")
        yield f"| {LABELS[arm]} | {' | '.join(cells)} |"
    yield ""
    settings, whole = found["settings"], costs["1.0"]
    parts = []
    for share in SHARES:
        own = costs[f"{share}"]
        parameters, flops = (100 * own[k] / whole[k] for k in ("parameters", "flops"))
        parts.append(f"{share}: {parameters:.0f} % and {flops:.0f} %")
    yield (
        f"The wide net: {percent(_dense(found, 'dense'))} after "
        f"{settings['pretraining']} epochs, "
        f"{percent(_dense(found, 'dense, longer'))} after all. Share of its "
        f"parameters and FLOPs\nat each width: {'; '.join(parts)}.\n"
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
        cells = [
            gain(*(over_seeds(found, share, arm, "accuracy") for arm in (one, other)))
            for share in SHARES
        ]
        yield f"| {one} over {other} | {' | '.join(cells)} |"
    yield ""


def _tuned(found: Results) -> Iterator[str]:
    tries = len(found["records"][f"tune/{ARMS[0]}"])
    yield f"Of {tries} tries each, every arm runs at:\n"
    for arm in ("dense", *ARMS):
        yield f"* {arm}: {numbers(found['hyper'][arm])}"
    yield ""


def draw(found: Mapping[str, Results]) -> Any:
    """A dot for every seed, a bar for their mean; dashed, the wide net."""
    panels = {}
    for net, run in found.items():
        for share in SHARES:
            arms = {arm: over_seeds(run, share, arm, "accuracy") for arm in SHOWN[::-1]}
            title = f"{net}, {share} of the width"
            panels[title] = arms, _dense(run, "dense, longer")
    return dots(panels, height=3.4, width=5.0 * len(found) + 2, size=18)


if __name__ == "__main__":
    main()
