"""Torch-Pruning's half of `coupling.py`; runs under an interpreter of its own.

    python -m venv torch-env
    torch-env/bin/pip install torch torch-pruning==1.6.1
    python -m benchmarks.coupling --torch-python torch-env/bin/python

Reads one request a line on stdin, ``{"net": "vit", "sizes": [12]}``, and answers with
one line of JSON on stdout: seconds of wall and processor time to build the dependency
graph, to set up the pruner and to remove half of all channels, ranked globally by the
L2 norm of their group. By hand::

    echo '{"net": "resnet50"}' | torch-env/bin/python -m benchmarks.torch_pruning_side
"""

import importlib.metadata
import json
import sys
import time
import warnings
from typing import Any

import torch
import torch_pruning as tp

from benchmarks.torch_nets import BUILDERS, Attention


def measure(net: str, sizes: list[int]) -> dict[str, Any]:
    """Builds a net and times one round of pruning."""
    torch.manual_seed(0)
    model, example = BUILDERS[net](*sizes)
    model.eval()
    before = sum(p.numel() for p in model.parameters())
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    heads = {
        projection: module.heads
        for module in model.modules()
        if isinstance(module, Attention)
        for projection in (module.query, module.key, module.value)
    }
    clocks = [_clocks()]
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=example)
    clocks.append(_clocks())
    del graph  # the pruner builds its own; this one shows what building costs
    pruner = tp.pruner.BasePruner(
        model,
        example,
        importance=importance,
        global_pruning=True,
        pruning_ratio=0.5,
        ignored_layers=[model.head],
        num_heads=heads,
    )
    clocks.append(_clocks())
    pruner.step()
    clocks.append(_clocks())
    after = sum(p.numel() for p in model.parameters())
    names = ("build", "init", "step")
    parts = {
        name: {"wall": stop[0] - start[0], "cpu": stop[1] - start[1]}
        for name, start, stop in zip(names, clocks, clocks[1:])  # noqa: B905
    }
    return {**parts, "parameters": before, "left": after, "runs": _runs(model, example)}


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _runs(model: torch.nn.Module, example: torch.Tensor) -> bool:
    """Does the pruned model still run?"""
    try:
        with torch.no_grad():
            model(example)
    except RuntimeError:
        return False
    return True


def main() -> None:
    """Answers requests until stdin ends."""
    warnings.simplefilter("ignore")
    names = ("torch", "torch-pruning")
    versions = {name: importlib.metadata.version(name) for name in names}
    print(json.dumps({"versions": versions}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer = measure(request["net"], request.get("sizes", []))
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
