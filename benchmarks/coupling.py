"""How fast the coupling engine is: trace against make_jaxpr, and the whole way.

    python -m benchmarks.coupling [--torch-python PATH]

For every net: the time of `jax.make_jaxpr` and of `jaxprune.trace` on a function that
JAX has not seen, and their ratio; then the whole way from the function to a pruned one
(trace, L2 scores, half of all units selected across groups, slice, and narrow's own
tracing) on real weights: the first call of a fresh process, several times, and later
calls. Depth sweeps with tiny widths give the exponent of growth, in processor time. A
decoder of 70 billion parameters is traced from its shapes alone, in a process of its
own. With --torch-python (see `torch_pruning_side.py`) Torch-Pruning takes turns with
us, so that both see the same machine. Results go to `results/coupling.json`;
`python -m benchmarks.tables` makes tables of them.
"""

import argparse
import functools
import gc
import json
import math
import pathlib
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import jaxprune
from benchmarks import decoders, machine, tables
from benchmarks.machine import Seconds, timed
from benchmarks.nets import NETS, SWEEPS, Net, decoder_net, real_variables
from benchmarks.torch_process import TorchPruning

PARTS = ("trace", "scores", "select", "slice", "narrow")


def jaxpr_and_trace(net: Net, repeats: int) -> dict[str, Any]:
    """Times of make_jaxpr and trace, in turns, and the median of their ratios."""
    jaxprs, traces = [], []
    _fresh(jax.make_jaxpr, net)  # what JAX does but once
    for _ in range(repeats):
        jaxprs.append(_fresh(jax.make_jaxpr, net))
        traces.append(_fresh(lambda fn: functools.partial(jaxprune.trace, fn), net))
    pairs = list(zip(traces, jaxprs, strict=True))
    return {
        "make_jaxpr": machine.summary(jaxprs),
        "trace": machine.summary(traces),
        "ratio": round(statistics.median(t.wall / j.wall for t, j in pairs), 3),
        "ratio_cpu": round(statistics.median(t.cpu / j.cpu for t, j in pairs), 3),
    }


def _fresh(transform: Callable[..., Any], net: Net) -> Seconds:
    """How long a transformation of a function that JAX has not seen takes."""
    gc.collect()  # what was left behind by others is not ours to pay for
    call = transform(net.make())
    return timed(lambda: call(net.variables, *net.args))[1]


def whole_way(net: Net, variables: Any) -> list[Seconds]:
    """Times of the parts of pruning a net to half, in the order of `PARTS`."""
    gc.collect()
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
    # The norm of a unit needs no |w| of its own: `reduce` squares what it is given.
    found = jaxprune.group_scores(groups, variables, reduce="l2", normalize="mean")
    return {name: np.asarray(units) for name, units in found.items()}


def _half(groups: jaxprune.Groups, scores: dict[str, np.ndarray]) -> Any:
    keep = jaxprune.select.across_groups(groups, scores, sparsity=0.5)
    return jaxprune.expand_masks(groups, keep)


def first_call(name: str) -> dict[str, Any]:
    """The whole way on a net; meant for a process of its own."""
    net = NETS[name]()
    times = whole_way(net, jax.block_until_ready(real_variables(net)))
    return {part: each._asdict() for part, each in zip(PARTS, times, strict=True)}


def first_calls(name: str, python: str | None, processes: int) -> dict[str, Any]:
    """The whole way in fresh processes, in turns with Torch-Pruning."""
    ours, theirs = [], []
    for _ in range(processes):
        answer = _in_a_process("--first", name)
        ours.append([Seconds(**answer[part]) for part in PARTS])
        torch = TorchPruning(python)
        theirs.append(torch.measure(torch_name(name), []))
        torch.close()
    return _summaries(ours, theirs)


def later_calls(
    name: str, net: Net, torch: TorchPruning, repeats: int, sizes: list[int]
) -> dict[str, Any]:
    """The whole way in processes that have gone it before, in turns."""
    variables = jax.block_until_ready(real_variables(net))
    whole_way(net, variables)
    ours, theirs = [], []
    for k in range(repeats):
        ours.append(whole_way(net, variables))
        if k == 0 or not sizes:  # their deepest nets take minutes
            theirs.append(torch.measure(torch_name(name), sizes))
    return _summaries(ours, theirs)


def torch_name(name: str) -> str:
    """What a net is called there, whichever library writes it here."""
    return name.removesuffix("_nnx").removesuffix("_jax")


def _summaries(ours: list[list[Seconds]], theirs: list[Any]) -> dict[str, Any]:
    by_part = dict(zip(PARTS, zip(*ours, strict=True), strict=True))
    result: dict[str, Any] = {
        "whole_way": machine.summary([_total(times) for times in ours]),
        "parts": {part: machine.summary(times) for part, times in by_part.items()},
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
        later = later_calls(kind, net, torch, repeats, [depth])
        rows[depth] = {**jaxpr_and_trace(net, repeats), "later": later}
    times = {
        "make_jaxpr": [row["make_jaxpr"] for row in rows.values()],
        "trace": [row["trace"] for row in rows.values()],
        "whole_way": [row["later"]["whole_way"] for row in rows.values()],
    }
    if torch.versions is not None:
        each = [row["later"]["torch_pruning"]["whole_way"] for row in rows.values()]
        times["torch_pruning"] = each
    return {
        "depths": rows,
        "exponent": {
            what: exponent(depths, [each["cpu"] for each in measured])
            for what, measured in times.items()
        },
    }


def exponent(depths: list[int], times: list[float]) -> float:
    """Slope of log(time) over log(depth), by least squares; NaN for one depth."""
    if len(depths) < 2:
        return math.nan
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
    """The most memory that this process has held."""
    status = pathlib.Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):  # unlike ru_maxrss, not that of the parent
            return int(line.split()[1]) // 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def _in_a_process(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.coupling", *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--torch-python", help="interpreter with torch-pruning 1.6.1")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--nets", nargs="*", default=list(NETS), choices=list(NETS))
    parser.add_argument("--most", type=int, default=150, help="largest sweep depth")
    parser.add_argument("--no-sweeps", action="store_true")
    parser.add_argument("--no-giant", action="store_true")
    parser.add_argument("--giant", action="store_true", help="the 70B decoder alone")
    parser.add_argument("--first", choices=list(NETS), help="one first call alone")
    parser.add_argument("--dry", action="store_true", help="write no file")
    options = parser.parse_args()
    if options.giant or options.first:
        print(json.dumps(giant() if options.giant else first_call(options.first)))
        return
    torch = TorchPruning(options.torch_python)
    if torch.versions is None:
        print(f"Torch-Pruning is left out: {torch.missing}")
    result = _measure_all(options, torch)
    torch.close()
    tables.show_coupling(result)
    _save(options, result)


def _save(options: argparse.Namespace, result: dict[str, Any]) -> None:
    if not options.dry:
        machine.write("coupling", result)


def _measure_all(options: argparse.Namespace, torch: TorchPruning) -> dict[str, Any]:
    result: dict[str, Any] = {"origin": machine.origin(), "nets": {}, "sweeps": {}}
    if torch.versions is not None:
        result["origin"]["versions"] |= torch.versions
    _say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)
    for name in options.nets:
        _say(name)
        net = NETS[name]()
        result["nets"][name] = {
            **jaxpr_and_trace(net, options.repeats),
            "first": first_calls(name, options.torch_python, options.processes),
            "later": later_calls(name, net, torch, options.repeats, []),
        }
        _save(options, result)
    for kind in () if options.no_sweeps else SWEEPS:
        _say(kind)
        result["sweeps"][kind] = sweep(kind, torch, options.repeats, options.most)
        _save(options, result)
    if not options.no_giant:
        _say("70B decoder")
        result["giant"] = _in_a_process("--giant")
    return result


if __name__ == "__main__":
    main()
