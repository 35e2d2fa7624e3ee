"""Modules in, smaller modules out: NNX, Equinox, Haiku, Keras."""

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxprune
from jaxprune.integrations import equinox as for_equinox
from jaxprune.integrations import haiku as for_haiku
from jaxprune.integrations import nnx as for_nnx

X = jax.random.normal(jax.random.key(0), (4, 6, 6, 3))
BATCHES = [(X + k, jnp.ones((4, 5))) for k in range(2)]


class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.hidden = nnx.Linear(8, 6, rngs=rngs)
        self.head = nnx.Linear(6, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x))).mean((1, 2))
        return self.head(nnx.relu(self.hidden(x)))


def loss_fn(model, batch):
    return jnp.mean((model(batch[0]) - batch[1]) ** 2)


def in_evaluation(model):
    copy = nnx.merge(*nnx.split(model))
    copy.eval()
    return copy


def test_nnx_module_optimizer_and_statistics():
    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)
    optimizer.update(model, nnx.grad(loss_fn)(model, BATCHES[0]))
    pruned = for_nnx.prune(
        model, X, budget=0.5, score="taylor", loss_fn=loss_fn, batches=BATCHES
    )
    small = pruned.model
    kept = pruned.plan["params/conv/kernel:3"]
    assert small.conv.out_features == small.norm.num_features == kept.sum() < 8
    np.testing.assert_allclose(in_evaluation(small)(X), pruned(X), rtol=1e-5, atol=1e-6)
    assert pruned.costs.flops <= 0.5 * pruned.costs_before.flops

    again = pruned.slice_optimizer(optimizer)
    trace = nnx.as_pure(again.opt_state)[0].trace["conv"]["kernel"]
    before = nnx.as_pure(optimizer.opt_state)[0].trace["conv"]["kernel"]
    np.testing.assert_array_equal(trace, before[..., kept])
    assert int(again.step[...]) == 1
    again.update(small, nnx.grad(loss_fn)(small, BATCHES[0]))

    plain = for_nnx.prune(model, X, sparsity=0.5)
    fresh = plain.recalibrate([x for x, _ in BATCHES])
    assert not np.allclose(fresh.model.norm.mean[...], np.zeros(4))
    np.testing.assert_allclose(
        in_evaluation(fresh.model)(X), fresh(X), rtol=1e-5, atol=1e-6
    )


def test_equinox_module():
    model = eqx.nn.MLP(3, 2, 8, 2, key=jax.random.key(1))
    x = X[0, 0]

    def loss(model, batch):
        return jnp.mean(jax.vmap(model)(batch) ** 2)

    options = {"score": "taylor", "loss_fn": loss, "batches": [x]}
    pruned = for_equinox.prune(model, x, sparsity=0.5, **options)
    small = pruned.model
    assert small.layers[0].out_features == small.layers[1].in_features == 4
    assert small.width_size == 4 and model.layers[0].out_features == 8
    np.testing.assert_allclose(jax.vmap(small)(x), pruned(x), rtol=1e-5, atol=1e-6)
    tx = optax.sgd(0.1, momentum=0.9)
    state = pruned.slice_opt_state(tx, tx.init(eqx.filter(model, eqx.is_array)))
    assert state[0].trace.layers[0].weight.shape == (4, 3)


def test_equinox_convolutions_and_norms():
    class Block(eqx.Module):
        conv: eqx.nn.Conv2d
        depthwise: eqx.nn.Conv2d
        point: eqx.nn.Conv2d

        def __call__(self, x):
            return self.point(jax.nn.relu(self.depthwise(jax.nn.relu(self.conv(x)))))

    keys = jax.random.split(jax.random.key(0), 3)
    block = Block(
        eqx.nn.Conv2d(3, 8, 3, key=keys[0]),
        eqx.nn.Conv2d(8, 8, 3, groups=8, key=keys[1]),
        eqx.nn.Conv2d(8, 2, 1, key=keys[2]),
    )
    small = for_equinox.prune(block, jnp.moveaxis(X, -1, 1), sparsity=0.5).model
    assert (small.depthwise.groups, small.depthwise.in_channels) == (4, 4)
    assert (small.conv.out_channels, small.point.in_channels) == (4, 4)


class Attending(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    heads: list

    def __call__(self, x):
        return jax.vmap(self.heads[0])(x + self.attention(x, x, x))


@pytest.mark.parametrize(
    ("only", "sizes"),
    [
        ("attention heads", (2, 4, 4)),
        ("attention/query_proj head_dim", (4, 2, 4)),
        ("attention/value_proj head_dim", (4, 4, 2)),
        (None, (2, 2, 2)),
    ],
)
def test_equinox_attention_loses_heads_and_their_dimensions(only, sizes):
    keys = jax.random.split(jax.random.key(0), 3)
    attention = eqx.nn.MultiheadAttention(4, 16, use_query_bias=True, key=keys[0])
    model = Attending(attention, [eqx.nn.Linear(16, 3, key=keys[1])])
    x = jax.random.normal(keys[2], (2, 5, 16))
    pruned = for_equinox.prune(model, x, sparsity=0.5, only=only)
    small = pruned.model.attention
    assert (small.num_heads, small.qk_size, small.vo_size) == sizes
    assert small.query_proj.out_features == small.num_heads * small.qk_size
    np.testing.assert_allclose(
        jax.vmap(pruned.model)(x), pruned(x), rtol=1e-5, atol=1e-6
    )
    arrays, static = eqx.partition(model, eqx.is_array)
    masked = eqx.combine(jaxprune.apply_masks(arrays, pruned.masks), static)
    np.testing.assert_allclose(pruned(x), jax.vmap(masked)(x), rtol=1e-5, atol=1e-6)


def test_an_equinox_module_and_its_variables_stay_in_step(tmp_path):
    keys = jax.random.split(jax.random.key(0), 3)
    attention = eqx.nn.MultiheadAttention(2, 8, use_query_bias=True, key=keys[0])
    model = Attending(attention, [eqx.nn.Linear(8, 3, key=keys[1])])
    x = jax.random.normal(keys[2], (2, 5, 8))
    found = for_equinox.prune(model, x, sparsity={"*query_proj head_dim": 0.5})
    trained = jax.tree.map(lambda w: 2 * w, eqx.filter(found.model, eqx.is_array))
    trained = eqx.combine(trained, found.model)
    same = {"rtol": 1e-5, "atol": 1e-6}
    found = found.replace(model=trained)
    np.testing.assert_allclose(found(x), jax.vmap(trained)(x), **same)
    found.save(tmp_path / "small")
    apply_fn, variables = for_equinox.equinox_apply(model)
    loaded = jaxprune.load(tmp_path / "small", apply_fn, like=variables)
    loaded = for_equinox.pruned_module(model, loaded)
    np.testing.assert_allclose(jax.vmap(loaded.model)(x), found(x), **same)
    again = jaxprune.prune(found, sparsity={"*value_proj head_dim": 0.5})
    assert (again.model.attention.vo_size, again.model.attention.qk_size) == (2, 2)
    np.testing.assert_allclose(jax.vmap(again.model)(x), again(x), **same)


def test_what_no_equinox_module_can_compute_is_refused():
    class Gate(eqx.Module):
        first: eqx.nn.Linear
        second: eqx.nn.Linear

        def __call__(self, x):
            return self.second(jax.nn.relu(self.first(x)) / self.first.out_features)

    keys = jax.random.split(jax.random.key(0))
    gate = Gate(eqx.nn.Linear(3, 8, key=keys[0]), eqx.nn.Linear(8, 2, key=keys[1]))
    with pytest.raises(ValueError, match=r"no module of the same classes: it differs"):
        for_equinox.prune(gate, X[0, 0], sparsity=0.5)


def a_haiku_net_nobody_wrote_here_case():
    def forward(x, is_training=False):
        net = hk.nets.ResNet([1, 1, 1, 1], 5, resnet_v2=False, bottleneck=False,
                             channels_per_group=[4, 8, 8, 8])  # fmt: skip
        return net(x, is_training)

    net = hk.without_apply_rng(hk.transform_with_state(forward))
    x = jnp.ones((2, 16, 16, 3))
    params, state = net.init(jax.random.key(0), x, True)
    apply_fn, variables = for_haiku.haiku_apply(net, params, state)
    pruned = jaxprune.prune(apply_fn, variables, x, budget=0.5)
    assert pruned.costs.flops <= 0.5 * pruned.costs_before.flops
    masked = apply_fn(jaxprune.apply_masks(variables, pruned.masks), x)
    np.testing.assert_allclose(pruned(x), masked, rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="expected what hk.transform returns"):
        for_haiku.haiku_apply(forward, params)


def test_a_haiku_net_nobody_wrote_here():
    with jax.numpy_dtype_promotion("standard"):  # Haiku mixes dtypes
        a_haiku_net_nobody_wrote_here_case()


@pytest.fixture
def keras(monkeypatch):
    """Keras on JAX, which promotes ranks and dtypes as JAX does by default."""
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    library = pytest.importorskip("keras")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield library


def test_keras(keras):
    from jaxprune.integrations import keras as for_keras

    model = keras.Sequential(
        [
            keras.layers.Conv2D(8, 3, padding="same", use_bias=False),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(5),
        ]
    )
    with pytest.raises(ValueError, match="is not built; call it once on an example"):
        for_keras.keras_apply(model)
    model(X)
    apply_fn, variables = for_keras.keras_apply(model)
    np.testing.assert_allclose(apply_fn(variables, X), model(X), rtol=1e-5, atol=1e-6)
    pruned = jaxprune.prune(apply_fn, variables, X, budget=0.5)
    masked = apply_fn(jaxprune.apply_masks(variables, pruned.masks), X)
    np.testing.assert_allclose(pruned(X), masked, rtol=1e-5, atol=1e-6)
    trainable, rest = for_keras.keras_lists(model, pruned.variables)
    call = for_keras.keras_call(model, pruned.apply_fn)
    out, same = call(trainable, rest, X)
    np.testing.assert_allclose(out, masked, rtol=1e-5, atol=1e-6)
    assert all(map(np.array_equal, same, rest))

    def loss(trainable):
        out, new = call(trainable, rest, X, training=True)
        return jnp.mean(out**2), new

    (_, new), slopes = jax.value_and_grad(loss, has_aux=True)(trainable)
    # As the original in training, masked: it normalises by the batch.
    full = jaxprune.apply_masks(variables, pruned.masks)
    lists = for_keras.keras_lists(model, full)
    out, wanted = model.stateless_call(*lists, X, training=True)
    found = for_keras.keras_variables(model, trainable, new)["batch_stats"]
    masks = pruned.masks["batch_stats"]
    wanted = for_keras.keras_variables(model, lists[0], wanted)["batch_stats"]
    for name, value in jaxprune.slice_params(wanted, masks).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6)
    assert [slope.shape for slope in slopes] == [leaf.shape for leaf in trainable]
    again = for_keras.keras_variables(model, trainable, rest)
    assert jax.tree.map(jnp.shape, again) == jax.tree.map(jnp.shape, pruned.variables)
    fresh = pruned.recalibrate([X], training=True)
    moved = jax.tree.map(
        lambda a, b: not np.allclose(a, b),
        fresh.variables["batch_stats"],
        pruned.variables["batch_stats"],
    )
    assert any(jax.tree.leaves(moved))
    tx = optax.adam(1e-3)
    state = pruned.slice_opt_state(tx, tx.init(variables["params"]))
    shapes = jax.tree.map(jnp.shape, pruned.variables["params"])
    assert jax.tree.map(jnp.shape, state[0].mu) == shapes
    with pytest.raises(TypeError, match="expected a keras.Model, got a Dense"):
        for_keras.keras_apply(keras.layers.Dense(3))
