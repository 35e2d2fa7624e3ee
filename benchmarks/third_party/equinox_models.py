"""equinox: layers of `eqx.nn` put together as its examples do."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from benchmarks.third_party.equinox_modules import module, stateful
from benchmarks.third_party.models import Model, normal, tokens

KEYS = jax.random.split(jax.random.key(0), 16)


def perceptron() -> Model:
    return module(eqx.nn.MLP(12, 10, 32, 2, key=KEYS[0]), normal(4, 12))


def convolutional() -> Model:
    layers = [
        eqx.nn.Conv2d(3, 16, 3, key=KEYS[0]),
        eqx.nn.BatchNorm(16, "batch", mode="batch"),
        eqx.nn.Lambda(jax.nn.relu),
        eqx.nn.MaxPool2d(2, 2),
        eqx.nn.Conv2d(16, 24, 3, key=KEYS[1]),
        eqx.nn.GroupNorm(4, 24),
        eqx.nn.Lambda(eqx.nn.PReLU(0.1)),
        eqx.nn.AdaptiveAvgPool2d(1),
        eqx.nn.Lambda(jnp.ravel),
        eqx.nn.Linear(24, 10, key=KEYS[2]),
    ]
    pair = eqx.nn.make_with_state(lambda: eqx.nn.Sequential(layers))()
    call: Callable[..., Any] = lambda net, state, x: net(x, state)
    return stateful(pair, call, normal(2, 3, 16, 16))


class _Recurrent(eqx.Module):
    cell: eqx.nn.GRUCell | eqx.nn.LSTMCell
    head: eqx.nn.Linear

    def __call__(self, x: jax.Array) -> jax.Array:
        zero = jnp.zeros(self.cell.hidden_size)
        pair = isinstance(self.cell, eqx.nn.LSTMCell)
        step = lambda state, x: (self.cell(x, state), None)
        state = jax.lax.scan(step, (zero, zero) if pair else zero, x)[0]
        return self.head(state[0] if pair else state)


def recurrent(cell: Callable[..., Any]) -> Model:
    net = _Recurrent(cell(8, 24, key=KEYS[0]), eqx.nn.Linear(24, 3, key=KEYS[1]))
    return module(net, normal(2, 6, 8))


class _Block(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    rotary: eqx.nn.RotaryPositionalEmbedding
    norms: list[eqx.nn.RMSNorm]
    mlp: eqx.nn.MLP

    def __call__(self, x: jax.Array) -> jax.Array:
        turn = jax.vmap(self.rotary, 1, 1)
        heads = lambda q, k, v: (turn(q), turn(k), v)
        h = jax.vmap(self.norms[0])(x)
        x = x + self.attention(h, h, h, process_heads=heads)
        return x + jax.vmap(self.mlp)(jax.vmap(self.norms[1])(x))


class _Transformer(eqx.Module):
    embed: eqx.nn.Embedding
    blocks: list[_Block]
    head: eqx.nn.Linear

    def __call__(self, words: jax.Array) -> jax.Array:
        x = jax.vmap(self.embed)(words)
        for block in self.blocks:
            x = block(x)
        return jax.vmap(self.head)(x)


def transformer() -> Model:
    def block(a: jax.Array, b: jax.Array) -> _Block:
        return _Block(
            eqx.nn.MultiheadAttention(4, 32, key=a),
            eqx.nn.RotaryPositionalEmbedding(8),
            [eqx.nn.RMSNorm(32), eqx.nn.RMSNorm(32)],
            eqx.nn.MLP(32, 32, 64, 1, jax.nn.gelu, key=b),
        )

    net = _Transformer(
        eqx.nn.Embedding(40, 32, key=KEYS[0]),
        [block(KEYS[1], KEYS[2]), block(KEYS[3], KEYS[4])],
        eqx.nn.Linear(32, 40, key=KEYS[5]),
    )
    return module(net, tokens(2, 6))


MODELS: dict[str, Callable[[], Model]] = {
    "MLP": perceptron,
    "convolutions, BatchNorm, GroupNorm": convolutional,
    "GRU": lambda: recurrent(eqx.nn.GRUCell),
    "LSTM": lambda: recurrent(eqx.nn.LSTMCell),
    "rotary transformer": transformer,
}
