"""What do factors, trained rank pruning and candidates side by side cost?

    python -m benchmarks.ranks

Three comparisons, each in turns, compiled: a net that `factorise` made against one
written by hand with the same factors; twenty training steps of a CIFAR ResNet with
trained rank pruning, truncated once, against twenty plain ones; eight candidates of
try-and-learn in one step against one by one. Results go to `results/ranks.json`.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
import rich.table
from jax import lax

import jaxprune
from benchmarks import machine
from benchmarks.centripetal import DECAY, MOMENTUM, RATE, step_of
from benchmarks.machine import Seconds, timed
from jaxprune.models import cifar_resnet
from jaxprune.recipes._trials import measured, stacked
from jaxprune.training import trained_rank_pruning

EVERY, CANDIDATES = 20, 8
WIDTHS = (32, 64, 64, 128, 128)


def convolution(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """SAME, channels last."""
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip


def plain_net(params: Any, x: jax.Array) -> jax.Array:
    """Convolutions of 3x3, every other of stride 2, and a classifier."""
    for k, kernel in enumerate(params["kernels"]):
        x = jax.nn.relu(convolution(x, kernel, 1 + k % 2))
    return x.mean((1, 2)) @ params["head"]


def net_by_hand(params: Any, x: jax.Array) -> jax.Array:
    """The same, written for two factors in place of every kernel."""
    for k, pair in enumerate(params["kernels"]):
        x = convolution(x, pair["first"], 1 + k % 2)
        x = jax.nn.relu(convolution(x, pair["second"]))
    return x.mean((1, 2)) @ params["head"]


def factors(batch: int, repeats: int, widths: Sequence[int] = WIDTHS) -> dict[str, Any]:
    """`factorise` against the net by hand: inference, and a gradient."""
    params, x = inputs(batch, widths)
    small = jaxprune.factorise(plain_net, params, x, ranks={"kernels/*": 0.25})
    whole = plain_net(small.compose(small.variables), x)
    found: dict[str, Any] = {
        "difference": float(jnp.abs(net_by_hand(small.variables, x) - whole).max())
    }
    for name, of in {"inference": _same, "gradient": _gradient}.items():
        calls = {
            "whole": _compiled(of(plain_net), params, x),
            "by hand": _compiled(of(net_by_hand), small.variables, x),
            "factorised": _compiled(of(small.apply_fn), small.variables, x),
        }
        found[name] = _against(_in_turns(calls, repeats), "factorised", "by hand")
    found["compiled"] = {
        name: size_of(_gradient(fn), small.variables, x)
        for name, fn in {"by hand": net_by_hand, "factorised": small.apply_fn}.items()
    }
    return found


def size_of(fn: Callable[..., Any], *args: Any) -> dict[str, float]:
    """What the compiler says of a function: that it makes the same of two of them."""
    compiled = jax.jit(fn).lower(*args).compile()
    cost = compiled.cost_analysis()
    return {
        "flops": cost["flops"],
        "bytes": cost["bytes accessed"],
        "instructions": compiled.as_text().count(" = "),
    }


def inputs(batch: int, widths: Sequence[int]) -> tuple[Any, jax.Array]:
    """Parameters of `plain_net`, and images."""
    rng = np.random.default_rng(0)
    pairs = zip((3, *widths), widths, strict=False)
    kernels = [rng.normal(size=(3, 3, *pair)) * 0.1 for pair in pairs]
    params = {
        "kernels": [jnp.asarray(kernel, jnp.float32) for kernel in kernels],
        "head": jnp.asarray(rng.normal(size=(widths[-1], 10)), jnp.float32),
    }
    return params, jnp.asarray(rng.normal(size=(batch, 32, 32, 3)), jnp.float32)


def _same(fn: Callable[..., Any]) -> Callable[..., Any]:
    return fn


def _gradient(fn: Callable[..., Any]) -> Callable[..., Any]:
    return jax.grad(lambda params, x: jnp.square(fn(params, x)).sum())


def training(depth: int, batch: int, repeats: int) -> dict[str, Any]:
    """Steps with trained rank pruning against plain ones, `EVERY` at a time."""
    net = cifar_resnet(depth, shortcut="projection")
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.standard_normal((batch, 32, 32, 3), "float32"))
    labels = jnp.asarray(rng.integers(0, 10, batch))
    variables = jax.jit(net.init)(jax.random.key(0), images[:1])
    sgd = optax.chain(
        optax.add_decayed_weights(
            DECAY, lambda params: jax.tree.map(lambda w: w.ndim > 1, params)
        ),
        optax.sgd(RATE, momentum=MOMENTUM),
    )
    links = {
        "sgd": sgd,
        "trained rank": trained_rank_pruning(
            sgd, every=EVERY, energy=0.98, strength=3e-4
        ),
    }
    calls = {}
    for name, tx in links.items():
        args = (variables, tx.init(variables["params"]), images, labels)
        step = jax.jit(step_of(net.apply, tx)).lower(*args).compile()
        calls[name] = _steps(step, args)
    times = _in_turns(calls, repeats)
    return {"depth": depth, "batch": batch, **_against(times, "trained rank", "sgd")}


def _steps(step: Callable[..., Any], args: Any) -> Callable[[], Any]:
    variables, opt_state, *rest = args

    def run() -> Any:
        state = variables, opt_state
        for _ in range(EVERY):
            state = step(*state, *rest)
        return jax.block_until_ready(state)

    return run


def candidates(batch: int, repeats: int) -> dict[str, Any]:
    """Candidates in one vmapped step against one call after the other."""
    (params, x), rng = inputs(batch, WIDTHS), np.random.default_rng(1)
    groups = jaxprune.trace(plain_net, params, x, roles=True)

    def metric(params: Any, x: jax.Array) -> jax.Array:
        return -jnp.square(plain_net(params, x)).mean()

    names = list(groups)
    measure = measured(groups, names, params, metric, [x], None)
    held = stacked([x])
    keep = {
        name: jnp.asarray(rng.random((CANDIDATES, groups[name].size)) < 0.7)
        for name in names
    }

    def one(keep: Any) -> jax.Array:
        return measure(keep, params, (), held)

    apart = [jax.tree.map(lambda rows, k=k: rows[k], keep) for k in range(CANDIDATES)]
    single = jax.jit(one).lower(apart[0]).compile()
    together = jax.jit(jax.vmap(one)).lower(keep).compile()
    calls = {
        "one by one": lambda: [jax.block_until_ready(single(each)) for each in apart],
        "together": lambda: jax.block_until_ready(together(keep)),
    }
    return {
        "batch": batch,
        **_against(_in_turns(calls, repeats), "together", "one by one"),
    }


def _compiled(fn: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    ready = jax.jit(fn).lower(*args).compile()
    return lambda: jax.block_until_ready(ready(*args))


def _in_turns(
    calls: dict[str, Callable[[], Any]], repeats: int
) -> dict[str, list[Seconds]]:
    """Times of all calls, there and back, so that drift hits them alike."""
    times: dict[str, list[Seconds]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for k in range(repeats):
        for name in list(calls)[:: 1 if k % 2 else -1]:
            times[name].append(timed(calls[name])[1])
    return times


def _against(times: dict[str, list[Seconds]], name: str, other: str) -> dict[str, Any]:
    """Summaries, and medians of the ratios turn by turn, of both clocks."""
    pairs = list(zip(times[name], times[other], strict=True))
    return {
        "time": {key: machine.summary(each) for key, each in times.items()},
        "ratio": {
            clock: round(
                statistics.median(
                    getattr(a, clock) / getattr(b, clock) for a, b in pairs
                ),
                4,
            )
            for clock in ("wall", "cpu")
        },
    }


def show(result: dict[str, Any]) -> None:
    """Prints the table."""
    table = rich.table.Table()
    for column in ("", "ms", "ratio, wall", "ratio, cpu"):
        table.add_column(column)
    parts = {name: result["factors"][name] for name in ("inference", "gradient")}
    parts |= {name: result[name] for name in ("training", "candidates")}
    for part, found in parts.items():
        table.add_row(part, "", *(f"{r:.3f}" for r in found["ratio"].values()))
        for name, each in found["time"].items():
            table.add_row(f"  {name}", f"{1e3 * each['wall']:.1f}", "", "")
    rich.console.Console().print(table)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dry", action="store_true", help="write no file")
    options = parser.parse_args()
    result: dict[str, Any] = {"origin": machine.origin()}
    result["origin"]["device"] = jax.devices()[0].device_kind
    result["factors"] = factors(options.batch, options.repeats)
    result["candidates"] = candidates(options.batch, options.repeats)
    few = max(3, options.repeats // 3)
    result["training"] = training(options.depth, options.batch, few)
    show(result)
    if not options.dry:
        print("written to", machine.write("ranks", result))


if __name__ == "__main__":
    main()
