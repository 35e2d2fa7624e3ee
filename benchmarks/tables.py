"""Tables of the results, for the terminal and for `docs/speed.md`.

    python -m benchmarks.tables [--write]

prints what `docs/speed.md` shows between its marks, or writes it there; a test holds
the one to the other.
"""

import argparse
import json
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import rich.console
import rich.table

from benchmarks import machine

DOCUMENT = pathlib.Path(__file__).parent.parent / "docs" / "speed.md"

Row = Sequence[str]

NETS_HEAD = (
    "net",
    "make_jaxpr",
    "trace",
    "ratio",
    "first call",
    "Torch-Pruning",
    "later calls",
    "Torch-Pruning",
)
SWEEP_HEAD = (
    "net",
    "make_jaxpr",
    "trace",
    "ratio",
    "whole way",
    "Torch-Pruning",
    "times faster",
)
LAYERS = {
    "resnet50": {
        "rank": "ranking the inputs of 52 convolutions",
        "fit": "fitting their kernels to half of the inputs",
    },
    "decoder layer": {
        "half": "SparseGPT of a decoder layer of width 2048, half",
        "2:4": "the same, 2 of 4",
    },
}
# What is put into the document once there is a result, and where.
SECTIONS = {
    "layers": """## The linear algebra of layers

Of a ResNet-50 and of a decoder layer of width 2048, from second moments on, in seconds
(`python -m benchmarks.reconstruction`)."""
}
BEFORE = "## A checkpoint larger than memory"
LAYERS_HEAD = ("", "wall", "processor")
NARROW_HEAD = ("net", "time", "gathers", "fusions", "difference")


def net_rows(result: dict[str, Any]) -> Iterable[Row]:
    """Seconds on the wall, for every net; the ratio in processor time."""
    for name, row in result["nets"].items():
        calls = (row["first"], row["later"])
        yield (
            name,
            *_jaxpr_and_trace(row, "wall"),
            *(text for call in calls for text in (_ours(call), _with_build(call))),
        )


def sweep_rows(result: dict[str, Any]) -> Iterable[Row]:
    """Seconds of processor time, for every depth."""
    for kind, found in result["sweeps"].items():
        for depth, row in found["depths"].items():
            later = row["later"]
            yield (
                f"{kind} {depth}",
                *_jaxpr_and_trace(row, "cpu"),
                _ours(later, "cpu"),
                _theirs(later, "cpu"),
                _times_faster(later),
            )


def exponents(result: dict[str, Any]) -> Iterable[str]:
    """How the time of every sweep grows with depth."""
    for kind, found in result["sweeps"].items():
        powers = found["exponent"].items()
        yield f"{kind}: " + ", ".join(f"{what} {power:.2f}" for what, power in powers)


def narrow_rows(result: dict[str, Any]) -> Iterable[Row]:
    """Narrowed against built by hand, for every net."""
    for name, row in result["nets"].items():
        hlo = row["hlo"].values()
        counts = (
            " / ".join(str(each[kind]) for each in hlo) for kind in ("gather", "fusion")
        )
        time = f"{row['ratio_of_medians']:.3f}"
        yield name, time, *counts, f"{row['difference']:.0e}"


def giant_line(result: dict[str, Any]) -> str:
    """What the decoder of 70 billion parameters took."""
    found = result["giant"]
    return (
        f"{found['parameters']:,} parameters, {found['groups']} groups: make_jaxpr "
        f"{found['make_jaxpr_wall']:.2f} s, trace {found['trace_wall']:.2f} s, "
        f"{found['peak_mib']} MiB at most"
    )


def layer_rows(result: dict[str, Any]) -> Iterable[Row]:
    """Seconds of all layers together, on the wall and of the processor."""
    for name, what in LAYERS.items():
        seconds = result[name]["seconds"]
        for step, text in what.items():
            yield text, f"{seconds[step]:.1f}", f"{seconds[f'{step} cpu']:.1f}"


def markdown(head: Row, rows: Iterable[Row]) -> str:
    """A table of Markdown, its columns aligned.

    >>> print(markdown(("net", "s"), [("a", "1.25")]))
    | net |    s |
    |-----|-----:|
    | a   | 1.25 |
    """
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = ["| " + " | ".join(_padded(line, widths)) + " |" for line in lines]
    first, *others = ("-" * (width + 2) for width in widths)
    rule = "|".join([first, *(dashes[:-1] + ":" for dashes in others)])
    return "\n".join([texts[0], f"|{rule}|", *texts[1:]])


def _padded(line: Row, widths: Sequence[int]) -> list[str]:
    pairs = enumerate(zip(line, widths, strict=True))
    return [t.rjust(n) if k else t.ljust(n) for k, (t, n) in pairs]


def show_coupling(result: dict[str, Any]) -> None:
    """Prints the tables of `benchmarks.coupling`."""
    console = rich.console.Console()
    console.print(_rich("seconds on the wall", NETS_HEAD, net_rows(result)))
    if result["sweeps"]:
        title = "seconds of processor time"
        console.print(_rich(title, SWEEP_HEAD, sweep_rows(result)))
        console.print("grows as depth to the power:", *exponents(result), sep="\n")
    if result.get("giant"):
        console.print(giant_line(result))


def _rich(title: str, head: Row, rows: Iterable[Row]) -> rich.table.Table:
    table = rich.table.Table(title=title)
    for k, column in enumerate(head):
        table.add_column(column, justify="right" if k else "left")
    for row in rows:
        table.add_row(*row)
    return table


def _jaxpr_and_trace(row: dict[str, Any], clock: str) -> Row:
    times = (f"{row[what][clock]:.3f}" for what in ("make_jaxpr", "trace"))
    return *times, f"{row['ratio_cpu']:.2f}"


def _ours(call: dict[str, Any], clock: str = "wall") -> str:
    return f"{call['whole_way'][clock]:.2f}"


def _theirs(call: dict[str, Any], clock: str = "wall") -> str:
    there = call.get("torch_pruning")
    return f"{there['whole_way'][clock]:.2f}" if there else "-"


def _with_build(call: dict[str, Any]) -> str:
    """Their init and step, then both with a graph built to look at."""
    there = call.get("torch_pruning")
    if not there:
        return "-"
    whole = there["whole_way"]["wall"]
    return f"{whole:.2f} / {whole + there['build']['wall']:.2f}"


def _times_faster(call: dict[str, Any]) -> str:
    there = call.get("torch_pruning")
    if not there:
        return "-"
    return f"{there['whole_way']['cpu'] / call['whole_way']['cpu']:.1f}"


def committed() -> dict[str, str]:
    """What stands between the marks of `docs/speed.md`, of results that are there."""
    found = parts(load("coupling"), load("narrow"))
    if (machine.RESULTS / "reconstruction.json").exists():
        layers = load("reconstruction")
        peak = f"{layers['peak_gib']} GiB at most. {_where(layers)}"
        found["layers"] = f"{markdown(LAYERS_HEAD, layer_rows(layers))}\n\n{peak}"
    return found


def parts(coupling: dict[str, Any], narrow: dict[str, Any]) -> dict[str, str]:
    """The tables of groups and of narrowed programs."""
    powers = "\n".join(f"* {line}" for line in exponents(coupling))
    grows = f"Grows as depth to the power of:\n\n{powers}"
    return {
        "nets": "\n\n".join(
            [markdown(NETS_HEAD, net_rows(coupling)), _where(coupling)]
        ),
        "sweeps": "\n\n".join([markdown(SWEEP_HEAD, sweep_rows(coupling)), grows]),
        "giant": giant_line(coupling),
        "narrow": "\n\n".join(
            [markdown(NARROW_HEAD, narrow_rows(narrow)), _where(narrow)]
        ),
    }


def filled(document: str, texts: dict[str, str]) -> str:
    """The document with these texts between its marks.

    >>> filled("a\\n<!-- x -->\\nold\\n<!-- end -->\\nb", {"x": "new"})
    'a\\n<!-- x -->\\nnew\\n<!-- end -->\\nb'
    """
    for name, text in texts.items():
        mark = f"<!-- {name} -->"
        if name in SECTIONS and mark not in document:
            new = f"{SECTIONS[name]}\n\n{mark}\n\n<!-- end -->\n\n{BEFORE}"
            document = document.replace(BEFORE, new)
        pattern = f"{mark}\n.*?\n<!-- end -->"
        assert re.search(pattern, document, re.DOTALL), f"no mark {mark}"
        new = f"{mark}\n{text}\n<!-- end -->"
        document = re.sub(pattern, lambda _: new, document, flags=re.DOTALL)  # noqa: B023
    return document


def _where(result: dict[str, Any]) -> str:
    """The machine, the versions and the load behind a table."""
    origin = result["origin"]
    versions = ", ".join(f"{name} {v}" for name, v in origin["versions"].items())
    before, after = origin["load_average"][0], origin["load_average_at_end"][0]
    return (
        f"{origin['date'][:10]}, {origin['cores']} cores ({origin['processor']}), load "
        f"{before} before and {after} after; {versions}."
    )


def load(name: str) -> dict[str, Any]:
    """A committed result."""
    return json.loads((machine.RESULTS / f"{name}.json").read_text())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="into docs/speed.md")
    options = parser.parse_args()
    texts = committed()
    if options.write:
        DOCUMENT.write_text(filled(DOCUMENT.read_text(), texts))
    else:
        print("\n\n".join(texts.values()))


if __name__ == "__main__":
    main()
