"""What every result file says about its origin, and how times are taken."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

RESULTS = pathlib.Path(__file__).parent / "results"
_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "scipy")


class Seconds(NamedTuple):
    """One measurement: by the clock on the wall, and of processor time."""

    wall: float
    cpu: float


def timed(call: Callable[[], Any]) -> tuple[Any, Seconds]:
    """The result of a call and how long it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return result, Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def summary(times: Sequence[Seconds]) -> dict[str, Any]:
    """Median of both clocks; spread is (largest - smallest) / median, on the wall."""
    walls, cpus = zip(*times, strict=True)
    median = statistics.median(walls)
    return {
        "wall": round(median, 4),
        "cpu": round(statistics.median(cpus), 4),
        "spread": round((max(walls) - min(walls)) / median, 3),
        "repeats": len(times),
    }


def origin() -> dict[str, Any]:
    """Command, versions, machine, date and load."""
    return {
        "command": " ".join(["python -m", _module(), *_arguments()]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load_average": load(),
    }


def load() -> list[float]:
    """Processes that ran, averaged over 1, 5 and 15 minutes."""
    return [round(x, 2) for x in os.getloadavg()]


def write(name: str, result: dict[str, Any]) -> pathlib.Path:
    """Saves a result; adds the load at the end."""
    RESULTS.mkdir(exist_ok=True)
    result["origin"]["load_average_at_end"] = load()
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def _module() -> str:
    """What stands after `python -m`: a module, or a package with a `__main__`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec:
        return spec.name.removesuffix(".__main__")
    return f"benchmarks.{pathlib.Path(sys.argv[0]).stem}"


def _arguments() -> list[str]:
    """The command line without this machine's paths."""
    return ["PATH" if "/" in argument else argument for argument in sys.argv[1:]]


def _processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2] for line in lines if line.startswith("model name"))
    return next(names, "").strip() or platform.processor()
