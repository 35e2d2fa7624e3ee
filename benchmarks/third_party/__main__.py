"""Command line of the judge.

    python -m benchmarks.third_party [PACKAGE ...]
    python -m benchmarks.third_party --page

The first judges these packages, or all, as far as they are installed, and renews their
part of `results/third_party.json`; both then renew the tables of `docs/third_party.md`.
"""

import argparse
import importlib.metadata
import json
from typing import Any

from benchmarks import machine
from benchmarks.third_party import page
from benchmarks.third_party.judge import judged
from benchmarks.third_party.packages import PACKAGES, missing, models


def package_result(package: str) -> dict[str, Any]:
    """Rows of all models of a package, told as they come."""
    rows = {}
    for name, build in models(package).items():
        rows[name] = row = judged(build)
        told = ("exact", "groups", "can_be_cut", "difference", "change", "error")
        shown = ", ".join(f"{key} {row[key]}" for key in told if key in row)
        print(f"{package}, {name}: {shown}", flush=True)
    version = importlib.metadata.version(package)
    return {"version": version, "origin": machine.origin(), "models": rows}


def save(package: str, result: dict[str, Any]) -> None:
    """Renews the part of one package, the others stay as they are."""
    results = page.load() | {package: result}
    ordered = {name: results[name] for name in PACKAGES if name in results}
    page.RESULTS.write_text(json.dumps(ordered, indent=1) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.third_party")
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help="as pip says")
    parser.add_argument("--page", action="store_true", help="only write the page")
    options = parser.parse_args()
    unknown = set(options.packages) - set(PACKAGES)
    if unknown:
        parser.error(f"no models of {sorted(unknown)}, only of {list(PACKAGES)}")
    for package in () if options.page else options.packages or PACKAGES:
        why = missing(package)
        if why:
            print(f"{package}: skipped, {why}")
        else:
            save(package, package_result(package))
    page.write(page.load())


if __name__ == "__main__":
    main()
