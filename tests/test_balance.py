"""Balanced cuts: every block loses as many units as the others, but its own."""

import dataclasses
import re

import flax.linen as nn
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import (
    TOLERANCE,
    assert_same,
    count,
    difference,
    mapped,
    quick_jit,
    stack,
    unstack,
)
from hypothesis import given, settings
from jax import lax
from zoo import MODELS, linen, normal, weights
from zoo.composed import MOVES, compose

import jaxprune
from jaxprune.core._groups import Member

X = np.random.default_rng(3).normal(size=(2, 5, 6)).astype(np.float32)


def attention(p, x, mix=lambda v: v, bias=0.0):
    """Three heads, kernels with the heads and their features on one axis."""
    batch, time, _ = x.shape
    q, k = ((x @ p[name]).reshape(batch, time, 3, 4) for name in ("q", "k"))
    v = (x @ p["v"] + p["vb"][None, None]).reshape(batch, time, 3, 5) + bias
    probabilities = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k), axis=-1)
    mixed = jnp.einsum("bhts,bshd->bthd", probabilities, mix(v))
    return mixed.reshape(batch, time, 15) @ p["out"]


ATTENTION = {"q": (6, 12), "k": (6, 12), "v": (6, 15), "vb": (15,), "out": (15, 4)}


class GroupedNet(nn.Module):
    """Two grouped convolutions with a normalisation by groups in between."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (1, 1), name="before")(x))
        x = nn.Conv(12, (3, 3), feature_group_count=4, name="grouped")(x)
        x = nn.BatchNorm(use_running_average=True, name="norm")(x)
        x = nn.relu(nn.Conv(8, (1, 1), name="between")(x))
        x = nn.relu(nn.GroupNorm(num_groups=2, name="groups")(x))
        return nn.Dense(3, name="head")(x.reshape(x.shape[0], -1))


def stacked(p, x):
    """A layer of attention under scan."""

    def layer(x, p):
        return x + attention(p, x), None

    return lax.scan(layer, x, p)[0]


def by_hand(name):
    """``(function, variables, inputs)`` of a net of this file or of the zoo."""
    if name in MODELS:
        built = MODELS[name].build()
        return built.apply_fn, built.variables, built.inputs
    if name == "attention":
        return attention, weights(**ATTENTION), normal(5, 6)
    if name == "stacked":
        shapes = {**ATTENTION, "out": (15, 6)}
        return stacked, weights(**{n: (2, *s) for n, s in shapes.items()}), normal(5, 6)
    return linen(GroupedNet(), normal(4, 4, 3))


# What is expected: group -> (blocks, units of each).
BALANCED = {
    "attention": {"q:1": (1, 3), "q:1#2": (3, 4), "v:1": (3, 5)},
    "stacked": {"q:2": (1, 3), "q:2#2": (3, 4), "v:2": (3, 5)},
    "grouped": {
        # An input of every group is one slice of the kernel; an output is a filter.
        "params/before/kernel:3": (1, 2),
        "params/before/kernel:3#2": (1, 4),
        "params/grouped/kernel:3": (4, 3),
        "params/between/kernel:3": (1, 2),
        "params/between/kernel:3#2": (2, 4),
    },
    "decoder_repeated": {
        "embedding:1": (1, 6),
        "query:1": (1, 2),
        "query:1#2": (2, 2),  # queries, of every key head its own
        "query:1#3": (1, 2),  # rotated by one table for all heads
        "value:1": (2, 4),
        "glu:1": (1, 7),
    },
    "fused_qkv_heads_first": {"qkv:1": (1, 2), "qkv:1#2": (2, 3), "qkv:1#3": (2, 3)},
    "equinox": {
        "conv/weight:0": (3, 2),
        "conv/weight:0#2": (1, 3),
        "mlp/layers/0/weight:0": (1, 7),
        "mlp/layers/1/weight:0": (1, 7),
    },
}


def random_cut(groups, seed):
    """Every block of every exact group keeps a number of units at random places."""
    rng = np.random.default_rng(seed)
    keep = {}
    for name, group in groups.items():
        each = group.size // group.blocks
        gone = rng.integers(1, max(each, 2))
        blocks = [rng.permutation(each) >= gone for _ in range(group.blocks)]
        if group.exact and each > 1 and (group.blocks > 1 or seed):
            keep[name] = np.concatenate(blocks)
    return keep


def both(fn, variables, masks, *args, jit=quick_jit):
    """What the narrowed and what the masked function return."""
    small = jaxprune.slice_params(variables, masks)
    got = jit(jaxprune.narrow(fn, masks))(small, *args)
    return got, jit(fn)(jaxprune.apply_masks(variables, masks), *args)


@pytest.mark.parametrize("name", BALANCED)
def test_blocks_lose_units_of_their_own(name):
    """At the batch size of the trace; then at another, under vmap."""
    fn, variables, inputs = by_hand(name)
    groups = jaxprune.trace(fn, variables, *inputs(2, 0), balanced=["*"])
    found = {n: (g.blocks, g.size // g.blocks) for n, g in groups.items()}
    assert found == BALANCED[name]
    masks = jaxprune.expand_masks(groups, random_cut(groups, 0))
    assert_same(*both(fn, variables, masks, *inputs(2, 0)))
    masks = jaxprune.expand_masks(groups, random_cut(groups, 1))
    args = stack(inputs(3, 1), inputs(3, 2))
    small_fn, small = (
        jaxprune.narrow(fn, masks),
        jaxprune.slice_params(variables, masks),
    )
    got = quick_jit(mapped(small_fn))(small, *args)
    expected = quick_jit(mapped(fn))(jaxprune.apply_masks(variables, masks), *args)
    for k in range(2):
        assert_same(unstack(got, k), unstack(expected, k))


def test_the_positions_of_a_block():
    groups = jaxprune.trace(attention, weights(**ATTENTION), X, balanced=["v*"])
    assert [g.blocks for g in groups.values()] == [1, 1, 3]
    members = {f"{m.path}:{m.axis}": m.index for m in groups["v:1"].members}
    assert set(members) == {"v:1", "vb:0", "out:0"}
    for index in members.values():
        np.testing.assert_array_equal(index, np.arange(15)[:, None])


def test_gradients_and_a_second_round():
    params = weights(**ATTENTION)
    groups = jaxprune.trace(attention, params, X, balanced=["*"])
    masks = jaxprune.expand_masks(groups, random_cut(groups, 1))
    small, masked = (
        jaxprune.slice_params(params, masks),
        (jaxprune.apply_masks(params, masks)),
    )
    narrowed = jaxprune.narrow(attention, masks)

    def slope(fn):
        return quick_jit(jax.grad(lambda p: jnp.sin(fn(p, X)).sum()))

    full = slope(attention)(masked)
    assert_same(slope(narrowed)(small), jaxprune.slice_params(full, masks))
    again = jaxprune.trace(narrowed, small, X, balanced=["v:1"])
    assert again["v:1"].blocks == BALANCED["attention"]["q:1"][1] - 1
    masks = jaxprune.expand_masks(again, random_cut(again, 0))
    assert_same(*both(narrowed, small, masks, X))


def test_rows_that_meet_lose_the_same_units():
    def pairs(v):  # the first two heads read each other, the third is alone
        one = v[:, :, :2].sum(2, keepdims=True)
        return jnp.concatenate([v[:, :, :2] + one, v[:, :, 2:]], axis=2)

    def fn(p, x):
        v = (x @ p["v"]).reshape(2, 5, 4, 3)
        left, right = v[:, :, :2], v[:, :, 2:]
        v = jnp.stack([left.sum(2), right.sum(2)], axis=2)
        return jnp.tanh(v).reshape(2, 5, 6) @ p["out"]

    params = weights(v=(6, 12), out=(6, 4))
    groups = jaxprune.trace(fn, params, X, balanced=["v:1"])
    assert {n: (g.blocks, g.size) for n, g in groups.items()} == {
        "v:1": (2, 6),
        "v:1#2": (1, 4),
    }
    masks = jaxprune.expand_masks(groups, {"v:1": np.array([1, 1, 0, 0, 1, 1], bool)})
    assert_same(*both(fn, params, masks, X))
    params = weights(**ATTENTION)
    mixed = lambda p, x: attention(p, x, pairs)  # noqa: E731
    with pytest.raises(ValueError, match="different numbers of positions on some axis"):
        jaxprune.trace(mixed, params, X, balanced=["v:1"])
    # Two blocks, of two heads and of one: alike in each, and narrow knows it.
    first, last = np.array([1, 0, 1, 1, 0], bool), np.array([0, 1, 1, 0, 1], bool)
    keep = np.concatenate([first, first, last])
    masks = {**jax.tree.map(lambda _: np.array(True), params)}
    masks |= {"v": keep[None], "vb": keep, "out": keep[:, None]}
    assert_same(*both(mixed, params, masks, X))
    keep = np.concatenate([first, last, last])
    masks |= {"v": keep[None], "vb": keep, "out": keep[:, None]}
    with pytest.raises(ValueError, match="do not form a product"):
        both(mixed, params, masks, X)


def with_bias(p, x):
    return attention(p, x, bias=p["shared"][None, None, None])


def with_talking_heads(p, x):
    return attention(p, x, lambda v: jnp.einsum("bshd,hg->bsgd", v, p["talk"]))


def with_a_table(p, x):
    return attention(p, x, lambda v: v * jnp.cos(jnp.arange(5.0))[None, None, None])


def with_sorted_heads(p, x):
    return attention(p, x, lambda v: lax.sort(v, dimension=2))


@pytest.mark.parametrize(
    ("fn", "more", "name", "why"),
    [
        (with_bias, {"shared": (5,)}, "shared:0", "its blocks are computed together"),
        (
            with_talking_heads,
            {"talk": (3, 3)},
            "v:1#2",
            "its blocks are computed together",
        ),
        (with_a_table, {}, "v:1", "may be pruned but not permuted"),
        (with_sorted_heads, {}, "v:1", "its blocks are computed together"),
    ],
)
def test_where_blocks_are_not_independent(fn, more, name, why):
    params = weights(**ATTENTION, **more)
    with pytest.raises(ValueError, match=rf"no group with blocks .* {name}: .*{why}"):
        jaxprune.trace(fn, params, X, balanced=[name])
    assert jaxprune.trace(fn, params, X)[name].size == 5
    # The masks of the same net without what mixes its heads.
    free = jaxprune.trace(attention, params, X, balanced=["v:1"])
    keep = np.concatenate([np.roll(np.arange(5) < 2, k) for k in range(3)])
    masks = jaxprune.expand_masks(free, {"v:1": keep})
    told = "do not form a product of its factors|are coupled but"
    with pytest.raises(ValueError, match=told):
        both(fn, params, masks, X)


@jax.custom_vjp
def swish(v):
    return v * jax.nn.sigmoid(v)


swish.defvjp(lambda v: (swish(v), v), lambda v, g: (g * jax.nn.sigmoid(v),))


def with_detours(p, x):
    def detour(v):
        v = lax.optimization_barrier(swish(v))
        start = jnp.argmax(v.sum((2, 3))) * 0
        v = jnp.concatenate([lax.dynamic_slice_in_dim(v, start, 1, 1), v[:, 1:]], 1)
        v = v.at[:, 0].multiply(0.5).at[:, ::2].max(-0.5)
        _, v = lax.while_loop(
            lambda c: c[0] < 2, lambda c: (c[0] + 1, jnp.tanh(c[1])), (start, v)
        )
        return v[:, np.array([1, 0, *range(2, v.shape[1])])]

    return attention(p, x, detour)


def test_blocks_stay_apart_where_heads_are_only_moved_or_repeated():
    params = weights(**ATTENTION)
    groups = jaxprune.trace(with_detours, params, X, balanced=["v:1"])
    assert groups["v:1"].blocks == 3
    masks = jaxprune.expand_masks(groups, random_cut(groups, 0))
    assert_same(*both(with_detours, params, masks, X))


def test_axes_of_their_own_have_no_blocks():
    built = MODELS["vit"].build()
    with pytest.raises(ValueError, match="no axis holds several positions of a unit"):
        jaxprune.trace(
            built.apply_fn,
            built.variables,
            *built.inputs(2, 0),
            balanced=["*/value/kernel:2"],
        )
    with pytest.raises(ValueError, match=r"'\*/nothing' matches none of the groups"):
        jaxprune.trace(attention, weights(**ATTENTION), X, balanced=["*/nothing"])


def test_unbalanced_cuts_are_refused():
    params = weights(**ATTENTION)
    groups = jaxprune.trace(attention, params, X, balanced=["v:1"])
    keep = np.ones(15, bool)
    keep[[0, 1, 5, 6, 10]] = False
    with pytest.raises(
        ValueError, match=r"keep\[v:1\] keeps 3, 3, 4 units of the 3 blocks of 5"
    ):
        jaxprune.expand_masks(groups, {"v:1": keep})
    free = dataclasses.replace(groups["v:1"], blocks=1)
    masks = jaxprune.expand_masks(
        dataclasses.replace(groups, by_name={"v:1": free}), {"v:1": keep}
    )
    with pytest.raises(ValueError, match=r"\(its blocks keep 3, 3, 4 units\)"):
        both(attention, params, masks, X)


def test_a_plan_of_blocks_is_proven_and_replayed(tmp_path, key):
    def fn(p, x):
        return jnp.tanh((x @ p["v"]).reshape(2, 3, 5)).reshape(2, 15) @ p["out"]

    params, x = weights(v=(6, 15), out=(15, 4)), X[:, 0]
    whole = jaxprune.trace(lambda p, x: fn(p, x), params, x, pin=["out:1"])
    assert [g.size for g in whole.values()] == [3, 5]
    groups = jaxprune.trace(fn, params, x, balanced=["v:1#2"])
    keep = {"v:1#2": random_cut(groups, 1)["v:1#2"]}
    jaxprune.plans.save(tmp_path / "plan.json", groups, keep)
    loaded = jaxprune.plans.load(tmp_path / "plan.json", groups)
    assert all((loaded[name] == keep[name]).all() for name in keep)
    with pytest.raises(ValueError, match="was made for another model"):
        jaxprune.plans.load(tmp_path / "plan.json", whole)
    proof = jaxprune.plans.verify(fn, params, x, keep=keep, key=key, balanced=["v:1#2"])
    assert set(proof.permuted) == {"v:1#2"}
    assert "3 blocks of 5 units: cut as many from each" in repr(groups)


# --- selection -----------------------------------------------------------------------

SCORES = np.array([5, 1, 4, 2, 3, 9, 8, 7, 6, 0, 1, 2, 3, 4, 5], float)  # 3 blocks of 5


def test_selection_takes_the_lowest_of_every_block():
    params = weights(**ATTENTION)
    groups = jaxprune.trace(attention, params, X, balanced=["v:1"])
    lowest = np.isin(np.arange(15), [1, 3, 9, 8, 10, 11])
    select, scores = jaxprune.select, {"v:1": SCORES}
    options = {"sparsity": 0.4, "only": "v:1"}
    keep = select.per_group(groups, scores, **options)
    np.testing.assert_array_equal(keep["v:1"], ~lowest)
    keep = select.across_groups(groups, scores, **options)
    np.testing.assert_array_equal(keep["v:1"], ~lowest)
    keep = select.to_sizes(groups, scores, {"v:1": 9})
    np.testing.assert_array_equal(keep["v:1"], ~lowest)
    traced = jax.jit(lambda s: select.per_group(groups, {"v:1": s}, **options))(SCORES)
    np.testing.assert_array_equal(traced["v:1"], ~lowest)
    keep = select.per_group(groups, scores, **options, multiple_of=4)
    assert keep["v:1"].reshape(3, 5).sum(1).tolist() == [4, 4, 4]
    with pytest.raises(ValueError, match="must be a multiple of its 3 blocks, got 10"):
        select.to_sizes(groups, scores, {"v:1": 10})


def test_prune_by_blocks():
    params = weights(**ATTENTION)
    pruned = jaxprune.prune(attention, params, X, sparsity=0.4, balanced=["v:1"])
    kept = np.asarray(pruned.masks["vb"]).reshape(3, -1)
    assert kept.any() and not (kept == kept[0]).all()
    expected = attention(jaxprune.apply_masks(params, pruned.masks), X)
    assert_same(pruned.apply_fn(pruned.variables, X), expected)


def grouped_queries(p, x):
    """Attention: 6 kv groups, each read by 7 queries, all of 2 features."""
    q = (x @ p["q"]).reshape(*x.shape[:2], 6, 7, 2)
    k, v = ((x @ p[name]).reshape(*x.shape[:2], 6, 2) for name in ("k", "v"))
    probabilities = jax.nn.softmax(jnp.einsum("btgnd,bsgd->bgnts", q, k), axis=-1)
    mixed = jnp.einsum("bgnts,bsgd->btgnd", probabilities, v)
    return mixed.reshape(*x.shape[:2], 84) @ p["out"]


def many_heads(p, x):
    """Attention: 7 heads of 2 features."""
    q, k, v = ((x @ p[n]).reshape(*x.shape[:2], 7, 2) for n in ("q", "k", "v"))
    probabilities = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k), axis=-1)
    mixed = jnp.einsum("bhts,bshd->bthd", probabilities, v)
    return mixed.reshape(*x.shape[:2], 14) @ p["out"]


GROUPED = {"q": (6, 84), "k": (6, 12), "v": (6, 12), "out": (84, 4)}
HEADS = {"q": (6, 14), "k": (6, 14), "v": (6, 14), "out": (14, 4)}


def in_multiples(name):
    if name == "kv groups and queries":
        return grouped_queries, weights(**GROUPED), (X,)
    if name == "heads":
        return many_heads, weights(**HEADS), (X,)
    built = MODELS[name].build()
    return built.apply_fn, built.variables, built.inputs(2, 0)


@pytest.mark.parametrize(
    ("name", "group", "size", "multiple_of", "left"),
    [
        ("heads", "q:1", 7, 3, 3),  # whole heads: 4 without multiples
        ("kv groups and queries", "q:1", 6, 3, 3),  # 4
        ("kv groups and queries", "q:1", 7, 5, 5),  # 4, of every kv group
        ("vit", "params/block/up/kernel:1", 10, 8, 8),
        ("vit", "params/block/attention/query/kernel:2", 4, 4, 4),
        ("vit", "params/block/attention/value/kernel:2", 4, 3, 3),
        ("experts_one_hot", "up:0", 4, 3, 3),
        ("resnet_projection", "params/out1/kernel:3", 8, 4, 4),
    ],
)
def test_units_of_any_kind_are_kept_in_multiples(name, group, size, multiple_of, left):
    fn, variables, args = in_multiples(name)
    groups = jaxprune.trace(fn, variables, *args)
    sizes = {n: g.size for n, g in groups.items() if n.split("#")[0] == group}
    (group,) = (n for n in sizes if sizes[n] == size)
    scores = {group: np.arange(size, dtype=float)}
    options = {"sparsity": 0.4, "only": group, "multiple_of": multiple_of}
    keep = jaxprune.select.per_group(groups, scores, **options)
    np.testing.assert_array_equal(keep[group], np.arange(size) >= size - left)
    masks = jaxprune.expand_masks(groups, keep)
    assert_same(*both(fn, variables, masks, *args))


@pytest.mark.parametrize("method", ["greedy", "global", "uniform", "exact"])
def test_a_budget_is_met_by_blocks(method):
    params = weights(**ATTENTION)
    groups = jaxprune.trace(attention, params, X, balanced=["v:1"])
    cost = jaxprune.cost_model(attention, params, X, groups=groups).parameters
    # A unit of a block: a column of v, an entry of vb, a row of out.
    assert cost.full - cost.value({**cost.sizes, "v:1": 12}) == 3 * (6 + 1 + 4)
    keep = jaxprune.select.to_budget(
        groups,
        {"v:1": SCORES},
        cost,
        budget=cost.full - 40,
        method=method,
        only="v:1",
    )
    # Two of every block go, the lowest of each; one of every block would not do.
    lowest = np.isin(np.arange(15), [1, 3, 9, 8, 10, 11])
    np.testing.assert_array_equal(keep["v:1"], ~lowest)
    masks = jaxprune.expand_masks(groups, keep)
    small = jaxprune.slice_params(params, masks)
    assert count(small) == cost.full - 66 == cost.value(keep.sizes)
    assert_same(*both(attention, params, masks, X))


# --- programs composed at random -----------------------------------------------------


def composed(moves):
    fn, variables, inputs = compose(moves)
    return fn, variables, *inputs(2, 0)


def eager(fn):
    return fn


MIXING = sorted(
    """
    attention convolved dense glu group_norm heads interleaved largest_of_two layer_norm
    low_rank mixed_tokens padded recurrence repeated residual scaled shuffled
    softmax_over_time squeezed swapped_halves wide widened
    """.split()
)
FEW = settings(max_examples=12, deadline=None, derandomize=True, database=None)


@FEW
@given(st.lists(st.sampled_from(MIXING), min_size=2, max_size=5), st.integers(0, 99))
def test_balanced_cuts_of_composed_programs(moves, seed):
    fn, variables, x = composed(moves)
    try:
        groups = jaxprune.trace(fn, variables, x, balanced=["*"])
    except ValueError:
        return  # no group has blocks
    masks = jaxprune.expand_masks(groups, random_cut(groups, seed))
    assert difference(*both(fn, variables, masks, x, jit=eager)) < TOLERANCE


@FEW
@given(st.lists(st.sampled_from(MIXING), min_size=2, max_size=4), st.integers(0, 99))
def test_whatever_blocks_lose_narrow_is_right_or_refuses(moves, seed):
    """Every copy of a unit on its own, in any group, whether the program allows it."""
    fn, variables, x = composed(moves)
    groups = jaxprune.trace(fn, variables, x)
    rng = np.random.default_rng(seed)
    for name, group in groups.items():
        copies = {member.repeats for member in group.members}
        if not group.exact or group.size == 1 or len(copies) > 1 or copies == {1}:
            continue
        (copies,) = copies
        members = tuple(
            Member(m.path, m.axis, m.index.T.reshape(-1, 1)) for m in group.members
        )
        free = dataclasses.replace(group, size=group.size * copies, members=members)
        gone = rng.integers(1, group.size)
        keep = [rng.permutation(group.size) >= gone for _ in range(copies)]
        masks = jaxprune.expand_masks(
            dataclasses.replace(groups, by_name={name: free}),
            {name: np.concatenate(keep)},
        )
        try:
            got, expected = both(fn, variables, masks, x, jit=eager)
        except ValueError as error:
            assert re.search("are coupled but|no smaller program computes", str(error))
            continue
        assert difference(got, expected) < TOLERANCE


def test_every_kind_of_mixing_is_a_move():
    assert set(MIXING) <= set(MOVES)
