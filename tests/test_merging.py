"""Merging is lossless where it is allowed, and refused where it would not be.

The roles are proven by what they promise: make the producers of a group equal within
random clusters, merge, and the outputs are the same. The nets are those of the zoo.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import quick_jit
from zoo import MODELS, weights
from zoo.structures import STRUCTURES

import jaxprune
from jaxprune.core._clusters import first_units
from jaxprune.core._leaves import named_leaves

pytestmark = pytest.mark.once

X = np.random.default_rng(7).normal(size=(3, 4)).astype(np.float32)


def random_clusters(groups, seed=0):
    """Half as many clusters as units, for every group that can be merged."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.integers((group.size + 1) // 2, size=group.size)
        for name, group in groups.items()
        if not group.obstacle
    }


def made_equal(variables, groups, clusters, role="producer"):
    """Every unit is overwritten by the first of its cluster, position by position."""
    leaves = {path: np.array(leaf) for path, leaf in named_leaves(variables).items()}
    for name, ids in clusters.items():
        for member in groups[name].members:
            if member.role != role:
                continue
            line = np.moveaxis(leaves[member.path], member.axis, 0)
            for unit, first in enumerate(first_units(ids)):
                line[member.index[unit]] = line[member.index[first]].copy()
    return jax.tree.structure(variables).unflatten(leaves.values())


def loss_of_merging(apply_fn, variables, groups, clusters, args):
    """Largest difference of any output after merging, and the merged model."""
    merged = jaxprune.merge(variables, groups, clusters)
    whole = jax.tree.leaves(quick_jit(apply_fn)(variables, *args))
    narrowed = quick_jit(jaxprune.narrow(apply_fn, merged.masks))
    small = jax.tree.leaves(narrowed(merged.variables, *args))
    pairs = [(a, b) for a, b in zip(whole, small, strict=True) if a.shape == b.shape]
    assert pairs and max(float(np.abs(a).max()) for a, _ in pairs) > 1e-3
    return max(float(np.abs(a - b).max()) for a, b in pairs), merged


# name -> groups that can be merged, groups that cannot
LOSSLESS = {
    "resnet_projection": (4, 0),
    "resnet_identity": (1, 0),
    "densenet": (8, 0),
    "depthwise": (2, 0),
    "depthwise_multiplier": (3, 0),
    "grouped_convolution": (3, 0),
    "flatten_nhwc": (2, 0),
    "flatten_nchw": (2, 0),
    "squeeze_excite": (2, 0),
    "chain_train_batchnorm": (3, 0),
    "group_norm": (1, 1),  # whole groups of channels; not channels within a group
    "vit": (4, 1),  # all but the normalised stream
    "decoder_grouped": (4, 2),
    "haiku": (2, 0),
    "gru": (3, 0),
    "stacked_layers": (1, 1),
    "cond": (3, 0),
    "maxout": (1, 1),  # units; not whole pieces, of which removed ones count as 0
}
STRUCTURE = {
    "channel_tile": (1, 0),
    "concat_relu_of_both_signs": (1, 0),
    "swiglu_fused": (1, 0),
    "low_rank_update": (2, 0),
}


@pytest.mark.parametrize("name", [*LOSSLESS, *STRUCTURE])
def test_merging_equal_units_changes_nothing(name):
    model = MODELS[name] if name in LOSSLESS else STRUCTURES[name]
    built = model.build()
    args = built.inputs(2, 0)
    groups = jaxprune.trace(built.apply_fn, built.variables, *args, roles=True)
    clusters = random_clusters(groups)
    expected = LOSSLESS.get(name) or STRUCTURE[name]
    assert (len(clusters), len(groups) - len(clusters)) == expected
    variables = made_equal(built.variables, groups, clusters)
    off, merged = loss_of_merging(built.apply_fn, variables, groups, clusters, args)
    assert off < 1e-5
    assert max(map(float, merged.deviation.values())) < 1e-9
    sizes = [len(np.unique(ids)) for ids in clusters.values()]
    assert sizes < [groups[name].size for name in clusters]
    expected = jaxprune.slice_params(variables, merged.masks)
    assert jax.tree.map(np.shape, merged.variables) == jax.tree.map(np.shape, expected)


def test_consumers_may_be_anything():
    built = MODELS["flatten_nhwc"].build()
    args = built.inputs(2, 0)
    groups = jaxprune.trace(built.apply_fn, built.variables, *args, roles=True)
    roles = {(m.path, m.role) for g in groups.values() for m in g.members}
    assert {role for _, role in roles} == {"producer", "consumer"}
    clusters = random_clusters(groups)
    variables = made_equal(built.variables, groups, clusters, role="consumer")
    off, merged = loss_of_merging(built.apply_fn, variables, groups, clusters, args)
    assert off > 1e-3
    error = jaxprune.merge_error(built.apply_fn, variables, merged, *args)
    assert error.absolute == pytest.approx(off, rel=1e-4)
    assert error.relative > 0


# A function of (params, x), what its group is called and why it cannot be merged. In
# each, merging equal units would change the result: checked by merging all the same.
def mean_over_units(p, x):
    h = jax.nn.relu(x @ p["a"])
    return (h - h.mean(-1, keepdims=True)) @ p["b"]


def softmax_over_units(p, x):
    return jax.nn.softmax(x @ p["a"]) @ p["b"]


def largest_of_units(p, x):
    """Equal units have the largest of them, but a removed one counts as a 0."""
    h = -jnp.square(x @ p["a"])
    return jnp.exp(h - h.max(-1, keepdims=True)) @ p["b"]


def product_over_units(p, x):
    return (1.0 + x @ p["a"]).prod(-1, keepdims=True) * x


def square_of_consumers(p, x):
    return jax.nn.relu(x @ p["a"]) @ p["b"] ** 2


def shifted_consumers(p, x):
    return jax.nn.relu(x @ p["a"]) @ (p["b"] + 1.0)


def tied(p, x):
    return jax.nn.relu(x @ p["a"]) @ p["a"].T


def other_functions_of_other_units(p, x):
    h = x @ p["a"]
    up, odd = jax.nn.relu(h), jnp.tanh(h)
    mixed = [up[:, :1], odd[:, :1], odd[:, 1:2], up[:, 1:2]]
    return jnp.concatenate([*mixed, up[:, 2:], odd[:, 2:]], -1) @ p["c"]


REFUSED = {
    mean_over_units: "a sum over the group counts",
    softmax_over_units: "a sum over the group counts",
    largest_of_units: "a reduction over the group counts values at removed",
    product_over_units: "a reduction over the group counts",
    square_of_consumers: "a sum over the group counts",
    shifted_consumers: "a sum over the group counts",
    tied: "a consumer passes through a nonlinear operation",
    other_functions_of_other_units: "units occupy different numbers of positions",
}


@pytest.mark.parametrize("fn", REFUSED, ids=lambda fn: fn.__name__)
def test_what_would_lose_something_is_refused(fn):
    variables = weights(a=(4, 6), b=(6, 2), c=(12, 2))
    groups = jaxprune.trace(fn, variables, X, roles=True)
    assert REFUSED[fn] in str(groups["a:1"].obstacle)
    clusters = {"a:1": np.array([0, 0, 1, 1, 2, 2])}
    with pytest.raises(ValueError, match="units of a:1 cannot be merged: "):
        jaxprune.merge(variables, groups, clusters)
    roles = {
        m: "producer" if m.path == "a" else "consumer" for m in groups["a:1"].members
    }
    forced = forced_groups(groups, roles)
    variables = made_equal(variables, forced, clusters)
    off, _ = loss_of_merging(fn, variables, forced, clusters, (X,))
    assert off > 1e-4  # rounding is below 1e-6


def forced_groups(groups, roles):
    group = groups["a:1"]
    members = tuple(dataclasses.replace(m, role=roles[m]) for m in group.members)
    group = dataclasses.replace(group, members=members, obstacle="")
    return dataclasses.replace(groups, by_name={"a:1": group})


def test_dropout_makes_units_unequal():
    def net(p, x, key):
        h = jax.nn.relu(x @ p["a"])
        return jnp.where(jax.random.bernoulli(key, 0.5, h.shape), h, 0.0) @ p["b"]

    variables = weights(a=(4, 6), b=(6, 2))
    groups = jaxprune.trace(net, variables, X, jax.random.key(0), roles=True)
    assert "units may be pruned but not permuted" in str(groups["a:1"].obstacle)


def test_roles_are_found_only_when_asked():
    def net(p, x):
        return jax.nn.relu(x @ p["a"]) @ p["b"]

    groups = jaxprune.trace(net, weights(a=(4, 6), b=(6, 2)), X)
    assert [m.role for m in groups["a:1"].members] == ["", ""]
    with pytest.raises(ValueError, match="traced without roles=True"):
        jaxprune.merge(weights(a=(4, 6), b=(6, 2)), groups, {"a:1": np.arange(6)})


def test_a_primitive_of_others_is_refused_until_it_is_understood(monkeypatch):
    from jax.extend.core import Primitive
    from jax.interpreters import mlir

    from jaxprune.coupling._registry import RULES, register_label
    from jaxprune.coupling.rules._elementwise import elementwise as label
    from jaxprune.program.primitives import DECLARATIONS, elementwise

    bend = Primitive("bend_for_merging")
    bend.def_abstract_eval(lambda x: x)
    bend.def_impl(lambda x: x)
    mlir.register_lowering(bend, lambda ctx, x: [x])

    def trace():
        net = lambda p, x: bend.bind(x @ p["a"]) @ p["b"]  # noqa: E731
        return jaxprune.trace(net, weights(a=(4, 6), b=(6, 2)), X, roles=True)["a:1"]

    monkeypatch.setitem(RULES, "bend_for_merging", None)  # undone after the test
    register_label(label("first"), "bend_for_merging")
    assert "the effect of bend_for_merging on equal" in str(trace().obstacle)
    monkeypatch.setitem(DECLARATIONS, "bend_for_merging", None)
    jaxprune.register_rule(bend, elementwise("first"))
    assert not trace().obstacle


def test_units_are_merged_through_what_scales_rows_of_the_batch():
    def net(p, x):
        h = jax.nn.relu(x @ p["a"]).at[0].multiply(0.5).at[1].max(0.1)
        return jax.lax.optimization_barrier(h) @ p["b"]

    groups = jaxprune.trace(net, weights(a=(4, 6), b=(6, 2)), X, roles=True)
    assert not groups["a:1"].obstacle
    assert [m.role for m in groups["a:1"].members] == ["producer", "consumer"]


def test_a_linear_chain_needs_a_choice_and_gets_one():
    def net(p, x):
        return (x @ p["a"]) @ p["b"]

    groups = jaxprune.trace(net, weights(a=(4, 6), b=(6, 2)), X, roles=True)
    assert [m.role for m in groups["a:1"].members] == ["producer", "consumer"]


def test_a_sum_instead_of_a_product_is_a_consumer_too():
    def net(p, x):
        return (jax.nn.relu(x @ p["a"]) * p["w"][None]).sum(-1)

    variables = weights(a=(4, 6), w=(6,))
    groups = jaxprune.trace(net, variables, X, roles=True)
    assert {m.path: m.role for m in groups["a:1"].members} == {
        "a": "producer",
        "w": "consumer",
    }
    clusters = {"a:1": np.array([0, 1, 0, 1, 1, 2])}
    variables = made_equal(variables, groups, clusters)
    assert loss_of_merging(net, variables, groups, clusters, (X,))[0] < 1e-5


def test_merge_by_hand():
    def net(p, x):
        return jax.nn.relu(x @ p["a"]) @ p["b"]

    variables = weights(a=(4, 4), b=(4, 2))
    groups = jaxprune.trace(net, variables, X, roles=True)
    merged = jaxprune.merge(variables, groups, {"a:1": np.array([5, 2, 5, 5])})
    b = variables["b"]
    np.testing.assert_array_equal(merged.variables["a"], variables["a"][:, :2])
    np.testing.assert_allclose(merged.variables["b"], [b[0] + b[2] + b[3], b[1]])
    rows = variables["a"].T[[0, 2, 3]].astype(np.float64)
    expected = ((rows - rows.mean(0)) ** 2).sum()
    assert float(merged.deviation["a:1"]) == pytest.approx(expected, rel=1e-5)
    jitted = jax.jit(
        functools.partial(
            jaxprune.deviation, groups=groups, clusters={"a:1": np.array([5, 2, 5, 5])}
        )
    )
    assert float(jitted(variables)["a:1"]) == pytest.approx(expected, rel=1e-5)
    assert jax.tree.all(
        jax.tree.map(
            lambda a, b: np.array_equal(a, b),
            jaxprune.merge(variables, groups, {"a:1": np.arange(4)}).variables,
            variables,
        )
    )


def test_a_merged_model_keeps_training_with_its_momentum():
    def net(p, x):
        return jax.nn.relu(x @ p["a"]) @ p["b"]

    variables = jax.tree.map(jnp.asarray, weights(a=(4, 4), b=(4, 2)))
    groups = jaxprune.trace(net, variables, X, roles=True)
    clusters = {"a:1": np.array([0, 1, 0, 1])}
    merged = jaxprune.merge(variables, groups, clusters)
    tx = optax.sgd(0.1, momentum=0.9)
    state = jaxprune.slice_opt_state(tx, tx.init(variables), merged.masks)
    grads = jax.grad(lambda v: (jaxprune.narrow(net, merged.masks)(v, X) ** 2).sum())(
        merged.variables
    )
    updates, _ = tx.update(grads, state, merged.variables)
    assert optax.apply_updates(merged.variables, updates)["b"].shape == (2, 2)


def test_errors():
    def net(p, x):
        return jax.nn.relu(x @ p["a"]) @ p["b"]

    variables = weights(a=(4, 6), b=(6, 2))
    groups = jaxprune.trace(net, variables, X, roles=True)
    with pytest.raises(ValueError, match=r"group 'a:0'.*did you mean a:1"):
        jaxprune.merge(variables, groups, {"a:0": np.arange(6)})
    with pytest.raises(ValueError, match=r"clusters\[a:1\] has shape \(5,\).* 6 units"):
        jaxprune.merge(variables, groups, {"a:1": np.arange(5)})
    with pytest.raises(TypeError, match="must be integers, got float64"):
        jaxprune.merge(variables, groups, {"a:1": np.arange(6.0)})
    whole = {**variables, "b": np.ones((6, 2), np.int8)}
    with pytest.raises(TypeError, match="b has dtype int8.*before quantising"):
        jaxprune.merge(whole, groups, {"a:1": np.arange(6)})
