"""Peak memory on the host of scoring and slicing, in bytes of the parameters.

    python -m benchmarks.memory

Every way runs in a process of its own; what is told is the peak over that before the
call, plus the parameters themselves. The slices that are returned count.
"""

import resource
import subprocess
import sys

import jax
import numpy as np

import jaxprune

LAYERS, WIDTH = 8, 2048
WAYS = (
    "group_scores(scores.l2(params))",
    "group_scores(params)",
    "slice_params",
    "prune",
)


def net(params, x):
    for k in range(LAYERS):
        x = x + jax.nn.relu(x @ params[f"up{k}"]) @ params[f"down{k}"]
    return x


def main():
    for dtype in ("float32", "bfloat16"):
        for way in WAYS:
            words = [sys.executable, "-m", "benchmarks.memory", dtype, way]
            subprocess.run(words, check=True)


def measure(dtype, way):
    dtype = np.dtype(dtype)
    sizes = {"up": (WIDTH, 2 * WIDTH), "down": (2 * WIDTH, WIDTH)}
    shapes = {
        f"{kind}{k}": jax.ShapeDtypeStruct(size, dtype)
        for kind, size in sizes.items()
        for k in range(LAYERS)
    }
    x = jax.ShapeDtypeStruct((2, WIDTH), dtype)
    groups = jaxprune.trace(net, shapes, x)
    keep = {name: np.arange(group.size) % 2 == 0 for name, group in groups.items()}
    masks = jaxprune.expand_masks(groups, keep)
    params = {path: np.full(leaf.shape, 0.5, dtype) for path, leaf in shapes.items()}
    before = peak()
    if way == "slice_params":
        kept = jaxprune.slice_params(params, masks)
    elif way == "prune":
        kept = jaxprune.prune(net, params, x, sparsity=0.5).variables
    elif way == "group_scores(params)":
        kept = jaxprune.group_scores(groups, params, reduce="l2")
    else:
        kept = jaxprune.group_scores(groups, jaxprune.scores.l2(params))
    held = sum(leaf.nbytes for leaf in params.values())
    assert kept
    print(f"{dtype.name:10} {way:34} {1 + (peak() - before) / held:.2f}")


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    measure(*sys.argv[1:]) if sys.argv[1:] else main()
