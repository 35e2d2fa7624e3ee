"""Writers of a residual stream that lose units which the stream keeps."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import difference, quick_jit, total
from zoo import MODELS, weights

import jaxprune


def net(p, x):
    """Two residual blocks: the stream is 6 wide, hidden layers 5 and 4."""
    h = x @ p["stem"]
    h = jax.nn.relu(h + jax.nn.relu(h @ p["up1"]) @ p["down1"] * p["scale1"][None])
    h = h + jnp.tanh(h @ p["up2"]) @ p["down2"]
    return h @ p["head"]


SHAPES = {
    "stem": (4, 6),
    "up1": (6, 5),
    "down1": (5, 6),
    "scale1": (6,),
    "up2": (6, 4),
    "down2": (4, 6),
    "head": (6, 2),
}
PARAMS = weights(**SHAPES)
X = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)


def both_equal(fn, params, groups, keep, x):
    masks = jaxprune.expand_masks(groups, keep)
    small = jaxprune.slice_params(params, masks)
    masked = jaxprune.apply_masks(params, masks)
    narrowed = jaxprune.narrow(fn, masks)
    got, expected = quick_jit(narrowed)(small, x), quick_jit(fn)(masked, x)
    assert difference(got, expected) < 1e-5
    slopes = [
        quick_jit(jax.grad(lambda p, fn=f: total(fn(p, x))))(p)
        for f, p in ((narrowed, small), (fn, masked))
    ]
    assert difference(slopes[0], jaxprune.slice_params(slopes[1], masks)) < 1e-4
    return small


def random_keep(groups, seed):
    rng = np.random.default_rng(seed)
    return {n: rng.random(g.size) < 0.6 for n, g in groups.items()}


def test_writers_have_groups_of_their_own():
    groups = jaxprune.trace(net, PARAMS, X, writers=["down1:1", "down2"])
    assert {n: (g.size, g.stream, g.exact) for n, g in groups.items()} == {
        "stem:1": (6, "", True),
        "up1:1": (5, "", True),
        "down1:1": (6, "stem:1", True),
        "up2:1": (4, "", True),
        "down2:1": (6, "stem:1", True),
    }
    members = {(m.path, m.axis) for m in groups["down1:1"].members}
    assert members == {("down1", 1), ("scale1", 0)}
    assert len(jaxprune.trace(net, PARAMS, X)) == 3


@pytest.mark.parametrize("writers", [["down1:1", "down2"], "*", "down2"])
@pytest.mark.parametrize("seed", range(4))
def test_any_cut_equals_the_masked_program(writers, seed):
    groups = jaxprune.trace(net, PARAMS, X, writers=writers)
    assert all(group.exact for group in groups.values())
    both_equal(net, PARAMS, groups, random_keep(groups, seed), X)


def test_the_cost_is_that_of_the_narrowed_program():
    """While the stream is whole; else which units both keep is not in their number."""
    groups = jaxprune.trace(net, PARAMS, X, writers=["down1:1", "down2"])
    model = jaxprune.costing.cost_model(net, PARAMS, X, groups=groups)
    assert not model.exact
    assert "down1:1 hold unequal shares" in model.why
    for seed in range(4):
        rng = np.random.default_rng(seed)
        keep = {
            name: rng.permutation(group.size) < rng.integers(1, group.size + 1)
            for name, group in groups.items()
            if name != "stem:1"
        }
        masks = jaxprune.expand_masks(groups, keep)
        small = jaxprune.slice_params(PARAMS, masks)
        cost = jaxprune.costing.costs(jaxprune.narrow(net, masks), small, X)
        sizes = {name: int(units.sum()) for name, units in keep.items()}
        assert model.parameters.value(sizes) == cost.parameters
        assert model.multiply_adds.value(sizes) == cost.multiply_adds
        assert model.activation_bytes.value(sizes) == cost.activation_bytes


def test_a_stream_that_cannot_be_cut_has_writers_that_can():
    def fn(p, x):
        return x + jax.nn.relu(x @ p["up"]) @ p["down"]

    params = weights(up=(4, 5), down=(5, 4))
    groups = jaxprune.trace(fn, params, X, writers="down:1")
    assert {n: (g.size, g.stream) for n, g in groups.items()} == {
        "up:1": (5, ""),
        "down:1": (4, "pinned"),
    }
    both_equal(fn, params, groups, random_keep(groups, 0), X)


def scanned(p, x):
    def turn(h, w):
        return h + jnp.tanh(h @ w["up"]) @ w["down"], None

    layers = {"up": p["up"], "down": p["down"]}
    return jax.lax.scan(turn, x @ p["stem"], layers)[0] @ p["head"]


def scanned_from_the_input(p, x):
    def turn(h, w):
        return h - jnp.tanh(h @ w["up"]) @ w["down"], None

    return jax.lax.scan(turn, x, {"up": p["up"], "down": p["down"]})[0] @ p["head"]


def in_calls(p, x):
    @jax.checkpoint
    @jax.jit
    def block(h, up, down):
        return h + jnp.tanh(h @ up) @ down

    return block(x @ p["stem"], p["up"], p["down"]) @ p["head"]


@pytest.mark.parametrize("writers", ["*", "down"])
@pytest.mark.parametrize("fn", [scanned, scanned_from_the_input, in_calls])
def test_in_loops_and_calls(fn, writers):
    wide = 4 if fn is scanned_from_the_input else 6
    layers = () if fn is in_calls else (3,)
    shapes = {"up": (*layers, wide, 5), "down": (*layers, 5, wide), "head": (wide, 2)}
    params = weights(**shapes, **({"stem": (4, 6)} if wide == 6 else {}))
    groups = jaxprune.trace(fn, params, X, writers=writers)
    assert any(group.stream for group in groups.values())
    assert all(group.exact for group in groups.values())
    for seed in range(2):
        both_equal(fn, params, groups, random_keep(groups, seed), X)


def test_a_prefix_is_padded_and_a_branch_without_units_leaves_the_shortcut():
    groups = jaxprune.trace(net, PARAMS, X, writers=["down1:1", "down2"])

    def primitives(keep):
        masks = jaxprune.expand_masks(groups, keep)
        small = jaxprune.slice_params(PARAMS, masks)
        with jax.disable_jit():
            jaxpr = jax.make_jaxpr(jaxprune.narrow(net, masks))(small, X)
        return [eqn.primitive.name for eqn in jaxpr.eqns]

    plain = primitives({})
    padded = primitives({"down2:1": np.arange(6) < 4})
    assert sorted(padded) == sorted([*plain, "pad"])
    picked = primitives({"down2:1": np.array([1, 1, 0, 1, 0, 0], bool)})
    assert "gather" in picked
    gone = {"down1:1": np.zeros(6, bool), "up1:1": np.zeros(5, bool)}
    left = primitives(gone)
    assert left.count("dot_general") == plain.count("dot_general") - 2
    both_equal(net, PARAMS, groups, gone, X)


def test_merging_a_writer_is_refused():
    groups = jaxprune.trace(net, PARAMS, X, writers="down2", roles=True)
    assert str(groups["down2:1"].obstacle)
    assert groups["up1:1"].obstacle is None


def test_what_is_no_writer_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'up1:1' names no writer .* to no stream"):
        jaxprune.trace(net, PARAMS, X, writers="up1:1")
    with pytest.raises(ValueError, match=r"'dwn2' matches no axis .*down2"):
        jaxprune.trace(net, PARAMS, X, writers="dwn2")

    def shifted(p, x):
        return x @ p["stem"] + jnp.exp(x @ p["w"])

    def closed(p, x):
        return shifted(p, x) @ p["head"]

    params = weights(stem=(4, 6), w=(4, 6), head=(6, 2))
    with pytest.raises(
        ValueError, match=r"not 0 at removed positions \(add at test_wr"
    ):
        jaxprune.trace(closed, params, X, writers="w")
    masks = {
        "stem": np.ones((1, 6), bool),
        "w": np.arange(6)[None] < 4,
        "head": np.ones((6, 1), bool),
    }
    small = jaxprune.slice_params(params, masks)
    with pytest.raises(ValueError, match=r"w axis 1: .*not 0 at removed positions"):
        jaxprune.narrow(closed, masks)(small, X)
    wrong = {**masks, "w": np.ones((1, 6), bool), "head": np.arange(6)[:, None] < 4}
    small = jaxprune.slice_params(params, wrong)
    with pytest.raises(ValueError, match="are coupled but the masks keep"):
        jaxprune.narrow(closed, wrong)(small, X)


@pytest.mark.parametrize("name", ["resnet_projection", "resnet_identity", "vit"])
def test_networks_of_modules(name):
    built = MODELS[name].build()
    args = built.inputs(2, 0)
    fn, params = built.apply_fn, built.variables
    groups = jaxprune.trace(fn, params, *args, writers="*")
    assert sum(bool(group.stream) for group in groups.values()) >= 2
    exact = {n: g for n, g in groups.items() if g.exact}
    masks = jaxprune.expand_masks(groups, random_keep(exact, 0))
    small = jaxprune.slice_params(params, masks)
    got = quick_jit(jaxprune.narrow(fn, masks))(small, *args)
    expected = quick_jit(fn)(jaxprune.apply_masks(params, masks), *args)
    assert difference(got, expected) < 2e-5


def test_a_branch_is_what_only_it_computes():
    groups = jaxprune.trace(net, PARAMS, X, writers="*")
    assert dict(groups.branches) == {
        "up1": ("up1:1", "down1:1"),
        "up2": ("up2:1", "down2:1"),
    }
    assert not jaxprune.trace(net, PARAMS, X).branches
    assert pickle.loads(pickle.dumps(groups)).branches == groups.branches
    with pytest.raises(
        ValueError, match=r"'up' is not a branch; the branches are up1, up2"
    ):
        jaxprune.without_branches(groups, "up")

    def read_twice(p, x):
        h = x @ p["stem"]
        y = jnp.tanh(h @ p["up1"]) @ p["down1"]
        return (h + y) @ p["head"], y.sum()

    read = jaxprune.trace(read_twice, PARAMS, X, writers="*")
    assert not read.branches


@pytest.mark.parametrize("name", ["resnet_identity", "vit", "decoder_grouped"])
def test_branches_of_modules(name):
    """What is left when all are gone is what a network without them computes."""
    built = MODELS[name].build()
    args, params = built.inputs(2, 0), built.variables
    groups = jaxprune.trace(built.apply_fn, params, *args, writers="*")
    assert groups.branches
    keep = jaxprune.without_branches(groups, *groups.branches)
    masks = jaxprune.expand_masks(groups, keep)
    small = jaxprune.slice_params(params, masks)
    narrowed = jaxprune.narrow(built.apply_fn, masks)
    expected = quick_jit(built.apply_fn)(jaxprune.apply_masks(params, masks), *args)
    assert difference(quick_jit(narrowed)(small, *args), expected) < 2e-5
    with jax.disable_jit():
        jaxpr = jax.make_jaxpr(narrowed)(small, *args)
    products = [e for e in jaxpr.eqns if e.primitive.name in PRODUCTS]
    assert all(0 not in v.aval.shape for e in products for v in e.invars)


PRODUCTS = ("dot_general", "conv_general_dilated")


def test_a_network_without_a_block_compiles_like_one_built_without_it():
    groups = jaxprune.trace(net, PARAMS, X, writers="*")
    masks = jaxprune.expand_masks(groups, jaxprune.without_branches(groups, "up1"))
    small = jaxprune.slice_params(PARAMS, masks)

    def built(p, x):
        h = jax.nn.relu(x @ p["stem"])
        return (h + jnp.tanh(h @ p["up2"]) @ p["down2"]) @ p["head"]

    flops = [
        jax.jit(fn).lower(small, X).compile().cost_analysis()["flops"]
        for fn in (jaxprune.narrow(net, masks), built)
    ]
    assert flops[0] == flops[1]
    got = jaxprune.narrow(net, masks)(small, X)
    assert difference(got, built(PARAMS, X)) < 1e-6


def test_scales_of_a_stream_are_no_writers():
    """Some libraries write a norm as x * scale + (bias - mean * scale)."""

    def normed(p, x):
        h = x @ p["stem"]
        scale = jax.lax.rsqrt(h.var(-1, keepdims=True) + 1e-3) * p["gamma"][None]
        shift = p["beta"][None] - h.mean(-1, keepdims=True) * scale
        y = h * scale + shift
        return (h + jnp.tanh(y @ p["up1"]) @ p["down1"]) @ p["head"]

    params = {**PARAMS, **weights(gamma=(6,), beta=(6,))}
    groups = jaxprune.trace(normed, params, X, writers="*")
    streams = {name: group.stream for name, group in groups.items() if group.stream}
    assert streams == {"stem:1#2": "stem:1", "down1:1": "stem:1"}


def test_an_output_keeps_one_of_its_writers_and_its_shape():
    def fn(p, x):
        return x @ p["up"] + jnp.tanh(x @ p["w"])

    params = weights(up=(4, 5), w=(4, 5))
    groups = jaxprune.trace(fn, params, X, writers="*")
    assert {n: g.stream for n, g in groups.items()} == {"w:1": "pinned"}
    for kept in (3, 0):
        both_equal(fn, params, groups, {"w:1": np.arange(5) < kept}, X)
