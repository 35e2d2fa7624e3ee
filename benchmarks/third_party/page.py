"""`docs/third_party.md`: the tables of all packages, and the reasons behind letters."""

import json
import pathlib
import string
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from benchmarks import machine, tables

DOCUMENT = pathlib.Path(__file__).parents[2] / "docs" / "third_party.md"
RESULTS = machine.RESULTS / "third_party.json"
HEAD = (
    "model",
    "parameters",
    "groups",
    "exact",
    "can be cut",
    "difference",
    "trace",
    "make_jaxpr",
    "pinned",
    "inexact",
)
Results = Mapping[str, Any]


def load() -> dict[str, Any]:
    """Package -> what was found, for every package judged so far."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def texts(results: Results) -> dict[str, str]:
    """What stands between the marks of the page."""
    letters = legend(results)
    lines = (f"* {letter}: {why}" for why, letter in letters.items())
    return {
        "summary": summary(results),
        "packages": "\n\n".join(
            section(name, found, letters) for name, found in results.items()
        ),
        "reasons": "\n".join(lines),
    }


def summary(results: Results) -> str:
    """How many models, and the worst difference."""
    rows = [row for found in results.values() for row in found["models"].values()]
    good = [row for row in rows if "error" not in row]
    compared = [row["difference"] for row in good if "difference" in row]
    return (
        f"{len(rows)} models of {len(results)} packages: {len(rows) - len(good)} raise "
        f"an error, {len(good) - len(compared)} have no exact group. In the other "
        f"{len(compared)} narrowed and masked differ by {max(compared):.1e} of the "
        "largest output at most."
    )


def section(name: str, found: Mapping[str, Any], letters: Mapping[str, str]) -> str:
    """The table of one package, and where it was made."""
    origin = found["origin"]
    rows = [_row(model, row, letters) for model, row in found["models"].items()]
    where = (
        f"jax {origin['versions']['jax']}, Python {origin['versions']['python']}, "
        f"{origin['cores']} cores ({origin['processor']}), {origin['date'][:10]}, load "
        f"{origin['load_average'][0]}."
    )
    table = tables.markdown(HEAD, rows)
    return f"### {name} {found['version']}\n\n{table}\n\n{where}"


def _row(model: str, row: Mapping[str, Any], letters: Mapping[str, str]) -> list[str]:
    if "error" in row:
        return [model, *["-"] * (len(HEAD) - 2), _plain(row["error"])]
    seconds = row["seconds"]
    return [
        model,
        f"{row['parameters']:,}",
        str(row["groups"]),
        str(row["exact"]),
        f"{100 * row['can_be_cut']:.0f} %",
        _power(row["difference"]) if "difference" in row else "-",
        f"{seconds['trace']['wall']:.2f}",
        f"{seconds['make_jaxpr']['wall']:.2f}",
        _lettered(((each["why"], each["axes"]) for each in row["pinned"]), letters),
        _lettered(((each["why"], each["groups"]) for each in row["inexact"]), letters),
    ]


def _power(difference: float) -> str:
    return f"{difference:.0e}" if difference else "0"


def _lettered(counts: Iterable[tuple[str, int]], letters: Mapping[str, str]) -> str:
    return ", ".join(f"{letters[why]} {number}" for why, number in counts) or "-"


def legend(results: Results) -> dict[str, str]:
    """Reason -> letter, in order of first use.

    >>> models = {"net": {"pinned": [{"why": "x", "axes": 1}], "inexact": []}}
    >>> legend({"package": {"models": models}})
    {'x': 'a'}
    """
    return dict(zip(dict.fromkeys(_all_reasons(results)), _names(), strict=False))


def _names() -> Iterator[str]:
    yield from string.ascii_lowercase
    for first in string.ascii_lowercase:
        yield from (first + second for second in string.ascii_lowercase)


def _all_reasons(results: Results) -> Iterator[str]:
    rows = [row for found in results.values() for row in found["models"].values()]
    for kind in ("pinned", "inexact"):
        for row in rows:
            yield from (each["why"] for each in row.get(kind, ()))


def _plain(text: str) -> str:
    """Text that cannot break a table."""
    return text.replace("|", "/").replace("<", "(").replace(">", ")")


def write(results: Results) -> None:
    """Fills the page."""
    DOCUMENT.write_text(tables.filled(DOCUMENT.read_text(), texts(results)))
