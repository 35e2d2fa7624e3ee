"""The same engine under Flax NNX, Equinox, Haiku and plain JAX."""

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from zoo import model, normal, random_variables, weights


def _stateless(build):
    """An NNX module as ``(apply_fn, pure state)``."""
    graph, state = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
    pure = random_variables(nnx.to_pure_dict(state))

    def apply_fn(variables, *args):
        filled = jax.tree.map(lambda x: x, state)
        nnx.replace_by_pure_dict(filled, variables)
        return nnx.merge(graph, filled)(*args)

    return apply_fn, pure


class NNXConvNet(nnx.Module):
    def __init__(self, rngs):
        self.conv0 = nnx.Conv(3, 6, (3, 3), rngs=rngs)
        self.norm0 = nnx.BatchNorm(6, use_running_average=True, rngs=rngs)
        self.conv1 = nnx.Conv(6, 8, (3, 3), rngs=rngs)
        self.norm1 = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm0(self.conv0(x)))
        x = nnx.relu(self.norm1(self.conv1(x)))
        return self.head(x.mean((1, 2)))


@model("nnx_convolution", {"conv0/kernel:3": 6, "conv1/kernel:3": 8})
def _():
    return *_stateless(NNXConvNet), normal(8, 8, 3)


class NNXAttention(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        x = self.embed(x)
        return self.head(x + self.attention(self.norm(x)))


@model(
    "nnx_attention",
    {
        "embed/kernel:1": 8,
        "attention/query/kernel:1": 2,
        "attention/query/kernel:2": 4,
        "attention/value/kernel:2": 4,
    },
)
def _():
    return *_stateless(NNXAttention), normal(5, 4)


class EqxNet(eqx.Module):
    conv: eqx.nn.Conv2d
    norm: eqx.nn.GroupNorm
    mlp: eqx.nn.MLP

    def __init__(self, key):
        a, b = jax.random.split(key)
        self.conv = eqx.nn.Conv2d(3, 6, 3, key=a)
        self.norm = eqx.nn.GroupNorm(3, 6)
        self.mlp = eqx.nn.MLP(6, 3, 7, 2, key=b)

    def __call__(self, x):
        x = jax.nn.relu(self.norm(self.conv(x)))
        return self.mlp(x.mean((1, 2)))


@model(
    "equinox",
    {
        "conv/weight:0": 2,  # a channel of every group
        "conv/weight:0#2": 3,  # a whole group
        "mlp/layers/0/weight:0": 7,
        "mlp/layers/1/weight:0": 7,
    },
)
def _():
    net = eqx.filter_eval_shape(EqxNet, jax.random.key(0))
    arrays, static = eqx.partition(net, lambda x: isinstance(x, jax.ShapeDtypeStruct))

    def apply_fn(variables, x):
        return jax.vmap(eqx.combine(variables, static))(x)

    return apply_fn, random_variables(arrays), normal(3, 6, 6)


def _haiku_net(x, train=False):
    x = jax.nn.relu(hk.Conv2D(6, 3, name="conv")(x))
    with jax.numpy_dtype_promotion("standard"):  # its counter is an integer
        x = hk.BatchNorm(True, True, 0.9, name="norm")(x, is_training=train)
    x = hk.Flatten()(hk.max_pool(x, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"))
    x = jnp.tanh(hk.Linear(9, name="dense")(x))
    return hk.Linear(3, name="head")(x)


@model("haiku", {"params/conv/w:3": 6, "params/dense/w:1": 9})
def _():
    net = hk.without_apply_rng(hk.transform_with_state(_haiku_net))
    inputs = normal(8, 8, 3)
    params, state = jax.eval_shape(
        lambda key, x: net.init(key, x, train=True), jax.random.key(0), *inputs(2, 0)
    )

    def apply_fn(variables, x):
        return net.apply(variables["params"], variables["state"], x)[0]

    return apply_fn, random_variables({"params": params, "state": state}), inputs


@model("plain_list_of_layers", {"0/0:1": 5, "1/0:1": 6})
def _():
    def apply_fn(layers, x):
        for kernel, bias in layers[:-1]:
            x = jax.nn.relu(x @ kernel + bias[None])
        kernel, bias = layers[-1]
        return x @ kernel + bias[None]

    shapes = [((4, 5), (5,)), ((5, 6), (6,)), ((6, 3), (3,))]
    flat = weights(
        **{f"{k}{n}": s for k, pair in enumerate(shapes) for n, s in enumerate(pair)}
    )
    layers = [(flat[f"{k}0"], flat[f"{k}1"]) for k in range(3)]
    return apply_fn, layers, normal(4)


# Both sides of a constant matrix can be cut, each alone.
@model("closed_over_constants", {"w1:1": 6, "w2:0": 6})
def _():
    rng = np.random.default_rng(5)
    mean, spread = (rng.normal(size=6).astype(np.float32) for _ in range(2))
    projection = rng.normal(size=(6, 6)).astype(np.float32)

    def apply_fn(params, x):
        h = jax.nn.relu(x @ params["w1"]) * jnp.asarray(spread)[None]
        h = h - jax.nn.relu(h * jnp.asarray(mean)[None])
        return (h @ jnp.asarray(projection)) @ params["w2"]

    return apply_fn, weights(w1=(4, 6), w2=(6, 3)), normal(4)
