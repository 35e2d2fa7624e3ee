"""What a slimmable network costs: its widths, its training step, and what it saves.

    python -m benchmarks.slimmable

1. A call of each width against the network of that width built by hand, from the very
   same weights, in turns (ratio 1: the slices of the weights cost nothing).
2. The joint training step of all widths against the sum of the steps of single widths.
3. The speed-up of each width against the ratio of its FLOPs.
4. A batch whose examples choose their widths, run in buckets by width, against all of
   it at the widest.

Results go to `results/slimmable.json`.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
import rich.table

import jaxprune
from benchmarks import machine
from benchmarks.machine import timed
from jaxprune import search
from jaxprune.models import VGG

SHARES = (1.0, 0.75, 0.5)
WIDTHS = (32, 32, "M", 64, 64, "M", 128, 128)


def built(share: float, widths: Any = WIDTHS) -> VGG:
    """The network that a person builds for this share of the units."""
    return VGG(widths=[w if w == "M" else round(share * w) for w in widths])


def measure(
    batch: int, side: int, repeats: int, widths: Any = WIDTHS
) -> dict[str, Any]:
    """All four comparisons, for one network."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((batch, side, side, 3)), jnp.float32)
    y = jnp.asarray(rng.integers(0, 10, batch), jnp.int32)
    net = built(1.0, widths)
    variables = net.init(jax.random.key(0), x)
    groups = jaxprune.trace(net.apply, variables, x)
    keeps = search.uniform(groups, SHARES)
    slim = jaxprune.slimmable(
        net.apply, variables, keeps, groups=groups, private="batch_stats/*"
    )
    runs = slim.compile(x)
    cost = jaxprune.cost_model(net.apply, variables, x, groups=groups).flops
    calls: dict[str, Callable[[], Any]] = {}
    for i, (share, run) in enumerate(zip(SHARES, runs, strict=True)):
        own = jax.tree.map(jnp.copy, slim.at(i).variables)
        twin = jax.jit(built(share, widths).apply).lower(own, x).compile()
        calls[f"width {share}"] = lambda run=run: run(slim.variables, x)
        calls[f"by hand {share}"] = lambda twin=twin, own=own: twin(own, x)
    times = in_turns(calls, repeats)
    found: dict[str, Any] = {
        "times": times,
        "against built by hand": {
            str(s): round(times[f"width {s}"] / times[f"by hand {s}"], 3)
            for s in SHARES
        },
        "speed-up": {
            str(s): round(times["width 1.0"] / times[f"width {s}"], 3) for s in SHARES
        },
        "FLOPs ratio": {
            str(s): round(cost.full / cost.value(each), 3)
            for s, each in zip(SHARES, keeps, strict=True)
        },
    }
    found["joint step"] = joint(slim, (x, y), repeats)
    found["buckets"] = buckets(slim, x, repeats)
    return found


def joint(slim: Any, batch: Any, repeats: int) -> dict[str, Any]:
    """The step of all widths against those of single widths."""
    tx = optax.sgd(0.1, 0.9)

    def forward(apply_fn: Any, variables: Any, batch: Any) -> Any:
        return apply_fn(variables, batch[0], train=True, mutable=["batch_stats"])

    def single(i: int) -> Callable[..., Any]:
        def step(state: Any, batch: Any) -> Any:
            def loss(params: Any) -> Any:
                held = {**state.variables, "params": params}
                logits, new = forward(slim[i], held, batch)
                values = optax.softmax_cross_entropy_with_integer_labels(
                    logits, batch[1]
                )
                return values.mean(), new

            params = state.variables["params"]
            grads, new = jax.grad(loss, has_aux=True)(params)
            updates, opt_state = tx.update(grads, state.opt_state, params)
            held = slim.write(state.variables, i, new)
            held = {**held, "params": optax.apply_updates(params, updates)}
            return state._replace(variables=held, opt_state=opt_state)

        return step

    state = search.joint_state(slim, tx, jax.random.key(0))
    steps = {
        "all": search.joint_step(slim, tx, forward, alpha=0.9),
        **{str(share): single(i) for i, share in enumerate(SHARES)},
    }
    compiled = {
        name: jax.jit(step).lower(state, batch).compile()
        for name, step in steps.items()
    }
    calls = {name: lambda s=s: s(state, batch) for name, s in compiled.items()}
    times = in_turns(calls, repeats)
    total = sum(times[str(share)] for share in SHARES)
    return {"times": times, "against the sum": round(times["all"] / total, 3)}


def buckets(slim: Any, x: jax.Array, repeats: int) -> dict[str, Any]:
    """Three quarters of the examples at the narrowest width, the rest at the widest."""
    widths = np.where(np.arange(len(x)) % 4 == 0, 0, len(slim) - 1)
    run = search.run_by_width(slim)
    images = np.asarray(x)
    calls = {
        "by width": lambda: run(slim.variables, images, widths),
        "widest": lambda: run(slim.variables, images, np.zeros_like(widths)),
    }
    times = in_turns(calls, repeats)
    return {"times": times, "speed-up": round(times["widest"] / times["by width"], 3)}


def in_turns(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of every call, A B ... B A, so that drift hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        jax.block_until_ready(call())
    for k in range(repeats):
        for name in list(calls)[:: 1 if k % 2 else -1]:
            run = timed(lambda: jax.block_until_ready(calls[name]()))[1]  # noqa: B023
            times[name].append(run.wall)
    return {name: round(statistics.median(own), 5) for name, own in times.items()}


def show(found: Mapping[str, Any]) -> None:
    """Prints the table."""
    table = rich.table.Table(title="a slimmable VGG")
    for column in ("width", "against built by hand", "speed-up", "FLOPs ratio"):
        table.add_column(column, justify="right")
    for share in map(str, SHARES):
        table.add_row(
            share,
            *(
                f"{found[name][share]:.3f}"
                for name in ("against built by hand", "speed-up", "FLOPs ratio")
            ),
        )
    table.caption = (
        f"joint step against the sum: {found['joint step']['against the sum']:.3f}; "
        f"buckets by width: {found['buckets']['speed-up']:.2f} times faster"
    )
    rich.console.Console().print(table)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--dry", action="store_true", help="write no file")
    options = parser.parse_args()
    found = measure(options.batch, options.side, options.repeats)
    result = {
        "origin": {**machine.origin(), "device": jax.devices()[0].device_kind},
        "batch": options.batch,
        "side": options.side,
        **found,
    }
    show(found)
    if not options.dry:
        print("written to", machine.write("slimmable", result))


if __name__ == "__main__":
    main()
