"""What a slimmable network costs: its widths, its training step, and what it saves.

    python -m benchmarks.slimmable

1. A call of each width against the network of that width built by hand, from the very
   same weights, in turns (ratio 1: the slices of the weights cost nothing).
2. The joint training step of all widths against the sum of the steps of single widths.
3. The speed-up of each width against the ratio of its FLOPs.
4. A batch whose examples choose their widths, run in buckets by width, against all of
   it at the widest.

On CPU, XLA schedules for concurrency and holds the activations of all widths at once.
With the flag that schedules for memory instead, one width at a time has them there:

    XLA_FLAGS=--xla_cpu_enable_concurrency_optimized_scheduler=false \\
    python -m benchmarks.slimmable --out slimmable_sequential

Ratios are of the clock on the wall and of processor time; only the second means much
while others use the machine. Results go to `results/slimmable.json`.
"""

import argparse
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
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
            str(s): ratio(times, [f"width {s}"], [f"by hand {s}"]) for s in SHARES
        },
        "speed-up": {
            str(s): ratio(times, ["width 1.0"], [f"width {s}"]) for s in SHARES
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
    return {
        "times": times,
        "against the sum": ratio(times, ["all"], list(map(str, SHARES))),
    }


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
    return {"times": times, "speed-up": ratio(times, ["widest"], ["by width"])}


Times = Mapping[str, Mapping[str, float]]


def in_turns(calls: Mapping[str, Callable[[], Any]], repeats: int) -> Times:
    """Median seconds of every call by both clocks, A B ... B A against drift."""
    times: dict[str, list[Seconds]] = {name: [] for name in calls}
    for call in calls.values():
        jax.block_until_ready(call())
    for k in range(repeats):
        for name in list(calls)[:: 1 if k % 2 else -1]:
            run = timed(lambda: jax.block_until_ready(calls[name]()))[1]  # noqa: B023
            times[name].append(run)
    return {
        name: {
            clock: round(statistics.median(getattr(run, clock) for run in own), 6)
            for clock in Seconds._fields
        }
        for name, own in times.items()
    }


def ratio(times: Times, above: Sequence[str], below: Sequence[str]) -> dict[str, float]:
    """Of sums of times, by the clock on the wall and of processor time."""
    return {
        clock: round(
            sum(times[n][clock] for n in above) / sum(times[n][clock] for n in below), 3
        )
        for clock in Seconds._fields
    }


def both(found: Mapping[str, float]) -> str:
    """A ratio by both clocks: wall / processor."""
    return f"{found['wall']:.3f} / {found['cpu']:.3f}"


def show(found: Mapping[str, Any]) -> None:
    """Prints the table."""
    table = rich.table.Table(title="a slimmable VGG")
    for column in ("width", "against built by hand", "speed-up", "FLOPs ratio"):
        table.add_column(column, justify="right")
    for share in map(str, SHARES):
        table.add_row(
            share,
            both(found["against built by hand"][share]),
            both(found["speed-up"][share]),
            f"{found['FLOPs ratio'][share]:.3f}",
        )
    table.caption = (
        f"joint step / sum of steps {both(found['joint step']['against the sum'])}; "
        f"speed-up of buckets by width {both(found['buckets']['speed-up'])}"
    )
    rich.console.Console().print(table)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", default="slimmable", help="name of the result file")
    parser.add_argument("--dry", action="store_true", help="write no file")
    options = parser.parse_args()
    found = measure(options.batch, options.side, options.repeats)
    result = {
        "origin": {**machine.origin(), "device": jax.devices()[0].device_kind},
        "batch": options.batch,
        "side": options.side,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        **found,
    }
    show(found)
    if not options.dry:
        print("written to", machine.write(options.out, result))


if __name__ == "__main__":
    main()
