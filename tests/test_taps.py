import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import assert_same, halve, quick_jit
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from zoo import MODELS

import jaxprune
from jaxprune import taps

pytestmark = pytest.mark.once

KERNELS = {"a": (3, 4), "b": (4, 4), "c": (4, 2)}
X = jnp.linspace(-1.0, 1.0, 6).reshape(2, 3)


@pytest.fixture
def params(key):
    keys = jax.random.split(key, len(KERNELS))
    pairs = zip(KERNELS.items(), keys, strict=True)
    return {name: jax.random.normal(k, shape) for (name, shape), k in pairs}


def plain(params, x):
    """Returns also what the taps are to find."""
    with jax.named_scope("first"):
        a = x @ params["a"]
        h = jax.nn.relu(a)
    b = h @ params["b"]
    marked = checkpoint_name(jnp.tanh(b) + 1.0, "marked")
    out = marked @ params["c"]
    seen = {"a": a, "first": h, "b:input": h, "b": b, "marked": marked, "c": out}
    return out, seen | {"a:input": x, "c:input": marked}


def net(params, x):
    return plain(params, x)[0]


def same(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-6, err_msg=name)


def test_every_named_activation_of_a_plain_function_is_what_the_function_computes(
    params,
):
    out, seen = plain(params, X)
    found = taps.names(net, params, X)
    assert {n: (a.shape, a.dtype) for n, a in found.items()} == {
        n: (a.shape, a.dtype) for n, a in seen.items()
    }
    got, read = quick_jit(taps.read(net, list(seen)))(params, X)
    assert_same(got, out)
    same(read, seen)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        y = nn.Conv(4, (3, 3), name="conv")(x)
        z = nn.BatchNorm(use_running_average=not train, name="bn")(y)
        return nn.relu(z), (y, z)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        one, (y, z) = Block(name="one")(x, train)
        two, (v, w) = nn.remat(Block, static_argnums=(2,))(name="two")(one, train)
        dense = nn.Dense(4, name="dense")
        first = dense(two)
        second = dense(first)
        out = nn.Dense(3, name="head")(second.mean((1, 2)))
        seen = {"one/conv:input": x, "one/conv": y, "one/bn": z, "two/conv:input": one}
        seen |= {"two/conv": v, "two/bn": w, "dense": first, "dense#2": second}
        seen |= {"LinenNet/one": one, "LinenNet/two": two, "head": out}
        return out, seen


def filled(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: jnp.asarray(rng.uniform(0.1, 1.0, s.shape), s.dtype), shapes
    )


@pytest.mark.parametrize("train", [False, True])
def test_linen_layers_and_modules_have_names(train):
    model, x = (
        LinenNet(),
        jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, 4, 2)), jnp.float32),
    )
    variables = filled(jax.eval_shape(model.init, jax.random.key(0), x))
    mutable = ["batch_stats"] if train else False

    def apply(variables, x, train):
        return model.apply(variables, x, train, mutable=mutable)

    def result(variables, x, train):
        out = apply(variables, x, train)
        return (out[0][0], out[1]) if train else out[0]

    out = apply(variables, x, train)
    seen = (out[0] if train else out)[1]
    got, read = taps.read(result, list(seen))(variables, x, train)
    same(read, seen)
    assert_same(got, (out[0][0], out[1]) if train else out[0])


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.bn = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        y = self.conv(x)
        z = self.bn(y)
        h = nnx.relu(z)
        first = self.blocks[0](h)
        out = self.blocks[1](jnp.tanh(first))
        seen = {"conv:input": x, "conv": y, "bn:input": y, "bn": z, "blocks/0:input": h}
        return out, seen | {"blocks/0": first, "blocks/1": out}


def test_nnx_layers_have_names():
    graph, state = nnx.split(NNXNet(nnx.Rngs(0)))
    x = jnp.linspace(-1.0, 1.0, 64).reshape(2, 4, 4, 2)
    out, seen = nnx.merge(graph, state)(x)

    def apply_fn(state, x):
        return nnx.merge(graph, state)(x)[0]

    got, read = taps.read(apply_fn, list(seen))(state, x)
    same(read, seen)
    assert_same(got, out)
    edit = taps.modify(apply_fn, {"blocks/1:input": lambda a: 2 * a})
    merged = nnx.merge(graph, state)
    expected = merged.blocks[1](2 * jnp.tanh(merged.blocks[0](seen["blocks/0:input"])))
    assert_same(edit(state, x), expected)


@pytest.mark.parametrize("name", ["equinox", "haiku", "plain_list_of_layers"])
def test_other_frameworks_have_the_same_names(name):
    built = MODELS[name].build()
    expected = {
        "equinox": {
            "conv": (2, 6, 4, 4),
            "mlp/layers/0:input": (2, 6),
            "mlp/layers/2": (2, 3),
        },
        "haiku": {"conv": (2, 8, 8, 6), "norm": (2, 8, 8, 6), "head": (2, 3)},
        "plain_list_of_layers": {"0": (2, 5), "1:input": (2, 5), "2": (2, 3)},
    }[name]
    found = taps.names(built.apply_fn, built.variables, *built.inputs(2, 0))
    assert expected.items() <= {n: a.shape for n, a in found.items()}.items()


def recurrent(params, x):
    """A scan inside jit, with every state kept."""

    def step(h, x):
        z = x @ params["a"] + h @ params["b"]
        h = jnp.tanh(z)
        return h, (z, h)

    last, (zs, hs) = jax.jit(lambda x: jax.lax.scan(step, jnp.zeros((2, 4)), x))(x)
    return last @ params["c"], (zs, hs)


def test_a_scan_stacks_what_its_steps_read(params):
    x = jnp.stack([X, 2 * X, X + 1.0])
    out, (zs, hs) = recurrent(params, x)
    fn = lambda params, x: recurrent(params, x)[0]  # noqa: E731
    names = ["a:input", "b", "b:input"]
    got, read = quick_jit(taps.read(fn, names))(params, x)
    assert_same(got, out)
    before = jnp.concatenate([jnp.zeros((1, 2, 4)), hs[:-1]])
    same(read, {"a:input": x, "b": zs - x @ params["a"], "b:input": before})
    shapes = taps.names(fn, params, x)
    assert all(shapes[name].shape == read[name].shape for name in names)


def test_an_edit_inside_a_scan_acts_at_every_step(params):
    x = jnp.stack([X, 2 * X, X + 1.0])
    fn = lambda params, x: recurrent(params, x)[0]  # noqa: E731
    doubled = {**params, "b": 2 * params["b"]}
    got = taps.modify(fn, {"b:input": lambda h: 2 * h})(params, x)
    assert_same(got, fn(doubled, x))


def test_activations_can_be_multiplied_and_replaced(params):
    h = jax.nn.relu(X @ params["a"])
    after = lambda h: (jnp.tanh(h @ params["b"]) + 1.0) @ params["c"]  # noqa: E731
    gate = jnp.array([[1.0, 0.0, 2.0, 0.5]])
    got = taps.modify(net, {"first": lambda a: a * gate})(params, X)
    np.testing.assert_allclose(got, after(h * gate), rtol=1e-6)
    got = quick_jit(taps.modify(net, {"b:input": jnp.ones((2, 4))}))(params, X)
    np.testing.assert_allclose(got, after(jnp.ones((2, 4))), rtol=1e-6)


def test_taps_pass_through_grad_and_vmap(params):
    def loss(params, x):
        out, read = taps.read(net, "b")(params, x)
        return out.sum() + (read["b"] ** 2).sum()

    def expected(params, x):
        out, seen = plain(params, x)
        return out.sum() + (seen["b"] ** 2).sum()

    assert_same(jax.grad(loss)(params, X), jax.grad(expected)(params, X))
    gates = jnp.array([[[1.0] * 4], [[0.0] * 4]])

    def gated(gate):
        return taps.modify(net, {"b": lambda b: b * gate})(params, X).sum()

    slopes = jax.vmap(jax.grad(gated))(gates)
    b = plain(params, X)[1]["b"]
    by_hand = [
        ((1 - jnp.tanh(b * gate) ** 2) * b * params["c"].sum(1)[None]).sum(0)
        for gate in (1.0, 0.0)
    ]
    np.testing.assert_allclose(slopes[:, 0], by_hand, rtol=1e-5)


def test_a_custom_derivative_beside_a_tap_survives(params):
    @jax.custom_vjp
    def straight(x):
        return jnp.round(x)

    straight.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))

    def fn(params, x):
        return straight(x @ params["a"]).sum()

    slope = jax.grad(taps.modify(fn, {"a": lambda a: 2 * a}))(params, X)["a"]
    expected = jnp.broadcast_to(2 * X.sum(0)[:, None], (3, 4))
    np.testing.assert_allclose(slope, expected, rtol=1e-5, atol=1e-6)


def test_patterns_match_many_and_errors_say_what_there_is(params):
    _, read = taps.read(net, "*:input")(params, X)
    assert list(read) == ["a:input", "b:input", "c:input"]
    with pytest.raises(ValueError, match=r"no activation is called 'd'; .* a:input, a"):
        taps.read(net, ["a", "d"])(params, X)
    with pytest.raises(ValueError, match=r"'b' has shape \(2, 4\).*has shape \(4,\)"):
        taps.modify(net, {"b": jnp.ones(4)})(params, X)
    with pytest.raises(ValueError, match=r"'b' .*dtype float32.*dtype int32"):
        taps.modify(net, {"b": lambda b: b.astype(jnp.int32)})(params, X)

    def looped(params, x):
        h = x @ params["a"]
        return jax.lax.while_loop(
            lambda h: h.sum() < 100.0, lambda h: h @ params["b"] + 50.0, h
        )

    assert "b" not in taps.names(looped, params, X)
    with pytest.raises(ValueError, match=r"called 'b'.*inside a while loop, a branch"):
        taps.read(looped, "b")(params, X)


# Everything that carries units in its own way; the engine is the same for all.
GATED = """vit decoder_grouped experts_top_k chain dropout_train depthwise squeeze_excite
grouped_convolution flatten_nhwc shufflenet equinox gram_matrix tied_embedding
weight_norm gru stacked_layers_remat custom_gradient_inside_scan""".split()


@pytest.mark.parametrize("name", GATED)
def test_gates_of_zero_are_masks(name):
    model = MODELS[name]
    built = model.build()
    args = built.inputs(2, 0)
    groups = jaxprune.trace(built.apply_fn, built.variables, *args)
    keep = halve(groups, 0)
    masks = jaxprune.expand_masks(groups, keep)
    gates = {name: mask.astype(np.float32) for name, mask in keep.items()}
    gated = taps.gate(built.apply_fn, groups)
    got = quick_jit(gated)(gates, built.variables, *args)
    masked = jaxprune.apply_masks(built.variables, masks)
    assert_same(got, quick_jit(built.apply_fn)(masked, *args))


def test_gates_refuse_what_they_cannot_do(params):
    groups = jaxprune.trace(net, params, X)
    gated = taps.gate(net, groups)
    with pytest.raises(ValueError, match=r"group 'z', which does not exist.*a:1, b:1"):
        gated({"z": jnp.ones(4)}, params, X)
    with pytest.raises(ValueError, match=r"gates\['a:1'\] has shape \(3,\).* 4 units"):
        gated({"a:1": jnp.ones(3)}, params, X)
    with pytest.raises(ValueError, match=r"group a:1 cannot be found.*none of a, b"):
        taps.gate(lambda p, x: x @ p["c"], groups)(
            {}, {"c": params["c"]}, X @ params["a"]
        )
    built = MODELS["cond"].build()
    args = built.inputs(2, 0)
    groups = jaxprune.trace(built.apply_fn, built.variables, *args)
    with pytest.raises(ValueError, match="used inside cond, where taps cannot act"):
        gates = {name: jnp.ones(group.size) for name, group in groups.items()}
        taps.gate(built.apply_fn, groups)(gates, built.variables, *args)
    free = taps.gate(built.apply_fn, groups)({}, built.variables, *args)
    assert_same(free, built.apply_fn(built.variables, *args))
