"""From the results of the study to docs/try_and_learn.md.

python -m experiments.try_and_learn.report [RUN_FOLDER]

A run folder that is given is first copied to study.json beside this file.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.harness.pages import gain, write_compact
from jaxprune.display import interval

HERE = Path(__file__).parent
RESULT, PAGE = HERE / "study.json", HERE.parents[1] / "docs" / "try_and_learn.md"
FINDINGS = HERE / "findings.md"
NETS = {"vgg": "VGG on Fashion-MNIST", "segnet": "SegNet on scenes"}
RULES = ("agents", "magnitude", "random")

Records = Mapping[str, Any]


def main() -> None:
    """Writes the page."""
    for folder in sys.argv[1:]:
        write_compact(RESULT, json.loads(Path(folder, "results.json").read_text()))
    PAGE.write_text("\n".join(page(json.loads(RESULT.read_text()))) + "\n")


def page(found: Mapping[str, Any]) -> Iterator[str]:
    """The lines of the page."""
    machine, records = found["machine"], found["records"]
    yield "# Try-and-learn: agents that learn which filters to keep\n"
    yield "    python -m experiments.try_and_learn.study"
    yield "    python -m experiments.try_and_learn.report runs/try_and_learn\n"
    yield (
        f"The last command makes this page. {found['seconds']:.0f} s on 2 busy cores "
        f"({machine['cpu']}), jax {machine['versions']['jax']}. Means over paired "
        "seeds with\n95 % intervals (Student's t). The protocol, and what would refute "
        "the paper here, is the header of\n`experiments/try_and_learn/study.py`.\n"
    )
    yield FINDINGS.read_text()
    for net, title in NETS.items():
        seeds = complete(records, net)
        if len(seeds) > 1:
            yield f"## {title}, {len(seeds)} seeds\n"
            yield from _bounds(records, net, seeds, found["settings"][net]["bounds"])
            yield from _orders(records, net, seeds, found["settings"][net])
            yield from _speed(records, net, seeds)


def complete(records: Records, net: str) -> list[str]:
    """Seeds of which nothing is missing."""
    names = [key.split("/") for key in records]
    return [seed for which, seed, what, *_ in names if which == net and what == "speed"]


def _column(
    records: Records, net: str, seeds: Sequence[str], what: str, of: str
) -> list[float]:
    return [records[f"{net}/{seed}/{what}"][of] for seed in seeds]


def _mean(values: Sequence[float], digits: int = 1) -> str:
    found = interval(values)
    return f"{found.mean:.{digits}f} ± {(found.high - found.low) / 2:.{digits}f}"


def _bounds(
    records: Records, net: str, seeds: Sequence[str], bounds: Sequence[float]
) -> Iterator[str]:
    def column(what: str, of: str) -> list[float]:
        return _column(records, net, seeds, what, of)

    whole, longer = column("whole", "held"), column("whole", "longer")
    yield (
        f"The whole net has {_mean(column('whole', 'test'))} points on test images, "
        f"{_mean(longer)} after as much more training\nas the others get.\n"
    )
    yield (
        "| bound | filters kept | multiply-adds kept | drop on held-out images "
        "| test: agents | magnitude | random | agents, less magnitude | less random "
        "| kept above cut |"
    )
    yield "| ---: " * 10 + "|"
    for bound in bounds:
        arms = {rule: column(f"{rule}/{bound:g}", "test") for rule in RULES}
        held = column(f"agents/{bound:g}", "held")
        drop = [before - after for before, after in zip(whole, held, strict=True)]
        above = [x for x in column(f"agents/{bound:g}", "above") if x is not None]
        cells = [
            f"{bound:g}",
            _share(column, bound, "units"),
            _share(column, bound, "multiply-adds"),
            _mean(drop),
            *[_mean(arms[rule]) for rule in RULES],
            gain(*_points(arms["agents"], arms["magnitude"])),
            gain(*_points(arms["agents"], arms["random"])),
            _mean(above, 2) if len(above) > 1 else "",
        ]
        yield "| " + " | ".join(cells) + " |"
    yield (
        "\n`kept above cut`: of the pairs of a kept and a cut filter of one layer, the "
        "share in which the kept\none has the larger norm; 1 is pruning by magnitude, "
        "0.5 a choice that does not look at norms.\n"
    )


def _share(column: Callable[..., list[float]], bound: float, of: str) -> str:
    return _mean([100 * x for x in column(f"agents/{bound:g}", of)], 0) + " %"


def _points(*arms: Sequence[float]) -> list[list[float]]:
    """`gain` takes fractions."""
    return [[x / 100 for x in arm] for arm in arms]


def _orders(
    records: Records, net: str, seeds: Sequence[str], settings: Mapping[str, Any]
) -> Iterator[str]:
    if not settings["orders"]:
        return
    bound = settings["bounds"][-1]
    yield f"Order of the layers, bound {bound:g}:\n"
    yield "| order | filters kept | multiply-adds kept | test | seconds |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for order in ("agents", *settings["orders"]):
        key = f"{order}/{bound:g}"
        units, adds, test, seconds = (
            _column(records, net, seeds, key, of)
            for of in ("units", "multiply-adds", "test", "seconds")
        )
        shares = [_mean([100 * x for x in part], 0) + " %" for part in (units, adds)]
        name = "low to high" if order == "agents" else order.replace("_", " ")
        numbers = [*shares, _mean(test), _mean(seconds, 0)]
        yield f"| {name} | " + " | ".join(numbers) + " |"
    yield ""


def _speed(records: Records, net: str, seeds: Sequence[str]) -> Iterator[str]:
    ms = [records[f"{net}/{seed}/speed"] for seed in seeds]
    faster = [one["whole"] / one["pruned"] for one in ms]
    fewer = [1 / one["multiply-adds"] for one in ms]
    yield (
        "256 images on the CPU, largest bound: the whole net takes "
        f"{_mean(faster, 2)} times as long as the pruned one,\nfor {_mean(fewer, 2)} "
        "times the multiply-adds; measured in turns on a busy machine.\n"
    )


if __name__ == "__main__":
    main()
