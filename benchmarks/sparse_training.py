"""Does training under masks cost more than training?

    python -m benchmarks.sparse_training

VGG-16 with BatchNorm on images of CIFAR's size, batch 128, with momentum SGD and with
AdamW. A step is the gradient, the update and its application, compiled as one program
with donated state. Compared, in turns: the plain step, a step under held masks at 90 %,
and a step of every method of sparse training: where masks are renewed now and then, a
step between two refreshes and, on its own line, a refresh; where they are renewed in
every step, that step. Gradients are taken at `masked_params` where a method needs it.
Then the bytes of masks per weight. Results go to `results/sparse_training.json`.

    python -m benchmarks.sparse_training --updates

A step takes seconds and its time varies by more than the 2 % in question, so this times
what is added to it: the same steps without the net, each weight its own gradient.
Results go to `results/sparse_updates.json`.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
import rich.table

from benchmarks import machine
from benchmarks.machine import Seconds, timed
from jaxprune import select, training
from jaxprune.models import cifar_vgg
from jaxprune.scores import magnitude
from jaxprune.training import masked_params

SPARSITY = 0.9
INNER = {
    "momentum SGD": lambda: optax.sgd(0.05, momentum=0.9),
    "AdamW": lambda: optax.adamw(1e-3, weight_decay=1e-2),
}


class Way(NamedTuple):
    """A method: how it wraps an optimiser, and whether gradients need its masks.

    Attributes:
        wrap: optimiser -> optimiser.
        masked: gradients are taken at `masked_params`, else at the parameters.
        first: the step count at which it is timed.
    """

    wrap: Callable[[Any], Any]
    masked: bool = False
    first: int = 1


def held(params: Any) -> Any:
    """The largest weights of every kernel."""
    kernels = {path for path, x in _named(params).items() if x.ndim > 1}
    return select.per_leaf(magnitude(params), sparsity=dict.fromkeys(kernels, SPARSITY))


def _named(params: Any) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(params)
    }


def gradual(tx: Any) -> Any:
    return training.gradual_pruning(tx, SPARSITY, every=1000)


def across(tx: Any) -> Any:
    return training.gradual_pruning(
        tx, SPARSITY, every=1000, selection=select.across_leaves
    )


def rigl(tx: Any) -> Any:
    return training.rigl(tx, SPARSITY, every=1000)


def evolve(tx: Any) -> Any:
    return training.sparse_evolutionary_training(tx, SPARSITY, every=1000)


WAYS: Mapping[str, Way] = {
    "plain": Way(lambda tx: tx),
    "held masks": Way(lambda tx: training.hold_masks(tx, held)),
    "held masks, masked forward": Way(lambda tx: training.hold_masks(tx, held), True),
    "gradual pruning": Way(gradual),
    "SET": Way(evolve),
    "RigL": Way(rigl),
    "grow and prune": Way(
        lambda tx: training.grow_and_prune(tx, SPARSITY, parts=4, every=1000)
    ),
    "straight-through, every 100": Way(
        lambda tx: training.straight_through(tx, SPARSITY, every=100), True
    ),
    "straight-through": Way(lambda tx: training.straight_through(tx, SPARSITY), True),
    "network surgery": Way(lambda tx: training.dynamic_network_surgery(tx, 1.0), True),
    "soft shrinkage": Way(lambda tx: training.iterative_soft_shrinkage(tx, SPARSITY)),
    "hard thresholding": Way(
        lambda tx: training.iterative_hard_thresholding(tx, SPARSITY)
    ),
}
REFRESHES: Mapping[str, Way] = {
    "gradual pruning, refresh": Way(gradual, first=0),
    "global pruning, refresh": Way(across, first=0),
    "RigL, refresh": Way(rigl, first=1000),
}


def step_of(way: Way, tx: Any, net: Any, batch: Any) -> Callable[..., Any]:
    """(variables, state) -> (variables, state), compiled, arguments donated."""
    images, labels = batch

    def loss(params: Any, rest: Any) -> Any:
        logits, new = net.apply(
            {"params": params, **rest}, images, train=True, mutable=["batch_stats"]
        )
        return optax.losses.softmax_cross_entropy_with_integer_labels(
            logits, labels
        ).mean(), new

    def step(params: Any, rest: Any, opt_state: Any) -> Any:
        seen = masked_params(params, opt_state) if way.masked else params
        grads, rest = jax.grad(loss, has_aux=True)(seen, rest)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), rest, opt_state

    return jax.jit(step, donate_argnums=(0, 1, 2))


def update_of(way: Way, tx: Any) -> Callable[..., Any]:
    """As `step_of`, without the net: the gradient of half the squared weights."""

    def step(params: Any, rest: Any, opt_state: Any) -> Any:
        seen = masked_params(params, opt_state) if way.masked else params
        updates, opt_state = tx.update(seen, opt_state, params)
        return optax.apply_updates(params, updates), rest, opt_state

    return jax.jit(step, donate_argnums=(0, 1, 2))


class Runner:
    """One way to train, with its state and its compiled step; without a net, None."""

    def __init__(self, way: Way, inner: Any, net: Any, variables: Any, batch: Any):
        tx = way.wrap(inner)
        params = jax.tree.map(jnp.copy, variables["params"])
        rest = {"batch_stats": jax.tree.map(jnp.copy, variables["batch_stats"])}
        opt_state = tx.init(params)
        if hasattr(opt_state, "masks"):
            opt_state = opt_state._replace(count=jnp.int32(way.first))
            params = jax.tree.map(jnp.copy, masked_params(params, opt_state))
        self.refreshes, self.first = way in REFRESHES.values(), way.first
        self.state = params, rest, opt_state
        self.step = step_of(way, tx, net, batch) if net else update_of(way, tx)

    def __call__(self) -> None:
        params, rest, opt_state = self.state
        if self.refreshes:
            opt_state = opt_state._replace(count=jnp.int32(self.first))
        self.state = jax.block_until_ready(self.step(params, rest, opt_state))


def in_turns(runners: Mapping[str, Runner], repeats: int) -> dict[str, list[Seconds]]:
    """Times of all steps, forwards and backwards, so that drift hits all alike."""
    times: dict[str, list[Seconds]] = {name: [] for name in runners}
    for name, runner in runners.items():
        _, first = timed(runner)
        print(f"  {name}: {first.wall:.1f} s with compiling", flush=True)
    for k in range(repeats):
        for name in list(runners)[:: 1 if k % 2 else -1]:
            times[name].append(timed(runners[name])[1])
    return times


def rows(times: Mapping[str, list[Seconds]]) -> dict[str, Any]:
    """Medians, and the median of the ratios to the plain step of the same round."""
    found = {}
    for name, runs in times.items():
        pairs = list(zip(runs, times["plain"], strict=True))
        found[name] = {
            **machine.summary(runs),
            "to_plain": round(statistics.median(x.wall / y.wall for x, y in pairs), 4),
            "to_plain_cpu": round(
                statistics.median(x.cpu / y.cpu for x, y in pairs), 4
            ),
            "to_plain_fastest": round(
                min(a.wall for a in runs) / min(b.wall for b in times["plain"]), 4
            ),
            "added_seconds": round(
                statistics.median(x.wall - y.wall for x, y in pairs), 4
            ),
        }
    return found


def mask_bytes(variables: Any) -> dict[str, Any]:
    """What the masks of all kernels take, in the state at rest."""
    tx = training.hold_masks(optax.sgd(0.1), held)
    bits = tx.init(variables["params"]).masks
    weights = sum(x.size for x in jax.tree.leaves(variables["params"]) if x.ndim > 1)
    taken = sum(x.nbytes for x in jax.tree.leaves(bits))
    return {
        "weights": weights,
        "bytes": taken,
        "bits_per_weight": round(8 * taken / weights, 5),
    }


def show(result: dict[str, Any]) -> None:
    """Prints the tables."""
    for optimiser, found in result["steps"].items():
        table = rich.table.Table(title=f"VGG-16 with {optimiser}")
        columns = ("seconds", "to plain", "of CPU time", "of the fastest", "added s")
        for column in ("step", *columns):
            table.add_column(column, justify="left" if column == "step" else "right")
        for name, row in found.items():
            told = ("to_plain", "to_plain_cpu", "to_plain_fastest", "added_seconds")
            cells = (f"{row[number]:.3f}" for number in told)
            table.add_row(name, f"{row['wall']:.3f}", *cells)
        rich.console.Console().print(table)
    print(result["masks"])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--width", type=float, default=1.0, help="factor on all widths")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--only", nargs="*", help="names of the steps to time")
    parser.add_argument("--optimisers", nargs="*", default=list(INNER))
    parser.add_argument("--updates", action="store_true", help="without the net")
    parser.add_argument("--dry", action="store_true", help="write no file")
    options = parser.parse_args()
    net = cifar_vgg(16, width_multiplier=options.width)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(options.batch, 32, 32, 3)), jnp.float32)
    batch = images, jnp.asarray(rng.integers(0, 10, options.batch))
    variables = jax.jit(net.init)(jax.random.key(0), images[:1])
    ways = {**WAYS, **REFRESHES}
    if options.only:
        ways = {name: ways[name] for name in ["plain", *options.only]}
    result: dict[str, Any] = {
        "origin": machine.origin(),
        "batch": options.batch,
        "sparsity": SPARSITY,
        "masks": mask_bytes(variables),
        "steps": {},
    }
    for optimiser in options.optimisers:
        print(optimiser)
        make = INNER[optimiser]
        given = (None if options.updates else net, variables, batch)
        runners = {name: Runner(way, make(), *given) for name, way in ways.items()}
        result["steps"][optimiser] = rows(in_turns(runners, options.repeats))
    show(result)
    if not options.dry:
        name = "sparse_updates" if options.updates else "sparse_training"
        print("written to", machine.write(name, result))


if __name__ == "__main__":
    main()
