"""Sampling by sensitivity: what is guaranteed, and what happens?

Question   Units that a layer reads are sampled as often as a relative error and a
           probability of failure ask for (PFP). How far off are the layer's outputs,
           how often by more than was guaranteed, and how many units does that leave?
Refuted    The guarantee, if on the images that the sensitivities are of more draws
           fail than delta. Its use, if what it asks for leaves every unit.
Command    python -m experiments.reconstruction.bounds
Leaves     experiments/reconstruction/bounds.json
Paper      Liebenwein et al., Provable Filter Pruning, https://arxiv.org/abs/1911.07412

Every layer of trained nets that reads a group behind a ReLU, one at a time. The bound
is of sums of one sign, so positive and negative weights are sampled alike and judged
apart, as in the paper. "seen" are the 64 training images of the sensitivities, where
their maximum is exact and K is 1; "new" are 64 test images with the paper's K of 3. A
draw fails if any output of any position of any image is off by more than epsilon.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune
from experiments.budget.nets import trained
from experiments.harness.pages import write_compact
from experiments.reconstruction.nets import NETS
from jaxprune import scores
from jaxprune.core._leaves import named_leaves
from jaxprune.display import machine
from jaxprune.program._jaxprs import trace_program
from jaxprune.select import provable
from jaxprune.statistics._contractions import contractions
from jaxprune.statistics._moments import inputs

RESULT = Path(__file__).with_suffix(".json")
FOLDER = Path("runs", "budget-nets")
RUN = ("lenet_fashion", "vgg_fashion")
SEEDS, IMAGES, DRAWS = 5, 64, 100
EPSILONS, DELTAS = (0.5, 1.0, 2.0, 4.0), (0.5, 0.05, 1e-16)
CONSTANTS = {"seen": 1.0, "new": 3.0}


class Layer(NamedTuple):
    """What every unit adds to sums of one sign: ``[size, outputs]``.

    Attributes:
        group: the name of the group that is read.
        parts: for the images seen and for new ones, by the sign of the weights.
    """

    group: str
    parts: Mapping[str, list[np.ndarray]]


def main(seeds: int = SEEDS, path: Path = RESULT, nets: tuple[str, ...] = RUN) -> None:
    """Makes what is missing of the result."""
    found = json.loads(path.read_text()) if path.exists() else {"records": {}}
    for name in nets:
        for seed in range(seeds):
            key = f"{name}/seed{seed}"
            if key not in found["records"]:
                variables = trained(name, seed, FOLDER, NETS)
                found["records"][key] = list(rows(name, variables, seed))
                print(key, *found["records"][key][:3], sep="\n", flush=True)
                _write(path, found, seeds)
    _write(path, found, seeds)


def _write(path: Path, found: dict[str, Any], seeds: int) -> None:
    found |= {
        "command": "python -m experiments.reconstruction.bounds",
        "settings": {"seeds": seeds, "images": IMAGES, "draws": DRAWS},
        "machine": machine(),
        "summary": summary(found["records"]),
    }
    write_compact(path, found)


def rows(name: str, variables: Any, seed: int, draws: int = DRAWS) -> Iterator[Any]:
    """A row for every layer, kind of images, epsilon and delta."""
    net, (train, test) = NETS[name].make(), NETS[name].data()
    apply_fn = lambda variables, x: net.apply(variables, x)  # noqa: E731
    images = {"seen": train[0][:IMAGES], "new": test[0][:IMAGES]}
    groups = jaxprune.trace(apply_fn, variables, images["seen"], roles=True)
    sensitivity = jax.device_get(
        scores.empirical_sensitivity(
            groups, apply_fn, variables, [images["seen"]], progress=False
        )
    )
    rng = np.random.default_rng(seed)
    for layer in layers(groups, apply_fn, variables, images):
        s = sensitivity[layer.group]
        for kind, parts in layer.parts.items():
            outputs = sum(part.shape[1] for part in parts)
            for epsilon in EPSILONS:
                for delta in DELTAS:
                    how = {"delta": delta, "outputs": outputs}
                    count = provable.sample_complexity(
                        float(s.sum()), epsilon, constant=CONSTANTS[kind], **how
                    )
                    off, kept = sampled(parts, s, count, draws, rng)
                    yield {
                        "group": layer.group,
                        "images": kind,
                        "epsilon": epsilon,
                        "delta": delta,
                        "draws": count,
                        "kept": round(float(kept), 4),
                        "error": round(float(np.quantile(off, 0.95)), 4),
                        "failed": round(float((off > epsilon).mean()), 4),
                    }


def layers(
    groups: Any, apply_fn: Any, variables: Any, images: Mapping[str, Any]
) -> Iterator[Layer]:
    """Every contraction that reads one group, and nothing negative."""
    found = contractions(trace_program(apply_fn, variables, images["seen"]))
    leaves = named_leaves(variables)
    for one in found.values():
        units = one.units(groups)
        if len(units) != 1 or len(one.at) != 1:
            continue
        ((name, (unit,)),) = units.items()
        kernel = one.kernel(np.asarray(leaves[one.path]))[0]
        parts = {}
        for kind, x in images.items():
            taken = np.asarray(
                inputs(apply_fn, [one.name], variables, jnp.asarray(x))[0]
            )
            assert (taken >= 0).all(), one.name
            parts[kind] = [
                by_unit(taken[0], np.maximum(sign * kernel, 0), unit, groups[name].size)
                for sign in (1, -1)
            ]
        yield Layer(name, parts)


def by_unit(
    x: np.ndarray, kernel: np.ndarray, unit: np.ndarray, size: int
) -> np.ndarray:
    """What every unit adds to every output: ``[size, rows * outputs]``."""
    each = [x[:, unit == k] @ kernel[unit == k] for k in range(size)]
    return np.stack(each).reshape(size, -1)


def sampled(
    parts: list[np.ndarray], s: np.ndarray, count: int, draws: int, rng: Any
) -> tuple[np.ndarray, float]:
    """The largest relative error of every draw, and the mean share of units kept."""
    p = provable.distribution(s)
    drawn = rng.multinomial(count, p, draws)
    factors = (drawn / np.where(p > 0, count * p, 1)).astype(np.float32)
    off = np.zeros(draws)
    for part in parts:
        whole = part.sum(0)
        part, whole = part[:, whole > 1e-6], whole[whole > 1e-6]
        for k in range(0, draws, 10):
            made = factors[k : k + 10] @ part
            error = np.abs(made - whole) / whole
            off[k : k + 10] = np.maximum(off[k : k + 10], error.max(1, initial=0.0))
    return off, (drawn > 0).mean()


def summary(records: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Means over layers and seeds, for every net, images, epsilon and delta."""
    cells: dict[Any, list[Any]] = {}
    for key, found in records.items():
        for row in found:
            cell = (key.split("/")[0], row["images"], row["epsilon"], row["delta"])
            cells.setdefault(cell, []).append(row)
    names = "net", "images", "epsilon", "delta"
    return [
        dict(zip(names, cell, strict=True))
        | {
            k: round(float(np.mean([r[k] for r in own])), 4)
            for k in ("kept", "error", "failed")
        }
        | {"most failed": max(r["failed"] for r in own)}
        for cell, own in cells.items()
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--net", action="append", choices=list(NETS))
    options = parser.parse_args()
    main(options.seeds, options.out, tuple(options.net or RUN))
