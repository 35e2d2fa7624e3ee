"""Exact selection against a stable sort, ties and all, on one device and on eight."""

import functools
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.thresholds import keep_in_groups, keep_largest, kept_count, kth_largest
from tests.contract import quick_jit

RNG = np.random.default_rng(0)
SHAPES = [(7, 9), (1, 1), (40,), (3, 3, 2, 4)]
VALUES = {
    "normal": lambda shape: RNG.normal(size=shape),
    "ties": lambda shape: RNG.integers(-2, 3, shape),
    "equal": lambda shape: np.ones(shape),
    "zeros of both signs": lambda shape: RNG.choice([0.0, -0.0], shape),
    "extremes": lambda shape: RNG.choice(
        [np.inf, -np.inf, 1e-40, -1e-40, 3.4e38, 0.0, 1.0], shape
    ),
}
keep = quick_jit(keep_largest)


def sorted_mask(flat, kept, among=None):
    """The first `kept` of a stable descending sort; what may not stay comes last."""
    candidates = np.flatnonzero(np.ones(flat.size, bool) if among is None else among)
    order = candidates[np.argsort(-flat[candidates], kind="stable")]
    mask = np.zeros(flat.size, bool)
    mask[order[:kept]] = True
    return mask


def flatten(tree):
    return np.concatenate([np.ravel(leaf) for leaf in tree])


def counts(total):
    return sorted({0, 1, total // 3, total - 1, total})


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, np.float32) for kind in VALUES]
    + [("ties", jnp.bfloat16), ("normal", np.float16)],
)
def test_together_and_alone(kind, dtype):
    tree = [VALUES[kind](shape).astype(dtype) for shape in SHAPES]
    wide = [leaf.astype(np.float32) for leaf in tree]
    for kept in counts(flatten(tree).size):
        expected = sorted_mask(flatten(wide), kept)
        np.testing.assert_array_equal(flatten(keep(tree, np.int32(kept))), expected)
    for share in (0.0, 0.4, 1.0):
        each = [np.int32(share * leaf.size) for leaf in tree]
        for leaf, mask, kept in zip(wide, keep(tree, each), each, strict=True):
            np.testing.assert_array_equal(
                np.ravel(mask), sorted_mask(leaf.ravel(), kept)
            )


def test_among():
    tree = [RNG.integers(-2, 3, shape).astype(np.float32) for shape in SHAPES]
    among = [RNG.random(shape) < 0.5 for shape in SHAPES]
    keep_among = quick_jit(keep_largest)
    for kept in [*counts(flatten(among).sum()), flatten(tree).size]:
        expected = sorted_mask(flatten(tree), kept, flatten(among))
        got = flatten(keep_among(tree, np.int32(kept), among))
        np.testing.assert_array_equal(got, expected)


def test_nan_goes_first():
    scores = [jnp.array([jnp.nan, -jnp.inf, 1.0, -jnp.nan])]
    for kept, expected in ((1, [2]), (2, [1, 2]), (3, [0, 1, 2])):
        np.testing.assert_array_equal(np.flatnonzero(keep(scores, kept)[0]), expected)


def test_kth_largest_is_an_element():
    tree = [RNG.normal(size=shape).astype(np.float32) for shape in SHAPES]
    kth = quick_jit(kth_largest)
    descending = np.sort(flatten(tree))[::-1]
    for k in (1, 2, 60, descending.size):
        assert kth(tree, np.int32(k)) == descending[k - 1]


def test_a_tree_without_leaves():
    assert keep_largest({}, 0) == {}


@pytest.mark.parametrize("shape", [(8,), (4, 12), (12, 4), (2, 10, 3)])
@pytest.mark.parametrize("axis", [0, -1])
def test_groups(shape, axis):
    for scores in (RNG.normal(size=shape), RNG.integers(0, 2, shape)):
        scores = scores.astype(np.float32)
        for kept in (0, 1, 2, 4):
            mask = keep_in_groups(jnp.asarray(scores), kept, size=4, axis=axis)
            rows = np.moveaxis(scores, axis, -1).reshape(-1, shape[axis])
            expected = [
                np.concatenate(
                    [sorted_mask(row[i : i + 4], kept) for i in range(0, row.size, 4)]
                )
                for row in rows
            ]
            got = np.moveaxis(np.asarray(mask), axis, -1).reshape(-1, shape[axis])
            np.testing.assert_array_equal(got, expected)


def test_kept_count():
    assert [kept_count(10, s) for s in (0.0, 0.25, 0.35, 0.99, 1.0)] == [10, 8, 6, 1, 1]
    assert kept_count(100_000_000, 0.9) == 10_000_000
    traced = quick_jit(functools.partial(kept_count, 10))
    for sparsity in (0.0, 0.25, 0.35, 0.99, 1.0):
        assert traced(sparsity) == kept_count(10, sparsity)


def test_wrong_trees_and_dtypes():
    with pytest.raises(ValueError, match="kept must be a tree like scores"):
        keep_largest([jnp.ones(3), jnp.ones(2)], [1])
    with pytest.raises(ValueError, match="among must be a tree like scores"):
        keep_largest({"a": jnp.ones(3)}, 1, {"b": jnp.ones(3, bool)})
    with pytest.raises(TypeError, match=r"got int32 of shape \(3,\)"):
        keep_largest({"a": jnp.ones(3, jnp.int32)}, 1)


SHARDED = r"""
import re, jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxprune.packing import pack_masks
from jaxprune.thresholds import keep_largest
from tests.contract import quick_jit
mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
rng = np.random.default_rng(0)
scores = [rng.integers(0, 50, (64, 32)).astype("f"), rng.normal(size=(8, 64)).astype("f")]
def select(scores):
    masks = keep_largest(scores, 1000)
    return masks, pack_masks(masks, scores)
expected, _ = quick_jit(select)(scores)
shardings = [NamedSharding(mesh, P("data", "model")), NamedSharding(mesh, P(None, "data"))]
sharded = jax.device_put(scores, shardings)
compiled = quick_jit(select).lower(sharded).compile()
gathered = re.findall(r"= [a-z0-9]+\[([0-9,]*)\][^=]*all-gather\(", compiled.as_text())
assert all(np.prod([int(n) for n in s.split(",") if n]) <= 64 for s in gathered), gathered
masks, packed = compiled(sharded)
for got, mask in zip(masks, expected, strict=True):
    np.testing.assert_array_equal(got, mask)
assert not any(leaf.is_fully_replicated for leaf in jax.tree.leaves([masks, packed]))
"""


def test_sharded_scores_are_not_gathered():
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4"
    env = os.environ | {"XLA_FLAGS": flags}
    subprocess.run([sys.executable, "-c", SHARDED], check=True, env=env)
