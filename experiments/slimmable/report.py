"""From the results of the study to docs/slimmable.md.

    python -m experiments.slimmable.report

Everything here is a function of study.json.
"""

import json
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.slimmable.study import ARMS, PAIRS, RESULT, summary

PAGE = Path(__file__).parents[2] / "docs" / "slimmable.md"
LABELS = {
    "s_net": "S-Net",
    "s_net_taught": "S-Net, taught by its widest width",
    "equal_shares": "SP-Net with equal shares",
    "one_base": "SP-Net, one base",
    "sp_net": "SP-Net, two bases",
    "iterative": "SP-Net, pruned and tuned by turns",
    "zero_padded": "SP-Net, zero padding match",
    "auto_slim": "AutoSlim",
    "bcnet": "BCNet",
    "alone": "every width by itself",
}

# Whose claims, and what refutes them: the gain of the first arm over the second.
CLAIMS = {
    ("sp_net", "s_net"): "SP-Net is better than S-Net",
    ("sp_net", "equal_shares"): "its widths are better than equal shares in its place",
    ("one_base", "equal_shares"): "so are those of one base",
    ("sp_net", "one_base"): "two bases are better than one",
    ("sp_net", "iterative"): "two bases are better than pruning and tuning by turns",
    ("zero_padded", "sp_net"): "zero padding match is better than shared masks",
    ("auto_slim", "s_net_taught"): "widths of AutoSlim are better than equal shares",
    ("bcnet", "s_net_taught"): "widths of BCNet are better than equal shares",
}


def main() -> None:
    """Writes the page."""
    PAGE.write_text("\n".join(page(json.loads(RESULT.read_text()))))


def page(found: Mapping[str, Any]) -> Iterator[str]:
    """The lines of the page."""
    machine, settings = found["machine"], found["settings"]
    yield "# Slimmable networks: are pruned widths better than equal shares?\n"
    yield f"    {found['command']}"
    yield "    python -m experiments.slimmable.report\n"
    first = ", ".join(f"{share:g}" for share in settings["shares"][:-1])
    yield fill(
        f"""The second command makes this page. {settings["images"]} images of
        Fashion-MNIST at half their resolution to train on, 2000 test images to judge
        by, three widths. Every arm spends the multiply-adds of {settings["epochs"]}
        epochs of joint training at the widths of S-Net ({first} and
        {settings["shares"][-1]:g} of every layer), its search for widths included, and
        no width costs more than that of S-Net. Means over seeds ± half of a 95 %
        confidence interval, on {machine["cores"]} busy cores ({machine["cpu"]}), jax
        {machine["versions"]["jax"]}. Every number is that of
        `experiments/slimmable/study.json`; what the arms are, and what would refute the
        claims, stands in `experiments/slimmable/study.py`."""
    )
    yield from _missing(found["records"], settings["seeds"])
    told = summary(found["records"])
    yield from _verdicts(told)
    for net, own in told.items():
        yield f"## {net}\n"
        yield from _accuracies(net, own, found)
        yield from _gains(own)


def fill(text: str) -> str:
    """A paragraph of the page."""
    text = " ".join(text.split())
    return textwrap.fill(text, 88, break_on_hyphens=False) + "\n"


def _verdicts(told: Mapping[str, Any]) -> Iterator[str]:
    """For every claim whether it is borne out: above 0 at both narrower widths."""
    yield fill(
        """A claim holds on a net where the whole 95 % interval of the gain lies above 0
        at both narrower widths, and is turned round where it lies below 0 at both;
        elsewhere it is not shown. Intervals are not corrected for the number of
        comparisons. These trainings have some hundred times fewer steps than the
        paper's, which favours what spends its whole budget on the weights."""
    )
    for pair, claim in CLAIMS.items():
        name = " over ".join(pair)
        words = [
            f"{net}: {verdict(own['gains'][name])}"
            for net, own in told.items()
            if name in own["gains"]
        ]
        if words:
            yield f"* {claim[0].upper()}{claim[1:]}: {'; '.join(words)}."
    yield ""


def _missing(records: Mapping[str, Any], seeds: int) -> Iterator[str]:
    """What the study would have that is not there yet."""
    nets = {key.split("/")[0] for key in records}
    fewest = {
        arm: (max if arm == "zero_padded" else min)(  # a net without streams has none
            sum(arm in r for key, r in records.items() if key.startswith(f"{net}/"))
            for net in nets
        )
        for arm in ARMS
    }
    absent = [LABELS[arm] for arm, count in fewest.items() if not count]
    if any(count < seeds for count in fewest.values()):
        rest = f" Not run: {'; '.join(absent)}." if absent else ""
        yield fill(
            f"""**The study is not complete.** It is planned with {seeds} seeds; the
            tables say how many there are.{rest} The first command goes on with it."""
        )


def verdict(gains: Sequence[str]) -> str:
    """What the gains at all widths say of a claim."""
    narrower = [limits(cell) for cell in gains[1:]]
    if all(low > 0 for low, _ in narrower):
        return "holds"
    if all(high < 0 for _, high in narrower):
        return "turned round"
    return "not shown"


def limits(cell: str) -> tuple[float, float]:
    """The interval of a gain."""
    low, high = re.findall(r"[-+][\d.]+", cell)[1:]
    return float(low), float(high)


def _accuracies(net: str, own: Any, found: Mapping[str, Any]) -> Iterator[str]:
    """Accuracy and cost of every width, and what the search has taken."""
    records = [r for key, r in found["records"].items() if key.startswith(f"{net}/")]
    costs = next(r["s_net"]["multiply_adds"] for r in records if "s_net" in r)
    heads = [f"{cost / 1e6:.2f} M" for cost in costs]
    yield fill(
        """Test accuracy in %, by the multiply-adds of S-Net; what the narrower widths
        of the arm cost of that; the share of the budget that the search for widths
        took."""
    )
    yield f"| arm | {' | '.join(heads)} | cost | search | seeds |"
    yield "|---|" + "--:|" * (len(heads) + 3)
    for arm in ARMS:
        if arm not in own["accuracy"]:
            continue
        spent = [r[arm].get("found_for", 0.0) for r in records if arm in r]
        paid = np.mean([r[arm]["multiply_adds"] for r in records if arm in r], 0)
        cost = ", ".join(
            f"{a / b:.0%}" for a, b in zip(paid[1:], costs[1:], strict=True)
        )
        seeds = str(own["seeds"][arm])
        cells = [*own["accuracy"][arm], cost, f"{np.mean(spent):.0%}", seeds]
        yield f"| {LABELS[arm]} | {' | '.join(cells)} |"
    yield ""


def _gains(own: Any) -> Iterator[str]:
    """Differences in points, paired by seed; whether an interval is above 0."""
    pairs = [pair for pair in PAIRS if " over ".join(pair) in own["gains"]]
    if not pairs:
        return
    width = len(next(iter(own["gains"].values())))
    yield "Gains in points of accuracy, paired by seed, with 95 % intervals:\n"
    yield f"| | {' | '.join(f'width {i}' for i in range(width))} |"
    yield "|---|" + "--:|" * width
    for ours, theirs in pairs:
        cells = own["gains"][f"{ours} over {theirs}"]
        bold = [f"**{cell}**" if limits(cell)[0] > 0 else cell for cell in cells]
        yield f"| {LABELS[ours]} over {LABELS[theirs]} | {' | '.join(bold)} |"
    yield ""


if __name__ == "__main__":
    main()
