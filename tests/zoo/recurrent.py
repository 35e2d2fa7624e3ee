"""Recurrence, loops and branches."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from zoo import linen, model, normal, weights

# --- Linen recurrences ---------------------------------------------------------------


class Recurrent(nn.Module):
    cell: type

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(5, name="embed")(x)
        x = nn.RNN(self.cell(6, name="cell"), name="rnn")(x)
        x = nn.relu(nn.Dense(7, name="dense")(x[:, -1]))
        return nn.Dense(3, name="head")(x)


@model(
    "gru",
    {
        "params/embed/kernel:1": 5,
        "params/cell/ir/kernel:1": 6,
        "params/dense/kernel:1": 7,
    },
)
def _():
    return linen(Recurrent(nn.GRUCell), normal(4, 3))


@model(
    "lstm",
    {
        "params/embed/kernel:1": 5,
        "params/cell/hi/kernel:0": 6,
        "params/dense/kernel:1": 7,
    },
)
def _():
    return linen(Recurrent(nn.OptimizedLSTMCell), normal(4, 3))


class Bidirectional(nn.Module):
    @nn.compact
    def __call__(self, x):
        forward = nn.RNN(nn.GRUCell(4, name="there"))
        backward = nn.RNN(nn.LSTMCell(5, name="back"))
        x = nn.Bidirectional(forward, backward)(x)
        return nn.Dense(3, name="head")(x.mean(1))


@model("bidirectional", {"params/there/ir/kernel:1": 4, "params/back/ii/kernel:1": 5})
def _():
    return linen(Bidirectional(), normal(4, 3))


# --- layers stacked under scan -------------------------------------------------------


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.LayerNorm(name="norm")(x)
        y = nn.Dense(x.shape[-1], name="down")(nn.gelu(nn.Dense(7, name="up")(y)))
        return x + y, None


class Stacked(nn.Module):
    remat: bool

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, name="embed")(x)
        layer = nn.remat(Layer) if self.remat else Layer
        stack = nn.scan(
            layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        x, _ = stack(name="layers")(x, None)
        return nn.Dense(3, name="head")(x)


for remat in (False, True):

    @model(
        "stacked_layers" + ("_remat" if remat else ""),
        {"params/embed/kernel:1": 6, "params/layers/up/kernel:2": 7},
    )
    def _(remat=remat):
        return linen(Stacked(remat), normal(5))


class Remat(nn.Module):
    @nn.compact
    def __call__(self, x):
        for k in range(2):
            x = nn.remat(nn.Dense)(5 + k, name=f"dense{k}")(x)
            x = nn.relu(x)
        return nn.Dense(3, name="head")(x)


@model("remat", {"params/dense0/kernel:1": 5, "params/dense1/kernel:1": 6})
def _():
    return linen(Remat(), normal(4))


# --- loops and branches, by hand -----------------------------------------------------

LOOP = {"embed": (4, 6), "step": (6, 6), "bias": (6,), "head": (6, 3)}


def _step(params, h):
    return jnp.tanh(h @ params["step"] + params["bias"][None])


@model("fori_loop", {"embed:1": 6})
def _():
    def apply_fn(params, x):
        h = x @ params["embed"]
        h = lax.fori_loop(0, 3, lambda _, h: _step(params, h), h)
        return h @ params["head"]

    return apply_fn, weights(**LOOP), normal(4)


@model("while_loop", {"embed:1": 6}, reverse=False)
def _():
    def apply_fn(params, x):
        def busy(state):
            count, h = state
            return (count < 4) & (jnp.sum(h * h) < 1e6)

        def body(state):
            count, h = state
            return count + 1, _step(params, h)

        _, h = lax.while_loop(busy, body, (0, x @ params["embed"]))
        return h @ params["head"]

    return apply_fn, weights(**LOOP), normal(4)


@model("cond", {"embed:1": 6, "wide:1": 8, "thin:1": 6})
def _():
    def apply_fn(params, x, flag):
        h = jax.nn.relu(x @ params["embed"])
        wide = lambda h: jax.nn.relu(h @ params["wide"]) @ params["thin"]  # noqa: E731
        h = lax.cond(flag, wide, lambda h: _step(params, h), h)
        return h @ params["head"]

    def inputs(batch, seed):
        return (*normal(4)(batch, seed), jnp.asarray(seed % 2 == 0))

    return apply_fn, weights(**LOOP, wide=(6, 8), thin=(8, 6)), inputs


@model("switch", {"embed:1": 6})
def _():
    def apply_fn(params, x, which):
        h = x @ params["embed"]
        branches = [
            lambda h: _step(params, h),
            lambda h: jax.nn.relu(h) * params["bias"][None],
            lambda h: h,
        ]
        return lax.switch(which, branches, h) @ params["head"]

    def inputs(batch, seed):
        return (*normal(4)(batch, seed), jnp.asarray(seed % 3, jnp.int32))

    return apply_fn, weights(**LOOP), inputs


@model("scan_carry_and_outputs", {"embed:1": 6, "read:1": 5})
def _():
    def apply_fn(params, x):
        def step(carry, x):
            h, total = carry
            h = _step(params, h + x @ params["embed"])
            return (h, total + h), jax.nn.relu(h @ params["read"])

        start = jnp.zeros((x.shape[0], 6))
        (_, total), ys = lax.scan(step, (start, start), x.swapaxes(0, 1))
        return total @ params["head"] + ys.mean(0) @ params["out"]

    shapes = {**LOOP, "read": (6, 5), "out": (5, 3)}
    return apply_fn, weights(**shapes), normal(4, 4)


@model("nested_scan", {"embed:1": 6})
def _():
    def apply_fn(params, x):
        def inner(h, x):
            return _step(params, h + x @ params["embed"]), None

        def outer(h, x):
            h, _ = lax.scan(inner, h, x)
            return jnp.sin(h), None

        x = x.reshape(x.shape[0], 2, 2, 4).transpose(1, 2, 0, 3)
        h, _ = lax.scan(outer, jnp.zeros((x.shape[2], 6)), x)
        return h @ params["head"]

    return apply_fn, weights(**LOOP), normal(4, 4)


@model("associative_scan", {"decay:1": 6})
def _():
    def apply_fn(params, x):
        decay = jax.nn.sigmoid(x @ params["decay"])
        value = x @ params["embed"]

        def join(a, b):
            return a[0] * b[0], b[0] * a[1] + b[1]

        _, h = lax.associative_scan(join, (decay, value), axis=1)
        return h[:, -1] @ params["head"]

    return apply_fn, weights(embed=(4, 6), decay=(4, 6), head=(6, 3)), normal(4, 4)
