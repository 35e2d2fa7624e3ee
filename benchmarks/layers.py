"""A stacked decoder cut to fewer layers, every layer to units of its own.

    python -m benchmarks.layers

Decoders of 24 layers under one scan (Flax Linen's `nn.scan`, stacked NNX modules) lose
8 layers, and each that stays half of its heads and hidden units, chosen at random layer
by layer. Compared: the result with that of the masked decoder; the compiled program and
its cost with those of the same decoder built at that size; and the time that
``trace(layers=True, per_layer="*")`` takes with that of `jax.make_jaxpr`. Results go to
`results/layers.json`.
"""

import argparse
import dataclasses
import gc
import statistics
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table
from flax import nnx

import jaxprune
from benchmarks import machine
from benchmarks.machine import timed
from benchmarks.narrow import hlo_counts
from benchmarks.nets import Net


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a decoder."""

    layers: int = 24
    heads: int = 8
    hidden: int = 2048
    width: int = 512
    head_dim: int = 64
    vocabulary: int = 8192
    length: int = 64


class LinenLayer(nn.Module):
    """Attention and a hidden layer, each added to what it reads."""

    sizes: Sizes

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
        s = self.sizes
        features = s.heads * s.head_dim
        attend = nn.MultiHeadDotProductAttention(s.heads, qkv_features=features)
        x = x + attend(nn.LayerNorm()(x), mask=mask)
        y = nn.gelu(nn.Dense(s.hidden)(nn.LayerNorm()(x)))
        return x + nn.Dense(s.width)(y), None


class LinenDecoder(nn.Module):
    """Logits ``[batch, length, vocabulary]``."""

    sizes: Sizes

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        s = self.sizes
        stack = nn.scan(
            LinenLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=s.layers,
        )
        x = nn.Embed(s.vocabulary, s.width)(tokens)
        x, _ = stack(s, name="layers")(x, nn.make_causal_mask(tokens))
        return nn.Dense(s.vocabulary, use_bias=False)(nn.LayerNorm()(x))


class NNXLayer(nnx.Module):
    """What `LinenLayer` computes."""

    def __init__(self, s: Sizes, rngs: nnx.Rngs) -> None:
        self.norms = nnx.List([nnx.LayerNorm(s.width, rngs=rngs) for _ in range(2)])
        self.attend = nnx.MultiHeadAttention(
            s.heads, s.width, s.heads * s.head_dim, decode=False, rngs=rngs
        )
        self.up = nnx.Linear(s.width, s.hidden, rngs=rngs)
        self.down = nnx.Linear(s.hidden, s.width, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = x + self.attend(self.norms[0](x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class NNXDecoder(nnx.Module):
    """What `LinenDecoder` computes."""

    def __init__(self, s: Sizes, rngs: nnx.Rngs) -> None:
        def layer(rngs: nnx.Rngs) -> NNXLayer:
            return NNXLayer(s, rngs)

        self.embed = nnx.Embed(s.vocabulary, s.width, rngs=rngs)
        self.layers = nnx.vmap(layer, in_axes=0, out_axes=0)(rngs.split(s.layers))
        self.norm = nnx.LayerNorm(s.width, rngs=rngs)
        self.head = nnx.Linear(s.width, s.vocabulary, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        mask = nnx.make_causal_mask(tokens)

        def turn(x: jax.Array, layer: NNXLayer) -> jax.Array:
            return layer(x, mask)

        run = nnx.scan(turn, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return self.head(self.norm(run(self.embed(tokens), self.layers)))


def linen_decoder(s: Sizes) -> Net:
    """The decoder in Linen."""
    tokens = jax.ShapeDtypeStruct((2, s.length), jnp.int32)
    shapes = jax.eval_shape(LinenDecoder(s).init, jax.random.key(0), tokens)

    def make() -> Callable[..., Any]:
        return lambda variables, tokens: LinenDecoder(s).apply(variables, tokens)

    return Net(make, shapes, (tokens,))


def nnx_decoder(s: Sizes) -> Net:
    """The decoder in NNX."""
    tokens = jax.ShapeDtypeStruct((2, s.length), jnp.int32)
    model = nnx.eval_shape(lambda: NNXDecoder(s, nnx.Rngs(0)))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    rest = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), rest)

    def make() -> Callable[..., Any]:
        def apply_fn(variables: Any, tokens: jax.Array) -> jax.Array:
            filled = jax.tree.map(lambda leaf: leaf, params)
            nnx.replace_by_pure_dict(filled, variables)
            return nnx.merge(graph, filled, rest)(tokens)

        return apply_fn

    return Net(make, nnx.to_pure_dict(params), (tokens,))


def halved(s: Sizes) -> Sizes:
    """Two thirds of the layers, half of the heads and hidden units."""
    layers = s.layers * 2 // 3
    return dataclasses.replace(
        s, layers=layers, heads=s.heads // 2, hidden=s.hidden // 2
    )


def decisions(groups: jaxprune.Groups, s: Sizes) -> dict[str, np.ndarray]:
    """Which layers stay, and which units of every layer, at random."""
    rng, keep = np.random.default_rng(0), {}
    for name, group in groups.items():
        own = group.size // group.layers
        if group.layers == 1 and group.size == s.layers and group.ordered:
            keep[name] = rng.permutation(s.layers) < halved(s).layers
        if group.layers > 1 and own in (s.heads, s.hidden):
            every = [rng.permutation(own) < own // 2 for _ in range(group.layers)]
            keep[name] = np.concatenate(every)
    return keep


def drawn(net: Net) -> Any:
    """Variables at random: of scales around 1, else small."""
    rng = np.random.default_rng(0)

    def fill(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        noise = 0.05 * rng.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(noise + ("scale" in jax.tree_util.keystr(path)))

    return jax.tree.map_with_path(fill, net.variables)


def compare(build: Callable[[Sizes], Net], s: Sizes, repeats: int) -> dict[str, Any]:
    """One decoder: what is equal, and what it costs."""
    net, twin = build(s), build(halved(s))
    options = {"layers": True, "per_layer": "*"}
    variables, fn = drawn(net), net.make()
    tokens = np.random.default_rng(0).integers(0, s.vocabulary, (2, s.length), np.int32)
    groups = jaxprune.trace(fn, variables, *net.args, **options)
    keep = decisions(groups, s)
    masks = jaxprune.expand_masks(groups, keep)
    small = jaxprune.slice_params(variables, masks)
    functions = {"narrowed": jaxprune.narrow(fn, masks), "built small": twin.make()}
    assert jax.tree.map(jnp.shape, small) == jax.tree.map(jnp.shape, twin.variables)
    compiled = {
        n: jax.jit(f).lower(small, tokens).compile() for n, f in functions.items()
    }
    expected = jax.jit(fn)(jaxprune.apply_masks(variables, masks), tokens)
    got = compiled["narrowed"](small, tokens)
    costs = {n: jaxprune.costing.costs(f, small, tokens) for n, f in functions.items()}
    return {
        "groups_cut": len(keep),
        "parameters": [_count(variables), _count(small)],
        "difference": float(jnp.abs(got - expected).max() / jnp.abs(expected).max()),
        "hlo": {name: hlo_counts(run.as_text()) for name, run in compiled.items()},
        "multiply_adds": {name: cost.multiply_adds for name, cost in costs.items()},
        "trace": {
            "plain": _trace_ratio(net, repeats, {}),
            "layers, per_layer": _trace_ratio(net, repeats, options),
        },
    }


def _trace_ratio(net: Net, repeats: int, options: dict[str, Any]) -> dict[str, float]:
    """Processor time of `trace` and of `jax.make_jaxpr`, of functions new to JAX."""
    ratios = []
    for _ in range(repeats + 1):
        gc.collect()
        first, second = net.make(), net.make()
        jaxpr = timed(lambda: jax.make_jaxpr(first)(net.variables, *net.args))[1]  # noqa: B023
        traced = timed(
            lambda: jaxprune.trace(second, net.variables, *net.args, **options)  # noqa: B023
        )[1]
        ratios.append((traced.cpu / jaxpr.cpu, jaxpr.cpu, traced.cpu))
    ratio, jaxpr, traced = map(statistics.median, zip(*ratios[1:], strict=True))
    return {
        "make_jaxpr": round(jaxpr, 4),
        "trace": round(traced, 4),
        "ratio_cpu": round(ratio, 3),
    }


def _count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def show(result: dict[str, Any]) -> None:
    """Prints the table."""
    table = rich.table.Table(title="narrowed against built small")
    for column in ("decoder", "gap", "instructions", "multiply-adds", "trace ratio"):
        table.add_column(column, justify="left" if column == "decoder" else "right")
    for name, row in result["nets"].items():
        table.add_row(
            name,
            f"{row['difference']:.1e}",
            " / ".join(str(each["instructions"]) for each in row["hlo"].values()),
            " / ".join(map(str, row["multiply_adds"].values())),
            " / ".join(str(each["ratio_cpu"]) for each in row["trace"].values()),
        )
    rich.console.Console().print(table)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--dry", action="store_true", help="write no file")
    options = parser.parse_args()
    result: dict[str, Any] = {"origin": machine.origin(), "nets": {}}
    for name, build in (("linen", linen_decoder), ("nnx", nnx_decoder)):
        result["nets"][name] = compare(build, Sizes(), options.repeats)
    show(result)
    if not options.dry:
        print("written to", machine.write("layers", result))


if __name__ == "__main__":
    main()
