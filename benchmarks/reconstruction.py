"""How long does the linear algebra of a layer take, from its moments on?

    python -m benchmarks.reconstruction [--quick]

Ranking and compensation of the inputs of every convolution of a ResNet-50, and
SparseGPT of the seven matrices of a decoder layer of width 2048, on random moments of
full rank: what is counted is choosing and fitting, not the passes over data. Shapes
that occur several times are timed once. Memory is of the process, with what it draws.
Results go to `results/reconstruction.json`.
"""

import argparse
import resource
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.machine import Seconds, timed
from jaxprune.surgery._reconstruction import Part, rank_units, refit
from jaxprune.surgery._surgeon import brain_surgeon

# Input channels, window, output channels -> how often in a ResNet-50.
CONVOLUTIONS = {
    (64, 1, 64): 1,
    (64, 9, 64): 3,
    (64, 1, 256): 4,
    (256, 1, 64): 2,
    (256, 1, 128): 1,
    (256, 1, 512): 1,
    (128, 9, 128): 4,
    (128, 1, 512): 4,
    (512, 1, 128): 3,
    (512, 1, 256): 1,
    (512, 1, 1024): 1,
    (256, 9, 256): 6,
    (256, 1, 1024): 6,
    (1024, 1, 256): 5,
    (1024, 1, 512): 1,
    (1024, 1, 2048): 1,
    (512, 9, 512): 3,
    (512, 1, 2048): 3,
    (2048, 1, 512): 2,
}
# Inputs, outputs -> how often in a decoder layer of width 2048.
DECODER = {(2048, 2048): 4, (2048, 5504): 2, (5504, 2048): 1}


def moments_of(width: int) -> np.ndarray:
    """Moments of inputs that are correlated, of full rank."""
    rows = np.random.default_rng(0).normal(size=(2 * width, width)).astype(np.float32)
    rows += rows[:, :1]
    return (rows.T @ rows / len(rows)).astype(np.float64)


def convolution(channels: int, window: int, outputs: int) -> dict[str, Any]:
    """Ranking the channels, and fitting the kernel to half of them."""
    width = channels * window
    second = moments_of(width)
    kernel = np.random.default_rng(1).normal(size=(width, outputs))
    cross, units = second @ kernel, np.arange(width) // window
    order, ranking = timed(
        lambda: rank_units([Part(second, cross, kernel, units)], channels)
    )
    kept = np.isin(units, order[: channels // 2])[:, None] & np.ones(outputs, bool)
    _, fitting = timed(lambda: refit(second, cross, kernel, kept, 1e-6))
    return both({"rank": ranking, "fit": fitting})


def surgeon(width: int, outputs: int) -> dict[str, Any]:
    """SparseGPT of one matrix, at half of its weights and 2 of 4."""
    second = moments_of(width)
    kernel = np.random.default_rng(1).normal(size=(width, outputs)).astype(np.float32)
    _, half = timed(lambda: brain_surgeon(second, kernel, sparsity=0.5))
    _, two_of_four = timed(lambda: brain_surgeon(second, kernel, pattern=(2, 4)))
    return both({"half": half, "2:4": two_of_four})


def both(times: dict[str, Seconds]) -> dict[str, float]:
    """Seconds on the wall, and of the processor."""
    walls = {name: round(each.wall, 3) for name, each in times.items()}
    return walls | {f"{name} cpu": round(each.cpu, 3) for name, each in times.items()}


def totals(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Seconds of all layers, each as often as it occurs."""
    names = [name for name in next(iter(rows.values())) if name != "times"]
    return {
        name: round(sum(row["times"] * row[name] for row in rows.values()), 1)
        for name in names
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small shapes, no file")
    quick = parser.parse_args().quick
    result: dict[str, Any] = {"origin": machine.origin()}
    for name, shapes, measure in (
        ("decoder layer", DECODER, surgeon),
        ("resnet50", CONVOLUTIONS, convolution),
    ):
        rows: dict[str, dict[str, Any]] = {}
        for shape, times in shapes.items():
            small = tuple(min(n, 64) for n in shape) if quick else shape
            rows[" x ".join(map(str, shape))] = {"times": times, **measure(*small)}
            print(name, shape, rows[" x ".join(map(str, shape))], flush=True)
        result[name] = {"rows": rows, "seconds": totals(rows)}
        print(name, result[name]["seconds"], flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    result["peak_gib"] = round(peak, 2)
    print("peak GiB", result["peak_gib"])
    if not quick:
        print("written to", machine.write("reconstruction", result))


if __name__ == "__main__":
    main()
