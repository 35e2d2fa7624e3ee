"""Layers under a scan as units: cutting one shortens the scan."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import difference, quick_jit, total
from flax import nnx
from zoo import weights

import jaxprune

X = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
SHAPES = {"up": (5, 4, 6), "bias": (5, 6), "down": (5, 6, 4), "head": (4, 2)}
PARAMS = weights(**SHAPES)


def residual(h, w):
    y = jax.nn.gelu(h @ w["up"] + w["bias"][None]) @ w["down"]
    return h + y, None


def normed(h, w):
    """With a norm before the branch; carried in half precision, added in single."""
    x = h.astype(jnp.float32)
    y = x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)
    y = jnp.tanh(y @ w["up"] + w["bias"][None]) @ w["down"]
    return (x + y).astype(h.dtype), None


@jax.checkpoint
def in_calls(h, w):
    return jax.jit(residual)(h, w)


def with_outputs(h, w):
    h, _ = residual(h, w)
    return h, jnp.tanh(h @ w["up"]).sum() * 0.0 + w["bias"].sum()


def net(turn):
    def fn(p, x):
        layers = {name: p[name] for name in ("up", "bias", "down")}
        x = x.astype(jnp.float16) if turn is normed else x
        h, sums = jax.lax.scan(turn, x, layers)
        out = h.astype(jnp.float32) @ p["head"]
        return out if sums is None else (out, sums.sum())

    return fn


@pytest.mark.parametrize("turn", [residual, normed, in_calls, with_outputs])
def test_layers_go_one_by_one(turn):
    fn, loose = net(turn), 400.0 if turn is normed else 1.0
    groups = jaxprune.trace(fn, PARAMS, X, layers=True)
    layers = groups["up:0"]
    assert (layers.size, layers.exact, layers.ordered) == (5, True, True)
    members = {(m.path, m.axis) for m in layers.members}
    assert members == {("up", 0), ("bias", 0), ("down", 0)}
    hidden = next(name for name in groups if name != "up:0")
    rng = np.random.default_rng(0)
    for kept in ([1, 0, 1, 1, 0], [0, 0, 0, 0, 1], [0] * 5):
        keep = {"up:0": np.array(kept, bool), hidden: rng.random(6) < 0.6}
        masks = jaxprune.expand_masks(groups, keep)
        small = jaxprune.slice_params(PARAMS, masks)
        assert small["up"].shape[0] == sum(kept)
        masked = jaxprune.apply_masks(PARAMS, masks)
        narrowed = jaxprune.narrow(fn, masks)
        got, expected = quick_jit(narrowed)(small, X), quick_jit(fn)(masked, X)
        assert difference(got, expected) < 1e-5 * loose
        slopes = [
            quick_jit(jax.grad(lambda p, f=f: total(f(p, X))))(p)
            for f, p in ((narrowed, small), (fn, masked))
        ]
        sliced = jaxprune.slice_params(slopes[1], masks)
        assert difference(slopes[0], sliced) < 1e-4 * loose


def test_the_scan_is_shorter_and_costs_less():
    fn = net(residual)
    groups = jaxprune.trace(fn, PARAMS, X, layers=True)
    model = jaxprune.costing.cost_model(fn, PARAMS, X, groups=groups)
    hidden = next(name for name in groups if name != "up:0")
    keep = {"up:0": np.array([1, 0, 1, 1, 0], bool), hidden: np.arange(6) < 4}
    masks = jaxprune.expand_masks(groups, keep)
    small = jaxprune.slice_params(PARAMS, masks)
    cost = jaxprune.costing.costs(jaxprune.narrow(fn, masks), small, X)
    sizes = {name: int(units.sum()) for name, units in keep.items()}
    assert model.exact
    assert model.parameters.value(sizes) == cost.parameters
    assert model.multiply_adds.value(sizes) == cost.multiply_adds
    assert cost.multiply_adds == 3 * (3 * 4 * 4 * 2) + 3 * 4 * 2


def replaced(h, w):
    return jnp.tanh(h @ w["up"] + w["bias"][None]) @ w["down"], None


def scaled(h, w):
    return 0.5 * h + residual(h, w)[0], None


def rounded(h, w):
    return residual(h.astype(jnp.bfloat16).astype(h.dtype), w)


def shifted(h, w):
    return h + jnp.cos(h @ w["up"] + w["bias"][None]).sum() * 0.1, None


@pytest.mark.parametrize("turn", [replaced, scaled, rounded, shifted])
def test_layers_that_are_no_identity_stay(turn):
    groups = jaxprune.trace(net(turn), PARAMS, X, layers=True)
    assert "up:0" not in groups
    (why,) = {p.why for p in groups.pinned if (p.path, p.axis) == ("up", 0)}
    assert "zero layers are not the identity" in why
    masks = {
        name: np.arange(5).reshape(-1, *[1] * (leaf.ndim - 1)) < 3
        if name != "head"
        else np.array(True)
        for name, leaf in PARAMS.items()
    }
    small = jaxprune.slice_params(PARAMS, masks)
    with pytest.raises(ValueError, match="this axis cannot be cut"):
        jaxprune.narrow(net(turn), masks)(small, X)


def test_layers_are_units_on_request_only():
    groups = jaxprune.trace(net(residual), PARAMS, X)
    assert "up:0" not in groups
    with_roles = jaxprune.trace(net(residual), PARAMS, X, layers=True, roles=True)
    assert "pruned but not permuted" in str(with_roles["up:0"].obstacle)


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(y)
        y = nn.Dense(12, name="up")(nn.LayerNorm()(x))
        return x + nn.Dense(8, name="down")(nn.gelu(y)), None


class LinenDecoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, name="embed")(x)
        stack = nn.scan(
            LinenBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=6,
        )
        x, _ = stack(name="layers")(x, None)
        return nn.Dense(3, name="head")(nn.LayerNorm()(x))


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.up = nnx.Linear(8, 12, rngs=rngs)
        self.down = nnx.Linear(12, 8, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


class NNXDecoder(nnx.Module):
    def __init__(self, rngs):
        make = nnx.vmap(NNXBlock, in_axes=0, out_axes=0)
        self.embed = nnx.Linear(4, 8, rngs=rngs)
        self.layers = make(rngs.split(6))
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        def turn(x, block):
            return block(x)

        run = nnx.scan(turn, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return self.head(run(self.embed(x), self.layers))


def linen():
    shapes = jax.eval_shape(LinenDecoder().init, jax.random.key(0), SEQUENCE)
    return LinenDecoder().apply, shapes


def stacked_nnx():
    graph, state = nnx.split(nnx.eval_shape(lambda: NNXDecoder(nnx.Rngs(0))))
    pure = nnx.to_pure_dict(state)

    def apply_fn(variables, x):
        filled = jax.tree.map(lambda leaf: leaf, state)
        nnx.replace_by_pure_dict(filled, variables)
        return nnx.merge(graph, filled)(x)

    return apply_fn, pure


SEQUENCE = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(np.float32)


@pytest.mark.parametrize("build", [linen, stacked_nnx])
def test_stacked_decoders(build):
    fn, shapes = build()
    rng = np.random.default_rng(1)
    drawn = jax.tree.map(lambda s: rng.normal(size=s.shape) * 0.3, shapes)
    params = jax.tree.map(np.float32, drawn)
    groups = jaxprune.trace(fn, params, SEQUENCE, layers=True)
    (layers,) = [n for n, g in groups.items() if g.size == 6]
    assert groups[layers].exact
    keep = {n: rng.random(g.size) < 0.6 for n, g in groups.items() if g.exact}
    keep[layers] = np.array([1, 0, 1, 1, 0, 1], bool)
    masks = jaxprune.expand_masks(groups, keep)
    small = jaxprune.slice_params(params, masks)
    got = quick_jit(jaxprune.narrow(fn, masks))(small, SEQUENCE)
    expected = quick_jit(fn)(jaxprune.apply_masks(params, masks), SEQUENCE)
    assert difference(got, expected) < 2e-5


def test_plans_and_optimiser_states_know_layers_writers_and_branches():
    """And what is left after a cut is a network that can be cut again."""
    shapes = {"stem": (4, 4), "a": (4, 5), "b": (5, 4)}
    params = {**PARAMS, **weights(**shapes)}

    def fn(p, x):
        h = x @ p["stem"]
        return net(residual)(p, h + jnp.tanh(h @ p["a"]) @ p["b"])

    groups = jaxprune.trace(fn, params, X, writers="b:1", layers=True)
    assert dict(groups.branches) == {"a": ("a:1", "b:1")}
    keep = {"up:0": np.arange(5) < 3, "b:1": np.array([1, 0, 1, 0], bool)}
    key = jax.random.key(0)
    proof = jaxprune.plans.verify(
        fn, params, X, keep=keep, key=key, writers=["b:1"], layers=True
    )
    assert proof.narrowed < 1e-5
    assert not proof.permuted  # both have their places
    masks = jaxprune.expand_masks(groups, keep)
    small = jaxprune.slice_params(params, masks)
    tx = optax.adam(1e-3)
    state = jaxprune.slice_opt_state(tx, tx.init(params), masks)
    assert jax.tree.map(jnp.shape, state[0].mu) == jax.tree.map(jnp.shape, small)
    narrowed = jaxprune.narrow(fn, masks)
    again = jaxprune.trace(narrowed, small, X, layers=True)
    assert (again["up:0"].size, again["up:0"].exact) == (3, True)
    masks = jaxprune.expand_masks(again, {"up:0": np.arange(3) > 0})
    got = jaxprune.narrow(narrowed, masks)(jaxprune.slice_params(small, masks), X)
    assert difference(got, narrowed(jaxprune.apply_masks(small, masks), X)) < 1e-5
