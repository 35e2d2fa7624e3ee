"""Tables of the studies here and of prunability, for `docs/reconstruction.md`.

    python -m experiments.reconstruction.page [--write]

prints what the page shows between its marks, or writes it there; a test holds the one
to the other.
"""

import argparse
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.harness.pages import percent
from experiments.prunability import study as prunability
from experiments.reconstruction import bounds, study

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "reconstruction.md"
TITLES = {
    "vgg_fashion": "VGG of 6 convolutions, Fashion-MNIST",
    "lenet_fashion": "LeNet-300-100, Fashion-MNIST",
    "lenet300": "LeNet-300-100, digits",
    "vgg16_cifar10": "VGG-16, CIFAR-10",
    "resnet56_cifar10": "ResNet-56, CIFAR-10",
}

Row = Sequence[str]

# What is put into the page once there is a result, and where.
SECTIONS = {
    "bounds": """## What is guaranteed, and what happens

    python -m experiments.reconstruction.bounds

Units sampled by sensitivity, layer by layer: the relative error of an output that is
guaranteed with probability 1 - delta, the share of units that it leaves, the largest
error of a draw (95th percentile), and how many draws are beyond what is guaranteed.
"seen" are the images that the sensitivities are of, with K = 1; "new" are others, with
the paper's K = 3.""",
    "prunability": """## Prunability

    python -m experiments.prunability.study

Kendall's rank correlation of each measure with the generalisation gap, over a family of
perceptrons on Fashion-MNIST that differ in width, depth, learning rate, amount of data
and label noise; "within" is over pairs that differ in one setting alone.""",
}
BEFORE = "## The calls"


def texts() -> dict[str, str]:
    """Mark -> what stands there, of the results that are committed."""
    found = {"nets": nets(json.loads(study.RESULT.read_text()))}
    if bounds.RESULT.exists():
        found["bounds"] = bound_table(json.loads(bounds.RESULT.read_text()))
    if prunability.RESULT.exists():
        found["prunability"] = ranks(json.loads(prunability.RESULT.read_text()))
    return found


def nets(found: Mapping[str, Any]) -> str:
    """A table for every net."""
    records = found["records"]
    names = [n for n in TITLES if any(key.startswith(f"{n}/") for key in records)]
    return "\n\n".join(_net(name, records) for name in names)


def _net(name: str, records: Mapping[str, Any]) -> str:
    cells: dict[tuple[str, str], list[Any]] = {}
    for key, record in records.items():
        net, _, *rest = key.split("/", 3)
        if net == name and rest != ["whole"]:
            cells.setdefault((rest[1], rest[0]), []).append(record)
    budgets = sorted({budget for _, budget in cells}, reverse=True)
    whole = [
        r for key, r in records.items() if re.fullmatch(f"{name}/seed./whole", key)
    ]
    methods = dict.fromkeys(method for method, _ in cells)
    head = [
        "",
        *[t for b in budgets for t in (f"at {float(b):.0%}", "fine-tuned")],
        "s",
    ]
    rows = []
    for method in methods:
        row = [method]
        for budget in budgets:
            own = cells.get((method, budget), [])
            row += [_mean(own, "at once"), _mean(own, "fine-tuned")]
        seconds = [r["seconds"] for b in budgets for r in cells.get((method, b), [])]
        rows.append([*row, f"{sum(seconds) / len(seconds):.1f}" if seconds else "-"])
    title = f"{TITLES[name]}; whole {percent(whole)} %, {len(whole)} seeds:"
    return f"{title}\n\n{markdown(head, rows)}"


def _mean(records: Sequence[Mapping[str, float]], what: str) -> str:
    return percent([r[what] for r in records]) if len(records) > 1 else "-"


def bound_table(found: Mapping[str, Any]) -> str:
    """What is guaranteed, and what happens."""
    head = ["net, images", "epsilon", "delta", "units kept", "error", "failed"]
    rows = [
        [
            f"{row['net']}, {row['images']}",
            f"{row['epsilon']:g}",
            f"{row['delta']:g}",
            f"{row['kept']:.1%}",
            f"{row['error']:.2f}",
            f"{row['failed']:.1%}",
        ]
        for row in found["summary"]
    ]
    return markdown(head, rows)


def ranks(found: Mapping[str, Any]) -> str:
    """Rank correlations with the gap."""
    head = ["measure", "tau, all nets", "by seed", "within one setting"]
    rows = [
        [
            measure,
            f"{row['all']:+.2f}",
            ", ".join(f"{tau:+.2f}" for tau in row["seeds"]),
            f"{row['within']:+.2f}",
        ]
        for measure, row in found["summary"].items()
    ]
    return markdown(head, rows)


def markdown(head: Row, rows: Iterable[Row]) -> str:
    """A table of Markdown, numbers to the right.

    >>> print(markdown(("net", "s"), [("a", "1.25")]))
    | net | s |
    |---|---:|
    | a | 1.25 |
    """
    rule = "|".join(["", "---", *["---:"] * (len(head) - 1), ""])
    lines = [f"| {' | '.join(line)} |" for line in (head, *rows)]
    return "\n".join([lines[0].replace("|  |", "| |"), rule, *lines[1:]])


def filled(document: str, parts: Mapping[str, str]) -> str:
    """The document with these texts between its marks."""
    for name, text in parts.items():
        mark = f"<!-- {name} -->"
        if name in SECTIONS and mark not in document:
            new = f"{SECTIONS[name]}\n\n{mark}\n<!-- end -->\n\n{BEFORE}"
            document = document.replace(BEFORE, new)
        pattern = f"{mark}\n.*?<!-- end -->"
        assert re.search(pattern, document, re.DOTALL), f"no mark {mark}"
        new = f"{mark}\n{text}\n<!-- end -->"
        document = re.sub(pattern, lambda _, new=new: new, document, flags=re.DOTALL)
    return document


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="into the page")
    if parser.parse_args().write:
        DOCUMENT.write_text(filled(DOCUMENT.read_text(), texts()))
    else:
        print("\n\n".join(texts().values()))
