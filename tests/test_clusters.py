"""Clusters: as many as asked for, none empty, and where merging may use them."""

import dataclasses
import sys

import jax
import numpy as np
import pytest
from sklearn.cluster import KMeans
from zoo import MODELS, weights
from zoo.structures import STRUCTURES

import jaxprune
from jaxprune import clusters, select
from jaxprune.core._clusters import first_units

pytestmark = pytest.mark.once

X = np.random.default_rng(7).normal(size=(3, 4)).astype(np.float32)
WAYS = {
    "k_means": lambda groups, variables, **kw: clusters.k_means(
        groups, variables, **kw
    ),
    "even": lambda groups, variables, **kw: clusters.even(groups, **kw),
    "imbalanced": lambda groups, variables, **kw: clusters.imbalanced(groups, **kw),
}


def mlp(p, x):
    return jax.nn.relu(jax.nn.relu(x @ p["a"] + p["bias"][None]) @ p["b"]) @ p["c"]


@pytest.fixture(scope="module")
def net():
    variables = weights(a=(4, 10), bias=(10,), b=(10, 7), c=(7, 2))
    return jaxprune.trace(mlp, variables, X, roles=True), variables


@pytest.fixture(scope="module")
def zoo():
    nets = []
    for built in (
        MODELS["resnet_projection"].build(),
        MODELS["vit"].build(),
        STRUCTURES["swiglu_fused"].build(),
    ):
        args = built.inputs(2, 0)
        groups = jaxprune.trace(built.apply_fn, built.variables, *args, roles=True)
        nets.append((groups, built.variables))
    return nets


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sparsity", [0.0, 0.375, 1.0])
def test_as_many_as_a_selection_would_keep(way, sparsity, zoo):
    for groups, variables in zoo:
        found = WAYS[way](groups, variables, sparsity=sparsity)
        mergeable = {name: g for name, g in groups.items() if not g.obstacle}
        assert list(found) == list(mergeable)
        zeros = {name: np.zeros(g.size) for name, g in groups.items()}
        kept = select.per_group(groups, zeros, sparsity=sparsity)
        for name, ids in found.items():
            assert (ids.dtype, ids.shape) == (np.int32, (groups[name].size,))
            # No number is left out, and they are in the order of first units.
            used, first = np.unique(ids, return_index=True)
            np.testing.assert_array_equal(used, np.arange(kept[name].sum()))
            assert (np.diff(first) > 0).all()
        jaxprune.merge(variables, groups, found)


def test_k_means_is_that_of_sklearn_on_all_kernels_of_a_unit(zoo):
    groups, variables = zoo[0]  # residual: several kernels write one stream
    name, group = max(groups.items(), key=lambda item: len(item[1].members))
    leaves = jaxprune.core.named_leaves(variables)
    rows = np.concatenate(
        [
            np.moveaxis(leaves[m.path], m.axis, 0).reshape(group.size, -1)
            for m in group.members
            if m.role == "producer" and leaves[m.path].ndim > 1
        ],
        axis=1,
    )
    kernels = [m for m in group.members if m.role == "producer" and "kernel" in m.path]
    assert len(kernels) >= 2
    ids = clusters.k_means(groups, variables, sparsity={name: 0.5}, seed=3)[name]
    count = group.size - round(group.size / 2)
    expected = KMeans(count, n_init=10, random_state=3).fit_predict(rows)
    np.testing.assert_array_equal(first_units(ids), first_units(expected))


def test_k_means_finds_what_is_alike(net):
    groups, variables = net
    a = variables["a"].copy()
    a[:, [0, 4, 9]], a[:, [1, 2]] = a[:, :1], a[:, 5:6]
    found = clusters.k_means(groups, {**variables, "a": a}, sparsity={"a:1": 0.4})
    first = first_units(found["a:1"])
    assert first[0] == first[4] == first[9] == 0
    assert first[1] == first[2] == first[5] == 1


def test_no_cluster_is_empty_though_all_units_are_equal(net):
    groups, variables = net
    same = {**variables, "a": np.ones((4, 10), np.float32)}
    ids = clusters.k_means(groups, same, sparsity=0.4, only="a:1")["a:1"]
    np.testing.assert_array_equal(np.unique(ids), np.arange(6))


def test_by_hand(net):
    groups, _ = net
    (ids,) = clusters.even(groups, sparsity={"a:1": 0.7}).values()
    np.testing.assert_array_equal(ids, [0, 0, 0, 0, 1, 1, 1, 2, 2, 2])
    (ids,) = clusters.imbalanced(groups, sparsity={"a:1": 0.7}).values()
    np.testing.assert_array_equal(ids, [0, 0, 0, 0, 0, 0, 0, 0, 1, 2])
    found = clusters.even(groups, sparsity=0.5, multiple_of=4)
    assert {name: ids.max() + 1 for name, ids in found.items()} == {"a:1": 4, "b:1": 4}


def test_balanced_groups_have_clusters_in_every_block(net):
    groups, variables = net
    blocks = dataclasses.replace(groups["a:1"], blocks=2)
    balanced = dataclasses.replace(groups, by_name={"a:1": blocks})
    for way in WAYS.values():
        (ids,) = way(balanced, variables, sparsity=0.4).values()
        parts = [set(part) for part in ids.reshape(2, -1)]
        assert not parts[0] & parts[1]
        assert [len(part) for part in parts] == [3, 3]


def test_errors(net, monkeypatch):
    groups, variables = net
    with pytest.raises(ValueError, match="'q:1' matches none of the 2 groups"):
        clusters.even(groups, sparsity=0.5, only="q:1")
    with pytest.raises(ValueError, match=r"must be a fraction in \[0, 1\], got 1.5"):
        clusters.even(groups, sparsity=1.5)
    untold = jaxprune.trace(mlp, variables, X)
    for options in ({"sparsity": 0.5}, {"sparsity": {"a:1": 0.5}}):
        with pytest.raises(ValueError, match="cannot be merged: traced without roles"):
            clusters.even(untold, **options)
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ImportError, match=r"pip install jaxprune\[experiments\]"):
        clusters.k_means(groups, variables, sparsity=0.5)
