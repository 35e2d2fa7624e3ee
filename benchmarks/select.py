"""Is an exact global threshold as quick as reading the scores?

    python -m benchmarks.select

100 million scores in leaves like those of a network. Compared, in turns: reading them
once (the sum by numpy, on one thread, and the sum by XLA, on all), the exact threshold
of a global selection at 90 % sparsity (`select.threshold`: a sample and one pass), the
masks of that selection, the same threshold inside jit (bisection on bits: what sharded
scores use), and a partition by numpy and a sort by XLA of the same scores, which are
what a user would write. Then what a selection to half the multiply-adds of ResNet-50
takes. Results go to `results/select.json`.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table

import jaxprune
from benchmarks import machine
from benchmarks.machine import Seconds, timed
from benchmarks.nets import image_net
from jaxprune import select
from jaxprune.models import imagenet_resnet

SPARSITY = 0.9


def leaves(total: int) -> dict[str, np.ndarray]:
    """Scores of a few leaves of different scale: a normal distribution's magnitudes."""
    rng = np.random.default_rng(0)
    found, rest = {}, total
    for k in range(8):
        size = rest if k == 7 else rest // 3
        rest -= size
        draw = rng.standard_normal(size, np.float32)
        found[f"layer{k}"] = np.abs(draw) / np.float32(1 + k)
    return found


def ways(scores: Mapping[str, np.ndarray], slow: bool) -> dict[str, Callable[[], Any]]:
    """Name -> what is timed."""
    on_device = {name: jnp.asarray(leaf) for name, leaf in scores.items()}
    total = sum(leaf.size for leaf in scores.values())
    place = round(SPARSITY * total)
    add = jax.jit(lambda s: [leaf.sum() for leaf in s.values()])
    bisect = jax.jit(lambda s: select.threshold(s, sparsity=SPARSITY))
    calls = {
        "sum, numpy": lambda: [leaf.sum() for leaf in scores.values()],
        "sum, XLA": lambda: jax.block_until_ready(add(on_device)),
        "threshold": lambda: select.threshold(scores, sparsity=SPARSITY),
        "masks": lambda: select.across_leaves(scores, sparsity=SPARSITY),
        "threshold in jit": lambda: jax.block_until_ready(bisect(on_device)),
        "np.partition": lambda: np.partition(
            np.concatenate(list(scores.values())), place
        )[place],
    }
    if slow:
        sort = jax.jit(lambda s: jnp.sort(jnp.concatenate(list(s.values())))[place])
        calls["jnp.sort"] = lambda: jax.block_until_ready(sort(on_device))
    return calls


def in_turns(
    calls: Mapping[str, Callable[[], Any]], repeats: int
) -> dict[str, list[Seconds]]:
    """Times of all calls, so that drift hits all alike; the slow ones fewer times."""
    values, times = {}, {name: [] for name in calls}
    for name, call in calls.items():  # the first call compiles
        values[name], first = timed(call)
        print(f"{name}: {first.wall:.2f} s", flush=True)
    answers = {
        name: float(value)
        for name, value in values.items()
        if not name.startswith(("sum", "masks"))
    }
    assert len(set(answers.values())) == 1, answers
    for k in range(repeats):
        for name, call in calls.items():
            often = name.startswith(("sum", "threshold")) and "jit" not in name
            if often or k < 2:
                times[name].append(timed(call)[1])
    return times


def resnet50() -> dict[str, Any]:
    """Seconds of a cost model and of a budget for ResNet-50."""
    net = image_net(imagenet_resnet(50), 224)
    fn = net.make()
    groups = jaxprune.trace(fn, net.variables, *net.args)
    model, build = timed(
        lambda: jaxprune.cost_model(fn, net.variables, *net.args, groups=groups)
    )
    rng = np.random.default_rng(0)
    scores = {name: rng.random(group.size) for name, group in groups.items()}
    found: dict[str, Any] = {"cost_model": round(build.wall, 3), "methods": {}}
    cost = model.multiply_adds
    for method, multiple_of in (
        ("greedy", 1),
        ("global", 1),
        ("uniform", 1),
        ("greedy", 32),
        ("exact", 32),
    ):
        keep, spent = timed(
            lambda: select.to_budget(
                groups,
                scores,
                cost,
                budget=0.5 * cost.full,
                method=method,  # noqa: B023
                multiple_of=multiple_of,  # noqa: B023
            )
        )
        found["methods"][f"{method}, multiples of {multiple_of}"] = {
            "seconds": round(spent.wall, 3),
            "score": round(keep.score, 3),
            "bound": None if keep.bound is None else round(keep.bound, 3),
            "cost": keep.cost / cost.full,
            "one_more": keep.one_more / cost.full,
        }
    return found


def show(result: dict[str, Any]) -> None:
    """Prints the tables."""
    table = rich.table.Table(title=f"{result['scores']:,} scores")
    for column in ("what", "seconds", "times reading by numpy", "by XLA"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for name, row in result["times"].items():
        ratios = (f"{row[key]:.2f}" for key in ("to_numpy", "to_xla"))
        table.add_row(name, f"{row['wall']:.3f}", *ratios)
    rich.console.Console().print(table)
    table = rich.table.Table(title="ResNet-50 to half its multiply-adds")
    for column in ("method", "seconds", "score", "bound", "cost", "one unit more"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, row in result["resnet50"]["methods"].items():
        bound = "" if row["bound"] is None else f"{row['bound']:.1f}"
        cells = (f"{row['score']:.1f}", bound, f"{row['cost']:.6f}")
        table.add_row(name, f"{row['seconds']:.2f}", *cells, f"{row['one_more']:.6f}")
    rich.console.Console().print(table)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scores", type=int, default=100_000_000)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--sort", action="store_true", help="time XLA's sort too")
    parser.add_argument("--dry", action="store_true", help="write no file")
    options = parser.parse_args()
    times = in_turns(ways(leaves(options.scores), options.sort), options.repeats)
    walls = {
        name: statistics.median(run.wall for run in runs)
        for name, runs in times.items()
    }
    result: dict[str, Any] = {
        "origin": machine.origin(),
        "scores": options.scores,
        "times": {
            name: {
                **machine.summary(runs),
                "to_numpy": round(walls[name] / walls["sum, numpy"], 3),
                "to_xla": round(walls[name] / walls["sum, XLA"], 3),
            }
            for name, runs in times.items()
        },
        "resnet50": resnet50(),
    }
    show(result)
    if not options.dry:
        print("written to", machine.write("select", result))


if __name__ == "__main__":
    main()
