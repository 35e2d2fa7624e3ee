"""Attention in every layout."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo import linen, normal
from zoo.structures import SEQUENCE, conv, register, structure

# A unit of an attention layer is a whole head (which takes its slice of queries, keys,
# values and of the output), one dimension of queries and keys in all heads, or one
# dimension of the values in all heads.


def attend(q, k, v):
    """Softmax attention on ``[batch, time, heads, width]``, heads merged at the end."""
    scores = jnp.einsum("bthd,bshd->bhts", q, k)
    mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores, axis=-1), v)
    return mixed.reshape(*q.shape[:2], -1)


def heads(x, count):
    """``[batch, time, count x width]`` -> ``[batch, time, count, width]``."""
    return x.reshape(*x.shape[:2], count, -1)


SEPARATE = {"q": (4, 6), "k": (4, 6), "v": (4, 6), "o": (6, 4)}


@structure(
    "attention_separate",
    "right",
    {"q:1": 2, "q:1#2": 3, "v:1": 3},
    SEPARATE,
    SEQUENCE,
)
def _(p, x):
    return attend(*(heads(x @ p[name], 2) for name in "qkv")) @ p["o"]


@structure(
    "attention_value_width_differs",
    "crash",
    {"q:1": 2, "q:1#2": 3, "v:1": 5},
    {**SEPARATE, "v": (4, 10), "o": (10, 4)},
    SEQUENCE,
)
def _(p, x):
    return attend(*(heads(x @ p[name], 2) for name in "qkv")) @ p["o"]


@structure(
    "attention_fused_chunk",
    "right",
    {"qkv:1": 2, "qkv:1#2": 3, "qkv:1#3": 3},
    {"qkv": (4, 18), "o": (6, 4)},
    SEQUENCE,
)
def _(p, x):
    parts = jnp.split(x @ p["qkv"], 3, axis=-1)
    return attend(*(heads(part, 2) for part in parts)) @ p["o"]


# timm: one reshape to [3, heads, width], so the values have the width of the queries.
@structure(
    "attention_fused_unbind",
    "right",
    {"qkv:1": 2, "qkv:1#2": 3},
    {"qkv": (4, 18), "o": (6, 4)},
    SEQUENCE,
)
def _(p, x):
    qkv = (x @ p["qkv"]).reshape(*x.shape[:2], 3, 2, 3).transpose(2, 0, 1, 3, 4)
    q, k, v = (qkv[i] for i in range(3))
    return attend(q, k, v) @ p["o"]


# Heads first: each head holds its own q, k and v one after the other.
@structure(
    "attention_fused_head_major",
    "crash",
    {"qkv:1": 2, "qkv:1#2": 3, "qkv:1#3": 3},
    {"qkv": (4, 18), "o": (6, 4)},
    SEQUENCE,
)
def _(p, x):
    return attend(*jnp.split(heads(x @ p["qkv"], 2), 3, axis=-1)) @ p["o"]


# nn.MultiheadAttention.
class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, name="embed")(x)
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(x)
        return nn.Dense(3, name="head")(x.mean(1))


register(
    "attention_layer",
    "right",
    {
        "params/embed/kernel:1": 6,
        "params/attention/query/kernel:1": 2,
        "params/attention/query/kernel:2": 3,
        "params/attention/value/kernel:2": 3,
    },
    lambda: linen(Attention(), SEQUENCE),
)


def rope_tables(length, width):
    rates = 10.0 ** -np.arange(0, 1, 2 / width, dtype=np.float32)
    angles = np.arange(length, dtype=np.float32)[:, None] * rates[None]
    angles = np.concatenate([angles, angles], axis=-1)
    return np.cos(angles), np.sin(angles)


COS, SIN = rope_tables(16, 4)  # cached for longer inputs, like a buffer of a module


def rotate(x):
    """Rotary positions from the cached tables; dimension d turns with d + width/2."""
    left, right = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-right, left], axis=-1)
    time = x.shape[1]
    return x * COS[None, :time, None] + turned * SIN[None, :time, None]


@structure(
    "attention_rope_cached_tables",
    "crash",
    {"q:1": 2, "q:1#2": 2, "v:1": 4},
    {"q": (4, 8), "k": (4, 8), "v": (4, 8), "o": (8, 4)},
    SEQUENCE,
)
def _(p, x):
    q, k, v = (heads(x @ p[name], 2) for name in "qkv")
    return attend(rotate(q), rotate(k), v) @ p["o"]


GROUPED = {"q": (4, 12), "k": (4, 6), "v": (4, 6), "o": (12, 4)}
GROUPED_UNITS = {
    "q:1": 2,  # a key and value head with its queries
    "q:1#2": 2,  # one query of every key and value head
    "q:1#3": 3,  # a dimension of queries and keys
    "v:1": 3,  # a dimension of values
}


@structure("grouped_queries_repeated", "idle", GROUPED_UNITS, GROUPED, SEQUENCE)
def _(p, x):
    q = heads(x @ p["q"], 4)
    k, v = (jnp.repeat(heads(x @ p[name], 2), 2, axis=2) for name in "kv")
    return attend(q, k, v) @ p["o"]


# torch's expand + reshape.
@structure("grouped_queries_expanded", "idle", GROUPED_UNITS, GROUPED, SEQUENCE)
def _(p, x):
    def expand(y):
        wide = jnp.broadcast_to(y[:, :, :, None], (*y.shape[:3], 2, y.shape[3]))
        return wide.reshape(*y.shape[:2], 4, y.shape[3])

    q = heads(x @ p["q"], 4)
    k, v = (expand(heads(x @ p[name], 2)) for name in "kv")
    return attend(q, k, v) @ p["o"]


@structure(
    "one_key_value_head",
    "thread",
    {"q:1": 3, "q:1#2": 4, "v:1": 3},
    {"q": (4, 12), "k": (4, 3), "v": (4, 3), "o": (12, 4)},
    SEQUENCE,
)
def _(p, x):
    q, k, v = heads(x @ p["q"], 4), x @ p["k"], x @ p["v"]
    weight = jax.nn.softmax(jnp.einsum("bthd,bsd->bhts", q, k), axis=-1)
    mixed = jnp.einsum("bhts,bsd->bthd", weight, v)
    return mixed.reshape(*x.shape[:2], -1) @ p["o"]


# Swin: one learned number per head and offset, gathered by a constant index.
OFFSETS = np.arange(5)[:, None] - np.arange(5)[None] + 4


@structure(
    "relative_position_bias_table",
    "idle",
    {"q:1": 2, "q:1#2": 3, "v:1": 3},
    {**SEPARATE, "table": (9, 2)},
    SEQUENCE,
    refused={"table:0": "indexed by constants"},
)
def _(p, x):
    q, k, v = (heads(x @ p[name], 2) for name in "qkv")
    bias = p["table"][OFFSETS].transpose(2, 0, 1)
    scores = jnp.einsum("bthd,bshd->bhts", q, k) + bias[None]
    mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores, axis=-1), v)
    return mixed.reshape(*x.shape[:2], -1) @ p["o"]


@structure(
    "attention_with_scale_of_every_head",
    "thread",
    {"q:1": 2, "q:1#2": 3, "v:1": 3},
    {**SEPARATE, "scale": (2, 1, 1)},
    SEQUENCE,
)
def _(p, x):
    q, k, v = (heads(x @ p[name], 2) for name in "qkv")
    scores = jnp.einsum("bthd,bshd->bhts", q, k) * p["scale"][None]
    mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores, axis=-1), v)
    return mixed.reshape(*x.shape[:2], -1) @ p["o"]


# --- attention between channels -------------------------------------------------------


# In a softmax over an axis that is cut masked positions count as exp(0) in the sum and as
# 0 in the maximum that it subtracts first.


# DANet: the C x C map of a convolution with itself.
@structure(
    "channel_attention",
    "thread",
    {"stem:3": 6},
    {"stem": (3, 3, 3, 6), "w": (6, 2)},
    normal(4, 4, 3),
)
def _(p, x):
    f = conv(x, p["stem"]).reshape(x.shape[0], -1, 6)
    weight = jax.nn.softmax(jnp.einsum("bsi,bsj->bij", f, f), axis=-1)
    return (f + jnp.einsum("bij,bsj->bsi", weight, f)).mean(1) @ p["w"]


# XCiT: dimensions of a head attend to each other; queries are one side, keys the other.
@structure(
    "cross_covariance_attention",
    "thread",
    {"q:1": 2, "q:1#2": 3, "k:1": 3},
    {**SEPARATE, "scale": (2, 1, 1)},
    SEQUENCE,
)
def _(p, x):
    def unit(y):
        return y / jnp.sqrt((y * y).sum(1, keepdims=True) + 1e-6)

    q, k, v = (heads(x @ p[name], 2) for name in "qkv")
    scores = jnp.einsum("bthi,bthj->bhij", unit(q), unit(k)) * p["scale"][None]
    mixed = jnp.einsum("bhij,bthj->bthi", jax.nn.softmax(scores, axis=-1), v)
    return mixed.reshape(*x.shape[:2], -1) @ p["o"]


@structure(
    "linear_attention",
    "thread",
    {"q:1": 2, "q:1#2": 3, "v:1": 3},
    SEPARATE,
    SEQUENCE,
)
def _(p, x):
    q, k, v = (jax.nn.relu(heads(x @ p[name], 2)) for name in "qkv")
    mixed = jnp.einsum("bthd,bshd,bshe->bthe", q, k, v)
    return mixed.reshape(*x.shape[:2], -1) @ p["o"]
