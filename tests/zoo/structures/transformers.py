"""Whole blocks of language models and vision transformers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from zoo import linen, normal, tokens
from zoo.structures import (
    IMAGE,
    SEQUENCE,
    conv,
    head,
    register,
    structure,
)
from zoo.structures.attention import attend, heads, rotate

STEM = {"stem": (3, 3, 3, 6)}

# --- language models ------------------------------------------------------------------


# HF GPT-2: Conv1D keeps [in, out] kernels and applies addmm on rows of tokens.
@structure(
    "gpt2_conv1d",
    "thread",
    {
        "tokens:1": 6,
        "positions:0": 4,  # positions that no input of this length reads
        "attn:1": 2,
        "attn:1#2": 3,
        "attn:1#3": 3,
        "fc:1": 7,
    },
    {
        "tokens": (9, 6),
        "positions": (8, 6),
        "scale0": (6,),
        "bias0": (6,),
        "attn": (6, 18),
        "attn_bias": (18,),
        "proj": (6, 6),
        "proj_bias": (6,),
        "scale1": (6,),
        "bias1": (6,),
        "fc": (6, 7),
        "fc_bias": (7,),
        "out": (7, 6),
        "out_bias": (6,),
    },
    tokens(4, 9),
    refused={"tokens:0": "indexed by values"},
)
def _(p, ids):
    def conv1d(x, kernel, bias):
        flat = x.reshape(-1, x.shape[-1]) @ kernel + bias[None]
        return flat.reshape(*x.shape[:-1], kernel.shape[1])

    def norm(x, scale, bias):
        mean = x.mean(-1, keepdims=True)
        variance = (x * x).mean(-1, keepdims=True) - mean * mean
        y = (x - mean) * lax.rsqrt(variance + 1e-5)
        return y * scale[None, None] + bias[None, None]

    x = p["tokens"][ids] + p["positions"][: ids.shape[1]][None]
    h = norm(x, p["scale0"], p["bias0"])
    qkv = jnp.split(conv1d(h, p["attn"], p["attn_bias"]), 3, axis=2)
    x = x + conv1d(attend(*(heads(y, 2) for y in qkv)), p["proj"], p["proj_bias"])
    h = norm(x, p["scale1"], p["bias1"])
    h = jax.nn.gelu(conv1d(h, p["fc"], p["fc_bias"]))
    x = x + conv1d(h, p["out"], p["out_bias"])
    return x @ p["tokens"].T


LLAMA = {
    "norm0": (8,),
    "q": (8, 16),
    "k": (8, 8),
    "v": (8, 8),
    "o": (16, 8),
    "norm1": (8,),
    "gate": (8, 7),
    "up": (8, 7),
    "down": (7, 8),
}


def llama_layer(p, x):
    """RMSNorm, rotary positions, 4 heads on 2 key and value heads, SwiGLU."""

    def norm(x, scale):
        power = (x * x).mean(-1, keepdims=True)
        return x * lax.rsqrt(power + 1e-5) * scale[None, None]

    h = norm(x, p["norm0"])
    q, k, v = heads(h @ p["q"], 4), heads(h @ p["k"], 2), heads(h @ p["v"], 2)
    k, v = (jnp.repeat(y, 2, axis=2) for y in (rotate(k), v))
    x = x + attend(rotate(q), k, v) @ p["o"]
    h = norm(x, p["norm1"])
    return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]


def llama_units(prefix):
    """The groups of one layer, apart from the residual stream."""
    return {
        f"{prefix}q:1": 2,  # a key and value head with its queries
        f"{prefix}q:1#2": 2,  # one query of every key and value head
        f"{prefix}q:1#3": 2,  # a pair of rotated dimensions
        f"{prefix}v:1": 4,
        f"{prefix}gate:1": 7,
    }


LAYERS = 2


def _layer(k, p):
    return {name: p[f"layer{k}_{name}"] for name in LLAMA}


# One layer of this took the rival longer than three minutes.
@structure(
    "llama_two_key_value_heads",
    "thread",
    {
        "table:1": 8,
        **{k: n for i in range(LAYERS) for k, n in llama_units(f"layer{i}_").items()},
    },
    {
        "table": (9, 8),
        **{f"layer{i}_{k}": n for i in range(LAYERS) for k, n in LLAMA.items()},
        "head": (8, 9),
    },
    tokens(4, 9),
    refused={"table:0": "indexed by values"},
)
def _(p, ids):
    x = p["table"][ids]
    for k in range(LAYERS):
        x = llama_layer(_layer(k, p), x)
    return x @ p["head"]


# The same layer with stacked parameters under scan.
@structure(
    "llama_layers_under_scan",
    "thread",
    {
        "embed:1": 8,
        "q:2": 2,
        "q:2#2": 2,
        "q:2#3": 2,
        "v:2": 4,
        "gate:2": 7,
    },
    {
        "embed": (4, 8),
        **{name: (3, *shape) for name, shape in LLAMA.items()},
        "head": (8, 3),
    },
    SEQUENCE,
    refused={f"{name}:0": "a scan iterates over this axis" for name in LLAMA},
)
def _(p, x):
    stacked = {name: p[name] for name in LLAMA}
    x, _ = lax.scan(lambda x, p: (llama_layer(p, x), None), x @ p["embed"], stacked)
    return x @ p["head"]


# Mamba: a depthwise convolution over time, input-dependent steps, a scan over time.
@structure(
    "selective_state_space",
    "thread",
    {"in:1": 6, "a:1": 3, "rank:1": 2},
    {
        "in": (4, 12),
        "short": (3, 1, 6),
        "rank": (6, 2),
        "step": (2, 6),
        "b": (6, 3),
        "c": (6, 3),
        "a": (6, 3),
        "skip": (6,),
        "out": (6, 4),
    },
    SEQUENCE,
)
def _(p, x):
    x, gate = jnp.split(x @ p["in"], 2, axis=-1)
    numbers = ("NTC", "TIO", "NTC")
    x = lax.conv_general_dilated(
        x, p["short"], (1,), [(2, 0)], None, None, numbers, feature_group_count=6
    )
    x = jax.nn.silu(x)
    step = jax.nn.softplus(x @ p["rank"] @ p["step"])
    decay = jnp.exp(-step[..., None] * jnp.exp(p["a"])[None, None])
    write = (step * x)[..., None] * (x @ p["b"])[:, :, None]

    def advance(state, now):
        decay, write, read = now
        state = decay * state + write
        return state, jnp.einsum("bcn,bn->bc", state, read)

    time_first = [y.swapaxes(0, 1) for y in (decay, write, x @ p["c"])]
    _, y = lax.scan(advance, jnp.zeros((x.shape[0], 6, 3)), time_first)
    y = y.swapaxes(0, 1) + x * p["skip"][None, None]
    return (y * jax.nn.silu(gate)) @ p["out"]


# --- vision transformers --------------------------------------------------------------


# Swin: windows of 2 x 2 pixels, rolled by one, heads of 3 dimensions.
@structure(
    "shifted_windows",
    "thread",
    {"stem:3": 6, "qkv:1": 2, "qkv:1#2": 3},
    {**STEM, "qkv": (6, 18), "table": (9, 2), "out": (6, 6), "w": (6, 2)},
    refused={"table:0": ""},
)
def _(p, x):
    x = conv(x, p["stem"])
    h = jnp.roll(x, (-1, -1), axis=(1, 2))
    h = h.reshape(-1, 2, 2, 2, 2, 6).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 4, 6)
    q, k, v = jnp.moveaxis((h @ p["qkv"]).reshape(-1, 4, 3, 2, 3), 2, 0)
    place = np.stack(np.meshgrid(range(2), range(2), indexing="ij"), -1).reshape(4, 2)
    offset = (place[:, None] - place[None]) @ np.array([3, 1]) + 4
    bias = p["table"][offset.reshape(-1)].reshape(4, 4, 2).transpose(2, 0, 1)
    scores = jnp.einsum("nthd,nshd->nhts", q, k) + bias[None]
    h = jnp.einsum("nhts,nshd->nthd", jax.nn.softmax(scores, axis=-1), v)
    h = h.reshape(-1, 4, 6) @ p["out"]
    h = h.reshape(-1, 2, 2, 2, 2, 6).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 4, 4, 6)
    return head(x + jnp.roll(h, (1, 1), axis=(1, 2)), p["w"])


# MViT: queries, keys and values pooled by depthwise convolutions.
@structure(
    "pooled_attention",
    "thread",
    {"q:1": 2, "q:1#2": 3, "v:1": 3},
    {
        **dict.fromkeys("qkv", (4, 6)),
        **{f"pool_{name}": (2, 1, 6) for name in "qkv"},
        "o": (6, 3),
    },
    normal(6, 4),
)
def _(p, x):
    def pooled(name):
        numbers = ("NTC", "TIO", "NTC")
        y = lax.conv_general_dilated(
            x @ p[name],
            p[f"pool_{name}"],
            (2,),
            "VALID",
            None,
            None,
            numbers,
            feature_group_count=6,
        )
        return heads(y, 2)

    return attend(*(pooled(name) for name in "qkv")) @ p["o"]


# DiT: scale, shift and gate of every channel are predicted from a condition.
class Modulated(nn.Module):
    @nn.compact
    def __call__(self, x, condition):
        x = nn.Dense(6, name="embed")(x)
        six = nn.Dense(18, name="modulation")(nn.silu(condition))
        shift, scale, gate = jnp.split(six[:, None], 3, axis=-1)
        y = nn.LayerNorm(use_bias=False, use_scale=False, name="norm")(x)
        y = nn.gelu(nn.Dense(7, name="up")(y * (1.0 + scale) + shift))
        x = x + gate * nn.Dense(6, name="down")(y)
        return nn.Dense(3, name="head")(x)


def _sequence_and_condition(batch, seed):
    return (*SEQUENCE(batch, seed), *normal(3)(batch, seed + 50))


register(
    "adaptive_layer_norm",
    "thread",
    {"params/embed/kernel:1": 6, "params/up/kernel:1": 7},
    lambda: linen(Modulated(), _sequence_and_condition),
)


# ConvNeXt: depthwise, LayerNorm over channels, inverted bottleneck, layer scale.
class ConvNeXt(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (2, 2), strides=2, name="stem")(x)
        y = nn.Conv(6, (3, 3), feature_group_count=6, name="depthwise")(x)
        y = nn.gelu(nn.Dense(9, name="up")(nn.LayerNorm(name="norm")(y)))
        y = nn.Dense(6, name="down")(y)
        x = x + y * self.param("layer_scale", nn.initializers.ones, (1, 1, 1, 6))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


register(
    "convnext_block",
    "thread",
    {"params/stem/kernel:3": 6, "params/up/kernel:1": 9},
    lambda: linen(ConvNeXt(), IMAGE),
)


# Experts without padding: rows sorted by expert, a kernel for each run of rows.
def _rows_of_experts(batch, seed):
    return (*normal(4)(6, seed), np.array([1, 3, 2], np.int32))


@structure(
    "experts_by_ragged_dot",
    "thread",
    {"up:2": 6},
    {"up": (3, 4, 6), "down": (3, 6, 2)},
    _rows_of_experts,
    refused={
        "up:0": "group sizes of a ragged product",
        "down:0": "group sizes of a ragged product",
    },
)
def _(p, x, sizes):
    h = jax.nn.gelu(lax.ragged_dot(x, p["up"], sizes))
    return lax.ragged_dot(h, p["down"], sizes)


# Messages along the edges of a graph, summed at the nodes that they reach.
def _graph(batch, seed):
    edges = np.random.default_rng(seed).integers(7, size=(2, 9), dtype=np.int32)
    return (*normal(4)(7, seed), *edges)


@structure(
    "graph_messages",
    "thread",
    {"a:1": 6, "b:1": 5},
    {"a": (4, 6), "b": (6, 5), "w": (5, 3)},
    _graph,
)
def _(p, x, source, target):
    message = jax.nn.relu(x @ p["a"])[source] @ p["b"]
    return jnp.tanh(jax.ops.segment_sum(message, target, 7)) @ p["w"]
