"""Feed-forward layers, mixers, experts, recurrent layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from zoo import linen, normal, tokens
from zoo.structures import ROW, SEQUENCE, register, structure

# --- feed-forward, mixers, experts ----------------------------------------------------


@structure(
    "swiglu_two_layers",
    "right",
    {"gate:1": 6},
    {"gate": (4, 6), "up": (4, 6), "down": (6, 3)},
    ROW,
)
def _(p, x):
    return (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]


@structure(
    "swiglu_fused", "wrong", {"fused:1": 6}, {"fused": (4, 12), "down": (6, 3)}, ROW
)
def _(p, x):
    gate, up = jnp.split(x @ p["fused"], 2, axis=-1)
    return (jax.nn.silu(gate) * up) @ p["down"]


class Mixer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, name="embed")(x)
        y = nn.LayerNorm(name="norm0")(x).swapaxes(1, 2)
        y = nn.gelu(nn.Dense(5, use_bias=False, name="tokens_in")(y))
        y = nn.Dense(4, use_bias=False, name="tokens_out")(y)
        x = x + y.swapaxes(1, 2)
        y = nn.gelu(nn.Dense(7, name="channels_in")(nn.LayerNorm(name="norm1")(x)))
        x = x + nn.Dense(6, name="channels_out")(y)
        return nn.Dense(3, name="head")(x.mean(1))


register(
    "mlp_mixer",
    "crash",
    {
        "params/embed/kernel:1": 6,
        "params/tokens_in/kernel:1": 5,
        "params/channels_in/kernel:1": 7,
    },
    lambda: linen(Mixer(), normal(4, 3)),
)


# Expert e goes with row e of every stacked kernel and with column e of the router: the
# softmax over experts counts exp(0) for one that is masked.
@structure(
    "stacked_experts",
    "crash",
    {"router:1": 3, "up:2": 6},
    {"router": (4, 3), "up": (3, 4, 6), "down": (3, 6, 2)},
    ROW,
)
def _(p, x):
    share = jax.nn.softmax(x @ p["router"], axis=-1)
    hidden = jax.nn.relu(jnp.einsum("bi,eih->beh", x, p["up"]))
    return jnp.einsum("be,beh,eho->bo", share, hidden, p["down"])


# --- recurrent ------------------------------------------------------------------------


class Recurrent(nn.Module):
    cell: type
    last_carry: bool = False

    @nn.compact
    def __call__(self, x):
        rnn = nn.RNN(self.cell(6, name="cell"), return_carry=True, name="rnn")
        carry, x = rnn(nn.Dense(5, name="embed")(x))
        h = carry[1] if self.last_carry else x.reshape(x.shape[0], -1)
        return nn.Dense(3, name="head")(h)


register(
    "lstm_output",
    "crash",
    {"params/embed/kernel:1": 5, "params/cell/hi/kernel:0": 6},
    lambda: linen(Recurrent(nn.OptimizedLSTMCell), SEQUENCE),
)
register(
    "lstm_last_hidden_state",
    "crash",
    {"params/embed/kernel:1": 5, "params/cell/hi/kernel:0": 6},
    lambda: linen(Recurrent(nn.OptimizedLSTMCell, last_carry=True), SEQUENCE),
)
register(
    "gru",
    "crash",
    {"params/embed/kernel:1": 5, "params/cell/ir/kernel:1": 6},
    lambda: linen(Recurrent(nn.GRUCell), SEQUENCE),
)


# torch.nn.LSTM: the four gates are rows of one kernel of 4 x hidden.
@structure(
    "lstm_one_kernel",
    "thread",
    {"input:1": 6},
    {"input": (4, 24), "hidden": (6, 24), "bias": (24,), "w": (6, 3)},
    SEQUENCE,
)
def _(p, x):
    def step(state, x):
        c, h = state
        gates = x @ p["input"] + h @ p["hidden"] + p["bias"][None]
        i, f, g, o = jnp.split(gates, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (c, h), None

    zero = jnp.zeros((x.shape[0], 6))
    (_, h), _ = lax.scan(step, (zero, zero), x.swapaxes(0, 1))
    return h @ p["w"]


# --- language models ------------------------------------------------------------------


@structure(
    "tied_head_not_ignored",
    "output",
    {"table:1": 6, "up:1": 5},
    {"table": (9, 6), "up": (6, 5), "down": (5, 6)},
    tokens(4, 9),
    refused={"table:0": "indexed by values"},
)
def _(p, ids):
    x = p["table"][ids]
    x = x + jax.nn.relu(x @ p["up"]) @ p["down"]
    return jnp.einsum("btc,vc->btv", x, p["table"])
