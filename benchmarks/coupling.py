"""How fast the coupling engine is: trace against make_jaxpr, and the whole way.

    python -m benchmarks.coupling [--torch-python PATH]

For every net: the time of `jax.make_jaxpr` and of `jaxprune.trace` on a function that
JAX has not seen, and their ratio; then the whole way from the function to a pruned one
(trace, L2 scores, half of all units selected across groups, slice, and narrow's own
tracing) on real weights. Depth sweeps with tiny widths give the exponent of growth.
A decoder of 70 billion parameters is traced from its shapes alone, in a process of its
own. With --torch-python (see `torch_pruning_side.py`) Torch-Pruning takes turns with
us, so that both see the same machine. Results go to `results/coupling.json`.
"""

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import rich.console
import rich.table

import jaxprune
from benchmarks import decoders, machine
from benchmarks.machine import Seconds, timed
from benchmarks.nets import NETS, SWEEPS, Net, decoder_net, real_variables
from benchmarks.torch_process import TorchPruning

PARTS = ("trace", "scores", "select", "slice", "narrow")


def jaxpr_and_trace(net: Net, repeats: int) -> dict[str, Any]:
    """Times of make_jaxpr and trace, in turns, and their ratio."""
    jaxprs, traces = [], []
    for _ in range(repeats):
        fn = net.make()
        jaxprs.append(timed(lambda: jax.make_jaxpr(fn)(net.variables, *net.args))[1])  # noqa: B023
        fn = net.make()
        traces.append(timed(lambda: jaxprune.trace(fn, net.variables, *net.args))[1])  # noqa: B023
    ratios = [t.wall / j.wall for t, j in zip(traces, jaxprs, strict=True)]
    return {
        "make_jaxpr": machine.summary(jaxprs),
        "trace": machine.summary(traces),
        "ratio": round(statistics.median(ratios), 3),
    }


def whole_way(net: Net, variables: Any) -> list[Seconds]:
    """Times of the parts of pruning a net to half, in the order of `PARTS`."""
    fn = net.make()
    groups, trace = timed(lambda: jaxprune.trace(fn, variables, *net.args))
    unit_scores, scores = timed(lambda: _l2_scores(groups, variables))
    masks, select = timed(lambda: _half(groups, unit_scores))
    small, cut = timed(
        lambda: jax.block_until_ready(jaxprune.slice_params(variables, masks))
    )
    small_fn = jaxprune.narrow(fn, masks)
    _, narrow = timed(lambda: jax.make_jaxpr(small_fn)(small, *net.args))
    return [trace, scores, select, cut, narrow]


def _l2_scores(groups: jaxprune.Groups, variables: Any) -> dict[str, np.ndarray]:
    scores = jaxprune.scores.magnitude(variables)
    found = jaxprune.group_scores(groups, scores, reduce="l2", normalize="mean")
    return {name: np.asarray(units) for name, units in found.items()}


def _half(groups: jaxprune.Groups, scores: dict[str, np.ndarray]) -> Any:
    keep = jaxprune.select.across_groups(groups, scores, sparsity=0.5)
    return jaxprune.expand_masks(groups, keep)


def side_by_side(
    name: str, net: Net, torch: TorchPruning, repeats: int, sizes: list[int]
) -> dict[str, Any]:
    """The whole way, in turns with Torch-Pruning."""
    variables = real_variables(net)
    ours, theirs = [], []
    for _ in range(repeats):
        ours.append(whole_way(net, variables))
        theirs.append(torch.measure(name, sizes))
    by_part = dict(zip(PARTS, zip(*ours, strict=True), strict=True))
    parts = {part: machine.summary(times) for part, times in by_part.items()}
    result: dict[str, Any] = {
        "whole_way": machine.summary([_total(times) for times in ours]),
        "parts": parts,
    }
    if None not in theirs:
        result["torch_pruning"] = _their_summary(theirs)
    return result


def _total(times: list[Seconds]) -> Seconds:
    return Seconds(sum(t.wall for t in times), sum(t.cpu for t in times))


def _their_summary(answers: list[Any]) -> dict[str, Any]:
    # The pruner builds its own graph: "init" holds the build, so the whole is
    # init + step; "build" alone says how much of init it is.
    parts = {
        part: [Seconds(**answer[part]) for answer in answers]
        for part in ("build", "init", "step")
    }
    whole = [_total(list(pair)) for pair in zip(parts["init"], parts["step"])]  # noqa: B905
    return {
        "whole_way": machine.summary(whole),
        **{part: machine.summary(times) for part, times in parts.items()},
        "left": answers[0]["left"] / answers[0]["parameters"],
        "runs": answers[0]["runs"],
    }


def sweep(kind: str, torch: TorchPruning, repeats: int, most: int) -> dict[str, Any]:
    """Times of all depths of one kind of net, and their exponents of growth."""
    build, depths = SWEEPS[kind]
    depths = [depth for depth in depths if depth <= most]
    rows = {}
    for depth in depths:
        net = build(depth)
        once = side_by_side(kind, net, torch, 1, [depth])
        rows[depth] = {**jaxpr_and_trace(net, repeats), **once}
    return {
        "depths": rows,
        "exponent": {
            what: exponent(depths, [row[what]["wall"] for row in rows.values()])
            for what in ("make_jaxpr", "trace", "whole_way")
        },
    }


def exponent(depths: list[int], times: list[float]) -> float:
    """Slope of log(time) over log(depth), by least squares."""
    return round(float(np.polyfit(np.log(depths), np.log(times), 1)[0]), 3)


def giant() -> dict[str, Any]:
    """Traces a decoder of 70 billion parameters; meant for a process of its own."""
    net = decoder_net(decoders.Llama(), 4096)
    _, jaxpr = timed(lambda: jax.make_jaxpr(net.make())(net.variables, *net.args))
    before = _peak_mib()
    groups, trace = timed(lambda: jaxprune.trace(net.make(), net.variables, *net.args))
    return {
        "parameters": net.parameters,
        "groups": len(groups),
        "units": sum(group.size for group in groups.values()),
        "make_jaxpr_wall": round(jaxpr.wall, 3),
        "trace_wall": round(trace.wall, 3),
        "trace_cpu": round(trace.cpu, 3),
        "peak_mib": _peak_mib(),
        "peak_mib_before_trace": before,
    }


def _peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def _giant_in_a_process() -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.coupling", "--giant"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def show(result: dict[str, Any]) -> None:
    """Prints the tables."""
    console = rich.console.Console()
    rows = {name: (name, row) for name, row in result["nets"].items()}
    for kind, found in result["sweeps"].items():
        for depth, row in found["depths"].items():
            rows[f"{kind} {depth}"] = (kind, row)
    table = rich.table.Table(title="seconds on the wall (medians)")
    columns = ("net", "make_jaxpr", "trace", "ratio", "whole way", "first time")
    for column in (*columns, "Torch-Pruning", "times faster"):
        table.add_column(column, justify="left" if column == "net" else "right")
    for name, (_, row) in rows.items():
        ours, theirs = row["whole_way"]["wall"], row.get("torch_pruning")
        other = theirs["whole_way"]["wall"] if theirs else math.nan
        table.add_row(
            name,
            *(f"{row[what]['wall']:.3f}" for what in ("make_jaxpr", "trace")),
            f"{row['ratio']:.2f}",
            f"{ours:.3f}",
            f"{row['whole_way']['first_wall']:.3f}",
            *((f"{other:.3f}", f"{other / ours:.1f}") if theirs else ("-", "-")),
        )
    console.print(table)
    for kind, found in result["sweeps"].items():
        console.print(f"{kind}: grows as depth to the power", found["exponent"])
    if result.get("giant"):
        console.print("70B decoder:", result["giant"])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--torch-python", help="interpreter with torch-pruning 1.6.1")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--nets", nargs="*", default=list(NETS), choices=list(NETS))
    parser.add_argument("--most", type=int, default=150, help="largest sweep depth")
    parser.add_argument("--no-sweeps", action="store_true")
    parser.add_argument("--no-giant", action="store_true")
    parser.add_argument("--giant", action="store_true", help="the 70B decoder alone")
    parser.add_argument("--dry", action="store_true", help="write no file")
    options = parser.parse_args()
    if options.giant:
        print(json.dumps(giant()))
        return
    torch = TorchPruning(options.torch_python)
    if torch.versions is None:
        print(f"Torch-Pruning is left out: {torch.missing}")
    result = _measure_all(options, torch)
    torch.close()
    show(result)
    if not options.dry:
        print("written to", machine.write("coupling", result))


def _measure_all(options: argparse.Namespace, torch: TorchPruning) -> dict[str, Any]:
    result: dict[str, Any] = {"origin": machine.origin(), "nets": {}, "sweeps": {}}
    if torch.versions is not None:
        result["origin"]["versions"] |= torch.versions
    _say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)
    jax.make_jaxpr(lambda x: x @ x)(np.ones((2, 2)))  # JAX's own first steps
    for name in options.nets:
        _say(name)
        net = NETS[name]()
        both = jaxpr_and_trace(net, options.repeats)
        result["nets"][name] = {
            **both,
            **side_by_side(name, net, torch, options.repeats, []),
        }
    for kind in () if options.no_sweeps else SWEEPS:
        _say(kind)
        result["sweeps"][kind] = sweep(kind, torch, options.repeats, options.most)
    if not options.no_giant:
        _say("70B decoder")
        result["giant"] = _giant_in_a_process()
    return result


if __name__ == "__main__":
    main()
