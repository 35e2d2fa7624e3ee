"""Every layer of a scan loses units of its own, as many as the others."""

import collections
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import check_types, difference, quick_jit, total
from flax import nnx
from random_programs import random_program
from test_layers import PARAMS, SEQUENCE, X, in_calls, net, normed, replaced, residual
from test_random_programs import assert_equal
from zoo import weights

import jaxprune

LAYERS = 5


def every_layer(groups, name, kept, seed=0):
    """A decision for every layer of its own."""
    group, rng = groups[name], np.random.default_rng(seed)
    size = group.size // group.blocks
    return np.concatenate([rng.permutation(size) < kept for _ in range(group.blocks)])


def both(fn, params, masks, *args):
    """What the narrowed and the masked function give, and the sliced parameters."""
    small = jaxprune.slice_params(params, masks)
    got = quick_jit(jaxprune.narrow(fn, masks))(small, *args)
    return got, quick_jit(fn)(jaxprune.apply_masks(params, masks), *args), small


def with_outputs(h, w):
    """Also returns what every layer has for all of them."""
    hidden = jnp.tanh(h @ w["up"] + w["bias"][None])
    return h + hidden @ w["down"], (hidden.sum(), jnp.maximum(hidden, 0) @ w["down"])


@pytest.mark.parametrize("turn", [residual, normed, in_calls, replaced, with_outputs])
def test_layers_lose_units_of_their_own(turn):
    fn = net(turn) if turn is not with_outputs else stacked(turn)
    loose = 400.0 if turn is normed else 1.0
    groups = jaxprune.trace(fn, PARAMS, X, per_layer="*")
    (hidden,) = groups.values()
    assert (hidden.size, hidden.blocks, hidden.layers) == (30, 5, 5)
    members = {(m.path, m.axis, m.layers) for m in hidden.members}
    assert members == {("up", 2, 0), ("bias", 1, 0), ("down", 1, 0)}
    keep = {hidden.name: every_layer(groups, hidden.name, 3)}
    masks = jaxprune.expand_masks(groups, keep)
    assert {name: np.shape(mask) for name, mask in masks.items()} == {
        "up": (5, 1, 6),
        "bias": (5, 6),
        "down": (5, 6, 1),
        "head": (),
    }
    got, expected, small = both(fn, PARAMS, masks, X)
    assert difference(got, expected) < 1e-5 * loose
    # A loop over layers says what each has.
    for layer, kept in enumerate(keep[hidden.name].reshape(5, 6)):
        own = PARAMS["up"][layer][:, kept]
        np.testing.assert_array_equal(small["up"][layer], own)
        np.testing.assert_array_equal(small["down"][layer], PARAMS["down"][layer][kept])
    narrowed, masked = jaxprune.narrow(fn, masks), jaxprune.apply_masks(PARAMS, masks)
    check_types(narrowed, small, X)
    slopes = [
        quick_jit(jax.grad(lambda p, f=f: total(f(p, X))))(p)
        for f, p in ((narrowed, small), (fn, masked))
    ]
    sliced = jaxprune.slice_params(slopes[1], masks)
    assert difference(slopes[0], sliced) < 1e-4 * loose


def stacked(turn, **options):
    def fn(p, x):
        layers = {name: p[name] for name in ("up", "bias", "down")}
        h, outs = jax.lax.scan(turn, x, layers, **options)
        return h @ p["head"], outs

    return fn


def test_the_copies_of_masks_say_the_same_when_they_are_told():
    fn = net(residual)
    groups = jaxprune.trace(fn, PARAMS, X, per_layer="up hidden", layers=True)
    keep = {"up:2": every_layer(groups, "up:2", 2), "up:0": np.arange(5) != 3}
    masks = jaxprune.expand_masks(groups, keep)
    got, expected, small = both(fn, PARAMS, masks, X)
    assert small["up"].shape == (4, 4, 2)
    assert difference(got, expected) < 1e-5
    copies = jax.tree.map(jnp.array, masks)
    again = jaxprune.slice_params(PARAMS, copies, per_layer=True)
    np.testing.assert_array_equal(again["bias"], small["bias"])
    assert difference(jaxprune.narrow(fn, copies)(small, X), expected) < 1e-5
    with pytest.raises(ValueError, match="pass per_layer=True"):
        jaxprune.slice_params(PARAMS, copies)
    masked = jaxprune.apply_masks(PARAMS, masks)
    for one in (masks, copies):
        put_back = jaxprune.unslice_params(small, one)
        jax.tree.map(np.testing.assert_array_equal, put_back, masked)
        on_device = jaxprune.unslice_params(jax.tree.map(jnp.asarray, small), one)
        jax.tree.map(np.testing.assert_array_equal, on_device, masked)
    shapes = jax.eval_shape(lambda p: p, PARAMS)
    abstract = jaxprune.slice_params(shapes, masks)
    assert jax.tree.map(jnp.shape, abstract) == jax.tree.map(jnp.shape, small)
    kept = jaxprune.surgery.units_kept(groups, masks)
    assert {name: kept[name].tolist() for name in keep} == {
        name: units.tolist() for name, units in keep.items()
    }


# --- what ties layers together -------------------------------------------------------


def shared_bias(p, x):
    """One bias for the hidden units of all layers."""

    def turn(h, w):
        return h + jnp.tanh(h @ w["up"] + p["all"][None]) @ w["down"], None

    return jax.lax.scan(turn, x, {"up": p["up"], "down": p["down"]})[0]


def carried_hidden(p, x):
    """What a layer has of its hidden units goes on to the next."""

    def turn(carry, w):
        h, before = carry
        hidden = jnp.tanh(h @ w["up"] + before)
        return (h + hidden @ w["down"], hidden), None

    start = x, jnp.zeros((3, 6))
    return jax.lax.scan(turn, start, {"up": p["up"], "down": p["down"]})[0][0]


def backwards(p, x):
    """The kernels of the first layer meet those of the last."""

    def turn(h, w):
        return h + jnp.tanh(h @ w["up"]) @ w["down"], None

    return jax.lax.scan(turn, x, {"up": p["up"], "down": p["down"][::-1]})[0]


@pytest.mark.parametrize(
    ("fn", "why"),
    [
        (shared_bias, "not all that it cuts is stacked by layers"),
        (carried_hidden, "its layers are computed together"),
        (backwards, "not all that it cuts is stacked by layers"),
    ],
)
def test_what_ties_layers_keeps_them_together(fn, why):
    params = {**PARAMS, **weights(all=(6,))}
    with pytest.raises(ValueError, match=f"matches no group with layers.*{why}"):
        jaxprune.trace(fn, params, X, per_layer="*")
    # Nor does narrow take masks that cut them apart.
    rows = np.stack([np.random.default_rng(k).permutation(6) < 3 for k in range(5)])
    masks = dict.fromkeys(params, np.array(True))
    masks |= {"up": rows[:, None], "down": rows[:, :, None]}
    small = jaxprune.slice_params(params, masks, per_layer=True)
    assert small["up"].shape == (5, 4, 3)
    with pytest.raises(ValueError, match="cuts units of their own from the"):
        jaxprune.narrow(fn, masks)(small, X)


def test_another_count_is_refused_by_layer():
    groups = jaxprune.trace(net(residual), PARAMS, X, per_layer="*")
    keep = np.ones(30, bool)
    keep[13:15] = False
    with pytest.raises(ValueError, match="6 units in layer 0 but 4 in layer 2"):
        jaxprune.expand_masks(groups, {"up:2": keep})
    with pytest.raises(ValueError, match="matches none of the groups"):
        jaxprune.trace(net(residual), PARAMS, X, per_layer="dwn")
    order = {"up:2": np.arange(30)[::-1]}
    with pytest.raises(ValueError, match="moves units between the 5 blocks"):
        jaxprune.permute(PARAMS, groups, order)


# --- in other programs ---------------------------------------------------------------


def test_layers_along_another_axis_in_half_precision_and_in_an_outer_loop():
    """Nested scans, kernels that are cast and transposed before they are scanned."""
    params = weights(up=(4, 2, 3, 6), down=(2, 3, 6, 4))

    def turn(h, w):
        up, down = w
        return h + jnp.tanh(h @ up) @ down, None

    def again(state, up, down):
        return turn(state[0], (up[0], down[1]))[0], state[1] + 1

    def fn(p, x):
        def outer(h, w):
            h, _ = jax.lax.scan(turn, h, w)
            more = jax.lax.while_loop(
                lambda state: state[1] < 2, lambda state: again(state, *w), (h, 0)
            )
            return more[0], None

        up = jnp.moveaxis(p["up"].astype(jnp.float32), (2, 1), (0, 1))
        return jax.lax.scan(outer, x, (up, jnp.moveaxis(p["down"], 1, 0)))[0]

    groups = jaxprune.trace(fn, params, X, per_layer="*")
    (hidden,) = groups.values()
    assert [(m.path, m.axis, m.layers) for m in hidden.members] == [
        ("up", 3, 2),
        ("down", 2, 1),
    ]
    masks = jaxprune.expand_masks(
        groups, {hidden.name: every_layer(groups, hidden.name, 4)}
    )
    got, expected, small = both(fn, params, masks, X)
    assert small["up"].shape == (4, 2, 3, 4)
    assert difference(got, expected) < 1e-5


@pytest.mark.parametrize("seed", range(4))
def test_layers_that_are_random_programs(seed):
    program, rng = random_program(seed), np.random.default_rng(seed)
    with jax.enable_x64(True):
        params = {n: rng.normal(size=(3, *w.shape)) for n, w in program.params.items()}

        def fn(layers, x):
            return jax.lax.scan(lambda c, p: (c, program.apply_fn(p, x)), 0.0, layers)

        groups = jaxprune.trace(fn, params, program.x, per_layer="*")
        assert any(group.layers > 1 for group in groups.values())
        keep = {
            name: every_layer(groups, name, group.size // group.blocks // 2, seed)
            for name, group in groups.items()
            if group.exact
        }
        masks = jaxprune.expand_masks(groups, keep)
        got, expected, _ = both(fn, params, masks, program.x)
        assert_equal(got, expected, "\n".join([*program.text, str(keep)]))


# --- decoders ------------------------------------------------------------------------


class LinenBlock(nn.Module):
    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x, _):
        y = nn.LayerNorm()(x)
        attend = nn.MultiHeadDotProductAttention(
            self.heads, qkv_features=3 * self.heads
        )
        x = x + attend(y)
        y = nn.Dense(self.hidden, name="up")(nn.LayerNorm()(x))
        return x + nn.Dense(8, name="down")(nn.gelu(y)), None


class LinenDecoder(nn.Module):
    layers: int = 6
    heads: int = 4
    hidden: int = 12

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, name="embed")(x)
        stack = nn.scan(
            nn.remat(LinenBlock),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.layers,
        )
        x, _ = stack(self.heads, self.hidden, name="layers")(x, None)
        return nn.Dense(3, name="head")(nn.LayerNorm()(x))


class NNXBlock(nnx.Module):
    def __init__(self, heads, hidden, rngs):
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.attend = nnx.MultiHeadAttention(
            heads, 8, 3 * heads, decode=False, rngs=rngs
        )
        self.up = nnx.Linear(8, hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, 8, rngs=rngs)

    def __call__(self, x):
        x = x + self.attend(self.norm(x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.down(nnx.gelu(self.up(x)))


class NNXDecoder(nnx.Module):
    def __init__(self, layers, heads, hidden, rngs):
        def make(rngs):
            return NNXBlock(heads, hidden, rngs)

        self.embed = nnx.Linear(4, 8, rngs=rngs)
        self.layers = nnx.vmap(make, in_axes=0, out_axes=0)(rngs.split(layers))
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        def turn(x, block):
            return block(x)

        run = nnx.scan(turn, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return self.head(run(self.embed(x), self.layers))


def linen(layers=6, heads=4, hidden=12):
    model = LinenDecoder(layers, heads, hidden)
    return model.apply, jax.eval_shape(model.init, jax.random.key(0), SEQUENCE)


def stacked_nnx(layers=6, heads=4, hidden=12):
    def make():
        return NNXDecoder(layers, heads, hidden, nnx.Rngs(0))

    graph, params, rest = nnx.split(nnx.eval_shape(make), nnx.Param, ...)
    rest = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), rest)

    def apply_fn(variables, x):
        filled = jax.tree.map(lambda leaf: leaf, params)
        nnx.replace_by_pure_dict(filled, variables)
        return nnx.merge(graph, filled, rest)(x)

    return apply_fn, nnx.to_pure_dict(params)


def operations(fn, *args):
    """How often every operation stands in the compiled program."""
    text = jax.jit(fn).lower(*args).compile().as_text()
    return collections.Counter(re.findall(r"= \S+ ([a-z-]+)\(", text))


@pytest.mark.parametrize("build", [linen, stacked_nnx])
def test_stacked_decoders(build):
    """A third of the layers, half of the heads and hidden units of each are gone."""
    fn, shapes = build()
    rng = np.random.default_rng(1)
    drawn = jax.tree.map(lambda s: rng.normal(size=s.shape) * 0.3, shapes)
    params = jax.tree.map(np.float32, drawn)
    groups = jaxprune.trace(fn, params, SEQUENCE, layers=True, per_layer="*")
    sizes = {(g.size, g.blocks): name for name, g in groups.items() if g.exact}
    assert {(6, 1), (6 * 4, 6), (6 * 12, 6)} <= sizes.keys()
    keep = {
        sizes[6, 1]: np.array([1, 0, 1, 1, 0, 1], bool),
        sizes[6 * 4, 6]: every_layer(groups, sizes[6 * 4, 6], 2),
        sizes[6 * 12, 6]: every_layer(groups, sizes[6 * 12, 6], 6),
    }
    masks = jaxprune.expand_masks(groups, keep)
    got, expected, small = both(fn, params, masks, SEQUENCE)
    assert difference(got, expected) < 2e-5
    built, like = build(4, 2, 6)
    assert jax.tree.map(jnp.shape, small) == jax.tree.map(jnp.shape, like)
    narrowed = jaxprune.narrow(fn, masks)
    mine, theirs = (operations(f, small, SEQUENCE) for f in (narrowed, built))
    assert abs(mine.total() - theirs.total()) <= 0.03 * theirs.total()
    costs = [jaxprune.costing.costs(f, small, SEQUENCE) for f in (narrowed, built)]
    assert costs[0].multiply_adds == costs[1].multiply_adds
    model = jaxprune.costing.cost_model(fn, params, SEQUENCE, groups=groups)
    counts = {name: int(units.sum()) for name, units in keep.items()}
    assert model.parameters.value(counts) == costs[0].parameters


# --- with the rest of the library ----------------------------------------------------


def test_scores_of_every_layer_and_a_state():
    groups = jaxprune.trace(net(residual), PARAMS, X, per_layer="*")
    found = jaxprune.group_scores(groups, PARAMS)["up:2"].reshape(5, 6)
    for layer in range(5):
        squares = np.square(PARAMS["up"][layer]).sum(0)
        squares += np.square(PARAMS["down"][layer]).sum(1)
        squares += np.square(PARAMS["bias"][layer])
        np.testing.assert_allclose(found[layer], np.sqrt(squares), rtol=1e-5)
    keep = {"up:2": every_layer(groups, "up:2", 3)}
    masks = jaxprune.expand_masks(groups, keep)
    tx = optax.chain(
        jaxprune.training.group_lasso(0.1, groups), optax.sgd(0.1, momentum=0.9)
    )
    state = tx.init(PARAMS)
    grads = jax.tree.map(jnp.sin, PARAMS)
    _, state = tx.update(grads, state, PARAMS)
    sliced = jaxprune.slice_opt_state(tx, state, masks)
    small = jaxprune.slice_params(PARAMS, masks)
    mu = jaxprune.slice_params(state[1][0].trace, masks)
    jax.tree.map(np.testing.assert_array_equal, sliced[1][0].trace, mu)
    assert jax.tree.map(jnp.shape, mu) == jax.tree.map(jnp.shape, small)


def test_prune_takes_layers_writers_and_units_of_layers(tmp_path):
    params = {**PARAMS, **weights(a=(4, 5), b=(5, 4))}

    def fn(p, x):
        return net(residual)(p, x + jnp.tanh(x @ p["a"]) @ p["b"])

    options = {"layers": True, "per_layer": "up:2", "writers": "b:1"}
    pruned = jaxprune.prune(fn, params, X, sparsity=0.34, **options)
    assert pruned.groups["up:2"].layers == 5
    assert pruned.groups["b:1"].stream == "pinned"
    kept = {name: units.sum() for name, units in pruned.plan.items()}
    assert kept == {"up:0": 3, "up:2": 20, "a:1": 3, "b:1": 3}
    masked = quick_jit(fn)(jaxprune.apply_masks(params, pruned.masks), X)
    assert difference(pruned.apply_fn(pruned.variables, X), masked) < 1e-5
    pruned.save(tmp_path / "net")
    for loaded in (
        jaxprune.load(tmp_path / "net"),
        jaxprune.load(tmp_path / "net", apply_fn=fn),
    ):
        assert difference(loaded.apply_fn(loaded.variables, X), masked) < 1e-5
    again = jaxprune.slice_params(params, loaded.masks)
    jax.tree.map(np.testing.assert_array_equal, again, pruned.variables)
    assert loaded.groups["up:2"].members[0].layers == 0
    # What is left can be cut again, and the masks are those of the original.
    further = jaxprune.prune(pruned, sparsity=0.5, only="up:2", per_layer="up:2")
    assert further.variables["up"].shape == (3, 4, 2)
    masked = quick_jit(fn)(jaxprune.apply_masks(params, further.masks), X)
    assert difference(further.apply_fn(further.variables, X), masked) < 1e-5
    again = jaxprune.slice_params(params, further.masks)
    jax.tree.map(np.testing.assert_array_equal, again, further.variables)


def test_a_plan_of_layers_is_proven():
    fn = net(residual)
    groups = jaxprune.trace(fn, PARAMS, X, per_layer="*")
    keep = {"up:2": every_layer(groups, "up:2", 3)}
    key = jax.random.key(0)
    proof = jaxprune.plans.verify(fn, PARAMS, X, keep=keep, key=key, per_layer="*")
    assert proof.narrowed < 1e-5
    with_roles = jaxprune.trace(fn, PARAMS, X, per_layer="*", roles=True)
    assert with_roles["up:2"].obstacle.kind == "balanced"
    assert "5 layers of 6 units" in repr(groups)
