"""Variables whose groups are written by hand: a chain of layers and a head split.

conv1 -> BatchNorm -> conv2 -> flatten over 2 x 2 positions -> dense -> projection of
2 heads x 3 dimensions on one axis. Nothing here runs `trace`.
"""

import jax
import numpy as np

from jaxprune.core._groups import Group, Groups, Member

SHAPES = {
    "batch_stats": {"bn": {"mean": (4,), "var": (4,)}},
    "params": {
        "bn": {"bias": (4,), "scale": (4,)},
        "conv1": {"kernel": (3, 3, 2, 4)},
        "conv2": {"kernel": (3, 3, 4, 6)},
        "dense": {"bias": (5,), "kernel": (24, 5)},
        "heads": {"kernel": (5, 6)},
    },
}

EACH = {n: np.arange(n)[:, None] for n in (2, 3, 4, 5, 6)}
# NHWC flatten of 2 x 2 x 6: channel c becomes rows c, c + 6, c + 12, c + 18.
FLATTEN = np.arange(24).reshape(4, 6).T
HEADS = np.arange(6).reshape(2, 3)


def _is_shape(node):
    return isinstance(node, tuple)


def variables(seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: rng.normal(size=shape).astype(np.float32),
        SHAPES,
        is_leaf=_is_shape,
    )


def groups():
    stats = [Member(f"batch_stats/bn/{s}", 0, EACH[4]) for s in ("mean", "var")]
    conv1 = (
        Member("params/conv1/kernel", 3, EACH[4]),
        *stats,
        Member("params/bn/scale", 0, EACH[4]),
        Member("params/bn/bias", 0, EACH[4]),
        Member("params/conv2/kernel", 2, EACH[4]),
    )
    conv2 = (
        Member("params/conv2/kernel", 3, EACH[6]),
        Member("params/dense/kernel", 0, FLATTEN),
    )
    dense = (
        Member("params/dense/kernel", 1, EACH[5]),
        Member("params/dense/bias", 0, EACH[5]),
        Member("params/heads/kernel", 0, EACH[5]),
    )
    found = {
        "conv1": Group("conv1", 4, conv1),
        "conv2": Group("conv2", 6, conv2),
        "dense": Group("dense", 5, dense),
        "head": Group("head", 2, (Member("params/heads/kernel", 1, HEADS),)),
        "head_dim": Group("head_dim", 3, (Member("params/heads/kernel", 1, HEADS.T),)),
    }
    leaves, treedef = jax.tree_util.tree_flatten_with_path(SHAPES, is_leaf=_is_shape)
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): shape
        for path, shape in leaves
    }
    return Groups(found, (), shapes, treedef)


def random_keep(seed=0):
    """Every group loses some units, none loses all."""
    rng = np.random.default_rng(seed)
    keep = {}
    for name, group in groups().items():
        keep[name] = np.ones(group.size, bool)
        keep[name][rng.permutation(group.size)[: group.size // 2]] = False
    return keep
