"""What does a step of centripetal SGD cost over a step of SGD?

    python -m benchmarks.centripetal

A CIFAR ResNet, its filters in clusters of 5/8 of the width, momentum and weight decay
in both steps. Compared are the times of whole training steps, compiled, in turns, and
what the compiler says of their floating point operations. Results go to
`results/centripetal.json`.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
import rich.table

import jaxprune
from benchmarks import machine
from benchmarks.machine import Seconds, timed
from jaxprune import clusters
from jaxprune.models import cifar_resnet
from jaxprune.training import centripetal

DECAY, MOMENTUM, RATE = 1e-4, 0.9, 0.05


def compare(depth: int, batch: int, repeats: int, sparsity: float) -> dict[str, Any]:
    """Both steps on the same net and images."""
    net = cifar_resnet(depth, shortcut="projection")
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.standard_normal((batch, 32, 32, 3), "float32"))
    labels = jnp.asarray(rng.integers(0, 10, batch))
    variables = jax.jit(net.init)(jax.random.key(0), images[:1])
    groups = jaxprune.trace(net.apply, variables, images[:1], roles=True)
    links = {
        "sgd": optax.add_decayed_weights(
            DECAY, lambda params: jax.tree.map(lambda w: w.ndim > 1, params)
        ),
        "centripetal": centripetal(
            groups, clusters.even(groups, sparsity=sparsity), weight_decay=DECAY
        ),
    }
    calls, flops = {}, {}
    for name, link in links.items():
        tx = optax.chain(link, optax.sgd(RATE, momentum=MOMENTUM))
        args = (variables, tx.init(variables["params"]), images, labels)
        compiled = jax.jit(step_of(net.apply, tx)).lower(*args).compile()
        flops[name] = compiled.cost_analysis()["flops"]
        calls[name] = _again(compiled, args)
    times = _in_turns(calls, repeats)
    ratios = [b.wall / a.wall for a, b in zip(*times.values(), strict=True)]
    cpus = [statistics.median(t.cpu for t in each) for each in times.values()]
    medians = {k: statistics.median(t.wall for t in each) for k, each in times.items()}
    return {
        "depth": depth,
        "batch": batch,
        "sparsity": sparsity,
        "groups": len(groups),
        "flops": flops,
        "time": {name: machine.summary(each) for name, each in times.items()},
        "ratio_of_medians": round(medians["centripetal"] / medians["sgd"], 4),
        "ratio_of_cpu": round(cpus[1] / cpus[0], 4),
        "median_ratio": round(statistics.median(ratios), 4),
        "ratio_of_flops": round(flops["centripetal"] / flops["sgd"], 4),
    }


def step_of(apply_fn: Callable[..., Any], tx: Any) -> Callable[..., Any]:
    """One step of training: (variables, opt_state, images, labels) -> the next."""

    def step(variables: Any, opt_state: Any, images: Any, labels: Any) -> Any:
        def loss_fn(params: Any) -> Any:
            logits, new = apply_fn(
                {**variables, "params": params},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return loss.mean(), new

        params = variables["params"]
        grads, new = jax.grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return {"params": optax.apply_updates(params, updates), **new}, opt_state

    return step


def _again(compiled: Any, args: tuple[Any, ...]) -> Callable[[], Any]:
    return lambda: jax.block_until_ready(compiled(*args))


def _in_turns(
    calls: dict[str, Callable[[], Any]], repeats: int
) -> dict[str, list[Seconds]]:
    """Times of both calls, A B B A, so that drift hits both alike."""
    times: dict[str, list[Seconds]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for k in range(repeats):
        for name in list(calls)[:: 1 if k % 2 else -1]:
            times[name].append(timed(calls[name])[1])
    return times


def show(row: dict[str, Any]) -> None:
    """Prints the table."""
    table = rich.table.Table(title=f"ResNet-{row['depth']}, batch {row['batch']}")
    for column in ("step", "ms", "GFLOP"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for name, each in row["time"].items():
        table.add_row(
            name, f"{1e3 * each['wall']:.1f}", f"{row['flops'][name] / 1e9:.2f}"
        )
    rich.console.Console().print(table)
    told = ("ratio_of_medians", "ratio_of_cpu", "median_ratio", "ratio_of_flops")
    print({name: row[name] for name in told})


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--depth", type=int, default=56)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--sparsity", type=float, default=3 / 8)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dry", action="store_true", help="write no file")
    options = parser.parse_args()
    result: dict[str, Any] = {"origin": machine.origin()}
    result["origin"]["device"] = jax.devices()[0].device_kind
    result["net"] = compare(
        options.depth, options.batch, options.repeats, options.sparsity
    )
    show(result["net"])
    if not options.dry:
        print("written to", machine.write("centripetal", result))


if __name__ == "__main__":
    main()
