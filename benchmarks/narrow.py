"""Is a narrowed program as good as one written by hand for the smaller shapes?

    python -m benchmarks.narrow

Half of every inner group is cut at random (ResNet-50: the channels inside each
bottleneck; a decoder: kv groups and hidden units of each layer), because these leave
widths that the model's own constructor accepts. The hand-built twin takes the very same
variables. Compared: the results, the compiled HLO (gathers, fusions, instructions) and
the time of a call, in turns. Results go to `results/narrow.json`.
"""

import argparse
import collections
import dataclasses
import re
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table

import jaxprune
from benchmarks import decoders, machine
from benchmarks.machine import Seconds, timed
from benchmarks.nets import Net, decoder_net, image_net, real_variables
from jaxprune.models import imagenet_resnet


@dataclasses.dataclass(frozen=True)
class Pair:
    """A net, the groups to cut, and the function that a person would write then."""

    net: Net
    cut: Callable[[jaxprune.Groups], list[str]]
    twin: Callable[..., Any]
    args: tuple[Any, ...]


def resnet50(batch: int, side: int) -> Pair:
    """ResNet-50 whose bottlenecks are half as wide inside."""
    net = image_net(imagenet_resnet(50), side)
    inner = [width // 8 for width in (256, 512, 1024, 2048)]
    blocks = (3, 4, 6, 3)
    widths = [w for w, count in zip(inner, blocks, strict=True) for _ in range(count)]
    twin = imagenet_resnet(50, inner_widths=widths)

    def cut(groups: jaxprune.Groups) -> list[str]:
        return [
            name for name in groups if re.search(r"block.*/conv[12]/kernel:3", name)
        ]

    images = np.random.default_rng(0).standard_normal((batch, side, side, 3), "float32")
    return Pair(net, cut, lambda v, x: twin.apply(v, x), (jnp.asarray(images),))


def decoder(batch: int, length: int) -> Pair:
    """A decoder with half of its kv groups and of its hidden units."""
    full = decoders.Llama(8, 512, 8, 4, 64, 1536, 8192)
    small = dataclasses.replace(full, heads=4, groups=2, ffn=768)

    def cut(groups: jaxprune.Groups) -> list[str]:
        sizes = {full.groups, full.ffn}
        layers = (name for name in groups if name.startswith("layers/"))
        return [name for name in layers if groups[name].size in sizes]

    tokens = np.random.default_rng(0).integers(0, full.vocabulary, (batch, length))
    return Pair(
        decoder_net(full, length),
        cut,
        lambda params, tokens: decoders.llama(small, params, tokens),
        (jnp.asarray(tokens, jnp.int32),),
    )


def compare(pair: Pair, repeats: int) -> dict[str, Any]:
    """Narrowed and hand-built: difference, HLO and time."""
    variables = real_variables(pair.net)
    fn = pair.net.make()
    groups = jaxprune.trace(fn, variables, *pair.net.args)
    masks = jaxprune.expand_masks(groups, _halves(groups, pair.cut(groups)))
    small = jaxprune.slice_params(variables, masks)
    functions = {"narrowed": jaxprune.narrow(fn, masks), "by hand": pair.twin}
    compiled = {
        name: jax.jit(function).lower(small, *pair.args).compile()
        for name, function in functions.items()
    }
    outs = [np.asarray(call(small, *pair.args)) for call in compiled.values()]
    gap = float(np.abs(outs[0] - outs[1]).max() / np.abs(outs[1]).max())
    times = _in_turns(compiled, (small, *pair.args), repeats)
    ratios = [a.wall / b.wall for a, b in zip(*times.values(), strict=True)]
    return {
        "groups_cut": len(pair.cut(groups)),
        "parameters": [_count(variables), _count(small)],
        "difference": gap,
        "hlo": {name: hlo_counts(run.as_text()) for name, run in compiled.items()},
        "time": {name: machine.summary(each) for name, each in times.items()},
        "ratio_of_medians": round(
            statistics.median(t.wall for t in times["narrowed"])
            / statistics.median(t.wall for t in times["by hand"]),
            4,
        ),
        "median_ratio": round(statistics.median(ratios), 4),
    }


def _halves(groups: jaxprune.Groups, names: list[str]) -> dict[str, np.ndarray]:
    """Keeps a random half of each of these groups."""
    rng = np.random.default_rng(0)
    keep = {}
    for name in names:
        size = groups[name].size
        keep[name] = np.zeros(size, bool)
        keep[name][rng.permutation(size)[: size // 2]] = True
    return keep


def _in_turns(
    calls: Mapping[str, Callable[..., Any]], args: tuple[Any, ...], repeats: int
) -> dict[str, list[Seconds]]:
    """Times of all calls, A B B A, so that drift hits both alike."""
    times: dict[str, list[Seconds]] = {name: [] for name in calls}
    for k in range(repeats):
        for name in list(calls)[:: 1 if k % 2 else -1]:
            run = timed(lambda: jax.block_until_ready(calls[name](*args)))[1]  # noqa: B023
            times[name].append(run)
    return times


def hlo_counts(text: str) -> dict[str, int]:
    """How many gathers, fusions and instructions a compiled program has.

    >>> hlo_counts("  %a = f32[2]{0} gather(%x, %y)\\n  ROOT %b = f32[] fusion(%a)")
    {'gather': 1, 'fusion': 1, 'instructions': 2}
    """
    pattern = r"^\s*(?:ROOT )?%?[\w.-]+ = (?:\(.*?\)|\S+) ([\w-]+)\("
    found = collections.Counter(re.findall(pattern, text, re.MULTILINE))
    kinds = {kind: found[kind] for kind in ("gather", "fusion")}
    return {**kinds, "instructions": sum(found.values())}


def _count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def show(result: dict[str, Any]) -> None:
    """Prints the table."""
    table = rich.table.Table(title="narrowed against built by hand")
    for column in ("net", "ratio", "ms", "gathers", "fusions", "instructions", "gap"):
        table.add_column(column, justify="left" if column == "net" else "right")
    for name, row in result["nets"].items():
        hlo, times = row["hlo"].values(), row["time"].values()
        table.add_row(
            name,
            f"{row['ratio_of_medians']:.3f}",
            " / ".join(f"{1e3 * each['wall']:.1f}" for each in times),
            *(
                " / ".join(str(each[kind]) for each in hlo)
                for kind in ("gather", "fusion", "instructions")
            ),
            f"{row['difference']:.1e}",
        )
    rich.console.Console().print(table)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--dry", action="store_true", help="write no file")
    parser.add_argument("--out", default="narrow", help="name of the result file")
    options = parser.parse_args()
    result: dict[str, Any] = {"origin": machine.origin(), "nets": {}}
    result["origin"]["device"] = jax.devices()[0].device_kind
    for name, pair in (("resnet50", resnet50(4, 224)), ("decoder", decoder(4, 256))):
        result["nets"][name] = compare(pair, options.repeats)
    show(result)
    if not options.dry:
        print("written to", machine.write(options.out, result))


if __name__ == "__main__":
    main()
