"""What does Batch Bridgeout add to a training step?

    python -m benchmarks.bridgeout
    python -m benchmarks.bridgeout --part noise

VGG-16-BN on images of 32x32 at batch 128, SGD with Nesterov momentum and weight decay:
the plain step, and with Bridgeout as in the paper (q = 1.5, rate 0.3), untargeted and
with the 0.75 weakest kernels of each filter as targets, its bits from JAX's default
generator. All steps run in turns in one process; a ratio is that of medians. Then what
no clock says: bytes of the optimiser's state and of the compiled step's temporaries,
and how often a step was traced. The second command times the two halves of the noise
alone, on the same parameters: on a busy machine a difference of steps of many seconds
says little, and what is added can still be told. Results go to
`results/bridgeout.json`, each part with the load under which it ran.

Measured on two idle cores: a plain step takes 7.6 s, with Bridgeout 1.02 of it, with
targets 1.00; drawing and pulling back take 0.27 s of a step, with targets 0.42 s, so 4
and 6 % of a plain step, which the clock of whole steps does not tell from its noise.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
import rich.table

import jaxprune
from benchmarks import machine
from benchmarks.machine import Seconds, timed
from jaxprune.models import MODELS

LIMIT = 1.10  # of the plain step's time


# Name -> target fraction; None for no noise.
CASES = {"plain": None, "bridgeout": 1.0, "bridgeout, targeted": 0.75}


class Step(NamedTuple):
    """A compiled step and its first state."""

    call: Callable[..., Any]
    state: Any
    traces: list[int]


def optimizer(target: float | None) -> optax.GradientTransformation:
    """SGD as in the paper, behind the noise."""
    sgd = optax.chain(
        optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9, nesterov=True)
    )
    if target is None:
        return sgd
    return optax.chain(jaxprune.bridgeout(0.3, 1.5, target_fraction=target), sgd)


def build(target: float | None, net: Any, variables: Any) -> Step:
    """The training step of a case, not yet compiled."""
    tx, traces = optimizer(target), []

    def step(state: Any, images: jax.Array, labels: jax.Array) -> Any:
        traces.append(1)
        variables, opt_state = state

        def loss(params: Any) -> tuple[jax.Array, Any]:
            held = {**variables, "params": params}
            logits, new = net.apply(held, images, train=True, mutable=["batch_stats"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), new

        params = where = variables["params"]
        if target is not None:
            where = jaxprune.noisy_params(params, opt_state)
        grads, new = jax.grad(loss, has_aux=True)(where)
        updates, opt_state = tx.update(grads, opt_state, params)
        return {"params": optax.apply_updates(params, updates), **new}, opt_state

    state = (variables, tx.init(variables["params"]))
    # Donated, as in training: the new state takes the place of the old one.
    return Step(jax.jit(step, donate_argnums=0), state, traces)


def measure(model: str, batch: int, repeats: int) -> dict[str, Any]:
    """Times of all cases in turns, and the bytes of each."""
    net = MODELS[model](num_classes=10)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.standard_normal((batch, 32, 32, 3), np.float32))
    labels = jnp.asarray(rng.integers(0, 10, batch), jnp.int32)
    init = jax.jit(net.init)
    steps, sizes, states = {}, {}, {}
    for name, target in CASES.items():
        variables = init(jax.random.key(0), images[:1])  # donated, so a copy for each
        steps[name] = build(target, net, variables)
        compiled = steps[name].call.lower(steps[name].state, images, labels).compile()
        sizes[name] = _bytes(compiled, steps[name].state)
        states[name] = compiled(steps[name].state, images, labels)
    runs: dict[str, list[Seconds]] = {name: [] for name in CASES}
    for k in range(repeats):
        for name in list(CASES)[:: 1 if k % 2 else -1]:
            step, state = steps[name].call, states[name]
            states[name], took = timed(
                lambda: jax.block_until_ready(step(state, images, labels))  # noqa: B023
            )
            if k:  # the first call compiles
                runs[name].append(took)
    return {
        "model": model,
        "batch": batch,
        "parameters": sum(
            x.size for x in jax.tree.leaves(states["plain"][0]["params"])
        ),
        "cases": {
            name: {
                "time": machine.summary(runs[name]),
                **_ratios(runs, name),
                # lowering for the bytes, and the calls
                "traces": len(steps[name].traces),
                **sizes[name],
            }
            for name in CASES
        },
    }


def measure_noise(model: str, repeats: int) -> dict[str, Any]:
    """Times of drawing the noise and of pulling gradients back, without a net."""
    net = MODELS[model](num_classes=10)
    image = jnp.zeros((1, 32, 32, 3))
    params = jax.jit(net.init)(jax.random.key(0), image)["params"]
    calls = {}
    for name, target in CASES.items():
        if target is None:
            continue
        link = jaxprune.bridgeout(0.3, 1.5, target_fraction=target)
        state = link.init(params)
        halves = {"drawn": jaxprune.noisy_params, "pulled back": _pull_back(link)}
        for half, function in halves.items():
            calls[f"{name}, {half}"] = partial(jax.jit(function), params, state)
    runs: dict[str, list[Seconds]] = {name: [] for name in calls}
    for k in range(repeats + 1):
        for name, call in calls.items():
            took = timed(lambda: jax.block_until_ready(call()))[1]  # noqa: B023
            if k:  # the first call compiles
                runs[name].append(took)
    return {"model": model, "times": {n: machine.summary(t) for n, t in runs.items()}}


def _pull_back(link: optax.GradientTransformation) -> Callable[[Any, Any], Any]:
    return lambda params, state: link.update(params, state, params)


def _bytes(compiled: Any, state: Any) -> dict[str, int]:
    found = compiled.memory_analysis()
    raw = jax.tree.map(
        lambda x: (
            jax.random.key_data(x)
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
            else x
        ),
        state[1],
    )
    return {
        "state_bytes": sum(x.nbytes for x in jax.tree.leaves(raw)),
        "temporary_bytes": found.temp_size_in_bytes,
    }


def _ratios(runs: dict[str, list[Seconds]], name: str) -> dict[str, float]:
    pairs = zip(runs[name], runs["plain"], strict=True)
    medians = [statistics.median(t.wall for t in runs[n]) for n in (name, "plain")]
    processor = [statistics.median(t.cpu for t in runs[n]) for n in (name, "plain")]
    return {
        "ratio_of_medians": round(medians[0] / medians[1], 4),
        "median_ratio": round(statistics.median(a.wall / b.wall for a, b in pairs), 4),
        "ratio_of_processor_time": round(processor[0] / processor[1], 4),
    }


def show(result: dict[str, Any]) -> None:
    """Prints the table."""
    table = rich.table.Table(title=f"{result['model']}, batch {result['batch']}")
    for column in ("step", "s", "ratio", "limit", "traces", "state MB", "temp MB"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for name, row in result["cases"].items():
        table.add_row(
            name,
            f"{row['time']['wall']:.3f}",
            f"{row['ratio_of_medians']:.3f}",
            "" if name == "plain" else f"{LIMIT:.2f}",
            str(row["traces"]),
            f"{row['state_bytes'] / 1e6:.3f}",
            f"{row['temporary_bytes'] / 1e6:.1f}",
        )
    rich.console.Console().print(table)


def show_noise(result: dict[str, Any]) -> None:
    """Prints the times of the noise alone."""
    table = rich.table.Table("half", "s", "processor s", title=result["model"])
    for name, times in result["times"].items():
        table.add_row(name, f"{times['wall']:.3f}", f"{times['cpu']:.3f}")
    rich.console.Console().print(table)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--part", default="steps", choices=("steps", "noise"))
    parser.add_argument("--model", default="bridgeout_vgg16", choices=sorted(MODELS))
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dry", action="store_true", help="write no file")
    parser.add_argument("--out", default="bridgeout", help="name of the result file")
    options = parser.parse_args()
    part: dict[str, Any] = {"origin": machine.origin()}
    part["origin"]["device"] = jax.devices()[0].device_kind
    if options.part == "noise":
        part |= measure_noise(options.model, options.repeats)
        show_noise(part)
    else:
        part |= measure(options.model, options.batch, options.repeats + 1)
        show(part)
    if not options.dry:
        part["origin"]["load_average_at_end"] = machine.load()
        path = machine.RESULTS / f"{options.out}.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(before | {options.part: part}, indent=1) + "\n")
        print("written to", path)


if __name__ == "__main__":
    main()
